"""Blocks are given out and taken back, and none gets lost."""

import pytest

from moemerge.runner.blocks import BlockPool, BlockTable, Owner

ONE, OTHER = Owner("bundle", "one", 0), Owner("bundle", "other", 0)


def test_a_table_grows_by_what_it_lacks():
    pool, table = BlockPool(5, block_tokens=4), BlockTable(ONE)
    held = []
    for num_tokens, blocks in ((0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (16, 4)):
        assert pool.missing(table, num_tokens) == max(0, blocks - len(held))
        pool.grow(table, num_tokens)
        assert len(table.blocks) == blocks
        assert table.blocks[: len(held)] == held, "what is written stays where it is"
        held = list(table.blocks)
        pool.verify_integrity([table])
    assert (pool.num_used, pool.num_free) == (4, 1)


def test_there_is_no_more_than_there_is():
    pool, one, other = BlockPool(3, block_tokens=2), BlockTable(ONE), BlockTable(OTHER)
    pool.grow(one, 4)
    assert pool.can_grow(other, 2)
    assert not pool.can_grow(other, 3)
    pool.release(one)
    assert not one.blocks
    assert pool.can_grow(other, 6)
    pool.grow(other, 6)
    assert pool.num_free == 0


def test_released_blocks_serve_the_next_owner_and_only_once():
    pool, one, other = BlockPool(4, block_tokens=1), BlockTable(ONE), BlockTable(OTHER)
    pool.grow(one, 2)
    pool.release(one)
    pool.release(one)
    pool.grow(other, 2)
    pool.grow(one, 2)
    assert not set(one.blocks) & set(other.blocks)
    pool.verify_integrity([one, other])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda pool, one, other: one.blocks.pop(), "held by nobody"),
        (lambda pool, one, other: one.blocks.append(other.blocks[0]), "two tables"),
        (lambda pool, one, other: setattr(one, "owner", OTHER), "another owner"),
        (lambda pool, one, other: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool, one, other: pool._free.pop(), "lost"),
    ],
)
def test_integrity_check_finds(damage, complaint):
    pool, one, other = BlockPool(6, block_tokens=2), BlockTable(ONE), BlockTable(OTHER)
    pool.grow(one, 3)
    pool.grow(other, 3)
    pool.verify_integrity([one, other])
    damage(pool, one, other)
    with pytest.raises(AssertionError, match=complaint):
        pool.verify_integrity([one, other])


def test_revisions_of_a_variant_are_owners_of_their_own():
    pool, table = BlockPool(2, block_tokens=2), BlockTable(ONE)
    pool.grow(table, 2)
    with pytest.raises(AssertionError, match="another owner"):
        pool.verify_integrity([BlockTable(ONE._replace(revision=1), table.blocks)])
