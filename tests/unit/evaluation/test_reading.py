"""What models predict of passages, against one token at a time; likeness of equal and of unequal models."""

import pytest
import torch

from moemerge.calibration.texts import Passage, TaskRow
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tokenizer import load_tokenizer
from moemerge.errors import IncompatibleInputs, InvalidRecipe, NotFound
from moemerge.evaluation.evaluating import owner_of
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.reading import answer_rows, predict, score, score_beside
from moemerge.evaluation.samples import Sample, SampleSize, load_sample, load_samples
from tests.factories import write_checkpoint, write_siblings

WINDOWS = [Passage([(7 * i + n) % 60 for i in range(12)]) for n in range(3)]


def open_folder(folder):
    return open_checkpoint(LocalFolder(folder))


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    base, tunes = write_siblings(tmp_path_factory.mktemp("decoders"), names=("code",), noise=0.5)
    return open_folder(base), open_folder(tunes["code"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return open_folder(write_checkpoint(folder / "base", "switch_transformers"))


def sample_of(checkpoint, passages, rows=()):
    tokenizer = load_tokenizer(checkpoint.side_file, "test")
    return Sample(sha256="", passages=passages, rows=rows, tokenizer=tokenizer)


def test_log_likelihood_is_that_of_every_token_but_a_windows_first(decoders):
    model = load_model(decoders[0])
    scores = score(model, sample_of(decoders[0], WINDOWS))
    assert scores.tokens == [11, 11, 11]
    for window, nll in zip(WINDOWS, scores.nll, strict=True):
        logits = model.forward(torch.tensor([window.token_ids]))[0].log_softmax(dim=-1)
        expected = -sum(float(logits[i, token]) for i, token in enumerate(window.token_ids[1:]))
        assert nll == pytest.approx(expected, rel=1e-5)


def test_batches_do_not_change_scores(decoders, monkeypatch):
    model, other = map(load_model, decoders)
    sample = sample_of(decoders[0], WINDOWS)
    together = score_beside(model, other, sample)
    monkeypatch.setattr("moemerge.evaluation.reading._MOST_PASSAGES", 1)
    alone = score_beside(model, other, sample)
    assert together[0].nll == pytest.approx(alone[0].nll, rel=1e-5)
    assert together[2].kl == pytest.approx(alone[2].kl, rel=1e-4)
    assert together[2].routing == alone[2].routing


def test_a_model_is_like_itself(decoders):
    model = load_model(decoders[0])
    scores, own, likeness = score_beside(model, load_model(decoders[0]), sample_of(decoders[0], WINDOWS))
    assert scores.nll == own.nll
    assert (likeness.mean_kl, likeness.agreement) == (pytest.approx(0, abs=1e-7), 1.0)
    assert likeness.routing == {0: 1.0, 1: 1.0}


def test_divergence_agreement_and_routing_are_those_of_each_token(decoders):
    model, original = map(load_model, decoders)
    _, _, likeness = score_beside(model, original, sample_of(decoders[0], WINDOWS))
    found, wanted = predict(model, WINDOWS), predict(original, WINDOWS)
    kl = agreed = 0.0
    for one, other in zip(found.logits_WV, wanted.logits_WV, strict=True):
        p, q = other.softmax(dim=0), one.softmax(dim=0)
        kl += float((p * (p / q).log()).sum())
        agreed += int(one.argmax()) == int(other.argmax())
    assert likeness.kl == pytest.approx(kl, rel=1e-3)
    assert likeness.agreed == agreed
    for layer, slots in found.slots.items():
        pairs = list(zip(slots.tolist(), wanted.slots[layer].tolist(), strict=True))
        shares = [len(set(own) & set(theirs)) / len(own) for own, theirs in pairs]
        assert likeness.routing[layer] == pytest.approx(sum(shares) / len(shares))
        assert 0 < likeness.routing[layer] < 1


def test_an_observer_of_routes_is_left_as_it_was(decoders):
    model = load_model(decoders[0])
    predict(model, WINDOWS)
    assert model.model.on_route is None


def test_an_original_of_another_vocabulary_is_refused(decoders, tmp_path):
    longer = open_folder(write_checkpoint(tmp_path / "longer", vocab=96))
    with pytest.raises(IncompatibleInputs, match="96 tokens"):
        score_beside(load_model(decoders[0]), load_model(longer), sample_of(decoders[0], WINDOWS))


def test_answers_are_right_where_they_equal_the_target(pair):
    """The model's own answers as targets, but for one."""
    model = load_model(pair)
    prompts = [Passage([5, 9, 33, 12, 1], [7, 1]), Passage([60, 3, 1], [7, 1])]
    tokenizer = load_tokenizer(pair.side_file, "test")
    blank = sample_of(pair, prompts, [TaskRow("", "?"), TaskRow("", "?")])
    assert answer_rows(model, blank) == [False, False]
    from moemerge.evaluation.tasks import greedy_answers

    answers = greedy_answers(model, [p.token_ids for p in prompts], tokenizer.stop_token_ids)
    rows = [TaskRow("", f" {tokenizer.decode(answers[0])}\n"), TaskRow("", "?")]
    assert answer_rows(model, sample_of(pair, prompts, rows)) == [True, False]


def test_told_answers_have_the_likelihood_of_each_step(pair):
    model = load_model(pair)
    passage = Passage([5, 9, 33, 12, 1], [7, 20, 1])
    scores = score(model, sample_of(pair, [passage]))
    expected = 0.0
    for length in range(len(passage.target_ids)):
        shorter = Passage(passage.token_ids, passage.target_ids[: length + 1])
        last = predict(model, [shorter]).logits_WV[-1].log_softmax(dim=0)
        expected -= float(last[passage.target_ids[length]])
    assert scores.tokens == [3]
    assert scores.nll[0] == pytest.approx(expected, rel=1e-5)


def test_samples_are_checked_all_together(decoders, tmp_path):
    base, code = decoders
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "task.jsonl").write_text('{"input": "a", "target": "b"}\n')
    owners = {"base": owner_of(base), "code": owner_of(code), "none": owner_of(code)}
    paths = {"base": tmp_path / "short.txt", "code": tmp_path / "task.jsonl", "law": tmp_path / "x.txt"}
    with pytest.raises(InvalidRecipe) as refused:
        load_samples(owners, paths, SampleSize())
    for told in ("no text for none", "text for law", "fewer than one window of 128", "running text"):
        assert told in str(refused.value)
    with pytest.raises(NotFound, match=r"gone\.txt"):
        load_sample(owner_of(base), tmp_path / "gone.txt", SampleSize())


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    base = open_folder(write_checkpoint(tmp_path / "base", settings={"vocab_size": 64}))
    small = open_folder(write_checkpoint(tmp_path / "small", vocab=16))
    (tmp_path / "text.txt").write_text("many letters " * 30)
    owner = owner_of(base)
    with pytest.raises(InvalidRecipe, match="the model has 16"):
        load_sample(
            type(owner)("small", owner.arithmetic, owner.side_file, owner_of(small).vocab_size, 64),
            tmp_path / "text.txt",
            SampleSize(window=8),
        )
