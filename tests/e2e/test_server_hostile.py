"""Clients that are broken, slow, greedy or gone: each gets an error in the one shape, the server lives on."""

import json
import socket
import struct
import time

import pytest

from moemerge.server import program
from tests.bundles import write_bundle
from tests.e2e.serving import error_of, serve, wait_for
from tests.factories import write_siblings

GENERATION = ("/v1/completions", "/v1/chat/completions")
JSON = {"Content-Type": "application/json"}
ENDLESS = {"model": "plain", "prompt": "a", "max_tokens": 120, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def served(bundle):
    limits = {
        "max_body_bytes": 20_000,
        "max_header_bytes": 4096,
        "body_timeout_s": 0.4,
        "header_timeout_s": 0.4,
    }
    with serve(bundle, **limits) as served:
        yield served
        assert served.http.get("/health").status_code == 200
        served.wait_until_idle()


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory):
    """One whose answers may be long enough to outlast whatever buffers there are."""
    from moemerge.checkpoint.variants import open_variants
    from moemerge.consolidation.pipeline import merge
    from moemerge.consolidation.task import options_of
    from moemerge.refs import FolderRef

    folder = tmp_path_factory.mktemp("long")
    _, siblings = write_siblings(folder, names=("plain", "other"), settings={"max_positions": 65536})
    variants = open_variants({name: FolderRef(path) for name, path in siblings.items()})
    merge(variants, folder / "x.moe", options_of("exact"))
    return folder / "x.moe"


def raw(served, data, *, patience_s=30.0):
    """What comes back for bytes, until the server closes or the answer is whole."""
    with served.connect() as connection:
        connection.sendall(data)
        return read(connection, patience_s)


def read(connection, patience_s=30.0):
    connection.settimeout(patience_s)
    received = b""
    while True:
        try:
            fresh = connection.recv(65536)
        except ConnectionResetError:
            fresh = b""
        if not fresh:
            return received
        received += fresh
        head, _, body = received.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:") and len(body) >= int(line.partition(b":")[2]):
                return received


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def assert_in_shape(answer):
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}


# Bodies


@pytest.mark.parametrize("path", [*GENERATION, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"model": "\xc3\x28"}',
        b'{"model": "plain", "prompt": "\\ud800", "messages": [{"role": "user", "content": "\\uDC00"}]}',
        b"[" * 9000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b'{"model": "plain", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "plain", "max_tokens": 1' + b"0" * 4000 + b"}",
        b'{"model": "plain", "temperature": 1' + b"0" * 4000 + b"}",
        b'{"model": "plain", "prompt": "a", "temperature": NaN}',
        b'{"model": "plain", "prompt": "a", "temperature": 1e999}',
        b'{"model": "plain", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "plain", "prompt": "a", "seed": -1}',
        b'{"model": "plain", "prompt": "a", "top_k": 1e30}',
        b'{"model": "plain", "prompt": [' + b"1," * 5000 + b'"x"], "tokens": [-1]}',
        b'{"model": "plain", "prompt": [2147483648], "tokens": [2147483648]}',
        b'{"model": {"$gt": ""}, "prompt": "a"}',
        b'{"model": "' + b"m" * 5000 + b'", "prompt": "a", "tokens": [1], "messages": []}',
    ],
    ids=lambda value: (
        value[:24].decode("latin-1") + f"... {len(value)}" if isinstance(value, bytes) else value
    ),
)
def test_nonsense_is_refused(served, path, body):
    answer = served.http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400
    error = error_of(answer)
    assert len(error["message"]) < 2100
    assert "Traceback" not in error["message"]


def test_numbers_in_exponential_form_are_judged_by_their_value(served):
    answer = served.http.post(
        "/v1/completions",
        content=b'{"model": "plain", "prompt": "a", "max_tokens": 1, "temperature": 1e-400}',
        headers=JSON,
    )
    assert answer.status_code == 200


def test_keys_given_twice_are_no_error(served):
    body = b'{"model": "nobody", "model": "plain", "prompt": "a", "max_tokens": 1}'
    assert served.http.post("/v1/completions", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_other_kinds_of_bodies_are_refused(served, kind):
    answer = served.http.post(
        "/v1/completions", content=b'{"model": "plain"}', headers={"Content-Type": kind}
    )
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "zstd"])
def test_encoded_bodies_are_refused_by_name(served, encoding):
    headers = {**JSON, "Content-Encoding": encoding}
    answer = served.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415
    assert encoding in error_of(answer)["message"]


def test_identity_is_no_encoding(served):
    headers = {"Content-Encoding": "Identity"}
    body = {**ENDLESS, "max_tokens": 1}
    assert served.http.post("/v1/completions", json=body, headers=headers).status_code == 200


def test_large_bodies_are_refused_whether_declared_or_not(served):
    large = b'{"model": "' + b"x" * 30_000 + b'"}'
    declared = served.http.post("/v1/completions", content=large, headers=JSON)
    chunked = served.http.post("/v1/completions", content=iter([large[:9000], large[9000:]]), headers=JSON)
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"
    lied = raw(served, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    assert status_of(lied) == 413


def test_unclosed_chunks_do_not_hold_the_server(served):
    begin = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = raw(served, begin + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n{")
    assert status_of(answer) in (400, 408)
    assert_in_shape(answer)


# Slow and silent


def test_slow_body_gets_408(served):
    begin = time.monotonic()
    answer = raw(served, b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
    assert status_of(answer) == 408
    assert_in_shape(answer)
    assert time.monotonic() - begin < 10


def test_slow_head_is_hung_up_on(served):
    with served.connect() as connection:
        begin = time.monotonic()
        for byte in b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"y" * 200:
            try:
                connection.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.01)
        assert read(connection) == b""
        assert 0.3 < time.monotonic() - begin < 10


def test_second_request_may_not_be_slow_either(served):
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(read(connection)) == 200
        connection.sendall(b"GET /health HT")
        begin = time.monotonic()
        assert read(connection) == b""
        assert time.monotonic() - begin < 10


def test_silent_connections_do_not_stay(served):
    connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(60)]
    assert served.http.get("/health").status_code == 200
    for connection in connections:
        assert read(connection) == b""
        connection.close()


def test_too_many_connections_are_told_so(bundle):
    with serve(bundle, max_connections=3) as served:
        silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        wait_for(lambda: len(served.program.server_state.connections) == 3)
        answer = raw(served, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(answer) == 503
        assert b"retry-after: 1" in answer.lower()
        assert b"3 connections are open, the most allowed. Try again in 1 s" in answer
        assert_in_shape(answer)
        for connection in silent:
            connection.close()
        wait_for(lambda: not served.program.server_state.connections)
        assert served.http.get("/health").status_code == 200


# Not HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + b"\r\n",
        b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
    ],
    ids=lambda data: data[:20].decode("latin-1"),
)
def test_what_is_not_http_gets_400_in_the_same_shape(served, data):
    answer = raw(served, data)
    assert status_of(answer) == 400
    assert_in_shape(answer)


def test_odd_requests_are_answered(served):
    for data in (
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models/%F0%9F%98%80%0d%0aX:y HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ):
        assert status_of(raw(served, data)) in (200, 400, 404, 405)


def test_requests_sent_at_once_are_answered_in_order(served):
    with served.connect() as connection:
        first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        second = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(first + second)
        connection.settimeout(30)
        received = b""
        while fresh := connection.recv(65536):
            received += fresh
    assert [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]] == [200, 404]


# Keys


def test_keys_open_the_server(bundle):
    with serve(bundle, api_keys=("first-key", "second-key")) as served:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "first-key"},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for method, path in (
                ("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nowhere"),
                ("POST", "/variants/plain/pin"), ("DELETE", "/variants/plain"), ("GET", "/health/"),
            ):  # fmt: skip
                answer = served.http.request(method, path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            headers = {"Authorization": f"Bearer {key}"}
            assert served.http.get("/v1/models", headers=headers).status_code == 200
            assert served.http.post("/variants/plain/pin", headers=headers).status_code == 200
        for path in ("/health", "/ready", "/openapi.json", "/docs"):
            assert served.http.get(path).status_code == 200
        description = served.http.get("/openapi.json").json()
        assert description["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
        assert "security" not in description["paths"]["/health"]["get"]
        large = served.http.post("/v1/completions", content=b"x" * 300_000, headers=JSON)
        assert large.status_code == 401


def test_server_under_a_path_keeps_its_gate(bundle):
    with serve(bundle, api_keys=("a-key",), root_path="/moe") as served:
        assert served.http.get("/health").status_code == 200
        assert served.http.get("/v1/models").status_code == 401
        assert served.http.get("/v1/models", headers={"Authorization": "Bearer a-key"}).status_code == 200


# Gone


def post(path, body):
    data = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_client_that_goes_away_frees_its_blocks(long_bundle, stream, reset):
    engine = {"max_batch": 2, "cache_memory": 64 * 2**20}
    with serve(long_bundle, engine=engine) as served:
        body = {**ENDLESS, "max_tokens": 60_000, "stream": stream, "n": 3}
        with served.connect() as connection:
            connection.sendall(post("/v1/completions", body))
            wait_for(lambda: served.service.snapshot().blocks_used > 0)
            assert served.service.num_unfinished == 3
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        begin = time.monotonic()
        served.wait_until_idle()
        assert time.monotonic() - begin < 10
        finished = served.service.snapshot().variants["plain"].figures.finished
        assert finished == {"cancelled": 3}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_half_closed_connection_counts_as_gone(long_bundle, stream):
    with serve(long_bundle, engine={"cache_memory": 64 * 2**20}) as served, served.connect() as connection:
        connection.sendall(post("/v1/completions", {**ENDLESS, "max_tokens": 60_000, "stream": stream}))
        wait_for(lambda: served.service.num_unfinished == 1)
        connection.shutdown(socket.SHUT_WR)
        served.wait_until_idle()
        assert served.service.snapshot().variants["plain"].figures.finished == {"cancelled": 1}


def test_slow_reader_of_a_stream_is_cut_off(long_bundle):
    engine = {"cache_memory": 64 * 2**20}
    options = {"send_buffer": 4096, "max_unread_outputs": 50}
    with serve(long_bundle, engine=engine, **options) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", served.port))
        body = {**ENDLESS, "max_tokens": 60_000, "stream": True, "logprobs": 20}
        connection.sendall(post("/v1/completions", body))
        wait_for(lambda: served.service.num_unfinished == 1)
        # Nobody reads; others are served meanwhile, and then the slow one is cancelled.
        assert served.post("/v1/completions", {**ENDLESS, "max_tokens": 5}).status_code == 200
        served.wait_until_idle()
        assert served.service.snapshot().variants["plain"].figures.finished["cancelled"] == 1
        connection.settimeout(30)
        received = b""
        while b"[DONE]" not in received:
            fresh = connection.recv(65536)
            assert fresh
            received += fresh
        assert b"reader_too_slow" in received


def test_stream_of_a_removed_variant_ends_with_an_error(long_bundle):
    with serve(long_bundle, engine={"cache_memory": 64 * 2**20}) as served:
        body = {**ENDLESS, "max_tokens": 60_000, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert served.http.delete("/variants/plain").status_code == 200
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "model_not_found"
        served.wait_until_idle()
        assert served.post("/v1/completions", {**ENDLESS, "model": "other"}).status_code == 200


# Clients of a server that stops


@pytest.mark.parametrize("path", [*GENERATION, "/tokenize", "/detokenize"])
def test_half_a_body_is_refused_as_soon_as_the_server_stops(bundle, caplog, path):
    with serve(bundle) as served, served.connect() as connection:
        connection.sendall(post(path, ENDLESS)[:-5])
        wait_for(lambda: served.program.server_state.tasks)
        begin = time.monotonic()
        served.program.stop()
        answer = read(connection)
        assert status_of(answer) == 503
        assert b"retry-after" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "stopping"
        wait_for(lambda: not served.program.started or not served.program.server_state.connections)
    assert time.monotonic() - begin < 5, "connections that have nothing to say are hung up on after so long"
    assert caplog.text == ""


def test_reader_that_never_reads_is_hung_up_on_when_the_server_stops(long_bundle, caplog, monkeypatch):
    monkeypatch.setattr(program, "_FLUSH_S", 0.5)
    engine, options = {"cache_memory": 64 * 2**20}, {"send_buffer": 4096}
    with serve(long_bundle, engine=engine, **options) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", served.port))
        body = {**ENDLESS, "max_tokens": 60_000, "stream": True, "logprobs": 20}
        connection.sendall(post("/v1/completions", body))
        wait_for(lambda: served.service.snapshot().variants["plain"].figures.output_tokens > 200)
        served.program.stop()
        wait_for(lambda: not served.program.server_state.connections)
    assert caplog.text == ""
