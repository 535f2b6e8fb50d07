"""A snapshot as Prometheus reads it."""

from moemerge.runner.metrics import LATENCY_BOUNDS_S, Histogram
from moemerge.server.metrics import _buckets


def test_buckets_are_cumulative_and_end_with_all():
    histogram = Histogram()
    for value in (0.0001, 0.003, 0.003, 1000.0):
        histogram.add(value)
    buckets = _buckets(histogram)
    assert len(buckets) == len(LATENCY_BOUNDS_S) + 1
    assert buckets[0] == ("0.001", 1.0)
    assert dict(buckets)["0.005"] == 3.0
    assert buckets[-1] == ("+Inf", 4.0)
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
