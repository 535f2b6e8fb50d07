"""What several end-to-end tests need: a bundle that is served, and a hub on the loopback interface."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.hub_server import HubServer

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini"


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory):
    """The shipped family, bit for bit."""
    folder = tmp_path_factory.mktemp("mini") / "mini.moe"
    names = ("code", "scripture", "sums")
    merge(open_variants({name: FolderRef(MINI / name) for name in names}), folder, options_of("exact"))
    return folder


@pytest.fixture(scope="session")
def session():
    """The client's connections, which take a tenth of a second to set up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        huggingface_hub.get_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture
def server(tmp_path, monkeypatch, session):
    """A hub that knows nobody, an empty cache, and no waiting between attempts."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    waits: list[float] = []
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(
            f"huggingface_hub.{module}.time", SimpleNamespace(sleep=waits.append, time=lambda: 0.0)
        )
    with HubServer() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
