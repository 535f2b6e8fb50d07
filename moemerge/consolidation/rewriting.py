"""A bundle made of another one's files: what stays is linked or copied, what changes is written anew.

Knows nothing of why something changes. What is read in order to be written again is compared with its hash
before, so that damage is never signed as if it were right.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemerge.bundle.card import write_card
from moemerge.bundle.manifest import (
    CARD,
    CHECKSUMS,
    MANIFEST,
    QUANTISED_POOL,
    RESIDUALS,
    Manifest,
    PoolLayer,
    VariantEntry,
    check_path,
    dump_manifest,
)
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.bundle.replacing import recover_folder
from moemerge.bundle.target import check_target, check_writable, locked
from moemerge.bundle.verify import NOT_OURS, read_checksums
from moemerge.bundle.writer import write_bytes, write_checksums
from moemerge.checkpoint.digest import hash_file
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.writer import replacing
from moemerge.consolidation.staging import Staging, is_published, open_staging
from moemerge.errors import Busy, DamagedBundle, InvalidRecipe

_WRITTEN_ANEW = {MANIFEST, CARD}
_COPY_BYTES = 2**30
_NO_CLONES = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A bundle that is to be changed.

    Attributes:
        bundle: Opened.
        target: Where the changed one appears.
        sums: SHA-256 of its files by path, as it says itself.
        links: Whether files that stay are linked, not copied.
    """

    bundle: Bundle
    target: Path
    sums: Mapping[str, str]
    links: bool

    @property
    def replaces(self) -> bool:
        """Whether the changed bundle takes the place of the old one."""
        return self.target == self.bundle.folder

    def kept_bytes(self) -> int:
        """What files that stay take a second time."""
        return 0 if self.links else sum((self.bundle.folder / name).stat().st_size for name in self.sums)

    def check_room(self, added_bytes: int) -> None:
        """Make sure that the disk takes the changed bundle.

        Raises:
            NotEnoughRoom: It does not.
        """
        check_disk(self.target.parent, self.kept_bytes() + added_bytes, f"writing {self.target}")

    def require_intact(self, files: Iterable[str]) -> None:
        """Compare files with their hashes.

        Raises:
            DamagedBundle: One was changed.
        """
        for name in sorted(set(files)):
            if hash_file(self.bundle.folder / name) != self.sums[name]:
                raise DamagedBundle(
                    f"{self.bundle.folder / name}: was changed since it was written. Copy or build the "
                    f"bundle again"
                )


def open_origin(folder: Path, target: Path | None, *, link: bool = False) -> Origin:
    """A bundle that is to be changed, and where to.

    Files that stay are linked where the old bundle disappears: nobody else has them then. A new bundle
    beside it gets copies, because an edit of one would change both; where the file system can clone they are
    as cheap.

    Args:
        folder: The bundle.
        target: The changed one; None for the same place.
        link: Link in any case.

    Raises:
        NotFound, UnsupportedCheckpoint, DamagedBundle: It cannot be read.
        InvalidRecipe: The target exists, or files would be lost that are not the bundle's.
        NotEnoughRoom: The target cannot be written.
    """
    folder = folder.resolve()
    if not folder.exists() and folder.parent.is_dir():
        with locked(folder):
            recover_folder(folder)
    place = folder if target is None else target.absolute()
    bundle = open_bundle(folder)
    if place == folder:
        check_writable(folder / MANIFEST)
        check_writable(folder.with_name(f".{folder.name}.lock"))
    else:
        check_target(place)
    sums = read_checksums(folder)
    origin = Origin(bundle=bundle, target=place, sums=sums, links=link or place == folder)
    _require_whole(origin)
    return origin


@dataclass(slots=True)
class Rewriting:
    """A changed bundle in the making.

    Attributes:
        origin: What is changed.
        staging: Where it is made.
        kept: Old path by new path, of files that stay.
        written: SHA-256 by path of what was written beside the steps of the journal.
    """

    origin: Origin
    staging: Staging
    kept: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def step(self, name: str, write: Callable[[], tuple[dict[str, str], dict[str, Any]]]) -> dict[str, Any]:
        """Do a step unless a run before finished it; returns its result."""
        done = self.staging.finished(name)
        if done is None:
            files, done = write()
            self.staging.finish(name, files, done)
        return done

    def keep(self, names: Iterable[str]) -> None:
        """Files that stay where they are."""
        self.kept |= {name: name for name in names if name not in _WRITTEN_ANEW}

    def place_kept(self) -> None:
        """Put every file that stays into the new bundle."""
        for new, old in sorted(self.kept.items()):
            _place(self.origin.bundle.folder / old, self.staging.folder / new, link=self.origin.links)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write manifest, card and hashes, and let the bundle appear."""
        checked = Manifest.model_validate(manifest.model_dump(by_alias=True))
        folder = self.staging.folder
        digests = {new: self.origin.sums[old] for new, old in self.kept.items()}
        digests |= {name: digest for name, digest in self.staging.files().items() if is_published(name)}
        digests |= self.written
        digests |= write_bytes(folder, MANIFEST, dump_manifest(checked).encode())
        digests |= write_bytes(folder, CARD, write_card(checked).encode())
        write_checksums(folder, digests)
        _require_same(self.origin)
        self.staging.publish(self.origin.target, {*digests, CHECKSUMS}, replaces=self.origin.replaces)
        return checked


@contextmanager
def open_rewriting(origin: Origin, task: str, *, restart: bool = False) -> Iterator[Rewriting]:
    """Work on a changed bundle; what a killed run has finished is there again.

    Raises:
        Busy: Another process works on the same target, or has changed the bundle meanwhile.
        NotEnoughRoom, InvalidRecipe: As `open_staging`.
    """
    with open_staging(origin.target, task, restart=restart, replaces=origin.replaces) as staging:
        _require_same(origin)
        yield Rewriting(origin, staging)


def required_features(
    manifest: Manifest, layers: Iterable[PoolLayer], variants: Iterable[VariantEntry]
) -> list[str]:
    """Features that a reader of the changed bundle must know."""
    there = {
        QUANTISED_POOL: any(layer.is_coded for layer in layers),
        RESIDUALS: any(variant.residual_layers for variant in variants),
    }
    others = [name for name in manifest.features.required if name not in there]
    return [*(name for name, is_there in there.items() if is_there), *others]


def _require_whole(origin: Origin) -> None:
    folder, replaces = origin.bundle.folder, origin.replaces
    for name in origin.sums:
        path = folder / _checked(folder, name)
        if path.is_symlink() or not path.is_file():
            raise DamagedBundle(f"{path}: is missing, or no ordinary file. Copy or build the bundle again")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
    strangers = sorted(present - origin.sums.keys() - {CHECKSUMS})
    if replaces and strangers:
        raise InvalidRecipe(
            f"{folder} holds {strangers[0]}, which is no part of the bundle and would be lost. Move it, or "
            f"write a new bundle with -o"
        )
    strangers = [name for name in strangers if name.split("/")[0] not in NOT_OURS]
    if strangers:
        raise DamagedBundle(
            f"{folder / strangers[0]}: is not part of the bundle. See `moemerge verify {folder}`"
        )
    origin.require_intact([MANIFEST])


def _checked(folder: Path, name: str) -> str:
    try:
        return check_path(name)
    except ValueError as error:
        raise DamagedBundle(f"{folder / CHECKSUMS}: {error}") from error


def _require_same(origin: Origin) -> None:
    if read_checksums(origin.bundle.folder) != origin.sums:
        raise Busy(f"{origin.bundle.folder}: was changed by another moemerge just now. Run the command again")


def _place(source: Path, target: Path, *, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(source, target)
            return
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """A copy that shares its blocks with the original where the file system can do that."""
    clone = getattr(os, "copy_file_range", None)
    with source.open("rb") as old, replacing(target) as new:
        try:
            while clone and clone(old.fileno(), new.fileno(), _COPY_BYTES):
                pass
        except OSError as error:
            if error.errno not in _NO_CLONES:
                raise
            clone = None
        if clone is None:
            old.seek(0)
            shutil.copyfileobj(old, new, 2**23)
