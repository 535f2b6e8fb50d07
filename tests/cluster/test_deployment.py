"""Bundles served by a cluster, over HTTP: the answers of one engine, whatever happens to replicas."""

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.text.variants import VariantText
from tests.cluster.waiting import wait_until
from tests.e2e.program import run_program

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini"
NAMES = ("code", "scripture", "sums")


def build(folder, names):
    merge(open_variants({n: FolderRef(MINI / n) for n in names}), folder / "mini.moe", options_of("exact"))
    return folder / "mini.moe"


class Client:
    """Speaks to a deployment."""

    def __init__(self, base):
        self._base = base

    def get(self, path):
        with urllib.request.urlopen(f"{self._base}/{path}", timeout=60) as answer:
            return answer.read().decode()

    def complete(self, model, **more):
        """Status and body of a completion."""
        try:
            with self.open(model, **more) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stream(self, model, on_first, **more):
        """All events of a streamed completion."""
        events = []
        with self.open(model, stream=True, **more) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line.removeprefix(b"data: ")))
                    on_first()
        return events

    def beside(self, name):
        """Of another bundle."""
        return Client(f"{self._base.rpartition('/')[0]}/{name}")

    def open(self, model, **more):
        body = {"model": model, "prompt": "1 + 1 =", "temperature": 0, "max_tokens": 8, **more}
        request = urllib.request.Request(
            f"{self._base}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)


@pytest.fixture(scope="module")
def options():
    from moemerge.distributed.deployment import DeployOptions

    engine = EngineOptions(resident="2", max_batch=2)
    return DeployOptions(min_replicas=2, max_replicas=2, engine=engine, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return build(tmp_path_factory.mktemp("first"), NAMES)


@pytest.fixture(scope="module")
def client(executor, bundle, options):
    from ray import serve

    from moemerge.distributed import deployment

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deployment.start_serving("127.0.0.1", port)
    name = deployment.deploy(executor.cluster, bundle, options)
    yield Client(f"http://127.0.0.1:{port}/{name}")
    serve.shutdown()


def test_answers_are_those_of_one_engine(client, bundle):
    with closing(Engine(open_bundle(bundle))) as engine:
        for name in NAMES:
            text = VariantText(engine.bundle, name)
            ids = text.tokenizer.encode("1 + 1 =")
            tokens = engine.generate(name, ids, max_tokens=8, stop_ids=text.stop_ids)
            status, body = client.complete(name)
            assert status == 200
            assert body["choices"][0]["text"] == text.tokenizer.decode(list(tokens))


def test_errors_have_the_shape_of_the_api(client):
    status, body = client.complete("nobody")
    assert status == 404
    assert body["error"]["code"] == "model_not_found"
    status, body = client.complete("code", max_tokens=100_000)
    assert status == 400


def test_metrics_and_status_add_up_over_replicas(client, cluster):
    time.sleep(2)  # until the front door has seen the ends of requests before
    before = requests_of(client.get("metrics"))
    for name in NAMES * 2:
        client.complete(name)
    wait_until(lambda: requests_of(client.get("metrics")) == before + 6)
    done = run_program("status", "--address", cluster.address, "--json")
    assert done.code == 0, done.err
    replicas = done.envelope["data"]["replicas"]
    assert [row["bundle"] for row in replicas] == ["mini", "mini"]
    assert all(0 < len(row["resident"]) <= 2 for row in replicas)


def requests_of(metrics):
    return sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("moemerge_requests_total{")
    )


def test_lost_replica_fails_what_it_had_begun_and_nothing_else(client):
    from moemerge.distributed.deployment import states_of

    begun = [threading.Event() for _ in range(6)]
    results = {}

    def ask(number):
        results[number] = client.stream("code", begun[number].set, max_tokens=400, ignore_eos=True)

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        wait_until(lambda: sum(event.is_set() for event in begun) >= 2)
        victim = max(states_of("mini"), key=lambda state: state.queued_tokens)
        had_begun = [number for number, event in enumerate(begun) if event.is_set()]
        os.kill(victim.pid, signal.SIGKILL)
        for one in asked:
            one.result(timeout=120)
    failed = [number for number, events in results.items() if "error" in events[-1]]
    whole = [n for n, events in results.items() if finish_of(events) == "length"]
    assert failed
    assert whole
    assert sorted(failed + whole) == list(range(6))
    assert set(failed) <= {number for number in range(6) if results[number][:-1]}
    error = results[failed[0]][-1]["error"]
    assert error["type"] == "server_error"
    assert "lost" in error["message"]
    assert had_begun
    wait_until(lambda: len({s.pid for s in states_of("mini")} - {victim.pid}) == 2, seconds=120)
    assert client.complete("code")[0] == 200


def finish_of(events):
    return next((e["choices"][0]["finish_reason"] for e in reversed(events) if e.get("choices")), None)


def test_bundle_is_replaced_without_losing_a_request(client, executor, options, tmp_path):
    from moemerge.distributed import deployment

    before = {state.replica_id for state in deployment.states_of("mini")}
    other = build(tmp_path, NAMES[1:])
    statuses, over = [], threading.Event()

    def ask():
        while not over.is_set():
            statuses.append(client.complete("sums")[0])

    thread = threading.Thread(target=ask)
    thread.start()
    deployment.deploy(executor.cluster, other, options)
    time.sleep(1)
    over.set()
    thread.join()
    assert set(statuses) == {200}
    assert not before & {state.replica_id for state in deployment.states_of("mini")}
    assert client.complete("code")[0] == 404
    assert client.complete("scripture")[0] == 200


def test_undeployed_bundle_is_gone_and_unknown_names_change_nothing(client, cluster):
    from moemerge.distributed import deployment

    wrong = run_program("undeploy", "mini", "nobody", "--address", cluster.address)
    assert wrong.code == 5
    assert "no bundle 'nobody' is served here; there are: mini" in wrong.err
    assert client.complete("scripture")[0] == 200
    done = run_program("undeploy", "mini", "--address", cluster.address, "--json")
    assert done.code == 0, done.err
    assert done.envelope["data"] == {"bundles": ["mini"]}
    assert deployment.served_names() == []
    with pytest.raises(urllib.error.HTTPError, match="404"):
        client.get("v1/models")


def test_replicas_follow_queued_tokens(client, executor, tmp_path, monkeypatch):
    """Last in this file: by then the processors of the others are free."""
    from moemerge.distributed import deployment

    monkeypatch.setattr(deployment, "GROW_AFTER_S", 1.0)
    monkeypatch.setattr(deployment, "SHRINK_AFTER_S", 2.0)
    bundle = build(tmp_path, NAMES[:1]).rename(tmp_path / "growing.moe")
    options = deployment.DeployOptions(
        min_replicas=1, max_replicas=2, engine=EngineOptions(max_batch=2), threads=1
    )
    name = deployment.deploy(executor.cluster, bundle, options)

    def count():
        return len(deployment.states_of(name))

    assert count() == 1
    busy = client.beside(name)
    # More tokens than one replica is to have waiting.
    with ThreadPoolExecutor(80) as pool:
        asked = [pool.submit(busy.complete, "code", max_tokens=480, ignore_eos=True) for _ in range(80)]
        wait_until(lambda: count() == 2, seconds=120)
        assert {answer.result()[0] for answer in asked} == {200}
    wait_until(lambda: count() == 1, seconds=120)
    deployment.withdraw([name])
