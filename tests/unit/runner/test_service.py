"""The engine on a thread of its own, with callers on others."""

import logging
import threading
import time

import pytest

from moemerge.errors import InvalidRecipe, NotFound, Overloaded, Stopping
from moemerge.runner.request import FinishReason, Request
from moemerge.runner.service import EngineService
from tests.bundles import NAMES, Answer, open_engine, run

PATIENCE_S = 20.0
LONG = 100


def request(name, variant="plain", max_tokens=5, prompt=(5, 9, 33, 12)):
    return Request(request_id=name, variant=variant, prompt_ids=prompt, max_tokens=max_tokens)


class Caller:
    """Who waits for one answer."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.threads: set[int] = set()
        self._has_begun = threading.Event()
        self._has_ended = threading.Event()

    def __call__(self, output):
        self.threads.add(threading.get_ident())
        self.answer.add(output)
        self._has_begun.set()
        if output.finish is not None:
            self._has_ended.set()

    def wait_for_token(self):
        assert self._has_begun.wait(PATIENCE_S), "waited in vain for a token"

    def wait(self):
        assert self._has_ended.wait(PATIENCE_S), "waited in vain for the end"
        return self.answer


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def serve(mixtral_bundle):
    """Starts a service; options of the engine under `engine`."""
    services = []

    def start(is_started=True, engine=None, **options):
        service = EngineService(open_engine(mixtral_bundle, **(engine or {})), **options)
        services.append(service)
        if is_started:
            service.start()
        return service

    yield start
    for service in services:
        service.stop()
        assert not service.is_alive


def submit(service, *args, **options):
    caller = Caller()
    service.submit(request(*args, **options), caller)
    return caller


@pytest.fixture(scope="module")
def alone(mixtral_bundle):
    engine = open_engine(mixtral_bundle)
    answers = {name: run(engine, request("a", name, LONG))[0].tokens for name in NAMES}
    engine.close()
    return answers


def test_many_threads_get_their_own_answers_on_the_engines_thread(serve, alone):
    service = serve()
    callers: dict[str, Caller] = {}

    def call(number):
        for turn in range(5):
            name = f"{number}-{turn}"
            callers[name] = submit(service, name, NAMES[(number + turn) % 4], max_tokens=3 + number)
            callers[name].wait()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(callers) == 40
    for name, caller in callers.items():
        number, turn = map(int, name.split("-"))
        assert caller.answer.tokens == alone[NAMES[(number + turn) % 4]][: 3 + number]
    (engine_thread,) = set.union(*(caller.threads for caller in callers.values()))
    assert engine_thread != threading.get_ident()
    assert service.num_unfinished == 0
    service.verify_integrity()
    wait_for(lambda: service.snapshot().blocks_used == 0)
    assert sum(v.figures.finished["length"] for v in service.snapshot().variants.values()) == 40


def test_a_cancelled_request_is_told_so(serve):
    service = serve()
    caller = submit(service, "a", max_tokens=LONG)
    caller.wait_for_token()
    service.cancel("a")
    service.cancel("nobody")
    answer = caller.wait()
    assert answer.finish is FinishReason.CANCELLED or len(answer.tokens) == LONG
    service.verify_integrity()


def test_what_cannot_be_is_refused_where_it_is_handed_in(serve):
    service = serve()
    caller = Caller()
    with pytest.raises(NotFound, match="no variant 'huge' is served"):
        service.submit(request("a", "huge"), caller)
    with pytest.raises(InvalidRecipe, match="token ids outside 0 to 63"):
        service.submit(request("a", prompt=(64,)), caller)
    with pytest.raises(InvalidRecipe, match="leave no room"):
        service.submit(request("a", prompt=(5,) * 128), caller)
    assert service.num_unfinished == 0
    first = submit(service, "a", max_tokens=LONG)
    with pytest.raises(InvalidRecipe, match="'a' is in use"):
        service.submit(request("a"), caller)
    first.wait()
    submit(service, "a").wait()


def test_what_only_the_engine_can_refuse_ends_with_an_error(switch_bundle):
    service = EngineService(open_engine(switch_bundle))
    service.start()
    caller = Caller()
    asked = Request(request_id="a", variant="plain", prompt_ids=(5,), max_tokens=3, num_prompt_logprobs=0)
    service.submit(asked, caller)
    assert "decoder-only" in caller.wait().error
    service.stop()


@pytest.mark.parametrize(
    ("options", "most", "scope"),
    [({"max_queue": 3}, 5, "server"), ({"max_queue": 9, "max_queue_per_variant": 1}, 3, "variant")],
)
def test_full_queues_refuse_until_something_has_ended(options, most, scope, serve):
    service = serve(engine={"max_batch": 2}, **options)
    blocked = Blocker(service)
    callers = [submit(service, str(number)) for number in range(most)]
    with pytest.raises(Overloaded, match="unfinished, the most allowed") as refusal:
        submit(service, "late")
    assert refusal.value.scope == scope
    assert 1 <= refusal.value.retry_after_s <= 60
    if scope == "variant":
        callers.append(submit(service, "other", "large"))
    blocked.release()
    for caller in callers:
        assert len(caller.wait().tokens) == 5
    submit(service, "late").wait()
    blocked = Blocker(service)  # now there is a pace by which to say when to come again
    callers = [submit(service, str(number)) for number in range(most)]
    with pytest.raises(Overloaded) as refusal:
        submit(service, "late")
    assert 1 <= refusal.value.retry_after_s <= 60
    blocked.release()
    for caller in callers:
        caller.wait()


class Blocker:
    """Keeps the engine's thread from its next step."""

    def __init__(self, service: EngineService) -> None:
        self._go_on = threading.Event()
        is_blocked = threading.Event()

        def block():
            is_blocked.set()
            assert self._go_on.wait(PATIENCE_S)

        self._thread = threading.Thread(target=service.call, args=(block,))
        self._thread.start()
        assert is_blocked.wait(PATIENCE_S)

    def release(self):
        self._go_on.set()
        self._thread.join(PATIENCE_S)


@pytest.mark.parametrize("bounds", [{"max_queue": -1}, {"max_queue_per_variant": -1}])
def test_bounds_below_zero_are_refused(bounds, serve):
    with pytest.raises(InvalidRecipe, match="bound is negative"):
        serve(**bounds)


# The end


def test_stopping_lets_answers_finish_and_takes_no_new_ones(serve, alone):
    service = serve()
    callers = [submit(service, name, name, max_tokens=40) for name in NAMES]
    service.stop(drain_s=PATIENCE_S)
    for name, caller in zip(NAMES, callers, strict=True):
        assert caller.wait().tokens == alone[name][:40]
    assert not service.is_alive
    assert not service.is_ready
    with pytest.raises(Stopping):
        submit(service, "late")
    with pytest.raises(Stopping):
        service.call(lambda: None)
    service.stop()


def test_stopping_at_once_tells_everybody(serve):
    service = serve(engine={"max_batch": 2})
    callers = [submit(service, str(number), max_tokens=LONG) for number in range(20)]
    service.stop(drain_s=0.0)
    reasons = {caller.wait().finish for caller in callers}
    assert FinishReason.CANCELLED in reasons
    assert reasons <= {FinishReason.CANCELLED, FinishReason.LENGTH}
    assert service.num_unfinished == 0


def test_whoever_is_not_refused_while_the_service_stops_is_told_the_end(serve):
    """However submitting and stopping overtake each other."""
    for _ in range(20):
        service = serve()
        callers: list[Caller] = []

        def call(thread, service=service, callers=callers):
            for number in range(50):
                try:
                    callers.append(submit(service, f"{thread}-{number}"))
                except Stopping:
                    return

        threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        service.stop()
        for thread in threads:
            thread.join(PATIENCE_S)
        for caller in callers:
            caller.wait()


def test_a_service_that_never_started_can_be_stopped(serve):
    service = serve(is_started=False)
    assert not service.is_ready
    service.stop(drain_s=1.0)
    with pytest.raises(Stopping):
        submit(service, "a")


# What goes wrong


def test_a_listener_that_fails_ends_its_own_request_only(serve, alone, caplog):
    service = serve()
    heard = []

    def fail(output):
        heard.append(output)
        raise ValueError("cannot hear")

    blocked = Blocker(service)
    service.submit(request("deaf", max_tokens=LONG), fail)
    caller = submit(service, "a", max_tokens=LONG)
    blocked.release()
    assert caller.wait().tokens == alone["plain"]
    wait_for(lambda: service.num_unfinished == 0)
    assert heard[-1].finish is FinishReason.CANCELLED
    assert len(heard) < 10
    assert "the listener of request deaf failed" in caplog.text
    service.verify_integrity()


def test_a_step_that_fails_ends_its_requests_and_the_service_lives_on(serve, alone, monkeypatch, caplog):
    service = serve()
    submit(service, "before").wait()
    compute, calls = service._engine._forward.compute, []

    def fail_once(work):
        calls.append(work)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return compute(work)

    monkeypatch.setattr(service._engine._forward, "compute", fail_once)
    blocked = Blocker(service)
    callers = [submit(service, name, name, max_tokens=LONG) for name in NAMES]
    blocked.release()
    reasons = [(caller.wait().finish, caller.answer.error) for caller in callers]
    assert (FinishReason.ERROR, "the engine failed: out of memory") in reasons
    assert "a step failed" in caplog.text
    assert "out of memory" in caplog.text, "the traceback is in the log"
    assert service.is_ready
    service.verify_integrity()
    assert submit(service, "after", max_tokens=LONG).wait().tokens == alone["plain"]


def test_when_the_thread_fails_everybody_is_told_and_nobody_is_taken(serve, monkeypatch, caplog):
    service = serve()
    blocked = Blocker(service)
    callers = [submit(service, name, name, max_tokens=LONG) for name in NAMES]
    monkeypatch.setattr(service._engine, "step", lambda: 1 / 0)
    blocked.release()
    for caller in callers:
        answer = caller.wait()
        assert (answer.finish, answer.error) == (FinishReason.ERROR, "the engine failed: division by zero")
    wait_for(lambda: not service.is_alive)
    assert not service.is_ready
    with pytest.raises(Stopping):
        submit(service, "late")
    assert any(record.levelno >= logging.ERROR for record in caplog.records)


def test_what_is_done_on_the_engines_thread_raises_where_it_was_asked_for(serve):
    service = serve()
    assert service.call(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        service.call(lambda: 1 / 0)
    with pytest.raises(NotFound, match="huge"):
        service.add_variant("huge")
    assert service.is_ready


# Variants


def test_variants_come_and_go_under_traffic(serve, alone):
    service = serve(engine={"resident": "2", "min_hold_s": 0.0, "patience_s": 0.0})
    callers = {name: submit(service, name, name, max_tokens=LONG) for name in NAMES}
    service.remove_variant("odd")
    assert list(service.variants) == ["plain", "large", "twin"]
    with pytest.raises(NotFound):
        submit(service, "late", "odd")
    answer = callers.pop("odd").wait()
    assert answer.error == "variant odd was removed" or answer.tokens == alone["odd"]
    service.add_variant("odd")
    assert "odd" in service.variants
    for name, caller in callers.items():
        assert caller.wait().tokens == alone[name]
    assert submit(service, "again", "odd", max_tokens=LONG).wait().tokens == alone["odd"]
    service.pin("odd")
    assert service.snapshot().variants["odd"].pinned
    service.unpin("odd")
    assert not service.snapshot().variants["odd"].pinned
    service.verify_integrity()
