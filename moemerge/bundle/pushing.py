"""Which files of a folder go to the hub: those of a bundle, or of a checkpoint, proven whole first."""

from pathlib import Path

from moemerge.bundle.manifest import CHECKSUMS
from moemerge.bundle.reader import is_bundle
from moemerge.bundle.verify import read_checksums, verify_bundle
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.side_files import find_side_files
from moemerge.checkpoint.weights import INDEX, find_weight_files
from moemerge.progress import Progress


def files_to_push(folder: Path, progress: Progress) -> dict[str, Path]:
    """Files by their path in the repository; whatever else lies in the folder stays.

    Raises:
        DamagedBundle: A bundle is not whole.
        MoemergeError: A checkpoint that cannot be read, as `open_checkpoint`.
    """
    if is_bundle(folder):
        verify_bundle(folder, progress)
        return {name: folder / name for name in [*read_checksums(folder), CHECKSUMS]}
    repository = LocalFolder(folder)
    open_checkpoint(repository)
    index = [INDEX] if INDEX in repository.files() else []
    names = [*find_weight_files(repository), *index, *find_side_files(repository)]
    return {name: folder / name for name in names}
