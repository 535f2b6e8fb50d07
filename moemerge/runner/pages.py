"""Memory pages of tensors."""

import os


def use_huge_pages() -> None:
    """Let torch ask for huge pages for large tensors, which are then read faster.

    It looks at the variable when it first allocates memory, so this comes first. A user's setting counts.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
