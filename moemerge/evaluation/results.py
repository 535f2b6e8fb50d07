"""What a comparison has measured, kept as one JSON file for each method and budget, and what follows from it.

Scores are kept passage by passage, so that intervals can be drawn later. Pure but for reading and writing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge.checkpoint.writer import write_text
from moemerge.evaluation.bootstrap import Interval, Ratio, interval_of, interval_of_difference, mean_share
from moemerge.evaluation.methods import OURS
from moemerge.evaluation.reading import Scores

GAIN, ACCURACY = "gain", "accuracy"


class Measured(BaseModel):
    """One file.

    Attributes:
        identity: Hash of everything that decides the scores; see `comparison.identity_of`.
        cannot: Why the method was not measured at this budget.
        bytes_ratio: Expert bytes with residuals and maps over those of one variant.
        nll: By variant and passage, mean negative log-likelihood in nats of its predicted tokens.
        correct: By variant and row, 1 for a right answer; empty for running text.
        seconds: To plan, write and measure.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    method: str
    budget: str
    identity: str
    cannot: str | None = None
    bytes_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    nll: dict[str, list[float]] = Field(default_factory=dict)
    correct: dict[str, list[float]] = Field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one method at one budget.

    Attributes:
        scores: By variant.
        bytes_ratio: See `Measured`.
        cannot: See `Measured`; then there is nothing else.
    """

    scores: Mapping[str, Scores] = field(default_factory=dict)
    bytes_ratio: float | None = None
    cannot: str | None = None


def measured_of(outcome: Outcome, *, method: str, budget: str, identity: str, seconds: float) -> Measured:
    """What is kept of an outcome."""
    return Measured(
        method=method,
        budget=budget,
        identity=identity,
        cannot=outcome.cannot,
        bytes_ratio=outcome.bytes_ratio,
        nll={
            name: [nll / count for nll, count in zip(own.nll, own.tokens, strict=True)]
            for name, own in outcome.scores.items()
        },
        correct={name: [float(right) for right in own.correct] for name, own in outcome.scores.items()},
        seconds=seconds,
    )


def read_measured(path: Path, identity: str) -> Measured | None:
    """What was measured before with the same inputs; None when there is no such thing."""
    try:
        found = Measured.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.identity == identity else None


def write_measured(measured: Measured, path: Path) -> None:
    """Keep it, whole or not at all."""
    write_text(path, measured.model_dump_json(indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method at a budget.

    Attributes:
        kept: What is left of the originals' quality, mean over variants, 1 being all: the share of the gain
            of fine-tuning, or of the originals' accuracy.
        interval: Of `kept`.
        by_variant: `kept` of each; None where fine-tuning gained nothing.
        scores: By variant perplexity, or accuracy.
        difference: `kept` minus that of our method at the same budget; None where that is missing.
        is_better: Better than ours beyond the interval of the difference.
    """

    method: str
    budget: str
    cannot: str | None = None
    bytes_ratio: float | None = None
    kept: float | None = None
    interval: Interval | None = None
    by_variant: dict[str, float] | None = None
    scores: dict[str, float] | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    is_better: bool = False

    @property
    def worst(self) -> float | None:
        """The least that a variant kept."""
        return min(self.by_variant.values()) if self.by_variant else None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "worst": self.worst}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that was measured.

    Attributes:
        names: Variants.
        base: The base alone.
        originals: Every variant by itself.
        measured: Methods at budgets, in the order of both.
        seed: Of the bootstrap.
        num_draws: Of the bootstrap.
    """

    names: Sequence[str]
    base: Measured
    originals: Measured
    measured: Sequence[Measured]
    seed: int
    num_draws: int

    @property
    def unit(self) -> str:
        """What `kept` is a share of: `gain` for running text, `accuracy` for tasks."""
        return ACCURACY if any(self.originals.correct.values()) else GAIN

    def rows(self) -> list[Row]:
        """Base and originals, then every method at every budget."""
        return [self._row(measured) for measured in (self.base, self.originals, *self.measured)]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "variants": list(self.names),
            "kept_of": self.unit,
            "seed": self.seed,
            "draws": self.num_draws,
            "rows": [row.as_dict() for row in self.rows()],
        }

    def shares(self, measured: Measured) -> dict[str, Ratio]:
        """By variant what is kept of what: of the gain on the base, or of the originals' accuracy.

        A variant that gained nothing, or whose original answers nothing right, is left out.
        """
        ratios: dict[str, Ratio]
        if self.unit == ACCURACY:
            ratios = {
                name: Ratio(measured.correct[name], self.originals.correct[name]) for name in self.names
            }
        else:
            ratios = {
                name: Ratio(
                    np.subtract(self.base.nll[name], measured.nll[name]),
                    np.subtract(self.base.nll[name], self.originals.nll[name]),
                )
                for name in self.names
            }
        return {name: ratio for name, ratio in ratios.items() if np.mean(ratio.whole) > 0}

    def _row(self, measured: Measured) -> Row:
        row = Row(
            method=measured.method,
            budget=measured.budget,
            cannot=measured.cannot,
            bytes_ratio=measured.bytes_ratio,
        )
        if measured.cannot is not None:
            return row
        ratios, row = self.shares(measured), replace(row, scores=self._scores(measured))
        if not ratios:
            return row
        difference = interval = None
        if (ours := self._ours_at(measured.budget)) is not None and measured is not ours:
            theirs = self.shares(ours)
            difference = mean_share(ratios) - mean_share(theirs)
            interval = interval_of_difference(ratios, theirs, seed=self.seed, num_draws=self.num_draws)
        return replace(
            row,
            kept=mean_share(ratios),
            interval=interval_of(ratios, seed=self.seed, num_draws=self.num_draws),
            by_variant={name: ratio.share for name, ratio in ratios.items()},
            difference=difference,
            difference_interval=interval,
            is_better=interval is not None and interval.low > 0,
        )

    def _ours_at(self, budget: str) -> Measured | None:
        return next(
            (m for m in self.measured if m.method == OURS and m.budget == budget and m.cannot is None), None
        )

    def _scores(self, measured: Measured) -> dict[str, float]:
        if self.unit == ACCURACY:
            return {name: float(np.mean(measured.correct[name])) for name in self.names}
        return {name: float(np.exp(np.mean(measured.nll[name]))) for name in self.names}
