"""Names of things: experts, pool experts, and where a checkpoint comes from.

Knows the grammar of references and nothing of files or networks.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moemerge.errors import InvalidRecipe

VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.IGNORECASE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


class ExpertRef(NamedTuple):
    """The expert that a variant has in a slot of a layer (layers count through all stacks)."""

    variant: str
    layer: int
    slot: int

    def __str__(self) -> str:
        return f"{self.variant}:{self.layer}.{self.slot}"


@dataclass(frozen=True, slots=True, order=True)
class PoolRef:
    """One of the experts stored for a layer."""

    layer: int
    index: int


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repository on the hub, `org/name` or `org/name@revision`."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True, slots=True)
class FolderRef:
    """A folder on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


SourceRef = HubRef | FolderRef


@dataclass(frozen=True, slots=True)
class VariantRef:
    """A variant of a bundle, `folder:variant`."""

    folder: Path
    variant: str

    def __str__(self) -> str:
        return f"{self.folder}:{self.variant}"


def parse_source(text: str) -> SourceRef:
    """The checkpoint that `text` names.

    A leading `.`, `/` or `~` means a folder, `org/name[@revision]` a hub repository, and anything
    else a folder if it exists. When a relative folder has the form of a repository name and exists,
    the text is ambiguous.

    Raises:
        InvalidRecipe: Empty, ambiguous, or neither form.
    """
    if not text.strip():
        raise InvalidRecipe("empty reference; expected org/name, org/name@revision or a folder")
    if text.startswith("hf://"):
        return _parse_hub(text.removeprefix("hf://"), text)
    if text.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        return FolderRef(Path(text).expanduser())
    repository = text.partition("@")[0]
    if _REPOSITORY.fullmatch(repository):
        if Path(text).is_file():
            raise InvalidRecipe(f"{text} is a file; give the folder that holds it")
        if Path(text).is_dir():
            raise InvalidRecipe(
                f"{text!r} is both a folder here and a valid repository name; "
                f"write ./{text} for the folder or hf://{text} for the repository"
            )
        return _parse_hub(text, text)
    if Path(text).exists():
        return FolderRef(Path(text))
    raise InvalidRecipe(f"{text!r} is neither an existing folder nor of the form org/name[@revision]")


def parse_model(text: str) -> SourceRef | VariantRef:
    """The checkpoint, bundle or variant of a bundle that `text` names.

    Raises:
        InvalidRecipe: As `parse_source`.
    """
    folder, _, variant = text.rpartition(":")
    is_drive = len(folder) == 1
    if folder and not is_drive and VARIANT_NAME.fullmatch(variant) and not Path(text).exists():
        return VariantRef(Path(folder).expanduser(), variant)
    return parse_source(text)


def parse_repository(text: str) -> HubRef:
    """The hub repository that `text` names.

    Raises:
        InvalidRecipe: Not of the form `org/name[@revision]`.
    """
    return _parse_hub(text.removeprefix("hf://"), text)


def _parse_hub(text: str, original: str) -> HubRef:
    repository, at, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not re.fullmatch(r"[\w./-]+", revision)):
        raise InvalidRecipe(f"{original!r} is not of the form org/name[@revision]")
    return HubRef(repository, revision or None)


def parse_named_sources(texts: list[str]) -> dict[str, SourceRef]:
    """Variants from `NAME=REF` arguments, in the order given.

    Raises:
        InvalidRecipe: No `=`, an unusable name, or a name given twice.
    """
    sources: dict[str, SourceRef] = {}
    for text in texts:
        name, equals, reference = text.partition("=")
        if not equals:
            raise InvalidRecipe(f"{text!r} has no name; write NAME={text}")
        check_variant_name(name, sources)
        sources[name] = parse_source(reference)
    return sources


def check_variant_name(name: str, taken: object = ()) -> None:
    """Refuse names that cannot be a folder on every system, and names already in use.

    Raises:
        InvalidRecipe: Bad characters, reserved, or equal to a taken name but for case.
    """
    if not VARIANT_NAME.fullmatch(name) or name.lower() in _RESERVED_NAMES:
        raise InvalidRecipe(
            f"variant name {name!r} cannot be used: letters, digits, - and _ only, "
            f"at most 64, and not a reserved device name"
        )
    if isinstance(taken, dict | list | tuple | set) and name.lower() in {str(t).lower() for t in taken}:
        raise InvalidRecipe(f"variant name {name!r} is given twice; every variant needs its own name")
