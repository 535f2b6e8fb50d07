"""`moemerge bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.progress import show_progress
from moemerge.cli.tables import print_table
from moemerge.runner.pages import use_huge_pages

if TYPE_CHECKING:
    from moemerge.bench.report import Report


def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle to serve; without one, see --model.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="SHAPE", help="Generate mix-S, mix-M, mix-L or switch-base-8.")
    ] = "mix-S",
    variants: Annotated[
        int | None,
        typer.Option("--variants", min=1, help="How many; 4 generated, or all of a bundle."),
    ] = None,
    systems: Annotated[
        str, typer.Option("--systems", metavar="NAMES", help="all, or names with commas between.")
    ] = "all",
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            metavar="NAME|FILE",
            help="poisson, zipf, bursty, alternating, burst, or a trace file.",
        ),
    ] = "poisson",
    load: Annotated[
        list[float] | None,
        typer.Option("--load", metavar="SHARE", help="Of the capacity of one model; give it several times."),
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests", min=1, help="Of the trace; 64.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Of a prompt, or their median; 64.")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output-tokens", min=1, help="Of an answer, or their median; 32.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights and trace.")] = 0,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Repetitions; 3.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="All processors by default.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.", envvar="MOEMERGE_DEVICE")] = "cpu",
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1.0, help="Seconds after which a run is broken off.")
    ] = 300.0,
    claims: Annotated[
        str | None,
        typer.Option(
            "--claims", metavar="NAMES", help="Measure claims instead: all, or names with commas between."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round, few and short requests: to see that it works.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the systems' tokens, in float32 before.")
    ] = True,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Report from a busy machine too, marked as not valid.")
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="Keep generated models here; ~/.cache/moemerge/bench."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write result.json and tables.md there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw latencies against load: .png or .svg.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare ways to serve several variants, over one trace on one machine.

    Systems: single (all requests to one variant, the upper bound), mixed, grouped, fcfs (one resident
    variant, the paper's mode), partitioned (a process per variant with its share of cores and memory),
    full-swap (whole models loaded in turn), transformers. Weights are generated unless a bundle is given.

    Claims: mixed-over-single, mixed-over-grouped, resident-switch, cold-swap, ttft, turnaround,
    map-overhead, transformers-1, transformers-16, decode-bandwidth.

    Example: moemerge bench --model mix-M --load 0.4 --load 0.8 -o results --plot results/load.png
    """
    use_huge_pages()
    from moemerge.bench.benchmark import BenchOptions, run_benchmark
    from moemerge.bench.plot import check_plot, draw_plot
    from moemerge.bench.subjects import default_work
    from moemerge.bench.tables import write_results
    from moemerge.bundle.target import check_writable

    if plot:
        check_plot(plot)
    for target in [*([out / "result.json"] if out else []), *([plot] if plot else [])]:
        check_writable(target)
    options = BenchOptions(
        bundle=bundle,
        model=model,
        variants=variants,
        systems=None if systems == "all" else split_names(systems),
        claims=None if claims is None else () if claims == "all" else split_names(claims),
        workload=workload,
        loads=tuple(load or ()),
        requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        seed=seed,
        threads=threads,
        dtype=dtype,
        device=device,
        limit_s=time_limit,
        quick=quick,
        check=check,
        allow_busy=allow_busy,
        work=work or default_work(),
    )
    say = (lambda text: None) if quiet else hint
    with show_progress(quiet=quiet) as progress:
        report = run_benchmark(options, say, progress)
    if out:
        write_results(report, out)
    if plot:
        draw_plot(report, plot)
    if as_json:
        print_json("bench", report.model_dump(mode="json", by_alias=True))
    else:
        _print_tables(report)


def split_names(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _print_tables(report: "Report") -> None:
    from moemerge.bench.tables import CLAIM_COLUMNS, COLUMNS, LEGEND, claim_rows, rows, title_of

    for load in report.loads:
        print_table(title_of(load), COLUMNS, rows(report, load))
    if report.runs:
        typer.echo(LEGEND)
    if report.claims:
        print_table("Claims", CLAIM_COLUMNS, claim_rows(report.claims))
        for claim in report.claims:
            typer.echo(f"  {claim.name}: {claim.detail}")
    if report.check:
        typer.echo(str(report.check))
    for note in report.notes:
        typer.echo(f"note: {note}")
    if not report.is_valid:
        typer.echo(f"NOT VALID: {report.worst_load}")
