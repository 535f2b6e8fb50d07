"""The server as its users see it: through the official openai client, and through plain HTTP."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.sampling import Sampling
from moemerge.server.logprobs import TokenNames
from moemerge.text.variants import VariantText
from tests.bundles import write_bundle
from tests.e2e.serving import error_of, serve, wait_for
from tests.factories import write_siblings

GREEDY = {"temperature": 0}
CHAT = [{"role": "user", "content": "def main"}]


@pytest.fixture(scope="module")
def served(mini_bundle):
    with serve(mini_bundle, engine={"dtype": "float32"}) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def reference(mini_bundle):
    """An engine of its own, to compare with."""
    engine = Engine(open_bundle(mini_bundle), EngineOptions(dtype="float32"))
    yield engine
    engine.close()


def answer(engine, variant, prompt_ids, **options):
    return list(engine.generate(variant, prompt_ids, **{"max_tokens": 12, **options}))


def text_of(engine, variant):
    return VariantText(engine.bundle, variant)


def logprobs_of(engine, variant, token_ids):
    """Log-probabilities of every token but the first, from one pass."""
    logits_TV = engine.logits(variant, torch.tensor([token_ids]))[0, :-1]
    return torch.log_softmax(logits_TV.float(), -1)


# Answers


def test_models_are_the_variants(client):
    assert [model.id for model in client.models.list()] == ["code", "scripture", "sums"]
    assert client.models.retrieve("sums").id == "sums"
    with pytest.raises(openai.NotFoundError, match="code, scripture, sums"):
        client.models.retrieve("prose")


@pytest.mark.parametrize("variant", ["code", "scripture", "sums"])
def test_completion_is_what_the_engine_answers(client, reference, variant):
    text = text_of(reference, variant)
    prompt_ids = text.encode("the ")
    expected = answer(reference, variant, prompt_ids)
    completion = client.completions.create(model=variant, prompt="the ", max_tokens=12, **GREEDY)
    assert completion.choices[0].text == text.decode([*prompt_ids, *expected])[len("the ") :]
    assert completion.choices[0].finish_reason == "length"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt_ids), 12)
    assert usage.total_tokens == len(prompt_ids) + 12


def test_prompts_may_be_texts_or_token_ids(client, reference):
    text = text_of(reference, "code")
    prompts = ["the ", "for"]
    ids = [list(text.encode(prompt)) for prompt in prompts]
    together = client.completions.create(model="code", prompt=prompts, max_tokens=6, **GREEDY)
    by_ids = client.completions.create(model="code", prompt=ids, max_tokens=6, **GREEDY)
    alone = client.completions.create(model="code", prompt=ids[1], max_tokens=6, **GREEDY)
    assert [choice.index for choice in together.choices] == [0, 1]
    texts = [choice.text for choice in together.choices]
    assert texts == [choice.text for choice in by_ids.choices]
    assert texts[1] == alone.choices[0].text
    assert together.usage.completion_tokens == 12


def test_stream_gives_the_same_text_and_usage(client):
    asked = {"model": "code", "prompt": ["for", "class"], "max_tokens": 20, **GREEDY}
    whole = client.completions.create(**asked)
    texts, reasons, usage = ["", ""], {}, None
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {0: "length", 1: "length"}
    assert usage == whole.usage


def test_stream_without_options_tells_no_usage(client):
    chunks = list(client.completions.create(model="code", prompt="for", max_tokens=3, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_chat_follows_the_template(client, reference):
    text = text_of(reference, "code")
    prompt_ids = text.encode_chat(CHAT)
    expected = answer(reference, "code", prompt_ids, stop_ids=text.stop_ids)
    chat = client.chat.completions.create(model="code", messages=CHAT, max_tokens=12, **GREEDY)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == text.decode(expected)
    assert chat.usage.prompt_tokens == len(prompt_ids)
    again = [*CHAT, chat.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    assert client.chat.completions.create(
        model="code", messages=again, max_tokens=1
    ).usage.prompt_tokens > len(prompt_ids)


def test_streamed_chat_gives_the_same_text(client):
    asked = {"model": "scripture", "messages": CHAT, "max_completion_tokens": 15, **GREEDY}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 4
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_chat_without_a_limit_goes_on_to_the_end_of_the_context(client):
    chat = client.chat.completions.create(
        model="code", messages=CHAT, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert chat.usage.total_tokens == 512
    assert chat.choices[0].finish_reason == "length"


def test_stop_string_ends_and_is_cut(client):
    asked = {"model": "code", "prompt": "for", "max_tokens": 30, **GREEDY}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:9]
    assert stop.strip()
    end = whole.index(stop)
    cut = client.completions.create(**asked, stop=[stop, "\0"])
    assert cut.choices[0].text == whole[:end]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 30
    pieces = client.completions.create(**asked, stop=stop, stream=True, logprobs=0)
    chunks = [chunk.choices[0] for chunk in pieces]
    assert "".join(chunk.text for chunk in chunks) == whole[:end]
    assert chunks[-1].finish_reason == "stop"
    assert all(offset < end for chunk in chunks for offset in chunk.logprobs.text_offset)


def test_seed_repeats_answers_and_n_gives_different_ones(client):
    asked = {"model": "code", "prompt": "the", "max_tokens": 12, "temperature": 1.2, "seed": 7}
    several = client.completions.create(**asked, n=3)
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) == 3
    assert client.completions.create(**asked).choices[0].text == texts[0]
    assert client.completions.create(**{**asked, "seed": 9}).choices[0].text == texts[2]
    assert several.usage.completion_tokens == 36
    assert several.usage.prompt_tokens == client.completions.create(**asked).usage.prompt_tokens


def test_bias_penalties_and_stop_ids_reach_the_engine(client, reference):
    token_id = text_of(reference, "code").encode("x", add_special_tokens=False)[0]
    biased = client.completions.create(
        model="code", prompt="for", max_tokens=4, logit_bias={str(token_id): 100}, **GREEDY
    )
    assert biased.choices[0].text == "xxxx"
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 1.5}
    expected = answer(reference, "code", [5, 6, 7], sampling=Sampling(**penalties))
    assert expected != answer(reference, "code", [5, 6, 7])
    asked = {"model": "code", "prompt": [5, 6, 7], "max_tokens": 12, "logprobs": 0, **GREEDY}
    penalised = client.completions.create(**asked, extra_body=penalties)
    names = TokenNames(text_of(reference, "code").tokenizer)
    assert penalised.choices[0].logprobs.tokens == [names.key(token_id) for token_id in expected]
    asked = {"model": "code", "prompt": "for", "max_tokens": 4, "logit_bias": {str(token_id): 90}, **GREEDY}
    stopped = client.completions.create(**asked, extra_body={"stop_token_ids": [token_id]})
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    at_least = client.completions.create(**asked, extra_body={"stop_token_ids": [token_id], "min_tokens": 2})
    assert at_least.usage.completion_tokens == 2


# Log-probabilities


def test_completion_logprobs_are_the_models(client, reference):
    prompt = "for the "
    completion = client.completions.create(
        model="code", prompt=prompt, max_tokens=8, logprobs=3, echo=True, **GREEDY
    )
    choice, text = completion.choices[0], text_of(reference, "code")
    token_ids = [*text.encode(prompt), *answer(reference, "code", text.encode(prompt), max_tokens=8)]
    expected_TV = logprobs_of(reference, "code", token_ids)
    given = choice.logprobs
    assert len(given.tokens) == len(token_ids)
    assert (given.token_logprobs[0], given.top_logprobs[0]) == (None, None)
    for place in range(1, len(token_ids)):
        row = expected_TV[place - 1]
        assert math.isclose(given.token_logprobs[place], row[token_ids[place]], abs_tol=1e-4)
        best = sorted(given.top_logprobs[place].values(), reverse=True)[:3]
        assert torch.allclose(torch.tensor(best), row.topk(3).values, atol=1e-4)
    assert choice.text.startswith(prompt)
    # Every token stands in the text where its offset says.
    for token, offset in zip(given.tokens, given.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


def test_streamed_logprobs_are_the_same(client):
    asked = {"model": "code", "prompt": "for the", "max_tokens": 8, "logprobs": 2, "echo": True, **GREEDY}
    whole = client.completions.create(**asked).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for chunk in chunks for item in getattr(chunk, name)] == getattr(whole, name)


def test_chat_logprobs_name_tokens_with_their_bytes(client):
    chat = client.chat.completions.create(
        model="code", messages=CHAT, max_tokens=6, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in content).decode() == chat.choices[0].message.content
    for item in content:
        assert len(item.top_logprobs) == 2
        assert item.top_logprobs[0].token == item.token
        assert item.logprob == item.top_logprobs[0].logprob


def test_echo_alone_computes_nothing_but_the_prompt(client):
    completion = client.completions.create(
        model="code", prompt="for the", max_tokens=0, logprobs=1, echo=True
    )
    assert completion.choices[0].text == "for the"
    assert completion.usage.completion_tokens == 0
    assert len(completion.choices[0].logprobs.tokens) == completion.usage.prompt_tokens


# Encoder-decoders


def test_encoder_decoder_answers_a_source(tmp_path):
    bundle = write_bundle(tmp_path, "switch_transformers")
    reference = Engine(open_bundle(bundle))
    with serve(bundle) as served:
        for variant in ("plain", "large"):
            text = text_of(reference, variant)
            source = text.encode("what is it")
            expected = answer(reference, variant, source, stop_ids=text.stop_ids)
            body = {"model": variant, "prompt": "what is it", "max_tokens": 12, "logprobs": 2, **GREEDY}
            choice = served.post("/v1/completions", body).json()["choices"][0]
            assert choice["text"] == text.decode(expected)
            if len(expected) == 12:
                assert len(choice["logprobs"]["tokens"]) == 12
        echoed = served.post("/v1/completions", {**body, "echo": True})
        assert (echoed.status_code, error_of(echoed)["param"]) == (400, "echo")
        body["echo"] = True
        del body["logprobs"]
        assert served.post("/v1/completions", body).json()["choices"][0]["text"].startswith("what is it")
        served.wait_until_idle()
    reference.close()


def test_prompt_whose_blocks_leave_none_for_the_answer_is_too_long(tmp_path):
    bundle = write_bundle(tmp_path, "switch_transformers")
    with serve(bundle, engine={"dtype": "float32", "cache_memory": 60_000}) as served:
        context = served.http.get("/v1/models/plain").json()["max_model_len"]
        # Within the context, but not with an answer within the cache.
        body = {"model": "plain", "prompt": [5] * (context - 1), "max_tokens": 2}
        refused = served.post("/v1/completions", body)
        assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")
        assert "leave no room for an answer" in error_of(refused)["message"]
        assert served.post("/v1/completions", {**body, "prompt": [5]}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_variant_that_is_removed_before_the_engine_takes_a_request_up_is_not_found(mini_bundle, stream):
    is_reached, may_go_on = threading.Event(), threading.Event()

    def hold():
        is_reached.set()
        return may_go_on.wait(30)

    with serve(mini_bundle) as served, ThreadPoolExecutor() as clients:
        held = clients.submit(served.service.call, hold)
        assert is_reached.wait(30)
        removed = clients.submit(served.http.delete, "/variants/code")
        wait_for(lambda: served.service._calls.qsize() == 1)
        body = {"model": "code", "prompt": "a", "max_tokens": 2, "stream": stream}
        asked = clients.submit(served.post, "/v1/completions", body)
        wait_for(lambda: served.service.num_unfinished == 1)
        may_go_on.set()
        assert held.result()
        assert removed.result().status_code == 200
        answer = asked.result()
        if stream:
            event, end = (line for line in answer.text.splitlines() if line)
            assert end == "data: [DONE]"
            error = json.loads(event.removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 404
            error = error_of(answer)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "scripture, sums" in error["message"]


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "prose", "prompt": "a"}, "model", "model_not_found"),
        ({"model": "code"}, "prompt", "missing_field"),
        ({"model": "code", "prompt": "a", "best_of": 2}, "best_of", "unsupported_field"),
        ({"model": "code", "prompt": "a", "suffix": "b"}, "suffix", "unsupported_field"),
        ({"model": "code", "prompt": "a", "wings": 2}, "wings", "unknown_field"),
        ({"model": "code", "prompt": "a", "temperature": 3}, "temperature", "invalid_value"),
        ({"model": "code", "prompt": "a", "max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"model": "code", "prompt": "a", "max_tokens": "9"}, "max_tokens", "invalid_value"),
        ({"model": "code", "prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"model": "code", "prompt": "a", "max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"model": "code", "prompt": [1] * 600}, "prompt", "context_length_exceeded"),
        ({"model": "code", "prompt": [1, 99999]}, "prompt", "invalid_value"),
        ({"model": "code", "prompt": [[1], [99999]]}, "prompt", "invalid_value"),
        ({"model": "code", "prompt": ""}, "prompt", "invalid_value"),
        ({"model": "code", "prompt": ["a", ""]}, "prompt", "invalid_value"),
        ({"model": "code", "prompt": []}, "prompt", "invalid_value"),
        ({"model": "code", "prompt": [[1], []]}, "prompt.1", "invalid_value"),
        ({"model": "code", "prompt": [1, True]}, "prompt.1", "invalid_value"),
        ({"model": "code", "prompt": "a", "n": 200}, "n", "invalid_value"),
        ({"model": "code", "prompt": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"model": "code", "prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"model": "code", "prompt": "a", "logit_bias": {"9999999999": 1}}, "logit_bias", "invalid_value"),
        ({"model": "code", "prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"model": "code", "prompt": "a", "logit_bias": {"007": 1}}, "logit_bias", "invalid_value"),
        ({"model": "code", "prompt": "a", "stop_token_ids": [99999]}, "stop_token_ids", "invalid_value"),
        ({"model": "code", "prompt": "a", "stream_options": {}}, "stream_options", "unsupported_field"),
    ],
)
def test_completion_that_cannot_be_is_refused_by_name(served, body, param, code):
    answer = served.post("/v1/completions", body)
    error = error_of(answer)
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)


def test_length_is_named_as_the_client_named_it(served):
    body = {"model": "code", "messages": CHAT, "max_completion_tokens": 600}
    error = error_of(served.post("/v1/chat/completions", body))
    assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")
    assert error["message"].startswith("max_completion_tokens is 600, expected at most ")


def test_shortest_answer_beyond_the_longest_is_refused_by_name(served):
    body = {"model": "code", "prompt": "a", "min_tokens": 17}
    error = error_of(served.post("/v1/completions", body))
    assert (error["param"], error["code"]) == ("min_tokens", "invalid_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("top_logprobs", 2),
        ("max_completion_tokens", 3),
    ],
)
def test_chat_that_cannot_be_is_refused_by_name(served, field, value):
    body = {"model": "code", "messages": CHAT, "max_tokens": 2, field: value}
    error = error_of(served.post("/v1/chat/completions", body))
    assert error["param"] == field
    assert field in error["message"]


def test_fields_that_ask_for_nothing_are_accepted(served):
    nothing = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    body = {"model": "code", "messages": CHAT, "max_tokens": 1, "user": "somebody", **nothing}
    assert served.post("/v1/chat/completions", body).status_code == 200
    body = {"model": "code", "prompt": "a", "max_tokens": 1, "best_of": 2, "n": 2, "suffix": None}
    assert served.post("/v1/completions", body).status_code == 200


def test_parts_that_are_no_text_are_refused(served):
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    body = {"model": "code", "messages": [{"role": "user", "content": [image]}]}
    assert error_of(served.post("/v1/chat/completions", body))["param"].startswith("messages.0.content.0")


def test_unknown_addresses_and_methods_have_the_same_shape(served):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/tokenize", 405),
    ):
        answer = served.http.request(method, path)
        assert answer.status_code == status
        assert path in error_of(answer)["message"]
    assert "allow" in served.http.put("/v1/models").headers


# Tokens


def test_tokenizer_routes_are_inverse(served, reference):
    text = text_of(reference, "code")
    tokens = served.post(
        "/tokenize", {"model": "code", "prompt": "for x in", "return_token_strs": True}
    ).json()
    assert tuple(tokens["tokens"]) == text.encode("for x in")
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    # The variants have one tokenizer, so any will do.
    back = served.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "for x in"}
    chat = served.post("/tokenize", {"model": "sums", "messages": CHAT}).json()
    assert tuple(chat["tokens"]) == text.encode_chat(CHAT)
    info = served.http.get("/tokenizer_info", params={"model": "code"}).json()
    assert info["eos_token"] == "</s>"
    assert "messages" in info["chat_template"]


# Watching and changing


def test_variants_are_added_removed_and_pinned(mini_bundle):
    with serve(mini_bundle, engine={"variants": ("code", "sums"), "resident": "2"}) as served:
        listed = {v["name"]: v for v in served.http.get("/variants").json()["variants"]}
        assert [listed[name]["served"] for name in ("code", "scripture", "sums")] == [True, False, True]
        body = {"model": "scripture", "prompt": "the", "max_tokens": 2}
        assert served.post("/v1/completions", body).status_code == 404
        assert served.post("/variants/scripture").json()["served"]
        assert served.post("/v1/completions", body).status_code == 200
        pinned = served.post("/variants/scripture/pin").json()
        assert (pinned["served"], pinned["state"], pinned["pinned"]) == (True, "resident", True)
        assert not served.post("/variants/scripture/unpin").json()["pinned"]
        assert served.http.delete("/variants/scripture").json()["served"] is False
        assert served.post("/v1/completions", body).status_code == 404
        assert served.post("/variants/prose").status_code == 404
        assert served.post("/variants/code").status_code == 400
        assert error_of(served.post("/variants/code/pin", headers={"Origin": "http://evil"}))["code"] == (
            "cross_origin"
        )
        served.wait_until_idle()


def test_no_client_learns_where_the_bundle_lies(served, mini_bundle):
    answer = served.post("/variants/nope")
    assert answer.status_code == 404
    assert str(mini_bundle.parent) not in answer.text
    assert mini_bundle.name in error_of(answer)["message"]


def test_metrics_tell_what_happened(mini_bundle):
    with serve(mini_bundle) as served:
        for variant, count in (("code", 2), ("sums", 1)):
            for _ in range(count):
                served.post("/v1/completions", {"model": variant, "prompt": "a b", "max_tokens": 3})
        served.post("/v1/completions", {"model": "nobody", "prompt": "a"})
        served.http.get("/../../etc/passwd")
        wait_for(lambda: served.service.snapshot().variants["sums"].figures.finished)
        text = served.http.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['moemerge_output_tokens_total{variant="code"}']) == 6
    assert float(figures['moemerge_requests_total{finish_reason="length",variant="sums"}']) == 1
    assert float(figures['moemerge_swaps_total{variant="code"}']) == 1
    assert float(figures['moemerge_swap_bytes_total{variant="scripture"}']) == 0
    assert float(figures['moemerge_variant_resident{variant="sums"}']) == 1
    assert float(figures["moemerge_kv_blocks_used"]) == 0
    bucket = 'moemerge_time_to_first_token_seconds_bucket{le="+Inf",variant="code"}'
    assert float(figures[bucket]) == 2
    ok = 'moemerge_http_requests_total{method="POST",path="/v1/completions",status="200"}'
    assert float(figures[ok]) == 3
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) > 30
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in families:
        known = name.removeprefix("moemerge_")
        assert known in page or name.startswith(("process_", "python_gc_")) or name.endswith("_created"), name
    assert "nobody" not in text
    assert "passwd" not in text


def test_openmetrics_on_demand(served):
    answer = served.http.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_page_needs_no_network_and_can_be_switched_off(served, mini_bundle):
    page = served.http.get("/docs").text
    assert "/v1/chat/completions" in page
    assert "max_completion_tokens" in page
    assert not any(outside in page for outside in ("http://", "https://", "<script", "src="))
    with serve(mini_bundle, docs=False) as silent:
        assert silent.http.get("/docs").status_code == silent.http.get("/openapi.json").status_code == 404


def test_variant_without_a_template_says_so(tmp_path):
    _, siblings = write_siblings(tmp_path, names=("talker", "mute"))
    (siblings["mute"] / "chat_template.jinja").unlink()
    variants = open_variants({name: FolderRef(folder) for name, folder in siblings.items()})
    merge(variants, tmp_path / "duo.moe", options_of("exact"))
    with serve(tmp_path / "duo.moe") as served:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert served.post("/v1/chat/completions", {"model": "talker", **body}).status_code == 200
        refused = served.post("/v1/chat/completions", {"model": "mute", **body})
        assert refused.status_code == 400
        assert error_of(refused)["code"] == "no_chat_template"


def test_health_and_readiness(served):
    assert served.http.get("/health").json() == {"status": "ok"}
    assert served.http.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
def test_head_is_get_without_a_body(served, path):
    answer = served.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == served.http.get(path).headers["content-type"]
    assert "head" not in served.http.get("/openapi.json").json()["paths"][path]


def test_full_queue_says_when_to_come_again(mini_bundle):
    options = {"max_batch": 1, "max_step_tokens": 1}
    with serve(mini_bundle, engine=options, queue={"max_queue": 1, "max_queue_per_variant": 0}) as served:
        asked = {"model": "code", "prompt": "for", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=asked) as first:
            assert first.status_code == 200
            again = served.post("/v1/completions", {**asked, "stream": False})
            assert (again.status_code, error_of(again)["code"]) == (429, "queue_full")
            assert "larger --max-queue-per-variant" in error_of(again)["message"]
            assert int(again.headers["retry-after"]) >= 1
            with served.http.stream("POST", "/v1/completions", json={**asked, "model": "sums"}) as second:
                assert second.status_code == 200
                third = served.post("/v1/completions", {**asked, "model": "scripture"})
                assert (third.status_code, error_of(third)["code"]) == (503, "overloaded")
                assert "larger --max-queue lets" in error_of(third)["message"]
                assert int(third.headers["retry-after"]) >= 1
        served.wait_until_idle()


def test_streams_are_events_that_end_with_done(served):
    asked = {"model": "code", "prompt": "for", "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-1])
