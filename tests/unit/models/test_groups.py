"""Planned groups against the plain rule: who sees which key."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.models import Span
from moemerge.models.groups import plan_cross_groups, plan_groups, plan_two_way_groups

CPU, DTYPE = torch.device("cpu"), torch.float32


def spans_of(lengths_and_pasts) -> list[Span]:
    spans, start = [], 0
    for length, past in lengths_and_pasts:
        spans.append(Span(start, length, past))
        start += length
    return spans


def tokens_of(group) -> list[int]:
    if isinstance(group.tokens, slice):
        return list(range(group.tokens.start, group.tokens.stop))
    return group.tokens.tolist()


def added_to_scores(group) -> torch.Tensor:
    """What a group adds to the scores of its only head, [B, N, S]."""
    shape = (len(group.sequences), group.num_new, group.num_keys)
    if group.is_causal:
        assert group.mask is None
        return torch.zeros(shape).masked_fill(torch.ones(shape).triu(1) > 0, -torch.inf)
    return torch.zeros(shape) if group.mask is None else group.mask[:, 0].expand(shape)


def bias(first_B, distance_BNS):
    return (first_B.view(-1, 1, 1) + 0.01 * distance_BNS).unsqueeze(1)


span_lists = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5]), st.one_of(st.just(0), st.integers(0, 300))),
    min_size=1,
    max_size=7,
).map(spans_of)


def assert_groups_cover(groups, spans) -> None:
    assert sorted(n for group in groups for n in group.sequences) == list(range(len(spans)))
    for group in groups:
        tokens = [spans[n].start + i for n in group.sequences for i in range(group.num_new)]
        assert tokens_of(group) == tokens
        assert {spans[n].length for n in group.sequences} == {group.num_new}


@given(span_lists, st.sampled_from([None, 1, 3, 100]), st.sampled_from([1, 16]), st.booleans())
def test_a_token_sees_the_keys_up_to_its_own_within_the_window(spans, window, granularity, is_biased):
    groups = plan_groups(spans, window, granularity, CPU, DTYPE, bias if is_biased else None)
    assert_groups_cover(groups, spans)
    for group in groups:
        if not group.is_fresh:
            assert group.num_keys % granularity == 0
        for number, added in zip(group.sequences, added_to_scores(group), strict=True):
            span = spans[number]
            for i in range(span.length):
                query = span.past + i
                seen = [k <= query and (window is None or k > query - window) for k in range(group.num_keys)]
                assert (added[i] > -torch.inf).tolist() == seen
                expected = span.start + 0.01 * (torch.arange(group.num_keys) - query) if is_biased else 0.0
                assert ((added[i] - expected).abs()[seen] < 1e-5).all()


@given(span_lists)
def test_only_sequences_without_a_past_need_no_cache(spans):
    for group in plan_groups(spans, None, 1, CPU, DTYPE):
        assert group.is_fresh == all(spans[n].past == 0 for n in group.sequences)
        assert not group.is_fresh or group.num_keys == group.num_new


@given(span_lists)
def test_no_long_sequence_pads_another_to_more_than_twice_its_length(spans):
    for group in plan_groups(spans, None, 1, CPU, DTYPE):
        shortest = min(spans[n].num_keys for n in group.sequences)
        assert group.num_keys <= max(64, 2 * shortest)


@pytest.mark.parametrize(
    ("lengths_and_pasts", "sequences"),
    [
        ([(1, 10), (1, 11), (1, 63)], [(0, 1, 2)]),
        ([(1, 4000), (1, 100), (1, 3000), (1, 90)], [(0, 2), (1, 3)]),
        ([(4, 9), (1, 9), (4, 9)], [(0,), (2,), (1,)]),
        ([(4, 0), (4, 0), (5, 0), (4, 0)], [(0, 1), (2,), (3,)]),
    ],
)
def test_sequences_go_together_where_little_is_padded(lengths_and_pasts, sequences):
    groups = plan_groups(spans_of(lengths_and_pasts), None, 1, CPU, DTYPE)
    assert [group.sequences for group in groups] == sequences


def test_one_sequence_alone_needs_neither_mask_nor_index():
    (decoding,) = plan_groups([Span(0, 1, 15)], None, 16, CPU, DTYPE)
    (prompt,) = plan_groups([Span(0, 9)], None, 16, CPU, DTYPE)
    for group in (decoding, prompt):
        assert isinstance(group.tokens, slice)
        assert group.mask is None


@given(span_lists, st.sampled_from([1, 16]), st.data())
def test_every_token_sees_all_keys_of_the_other_stack(spans, granularity, data):
    lengths = [data.draw(st.integers(1, 200)) for _ in spans]
    groups = plan_cross_groups(spans, lengths, granularity, CPU, DTYPE)
    assert_groups_cover(groups, spans)
    for group in groups:
        assert group.num_keys % granularity == 0
        for number, added in zip(group.sequences, added_to_scores(group), strict=True):
            seen = [key < lengths[number] for key in range(group.num_keys)]
            assert (added > -torch.inf).tolist() == [seen] * group.num_new


def test_whole_inputs_are_seen_in_both_directions():
    spans = spans_of([(3, 0), (3, 0), (2, 0)])
    groups = plan_two_way_groups(spans, CPU, bias)
    assert [group.sequences for group in groups] == [(0, 1), (2,)]
    for group in groups:
        for number, added in zip(group.sequences, added_to_scores(group), strict=True):
            places = torch.arange(group.num_keys)
            expected = spans[number].start + 0.01 * (places[None, :] - places[:, None])
            torch.testing.assert_close(added, expected)
