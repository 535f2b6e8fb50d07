"""Answers and averages of models in memory, and what log-likelihoods come to."""

from types import SimpleNamespace

import pytest
import torch

from moemerge.calibration.texts import cut_windows, read_task
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.errors import InvalidRecipe, NotEnoughRoom, UnsupportedCheckpoint
from moemerge.evaluation.averaging import write_average
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.perplexity import gain_recovered, perplexity
from moemerge.evaluation.tasks import greedy_answers
from tests.factories import write_checkpoint

PROMPTS = [[5, 9, 33, 12, 1], [60, 3, 1], [7] * 40 + [1]]


def open_family(folder, family: str, **options):
    return open_checkpoint(LocalFolder(write_checkpoint(folder, family, **options)))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_model(open_family(tmp_path_factory.mktemp("decoder"), "mixtral"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_model(open_family(tmp_path_factory.mktemp("pair"), "switch_transformers"))


def test_an_average_of_one_is_the_checkpoint_and_of_two_is_neither(tmp_path):
    one, other = (open_family(tmp_path / str(seed), "mixtral", seed=seed) for seed in (1, 2))
    tokens, logits = torch.tensor([[5, 9, 33, 12]]), []
    for number, models in enumerate(([one], [one, other], [other])):
        folder = tmp_path / f"average-{number}"
        write_average(models, folder)
        logits.append(load_model(open_checkpoint(LocalFolder(folder))).forward(tokens))
    assert torch.equal(logits[0], load_model(one).forward(tokens))
    assert not torch.allclose(logits[1], logits[0], atol=0.01)
    assert not torch.allclose(logits[1], logits[2], atol=0.01)


def test_a_model_larger_than_memory_is_refused(tmp_path, monkeypatch):
    checkpoint = open_family(tmp_path / "model", "mixtral")
    free = SimpleNamespace(available=100_000)
    monkeypatch.setattr("moemerge.evaluation.loading.psutil.virtual_memory", lambda: free)
    with pytest.raises(NotEnoughRoom, match=r"of memory in float32, 100 kB are free"):
        load_model(checkpoint)


def test_answers_of_a_batch_are_those_of_each_prompt_alone(pair):
    together = greedy_answers(pair, PROMPTS, frozenset())
    assert [len(answer) for answer in together] == [8, 8, 8]
    assert together == [greedy_answers(pair, [prompt], frozenset())[0] for prompt in PROMPTS]
    assert len(set(map(tuple, together))) > 1


def test_an_answer_ends_before_its_stop_id_and_the_others_go_on(pair):
    whole = greedy_answers(pair, PROMPTS, frozenset())
    stop = whole[0][-1]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in whole]
    assert greedy_answers(pair, PROMPTS, frozenset({stop})) == cut
    assert greedy_answers(pair, PROMPTS, frozenset(), max_tokens=2) == [answer[:2] for answer in whole]


def test_answers_of_a_decoder_are_refused(decoder):
    with pytest.raises(UnsupportedCheckpoint, match="encoder-decoder"):
        greedy_answers(decoder, PROMPTS, frozenset())


def test_gain_recovered_is_none_where_nothing_was_gained():
    assert gain_recovered(3.0, 2.0, 2.25) == 0.75
    assert gain_recovered(2.0, 2.0, 2.0) is None
    assert perplexity(0.0) == 1.0


def test_text_shorter_than_a_window_and_broken_rows_are_refused(tmp_path):
    with pytest.raises(InvalidRecipe, match="9 tokens"):
        cut_windows(range(9), 10, 5)
    path = tmp_path / "task.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n{"input": "c"}\n')
    with pytest.raises(InvalidRecipe, match="line 2"):
        read_task(path)
