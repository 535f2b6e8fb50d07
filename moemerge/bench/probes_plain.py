"""One variant without pool and maps: its model in a bare loop, as the plain layout to compare with."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bench.probes_decode import PROMPT, decode
from moemerge.models import (
    Decoder,
    Experts,
    GrowingCache,
    MappedExperts,
    OneVariant,
    PoolLayer,
    Route,
    build_batch,
    expert_product,
)
from moemerge.runner.engine import Engine
from moemerge.runner.forward import model_of
from moemerge.runner.pool import load_pool
from moemerge.runner.weights import WeightStore


@dataclass(frozen=True, slots=True)
class PlainExperts:
    """`Experts` in which slot e is expert e of a layer, without a map."""

    layers: Mapping[int, PoolLayer]

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        return expert_product(hidden_TD, route.slots_TK, route.gates_TK, self.layers[layer_index])


def map_overhead(engine: Engine, variant: str, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per decoding step of one sequence: by the engine, and in a bare loop with and without maps.

    The loop has a copy of the weights in the same layout, its cache grows by a token at a time, and nothing
    is scheduled. The three take turns and compute the same tokens.
    """
    bundle, dtype, device = engine.bundle, engine.dtype, engine.device
    model = model_of(bundle, variant)
    assert isinstance(model, Decoder)
    store = WeightStore(bundle, [variant], dtype, device, is_packed=engine.has_packed_residents)
    transfer = store.prepare(variant)
    transfer.carry_out()
    store.finish(transfer)
    weights = OneVariant(store.weights(variant))
    pool = load_pool(bundle, dtype, device, memory_bytes=None, is_packed=engine.options.pack)
    entries = bundle.manifest.variants
    maps = {
        layer.index: torch.tensor([entry.maps[layer.index] for entry in entries.values()], device=device)
        for layer in bundle.manifest.layers
    }
    mapped = MappedExperts(pool.layers, maps, list(entries).index(variant))
    found: dict[str, list[float]] = {"engine": [], "mapped": [], "plain": []}
    for _ in range(repeats):
        found["engine"].append(decode(engine, variant, 1, tokens))
        found["mapped"].append(_loop(model, weights, mapped, device, tokens))
        found["plain"].append(_loop(model, weights, PlainExperts(pool.layers), device, tokens))
    return found


@torch.inference_mode()
def _loop(model: Decoder, weights: OneVariant, experts: Experts, device: torch.device, tokens: int) -> float:
    cache = GrowingCache()
    token_ids, past, begin = list(PROMPT), 0, 0.0
    for step in range(tokens + 1):
        if step == 1:
            begin = time.perf_counter()
        batch = build_batch([token_ids], [past], device)
        hidden_TD = model.forward(batch, weights, experts, cache.of(batch.spans))
        past += len(token_ids)
        token_ids = [int(model.logits(hidden_TD[-1:], weights).argmax())]
    return (time.perf_counter() - begin) / tokens
