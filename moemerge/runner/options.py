"""How an engine runs: its options, and what they name."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from moemerge.bundle.reader import Bundle, expert_dtypes
from moemerge.checkpoint.sizes import parse_size
from moemerge.checkpoint.tensors import torch_dtype
from moemerge.errors import InvalidRecipe
from moemerge.runner.limits import Limits
from moemerge.runner.policies import Policy
from moemerge.runner.residency import Patience
from moemerge.runner.weights import WeightStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        variants: Names of the variants to serve; None for all of the bundle.
        resident: How many may be resident: `all`, a number, or a size in bytes such as `4GiB`.
        pinned: Variants that are loaded at the start and stay.
        policy: `mixed`, `grouped` or `fcfs`.
        device_memory: Bytes for pool, residents and key/value cache together; None for what there is.
        cache_memory: Bytes of the key/value cache; None for an eighth of the memory there is, at most what
            `max_batch` sequences of full length take.
        memory_share: Of the CPU's free memory, what the engine may plan with: others may run beside it.
        block_tokens: Tokens per block of the cache.
        pack: Whether plain matrices that stay in memory, of the pool and with `all` of residents, may take
            the blocked layout of the CPU's matrix kernels.
        max_batch, max_step_tokens, max_wait_s, quantum_s, shares: See `Limits`.
        patience_s, min_hold_s, drain_s: See `Patience`; None for what suits the policy.
    """

    device: str = "cpu"
    dtype: str = "auto"
    variants: tuple[str, ...] | None = None
    resident: str = "all"
    pinned: tuple[str, ...] = ()
    policy: str = "mixed"
    device_memory: int | None = None
    cache_memory: int | None = None
    memory_share: float = 1.0
    block_tokens: int = 16
    pack: bool = True
    max_batch: int = 64
    max_step_tokens: int = 512
    max_wait_s: float = 10.0
    quantum_s: float = 0.5
    shares: Mapping[str, float] = field(default_factory=dict)
    patience_s: float | None = None
    min_hold_s: float | None = None
    drain_s: float | None = None

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise InvalidRecipe(f"block tokens is {self.block_tokens}, expected at least 1")
        for name in ("device_memory", "cache_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRecipe(f"{name.replace('_', ' ')} is {value} bytes, expected more")
        if not 0 < self.memory_share <= 1:
            raise InvalidRecipe(f"memory share is {self.memory_share}, expected more than 0 and at most 1")
        self.chosen_policy()
        self.limits()
        self.patience()

    def chosen_policy(self) -> Policy:
        """The policy.

        Raises:
            InvalidRecipe: There is no such policy.
        """
        try:
            return Policy(self.policy)
        except ValueError:
            raise InvalidRecipe(f"policy {self.policy!r} is unknown; there are {', '.join(Policy)}") from None

    def limits(self) -> Limits:
        """What the scheduler keeps to."""
        return Limits(
            max_batch=self.max_batch,
            max_step_tokens=max(self.max_step_tokens, self.max_batch),
            max_wait_s=self.max_wait_s,
            quantum_s=self.quantum_s,
            shares=dict(self.shares),
        )

    def patience(self) -> Patience:
        """How residency decides: in order of arrival at once, by turns after a turn, else patiently."""
        patience_s, min_hold_s, drain_s = {
            Policy.MIXED: (1.0, 1.0, 5.0),
            Policy.GROUPED: (self.quantum_s, self.quantum_s, self.max_wait_s),
            Policy.FCFS: (0.0, 0.0, float("inf")),
        }[self.chosen_policy()]
        return Patience(
            patience_s=patience_s if self.patience_s is None else self.patience_s,
            min_hold_s=min_hold_s if self.min_hold_s is None else self.min_hold_s,
            drain_s=drain_s if self.drain_s is None else self.drain_s,
        )


@dataclass(frozen=True, slots=True)
class ResidentLimit:
    """How much may be resident: so many variants, or so many bytes of their tensors; None for no limit."""

    count: int | None = None
    nbytes: int | None = None

    def fits(self, variants: Collection[str], store: WeightStore) -> bool:
        """Whether these variants may be resident together."""
        if self.count is not None:
            return len(set(variants)) <= self.count
        return self.nbytes is None or store.set_bytes(variants) <= self.nbytes

    def most_bytes(self, variants: Collection[str], store: WeightStore) -> int:
        """The most that residents can take."""
        everything = store.set_bytes(variants)
        if self.count is not None:
            largest = sorted((store.set_bytes([variant]) for variant in variants), reverse=True)
            return min(everything, sum(largest[: self.count]))
        return everything if self.nbytes is None else min(everything, self.nbytes)


def parse_resident(text: str) -> ResidentLimit:
    """What `--resident` says.

    Raises:
        InvalidRecipe: Neither `all`, a number of variants, nor a size.
    """
    if text == "all":
        return ResidentLimit()
    if text.isascii() and text.isdigit():
        if int(text) < 1:
            raise InvalidRecipe(f"resident is {text}, expected at least 1 variant")
        return ResidentLimit(count=int(text))
    try:
        return ResidentLimit(nbytes=parse_size(text))
    except InvalidRecipe as error:
        raise InvalidRecipe(f"resident is {text!r}, expected all, a number of variants, or a size") from error


def choose_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        InvalidRecipe: Unknown, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InvalidRecipe(f"device {name!r} is unknown; there are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRecipe(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def choose_dtype(bundle: Bundle, name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    Raises:
        InvalidRecipe: Unknown.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InvalidRecipe(f"dtype {name!r} is unknown; there are auto, {', '.join(DTYPES)}")
    stored = {torch_dtype(tensor) for v in bundle.manifest.variants for tensor in bundle.tensors(v).values()}
    stored |= {dtype for layer in bundle.manifest.layers for dtype in expert_dtypes(bundle, layer.index)}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    # Half precision on a CPU is slow and overflows; float32 holds all its values.
    return (
        torch.float32
        if dtype == torch.float64 or (dtype == torch.float16 and device.type == "cpu")
        else dtype
    )
