"""What variants of a bundle, or a checkpoint, score on text, beside their originals and the base."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import Finding
from moemerge.evaluation.lm_eval import TaskRow
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.perplexity import gain_recovered, perplexity
from moemerge.evaluation.reading import Likeness, Scores, score, score_beside
from moemerge.evaluation.samples import Sample, TextOwner
from moemerge.models import StandAlone
from moemerge.progress import Progress, Silent
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions

Subject = Bundle | Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantFigures:
    """One variant. What was not given, or cannot be, is None.

    Attributes:
        passages: Windows or rows.
        tokens: Predicted tokens.
        nll: Mean negative log-likelihood in nats per predicted token.
        accuracy: Share of rows whose greedy answer is the target.
        gain: Share of what fine-tuning gained on the base that is left: in accuracy for tasks, else in NLL.
        kl: Mean KL(original || this) in nats per predicted token.
        agreement: Share of predicted tokens for which both think the same likeliest.
        routing: By layer index, share of slots that both routers chose.
    """

    passages: int
    tokens: int
    nll: float
    accuracy: float | None = None
    original_nll: float | None = None
    original_accuracy: float | None = None
    base_nll: float | None = None
    base_accuracy: float | None = None
    gain: float | None = None
    kl: float | None = None
    agreement: float | None = None
    routing: dict[int, float] | None = None

    @property
    def perplexity(self) -> float:
        """Of `nll`."""
        return perplexity(self.nll)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that was found.

    Attributes:
        subject: What was measured, as a message names it.
        variants: By name.
        lm_eval: Rows from results files that the user brought.
        findings: Warnings and notes.
    """

    subject: str
    variants: dict[str, VariantFigures]
    lm_eval: list[TaskRow] = field(default_factory=list)
    findings: tuple[Finding, ...] = ()

    def mean(self, figure: str) -> float | None:
        """Mean of a figure over the variants that have it."""
        values = [value for one in self.variants.values() if (value := getattr(one, figure)) is not None]
        return statistics.fmean(values) if values else None

    @property
    def worst(self) -> str:
        """The variant that lost most: by gain, by divergence from its original, or by what it scores."""
        for figure, sign in (("gain", 1), ("kl", -1), ("accuracy", 1), ("nll", -1)):
            found = {name: getattr(one, figure) for name, one in self.variants.items()}
            if all(value is not None for value in found.values()):
                return min(found, key=lambda name: sign * found[name])
        raise AssertionError("every variant has a log-likelihood")

    def routing_by_depth(self) -> dict[int, float]:
        """By layer index, mean over variants of the share of equal slots; empty without originals."""
        layers: dict[int, list[float]] = {}
        for one in self.variants.values():
            for layer_index, share in (one.routing or {}).items():
                layers.setdefault(layer_index, []).append(share)
        return {layer_index: statistics.fmean(shares) for layer_index, shares in sorted(layers.items())}

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        figures = [f.name for f in fields(VariantFigures) if f.name not in ("passages", "tokens", "routing")]
        return {
            "subject": self.subject,
            "variants": {
                name: {**asdict(one), "perplexity": one.perplexity} for name, one in self.variants.items()
            },
            "mean": {figure: self.mean(figure) for figure in figures},
            "worst": self.worst,
            "routing_by_depth": self.routing_by_depth(),
            "lm_eval": [{**asdict(row), "kept": row.kept} for row in self.lm_eval],
        }


def evaluate(
    subject: Subject,
    samples: Mapping[str, Sample],
    *,
    originals: Mapping[str, Checkpoint] | None = None,
    base: Checkpoint | None = None,
    lm_eval: Sequence[TaskRow] = (),
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure every variant that has a sample.

    Args:
        subject: A bundle, or a checkpoint that stands for every variant.
        samples: By variant.
        originals: By variant, the checkpoint that it was made from.
        base: Their common ancestor.
        lm_eval: Rows to show beside.
        dtype: Of the computation.
        progress: Told of bytes of token ids.

    Raises:
        IncompatibleInputs: An original is of something else.
        NotEnoughRoom: Memory.
    """
    originals, report = originals or {}, progress or Silent()
    of_base: dict[str, Scores] = {}
    findings: list[Finding] = []
    if base is not None:
        of_base, findings = _score_base(base, samples, dtype, report)
    found = {}
    with opened(subject, dtype) as model_of:
        for name, sample in samples.items():
            report.start(f"measuring {name}", sample.num_bytes)
            model, own, likeness = model_of(name), None, None
            if name in originals:
                findings += _check_original(subject, name, originals[name])
                original = load_model(originals[name], _DTYPES[dtype])
                scores, own, likeness = score_beside(model, original, sample, report.advance)
            else:
                scores = score(model, sample, report.advance)
            found[name] = _figures(scores, own, likeness, of_base.get(name))
    return Evaluation(
        subject=label_of(subject), variants=found, lm_eval=list(lm_eval), findings=tuple(findings)
    )


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def opened(subject: Subject, dtype: str) -> Iterator[Callable[[str], StandAlone]]:
    """Models of variants, each until another is asked for; a checkpoint's stands for every name."""
    if isinstance(subject, Checkpoint):
        model = load_model(subject, _DTYPES[dtype])
        yield lambda name: model
        return
    options = EngineOptions(dtype=dtype, max_batch=1, resident="1")
    with closing(Engine(subject, options)) as engine:
        yield engine.stand_alone


def label_of(subject: Subject) -> str:
    """How messages name it."""
    return subject.label if isinstance(subject, Checkpoint) else str(subject.folder)


def owner_of(checkpoint: Checkpoint) -> TextOwner:
    """A checkpoint as the owner of a text."""
    positions = checkpoint.settings.get("max_positions")
    return TextOwner(
        where=checkpoint.label,
        arithmetic=checkpoint.family.arithmetic,
        side_file=checkpoint.side_file,
        vocab_size=int(checkpoint.settings["vocab_size"] or 0),
        max_positions=int(positions) if positions else None,
    )


def owner_in(bundle: Bundle, name: str) -> TextOwner:
    """A bundle's variant as the owner of a text."""
    settings = bundle.variant(name).settings
    positions = settings.get("max_positions")
    return TextOwner(
        where=f"{bundle.folder}: variant {name}",
        arithmetic=bundle.family.arithmetic,
        side_file=lambda file: bundle.side_file(name, file),
        vocab_size=int(settings["vocab_size"] or 0),
        max_positions=int(positions) if positions else None,
    )


def _score_base(
    base: Checkpoint, samples: Mapping[str, Sample], dtype: str, report: Progress
) -> tuple[dict[str, Scores], list[Finding]]:
    """The base on every sample whose tokens it knows."""
    vocab_size = int(base.settings["vocab_size"] or 0)
    known = {name: sample for name, sample in samples.items() if sample.largest_id < vocab_size}
    report.start("measuring the base", sum(sample.num_bytes for sample in known.values()))
    model = load_model(base, _DTYPES[dtype])
    findings = [
        Finding(
            level="warning",
            code="BASE_LACKS_TOKENS",
            where=f"variant {name}",
            found=f"its text has tokens that the base ({vocab_size}) does not know: no gain is told",
        )
        for name in samples
        if name not in known
    ]
    return {name: score(model, sample, report.advance) for name, sample in known.items()}, findings


def _check_original(subject: Subject, name: str, original: Checkpoint) -> list[Finding]:
    if isinstance(subject, Checkpoint):
        return []
    with TensorReader() as reader:
        same = fingerprint(original, reader) == subject.variant(name).fingerprint
    if same:
        return []
    return [
        Finding(
            level="warning",
            code="OTHER_ORIGINAL",
            where=f"variant {name}",
            found=f"{original.label} has other weights than the bundle was made from",
            expected=subject.variant(name).source,
        )
    ]


def _figures(
    scores: Scores, own: Scores | None, likeness: Likeness | None, base: Scores | None
) -> VariantFigures:
    return VariantFigures(
        passages=len(scores.nll),
        tokens=sum(scores.tokens),
        nll=scores.mean_nll,
        accuracy=scores.accuracy,
        original_nll=own.mean_nll if own else None,
        original_accuracy=own.accuracy if own else None,
        base_nll=base.mean_nll if base else None,
        base_accuracy=base.accuracy if base else None,
        gain=_gain(scores, own, base) if own and base else None,
        kl=likeness.mean_kl if likeness else None,
        agreement=likeness.agreement if likeness else None,
        routing=likeness.routing if likeness else None,
    )


def _gain(scores: Scores, own: Scores, base: Scores) -> float | None:
    if scores.accuracy is None or own.accuracy is None or base.accuracy is None:
        return gain_recovered(base.mean_nll, own.mean_nll, scores.mean_nll)
    return gain_recovered(-base.accuracy, -own.accuracy, -scores.accuracy)
