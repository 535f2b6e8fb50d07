"""The demonstration: one small family kept in several ways, and measured on text that none of them saw."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moemerge.bundle.reader import is_bundle, open_bundle
from moemerge.calibration.calibrating import calibrate
from moemerge.calibration.passes import CalibrationOptions
from moemerge.calibration.texts import read_text
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.checkpoint.writer import write_text
from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.layers import measure_layers
from moemerge.consolidation.measured import TextStatistics
from moemerge.errors import NotFound, UnsupportedCheckpoint
from moemerge.evaluation.comparison import Samples, build_bundle, score_bundle
from moemerge.evaluation.evaluating import owner_of
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.methods import AVERAGE, OURS, Materials
from moemerge.evaluation.perplexity import gain_recovered, perplexity
from moemerge.evaluation.reading import Scores, score
from moemerge.evaluation.samples import SampleSize, load_samples
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.transfer import Swap
from moemerge.text.answers import answer
from moemerge.text.variants import VariantText

NUM_WINDOWS = 24
CALIBRATION_TOKENS = 8192
_ANSWER_TOKENS = 48
# Label, method, budget.
SYSTEMS = (
    ("models averaged", AVERAGE, "1x"),
    ("pick one (the paper)", "pick", "1x"),
    ("own copies, few bits", "copies", "1x"),
    ("moemerge", OURS, "1x"),
    ("moemerge, half of that", OURS, "0.5x"),
)
SHOWN = "moemerge"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to keep all variants.

    Attributes:
        label: How it is called.
        expert_bytes: Bytes of its experts, residuals included.
        ratio: The same over one variant's expert bytes.
        nll: By variant, on the half of the variant's own text that is measured.
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
    similarity: dict[int, dict[str, float | None]]
    variant_bytes: int
    systems: list[System]
    answers: dict[str, tuple[str, str]]
    swaps: list[Swap]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "bundle": str(self.bundle)}


def run_demo(family: Path, out: Path, say: Callable[[str], None]) -> DemoReport:
    """Calibrate on one half of the text, merge in several ways, measure on the other half, and answer.

    Args:
        family: Folder with `base`, fine-tunes beside it, and `text/<fine-tune>.txt`.
        out: Folder for bundles; those of an earlier run are replaced.
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
    halves = {name: _halve(family / "text" / f"{name}.txt", out / "text") for name in names}
    owners = {name: owner_of(checkpoint) for name, checkpoint in variants.variants.items()}
    samples = load_samples(
        owners, {name: measured for name, (_, measured) in halves.items()}, SampleSize(windows=NUM_WINDOWS)
    )
    say("calibrating every fine-tune on the first half of its text")
    first_halves = {name: calibrated for name, (calibrated, _) in halves.items()}
    options = CalibrationOptions(num_tokens=CALIBRATION_TOKENS)
    done = calibrate(variants, first_halves, out / "calibration", options)
    with TensorReader() as reader:
        materials = Materials(
            variants=variants,
            layers=measure_layers(variants),
            statistics=TextStatistics(done.calibration, names),
            reader=reader,
            folder=out,
        )
        say(f"measuring {len(names)} fine-tunes and their base on the second half")
        systems = _baselines(variants, samples)
        for label, method, budget in SYSTEMS:
            say(f"{label}: merging at {budget}")
            systems.append(_merged(label, method, budget, materials, samples, systems))
    shown = _place(out, SHOWN)
    answers, swaps = _answer(shown, {name: measured for name, (_, measured) in halves.items()})
    return DemoReport(
        bundle=shown,
        variants=names,
        similarity={layer.layer: layer.summary() for layer in materials.layers},
        variant_bytes=variants.first.expert_bytes,
        systems=systems,
        answers=answers,
        swaps=swaps,
        seconds=time.perf_counter() - begin,
    )


def _halve(path: Path, folder: Path) -> tuple[Path, Path]:
    """Both halves of a text as files, divided between two paragraphs where there are any."""
    text = read_text(path)
    middle = text.find("\n\n", len(text) // 2)
    cut = middle + 2 if middle >= 0 else len(text) // 2
    places = (folder / f"{path.stem}.first.txt", folder / f"{path.stem}.second.txt")
    for place, half in zip(places, (text[:cut], text[cut:]), strict=True):
        write_text(place, half)
    return places


def _baselines(variants: VariantSet, samples: Samples) -> list[System]:
    """The base alone, then every variant by itself."""
    assert variants.base is not None
    one, base = variants.first.expert_bytes, load_model(variants.base)
    of_base = {name: score(base, sample).mean_nll for name, sample in samples.items()}
    own = {name: score(load_model(variants.variants[name]), s).mean_nll for name, s in samples.items()}
    none, full = dict.fromkeys(samples, 0.0), dict.fromkeys(samples, 1.0)
    count = len(samples)
    return [
        System(label="base alone", expert_bytes=one, ratio=1.0, nll=of_base, gain={**none}),
        System(label="separate models", expert_bytes=one * count, ratio=float(count), nll=own, gain={**full}),
    ]


def _merged(
    label: str,
    method: str,
    budget: str,
    materials: Materials,
    samples: Samples,
    baselines: list[System],
) -> System:
    target = _place(materials.folder, label)
    if is_bundle(target):
        shutil.rmtree(target)
    prepared, manifest = build_bundle(materials, method, parse_budget(budget), target)
    scores = score_bundle(target, prepared.serves, samples)
    base, own = baselines[:2]
    return System(
        label=label,
        expert_bytes=manifest.pool_bytes + manifest.residual_bytes,
        ratio=manifest.bytes_ratio,
        nll={name: one.mean_nll for name, one in scores.items()},
        gain=_gain(base, own, scores),
    )


def _gain(base: System, own: System, scores: Mapping[str, Scores]) -> dict[str, float | None]:
    return {name: gain_recovered(base.nll[name], own.nll[name], one.mean_nll) for name, one in scores.items()}


def _place(folder: Path, label: str) -> Path:
    words = label.partition(" (")[0].replace(",", "").split()
    return folder / f"{'-'.join(words)}.moe"


def _answer(folder: Path, texts: Mapping[str, Path]) -> tuple[dict[str, tuple[str, str]], list[Swap]]:
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
