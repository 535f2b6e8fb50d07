"""Tiny bundles of both kinds of models, made once."""

import pytest

from moemerge.bundle.reader import open_bundle
from tests.bundles import write_bundle


@pytest.fixture(scope="session")
def mixtral_bundle(tmp_path_factory):
    """Decoder-only, float32, exact."""
    return open_bundle(write_bundle(tmp_path_factory.mktemp("mixtral"), "mixtral"))


@pytest.fixture(scope="session")
def half_bundle(tmp_path_factory):
    """The same in bfloat16, the pool half as large."""
    return open_bundle(write_bundle(tmp_path_factory.mktemp("half"), "mixtral", dtype="BF16", budget="2x"))


@pytest.fixture(scope="session")
def switch_bundle(tmp_path_factory):
    """Encoder-decoder, float32, exact."""
    return open_bundle(write_bundle(tmp_path_factory.mktemp("switch"), "switch_transformers"))


@pytest.fixture(scope="session", params=["mixtral", "switch"])
def bundle(request):
    """Each of the two float32 bundles."""
    return request.getfixturevalue(f"{request.param}_bundle")
