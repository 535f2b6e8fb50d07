from dataclasses import replace
from pathlib import Path

import pytest

from moemerge.bench.subjects import generated_subject
from moemerge.bench.systems import Placement, Subject


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Three variants of the tiny shape."""
    work: Path = tmp_path_factory.mktemp("bench")
    return replace(generated_subject("tiny", 3, work, seed=0), room_tokens=64)


@pytest.fixture
def placement() -> Placement:
    return Placement(device="cpu", dtype="float32", threads=1, cores=(0,))
