"""Units of work in this process: one by one, and side by side."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from moemerge.errors import DamagedInput
from moemerge.execution import Local, Work
from moemerge.progress import Silent

MANY = 2**40
"""Bytes of memory, more than any of these units says that it takes."""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def works(*functions, is_parallel=True, memory_bytes=1):
    return [
        Work(
            title=str(number),
            run=function,
            reads=frozenset(),
            folder=Path("/"),
            memory_bytes=memory_bytes,
            is_parallel=is_parallel,
        )
        for number, function in enumerate(functions)
    ]


def threads_of_each(given, max_ram=MANY):
    """The threads that units ran on, and how many of torch's each had."""

    def look(progress):
        time.sleep(0.05)
        return threading.get_ident(), torch.get_num_threads()

    found = dict(Local(max_ram).map(works(*[look] * 4, **given), Silent()))
    assert sorted(found) == [0, 1, 2, 3]
    return {ident for ident, _ in found.values()}, {own for _, own in found.values()}


@pytest.mark.parametrize(("each", "side_by_side"), [(1, 2), (50, 2), (60, 1), (600, 1)])
def test_parallel_units_have_a_thread_each_as_memory_allows(each, side_by_side, two_threads):
    idents, own = threads_of_each({"memory_bytes": each}, max_ram=100)
    assert len(idents) == side_by_side
    assert own == {1}


def test_others_come_one_by_one_with_all_threads(two_threads):
    idents, own = threads_of_each({"is_parallel": False})
    assert idents == {threading.get_ident()}
    assert own == {2}


def test_advances_come_from_one_thread_at_a_time(two_threads):
    class Counted(Silent):
        total = 0

        def advance(self, num_bytes):
            before = self.total
            time.sleep(1e-4)
            self.total = before + num_bytes

    def advance(progress):
        for _ in range(50):
            progress.advance(1)

    counted = Counted()
    list(Local(MANY).map(works(*[advance] * 4), counted))
    assert counted.total == 200


def work_until(stopped, begun, progress, tells=False):
    """Steps without end."""
    begun.set()
    try:
        while True:
            time.sleep(1e-3)
            if tells:
                progress.advance(1)
    finally:
        stopped.set()


def test_a_failure_ends_what_runs_beside_it(two_threads):
    stopped, begun = threading.Event(), threading.Event()
    never = []

    def fail(progress):
        assert begun.wait(10)
        raise DamagedInput("a unit fails")

    units = works(partial(work_until, stopped, begun, tells=True), fail, lambda progress: never.append(1))
    with pytest.raises(DamagedInput, match="a unit fails"):
        list(Local(MANY).map(units, Silent()))
    assert stopped.is_set()
    assert not never


def test_whoever_stops_taking_results_ends_what_runs(two_threads):
    """As Ctrl-C does in the thread that takes them."""
    stopped, begun = threading.Event(), threading.Event()
    results = Local(MANY).map(works(partial(work_until, stopped, begun), lambda progress: "done"), Silent())
    assert next(results) == (1, "done")
    assert begun.wait(10)
    results.close()
    assert stopped.is_set()
