"""A part of the page, and the kinds of charts that several parts have. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moemerge.report.charts import Grid, Lines
from moemerge.report.contents import Matrix, Report
from moemerge.report.tables import Choice, View
from moemerge.report.views import VIEWS

_WORST = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: Its anchor.
        about: What one looks at, in a sentence or two.
    """

    name: str
    title: str
    about: str
    charts: Sequence[Lines | Grid] = ()
    tables: Sequence[View] = field(default_factory=tuple)


def by_layer(
    report: Report, name: str, title: str, y_title: str, values: Mapping[int, Mapping[str, float]]
) -> Lines:
    """A line a name, from values by layer and name."""
    names = dict.fromkeys(key for of_layer in values.values() for key in of_layer)
    series = {key: [values.get(index, {}).get(key) for index in report.layers] for key in names}
    return Lines(
        name=name,
        title=title,
        x_title="layer",
        y_title=y_title,
        x=list(report.layers),
        series=series,
        is_whole=True,
    )


def over_experts(
    report: Report,
    name: str,
    title: str,
    values: Matrix,
    unit: str,
    notes: Sequence[Sequence[int]] = (),
    words: Sequence[str] = (),
) -> Grid:
    """A cell for each layer and expert of a variant; arguments as in `Grid`."""
    known = values[~np.isnan(values)]
    return Grid(
        name=name,
        title=title,
        x_title="variant and slot",
        y_title="layer",
        rows=[str(index) for index in report.layers],
        columns=[f"{variant}:{slot}" for variant in report.variants for slot in range(report.num_slots)],
        values=values,
        unit=unit,
        top=float(known.max()) if known.size else 1.0,
        notes=notes,
        words=words,
        groups=report.variants,
    )


def tables(report: Report, *names: str) -> list[View]:
    """Those of these views that have something to show."""
    found = (VIEWS[name](report, Choice(top=_WORST)) for name in names)
    return [view for view in found if view is not None and view.rows]
