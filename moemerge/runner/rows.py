"""Effective experts as rows: what the slots of all variants compute with, layer by layer.

The first rows of a layer are its pool experts; behind them stands a row for every slot with a residual.
Residuals belong to their variant: they are installed and set aside with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moemerge.bundle.manifest import PoolLayer as StoredLayer
from moemerge.bundle.reader import Bundle, effective_dtype
from moemerge.models.experts import Activation, EffectiveLayer, PoolLayer, Scratch
from moemerge.models.packed import Coded

VariantResiduals = Mapping[tuple[int, int], Mapping[str, Coded]]
"""Residuals of a variant, parts by name, by layer index and slot."""


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The rows of one layer.

    Attributes:
        num_experts: Pool experts.
        bases: Pool expert of each row.
        maps: By variant the row of each slot.
        residual_bases: Pool experts that some residual is added to.
        residuals: By row, of the variants that are installed.
    """

    num_experts: int
    bases: tuple[int, ...]
    maps: Mapping[str, tuple[int, ...]]
    residual_bases: frozenset[int]
    residuals: dict[int, Mapping[str, Coded]] = field(default_factory=dict)


class EffectiveRows:
    """The rows of all layers of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.layers = {layer.index: _layer_rows(bundle, layer) for layer in bundle.manifest.layers}

    def maps(self, layer_index: int) -> list[tuple[int, ...]]:
        """The row of each slot, variant by variant in the order of the bundle."""
        return list(self.layers[layer_index].maps.values())

    def install(self, variant: str, residuals: VariantResiduals) -> None:
        """The variant's residuals are in device memory now."""
        for (layer_index, slot), parts in residuals.items():
            layer = self.layers[layer_index]
            layer.residuals[layer.maps[variant][slot]] = parts

    def uninstall(self, variant: str) -> None:
        """They are no more."""
        for layer in self.layers.values():
            for row in layer.maps[variant]:
                layer.residuals.pop(row, None)


def needs_effective(bundle: Bundle, layer: StoredLayer) -> bool:
    """Whether anything in a layer is coded or has a residual."""
    variants = bundle.manifest.variants.values()
    return layer.is_coded or any(layer.index in variant.residual_layers for variant in variants)


def effective_layer(
    layer: StoredLayer,
    rows: LayerRows,
    pool: Callable[[int], Mapping[str, Tensor | Coded]],
    scratch: Scratch,
    activation: Activation,
    *,
    adds_outputs: bool = False,
) -> PoolLayer:
    """A layer's effective experts over the pool experts that `pool` gives; see `EffectiveLayer`."""
    return EffectiveLayer(
        pool=pool,
        bases=rows.bases,
        num_experts=rows.num_experts,
        residuals=rows.residuals,
        dtype=effective_dtype(layer),
        scratch=scratch,
        activation=activation,
        adds_outputs=adds_outputs,
    )


def activation_of(bundle: Bundle) -> Activation:
    """Form of the experts; the same in every variant, whose settings must agree on it."""
    first = next(iter(bundle.manifest.variants.values()))
    return Activation(str(first.settings["activation"]))


def scratch_of(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Scratch | None:
    """Memory to unpack experts in, if there are any to unpack."""
    if not any(needs_effective(bundle, layer) for layer in bundle.manifest.layers):
        return None
    return Scratch({part: tuple(shape) for part, shape in bundle.manifest.parts.items()}, dtype, device)


def _layer_rows(bundle: Bundle, layer: StoredLayer) -> LayerRows:
    bases = list(range(layer.num_experts))
    maps = {}
    for name, entry in bundle.manifest.variants.items():
        rows = []
        for slot, pool_index in enumerate(entry.maps[layer.index]):
            if entry.residual(layer.index, slot) is None:
                rows.append(pool_index)
            else:
                rows.append(len(bases))
                bases.append(pool_index)
        maps[name] = tuple(rows)
    return LayerRows(layer.num_experts, tuple(bases), maps, frozenset(bases[layer.num_experts :]))
