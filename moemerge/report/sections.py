"""What stands on the page, in order. Pure."""

from collections.abc import Callable, Sequence

from moemerge.report.contents import Report
from moemerge.report.measured_sections import depth, parts, routing
from moemerge.report.section import Section
from moemerge.report.stored_sections import budget, kept, quality, worst

_BUILDERS: Sequence[Callable[[Report], Section]] = (depth, parts, kept, budget, routing, quality, worst)


def sections(report: Report) -> list[Section]:
    """All that there is something in."""
    found = [build(report) for build in _BUILDERS]
    return [section for section in found if section.charts or section.tables]
