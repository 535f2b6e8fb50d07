"""Requests in a file, one line of JSON each, over any of a bundle's variants; results in the same order.

    {"custom_id": "a", "variant": "code", "prompt": "def f(", "max_tokens": 32, "stop": ["."]}

All lines are checked before the first is answered. They run together, whatever their variants. A result is
written when all before it are; it names its line by a digest, so that a run that was killed goes on where it
ended.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from moemerge.bundle.manifest import MANIFEST
from moemerge.bundle.reader import Bundle
from moemerge.bundle.target import locked, writing
from moemerge.errors import Finding, InvalidRecipe, MoemergeError, NotFound
from moemerge.runner.engine import Engine
from moemerge.runner.request import Output
from moemerge.runner.sampling import TokenLogprob
from moemerge.text.answers import RunningAnswer
from moemerge.text.reasoning import Parts
from moemerge.text.request_lines import RequestLine, parse_line
from moemerge.text.results import check_target, keep_whole_results
from moemerge.text.variants import BundleText

_SHOWN_FINDINGS = 20
_WAITING_PER_RUNNING = 4
_MAX_UNWRITTEN = 4096
_LEAST_LOGPROB = -9999.0
"""What is written for the logarithm of 0, which JSON does not have."""


class RequestFile:
    """A file of requests to a bundle.

    Attributes:
        variants: Those that the lines ask, once `check` has been called.
    """

    def __init__(
        self, bundle: Bundle, source: Path, *, defaults: Mapping[str, Any] | None = None, dtype: str = "auto"
    ) -> None:
        """Look it up.

        Args:
            bundle: Who answers.
            source: The file.
            defaults: Fields of lines that do not have them.
            dtype: Computed in; results of another one are not continued.

        Raises:
            NotFound: There is no such file.
        """
        if not source.is_file():
            raise NotFound(f"{source}: no such file")
        self.source = source
        self.variants: tuple[str, ...] = ()
        self._texts = BundleText(bundle)
        self._defaults = dict(defaults or {})
        facts = json.dumps([self._defaults, dtype], sort_keys=True).encode()
        self._key = blake2b((bundle.folder / MANIFEST).read_bytes() + facts).digest()

    def check(self) -> int:
        """Read every line, and count them.

        Raises:
            InvalidRecipe: Lines that cannot be answered; `findings` has all of them.
        """
        findings, count, variants = [], 0, dict[str, None]()
        for count, (number, raw) in enumerate(self._raw_lines(), start=1):  # noqa: B007
            try:
                variants[self._parse(number, raw).text.name] = None
            except MoemergeError as error:
                where = f"{self.source}, line {number}"
                findings.append(Finding(level="error", code="REQUEST_LINE", where=where, found=str(error)))
        if findings:
            what = "1 line is wrong" if len(findings) == 1 else f"{len(findings)} lines are wrong"
            cut = f", the first {_SHOWN_FINDINGS}" if len(findings) > _SHOWN_FINDINGS else ""
            shown = [f"  - {finding}" for finding in findings[:_SHOWN_FINDINGS]]
            raise InvalidRecipe("\n".join([f"{self.source}: {what}{cut}", *shown]), findings)
        self.variants = tuple(variants)
        return count

    def lines(self, start: int = 0) -> Iterator[RequestLine]:
        """Checked lines, from the one with so many before it."""
        return (self._parse(number, raw) for number, raw in islice(self._raw_lines(), start, None))

    def digests(self) -> Iterator[tuple[int, str]]:
        """Number and digest of every line; the digest also stands for the bundle and the defaults."""
        return ((number, self._digest(raw)) for number, raw in self._raw_lines())

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        with self.source.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield number, raw.strip()

    def _parse(self, number: int, raw: bytes) -> RequestLine:
        return parse_line(raw, number, self._texts, self._defaults)

    def _digest(self, raw: bytes) -> str:
        return blake2b(raw, key=self._key, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What answering a file came to.

    Attributes:
        num_lines: All requests of the file.
        num_resumed: Those whose results were there already.
        num_failed: Those that ended with an error now.
        num_tokens: Tokens answered now.
    """

    num_lines: int
    num_resumed: int
    num_failed: int
    num_tokens: int


def run_request_file(
    engine: Engine,
    requests: RequestFile,
    target: Path,
    *,
    on_result: Callable[[int], None] = lambda count: None,
) -> FileReport:
    """Answer all lines that have no result yet.

    Args:
        engine: Serves the variants of the file.
        requests: The file, checked.
        target: Where results go, one per line, appended as they become final.
        on_result: Told how many results there are.

    Raises:
        InvalidRecipe: The target holds something else than results of these requests.
        Busy: Another process writes it.
        NotEnoughRoom: The disk is full, or the target cannot be written.
    """
    check_target(target, requests.source)
    with writing(target), locked(target):
        num_resumed = keep_whole_results(target, requests.digests(), requests.source)
        run = _Run(engine, requests.lines(start=num_resumed))
        digests = (digest for _, digest in islice(requests.digests(), num_resumed, None))
        count = num_resumed
        with target.open("ab") as file:
            for count, result in enumerate(run.results(file.flush), start=num_resumed + 1):
                file.write(
                    json.dumps({**result, "digest": next(digests)}, ensure_ascii=False).encode() + b"\n"
                )
                on_result(count)
    return FileReport(
        num_lines=count, num_resumed=num_resumed, num_failed=run.num_failed, num_tokens=run.num_tokens
    )


@dataclass(slots=True)
class _Entry:
    line: RequestLine
    running: RunningAnswer
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, output: Output) -> None:
        if not self.running.has_ended:
            self.logprobs += output.logprobs
            self.running.add(output)


class _Run:
    """Lines on their way through the engine."""

    def __init__(self, engine: Engine, lines: Iterator[RequestLine]) -> None:
        self.num_failed = 0
        self.num_tokens = 0
        self._engine = engine
        self._lines = lines
        self._unwritten: deque[_Entry] = deque()
        self._running: dict[str, _Entry] = {}

    def results(self, after_step: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Results in the order of the lines, as they become final."""
        try:
            self._submit()
            while self._unwritten:
                self._step()
                while self._unwritten and self._unwritten[0].running.has_ended:
                    yield self._result(self._unwritten.popleft())
                after_step()
                self._submit()
        finally:
            for request_id in self._running:
                self._engine.cancel(request_id)

    def _submit(self) -> None:
        """Keep the engine busy, without reading the whole file into memory."""
        most = _WAITING_PER_RUNNING * self._engine.options.max_batch
        while len(self._running) < most and len(self._unwritten) < _MAX_UNWRITTEN:
            line = next(self._lines, None)
            if line is None:
                return
            entry = _Entry(line, RunningAnswer(line.request, line.text, line.stop))
            self._unwritten.append(entry)
            try:
                self._engine.submit(line.request_within(self._engine.limits_of(line.text.name)))
            except (InvalidRecipe, NotFound) as error:
                entry.running.fail(str(error))
            else:
                self._running[line.request.request_id] = entry

    def _step(self) -> None:
        for output in self._engine.step():
            entry = self._running.get(output.request_id)
            if entry is None:
                continue
            entry.add(output)
            if entry.running.has_ended:
                del self._running[output.request_id]
                self._engine.cancel(output.request_id)

    def _result(self, entry: _Entry) -> dict[str, Any]:
        line, running = entry.line, entry.running
        self.num_tokens += len(running.token_ids)
        self.num_failed += running.error is not None
        result: dict[str, Any] = {"line": line.number}
        if line.custom_id is not None:
            result["custom_id"] = line.custom_id
        parts = Parts("", running.text)
        if line.is_chat:
            parts = line.text.reasoning(line.request.prompt_ids).split(running.text)
        if parts.reasoning:
            result["reasoning"] = parts.reasoning
        result |= {
            "variant": line.text.name,
            "text": parts.content,
            "token_ids": running.token_ids,
            "finish_reason": running.finish_reason,
            "usage": {
                "prompt_tokens": len(line.request.prompt_ids),
                "completion_tokens": len(running.token_ids),
            },
        }
        if line.request.num_logprobs is not None:
            result["logprobs"] = [
                {
                    "token_id": one.token_id,
                    "logprob": max(one.logprob, _LEAST_LOGPROB),
                    "top": [[token_id, max(value, _LEAST_LOGPROB)] for token_id, value in one.top],
                }
                for one in entry.logprobs
            ]
        if running.error is not None:
            result["error"] = running.error
        return result
