"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        seed: Of the random choices.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InvalidRecipe(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise InvalidRecipe(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1")

    def generator(self) -> torch.Generator:
        """A source of random numbers for one request."""
        return torch.Generator().manual_seed(self.seed)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token id; of equally likely ones the smallest when greedy."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Relative to the largest, and in double precision, so that no temperature is too small.
    relative_V = logits_V.double().cpu() - logits_V.max().double().cpu()
    probabilities = torch.softmax(relative_V / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
