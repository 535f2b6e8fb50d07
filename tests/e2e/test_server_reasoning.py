"""Variants that think before they answer, over HTTP: both parts, whole and streamed, apart."""

import json

import pytest

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from moemerge.text.reasoning import CLOSE, OPEN
from tests.e2e.program import call_program
from tests.e2e.serving import serve
from tests.factories import edit_json, write_siblings
from tests.thinking import make_thinking

VOCABULARY = 70


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """`mind` thinks, and its files recommend how to sample; `plain` does not think and is greedy."""
    folder = tmp_path_factory.mktemp("minds")
    _, tunes = write_siblings(folder, names=("mind", "plain"), vocab=VOCABULARY, dtype="F32")
    make_thinking(tunes["mind"])
    edit_json(tunes["mind"] / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.95)
    edit_json(tunes["plain"] / "generation_config.json", do_sample=False, repetition_penalty=1.2)
    merge(
        open_variants({name: FolderRef(path) for name, path in tunes.items()}),
        folder / "minds.moe",
        options_of("exact"),
    )
    return folder / "minds.moe"


@pytest.fixture(scope="module")
def served(bundle):
    with serve(bundle) as running:
        yield running


@pytest.fixture(scope="module")
def closing(served):
    """Id of the token that ends thinking."""
    info = served.post("/tokenize", {"model": "mind", "prompt": CLOSE, "add_special_tokens": False}).json()
    (token_id,) = info["tokens"]
    return token_id


def ask(served, **options):
    body = {"model": "mind", "messages": [{"role": "user", "content": "why?"}], **options}
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_thinking_is_apart_whole_and_streamed(served, closing, seed):
    # The tag is likely enough to come after a few tokens; special tokens, which have no text, never come.
    biases = {"0": -100, "1": -100, "2": -100, "64": -100, "65": -100, str(closing): 2}
    options = {"max_tokens": 60, "temperature": 1.5, "seed": seed, "logit_bias": biases}
    choice = ask(served, logprobs=True, **options).json()["choices"][0]
    text = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    before, tag, after = text.partition(CLOSE)
    assert tag, "this seed never ends its thinking; choose another one"
    message = choice["message"]
    reasoning = message.get("reasoning_content", "")
    assert (reasoning, message["content"]) == (before.strip(), after.lstrip())
    pieces = {"reasoning_content": "", "content": ""}
    for line in ask(served, stream=True, **options).text.splitlines():
        if line.startswith("data: {"):
            for part in json.loads(line[6:])["choices"]:
                assert not (pieces["content"] and part["delta"].get("reasoning_content"))
                for name in pieces:
                    pieces[name] += part["delta"].get(name) or ""
    assert pieces == {
        "reasoning_content": message.get("reasoning_content", ""),
        "content": message["content"],
    }


def test_thinking_that_is_cut_off_is_no_answer(served, closing):
    never = {str(closing): -100}
    message = ask(served, max_tokens=5, logit_bias=never, seed=0).json()["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] == ""


def test_variants_that_do_not_think_have_no_such_field(served):
    message = ask(served, model="plain", max_tokens=5).json()["choices"][0]["message"]
    assert message.keys() == {"role", "content"}


def test_bots_are_assistants_and_earlier_thinking_may_be_sent_back(served):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "bot", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    as_bot = served.post("/tokenize", {"model": "mind", "messages": turns}).json()["tokens"]
    turns[1] = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    assert served.post("/tokenize", {"model": "mind", "messages": turns}).json()["tokens"] == as_bot


def test_variables_reach_the_template_of_the_variant(served):
    body = {"model": "mind", "messages": [{"role": "user", "content": "why?"}]}

    def prompt(**variables):
        tokens = served.post("/tokenize", {**body, "chat_template_kwargs": variables}).json()["tokens"]
        return served.post("/detokenize", {"model": "mind", "tokens": tokens}).json()["prompt"]

    assert OPEN in prompt()
    assert OPEN in prompt(enable_thinking=True)
    assert OPEN not in prompt(enable_thinking=False)
    message = ask(served, chat_template_kwargs={"enable_thinking": False}, max_tokens=5)
    usage = ask(served, max_tokens=5).json()["usage"]["prompt_tokens"]
    assert message.json()["usage"]["prompt_tokens"] < usage


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"messages": []}, "the template is given anyway"),
        ({"_x": 1}, "no name that a template can use"),
        ({"a b": 1}, "no name that a template can use"),
        ({f"v{number}": 1 for number in range(65)}, "64"),
        ([1], "chat_template_kwargs"),
        ({"x" * 65: 1}, "64"),
    ],
)
def test_variables_that_cannot_be_are_refused(served, variables, said):
    messages = [{"role": "user", "content": "why?"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = served.post(path, {"model": "mind", "messages": messages, "chat_template_kwargs": variables})
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_recommended_sampling_is_the_default_of_its_variant(served, bundle):
    greedy = ask(served, model="plain", max_tokens=12).json()["choices"][0]["message"]
    asked = ask(served, model="plain", max_tokens=12, temperature=0, repetition_penalty=1.2)
    assert asked.json()["choices"][0]["message"] == greedy
    assert (
        ask(served, model="plain", max_tokens=12, temperature=0, repetition_penalty=1).json()["choices"][0][
            "message"
        ]
        != greedy
    )
    sampled = ask(served, max_tokens=12, seed=5).json()["choices"][0]["message"]
    asked = ask(served, max_tokens=12, seed=5, temperature=0.6, top_p=0.95).json()["choices"][0]["message"]
    assert asked == sampled


def test_results_of_a_file_have_both_parts(bundle, closing, tmp_path):
    ask = {
        "variant": "mind",
        "max_tokens": 40,
        "temperature": 1.5,
        "seed": 1,
        "logit_bias": {str(closing): 2},
    }
    lines = [{**ask, "messages": [{"role": "user", "content": "why?"}]}, {**ask, "prompt": "why?"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call_program("run", bundle, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert done.code == 0, done.err
    asked, continued = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert asked["reasoning"]
    assert CLOSE not in asked["reasoning"]
    assert "reasoning" not in continued
    assert CLOSE in continued["text"]


def test_chat_shows_thinking_on_standard_error(bundle):
    done = call_program("chat", bundle, "-v", "mind", "--max-tokens", "40", "--seed", "1", stdin="why?\n")
    told = call_program(
        "chat", bundle, "-v", "mind", "--max-tokens", "40", "--seed", "1", "--json", stdin="why?\n"
    )
    (turn,) = told.envelope["data"]["turns"]
    assert turn["reasoning"]
    assert turn["reasoning"] in done.err
    assert done.out == f"{turn['text']}\n"
