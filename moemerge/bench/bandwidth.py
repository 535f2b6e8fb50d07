"""What the memory of the machine can do, measured beside the figures that are compared with it."""

import time
from collections.abc import Callable

import torch

# Larger than any cache, small enough to be had anywhere.
_READ_BYTES = 512 * 2**20
_ROUND_TRIP_BYTES = 256 * 2**20


def read_bandwidth(device: str, *, repeats: int = 5) -> float:
    """Bytes per second at which memory is read: the best of several plain passes over a large buffer."""
    buffer = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=device)
    as_float = buffer.view(torch.float32)
    rates = []
    for threads in {1, torch.get_num_threads()}:
        for view in (buffer, as_float):
            seconds = best_seconds(lambda v=view: v.sum(), device, repeats, threads)  # type: ignore[misc]
            rates.append(_READ_BYTES / seconds)
    return max(rates)


def copy_bandwidth(num_bytes: int, source_device: str, target_device: str, *, repeats: int = 7) -> float:
    """Bytes per second at which buffers of that size are copied: the best of one and of all threads.

    Goes around so many buffers that no cache holds them. Host memory is pinned when the other side is a CUDA
    device.
    """
    num_pairs = max(1, _ROUND_TRIP_BYTES // num_bytes)
    sources = [torch.ones(num_bytes, dtype=torch.uint8, device=source_device) for _ in range(num_pairs)]
    if source_device == "cpu" and target_device != "cpu":
        sources = [source.pin_memory() for source in sources]
    targets = [torch.zeros(num_bytes, dtype=torch.uint8, device=target_device) for _ in range(num_pairs)]

    def copy_all() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    seconds = [
        best_seconds(copy_all, target_device, repeats, threads) for threads in {1, torch.get_num_threads()}
    ]
    return num_bytes * num_pairs / min(seconds)


def best_seconds(action: Callable[[], object], device: str, repeats: int, threads: int) -> float:
    """Shortest time of several runs after one that warms."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            action()
            synchronise(device)
            times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return min(times[1:])


def synchronise(device: str) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
