import shutil

import pytest

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.factories import write_siblings


@pytest.fixture(scope="session")
def made_bundle(tmp_path_factory):
    """A bundle of two fine-tunes that share norms and routers of their base."""
    folder = tmp_path_factory.mktemp("bundle")
    write_siblings(folder, names=("a", "b"))
    variants = open_variants({name: FolderRef(folder / name) for name in ("a", "b")})
    merge(variants, folder / "duo.moe", options_of("1.5x", "cluster"))
    return folder / "duo.moe"


@pytest.fixture
def bundle(made_bundle, tmp_path):
    """A fresh copy of it."""
    return shutil.copytree(made_bundle, tmp_path / "duo.moe")
