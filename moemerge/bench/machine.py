"""The machine a run was made on: its hardware, who else uses it, and the memory of processes."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

from moemerge import __version__
from moemerge.errors import Busy

MAX_OTHERS = 0.05
"""Largest share of the machine's processors that other programs may use during a run."""
MAX_STEAL = 0.05
"""Largest share of time that the host may take away."""
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


Result = TypeVar("Result")


class Load(NamedTuple):
    """Share of the machine's processor time in some interval."""

    others: float
    steal: float

    @property
    def is_calm(self) -> bool:
        """Whether what was measured meanwhile can be believed."""
        return self.others <= MAX_OTHERS and self.steal <= MAX_STEAL

    def __str__(self) -> str:
        return (
            f"other programs used {self.others:.0%} of the processors (at most {MAX_OTHERS:.0%}), the host "
            f"took {self.steal:.0%} (at most {MAX_STEAL:.0%})"
        )


@dataclass(frozen=True, slots=True)
class LoadMeter:
    """Measures the load from when it is made; what this process and its children use does not count."""

    busy_s: float
    steal_s: float
    total_s: float
    own_s: float

    @classmethod
    def start(cls) -> "LoadMeter":
        """Begin to measure."""
        return cls(*_clocks())

    def stop(self) -> Load:
        """The load since then."""
        busy_s, steal_s, total_s, own_s = _clocks()
        total = total_s - self.total_s
        if total <= 0:
            return Load(0.0, 0.0)
        # The clocks tick in hundredths of a second and are not read at one moment.
        others = max(0.0, (busy_s - self.busy_s) - (own_s - self.own_s))
        return Load(others / total, max(0.0, steal_s - self.steal_s) / total)


_REPEATS = 2
_PAUSE_S = 5.0


class Watch:
    """Makes measurements again when others used the machine meanwhile, and knows whether all were calm."""

    def __init__(self, say: Callable[[str], None], *, allow_busy: bool) -> None:
        """Take care of measurements.

        Args:
            say: Told when a measurement is repeated.
            allow_busy: Go on with disturbed measurements, which are then marked.
        """
        self._say, self._allow_busy = say, allow_busy
        self.is_calm = True

    def check(self, seconds: float = 1.0) -> None:
        """Look at the machine before anything is measured.

        Raises:
            Busy: Others use it.
        """
        self._accept(watch_load(seconds))

    def measure(self, action: Callable[[], Result]) -> tuple[Result, Load, int]:
        """What an action returns, the load meanwhile, and how often it had to be repeated.

        Raises:
            Busy: Others used the machine each time.
        """
        for repeat in range(_REPEATS + 1):
            meter = LoadMeter.start()
            result = action()
            load = meter.stop()
            if load.is_calm or self._allow_busy or repeat == _REPEATS:
                break
            self._say(f"again, because {load}")
            time.sleep(_PAUSE_S)
        self._accept(load)
        return result, load, repeat

    def _accept(self, load: Load) -> None:
        if load.is_calm:
            return
        if not self._allow_busy:
            raise Busy(
                f"the machine is too busy to measure: {load}. Run it again when nothing else runs, or give "
                f"--allow-busy for figures that are marked as not valid"
            )
        self.is_calm = False


def watch_load(seconds: float) -> Load:
    """The load while this process waits."""
    meter = LoadMeter.start()
    time.sleep(seconds)
    return meter.stop()


def _clocks() -> tuple[float, float, float, float]:
    times = psutil.cpu_times()
    steal = float(getattr(times, "steal", 0.0))
    idle = times.idle + float(getattr(times, "iowait", 0.0))
    # Guests are part of user and nice already.
    guests = float(getattr(times, "guest", 0.0)) + float(getattr(times, "guest_nice", 0.0))
    total = float(sum(times)) - guests
    return total - idle - steal, steal, total, _own_seconds()


def _own_seconds() -> float:
    """Processor time of this process, of its living descendants, and of children it has waited for."""
    seconds = 0.0
    process = psutil.Process()
    for member in (process, *process.children(recursive=True)):
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
        seconds += float(getattr(times, "children_user", 0.0)) + float(getattr(times, "children_system", 0.0))
    return seconds


class Memory(NamedTuple):
    """Memory of some processes together.

    Attributes:
        peak_rss_bytes: Sum of the largest resident sizes; shared pages count for each.
        pss_bytes: Sum at one moment, shared pages divided among their users.
    """

    peak_rss_bytes: int
    pss_bytes: int


def measure_memory(process_ids: Sequence[int]) -> Memory:
    """Memory of running processes; without Linux the resident size stands for both."""
    peaks = shares = 0
    for process_id in process_ids:
        try:
            status = Path(f"/proc/{process_id}/status").read_text()
            rollup = Path(f"/proc/{process_id}/smaps_rollup").read_text()
            peaks += _kilobytes(status, "VmHWM:")
            shares += _kilobytes(rollup, "Pss:")
        except OSError:
            resident = psutil.Process(process_id).memory_info().rss
            peaks, shares = peaks + resident, shares + resident
    return Memory(peaks, shares)


def _kilobytes(text: str, key: str) -> int:
    line = next(line for line in text.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def describe_machine(threads: int, device: str) -> dict[str, str | int]:
    """Hardware and software, as far as figures depend on it."""
    name, flags = _processor()
    described: dict[str, str | int] = {
        "processor": name,
        "flags": " ".join(flag for flag in _FLAGS if flag in flags),
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moemerge": __version__,
        "commit": _commit(),
    }
    if device.startswith("cuda"):
        described["accelerator"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), set(flags.split())


def _commit() -> str:
    """Commit of the checkout this package is in, marked when files differ; "unknown" without one."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}{' with changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 (fixed arguments)
        ["git", "-C", os.fspath(folder), *arguments],  # noqa: S607 (whichever git the user has)
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def usable_cores() -> tuple[int, ...]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(psutil.cpu_count() or 1))
