"""What an installation can do here: each thing with what to do about it when something is wrong."""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from moemerge import __version__
from moemerge.bench.machine import describe_machine, usable_cores
from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.disk import free_bytes
from moemerge.checkpoint.hub import cache_folder
from moemerge.checkpoint.hub_access import ask_hub
from moemerge.checkpoint.sizes import format_size
from moemerge.models.products import can_pack

_EXTRAS = ("serve", "report")
_LITTLE_MEMORY = 4 * 2**30
_LITTLE_DISK = 10 * 10**9
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        level: `ok`; `warning`: something is slower or missing; `error`: commands will fail.
        found: What is there.
        fix: What to do about it.
    """

    name: str
    level: Literal["ok", "warning", "error"]
    found: str
    fix: str = ""


def check_environment(*, offline: bool = False) -> list[Check]:
    """Look at everything that moemerge depends on; `offline` leaves the hub alone."""
    checks: list[Callable[[], Iterator[Check]]] = [
        _check_program,
        _check_extras,
        _check_torch,
        _check_processors,
        _check_accelerators,
        _check_memory,
        _check_disks,
        *([] if offline else [_check_hub]),
    ]
    return [check for look in checks for check in look()]


def _check_program() -> Iterator[Check]:
    where = Path(__file__).parents[1]
    machine = f"{platform.system()} {platform.machine()}"
    found = f"{__version__} in {where}, Python {platform.python_version()}, {machine}"
    yield _ok("moemerge", found)


def _check_extras() -> Iterator[Check]:
    for extra in _EXTRAS:
        missing = [name for name in _requirements(extra) if not _is_installed(name)]
        if missing:
            found = f"not installed: {', '.join(missing)}"
            yield _warning(f"extra {extra}", found, f'pip install "moemerge[{extra}]"')
        else:
            yield _ok(f"extra {extra}", "installed")


def _requirements(extra: str) -> list[str]:
    """Distributions that an extra names, as this installation's own metadata says."""
    lines = importlib.metadata.requires("moemerge") or []
    found = (re.match(rf"([\w.-]+).*\bextra\s*==\s*['\"]{extra}['\"]", line) for line in lines)
    return [match[1] for match in found if match]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_torch() -> Iterator[Check]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    values = torch.arange(256.0).view(16, 16)
    begin = time.perf_counter()
    is_right = bool((values @ torch.eye(16) == values).all())
    found = f"{torch.__version__}, built for {build}"
    if not is_right:
        yield _error("torch", f"{found}; a product of matrices is wrong", "Install torch again")
    elif time.perf_counter() - begin > 1:
        yield _warning("torch", f"{found}; a small product takes over a second", "Is the machine overloaded?")
    else:
        yield _ok("torch", found)


def _check_processors() -> Iterator[Check]:
    machine = describe_machine(torch.get_num_threads(), "cpu")
    cores, threads = len(usable_cores()), torch.get_num_threads()
    found = f"{machine['processor']}, {cores} processors usable, torch uses {threads} threads"
    found += ", computes in bf16" if can_pack(torch.bfloat16, torch.device("cpu")) else ""
    if threads > cores:
        yield _warning("processors", found, f"export OMP_NUM_THREADS={cores}: threads wait for each other")
    elif threads < cores // 2:
        named = os.environ.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS={named} limits it" if named else "Something limits it"
        yield _warning("processors", found, f"{why}; more threads are faster")
    else:
        yield _ok("processors", found)


def _check_accelerators() -> Iterator[Check]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield _ok(f"cuda:{index}", f"{name}, {format_size(free)} of {format_size(total)} free")
    elif _NVIDIA.exists():
        fix = "Update the driver" if torch.version.cuda else "Install a build of torch with CUDA"
        yield _warning("accelerator", "an NVIDIA driver is there, torch cannot use it", f"{fix}: pytorch.org")
    else:
        yield _ok("accelerator", "none; the CPU computes")


def _check_memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{format_size(memory.available)} of {format_size(memory.total)} free"
    limit = _container_limit()
    if limit is not None and limit < memory.total:
        found += f", this container may use {format_size(limit)}"
        yield _warning("memory", found, f"Pass --max-ram {limit * 3 // 4 // 2**20}MiB to merge and calibrate")
    elif memory.available < _LITTLE_MEMORY:
        yield _warning("memory", found, "End other programs, or pass --max-ram to stay within what is free")
    else:
        yield _ok("memory", found)


def _container_limit() -> int | None:
    for name in _CGROUP_LIMITS:
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _check_disks() -> Iterator[Check]:
    places = {"disk": Path.cwd(), "hub cache": cache_folder(), "conversions": default_cache()}
    for name, folder in places.items():
        existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
        found = f"{format_size(free_bytes(folder))} free in {folder}"
        move = {"disk": "Work in another folder", "hub cache": "Set HF_HOME to another folder"}
        fix = move.get(name, "Set XDG_CACHE_HOME to another folder")
        if not os.access(existing, os.W_OK):
            level = _warning if name == "conversions" else _error
            yield level(name, f"{found}, cannot be written", fix)
        elif free_bytes(folder) < _LITTLE_DISK:
            yield _warning(name, found, f"Free some space. {fix}")
        else:
            yield _ok(name, found)


def _check_hub() -> Iterator[Check]:
    access = ask_hub()
    if access.problem:
        fix = (
            "Log in again with `hf auth login`"
            if access.seconds is not None
            else "Use --offline, or local folders"
        )
        yield _warning("hub", f"{access.address}: {access.problem}", fix)
        return
    who = f"logged in as {access.user}" if access.user else "no token: public repositories only"
    yield _ok("hub", f"{access.address} answers in {1000 * (access.seconds or 0):.0f} ms, {who}")


def _ok(name: str, found: str) -> Check:
    return Check(name=name, level="ok", found=found)


def _warning(name: str, found: str, fix: str) -> Check:
    return Check(name=name, level="warning", found=found, fix=fix)


def _error(name: str, found: str, fix: str) -> Check:
    return Check(name=name, level="error", found=found, fix=fix)
