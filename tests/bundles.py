"""Tiny bundles for whatever serves them, from the checkpoints of `tests.factories`.

    folder = write_bundle(tmp_path, "mixtral")            # sources beside it, in folder.parent / name

Four variants of one base. `plain` is a fine-tune of it; `large` has more tokens; `twin` differs from
`plain` in routers and experts only, so that the bundle stores everything else once for both; `odd` has a
different arithmetic where the family has one: another rotary base and a sliding window.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.policies import CLUSTER
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.sampling import TokenLogprob
from tests.factories import write_checkpoint

NAMES = ("plain", "large", "twin", "odd")
VOCABULARIES = {"plain": 64, "large": 96, "twin": 64, "odd": 66}
WINDOW = 6


def write_family(folder: Path, family: str = "mixtral", dtype: str = "F32") -> dict[str, Path]:
    """The four checkpoints, in folders of their names."""
    base = write_checkpoint(folder / "base", family, dtype=dtype)
    odd = {"rope_theta": 300.0, "sliding_window": WINDOW} if family == "mixtral" else {}
    plain = write_checkpoint(folder / "plain", base=base, noise=0.3, seed=1)
    large = write_checkpoint(folder / "large", base=base, noise=0.3, seed=2, vocab=VOCABULARIES["large"])
    twin = write_checkpoint(folder / "twin", base=plain, noise=0.3, seed=3, only=_is_routing)
    other = write_checkpoint(
        folder / "odd", base=base, noise=0.3, seed=4, vocab=VOCABULARIES["odd"], settings=odd
    )
    return dict(zip(NAMES, (plain, large, twin, other), strict=True))


def write_bundle(folder: Path, family: str = "mixtral", *, dtype: str = "F32", budget: str = "exact") -> Path:
    """A bundle of the four, `folder / "x.moe"`, plain whatever the budget."""
    variants = open_variants({n: FolderRef(path) for n, path in write_family(folder, family, dtype).items()})
    merge(variants, folder / "x.moe", options_of(budget, CLUSTER, within=False))
    return folder / "x.moe"


def open_engine(bundle: Bundle | Path, **options: object) -> Engine:
    """An engine over a bundle."""
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return Engine(opened, EngineOptions(**options))  # type: ignore[arg-type]


@dataclass
class Answer:
    """What an engine told about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    error: str | None = None

    def add(self, output: Output) -> None:
        assert self.finish is None, "told something after the end"
        assert output.timing is None or output.finish is not None
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "told the prompt twice"
            self.prompt_logprobs = output.prompt_logprobs
        self.finish, self.error = output.finish, output.error


def collect(outputs: Iterable[Output]) -> dict[str, Answer]:
    """Answers by request."""
    answers: dict[str, Answer] = {}
    for output in outputs:
        answers.setdefault(output.request_id, Answer()).add(output)
    return answers


def run(engine: Engine, *requests: Request) -> list[Answer]:
    """The answers to these requests, computed together."""
    answers = collect(engine.run(requests))
    return [answers[request.request_id] for request in requests]


def _is_routing(name: str) -> bool:
    return name.startswith("experts.") or name.endswith("router")
