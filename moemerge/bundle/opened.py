"""A model to look at, be it a checkpoint or a variant of a bundle: its tensors by canonical name.

Canonical names do not depend on layout or family: the role of a non-expert tensor, and
`experts.<layer>.<slot>.<part>`. Knows nothing of what anybody wants to see.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moemerge.bundle.export import Exported, effective_parts
from moemerge.bundle.reader import Bundle, is_bundle, open_bundle
from moemerge.checkpoint.checkpoint import EXPERTS, Checkpoint, expert_name
from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.family import Family, Settings
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import licence_files, side_files
from moemerge.checkpoint.variants import open_readable
from moemerge.progress import Progress
from moemerge.refs import FolderRef, SourceRef, VariantRef


@dataclass(frozen=True)
class OpenedModel:
    """Tensors of a model, each as a place in a file or as what makes it.

    Attributes:
        label: How messages name it.
        family: Its description.
        settings: Canonical settings, complete.
        tensors: By canonical name.
        files: Places of configuration, tokenizer, template and licence by name, as far as they are local.
    """

    label: str
    family: Family
    settings: Settings
    tensors: dict[str, Exported]
    files: dict[str, Path]

    @property
    def num_experts(self) -> int:
        """Slots per routed layer, E; 0 in a dense model."""
        return int(self.settings.get("num_experts") or 0)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts, as a checkpoint would hold them."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name.startswith(EXPERTS))

    @cached_property
    def other_bytes(self) -> int:
        """Bytes of all non-expert tensors."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if not name.startswith(EXPERTS))

    def dtype_bytes(self) -> dict[str, int]:
        """Bytes per dtype, largest first."""
        totals: dict[str, int] = {}
        for tensor in self.tensors.values():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def num_parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token uses."""
        counts = {True: 0, False: 0}
        for name, tensor in self.tensors.items():
            counts[name.startswith(EXPERTS)] += math.prod(tensor.shape)
        per_token = int(self.settings.get("num_experts_per_token") or 0)
        used = counts[True] * per_token // self.num_experts if self.num_experts else 0
        return counts[True] + counts[False], counts[False] + used

    def ties(self) -> dict[str, str]:
        """Roles that share their tensor with another role."""
        patterns = [pattern for pattern in self.family.tensors if pattern.tied_to]
        is_tied = bool(self.settings.get("tied_head"))
        return {pattern.role: str(pattern.tied_to) for pattern in patterns if is_tied}


def open_models(
    ref: SourceRef | VariantRef,
    *,
    offline: bool = False,
    download: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, OpenedModel]:
    """The model that a reference names, under an empty name; of a bundle all variants by name.

    Raises:
        MoemergeError: As `open_bundle`, `open_readable` and `Source.apply`.
    """
    if isinstance(ref, VariantRef):
        return {"": variant_model(open_bundle(ref.folder), ref.variant)}
    if isinstance(ref, FolderRef) and is_bundle(ref.path):
        bundle = open_bundle(ref.path)
        return {name: variant_model(bundle, name) for name in bundle.manifest.variants}
    source = open_readable(
        ref, offline=offline, download=download, allow_pickle=allow_pickle, progress=progress
    )
    checkpoint = source.apply(default_cache(), progress) if source.is_local else source.open()
    return {"": checkpoint_model(checkpoint)}


def checkpoint_model(checkpoint: Checkpoint) -> OpenedModel:
    """A checkpoint as a model to look at."""
    tensors: dict[str, Exported] = dict(checkpoint.by_name())
    names = [*side_files(checkpoint.repository), *licence_files(checkpoint.repository)]
    places = {name: checkpoint.side_file(name) for name in names}
    files = {name: path for name, path in places.items() if path}
    return OpenedModel(checkpoint.label, checkpoint.family, checkpoint.settings, tensors, files)


def variant_model(bundle: Bundle, variant: str) -> OpenedModel:
    """A variant of a bundle as a model to look at, with the experts that its slots compute with.

    Raises:
        NotFound: No such variant.
        DamagedBundle: Something the manifest names is missing.
    """
    entry = bundle.variant(variant)
    tensors: dict[str, Exported] = dict(bundle.tensors(variant))
    for layer in bundle.manifest.layers:
        for slot, parts in enumerate(effective_parts(bundle, variant, layer.index)):
            tensors |= {expert_name(layer.index, slot, part): tensor for part, tensor in parts.items()}
    places = {name: bundle.side_file(variant, name) for name in entry.files}
    files = {name: path for name, path in places.items() if path}
    return OpenedModel(f"{bundle.folder}:{variant}", bundle.family, entry.settings, tensors, files)


def is_readable(tensor: Exported) -> bool:
    """Whether a tensor's values can be read without a download."""
    return not isinstance(tensor, StoredTensor) or tensor.is_local
