"""Figures are counted where they belong, and copies stay as they were."""

from collections import Counter

from moemerge.runner.metrics import (
    LATENCY_BOUNDS_S,
    Histogram,
    Snapshot,
    StepFigures,
    VariantFigures,
    VariantState,
    add_snapshots,
)


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


def test_snapshots_of_several_engines_add_up():
    def snapshot(state, number):
        figures = VariantFigures(submitted=number, finished=Counter(stop=number), swap_seconds=0.5)
        figures.ttft.add(0.02)
        variant = VariantState(figures=figures, state=state, pinned=False, waiting=number, running=1)
        return Snapshot(
            variants={"code": variant},
            steps=StepFigures(steps=number, tokens=10),
            blocks_used=number,
            blocks_total=100,
            block_tokens=16,
            pool_bytes=7,
            resident_bytes=5,
            shared_bytes=3,
            expert_hits=2,
            expert_misses=1,
        )

    total = add_snapshots([snapshot("absent", 1), snapshot("resident", 2)])
    variant = total.variants["code"]
    assert (variant.state, variant.waiting, variant.running) == ("resident", 3, 2)
    assert variant.figures.finished == Counter(stop=3)
    assert sum(variant.figures.ttft.counts) == 2
    assert (total.steps.steps, total.steps.tokens) == (3, 20)
    assert (total.blocks_used, total.blocks_total, total.block_tokens) == (3, 200, 16)
