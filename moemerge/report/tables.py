"""What a table of a report is, and what of it is wanted. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from moemerge.report.contents import Report

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a view is wanted: one layer, one variant, so many of the worst."""

    layer: int | None = None
    variant: str | None = None
    top: int = 10

    def layers(self, report: Report) -> Sequence[int]:
        """The chosen one, or all."""
        return report.layers if self.layer is None else (self.layer,)

    def variants(self, report: Report) -> Sequence[str]:
        """The chosen one, or all."""
        return report.variants if self.variant is None else (self.variant,)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A table.

    Attributes:
        note: What its numbers are, in a sentence.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def records(self) -> list[dict[str, Cell]]:
        """Rows by column, for machines."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]
