"""Factorisations whose last digits do not depend on how many threads compute.

LAPACK cuts a matrix into as many pieces as it has threads, and rounds accordingly; a plan made of such
numbers would differ from machine to machine, and a continued merge from the one that was interrupted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for a moment; also for use as a decorator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
