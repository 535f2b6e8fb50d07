"""Non-expert tensors as a forward pass asks for them: of one variant, or of several side by side.

A model names roles and gives hidden states; whose tensors they meet is decided here. Knows nothing of
files, residency and of what a role is for.

Shapes: T tokens, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.layouts import Multiplied
from moemerge.models.norm import rms_norm, unit_mean_square
from moemerge.models.products import multiply

Apply = Callable[[Tensor, Tensor], Tensor]
"""From consecutive tokens and a tensor of their variant to one row for each of them."""


class Weights(Protocol):
    """The non-expert tensors of the variants in a batch. All of them have the same roles."""

    def __contains__(self, role: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """Product of each token with its variant's matrix [N, D]; [T, N] in the dtype of the tokens."""
        ...

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """Each token plus its variant's vector [D]."""
        ...

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """Root mean square norm with each token's variant's weight."""
        ...

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """Norm of mean and variance with each token's variant's weight, and bias where there is one."""
        ...

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """What a function makes of tokens [T, ...] and their variant's tensor, [T, ...]."""
        ...

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """Rows of the table of each token's variant; ids [T, ...] give [T, ..., D]."""
        ...


class OneVariant:
    """`Weights` of a batch of one variant, over its tensors by role; matrices may be packed or coded."""

    def __init__(self, tensors: Mapping[str, Tensor | Multiplied]) -> None:
        self.tensors = tensors

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        return multiply(hidden_TD, self.tensors[role])

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`."""
        return hidden_TD + self._plain(role)

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`."""
        return rms_norm(hidden_TD, self._plain(role), eps)

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.layer_norm`."""
        bias = self._plain(f"{role}.bias") if f"{role}.bias" in self else None
        return functional.layer_norm(hidden_TD, hidden_TD.shape[-1:], self._plain(role), bias, eps)

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """See `Weights.apply`."""
        return function(tokens, self._plain(role))

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        return functional.embedding(ids, self._plain(role))

    def _plain(self, role: str) -> Tensor:
        tensor = self.tensors[role]
        assert isinstance(tensor, Tensor), f"{role} is only multiplied"
        return tensor


class MixedVariants:
    """`Weights` of a batch of several variants, whose tokens stand one variant after the other.

    A role is one product per run of tokens that meet the same tensor; neighbours that hold the very same
    tensor object are one run.
    """

    def __init__(self, parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> None:
        """Number of consecutive tokens and their variant's tensors by role, in the order of the batch."""
        self.parts = parts

    def __contains__(self, role: str) -> bool:
        return role in self.parts[0][1]

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.linear`."""
        return self.apply(role, hidden_TD, multiply)

    def add(self, role: str, hidden_TD: Tensor) -> Tensor:
        """See `Weights.add`."""
        return self.apply(role, hidden_TD, torch.add)

    def norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.norm`."""
        return self.apply(role, unit_mean_square(hidden_TD, eps), torch.mul)

    def layer_norm(self, role: str, hidden_TD: Tensor, eps: float) -> Tensor:
        """See `Weights.layer_norm`."""
        standard_TD = functional.layer_norm(hidden_TD, hidden_TD.shape[-1:], eps=eps)
        scaled_TD = self.apply(role, standard_TD, torch.mul)
        return self.add(f"{role}.bias", scaled_TD) if f"{role}.bias" in self else scaled_TD

    def embed(self, role: str, ids: Tensor) -> Tensor:
        """See `Weights.embed`."""
        return self.apply(role, ids, functional.embedding)

    def apply(self, role: str, tokens: Tensor, function: Apply) -> Tensor:
        """See `Weights.apply`."""
        runs = self._runs(role)
        if len(runs) == 1:
            return function(tokens, runs[0][1])
        pieces = torch.split(tokens, [count for count, _ in runs])
        return torch.cat([function(piece, tensor) for piece, (_, tensor) in zip(pieces, runs, strict=True)])

    def _runs(self, role: str) -> list[tuple[int, Tensor]]:
        runs: list[tuple[int, Tensor]] = []
        for count, tensors in self.parts:
            tensor = tensors[role]
            if runs and runs[-1][1] is tensor:
                count += runs.pop()[0]
            runs.append((count, tensor))
        return runs


_MULTIPLIED = (
    *("query", "key", "value", "key_value", "query_key_value", "latent", "output"),
    *("wi", "wo", "gate", "up", "down"),
)


def is_only_multiplied(role: str) -> bool:
    """Whether `Weights.linear` is all that a model does with a tensor, in the dtype of the tokens."""
    return role == "head" or role.rpartition(".")[2] in _MULTIPLIED


HEAD_ROLES = ("decoder.final_norm", "decoder.final_norm.bias", "head.bias")
"""What logits are made with, besides a head or an embedding; the biases few families have."""
