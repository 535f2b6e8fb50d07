"""How an evaluation looks in a terminal."""

from typing import Any

import typer

from moemerge.cli.tables import print_table
from moemerge.evaluation.evaluating import Evaluation, VariantFigures

_COLUMNS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "base_accuracy": "accuracy, base",
    "original_accuracy": "accuracy, original",
    "gain": "gain recovered",
    "kl": "KL, nats",
    "agreement": "agreement",
}


def print_evaluation(found: Evaluation) -> None:
    """A line per variant, the mean and the worst; routing by depth; what lm-eval says."""
    shown = [
        name for name in _COLUMNS if any(getattr(one, name) is not None for one in found.variants.values())
    ]
    rows = [[name, one.tokens, *_figures(one, shown)] for name, one in found.variants.items()]
    if len(found.variants) > 1:
        rows.append(["mean", "", *(found.mean(name) for name in shown)])
        rows.append([f"worst: {found.worst}", "", *_figures(found.variants[found.worst], shown)])
    columns = ["variant", "tokens", *(_COLUMNS[name] for name in shown)]
    print_table(f"{found.subject} on the variants' own text", columns, rows)
    if routing := found.routing_by_depth():
        typer.echo()
        own = [one.routing or {} for one in found.variants.values() if one.routing]
        names = [name for name, one in found.variants.items() if one.routing]
        table = [[layer, share, *(by_layer[layer] for by_layer in own)] for layer, share in routing.items()]
        print_table("Share of slots that both routers chose, by layer", ["layer", "mean", *names], table)
    if found.lm_eval:
        typer.echo()
        results: list[list[object]] = [
            [row.variant, row.task, row.metric, row.base, row.original, row.bundle, row.kept]
            for row in found.lm_eval
        ]
        columns = ["variant", "task", "metric", "base", "original", "bundle", "kept"]
        print_table("Results of lm-evaluation-harness", columns, results)


def _figures(one: VariantFigures, names: list[str]) -> list[Any]:
    return [getattr(one, name) for name in names]
