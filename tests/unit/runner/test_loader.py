"""Transfers on the loader's thread: one at a time, and errors come back."""

import threading
from dataclasses import replace

import pytest
import torch

from moemerge.errors import DamagedInput
from moemerge.runner.loader import Loader
from moemerge.runner.transfer import Transfer
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES

CPU = torch.device("cpu")
PATIENCE_S = 10.0


@pytest.fixture
def loader():
    loader = Loader(CPU)
    yield loader
    loader.close()


def test_a_transfer_is_carried_out_and_told_once(loader, mixtral_bundle):
    store = WeightStore(mixtral_bundle, NAMES, torch.float32, CPU)
    for name in NAMES:
        transfer = store.prepare(name)
        loader.start(transfer)
        assert loader.current is transfer
        loader.wait(PATIENCE_S)
        swap = loader.poll()
        assert (swap.variant, swap.moved_bytes) == (name, transfer.moved_bytes)
        assert loader.current is None
        assert loader.poll() is None
        store.finish(transfer)
    store.verify_integrity(NAMES)


class SlowTransfer(Transfer):
    """One that waits for a sign."""

    go_on = threading.Event()

    def carry_out(self):
        assert self.go_on.wait(PATIENCE_S)
        return super().carry_out()


def test_nothing_waits_for_a_transfer_that_is_under_way(loader):
    SlowTransfer.go_on.clear()
    loader.start(SlowTransfer("plain", (), (), 0, 0))
    assert loader.poll() is None
    loader.wait(0.01)
    assert loader.poll() is None
    SlowTransfer.go_on.set()
    loader.wait(PATIENCE_S)
    assert loader.poll().variant == "plain"


class FailingTransfer(Transfer):
    def carry_out(self):
        raise DamagedInput("the disk is gone")


def test_an_error_comes_back_once_and_the_thread_lives_on(loader):
    for _ in range(2):
        loader.start(FailingTransfer("plain", (), (), 0, 0))
        loader.wait(PATIENCE_S)
        with pytest.raises(DamagedInput, match="the disk is gone"):
            loader.poll()
        assert loader.current is None
        loader.start(Transfer("plain", (), (), 0, 7))
        loader.wait(PATIENCE_S)
        assert replace(loader.poll(), seconds=0.0).kept_bytes == 7


def test_closing_waits_for_the_transfer_under_way_and_may_be_repeated():
    SlowTransfer.go_on.set()
    loader = Loader(CPU)
    loader.close()
    loader.start(SlowTransfer("plain", (), (), 0, 0))
    loader.close()
    assert loader.poll() is not None
    loader.close()
