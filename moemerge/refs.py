"""Names of things: experts, and where a checkpoint comes from.

Knows the grammar of references and nothing of files or networks.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moemerge.errors import InvalidRecipe

VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.IGNORECASE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


class ExpertRef(NamedTuple):
    """The expert that a variant has in a slot of a layer (layers count through all stacks)."""

    variant: str
    layer: int
    slot: int

    def __str__(self) -> str:
        return f"{self.variant}:{self.layer}.{self.slot}"


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repository on the hub, `org/name` or `org/name@revision`."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True, slots=True)
class FolderRef:
    """A folder on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


RepositoryRef = HubRef | FolderRef


@dataclass(frozen=True, slots=True)
class AdaptedRef:
    """A checkpoint with an adapter applied to it, `base+adapter`."""

    base: RepositoryRef
    adapter: RepositoryRef

    def __str__(self) -> str:
        return f"{self.base}+{self.adapter}"


SourceRef = RepositoryRef | AdaptedRef


@dataclass(frozen=True, slots=True)
class VariantRef:
    """A variant of a bundle, `folder:variant`."""

    folder: Path
    variant: str

    def __str__(self) -> str:
        return f"{self.folder}:{self.variant}"


def parse_source(text: str) -> SourceRef:
    """The checkpoint that `text` names; `base+adapter` names one with an adapter applied to it.

    A leading `.`, `/` or `~` means a folder, `org/name[@revision]` a hub repository, and anything
    else a folder if it exists. When a relative folder has the form of a repository name and exists,
    the text is ambiguous.

    Raises:
        InvalidRecipe: Empty, ambiguous, or neither form.
    """
    halves = split_adapted(text)
    if halves is None:
        return _parse_plain(text)
    if not all(half.strip() for half in halves):
        raise InvalidRecipe(
            f"{text!r} lacks a half of BASE+ADAPTER; both are a folder or org/name[@revision]"
        )
    base, adapter = halves
    return AdaptedRef(_parse_plain(base), _parse_plain(adapter))


def split_adapted(text: str, folder: Path = Path()) -> tuple[str, str] | None:
    """The two halves of `base+adapter`; None for a reference without a plus, or a folder that has one.

    Args:
        text: The reference.
        folder: Where relative folders start.

    Raises:
        InvalidRecipe: Several signs, of which not exactly one parts two things that can be.
    """
    if "+" not in text or (folder / Path(text).expanduser()).exists():
        return None
    splits = [(text[:place], text[place + 1 :]) for place, sign in enumerate(text) if sign == "+"]
    if len(splits) > 1:
        splits = [halves for halves in splits if all(_can_be(half, folder) for half in halves)]
    if len(splits) != 1:
        raise InvalidRecipe(
            f"{text!r} has several plus signs, and {len(splits)} of them stand between two folders or "
            f"repositories; expected BASE+ADAPTER. Give folders names without a plus"
        )
    return splits[0]


def _can_be(text: str, folder: Path) -> bool:
    """Whether a text is an existing folder or could be a repository."""
    repository = text.removeprefix("hf://").partition("@")[0]
    return (folder / Path(text).expanduser()).exists() or bool(_REPOSITORY.fullmatch(repository))


def _parse_plain(text: str) -> RepositoryRef:
    if not text.strip():
        raise InvalidRecipe("empty reference; expected org/name, org/name@revision or a folder")
    if text.startswith("hf://"):
        return _parse_hub(text.removeprefix("hf://"), text)
    if text.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        return FolderRef(Path(text).expanduser())
    repository = text.partition("@")[0]
    if _REPOSITORY.fullmatch(repository):
        if Path(text).is_file():
            raise InvalidRecipe(f"{text} is a file; give the folder that holds it")
        if Path(text).is_dir():
            raise InvalidRecipe(
                f"{text!r} is both a folder here and a valid repository name; "
                f"write ./{text} for the folder or hf://{text} for the repository"
            )
        return _parse_hub(text, text)
    if Path(text).exists():
        return FolderRef(Path(text))
    raise InvalidRecipe(f"{text!r} is neither an existing folder nor of the form org/name[@revision]")


def parse_model(text: str) -> SourceRef | VariantRef:
    """The checkpoint, bundle or variant of a bundle that `text` names.

    Raises:
        InvalidRecipe: As `parse_source`.
    """
    folder, _, variant = text.rpartition(":")
    is_drive = len(folder) == 1
    if folder and not is_drive and VARIANT_NAME.fullmatch(variant) and not Path(text).exists():
        return VariantRef(Path(folder).expanduser(), variant)
    return parse_source(text)


def parse_repository(text: str) -> HubRef:
    """The hub repository that `text` names.

    Raises:
        InvalidRecipe: Not of the form `org/name[@revision]`.
    """
    return _parse_hub(text.removeprefix("hf://"), text)


def parse_repositories(text: str) -> list[HubRef]:
    """The hub repositories that `text` names: one, or a base and an adapter.

    Raises:
        InvalidRecipe: Not of the form `org/name[@revision]`, once or joined by a plus.
    """
    return [parse_repository(half) for half in split_adapted(text) or (text,)]


def _parse_hub(text: str, original: str) -> HubRef:
    repository, at, revision = text.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not re.fullmatch(r"[\w./-]+", revision)):
        raise InvalidRecipe(f"{original!r} is not of the form org/name[@revision]")
    return HubRef(repository, revision or None)


def parse_named_sources(texts: list[str]) -> dict[str, SourceRef]:
    """Variants from `NAME=REF` arguments, in the order given.

    Raises:
        InvalidRecipe: No `=`, an unusable name, or a name given twice.
    """
    sources: dict[str, SourceRef] = {}
    for text in texts:
        name, equals, reference = text.partition("=")
        if not equals:
            raise InvalidRecipe(f"{text!r} has no name; write NAME={text}")
        check_variant_name(name, sources)
        sources[name] = parse_source(reference)
    return sources


def check_variant_name(name: str, taken: object = ()) -> None:
    """Refuse names that cannot be a folder on every system, and names already in use.

    Raises:
        InvalidRecipe: Bad characters, reserved, or equal to a taken name but for case.
    """
    if not VARIANT_NAME.fullmatch(name) or name.lower() in _RESERVED_NAMES:
        raise InvalidRecipe(
            f"variant name {name!r} cannot be used: letters, digits, - and _ only, "
            f"at most 64, and not a reserved device name"
        )
    if isinstance(taken, dict | list | tuple | set) and name.lower() in {str(t).lower() for t in taken}:
        raise InvalidRecipe(f"variant name {name!r} is given twice; every variant needs its own name")
