"""The cost of computing another expert in an expert's place, on the tokens that met it.

Pure functions of gates and outputs; whoever calls runs the experts. Knows nothing of what an expert is.

Shapes: S tokens routed to the expert, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]
"""From inputs [S, D] to outputs [S, D]."""


def gated_replacement_error(gates_S: Tensor, outputs_SD: Tensor, replaced_SD: Tensor) -> float:
    """Mean over tokens of `g^2 |E(x) - P(x)|^2`; 0 without tokens.

    Directed: the tokens are those of the expert that is replaced. Times the tokens routed to it, over the
    layer's output energy, it is the damage to the layer, but for terms between the experts of a token.

    Args:
        gates_S: Of the tokens.
        outputs_SD: E(x), of the expert itself.
        replaced_SD: P(x), of what would stand in its place.

    Source: the output cost of REAM and of pool selection by measured error; one of the two terms of the
        gated output similarity there.
    """
    if not len(gates_S):
        return 0.0
    errors_S = (outputs_SD.double() - replaced_SD.double()).square().sum(dim=1)
    return float((gates_S.double().square() * errors_S).mean())


def relative_replacement_error(gates_S: Tensor, outputs_SD: Tensor, replaced_SD: Tensor) -> float:
    """The same over the mean of `g^2 |E(x)|^2`: 0 for equal experts, 1 for one that answers nothing."""
    scale = gated_replacement_error(gates_S, outputs_SD, torch.zeros_like(outputs_SD))
    return gated_replacement_error(gates_S, outputs_SD, replaced_SD) / scale if scale else 0.0


def replacement_error_of(
    expert: Expert, other: Expert, inputs_SD: Tensor, gates_S: Tensor, rows: int = 2048
) -> float:
    """`gated_replacement_error` of `other` in place of `expert`, computed on so many tokens at a time."""
    total = 0.0
    for inputs, gates in zip(torch.split(inputs_SD, rows), torch.split(gates_S, rows), strict=True):
        total += len(gates) * gated_replacement_error(gates, expert(inputs), other(inputs))
    return total / len(gates_S) if len(gates_S) else 0.0
