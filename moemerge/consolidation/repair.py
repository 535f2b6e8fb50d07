"""Repair: a variant's routers, norms and output projections, fitted to the experts that a bundle has for it.

The variant as it was and the variant of the bundle run side by side over the same passages. Whenever the pass
asks for one of these tensors, what goes in and what should come out are both there: the tensor is fitted to
them, and later layers see what it gives. Experts and pool bytes stay as they are.

Shapes: T tokens of a lane, D model width.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.calibration.lanes import LaneExperts, LaneWeights
from moemerge.calibration.passages import spread
from moemerge.calibration.passes import CalibrationOptions, hidden_states, pass_tokens
from moemerge.calibration.streaming import Source, StreamedWeights
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.consolidation.prefix import ChangedSource, open_lanes
from moemerge.consolidation.refitting import refit_matrix, refit_norm, routing_divergence
from moemerge.models import Decoder, build_model
from moemerge.models.norm import unit_mean_square
from moemerge.models.weights import Apply
from moemerge.progress import Progress, Silent

REPAIR_TOKENS = 8192
"""Of the counted passages, spread over them, that repair looks at."""
_JUDGED = 4
"""Every so many passages, one judges instead of being fitted to."""

_OUTPUT = re.compile(r"(?P<block>.*\.)(?P<kind>attention|cross_attention|ffn)\.(output|wo|down)")


def is_repaired(role: str) -> bool:
    """Whether repair may change a tensor: a router, a norm, or what writes into the residual stream."""
    return role.endswith((".router", "_norm")) or _OUTPUT.fullmatch(role) is not None


@torch.no_grad()
def repair_variant(
    checkpoint: Checkpoint,
    bundle: Bundle,
    variant: str,
    passages: Sequence[Passage],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Fit a variant's tensors to the experts of a bundle.

    Args:
        checkpoint: The variant as it was, local.
        bundle: Published, or being written with pools and residuals in place.
        variant: Its name there.
        passages: In its own tokens; at most `REPAIR_TOKENS` of them are used, at once.
        options: Memory and dtype.
        progress: Told of the bytes of weights whose work is done.

    Returns:
        By role, in their stored dtype, those that became better on passages that were not fitted to.

    Raises:
        NotEnoughRoom: The passages do not fit into memory.
        DamagedInput: A weight is not finite, or a file changed.
    """
    options = options or CalibrationOptions()
    chosen = spread(passages, REPAIR_TOKENS)
    fitting = pass_tokens(checkpoint, chosen, options, copies=2)
    chosen = spread(chosen, fitting)
    report = progress or Silent()
    report.start(f"repairing {variant}", checkpoint.expert_bytes + checkpoint.other_bytes)
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    tensors: dict[str, Tensor] = {}
    with TensorReader() as reader:
        own, shared = open_lanes(checkpoint, bundle, variant, reader, options, report.advance)
        judged = _judged_tokens(chosen, model)
        factor = model.config.residual_factor if isinstance(model, Decoder) else 1.0
        weights = _RefittedWeights(own.source, shared.source, tensors, judged, factor)
        hidden_TD = hidden_states(model, chosen * 2, weights, LaneExperts([own.experts, shared.experts]))
        model.final_norm(hidden_TD, weights)
    return tensors


def _judged_tokens(passages: Sequence[Passage], model: object) -> dict[str, Tensor]:
    """By stack, which tokens judge instead of being fitted to."""
    if isinstance(model, Decoder):
        lengths = {"decoder": [len(passage.token_ids) for passage in passages]}
    else:
        lengths = {
            "encoder": [len(passage.token_ids) for passage in passages],
            "decoder": [len(passage.target_ids) for passage in passages],
        }
    judged = torch.arange(len(passages)) % _JUDGED == _JUDGED - 1
    return {stack: judged.repeat_interleave(torch.tensor(own)) for stack, own in lengths.items()}


class _RefittedWeights:
    """`Weights` of two lanes, the original and one that is fitted to it; fits when it is asked.

    Args:
        own: The original.
        shared: The other.
        tensors: Takes what was fitted, by role.
        judged: By stack; see `_judged_tokens`.
        factor: Of what layers add to the residual stream.
    """

    def __init__(
        self,
        own: Source,
        shared: Source,
        tensors: dict[str, Tensor],
        judged: Mapping[str, Tensor],
        factor: float,
    ) -> None:
        self._own = own
        self._tensors = tensors
        self._judged = judged
        self._factor = factor
        self._plain = StreamedWeights(own)
        self._lanes = LaneWeights([self._plain, StreamedWeights(ChangedSource(shared, tensors))])
        self._stream_TD = torch.zeros(0)

    def __contains__(self, role: str) -> bool:
        return role in self._lanes

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        return self._lanes.embed(role, ids)

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`; biases are not fitted."""
        return self._lanes.add(role, hidden_TD)

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`; what a fitted one norms is the residual stream, which the layer will add to."""
        if not is_repaired(role):
            return self._lanes.norm(role, hidden_TD, eps)
        self._stream_TD = hidden_TD
        own_TD, shared_TD = hidden_TD.chunk(2)
        if not torch.equal(own_TD, shared_TD):
            wanted_TD = self._plain.norm(role, own_TD, eps).float()
            units_TD = unit_mean_square(shared_TD, eps).float()
            fitted = refit_norm(units_TD, wanted_TD, self._own.stored(role), self._judged_of(role))
            self._keep(role, fitted)
        return self._lanes.norm(role, hidden_TD, eps)

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.layer_norm`; such norms of the residual stream are not fitted."""
        self._stream_TD = hidden_TD
        return self._lanes.layer_norm(role, hidden_TD, eps)

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """See `Weights.apply`."""
        return self._lanes.apply(role, tokens, function)

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        own_TD, shared_TD = hidden_TD.chunk(2)
        if is_repaired(role) and not torch.equal(own_TD, shared_TD):
            wanted_TN = self._plain.linear(role, own_TD).float()
            inputs_TD, matrix, judged = shared_TD.float(), self._own.stored(role), self._judged_of(role)
            if role.endswith(".router"):
                fitted = refit_matrix(inputs_TD, wanted_TN, matrix, judged, routing_divergence)
            else:
                # The layer adds to the residual stream, whose drift so far is to be taken back, too.
                own_stream_TD, stream_TD = self._stream_TD.float().chunk(2)
                drift_TD = (own_stream_TD - stream_TD) / self._factor
                fitted = refit_matrix(inputs_TD, wanted_TN + drift_TD, matrix, judged)
            self._keep(role, fitted)
        return self._lanes.linear(role, hidden_TD)

    def _judged_of(self, role: str) -> Tensor:
        return self._judged[role.partition(".")[0]]

    def _keep(self, role: str, fitted: Tensor | None) -> None:
        if fitted is not None:
            self._tensors[role] = fitted
