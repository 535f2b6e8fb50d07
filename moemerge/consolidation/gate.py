"""What a user wants to be kept of what fine-tuning gained, as a share of it: 1 is all."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Shares that must be kept.

    Attributes:
        floor: By every variant.
        mean: On average.
    """

    floor: float | None = None
    mean: float | None = None

    def __post_init__(self) -> None:
        for option, share in (("--floor", self.floor), ("--quality", self.mean)):
            if share is not None and not 0 < share < 1:
                raise InvalidRecipe(
                    f"{option} {share:g}: expected a share of what fine-tuning gained, such as 0.99; "
                    f"--budget exact keeps all of it"
                )

    @property
    def is_open(self) -> bool:
        """Whether nothing is asked for."""
        return self.floor is None and self.mean is None

    def missed(self, kept: Mapping[str, float]) -> list[str]:
        """What is not kept, in words, of the shares that variants keep."""
        found = [
            f"variant {name} keeps {share:.4f} of what it gained, its floor is {self.floor:g}"
            for name, share in kept.items()
            if self.floor is not None and share < self.floor
        ]
        mean = statistics.fmean(kept.values()) if kept else 1.0
        if self.mean is not None and mean < self.mean:
            found.append(f"variants keep {mean:.4f} of what they gained on average, asked for {self.mean:g}")
        return found

    def has_slack(self, kept: Mapping[str, float], spared: float) -> bool:
        """Whether so large a share of what may be lost is not lost, wherever something is asked for."""
        if not kept:
            return False
        lost, most = [1 - share for share in kept.values()], []
        if self.floor is not None:
            most.append(max(lost) / (1 - self.floor))
        if self.mean is not None:
            most.append(statistics.fmean(lost) / (1 - self.mean))
        return bool(most) and max(most) < 1 - spared

    def excess(self, lost: Mapping[str, float]) -> float:
        """By how much the shares that variants lose are more than is let through; 0 when they are not."""
        found = [0.0]
        if self.floor is not None:
            found.append(max(lost.values()) - (1 - self.floor))
        if self.mean is not None:
            found.append(statistics.fmean(lost.values()) - (1 - self.mean))
        return max(found)


def check_gate(gate: Gate, gained: Mapping[str, float]) -> None:
    """Make sure that what a gate asks for can be measured.

    Args:
        gate: What is asked for.
        gained: By variant, what fine-tuning gained; empty when that is not known.

    Raises:
        InvalidRecipe: It is not known.
    """
    if not gate.is_open and not gained:
        raise InvalidRecipe(
            "a share of what fine-tuning gained needs the base, and text that every variant predicts better "
            "than the base does. Give --base, and --text or --calibration made with it"
        )
