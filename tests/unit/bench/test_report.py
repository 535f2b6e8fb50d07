import pytest

from moemerge.bench.machine import Load, Memory
from moemerge.bench.metrics import Latencies, Spread
from moemerge.bench.plot import check_plot, draw_plot
from moemerge.bench.report import (
    Claim,
    OutputCheck,
    Report,
    RequestFigures,
    Run,
    read_report,
    write_report,
)
from moemerge.bench.tables import claim_rows, markdown, rows, summarise, write_results
from moemerge.bench.worker import Counts
from moemerge.errors import InvalidRecipe, NotFound


def run(system, load, number, turnaround_s, **changes):
    spread = Spread(turnaround_s, turnaround_s, 2 * turnaround_s)
    ttft = Spread(turnaround_s / 4, turnaround_s / 4, turnaround_s / 2)
    values = {
        "system": system,
        "load": load,
        "round": number,
        "output_tokens_per_s": 10 / turnaround_s,
        "latencies": Latencies(turnaround=spread, ttft=ttft, tpot=None, itl=None),
        "counts": Counts(swaps=number, swap_bytes=10**6),
        "memory": Memory(2 * 10**9, 10**9),
        "machine": Load(0.01, 0.0),
        "requests": [
            RequestFigures(variant="a", turnaround_s=t, ttft_s=t / 4, tpot_s=None)
            for t in (turnaround_s / 2, turnaround_s * 3 / 2)
        ],
    }
    return Run(**{**values, **changes})


@pytest.fixture
def report():
    runs = [run("mixed", load, n, load * (n + 1)) for load in (0.4, 0.8) for n in range(3)]
    runs += [run("fcfs", 0.4, n, 4.0, unfinished=1, worst_slowdown=3.0) for n in range(3)]
    runs += [Run(system="fcfs", load=0.8, round=n, failure="Traceback\nOSError: gone") for n in range(3)]
    claim = {"unit": " x", "bar": 2.0, "interval": (1.0, 3.0), "detail": "why"}
    return Report(
        is_valid=True,
        started="2026-11-24T00:00:00+00:00",
        machine={"processor": "one", "cores": 2},
        subject={"name": "tiny", "variants": 3},
        workload={"workload": "poisson", "requests": 2},
        seed=0,
        rounds=3,
        capacity_requests_per_s=2.5,
        check=OutputCheck(
            reference="alone", num_requests=4, off_share={"mixed": 0.0}, equal_share={"mixed": 1.0}
        ),
        runs=runs,
        claims=[
            Claim(name="fast", is_at_least=True, measured=2.5, **claim),
            Claim(name="small", is_at_least=False, measured=2.5, **claim),
            Claim(name="gone", is_at_least=False, measured=None, **claim),
        ],
        notes=["mind this"],
    )


def test_a_report_survives_a_round_trip(report, tmp_path):
    write_report(report, tmp_path / "result.json")
    assert read_report(tmp_path / "result.json") == report


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(NotFound):
        read_report(tmp_path / "result.json")
    (tmp_path / "result.json").write_text('{"schema": "moemerge/bench@1"}')
    with pytest.raises(InvalidRecipe, match="not a benchmark result"):
        read_report(tmp_path / "result.json")


def test_a_summary_is_the_median_over_rounds(report):
    found = summarise(report, "mixed", 0.4)
    assert found.turnaround == Spread(0.8, 0.8, 1.6)
    assert found.ttft == Spread(0.2, 0.2, 0.4)
    assert found.output_tokens_per_s == 12.5
    assert found.swaps == 1
    assert found.turnaround_interval is not None
    low, high = found.turnaround_interval
    assert 0.2 <= low < 0.8 < high <= 1.8


def test_tables_name_systems_bounds_and_failures(report):
    assert [row[0] for row in rows(report, 0.4)] == ["mixed", "fcfs"]
    assert rows(report, 0.4)[0][1:3] == ["800 ms", "1.6 s"]
    assert rows(report, 0.4)[1][1] == "≥4 s"
    assert rows(report, 0.8)[1][1] == "failed: OSError: gone"
    assert [row[-1] for row in claim_rows(report.claims)] == ["met", "missed", "not measured"]


def test_markdown_tells_on_what_it_was_measured(report):
    text = markdown(report)
    assert "processor one, cores 2" in text
    assert "| mixed | 800 ms |" in text
    assert "| fast | at least 2 x | 2.5 x | 1 to 3 | met |" in text
    assert "- mind this" in text
    assert "Not valid" not in text
    assert "Not valid" in markdown(report.model_copy(update={"is_valid": False}))


def test_results_are_written_together(report, tmp_path):
    write_results(report, tmp_path / "out")
    assert read_report(tmp_path / "out" / "result.json") == report
    assert (tmp_path / "out" / "tables.md").read_text() == markdown(report)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_drawn(report, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"load.{ending}"
    check_plot(path)
    draw_plot(report, path)
    assert path.stat().st_size > 1000


def test_one_point_each_is_drawn_too(report, tmp_path):
    pytest.importorskip("matplotlib")
    single = report.model_copy(update={"runs": [run("mixed", None, n, 1.0) for n in range(3)]})
    draw_plot(single, tmp_path / "burst.svg")
    assert "mixed" in (tmp_path / "burst.svg").read_text()


def test_unknown_plot_formats_are_refused(tmp_path):
    with pytest.raises(InvalidRecipe, match=r"\.png, \.svg"):
        check_plot(tmp_path / "load.bmp")
