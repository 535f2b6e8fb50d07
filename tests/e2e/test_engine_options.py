"""What `serve`, `run` and `chat` ask of their options and of a bundle's files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.program import call_program


def commands(bundle):
    return {
        "serve": ("serve", bundle, "--port", "0"),
        "run": ("run", bundle, "-v", "code", "for"),
        "chat": ("chat", bundle),
        "verify": ("verify", bundle),
    }


@pytest.mark.parametrize("command", ["serve", "run", "chat"])
@pytest.mark.parametrize("value", ["junk", "", "0", "-1", "0.5", "5XB"])
def test_resident_that_cannot_be_is_named(command, value, mini_bundle):
    done = call_program(*commands(mini_bundle)[command], f"--resident={value}")
    assert done.code == 3
    assert f"--resident {value!r}, expected all, a number of variants" in done.err


@pytest.mark.parametrize("option", ["--device-memory", "--kv-memory"])
@pytest.mark.parametrize("value", ["", "many", "5", "0GiB"])
def test_size_that_cannot_be_is_named(option, value, mini_bundle):
    done = call_program(*commands(mini_bundle)["serve"], option, value)
    assert done.code == 3
    assert f"error: {option}" in done.err
    assert repr(value) in done.err


def test_more_threads_than_processors_could_run_are_refused(mini_bundle):
    done = call_program(*commands(mini_bundle)["serve"], "--threads", "3000000")
    assert done.code == 3
    assert f"--threads 3000000, expected at most {4 * os.cpu_count()}" in done.err
    assert f"{os.cpu_count()} processors" in done.err


@pytest.mark.parametrize("command", ["serve", "run", "chat", "verify"])
@pytest.mark.parametrize(
    "lost", ["pool/*1.safetensors", "variants/code/*.safetensors", "variants/code/config.json"]
)
def test_missing_file_is_a_damaged_bundle_everywhere(command, lost, mini_bundle, tmp_path):
    folder = tmp_path / "x.moe"
    shutil.copytree(mini_bundle, folder)
    path = next(folder.glob(lost))
    path.unlink()
    done = call_program(*commands(folder)[command])
    assert done.code == 8
    assert path.relative_to(folder).as_posix() in done.err
    assert "is missing" in done.err


_ALLOCATE = """
import torch
from moemerge.runner.pages import use_huge_pages
use_huge_pages()
memory = torch.ones(2**23)
flags, begin, end = [], 0, 0
for line in open("/proc/self/smaps"):
    place, _, rest = line.partition(" ")
    if "-" in place:
        begin, end = (int(bound, 16) for bound in place.split("-"))
    if place == "VmFlags:" and begin <= memory.data_ptr() + 2**22 < end:
        flags = rest.split()
print("hg" in flags)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="needs huge pages")
@pytest.mark.parametrize(("setting", "is_huge"), [(None, "True"), ("1", "True"), ("0", "False")])
def test_large_tensors_ask_for_huge_pages_unless_the_user_says_no(setting, is_huge):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("THP_", "GLIBC_"))
    }
    if setting is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = setting
    done = subprocess.run(
        [sys.executable, "-c", _ALLOCATE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == is_huge
