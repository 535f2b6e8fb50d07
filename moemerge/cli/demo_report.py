"""How the demonstration looks in a terminal."""

import textwrap

import typer

from moemerge.checkpoint.sizes import format_size
from moemerge.cli.tables import print_table
from moemerge.evaluation.demo import SHOWN, DemoReport, System


def print_report(report: DemoReport) -> None:
    """Similarity, bytes, perplexity, answers and swaps."""
    rows = [
        [index, layer["same_slot_median"], layer["same_slot_max"], layer["other_slot_median"]]
        for index, layer in report.similarity.items()
    ]
    columns = ["layer", "same slot, median", "same slot, worst", "other slots, median"]
    print_table("How far apart the fine-tunes' experts are (relative L2)", columns, rows)
    typer.echo()
    print_table(
        "Perplexity of every variant on the second half of its own text; share of the fine-tuning gain kept",
        ["system", "experts", "ratio", *report.variants, "kept", "worst"],
        [_system_row(system, report.variants) for system in report.systems],
    )
    typer.echo()
    typer.echo(f"Answers from one bundle, {report.bundle}, switching variants in between:")
    for swap in report.swaps:
        prompt, answer = report.answers[swap.variant]
        typer.echo(
            f"\n  {swap.variant}  ({format_size(swap.moved_bytes)} moved in {1000 * swap.seconds:.1f} ms)"
        )
        quoted = f"{prompt}|{answer}"
        typer.echo(textwrap.indent(quoted.rstrip(), "  > ", lambda line: True))
    _print_verdict(report)


def _print_verdict(report: DemoReport) -> None:
    """What the table comes to."""
    separate = len(report.variants) * report.variant_bytes
    merged = next(system for system in report.systems if system.label == SHOWN)
    typer.echo(
        f"\n{len(report.variants)} models in {merged.ratio:.2f} x the expert bytes of one "
        f"({format_size(merged.expert_bytes)} instead of {format_size(separate)}), "
        f"with {_kept(merged)[0]} of what fine-tuning gained.\n"
        f"Half of each text decided, the other half was measured. Took {report.seconds:.0f} s. Try:\n"
        f'  moemerge run {report.bundle} -v {report.variants[-1]} "Q: 17 + 25"\n'
        f"  moemerge show {report.bundle}"
    )


def _system_row(system: System, variants: list[str]) -> list[object]:
    perplexities = [f"{system.perplexity[name]:.3f}" for name in variants]
    return [
        system.label,
        format_size(system.expert_bytes),
        f"{system.ratio:.2f}",
        *perplexities,
        *_kept(system),
    ]


def _kept(system: System) -> tuple[str, str]:
    """Mean over the variants, and the worst."""
    gains = [gain for gain in system.gain.values() if gain is not None]
    return (f"{sum(gains) / len(gains):.3f}", f"{min(gains):.3f}") if gains else ("-", "-")
