"""The soak runs, and what it finds out is checked by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize("policy", ["mixed", "grouped"])
def test_a_few_seconds_under_load_leave_every_answer_right(policy):
    done = subprocess.run(
        [sys.executable, SOAK, "--minutes", "0.05", "--streams", "60", "--prompts", "3", "--policy", policy],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines()[2:])
    assert table["violations"] == "0"
    assert all(int(table[name]) > 0 for name in ("output tokens", "swaps", "preemptions", "cancelled"))
