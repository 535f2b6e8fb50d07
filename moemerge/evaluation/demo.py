"""The demonstration: one small family merged in several ways and measured on held-out text."""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.bundle.reader import is_bundle, open_bundle
from moemerge.calibration.texts import cut_windows, read_text
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tokenizer import VariantTokenizer, load_tokenizer
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.recipe import options_of
from moemerge.errors import NotFound, UnsupportedCheckpoint
from moemerge.evaluation.loading import average_models, load_model
from moemerge.evaluation.perplexity import gain_recovered, mean_nll, perplexity
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.weights import Swap
from moemerge.text.answers import answer
from moemerge.text.variants import VariantText

WINDOW_TOKENS = 256
NUM_WINDOWS = 24
_ANSWER_TOKENS = 48
# Label, budget, policy; None stands for the default policy.
MERGES = (
    ("exact", "exact", None),
    ("2x", "2x", None),
    ("1.5x", "1.5x", None),
    ("1x", "1x", None),
    ("1x mean", "1x", "mean"),
    ("1x pick (paper)", "1x", "pick"),
)
SHOWN = "1x"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to keep all variants.

    Attributes:
        label: How it is called.
        expert_bytes: Bytes of its experts.
        ratio: The same over one variant's expert bytes.
        nll: By variant, on the variant's own text.
        gain: By variant, share of the fine-tuning gain that is left.
    """

    label: str
    expert_bytes: int
    ratio: float
    nll: dict[str, float]
    gain: dict[str, float | None]

    @property
    def perplexity(self) -> dict[str, float]:
        """By variant."""
        return {name: perplexity(value) for name, value in self.nll.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Everything the demonstration found."""

    bundle: Path
    variants: list[str]
    similarity: list[dict[str, float]]
    variant_bytes: int
    systems: list[System]
    answers: dict[str, tuple[str, str]]
    swaps: list[Swap]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "bundle": str(self.bundle)}


def run_demo(family: Path, out: Path, say: Callable[[str], None]) -> DemoReport:
    """Merge, measure and answer.

    Args:
        family: Folder with `base`, fine-tunes beside it, and `text/<fine-tune>.txt`.
        out: Folder for bundles; replaced.
        say: Told what happens.

    Raises:
        NotFound: The folder is not such a family.
        UnsupportedCheckpoint: It is an encoder-decoder.
    """
    begin = time.perf_counter()
    names = sorted(path.stem for path in (family / "text").glob("*.txt"))
    if not names or not (family / "base").is_dir():
        raise NotFound(f"{family}: expected base, fine-tunes beside it, and text/<fine-tune>.txt")
    variants = open_variants({name: FolderRef(family / name) for name in names}, FolderRef(family / "base"))
    if variants.first.family.arithmetic != "decoder":
        raise UnsupportedCheckpoint("the demonstration measures perplexity: it needs a decoder-only family")
    windows = {name: _windows(variants.variants[name], family / "text" / f"{name}.txt") for name in names}
    say(f"measuring {len(names)} fine-tunes, their base and their average on held-out text")
    systems = _baselines(variants, windows)
    by_label = {system.label: system for system in systems}
    base, own = by_label["base alone"], by_label["separate models"]
    for label, budget, policy in MERGES:
        say(f"merging at {label}")
        target = out / f"{label.split(' (')[0].replace(' ', '-')}.moe"
        if is_bundle(target):
            shutil.rmtree(target)
        merged = merge(variants, target, options_of(budget, policy))
        nll = _measure_bundle(target, windows)
        systems.append(_system(label, merged.manifest.pool_bytes, merged.plan.variant_bytes, nll, base, own))
    shown = out / f"{SHOWN}.moe"
    answers, swaps = _answer(shown, {name: family / "text" / f"{name}.txt" for name in names})
    return DemoReport(
        bundle=shown,
        variants=names,
        similarity=_similarity(shown),
        variant_bytes=variants.first.expert_bytes,
        systems=systems,
        answers=answers,
        swaps=swaps,
        seconds=time.perf_counter() - begin,
    )


Windows = dict[str, list[list[int]]]


def _baselines(variants: VariantSet, windows: Windows) -> list[System]:
    assert variants.base is not None
    one = variants.first.expert_bytes
    base_model = load_model(variants.base)
    average = average_models(list(variants.variants.values()))
    base_nll = {name: mean_nll(base_model.forward, cut) for name, cut in windows.items()}
    own_nll = {
        name: mean_nll(load_model(variants.variants[name]).forward, cut) for name, cut in windows.items()
    }
    average_nll = {name: mean_nll(average.forward, cut) for name, cut in windows.items()}
    base = System(
        label="base alone", expert_bytes=one, ratio=1.0, nll=base_nll, gain=dict.fromkeys(windows, 0.0)
    )
    own = System(
        label="separate models",
        expert_bytes=one * len(windows),
        ratio=float(len(windows)),
        nll=own_nll,
        gain=dict.fromkeys(windows, 1.0),
    )
    return [base, own, _system("models averaged", one, one, average_nll, base, own)]


def _system(
    label: str, expert_bytes: int, one: int, nll: dict[str, float], base: System, own: System
) -> System:
    gain = {name: gain_recovered(base.nll[name], own.nll[name], value) for name, value in nll.items()}
    return System(label=label, expert_bytes=expert_bytes, ratio=expert_bytes / one, nll=nll, gain=gain)


def _measure_bundle(folder: Path, windows: Windows) -> dict[str, float]:
    with closing(Engine(open_bundle(folder), EngineOptions(dtype="float32", max_batch=1))) as engine:
        return {name: mean_nll(partial(engine.logits, name), cut) for name, cut in windows.items()}


def _answer(folder: Path, texts: dict[str, Path]) -> tuple[dict[str, tuple[str, str]], list[Swap]]:
    """Each variant continues the beginning of a document of its own text."""
    bundle = open_bundle(folder)
    answers, swaps = {}, []
    with closing(Engine(bundle, EngineOptions(resident="1", max_batch=1))) as engine:
        for name, path in texts.items():
            text = VariantText(bundle, name)
            swaps.append(engine.ensure_resident(name))
            prompt = _prompt(read_text(path))
            found = answer(engine, text, text.encode(prompt), max_tokens=_ANSWER_TOKENS)
            answers[name] = (prompt, found.text)
    return answers, swaps


def _prompt(text: str) -> str:
    """The first three dozen characters of a paragraph in the middle of the text, up to a word's end."""
    middle = text[len(text) // 2 :]
    paragraph = middle.partition("\n")[2].lstrip() or middle
    return paragraph[:36] + paragraph[36:].partition(" ")[0]


def _similarity(folder: Path) -> list[dict[str, float]]:
    import json

    layers: list[dict[str, float]] = json.loads((folder / "reports" / "similarity.json").read_text())[
        "layers"
    ]
    return layers


def _windows(checkpoint: Checkpoint, path: Path) -> list[list[int]]:
    tokenizer = _tokenizer(checkpoint)
    return cut_windows(tokenizer.encode(read_text(path)), WINDOW_TOKENS, NUM_WINDOWS)


def _tokenizer(checkpoint: Checkpoint) -> VariantTokenizer:
    return load_tokenizer(checkpoint.side_file, checkpoint.label)
