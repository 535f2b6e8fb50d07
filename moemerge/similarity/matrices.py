"""Similarity of all experts of a layer: what the plan decides on and the report shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moemerge.refs import ExpertRef
from moemerge.similarity.distances import compute_distances
from moemerge.similarity.gram import ExpertGram, Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSimilarity:
    """Distances between the N = V * E experts of one layer, in order (variant, slot).

    Attributes:
        layer: Index through all stacks.
        variants: Names, in order.
        num_slots: E.
        distances: [N, N] float64 by name of the distance, for whole experts.
        part_l2: [N, N] float64 by part.
        norms: [N], Euclidean norms.
        identity: [N] int64; equal numbers mean bytewise equal experts, the number being the index
            of the first of them.
        delta_norms: [N], norms of the deltas to the base; None without a base.
        part_norms: [N] by part.
        router_l2: [V, V, E], relative L2 between variants' routers, row by row; None where there was none
            to compare.
    """

    layer: int
    variants: tuple[str, ...]
    num_slots: int
    distances: dict[str, Matrix]
    part_l2: dict[str, Matrix]
    norms: Matrix
    identity: NDArray[np.int64]
    delta_norms: Matrix | None = None
    part_norms: dict[str, Matrix] = field(default_factory=dict)
    router_l2: Matrix | None = None

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.variants) * self.num_slots

    def ref(self, index: int) -> ExpertRef:
        """The expert that row `index` stands for."""
        variant, slot = divmod(index, self.num_slots)
        return ExpertRef(self.variants[variant], self.layer, slot)

    def same_slot_pairs(self) -> NDArray[np.bool_]:
        """[N, N]; true for different variants' experts of one slot."""
        index = np.arange(self.num_experts)
        same_slot = index[:, None] % self.num_slots == index[None, :] % self.num_slots
        result: NDArray[np.bool_] = same_slot & ~self.same_variant_pairs()
        return result

    def same_variant_pairs(self) -> NDArray[np.bool_]:
        """[N, N]; true for experts of one variant, the diagonal included."""
        variant = np.arange(self.num_experts) // self.num_slots
        result: NDArray[np.bool_] = variant[:, None] == variant[None, :]
        return result

    def summary(self) -> dict[str, float | None]:
        """Median and largest relative L2 within slots across variants, median across slots.

        None where there are no such pairs.
        """
        relative = self.distances["relative_l2"]
        same = relative[self.same_slot_pairs()]
        other = relative[~self.same_slot_pairs() & ~self.same_variant_pairs()]
        return {
            "same_slot_median": float(np.median(same)) if same.size else None,
            "same_slot_max": float(same.max()) if same.size else None,
            "other_slot_median": float(np.median(other)) if other.size else None,
            "distinct": float(len(np.unique(self.identity))),
        }


def build_layer_similarity(
    layer: int,
    variants: tuple[str, ...],
    grams: dict[str, ExpertGram],
    identity: NDArray[np.int64],
    routers: Sequence[Matrix] | None = None,
) -> LayerSimilarity:
    """Distances from the Gram matrices of the parts.

    Args:
        layer: Index through all stacks.
        variants: Names, in the order of the Gram's rows.
        grams: One per part, all of the same experts.
        identity: See `LayerSimilarity`; identical experts get distance zero exactly.
        routers: Of every variant, [E, D].
    """
    first = next(iter(grams.values()))
    whole = ExpertGram(
        centred=np.sum([gram.centred for gram in grams.values()], axis=0),
        num_slots=first.num_slots,
        has_base=first.has_base,
    )
    equal = identity[:, None] == identity[None, :]
    distances = {name: np.where(equal, 0.0, matrix) for name, matrix in compute_distances(whole).items()}
    return LayerSimilarity(
        layer=layer,
        variants=variants,
        num_slots=first.num_slots,
        distances=distances,
        part_l2={
            part: np.where(equal, 0.0, np.sqrt(gram.squared_distances())) for part, gram in grams.items()
        },
        norms=np.sqrt(np.diag(whole.inner_products())),
        identity=identity,
        delta_norms=np.sqrt(np.diag(whole.delta_products())) if whole.has_base else None,
        part_norms={part: np.sqrt(np.diag(gram.inner_products())) for part, gram in grams.items()},
        router_l2=compare_routers(routers) if routers is not None else None,
    )


def compare_routers(routers: Sequence[Matrix]) -> Matrix:
    """`|r_a - r_b|` over the root mean square of their norms, for every slot's row of the routers [E, D]."""
    # One at a time: all pairs at once would be V times all routers.
    difference = np.array([[np.linalg.norm(a - b, axis=-1) for b in routers] for a in routers])
    squares = np.array([np.square(router).sum(axis=-1) for router in routers])
    scale = np.sqrt((squares[:, None] + squares[None, :]) / 2)
    relative: Matrix = np.divide(difference, scale, out=np.zeros_like(difference), where=scale > 0)
    return relative
