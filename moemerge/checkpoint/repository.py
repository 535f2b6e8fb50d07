"""The files of a checkpoint, wherever they are: a protocol and the local folder.

`checkpoint.hub` has the same for a hub repository that is not downloaded.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.errors import DamagedInput, NotFound, UnsupportedCheckpoint

MAX_TEXT_BYTES = 64 * 2**20


class Repository(Protocol):
    """Lists files, reads small ones, and reads headers of large ones."""

    @property
    def label(self) -> str:
        """How messages name it."""

    @property
    def origin(self) -> str:
        """How plans and cards name it: repository and full commit, or the folder's name alone."""

    def files(self) -> dict[str, int]:
        """Sizes in bytes by file name, top level only."""

    def read_bytes(self, name: str) -> bytes:
        """A small file."""

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Tensors of a safetensors file."""


class LocalFolder:
    """A checkpoint folder on this machine."""

    def __init__(self, path: Path, label: str | None = None, origin: str | None = None) -> None:
        if not path.exists():
            raise NotFound(f"{path}: no such folder")
        if not path.is_dir():
            raise UnsupportedCheckpoint(f"{path}: not a checkpoint: expected a folder with config.json")
        # Work on other nodes reads the same paths, from other folders.
        self.path = path.absolute()
        self._label = label or str(path)
        self._origin = origin or f"local:{path.resolve().name}"

    @property
    def label(self) -> str:
        """The path, or the repository it was pulled from."""
        return self._label

    @property
    def origin(self) -> str:
        """See `Repository.origin`; paths of this machine concern nobody else."""
        return self._origin

    def files(self) -> dict[str, int]:
        """Sizes of the files in the folder itself."""
        try:
            return {item.name: item.stat().st_size for item in sorted(self.path.iterdir()) if item.is_file()}
        except PermissionError as error:
            raise NotFound(f"{self.path}: cannot be listed ({error.strerror})") from error

    def read_bytes(self, name: str) -> bytes:
        """A small file.

        Raises:
            NotFound, DamagedInput: Missing, unreadable, or larger than any text file of a checkpoint.
        """
        path = self.path / name
        try:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise DamagedInput(f"{path}: larger than {MAX_TEXT_BYTES} bytes; not a configuration file")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"{path}: no such file") from error
        except PermissionError as error:
            raise NotFound(f"{path}: cannot be read ({error.strerror})") from error

    def header(self, name: str) -> dict[str, StoredTensor]:
        """Tensors of one of the folder's safetensors files."""
        return read_header(self.path / name)


def read_json(repository: Repository, name: str) -> dict[str, Any]:
    """An object from a JSON file of the repository.

    Raises:
        DamagedInput: Not JSON, or not an object.
    """
    where = f"{repository.label}/{name}"
    raw = repository.read_bytes(name)
    if raw.startswith(b"version https://git-lfs"):
        raise DamagedInput(f"{where}: a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedInput(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DamagedInput(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
