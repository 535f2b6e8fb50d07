"""Colours that differ in brightness and stay apart for the colour-blind. Pure."""

from itertools import pairwise

# Nine of viridis (Smith and van der Walt, CC0), which is even to the eye.
_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d31")
"""Of lines, one for each variant (after Okabe and Ito); dashes and marks differ, too."""
DASHES = (("solid", ""), ("dash", "8 4"), ("dot", "2 3"), ("dashdot", "10 3 2 3"))
"""Of lines, by the names of plotly and as SVG has them."""
RGB = tuple[int, int, int]


def shade(value: float) -> RGB:
    """Viridis at a value between 0 and 1."""
    place = min(1.0, max(0.0, value)) * (len(_VIRIDIS) - 1)
    first = min(int(place), len(_VIRIDIS) - 2)
    low, high = list(pairwise(_VIRIDIS))[first]
    red, green, blue = (round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def scale() -> list[tuple[float, str]]:
    """Viridis as a page's script takes it: places between 0 and 1 with their colours."""
    last = len(_VIRIDIS) - 1
    return [
        (place / last, "#" + "".join(f"{part:02x}" for part in rgb)) for place, rgb in enumerate(_VIRIDIS)
    ]
