"""Copies a variant's tensors into device memory while the engine goes on computing.

One thread of its own with one transfer at a time; on CUDA a copy stream of its own as well.
"""

import queue
import threading
from contextlib import nullcontext

import torch

from moemerge.runner.transfer import Swap, Transfer

Result = Swap | Exception


class Loader:
    """Carries out transfers in the background; used by one thread only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._result: Result | None = None
        self._is_done = threading.Event()
        self._is_free: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self.current: Transfer | None = None

    def start(self, transfer: Transfer) -> None:
        """Begin a transfer; there must be none under way."""
        assert self.current is None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="moemerge-loader", daemon=True)
            self._thread.start()
        self.current = transfer
        if self._device.type == "cuda":
            # The memory may be what a step still under way has just let go.
            self._is_free = torch.cuda.current_stream(self._device).record_event()
        self._is_done.clear()
        self._jobs.put(transfer)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the transfer under way is done, at most so long."""
        if self.current is not None:
            self._is_done.wait(timeout_s)

    def poll(self) -> Swap | None:
        """What the transfer took, once it is done; None while it is not.

        Raises:
            Exception: What went wrong in the copying.
        """
        if self.current is None or not self._is_done.is_set():
            return None
        self.current = None
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def close(self) -> None:
        """End the thread, after the transfer under way."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        is_cuda = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        while (transfer := self._jobs.get()) is not None:
            try:
                if stream is not None and self._is_free is not None:
                    stream.wait_event(self._is_free)
                with torch.cuda.stream(stream) if stream is not None else nullcontext():
                    swap = transfer.carry_out()
                if stream is not None:
                    stream.synchronize()
                self._result = swap
            except Exception as error:  # told to the engine, whose thread raises it
                self._result = error
            self._is_done.set()
