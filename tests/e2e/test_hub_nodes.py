"""A node of a cluster fetches what work there reads, by the paths that the driver has."""

import pytest

from moemerge.checkpoint import hub
from moemerge.checkpoint.hub_nodes import fetch_path, is_hub_path
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import NotFound
from moemerge.refs import HubRef
from tests.factories import write_checkpoint


def test_missing_file_of_the_cache_is_fetched_to_its_path(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    server.add("org/tiny", folder)
    variants = open_variants({"tiny": HubRef("org/tiny")})
    (path,) = variants.files
    expected = path.read_bytes()
    path.resolve().unlink()
    path.unlink()
    assert is_hub_path(path)
    fetch_path(path)
    assert path.read_bytes() == expected


def test_other_paths_are_not_the_hubs(server, tmp_path):
    assert not is_hub_path(tmp_path / "model.safetensors")
    assert not is_hub_path(hub.cache_folder() / "models--org--tiny" / "blobs" / "00")
    with pytest.raises(NotFound, match="not there any more"):
        fetch_path(tmp_path / "model.safetensors")
