"""Numbers that plans are made of are the same with any number of threads."""

import pytest
import torch

from moemerge.consolidation.codes.low_rank import factorise
from moemerge.consolidation.codes.moments import Moment
from moemerge.consolidation.operators.regression import ridge
from moemerge.similarity.threads import one_thread


@pytest.fixture
def threads():
    """Sets the number of threads; as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers():
    generator = torch.Generator().manual_seed(3)
    matrix, inputs = (torch.randn(512, 384, generator=generator) for _ in range(2))
    moment = Moment((inputs.T @ inputs,))
    low = factorise(matrix, 8, moment)
    fitted = ridge(inputs, inputs @ matrix[:, :384].T, matrix[:, :384], torch.ones(len(inputs)))
    ((_, feedback),) = moment.feedback
    return [low.left, low.right, fitted, feedback, torch.tensor(moment.error(matrix))]


def test_factors_and_sums_do_not_depend_on_the_number_of_threads(threads):
    threads(1)
    alone = numbers()
    threads(2)
    for one, other in zip(alone, numbers(), strict=True):
        assert torch.equal(one, other)


@one_thread()
def fail():
    assert torch.get_num_threads() == 1
    raise ZeroDivisionError


def test_number_of_threads_is_restored_also_after_an_error(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 2
