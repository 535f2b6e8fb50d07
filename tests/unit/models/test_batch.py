import pytest
import torch

from moemerge.models import Batch, Span, build_batch


def test_tokens_stand_side_by_side_and_positions_continue_each_sequence():
    batch = build_batch([[7, 8, 9], [5], [4, 4]], past=[0, 6, 2])
    assert batch.token_ids_T.tolist() == [7, 8, 9, 5, 4, 4]
    assert batch.spans == (Span(0, 3, 0), Span(3, 1, 6), Span(4, 2, 2))
    assert batch.positions_T.tolist() == [0, 1, 2, 6, 2, 3]
    assert batch.positions_T.dtype == torch.int64
    assert [span.num_keys for span in batch.spans] == [3, 7, 4]


def test_sequences_have_no_past_unless_told():
    assert build_batch([[1, 2], [3]]).positions_T.tolist() == [0, 1, 0]


def test_a_past_for_each_sequence_is_asked_for():
    with pytest.raises(ValueError):
        build_batch([[1], [2]], past=[3])


def test_positions_are_on_the_device_of_the_tokens():
    batch = Batch(torch.tensor([3], device="meta"), (Span(0, 1, 4),))
    assert batch.positions_T.device.type == "meta"
