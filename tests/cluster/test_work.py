"""Work on a cluster: the local engine's bytes, whatever happens to nodes and driver."""

import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from moemerge.calibration import spans
from moemerge.calibration.calibrating import calibrate
from moemerge.calibration.passes import CalibrationOptions
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.layers import write_similarity
from moemerge.consolidation.measured import TextStatistics
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.plan import dump_plan
from moemerge.consolidation.planning import plan_variants
from moemerge.consolidation.task import options_of
from moemerge.errors import Busy, NotEnoughRoom, NotFound
from moemerge.execution import Work
from moemerge.progress import Silent
from moemerge.refs import FolderRef
from tests.cluster.waiting import wait_until
from tests.e2e.program import call_program, run_program, start_slow_program, tree
from tests.factories import write_siblings

NAMES = ("code", "law", "sums")
TASKS = [("1.5x", None), ("0.6x", "measured")]


class Counted(Silent):
    """Progress, added up."""

    def __init__(self):
        self.done = self.total = 0

    def start(self, title, total_bytes):
        self.total += total_bytes

    def advance(self, num_bytes):
        self.done += num_bytes


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_siblings(folder, names=NAMES, settings={"hidden_size": 64, "expert_size": 96, "num_layers": 6})
    return folder


@pytest.fixture(scope="module")
def variants(family):
    return open_variants({name: FolderRef(family / name) for name in NAMES})


@pytest.fixture(scope="module", params=TASKS, ids=[policy or "default" for _, policy in TASKS])
def task(request):
    budget, policy = request.param
    return options_of(budget, policy, within=False)


@pytest.fixture(scope="module")
def whole(variants, task, tmp_path_factory):
    """What the local engine makes of it."""
    target = tmp_path_factory.mktemp("whole") / "trio.moe"
    merge(variants, target, task)
    return tree(target)


def test_merge_gives_the_bytes_of_the_local_engine(executor, variants, task, whole, tmp_path):
    merge(variants, tmp_path / "trio.moe", task, executor=executor)
    assert tree(tmp_path / "trio.moe") == whole


def test_similarity_and_plan_are_those_of_the_local_engine(executor, variants, tmp_path):
    here, there = Counted(), Counted()
    write_similarity(variants, tmp_path / "here", here)
    write_similarity(variants, tmp_path / "there", there, executor=executor)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert (there.done, there.total) == (here.done, here.total)
    options = options_of("0.6x", "measured", within=False)
    made = plan_variants(variants, options, executor=executor, beside=tmp_path / "plan.json")
    assert dump_plan(made) == dump_plan(plan_variants(variants, options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


SETTINGS = CalibrationOptions(num_tokens=1024, window=32, reservoir=64)


def write_texts(folder):
    """A text for each variant."""
    paths = {name: folder / f"{name}.txt" for name in NAMES}
    for number, path in enumerate(paths.values(), start=1):
        path.write_text(" ".join(f"{number * count} is {count} of {number}." for count in range(60)))
    return paths


def test_calibration_and_repair_are_those_of_the_local_engine(executor, variants, tmp_path):
    paths = write_texts(tmp_path)
    options = options_of("0.6x", "measured", within=False)
    made = {}
    for place, engine in (("here", None), ("there", executor)):
        folder = tmp_path / place
        done = calibrate(variants, paths, folder / "calibration", SETTINGS, executor=engine)
        statistics = TextStatistics(done.calibration, NAMES)
        merged = merge(variants, folder / "trio.moe", options, statistics=statistics, executor=engine)
        made[place] = tree(folder)
    assert made["there"] == made["here"]
    assert all("kl" in entry.damage for entry in merged.manifest.variants.values())


def wait_for(folder, name, progress):
    """Leave the id of one's process, then wait for a file."""
    (folder / f"began-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while not (folder / name).exists():
        assert time.monotonic() < deadline, "nobody said go"
        time.sleep(0.02)
    return os.getpid()


def work_of(folder, run, memory_bytes=2**20):
    return Work(title="test", run=run, reads=frozenset(), folder=folder, memory_bytes=memory_bytes)


def test_unit_whose_node_is_killed_is_done_on_another(cluster, executor, tmp_path):
    import psutil

    results = []
    works = [work_of(tmp_path, partial(wait_for, tmp_path, "go"))]
    thread = threading.Thread(target=lambda: results.extend(executor.map(works, Silent())))
    thread.start()
    first = next(iter(wait_until(lambda: list(tmp_path.glob("began-*")))))
    raylet = psutil.Process(int(first.name.removeprefix("began-"))).parent().pid
    node = next(node for node in cluster.nodes if raylet_of(node) == raylet)
    cluster.kill(node)
    cluster.nodes.remove(node)
    wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2)
    (tmp_path / "go").touch()
    thread.join(60)
    cluster.nodes.append(cluster.add())
    assert [number for number, _ in results] == [0]
    assert f"began-{results[0][1]}" != first.name


def test_merge_survives_the_loss_of_a_node(cluster, executor, variants, tmp_path):
    options = options_of("0.6x", "measured", within=False)
    merge(variants, tmp_path / "whole.moe", options)
    target = tmp_path / "trio.moe"
    thread = threading.Thread(target=lambda: merge(variants, target, options, executor=executor))
    thread.start()
    journal = tmp_path / ".trio.moe.staging" / "journal.jsonl"
    wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) > 3)
    cluster.kill(cluster.nodes.pop())
    thread.join(120)
    cluster.nodes.append(cluster.add())
    assert tree(target) == tree(tmp_path / "whole.moe")


def test_calibration_in_spans_survives_the_loss_of_a_node(cluster, executor, variants, tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "SPAN_BYTES", 1)
    paths = write_texts(tmp_path)
    calibrate(variants, paths, tmp_path / "whole", SETTINGS)
    out = tmp_path / "out"
    thread = threading.Thread(target=lambda: calibrate(variants, paths, out, SETTINGS, executor=executor))
    thread.start()
    wait_until(lambda: list(out.glob(".*.building/hidden-*")))
    cluster.kill(cluster.nodes.pop())
    thread.join(120)
    cluster.nodes.append(cluster.add())
    assert tree(out) == tree(tmp_path / "whole")


def test_killed_driver_continues_and_two_are_refused(cluster, family, variants, tmp_path):
    options = options_of("1.5x", None, within=False)
    merge(variants, tmp_path / "whole.moe", options)
    target = tmp_path / "trio.moe"
    words = ["merge", *(f"{name}={family / name}" for name in NAMES), "--budget", "1.5x", "-o", target]
    words += ["--engine", "ray", "--address", cluster.address, "--json"]
    driver = start_slow_program(*words)
    journal = tmp_path / ".trio.moe.staging" / "journal.jsonl"
    try:
        wait_until(lambda: journal.exists() and '"pool ' in journal.read_text())
        with pytest.raises(Busy):
            merge(variants, target, options)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    assert not target.exists()
    again = run_program(*words)
    assert again.code == 0, again.err
    assert 0 < again.envelope["data"]["resumed_layers"] <= 6
    assert tree(target) == tree(tmp_path / "whole.moe")


def test_nodes_with_other_versions_are_refused_by_name(cluster, family, tmp_path):
    fake = tmp_path / "other"
    (fake / "moemerge").mkdir(parents=True)
    (fake / "moemerge" / "__init__.py").write_text('__version__ = "8.8.8"\n')
    (fake / "torch-9.9.9.dist-info").mkdir(parents=True)
    (fake / "torch-9.9.9.dist-info" / "METADATA").write_text("Name: torch\nVersion: 9.9.9\n")
    # Ray itself would not let a node of another Python join; what the node answers is told by this.
    (fake / "sitecustomize.py").write_text('import platform\nplatform.python_version = lambda: "3.99.9"\n')
    path = os.pathsep.join(filter(None, (str(fake), os.environ.get("PYTHONPATH"))))
    other = cluster.add(env_vars={"PYTHONPATH": path})
    words = ["similarity", *(f"{name}={family / name}" for name in NAMES), "-o", "out"]
    try:
        done = run_program(*words, "--engine", "ray", "--address", cluster.address, cwd=tmp_path)
    finally:
        cluster.kill(other)
    assert done.code == 4, done.err
    assert len(re.findall(rf"  - node .*{other.node_id[:8]}", done.err)) == done.err.count("  - node") == 3
    assert "moemerge 8.8.8" in done.err
    assert "torch 9.9.9" in done.err
    assert "Python 3.99.9" in done.err
    assert not (tmp_path / "out").exists()


def test_input_that_a_node_does_not_see_is_named_before_work_starts(executor, family, tmp_path):
    descriptor = os.open(family, os.O_RDONLY)
    try:
        # A path that leads nowhere but in this process.
        own = Path(f"/proc/self/fd/{descriptor}")
        variants = open_variants({name: FolderRef(own / name) for name in NAMES})
        with pytest.raises(NotFound, match=rf"node .*: input path not visible: {own}/code/model") as caught:
            write_similarity(variants, tmp_path / "out", executor=executor)
    finally:
        os.close(descriptor)
    assert len(caught.value.findings) == 3
    assert not (tmp_path / "out").exists()


def test_work_larger_than_every_node_is_refused(executor, tmp_path):
    works = [work_of(tmp_path, partial(wait_for, tmp_path, "go"), memory_bytes=2**40)]
    with pytest.raises(
        NotEnoughRoom, match=r"test takes 1.1 TB of memory, the largest node .* offers 4.29 GB"
    ):
        list(executor.map(works, Silent()))


def test_full_object_store_is_in_nobodys_way(executor, variants, tmp_path):
    import ray

    # What is held here fills the store that this process shares with a node.
    held = [ray.put(np.zeros(2**23, dtype=np.uint8)) for _ in range(9)]
    write_similarity(variants, tmp_path / "there", executor=executor)
    write_similarity(variants, tmp_path / "here")
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert len(held) == 9


@pytest.mark.parametrize("listens", [False, True], ids=["nothing", "something-else"])
def test_address_without_a_cluster_is_told_at_once(listens, tmp_path):
    import socket

    write_siblings(tmp_path, names=("code",))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen()
        port = listener.getsockname()[1]
        begin = time.monotonic()
        words = ["similarity", f"code={tmp_path / 'code'}", "-o", tmp_path / "out"]
        done = call_program(*words, "--engine", "ray", "--address", f"127.0.0.1:{port}")
    assert done.code == 6
    assert f"there is no Ray cluster at 127.0.0.1:{port}" in done.err
    assert time.monotonic() - begin < 20


def raylet_of(node):
    """Process id of a node's raylet."""
    (started,) = node.all_processes["raylet"]
    return started.process.pid
