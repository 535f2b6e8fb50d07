"""Plans by measured cost: what every layer's evidence and one budget over all of them decide."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from moemerge.bundle.manifest import CodeSpec
from moemerge.calibration.folder import Calibration, layer_file
from moemerge.calibration.passages import Passages
from moemerge.calibration.passes import DEFAULT_DTYPE
from moemerge.calibration.random_inputs import random_bytes, random_statistics
from moemerge.calibration.sensitivity import Response
from moemerge.calibration.statistics import LayerStatistics
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.evidence import LayerRecord
from moemerge.consolidation.gate import Gate
from moemerge.consolidation.ladder import Ladder, Shapes, ladder_of, residual_size
from moemerge.consolidation.plan import PlannedExpert, PlannedLayer
from moemerge.consolidation.spending import (
    Prices,
    Spending,
    Stored,
    least_bytes,
    predicted_nats,
    spend,
    trade_off,
)

CURVE = "curve.json"
CURVE_SCHEMA = "moemerge/curve@1"
NOISE = "noise"
"""What plans name as evidence when there was no text."""


class Statistics(Protocol):
    """Where calibration comes from: a text, or noise."""

    @property
    def identity(self) -> str:
        """What plans name as their evidence; the same for the same statistics."""

    @property
    def gained(self) -> dict[str, float]:
        """By variant, nats per token that fine-tuning gained on its text; empty when that is not known."""

    def sensitivity(self, variant: str) -> Mapping[int, float]:
        """By layer index, nats that a variant loses per unit of damage; empty when that is not known."""

    def response(self, variant: str) -> Response:
        """What it loses of all layers together, of the sum of the above."""

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """Statistics of one layer of one variant."""

    def at_layer(self, layer_index: int) -> "Statistics":
        """The same for one layer: what is sent with work on it."""

    def files(self, layer_index: int) -> frozenset[Path]:
        """Those that work on a layer reads, with absolute paths."""

    @property
    def layer_bytes(self) -> int:
        """Of memory that work on a layer holds of them; what is mapped from files does not count."""

    def passages(self, variant: str) -> Passages | None:
        """The variant's text, with what is held out to measure on; None without text."""

    def dtype(self, variant: str) -> str:
        """In which the variant was computed on its text, and is to be measured."""


class WithoutText:
    """What `Statistics` answers where no text is a variant's own."""

    __slots__ = ()

    @property
    def gained(self) -> dict[str, float]:
        """Not known."""
        return {}

    def sensitivity(self, variant: str) -> Mapping[int, float]:
        """Not known."""
        return {}

    def response(self, variant: str) -> Response:
        """Not known."""
        return Response()

    def passages(self, variant: str) -> Passages | None:
        """None."""
        return None

    def dtype(self, variant: str) -> str:
        """Nothing is measured; the default."""
        return DEFAULT_DTYPE


@dataclass(slots=True)
class NoiseStatistics(WithoutText):
    """Statistics of noise in place of text, made when they are asked for; the last layer is kept."""

    variants: VariantSet
    seed: int = 0
    _layer: int = -1
    _found: dict[str, LayerStatistics] = field(default_factory=dict)

    identity = NOISE

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """See `Statistics`."""
        if layer_index != self._layer:
            self._layer, self._found = layer_index, {}
        if variant not in self._found:
            checkpoint = self.variants.variants[variant]
            self._found[variant] = random_statistics(checkpoint, layer_index, seed=self.seed)
        return self._found[variant]

    def at_layer(self, layer_index: int) -> "NoiseStatistics":
        """See `Statistics`."""
        return NoiseStatistics(self.variants.at_layer(layer_index), self.seed)

    @property
    def layer_bytes(self) -> int:
        """See `Statistics`."""
        return sum(map(random_bytes, self.variants.variants.values()))

    def files(self, layer_index: int) -> frozenset[Path]:
        """See `Statistics`."""
        return frozenset()


@dataclass(frozen=True, slots=True)
class TextStatistics:
    """Statistics of the variants' own texts, mapped from files."""

    calibration: Calibration
    variants: Sequence[str]

    layer_bytes = 0

    @property
    def identity(self) -> str:
        """`text:` and a hash of what was calibrated: weights, texts and settings."""
        entries = self.calibration.index.variants
        described = "\n".join(f"{name} {entries[name].identity}" for name in self.variants)
        return f"text:{hashlib.sha256(described.encode()).hexdigest()}"

    @property
    def gained(self) -> dict[str, float]:
        """Of all variants, or of none."""
        entries = self.calibration.index.variants
        gained = {name: entries[name].base_nll_excess or 0.0 for name in self.variants}
        return gained if all(value > 0 for value in gained.values()) else {}

    def sensitivity(self, variant: str) -> Mapping[int, float]:
        """See `Statistics`."""
        return self.calibration.index.variants[variant].sensitivity

    def response(self, variant: str) -> Response:
        """See `Statistics`."""
        return self.calibration.index.variants[variant].response

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """See `Statistics`."""
        return self.calibration.layer(variant, layer_index)

    def at_layer(self, layer_index: int) -> "TextStatistics":
        """See `Statistics`."""
        folder = self.calibration.folder.absolute()
        return replace(self, calibration=replace(self.calibration, folder=folder))

    def files(self, layer_index: int) -> frozenset[Path]:
        """See `Statistics`."""
        folder = self.calibration.folder.absolute()
        return frozenset(folder / name / layer_file(layer_index) for name in self.variants)

    def passages(self, variant: str) -> Passages:
        """See `Statistics`."""
        return self.calibration.passages(variant)

    def dtype(self, variant: str) -> str:
        """See `Statistics`."""
        return self.calibration.index.variants[variant].dtype


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """The decided part of a plan.

    Attributes:
        layers: Pools and residuals.
        pool_bytes: Bytes of all pool experts.
        residual_bytes: Bytes of all residuals.
        predicted: By variant, what it loses, in nats per token; where sensitivity is not known the sum of
            damage over layers, which compares variants and plans.
    """

    layers: list[PlannedLayer]
    pool_bytes: int
    residual_bytes: int
    predicted: dict[str, float]


def ladder_for(variants: VariantSet) -> tuple[Ladder, Shapes]:
    """The codes that the experts of these variants can take, and the experts' shapes."""
    first = variants.first
    shapes = {part: first.family.part_shape(part, first.settings) for part in first.family.experts.parts}
    return ladder_of(shapes), shapes


def decide(
    variants: VariantSet,
    records: Sequence[LayerRecord],
    allowed_bytes: int | None,
    prices: Prices,
    gate: Gate | None = None,
) -> MeasuredPlan:
    """Spend the budget, or without one as little as keeps what is asked for.

    Damage of a variant counts the more the less its fine-tuning gained, where that is known, so that every
    variant keeps the same share of it.
    """
    names = list(variants.variants)
    if allowed_bytes is None:
        allowed_bytes = least_bytes(records, names, prices, gate or Gate())
    spending = spend(records, names, allowed_bytes, prices, gate)
    num_slots = variants.first.num_experts
    layers = [
        _planned_layer(record.index, stored, names, num_slots)
        for record, stored in zip(records, spending.layers, strict=True)
    ]
    residual_bytes = _residual_bytes(spending, prices.shapes)
    return MeasuredPlan(
        layers,
        spending.num_bytes - residual_bytes,
        residual_bytes,
        {name: predicted_nats(spending, name, prices) for name in names},
    )


def dump_curve(variants: VariantSet, records: Sequence[LayerRecord], statistics: Statistics) -> str:
    """What every budget would buy, as JSON: predicted loss of each variant by bytes."""
    prices = prices_of(variants, statistics)
    points = [
        {"bytes": num_bytes, "loss": {name: float(f"{value:.6g}") for name, value in loss.items()}}
        for num_bytes, loss in trade_off(records, list(variants.variants), prices)
    ]
    curve = {"schema": CURVE_SCHEMA, "evidence": statistics.identity, "points": points}
    return json.dumps(curve, indent=1) + "\n"


def prices_of(
    variants: VariantSet,
    statistics: Statistics,
    correction: Mapping[str, float] | None = None,
    emphasis: Mapping[str, float] | None = None,
) -> Prices:
    """What experts of these variants take, and what the loss of each variant counts.

    Args:
        variants: Local checkpoints.
        statistics: What is known of them.
        correction, emphasis: See `Prices`.
    """
    ladder, shapes = ladder_for(variants)
    experts = [parts for variant in variants.variants.values() for parts in variant.experts.values()]
    sensitivity = {name: statistics.sensitivity(name) for name in variants.variants}
    is_known = all(any(found.values()) for found in sensitivity.values())
    return Prices(
        ladder=ladder,
        shapes=shapes,
        plain_bytes=max(sum(tensor.nbytes for tensor in parts.values()) for parts in experts),
        importance={name: 1 / gained for name, gained in statistics.gained.items()},
        sensitivity=sensitivity if is_known else {},
        responses={name: statistics.response(name) for name in sensitivity} if is_known else {},
        correction=correction or {},
        emphasis=emphasis or {},
    )


def _planned_layer(
    index: int, stored: Sequence[Stored], variants: Sequence[str], num_slots: int
) -> PlannedLayer:
    residuals: dict[str, list[CodeSpec | None]] = {name: [None] * num_slots for name in variants}
    pool = []
    for one in stored:
        for refs, code in zip(one.owners, one.residuals, strict=True):
            for name, slot in refs:
                residuals[name][slot] = code
        pool.append(
            PlannedExpert(
                members=[ref for refs in one.owners for ref in refs],
                operator=one.operator,
                sources=[refs[0] for refs in one.owners],
                code=one.code,
            )
        )
    return PlannedLayer(
        index=index, pool=pool, residuals={name: codes for name, codes in residuals.items() if any(codes)}
    )


def _residual_bytes(spending: Spending, shapes: Shapes) -> int:
    return sum(
        residual_size(code, shapes) * len(refs)
        for layer in spending.layers
        for one in layer
        for refs, code in zip(one.owners, one.residuals, strict=True)
    )
