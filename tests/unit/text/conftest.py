"""Engines whose answers are read as text."""

import pytest

from tests.bundles import open_engine, write_bundle


@pytest.fixture(scope="session", params=["mixtral", "switch_transformers"])
def served(request, tmp_path_factory):
    """A bundle of either kind of model."""
    return write_bundle(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def engine(served):
    engine = open_engine(served, dtype="float32", max_batch=4)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def decoder_engine(tmp_path_factory):
    """An engine of a decoder-only family."""
    engine = open_engine(write_bundle(tmp_path_factory.mktemp("decoder")), dtype="float32", max_batch=4)
    yield engine
    engine.close()
