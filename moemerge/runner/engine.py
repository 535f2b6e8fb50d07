"""One bundle on one device: the pool stays, variants change by their non-expert tensors.

Switching moves only tensors that differ between the active variant and the next; tensors that the
bundle stores once for both stay where they are.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader, torch_dtype
from moemerge.errors import DamagedBundle, InvalidRecipe
from moemerge.models import Decoder, EncoderDecoder, build_model
from moemerge.runner.pool import load_pool
from moemerge.runner.sampling import Sampling, choose

_Steps = Generator[Tensor, int, None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What switching to a variant took.

    Attributes:
        variant: Now active.
        moved_bytes: Bytes copied, in the bundle's dtype.
        kept_bytes: Bytes of non-expert tensors that were there already.
        seconds: Wall time.
    """

    variant: str
    moved_bytes: int
    kept_bytes: int
    seconds: float


class Engine:
    """Runs one variant of a bundle at a time."""

    def __init__(self, bundle: Bundle, *, dtype: str = "auto", device: str = "cpu") -> None:
        self.bundle = bundle
        self.device = _choose_device(device)
        self.dtype = _choose_dtype(bundle, dtype, self.device)
        self.active: str | None = None
        self._pool = load_pool(bundle, self.dtype, self.device)
        self._weights: dict[str, Tensor] = {}
        self._held: dict[str, StoredTensor] = {}
        self._model: Decoder | EncoderDecoder | None = None

    @property
    def model(self) -> Decoder | EncoderDecoder:
        """The active variant's model.

        Raises:
            InvalidRecipe: No variant is active yet.
        """
        if self._model is None:
            raise InvalidRecipe("no variant is active; switch to one first")
        return self._model

    def switch(self, variant: str) -> Swap:
        """Make a variant active.

        Raises:
            NotFound: The bundle has no such variant.
            DamagedBundle: A tensor is not where the manifest says.
        """
        begin = time.perf_counter()
        wanted = self.bundle.tensors(variant)
        moved = {role: tensor for role, tensor in wanted.items() if self._held.get(role) != tensor}
        if variant != self.active:
            # Half-exchanged weights belong to no variant.
            self.active = self._model = None
            self._exchange(wanted, moved)
            self._model = self._build(variant)
            self.active = variant
        return Swap(
            variant=variant,
            moved_bytes=sum(tensor.nbytes for tensor in moved.values()),
            kept_bytes=sum(tensor.nbytes for role, tensor in wanted.items() if role not in moved),
            seconds=time.perf_counter() - begin,
        )

    def generate(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Iterator[int]:
        """Token ids as they are chosen, until a stop id (not given), `max_tokens` or the context's end.

        Raises:
            InvalidRecipe: The prompt is empty, too long, or holds ids beyond the vocabulary.
        """
        model = self.model
        vocab_size = model.config.vocab_size
        if not prompt_ids:
            raise InvalidRecipe("the prompt is empty")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            raise InvalidRecipe(f"the prompt has token ids outside 0 to {vocab_size - 1}")
        room = max_tokens
        if isinstance(model, Decoder):
            room = min(max_tokens, model.config.max_positions - len(prompt_ids))
            if room < 1:
                raise InvalidRecipe(
                    f"the prompt has {len(prompt_ids)} tokens, the context is {model.config.max_positions}"
                )
        prompt_BT = torch.tensor([prompt_ids], device=self.device)
        step = (
            _decoder_steps(model, prompt_BT)
            if isinstance(model, Decoder)
            else _switch_steps(model, prompt_BT)
        )
        generator = sampling.generator()
        logits_V = next(step)
        for left in reversed(range(room)):
            token_id = choose(logits_V, sampling, generator)
            if token_id in stop_ids:
                return
            yield token_id
            if self._model is not model:
                raise RuntimeError("the variant was exchanged while it was answering")
            if left:
                logits_V = step.send(token_id)

    def verify_integrity(self) -> None:
        """Prove that the weights held are the active variant's.

        Raises:
            DamagedBundle: They are not, or the bundle changed underneath.
        """
        if self.active is None:
            return
        wanted = self.bundle.tensors(self.active)
        if wanted.keys() != self._weights.keys():
            raise DamagedBundle(f"{self.active}: tensors of another variant are left")
        with TensorReader() as reader:
            for role, tensor in wanted.items():
                if not torch.equal(reader.read(tensor).to(self.dtype), self._weights[role].cpu()):
                    raise DamagedBundle(f"{self.active}: {role} differs from the bundle")

    def _exchange(self, wanted: dict[str, StoredTensor], moved: dict[str, StoredTensor]) -> None:
        for role in self._weights.keys() - wanted.keys():
            del self._weights[role]
            self._held.pop(role, None)
        with TensorReader() as reader:
            for role, tensor in moved.items():
                self._held.pop(role, None)
                value = reader.read(tensor)
                place = self._weights.get(role)
                if place is not None and place.shape == value.shape:
                    place.copy_(value)
                else:
                    self._weights[role] = value.to(device=self.device, dtype=self.dtype)
                self._held[role] = tensor

    def _build(self, variant: str) -> Decoder | EncoderDecoder:
        entry = self.bundle.variant(variant)
        experts = self._pool.seen_by(entry.maps, self.device)
        return build_model(self.bundle.family.arithmetic, entry.settings, self._weights, experts)


def _choose_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InvalidRecipe(f"device {name!r} is unknown; there are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRecipe(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def _choose_dtype(bundle: Bundle, name: str, device: torch.device) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InvalidRecipe(f"dtype {name!r} is unknown; there are auto, {', '.join(DTYPES)}")
    stored = {torch_dtype(tensor) for v in bundle.manifest.variants for tensor in bundle.tensors(v).values()}
    pools = [bundle.pool(layer.index) for layer in bundle.manifest.layers]
    stored |= {torch_dtype(tensor) for pool in pools for parts in pool for tensor in parts.values()}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    # Half precision on a CPU is slow and overflows; float32 holds all its values.
    return (
        torch.float32
        if dtype == torch.float64 or (dtype == torch.float16 and device.type == "cpu")
        else dtype
    )


def _decoder_steps(model: Decoder, prompt_BT: Tensor) -> _Steps:
    cache = model.new_cache()
    token_ids_BT = prompt_BT
    while True:
        logits_BTV = model.forward(token_ids_BT, cache, last_only=True)
        token_id = yield logits_BTV[0, -1]
        token_ids_BT = prompt_BT.new_tensor([[token_id]])


def _switch_steps(model: EncoderDecoder, prompt_BS: Tensor) -> _Steps:
    encoded_BSD = model.encode(prompt_BS)
    cache = model.new_cache()
    token_id = model.config.start_token_id
    while True:
        logits_BTV = model.decode(prompt_BS.new_tensor([[token_id]]), cache, encoded_BSD, last_only=True)
        token_id = yield logits_BTV[0, -1]
