"""Thinking and answer, told apart as text comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.text.reasoning import CLOSE, OPEN, Parts, ReasoningText, Stage
from moemerge.text.variants import VariantText
from tests.bundles import open_engine
from tests.factories import write_siblings
from tests.thinking import make_thinking

WHOLE = [
    (Stage.THINKING, "\nso 2 + 2\n</think>\n\n4", ("so 2 + 2", "4")),
    (Stage.THINKING, "</think>4", ("", "4")),
    (Stage.THINKING, " never ends < /think> \n", ("never ends < /think>", "")),
    (Stage.THINKING, "a</think>b</think> c\n", ("a", "b</think> c\n")),
    (Stage.BEFORE, " <think>a</think>b", ("a", "b")),
    (Stage.BEFORE, " 4 <think>", ("", " 4 <think>")),
    (Stage.BEFORE, "<thin", ("", "<thin")),
    (Stage.BEFORE, "", ("", "")),
    (Stage.ANSWERING, "\n<think>a</think>b", ("", "\n<think>a</think>b")),
]


@pytest.mark.parametrize(("stage", "text", "expected"), WHOLE)
def test_whole_texts_are_split_at_their_tags(stage, text, expected):
    assert ReasoningText(stage).split(text) == expected


words = st.lists(st.sampled_from([OPEN, CLOSE, "<", "</", "</th", "ink>", "a", " ", "\n"]), max_size=12)


@given(words, st.sampled_from(Stage), st.data())
def test_pieces_add_up_to_the_split_of_the_whole(pieces, stage, data):
    whole = "".join(pieces)
    stream = ReasoningText(stage)
    told, rest = [], whole
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        told.append(stream.add(rest[:cut]))
        rest = rest[cut:]
    told.append(stream.finish())
    found = Parts(*("".join(column) for column in zip(*told, strict=True)))
    assert found == ReasoningText(stage).split(whole)


@given(words)
def test_nothing_is_lost_but_tags_and_space(pieces):
    text = "".join(pieces)
    reasoning, content = ReasoningText(Stage.THINKING).split(text)
    before, tag, after = text.partition(CLOSE)
    assert (reasoning, content) == (before.strip(), after.lstrip() if tag else "")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`mind` thinks first, `plain` does not."""
    from moemerge.checkpoint.variants import open_variants
    from moemerge.consolidation.pipeline import merge
    from moemerge.consolidation.task import options_of
    from moemerge.refs import FolderRef

    folder = tmp_path_factory.mktemp("thinking")
    _, tunes = write_siblings(folder, names=("mind", "plain"), vocab=70, dtype="F32")
    make_thinking(tunes["mind"])
    variants = open_variants({name: FolderRef(path) for name, path in tunes.items()})
    merge(variants, folder / "x.moe", options_of("exact"))
    engine = open_engine(folder / "x.moe", dtype="float32")
    yield engine
    engine.close()


def test_template_tells_whether_a_variant_thinks_and_the_prompt_whether_it_has_begun(engine):
    mind, plain = VariantText(engine.bundle, "mind"), VariantText(engine.bundle, "plain")
    ask = [{"role": "user", "content": "why?"}]
    tagged = f"hm{CLOSE}yes"
    assert mind.reasoning(mind.encode_chat(ask)).split(tagged) == ("hm", "yes")
    assert mind.reasoning(mind.encode("why?")).split(tagged) == ("", tagged)
    assert plain.reasoning(plain.encode_chat(ask)).split(OPEN + tagged) == ("", OPEN + tagged)
    earlier = [*ask, {"role": "assistant", "content": tagged}, *ask]
    assert "hm" not in mind.render_chat(earlier)
