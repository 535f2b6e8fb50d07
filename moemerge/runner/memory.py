"""What an engine holds in device memory, and how that is divided between residents, cache and pool."""

import logging
from collections.abc import Collection
from dataclasses import dataclass

import psutil
import torch

from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.sizes import format_size
from moemerge.errors import InvalidRecipe, NotEnoughRoom
from moemerge.models.arranging import Room
from moemerge.models.geometry import CacheGeometry, cache_geometry
from moemerge.models.products import can_pack
from moemerge.progress import Progress
from moemerge.runner.blocks import BlockPool
from moemerge.runner.cache import BlockCache
from moemerge.runner.forward import model_of
from moemerge.runner.intake import max_positions
from moemerge.runner.options import (
    EngineOptions,
    ResidentLimit,
    choose_device,
    choose_dtype,
    parse_resident,
)
from moemerge.runner.pool import load_pool, pool_bytes, residual_bytes
from moemerge.runner.weights import WeightStore

logger = logging.getLogger(__name__)
_CACHE_SHARE = 1 / 8
"""Of the memory there is, what the key/value cache takes when nothing is said."""
_FREE_SHARE = 1 / 3
"""Of the memory that is free, what experts may take that are not as small as they could be."""
_CUDA_SHARE = 0.9
"""Of the free memory of a CUDA device, what the engine plans with; the rest is for activations."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How device memory is divided.

    Attributes:
        num_blocks: Of the key/value cache.
        pool_bytes: For pool experts; None when the whole pool is to be held.
        resident_bytes: For residents; None when nothing limits them.
    """

    num_blocks: int
    pool_bytes: int | None = None
    resident_bytes: int | None = None


def plan_memory(
    options: EngineOptions,
    bundle: Bundle,
    store: WeightStore,
    geometry: CacheGeometry,
    *,
    resident: ResidentLimit,
    variants: Collection[str],
    context_tokens: int | None,
    room: Room,
) -> MemoryPlan:
    """Divide the device's memory: residents first, then the cache, and what is left for pool experts.

    Raises:
        NotEnoughRoom: The memory does not hold residents and a cache.
    """
    memory = options.device_memory
    if memory is None and store.device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(store.device)[0] * _CUDA_SHARE)
    resident_bytes = resident.most_bytes(variants, store)
    block_bytes = geometry.block_bytes(store.dtype)
    cache_bytes = options.cache_memory
    if cache_bytes is None:
        available = _free_bytes(options) if memory is None else memory
        full = options.max_batch * (-(-(context_tokens or 4096) // options.block_tokens)) * block_bytes
        cache_bytes = min(full, max(int(available * _CACHE_SHARE), block_bytes))
    elif memory is None and cache_bytes > psutil.virtual_memory().available:
        raise NotEnoughRoom(
            f"the key/value cache is to take {format_size(cache_bytes)}, more memory than is free"
        )
    num_blocks = cache_bytes // block_bytes
    if num_blocks < 1:
        raise NotEnoughRoom(
            f"the key/value cache has {format_size(cache_bytes)}, one block of {options.block_tokens} tokens "
            f"takes {format_size(block_bytes)}"
        )
    if memory is None:
        return MemoryPlan(num_blocks)
    left = memory - resident_bytes - num_blocks * block_bytes
    if left <= 0:
        raise NotEnoughRoom(
            f"device memory of {format_size(memory)} does not hold the resident variants "
            f"({format_size(resident_bytes)}) and the key/value cache "
            f"({format_size(num_blocks * block_bytes)}). Give more, or fewer residents"
        )
    fits = left >= pool_bytes(bundle, store.dtype, store.device, room)
    return MemoryPlan(num_blocks, None if fits else left, resident_bytes)


def choose_room(
    options: EngineOptions,
    bundle: Bundle,
    variants: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
) -> Room:
    """What coded experts may take so that they are multiplied as they are.

    Products of four bits are up to thirty times as fast for few rows as unpacking, and may take twice the
    bytes: only where all variants stay, no limit is set, and much memory is free.
    """
    stays = parse_resident(options.resident) == ResidentLimit()
    if not stays or options.device_memory is not None or not can_pack(dtype, device):
        return Room.SOME
    room = Room.FOUR_BITS
    experts = pool_bytes(bundle, dtype, device, room) + residual_bytes(bundle, variants, dtype, device, room)
    return room if experts <= _FREE_SHARE * _free_bytes(options) else Room.SOME


def _free_bytes(options: EngineOptions) -> int:
    return int(options.memory_share * psutil.virtual_memory().available)


class DeviceMemory:
    """The resident variants' tensors, the pool and the key/value cache."""

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        variants: Collection[str],
        progress: Progress | None = None,
    ) -> None:
        """Load the pool; no variant is resident yet.

        Raises:
            InvalidRecipe: Options that cannot be, or that leave no room for a variant.
            NotEnoughRoom: Device memory does not hold what the options ask for.
        """
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(bundle, options.dtype, self.device)
        self._resident = options.resident
        self._limit = parse_resident(options.resident)
        # Packing pays for tensors that stay, not for those that make room for others.
        is_packed = options.pack and self._limit == ResidentLimit()
        room = choose_room(options, bundle, variants, self.dtype, self.device)
        self.store = WeightStore(bundle, variants, self.dtype, self.device, is_packed=is_packed, room=room)
        self.check_fits(variants, set(options.pinned))

        geometry = cache_geometry(model_of(bundle, next(iter(variants))), options.block_tokens)
        longest = max((c for c in (max_positions(bundle, n) for n in variants) if c), default=None)
        plan = plan_memory(
            options, bundle, self.store, geometry,
            resident=self._limit, variants=variants, context_tokens=longest, room=room,
        )  # fmt: skip
        logger.debug("computes in %s on %s; %s", self.dtype, self.device, plan)
        if room == Room.FOUR_BITS and any(layer.is_coded for layer in bundle.manifest.layers):
            logger.info("experts in few bits are multiplied as they are, in up to twice their bytes")
        self._resident_bytes = plan.resident_bytes
        self.blocks = BlockPool(plan.num_blocks, options.block_tokens)
        self.pool = load_pool(
            bundle,
            self.dtype,
            self.device,
            memory_bytes=plan.pool_bytes,
            is_packed=options.pack,
            room=room,
            progress=progress,
        )
        self.cache = BlockCache(geometry, plan.num_blocks, self.dtype, self.device)

    def fits(self, variants: Collection[str]) -> bool:
        """Whether these variants may be resident together."""
        return self._limit.fits(variants, self.store)

    def check_fits(self, variants: Collection[str], pinned: set[str]) -> None:
        """Make sure that every variant finds room beside the pinned ones.

        Raises:
            InvalidRecipe: One does not.
        """
        for name in variants:
            if not self.fits({*pinned, name}):
                others = f" beside {', '.join(sorted(pinned - {name}))}, pinned" if pinned - {name} else ""
                raise InvalidRecipe(
                    f"resident is {self._resident}, which leaves no room for variant {name}{others}"
                )

    def check_planned(self, variants: Collection[str], added: str) -> None:
        """Make sure that residents take no more than was planned when one is added to those served.

        Raises:
            NotEnoughRoom: They may.
        """
        planned = self._resident_bytes
        needed = self._limit.most_bytes([*variants, added], self.store)
        if planned is not None and needed > planned:
            raise NotEnoughRoom(
                f"with variant {added} residents may take {needed} bytes of device memory, {planned} are "
                f"planned. Limit how many are resident, or start with it"
            )
