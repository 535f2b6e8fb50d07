"""Whether two experts see and say alike: signals for reports, not for decisions.

Pure functions of gates, outputs and weights on common tokens. Knows nothing of models.

Shapes: T common tokens, D width of the outputs, F hidden neurons.
"""

import torch
from torch import Tensor

_ROWS = 1024


def gate_agreement(gates_a_T: Tensor, gates_b_T: Tensor) -> float:
    """Pearson correlation of two experts' gates on the same tokens; 0 where one of them never varies.

    Source: routing similarity of MC-SMoE (arXiv:2310.01334) and REAM.
    """
    a, b = _centred(gates_a_T), _centred(gates_b_T)
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else 0.0


def linear_cka(outputs_a_TD: Tensor, outputs_b_TD: Tensor) -> float:
    """Linear centred kernel alignment: 1 for outputs equal up to rotation and scale, 0 for unrelated ones.

    `|Ya^T Yb|^2 / (|Ya^T Ya| |Yb^T Yb|)`, Frobenius norms, columns centred.

    Source: Kornblith et al. 2019 (arXiv:1905.00414), equation 4.
    """
    a, b = _centred(outputs_a_TD), _centred(outputs_b_TD)
    scale = float((a.T @ a).norm() * (b.T @ b).norm())
    return float((a.T @ b).square().sum()) / scale if scale else 0.0


def neuron_identity(a_FD: Tensor, b_FD: Tensor) -> float:
    """Share of the first expert's neurons whose nearest neuron in the other has the same index.

    Near 1 for fine-tunes of one model, whose neurons keep their places; near 1/F when one was permuted, and
    then averaging needs an alignment first.

    Args:
        a_FD: A neuron a row, for example the rows of `gate` beside those of `up`.
        b_FD: The other's.
    """
    if not len(a_FD):
        return 1.0
    a_FD, b_FD = a_FD.float(), b_FD.float()
    own = sum(_at_home(a_FD, b_FD, first) for first in range(0, len(a_FD), _ROWS))
    return own / len(a_FD)


def _at_home(a_FD: Tensor, b_FD: Tensor, first: int) -> int:
    """Of the neurons from `first` on, those to which none is nearer than the one in their place."""
    distances_RF = torch.cdist(a_FD[first : first + _ROWS], b_FD)
    return int((distances_RF.diagonal(first) <= distances_RF.amin(dim=1)).sum())


def _centred(values: Tensor) -> Tensor:
    values = values.double()
    return values - values.mean(dim=0)
