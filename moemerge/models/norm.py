"""Root mean square norm, the only norm of the models here. Knows nothing of layers."""

from torch import Tensor
from torch.nn import functional


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square, then multiply by the weight.

    The cast back to the dtype of `hidden` comes before the multiplication, as in the reference; in bf16
    the order shows.
    """
    return weight_D * unit_mean_square(hidden, eps)


def unit_mean_square(hidden: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square in float32, and cast back."""
    return functional.rms_norm(hidden, hidden.shape[-1:], eps=eps)
