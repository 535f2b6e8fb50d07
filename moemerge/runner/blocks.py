"""Which blocks of the key/value cache belong to whom. Numbers only; the tensors are in `cache`."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Owner(NamedTuple):
    """Whose keys and values a block holds; blocks of different owners are never mixed up."""

    bundle: str
    variant: str
    revision: int


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in the order of its tokens."""

    owner: Owner
    blocks: list[int] = field(default_factory=list)


class BlockPool:
    """Blocks of `block_tokens` tokens each, given out and taken back."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners: dict[int, Owner] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_tokens)

    def missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table needs to hold so many tokens."""
        return max(0, self.blocks_for(num_tokens) - len(table.blocks))

    def can_grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether there are enough free blocks for the table to hold so many tokens."""
        return self.missing(table, num_tokens) <= len(self._free)

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Give the table what it needs to hold so many tokens; ask `can_grow` first."""
        for _ in range(self.missing(table, num_tokens)):
            block = self._free.pop()
            self._owners[block] = table.owner
            table.blocks.append(block)

    def release(self, table: BlockTable) -> None:
        """Take all blocks of a table back."""
        for block in reversed(table.blocks):
            del self._owners[block]
            self._free.append(block)
        table.blocks.clear()

    def verify_integrity(self, tables: list[BlockTable]) -> None:
        """Prove that every block is free or in exactly one of these tables, under its owner.

        Raises:
            AssertionError: A block leaked, is held twice, or by another owner.
        """
        held = [(block, table.owner) for table in tables for block in table.blocks]
        assert len({block for block, _ in held}) == len(held), "a block is in two tables"
        assert dict(held) == self._owners, "blocks are held by nobody or by another owner"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert set(self._free) == set(range(self.num_blocks)) - self._owners.keys(), "blocks got lost"
