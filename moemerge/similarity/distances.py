"""Weight distances between the experts of a layer, behind one registry.

Each is a pure function from the layer's Gram matrix to [N, N] float64, zero for equal experts,
symmetric, lower is closer. To add one: a function and an entry in `DISTANCES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moemerge.similarity.gram import ExpertGram, Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """A registered distance.

    Attributes:
        compute: From the Gram matrix to [N, N].
        needs_base: Whether it compares deltas to a base.
        meaning: One line for reports.
    """

    compute: Callable[[ExpertGram], Matrix]
    needs_base: bool
    meaning: str


def l2(gram: ExpertGram) -> Matrix:
    """`|W_i - W_j|`. Source: the metric of Imani et al. 2025 (arXiv:2505.06481)."""
    return np.sqrt(gram.squared_distances())


def relative_l2(gram: ExpertGram) -> Matrix:
    """`|W_i - W_j|` over the root mean square of `|W_i|` and `|W_j|`; about 1.41 for unrelated experts."""
    norms = np.diag(gram.inner_products())
    scale = np.sqrt((norms[:, None] + norms[None, :]) / 2)
    return _divide(l2(gram), scale)


def cosine(gram: ExpertGram) -> Matrix:
    """1 - cosine of the angle between `W_i` and `W_j`."""
    norms = np.sqrt(np.diag(gram.inner_products()))
    # (|a-b|^2 - (|a|-|b|)^2) / 2|a||b| keeps its digits where 1 - <a,b>/|a||b| has lost them.
    squared = gram.squared_distances() - (norms[:, None] - norms[None, :]) ** 2
    return _divide(np.maximum(squared, 0), 2 * norms[:, None] * norms[None, :])


def delta_l2(gram: ExpertGram) -> Matrix:
    """`|D_i - D_j|` of the deltas `D = W - base`, over the root mean square of their norms."""
    products = gram.delta_products()
    norms = np.diag(products)
    squared = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0)
    np.fill_diagonal(squared, 0)
    return _divide(np.sqrt(squared), np.sqrt((norms[:, None] + norms[None, :]) / 2))


def delta_cosine(gram: ExpertGram) -> Matrix:
    """1 - cosine of the angle between the deltas; 0 pull the same way, 1 unrelated, 2 opposite."""
    products = gram.delta_products()
    norms = np.sqrt(np.diag(products))
    scale = norms[:, None] * norms[None, :]
    distance = np.where(scale > 0, 1 - _divide(products, scale), 1.0)
    unchanged = (norms[:, None] == 0) & (norms[None, :] == 0)
    distance[unchanged] = 0
    np.fill_diagonal(distance, 0)
    return np.clip(distance, 0, 2)


DISTANCES: dict[str, Distance] = {
    "l2": Distance(compute=l2, needs_base=False, meaning="Euclidean distance of all weights"),
    "relative_l2": Distance(
        compute=relative_l2, needs_base=False, meaning="L2 relative to the experts' norms"
    ),
    "cosine": Distance(compute=cosine, needs_base=False, meaning="1 - cosine of the weights"),
    "delta_l2": Distance(
        compute=delta_l2, needs_base=True, meaning="L2 of the deltas relative to their norms"
    ),
    "delta_cosine": Distance(compute=delta_cosine, needs_base=True, meaning="1 - cosine of the deltas"),
}


def compute_distances(gram: ExpertGram) -> dict[str, Matrix]:
    """Every registered distance that this Gram matrix allows."""
    return {
        name: distance.compute(gram)
        for name, distance in DISTANCES.items()
        if gram.has_base or not distance.needs_base
    }


def _divide(numerator: Matrix, denominator: Matrix) -> Matrix:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
