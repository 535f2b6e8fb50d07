"""Figures are counted where they belong, and copies stay as they were."""

from moemerge.runner.metrics import LATENCY_BOUNDS_S, Histogram, VariantFigures


def test_values_are_counted_up_to_their_bound():
    histogram = Histogram()
    for value in (0.0, LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[0] * 1.01, LATENCY_BOUNDS_S[-1], 1e9):
        histogram.add(value)
    assert histogram.counts[0] == 2
    assert histogram.counts[1] == 1
    assert histogram.counts[-2:] == [1, 1]
    assert sum(histogram.counts) == 5
    assert histogram.total_s > 1e9


def test_bounds_rise():
    assert list(LATENCY_BOUNDS_S) == sorted(set(LATENCY_BOUNDS_S))


def test_a_copy_has_every_figure_and_shares_none():
    figures = VariantFigures()
    for number, name in enumerate(VariantFigures.__dataclass_fields__):
        value = getattr(figures, name)
        if isinstance(value, Histogram):
            value.add(float(number))
        elif name == "finished":
            value["stop"] = number
        else:
            setattr(figures, name, number + 1)
    copy = figures.copy()
    assert copy == figures
    figures.ttft.add(1.0)
    figures.finished["stop"] += 1
    assert copy.ttft != figures.ttft
    assert copy.finished != figures.finished
