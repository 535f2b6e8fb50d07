"""Every failure that a user or a file can cause.

    MoemergeError                          exit code 1
    ├── InvalidRecipe                      3   recipe, option values, references
    ├── IncompatibleInputs                 4   carries every finding of a stage
    │   ├── UnsupportedCheckpoint          4   unknown family, quantised, adapter only
    │   └── IncompatibleExperts            4   parts or shapes differ
    ├── NotFound                           5
    │   └── NotAuthorised                  5   gated or private, no or insufficient token
    ├── NetworkFailure                     6   or offline and not cached
    │   └── ClusterFailure                 6   no cluster, or its nodes are lost
    ├── NotEnoughRoom                      7   disk or memory
    ├── DamagedInput                       8   truncated, altered, inconsistent, not finite
    │   ├── MissingTensors                 8
    │   └── DamagedBundle                  8
    ├── QualityGateFailed                  9
    ├── Busy                              10   another process holds the output
    └── ServingError                      10   a running engine cannot take a request
        ├── Overloaded                    10   queues are full; says when to come again
        └── Stopping                      10   shutting down

A bug is not a `MoemergeError`: it keeps its traceback. Knows nothing of the rest of the package.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import ValidationError

Level = Literal["error", "warning", "note"]
PYDANTIC_PREFIX = "Value error, "
"""Before what our own validators say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a check found, in the words a person needs to act on it.

    Attributes:
        level: `error` stops the work, `warning` and `note` do not.
        code: Stable name for programs, for example `SHAPE_DIFFERS`.
        where: File, key, tensor or variant concerned.
        found: What is there.
        expected: What was needed; empty when there is nothing to compare with.
        fix: What to do about it.
    """

    level: Level
    code: str
    where: str
    found: str
    expected: str = ""
    fix: str = ""

    def __str__(self) -> str:
        expected = f", expected {self.expected}" if self.expected else ""
        fix = f". {self.fix}" if self.fix else ""
        return f"{self.where}: {self.found}{expected}{fix}"

    def as_dict(self) -> dict[str, str]:
        """The fields by name, for `--json`."""
        return asdict(self)


class MoemergeError(Exception):
    """Base of everything raised for a user's or a file's fault."""

    exit_code = 1

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class InvalidRecipe(MoemergeError):
    """A recipe, an option value or a reference cannot be right."""

    exit_code = 3


class IncompatibleInputs(MoemergeError):
    """Inputs that cannot be consolidated together; `findings` lists every reason."""

    exit_code = 4


class UnsupportedCheckpoint(IncompatibleInputs):
    """A checkpoint of a kind that moemerge does not read."""


class IncompatibleExperts(IncompatibleInputs):
    """Experts whose parts or shapes differ."""


class NotFound(MoemergeError):
    """A path, repository, revision or file does not exist."""

    exit_code = 5


class NotAuthorised(NotFound):
    """The repository exists but is gated or private."""


class NetworkFailure(MoemergeError):
    """The hub did not answer, or `--offline` was given and the file is not cached."""

    exit_code = 6


class ClusterFailure(NetworkFailure):
    """There is no cluster where one should be, or it loses what it is given."""


class NotEnoughRoom(MoemergeError):
    """Disk or memory does not suffice, by estimate or in fact."""

    exit_code = 7


class DamagedInput(MoemergeError):
    """A file is truncated, altered or contradicts another."""

    exit_code = 8


class MissingTensors(DamagedInput):
    """Tensors that the family description expects are not there."""


class DamagedBundle(DamagedInput):
    """A bundle does not hold what its manifest promises."""


class QualityGateFailed(MoemergeError):
    """The result was computed and misses a limit the user set."""

    exit_code = 9


class Busy(MoemergeError):
    """Another process is writing the same output."""

    exit_code = 10


class ServingError(MoemergeError):
    """A running engine cannot take a request, through no fault of the request."""

    exit_code = 10


class Overloaded(ServingError):
    """A queue is full.

    Attributes:
        retry_after_s: When another attempt is worth it.
        scope: Whose queue it is: that of the request's variant, or the server's.
    """

    def __init__(
        self, message: str, *, retry_after_s: float, scope: Literal["variant", "server"] = "server"
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.scope = scope


class Stopping(ServingError):
    """The engine finishes what it has and takes nothing new."""


def list_problems(error: "ValidationError", most: int = 3) -> str:
    """What is wrong with a file's values, and where in the file, if it is in one place."""
    found = []
    for problem in error.errors()[:most]:
        place = ".".join(map(str, problem["loc"]))
        said = problem["msg"].removeprefix(PYDANTIC_PREFIX)
        found.append(f"{place}: {said}" if place else said)
    return "; ".join(found)


def raise_findings(findings: Sequence[Finding], subject: str) -> None:
    """Raise `IncompatibleInputs` with every error among `findings`; return when there is none."""
    errors = [finding for finding in findings if finding.level == "error"]
    if not errors:
        return
    raise IncompatibleInputs(list_findings(errors, subject), findings)


def list_findings(findings: Sequence[Finding], subject: str) -> str:
    """A message that counts the findings and gives each a line."""
    count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    return "\n".join([f"{subject}: {count}", *(f"  - {finding}" for finding in findings)])
