"""Bundles that several end-to-end tests serve."""

from pathlib import Path

import pytest

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.recipe import options_of
from moemerge.refs import FolderRef

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini"


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory):
    """The shipped family, bit for bit."""
    folder = tmp_path_factory.mktemp("mini") / "mini.moe"
    names = ("code", "scripture", "sums")
    merge(open_variants({name: FolderRef(MINI / name) for name in names}), folder, options_of("exact"))
    return folder
