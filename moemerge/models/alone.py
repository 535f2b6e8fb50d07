"""A model with the weights and experts of one variant: a whole checkpoint in memory."""

from dataclasses import dataclass

from torch import Tensor

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.batch import build_batch
from moemerge.models.decoder import Decoder
from moemerge.models.encoder_decoder import EncoderDecoder
from moemerge.models.experts import Experts
from moemerge.models.weights import Weights


@dataclass(frozen=True, slots=True)
class StandAlone:
    """One variant, ready to be measured."""

    model: Decoder | EncoderDecoder
    weights: Weights
    experts: Experts

    def forward(self, token_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, Vo] of what follows every token of B texts, in one pass.

        Raises:
            UnsupportedCheckpoint: An encoder-decoder has no such logits.
        """
        if not isinstance(self.model, Decoder):
            raise UnsupportedCheckpoint("logits of a text as it stands need a decoder-only family")
        batch = build_batch(token_ids_BT.tolist(), device=token_ids_BT.device)
        hidden_TD = self.model.forward(batch, self.weights, self.experts)
        return self.model.logits(hidden_TD, self.weights).view(*token_ids_BT.shape, -1)
