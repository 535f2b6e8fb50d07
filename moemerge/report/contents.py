"""What a report shows, as plain values. Layers are numbered through all stacks, experts (variant, slot)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Kind = Literal["similarity", "plan", "bundle"]
PLAIN_BITS = 16
"""Of a weight that is not coded, where its dtype is not said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMatrices:
    """What was measured between the N = V * E experts of a layer; see `similarity.matrices`."""

    distances: Mapping[str, Matrix]
    part_l2: Mapping[str, Matrix]
    part_norms: Mapping[str, Matrix]
    norms: Matrix
    identity: NDArray[np.int64]
    delta_norms: Matrix | None
    router_l2: Matrix | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary:
    """One layer in the index: distances relative to the experts' norms; None where there are no such pairs.

    Attributes:
        index: Of the layer.
        same_slot_median: Between variants' experts of one slot.
        same_slot_max: The farthest of those.
        other_slot_median: Between variants' experts of different slots.
        distinct: Experts that differ in a byte.
    """

    index: int
    same_slot_median: float | None
    same_slot_max: float | None
    other_slot_median: float | None
    distinct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Distances, read when they are asked for.

    Attributes:
        variants: Names in the order of rows.
        num_slots: E.
        meanings: One line for each distance that was computed.
        not_computed: Why others were not.
        has_base: Whether deltas were compared.
        layers: Summaries.
        load: Matrices of a layer.
    """

    variants: tuple[str, ...]
    num_slots: int
    meanings: Mapping[str, str]
    not_computed: Mapping[str, str]
    has_base: bool
    layers: Sequence[LayerSummary]
    load: Callable[[int], LayerMatrices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """How one expert of a variant is kept.

    Attributes:
        members: Experts that share its pool expert, itself included.
        pool: Code of the pool expert; None for the dtype of its sources.
        residual: Code of what is added, if anything.
        bits: Stored for each of the expert's weights, its share of the pool expert included; None where
            that is not known.
    """

    members: int
    pool: str | None
    residual: str | None
    bits: float | None

    def __str__(self) -> str:
        if self.members == 1 and not self.pool and not self.residual:
            return "exact"
        kept = f"{'own' if self.members == 1 else 'shared'} {self.pool or 'plain'}"
        return f"{kept} + {self.residual}" if self.residual else kept


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """The pool of a layer, planned or written.

    Attributes:
        index: Of the layer.
        pool: By pool expert, the experts it stands for.
        operators: By pool expert, what it is made by; empty where that is not kept.
        codes: By pool expert; None for the dtype of its sources.
        rungs: By variant and slot.
        errors: By variant and slot, distance to what stands for the expert over its norm; empty where that
            is not known yet.
    """

    index: int
    pool: Sequence[Sequence[tuple[str, int]]]
    operators: Sequence[str]
    codes: Sequence[str | None]
    rungs: Mapping[str, Sequence[Rung]]
    errors: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What a plan or a bundle keeps.

    Attributes:
        variant_bytes: Expert bytes of one variant, the unit of `ratio`.
        evidence: What decided; None where that is not kept.
        predicted: By variant, the loss that was expected, in the unit of the evidence.
    """

    layers: Sequence[StoredLayer]
    variants: tuple[str, ...]
    num_slots: int
    variant_bytes: int
    pool_bytes: int
    residual_bytes: int
    ratio: float
    budget: str
    policy: str
    evidence: str | None
    predicted: Mapping[str, float]

    @property
    def stored_bytes(self) -> int:
        """Of pools and residuals."""
        return self.pool_bytes + self.residual_bytes

    @property
    def num_experts(self) -> int:
        """Experts of all variants, before sharing."""
        return len(self.layers) * self.num_slots * len(self.variants)

    @property
    def num_pool_experts(self) -> int:
        """Of all layers."""
        return sum(len(layer.pool) for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where the routers sent the tokens of each variant's own text.

    Attributes:
        tokens: By variant.
        counts: By layer and variant, tokens sent to each slot.
    """

    tokens: Mapping[str, int]
    counts: Mapping[int, Mapping[str, Sequence[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What other budgets would buy.

    Attributes:
        unit: What `loss` is.
        points: Bytes, and the loss of each variant.
    """

    unit: str
    points: Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What a variant was calibrated on.

    Attributes:
        tokens: Of its text.
        nll: Nats per token of the variant on it.
        gained: Nats per token that it is better there than the base; None where that is not known.
        text: SHA-256 of the text.
    """

    tokens: int
    nll: float
    gained: float | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything there is to show.

    Attributes:
        kind: What was opened.
        name: Its file name.
        sources: By variant, where it came from.
        licences: By variant, where that is known.
        quality: By variant, numbers of `VariantEntry.damage`.
        sharing: By layer and variant, the share of the layer's output energy that is lost, as measured, if
            all variants share in every slot and nothing is coded.
        notes: Of the reading: what should be there and is not.
    """

    kind: Kind
    name: str
    family: str
    sources: Mapping[str, str]
    licences: Mapping[str, str] = field(default_factory=dict)
    similarity: Similarity | None = None
    storage: Storage | None = None
    routing: Routing | None = None
    curve: Curve | None = None
    calibrated: Mapping[str, Calibrated] = field(default_factory=dict)
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sharing: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def variants(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self.sources)

    @property
    def num_slots(self) -> int:
        """E."""
        found = self.storage or self.similarity
        assert found is not None
        return found.num_slots

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices, rising."""
        found = self.storage or self.similarity
        assert found is not None
        return tuple(sorted(layer.index for layer in found.layers))
