import os
import subprocess
import sys

import pytest

from moemerge.bench import machine
from moemerge.bench.machine import Load, LoadMeter, Watch, describe_machine, measure_memory, usable_cores
from moemerge.errors import Busy

CALM, LOUD = Load(0.0, 0.0), Load(0.5, 0.0)


def test_load_has_two_limits():
    assert Load(machine.MAX_OTHERS, machine.MAX_STEAL).is_calm
    assert not Load(machine.MAX_OTHERS + 0.01, 0.0).is_calm
    assert not Load(0.0, machine.MAX_STEAL + 0.01).is_calm


def test_own_work_is_not_the_work_of_others(monkeypatch):
    # Two processors for ten seconds: 12 s in use, 9 of them ours; 1 s taken by the host.
    clocks = iter([(100.0, 5.0, 400.0, 50.0), (112.0, 6.0, 420.0, 59.0)])
    monkeypatch.setattr(machine, "_clocks", lambda: next(clocks))
    assert LoadMeter.start().stop() == Load(others=3 / 20, steal=1 / 20)


def test_work_of_children_is_our_own():
    before = machine._own_seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert machine._own_seconds() - before >= 0.25


def loads(monkeypatch, *values):
    """A machine with these loads, one after the other."""
    found = iter(values)
    monkeypatch.setattr(LoadMeter, "stop", lambda self: next(found))
    monkeypatch.setattr(machine, "_PAUSE_S", 0.0)


def test_a_disturbed_measurement_is_repeated(monkeypatch):
    loads(monkeypatch, LOUD, CALM)
    said = []
    watch = Watch(said.append, allow_busy=False)
    results = iter([1, 2])
    assert watch.measure(lambda: next(results)) == (2, CALM, 1)
    assert watch.is_calm
    assert "other programs used 50%" in said[0]


def test_a_busy_machine_is_refused(monkeypatch):
    loads(monkeypatch, LOUD, LOUD, LOUD)
    with pytest.raises(Busy, match="--allow-busy"):
        Watch(lambda text: None, allow_busy=False).measure(lambda: 1)


def test_figures_of_a_busy_machine_are_marked(monkeypatch):
    loads(monkeypatch, LOUD, CALM)
    watch = Watch(lambda text: None, allow_busy=True)
    assert watch.measure(lambda: 1) == (1, LOUD, 0)
    watch.measure(lambda: 1)
    assert not watch.is_calm


def test_memory_of_this_process():
    memory = measure_memory([os.getpid()])
    assert memory.peak_rss_bytes > 10 * 2**20
    assert 0 < memory.pss_bytes <= memory.peak_rss_bytes


def test_the_machine_is_described():
    found = describe_machine(2, "cpu")
    assert found["cores"] == os.cpu_count()
    assert found["threads"] == 2
    assert found["commit"]
    assert usable_cores()
