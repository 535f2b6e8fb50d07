"""One variant over its text: as many tokens at once as memory allows, its weights read once for each pass.

Shapes: T tokens, D model width, W tokens whose successor is known, Vo vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from moemerge.calibration.streaming import (
    EXPERT_ROWS,
    CheckpointSource,
    KeepLayer,
    Source,
    StreamedCross,
    StreamedExperts,
    StreamedWeights,
)
from moemerge.calibration.texts import WINDOW_TOKENS, Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.sizes import format_size
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import InvalidRecipe, NotEnoughRoom
from moemerge.models import (
    Decoder,
    EncoderDecoder,
    Experts,
    OneVariant,
    Weights,
    build_batch,
    build_model,
)
from moemerge.models.weights import HEAD_ROLES
from moemerge.progress import Progress, Silent

DEFAULT_TOKENS, DEFAULT_DTYPE = 65536, "float32"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The interpreter with torch and everything else that does not grow with the work.
_FIXED_BYTES = 400 * 2**20
# Of the free memory, when no limit is given.
_FREE_SHARE = 0.7
LOGIT_ENTRIES = 2**23
"""Of logits that are computed at a time."""
NO_LABEL = -100
Rows = Callable[[slice], Tensor]
"""Hidden states of some of a text's tokens, [T, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How a text is computed and what is kept of it.

    Attributes:
        num_tokens: Most tokens of a variant's text that are used.
        window: Tokens of running text that are computed as one; best as many as the variants were tuned on.
        reservoir: Tokens to keep a sample of, per slot.
        seed: Of the sample.
        dtype: Of the computation, a key of `DTYPES`; sums are float32 whatever it is.
        max_ram: Bytes of memory to stay within; None for most of what is free.
    """

    num_tokens: int = DEFAULT_TOKENS
    window: int = WINDOW_TOKENS
    reservoir: int = 1024
    seed: int = 0
    dtype: str = DEFAULT_DTYPE
    max_ram: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InvalidRecipe: A value that cannot be right.
        """
        if self.num_tokens < 1 or self.window < 2 or self.reservoir < 1 or self.seed < 0:
            raise InvalidRecipe(
                "calibration needs at least a token, windows of two, a reservoir of one, and a seed of 0"
            )
        check_dtype(self.dtype)


def check_dtype(name: str) -> None:
    """Refuse what nothing can be computed in.

    Raises:
        InvalidRecipe: Not a key of `DTYPES`.
    """
    if name not in DTYPES:
        raise InvalidRecipe(f"dtype {name!r}: expected {' or '.join(DTYPES)}")


def calibrate_layers(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    layers: range,
    keep: KeepLayer,
    options: CalibrationOptions,
    before: Rows | None = None,
    progress: Progress | None = None,
    title: str = "calibrating",
) -> Iterator[Tensor]:
    """Run a variant's text through some of its layers and hand out what each routed one has counted.

    Args:
        checkpoint: Local.
        passages: Its text, in its own tokens.
        layers: Of a decoder neighbouring ones; of an encoder-decoder all of both stacks.
        keep: Told each layer's statistics, once in every pass over a part of the text: they are to be added
            with `LayerStatistics.add`, and with enough memory there is a single pass.
        options: See there; the number of tokens is that of the passages.
        before: Hidden states before these layers; None before the first one.
        progress: Told of the bytes of weights whose work is done.
        title: What progress calls it.

    Yields:
        After each pass the hidden states behind these layers, of every token for which there is a label;
        [T, D].

    Raises:
        NotEnoughRoom: Not even one passage fits into memory.
        DamagedInput: A weight is not finite, or a file changed.
    """
    limit = pass_tokens(checkpoint, passages, options)
    passes = list(cut_passes(passages, limit))
    report = progress or Silent()
    report.start(title, len(passes) * layers_bytes(checkpoint, layers))
    keys = _draw_keys(passages, options.seed)
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    start = 0
    with TensorReader() as reader:
        source = CheckpointSource(checkpoint, reader, DTYPES[options.dtype], report.advance)
        for first, last in passes:
            part = passages[first:last]
            own_keys = {stack: torch.cat(drawn[first:last]) for stack, drawn in keys.items()}
            weights = StreamedWeights(source)
            experts = StreamedExperts(source, model.config.activation, own_keys, options.reservoir, keep)
            rows = slice(start, start + sum(map(len, labels_of(model, part))))
            start = rows.stop
            if isinstance(model, Decoder):
                batch = build_batch([passage.token_ids for passage in part])
                hidden_TD = model.embed(batch, weights) if before is None else before(rows)
                yield model.run_layers(layers, hidden_TD, batch, weights, experts)
            else:
                yield hidden_states(model, part, weights, experts)


def layers_bytes(checkpoint: Checkpoint, layers: range) -> int:
    """Of the weights that `calibrate_layers` reads."""
    blocks = tuple(f"decoder.{layer}." for layer in layers)
    is_decoder = checkpoint.family.arithmetic != "encoder_decoder"
    experts = [
        part.nbytes
        for (layer, _), parts in checkpoint.experts.items()
        for part in parts.values()
        if layer in layers or not is_decoder
    ]
    others = [
        tensor.nbytes
        for role, tensor in checkpoint.tensors.items()
        if role.startswith(blocks)
        or (role.startswith("embedding") and not layers.start)
        or not (is_decoder or role in (*HEAD_ROLES, "head"))
    ]
    return sum(experts) + sum(others)


def passage_nll(
    checkpoint: Checkpoint, passages: Sequence[Passage], hidden: Rows, options: CalibrationOptions
) -> list[float]:
    """Negative log-likelihood in nats of each passage, summed over the tokens it predicts.

    Args:
        checkpoint: Local.
        passages: In its own tokens.
        hidden: As `calibrate_layers` gives them behind the last layer.
        options: Memory and dtype.
    """
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    nll: list[float] = []
    start = 0
    with TensorReader() as reader:
        source = CheckpointSource(checkpoint, reader, DTYPES[options.dtype])
        for first, last in cut_passes(passages, pass_tokens(checkpoint, passages, options)):
            labels = labels_of(model, passages[first:last])
            rows = slice(start, start + sum(map(len, labels)))
            nll += _nll(model, hidden(rows), labels, source)
            start = rows.stop
    return nll


def measure_nll(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    options: CalibrationOptions,
    progress: Progress | None = None,
    title: str = "measuring",
) -> list[float]:
    """The same in one go, where nothing is to be counted.

    Raises:
        NotEnoughRoom, DamagedInput: As `calibrate_layers`.
    """
    limit = pass_tokens(checkpoint, passages, options)
    passes = list(cut_passes(passages, limit))
    report = progress or Silent()
    report.start(title, len(passes) * (checkpoint.expert_bytes + checkpoint.other_bytes))
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    nll: list[float] = []
    with TensorReader() as reader:
        source = CheckpointSource(checkpoint, reader, DTYPES[options.dtype], report.advance)
        for first, last in passes:
            part, weights = passages[first:last], StreamedWeights(source)
            experts = StreamedExperts(source, model.config.activation, {}, 0, None)
            hidden_TD = hidden_states(model, part, weights, experts)
            nll += _nll(model, hidden_TD, labels_of(model, part), source)
    return nll


def num_predicted(passage: Passage) -> int:
    """Tokens of a passage that the model predicts: those of the answer, or all but the window's first."""
    return len(passage.target_ids) or len(passage.token_ids) - 1


def mean_nll(nll: Sequence[float], passages: Sequence[Passage]) -> float:
    """Mean over predicted tokens, in nats."""
    return sum(nll) / max(1, sum(map(num_predicted, passages)))


def pass_tokens(
    checkpoint: Checkpoint, passages: Sequence[Passage], options: CalibrationOptions, copies: int = 1
) -> int:
    """Tokens that may be computed at once, each as many times as `copies` says.

    Raises:
        NotEnoughRoom: Fewer than the longest passage has.
    """
    longest = max(passage.num_tokens for passage in passages)
    fixed, each = _needs(checkpoint, longest, options, copies)
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = min(options.max_ram or int(_FREE_SHARE * available), available)
    fitting = max(0, limit - fixed) // each
    if fitting < longest:
        limited_by = "--max-ram allows" if options.max_ram else "free are"
        raise NotEnoughRoom(
            f"{checkpoint.label}: calibrating needs {format_size(fixed + each * longest)} of memory for one "
            f"passage; {limited_by} {format_size(limit)}"
        )
    return fitting


def pass_memory(
    checkpoint: Checkpoint, passages: Sequence[Passage], options: CalibrationOptions, copies: int = 1
) -> int:
    """Bytes of memory that computing all passages at once takes, or the limit if that is less."""
    fixed, each = _needs(checkpoint, max(passage.num_tokens for passage in passages), options, copies)
    most = fixed + each * sum(passage.num_tokens for passage in passages)
    return most if options.max_ram is None else min(most, options.max_ram)


def _needs(checkpoint: Checkpoint, longest: int, options: CalibrationOptions, copies: int) -> tuple[int, int]:
    """Bytes of memory whatever the number of tokens, and for each of them."""
    fixed = _FIXED_BYTES + _weight_bytes(checkpoint, options) + _kept_bytes(checkpoint, options)
    return fixed, copies * _token_bytes(checkpoint, longest, options)


def _weight_bytes(checkpoint: Checkpoint, options: CalibrationOptions) -> int:
    """The largest tensor or expert, as it is stored and as it is computed with, and an expert's rows."""
    itemsize = DTYPES[options.dtype].itemsize
    # A head may be computed in float32.
    other = max(t.nbytes + 4 * t.num_elements for t in checkpoint.tensors.values())
    parts = next(iter(checkpoint.experts.values())).values()
    expert = sum(itemsize * part.num_elements for part in parts) + max(part.nbytes for part in parts)
    # What the largest part is disturbed with.
    expert += itemsize * max(part.num_elements for part in parts)
    settings = checkpoint.settings
    widths = 3 * int(settings["expert_size"] or 0) + 6 * int(settings["hidden_size"] or 0)
    return max(other + 12 * LOGIT_ENTRIES, expert + 4 * EXPERT_ROWS * widths)


def _kept_bytes(checkpoint: Checkpoint, options: CalibrationOptions) -> int:
    """Statistics of a layer, twice, for they are added to those of the passes before."""
    width = int(checkpoint.settings["hidden_size"] or 0)
    return 2 * checkpoint.num_experts * width * (4 * width + 2 * options.reservoir)


def _token_bytes(checkpoint: Checkpoint, longest: int, options: CalibrationOptions) -> int:
    """What one more token takes between the layers and in attention."""
    settings = checkpoint.settings
    width = int(settings["hidden_size"] or 0)
    num_heads, head_size = int(settings["num_heads"] or 0), int(settings["head_size"] or 0)
    head_size += int(settings.get("latent_size") or 0)
    entries = 4 * width + 10 * num_heads * head_size
    if checkpoint.family.arithmetic == "encoder_decoder":
        # Relative positions make masks: scores, the mask, and what both are made from.
        entries += num_heads * (4 * longest + int(settings["position_buckets"] or 0)) + 3 * longest
    elif settings.get("sliding_window"):
        entries += 6 * longest
    return entries * max(4, DTYPES[options.dtype].itemsize)


def cut_passes(passages: Sequence[Passage], limit: int) -> Iterator[tuple[int, int]]:
    """First and last, exclusive, of the passages of each pass."""
    bounds, tokens = [0], 0
    for number, passage in enumerate(passages):
        if tokens and tokens + passage.num_tokens > limit:
            bounds.append(number)
            tokens = 0
        tokens += passage.num_tokens
    yield from pairwise([*bounds, len(passages)])


def _draw_keys(passages: Sequence[Passage], seed: int) -> dict[str, list[Tensor]]:
    """A random number for every token that a stack sees, by passage; passes do not change it."""
    generator = torch.Generator().manual_seed(seed)
    has_targets = any(passage.target_ids for passage in passages)
    lengths = {"decoder": [len(p.target_ids if has_targets else p.token_ids) for p in passages]}
    if has_targets:
        lengths["encoder"] = [len(passage.token_ids) for passage in passages]
    return {
        stack: list(torch.split(torch.rand(sum(own), generator=generator, dtype=torch.float64), own))
        for stack, own in lengths.items()
    }


def hidden_states(
    model: Decoder | EncoderDecoder, passages: Sequence[Passage], weights: Weights, experts: Experts
) -> Tensor:
    """Of all tokens that `labels_of` has labels for, after the decoder's last layer; [T, D]."""
    if isinstance(model, Decoder):
        return model.forward(build_batch([p.token_ids for p in passages]), weights, experts)
    return _answer(model, passages, weights, experts)


def labels_of(model: Decoder | EncoderDecoder, passages: Sequence[Passage]) -> list[list[int]]:
    """What the model is to predict at every token of each passage; `NO_LABEL` where nothing follows."""
    if isinstance(model, Decoder):
        return [[*passage.token_ids[1:], NO_LABEL] for passage in passages]
    return [list(passage.target_ids) for passage in passages]


def _answer(model: EncoderDecoder, passages: Sequence[Passage], weights: Weights, experts: Experts) -> Tensor:
    """The decoder's hidden states while it is told the answer, no token of which is ever dropped.

    Serving decodes token by token, where capacity never binds; see `EncoderDecoder`.
    """
    batch = build_batch([passage.token_ids for passage in passages])
    encoded_TD = model.encode(batch, weights, experts)
    start = model.config.start_token_id
    answers = build_batch([[start, *passage.target_ids[:-1]] for passage in passages])
    cross = StreamedCross(model, encoded_TD, batch, weights)
    lengths = [len(passage.token_ids) for passage in passages]
    return model.decode(answers, weights, experts, None, cross, lengths)


def _nll(
    model: Decoder | EncoderDecoder, hidden_TD: Tensor, labels: Sequence[Sequence[int]], source: Source
) -> list[float]:
    """Summed over each passage's labels; the head is read once and applied to a few tokens at a time."""
    tensors = source.checkpoint.tensors
    head = "head" if "head" in tensors else "embedding"
    roles = [role for role in (*HEAD_ROLES, head) if role in tensors]
    weights = OneVariant({role: source.stored(role).to(hidden_TD.dtype) for role in roles})
    source.done({role: tensors[role] for role in roles if role != "embedding"})
    label_T = torch.tensor([label for own in labels for label in own])
    rows = max(1, LOGIT_ENTRIES // tensors[head].shape[0])
    losses = [
        functional.cross_entropy(
            model.logits(hidden, weights).float(), label, ignore_index=NO_LABEL, reduction="none"
        )
        for hidden, label in zip(torch.split(hidden_TD, rows), torch.split(label_T, rows), strict=True)
    ]
    each = torch.split(torch.cat(losses).double(), [len(own) for own in labels])
    return [float(own.sum()) for own in each]
