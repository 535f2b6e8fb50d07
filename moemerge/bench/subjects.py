"""What is benchmarked: a bundle that is there, or one that is generated, and checkpoints of its variants."""

import math
from collections.abc import Iterable
from pathlib import Path

from moemerge.bench.generated import generate
from moemerge.bench.shapes import find_shape
from moemerge.bench.systems import Subject
from moemerge.bundle.export import export_variant
from moemerge.bundle.manifest import MANIFEST
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.digest import hash_file
from moemerge.checkpoint.headers import StoredTensor
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress


def default_work() -> Path:
    """Where models are kept: `$XDG_CACHE_HOME/moemerge/bench`, by default in `~/.cache`."""
    return default_cache() / "bench"


def generated_subject(
    shape: str, num_variants: int, work: Path, *, seed: int, progress: Progress | None = None
) -> Subject:
    """A generated model of that shape; made unless `work` has it.

    Raises:
        InvalidRecipe: No such shape.
        NotEnoughRoom: The disk is too small.
    """
    generated = generate(find_shape(shape), num_variants, work, seed=seed, progress=progress)
    bundle = open_bundle(generated.bundle)
    return _subject(shape, bundle, tuple(bundle.manifest.variants), generated.checkpoints)


def bundle_subject(
    folder: Path,
    num_variants: int | None,
    work: Path,
    *,
    needs_checkpoints: bool,
    progress: Progress | None = None,
) -> Subject:
    """The first variants of a bundle; exported as checkpoints unless `work` has them, where they are needed.

    Raises:
        InvalidRecipe: The bundle has fewer variants.
        NotFound, DamagedBundle, NotEnoughRoom: As `open_bundle` and `export_variant`.
    """
    bundle = open_bundle(folder)
    names = tuple(bundle.manifest.variants)
    if num_variants is not None and num_variants > len(names):
        raise InvalidRecipe(f"{folder} holds {len(names)} variants, --variants is {num_variants}")
    names = names[:num_variants]
    checkpoints = {}
    if needs_checkpoints:
        home = work / "exports" / hash_file(folder / MANIFEST)[:16]
        checkpoints = {name: home / name for name in names}
        for name, target in checkpoints.items():
            if not target.is_dir():
                export_variant(bundle, name, target, progress=progress)
    return _subject(folder.name, bundle, names, checkpoints)


def _subject(name: str, bundle: Bundle, variants: tuple[str, ...], checkpoints: dict[str, Path]) -> Subject:
    settings = [bundle.variant(variant).settings for variant in variants]
    limits = [int(limit) for one in settings if (limit := one.get("max_positions")) is not None]
    largest = max((bundle.tensors(variant).values() for variant in variants), key=_num_bytes)
    experts = sum(math.prod(shape) for shape in bundle.manifest.parts.values()) * bundle.manifest.num_slots
    return Subject(
        name=name,
        bundle=bundle.folder,
        checkpoints=checkpoints,
        variants=variants,
        is_decoder=bundle.family.arithmetic == "decoder",
        vocab_size=min(int(one["vocab_size"] or 0) for one in settings),
        max_tokens=min(limits, default=None),
        room_tokens=None,
        model_bytes=bundle.manifest.variant_bytes + _num_bytes(largest),
        model_elements=experts * len(bundle.manifest.layers) + sum(math.prod(t.shape) for t in largest),
    )


def _num_bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
