"""Every tensor of a checkpoint, bundle or variant under the name it has in its files, from headers alone."""

from dataclasses import dataclass, replace

from moemerge.bundle.export import exported_tensors
from moemerge.bundle.reader import is_bundle, open_bundle
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.variants import open_readable
from moemerge.checkpoint.weights import read_weight_headers
from moemerge.progress import Progress
from moemerge.refs import FolderRef, SourceRef, VariantRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTensor:
    """One tensor.

    Attributes:
        name: In its file; of a variant, the name that `export` gives it.
        dtype: Safetensors dtype.
        shape: Sizes.
        nbytes: Bytes.
        file: Where it is; None where it has to be computed from codes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str | None


def list_tensors(
    ref: SourceRef | VariantRef,
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[ListedTensor]:
    """All tensors, in the order of files and names; of checkpoints also those that no family describes.

    Raises:
        MoemergeError: Files that are missing, damaged, or of a kind that is not read.
    """
    if isinstance(ref, VariantRef):
        exported = exported_tensors(open_bundle(ref.folder), ref.variant)
        return [
            ListedTensor(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                nbytes=tensor.nbytes,
                file=tensor.path.name if isinstance(tensor, StoredTensor) else None,
            )
            for name, tensor in exported.items()
        ]
    if isinstance(ref, FolderRef) and is_bundle(ref.path):
        bundle = open_bundle(ref.path)
        return [
            _stored(bundle.stored(file, name), file)
            for file in bundle.weight_files
            for name in sorted(bundle.stored_names(file))
        ]
    source = open_readable(
        ref, offline=offline, allow_pickle=allow_pickle, find_base=False, progress=progress
    )
    if source.adapter is None:
        return [_stored(t, t.path.name) for t in read_weight_headers(source.repository).values()]
    return [
        _stored(replace(tensor, name=name), tensor.path.name if tensor.is_local else None)
        for name, tensor in source.open().by_name().items()
    ]


def _stored(tensor: StoredTensor, file: str | None) -> ListedTensor:
    return ListedTensor(
        name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, nbytes=tensor.nbytes, file=file
    )
