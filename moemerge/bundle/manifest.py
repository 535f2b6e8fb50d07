"""The manifest `moemerge.json`: what a bundle holds and where. Every value is checked when read."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from moemerge.checkpoint.family import RoutedLayer, Setting
from moemerge.checkpoint.side_files import is_side_file
from moemerge.errors import DamagedBundle, NotFound, UnsupportedCheckpoint
from moemerge.refs import VARIANT_NAME

MANIFEST = "moemerge.json"
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"
SCHEMA = "moemerge/bundle@1"
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features this version reads. Reserved for later: `residuals` and `quantised-pool`."""

MAX_MANIFEST_BYTES = 256 * 2**20


def check_path(text: str) -> str:
    """A relative path that stays inside the bundle.

    Raises:
        ValueError: Absolute, with `..`, a drive, a backslash or an empty step.
    """
    path = PurePosixPath(text)
    plain = text == path.as_posix() and text not in ("", ".") and "\\" not in text and ":" not in text
    if not plain or path.is_absolute() or ".." in path.parts or any(ord(char) < 32 for char in text):
        raise ValueError(f"path {text!r} leaves the bundle")
    return text


def _check_file_name(text: str) -> str:
    if "/" in check_path(text):
        raise ValueError(f"{text!r} is not the name of a file")
    if not is_side_file(text):
        raise ValueError(f"{text!r} is no configuration, tokenizer, template or licence file")
    return text


def _check_name(text: str) -> str:
    if not VARIANT_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a variant name")
    return text


BundlePath = Annotated[str, AfterValidator(check_path)]
FileName = Annotated[str, AfterValidator(_check_file_name)]
VariantName = Annotated[str, AfterValidator(_check_name)]
Kind = TypeVar("Kind", bound=BaseModel)
RelativeError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    # Unknown keys of a later minor version are ignored; unknown required features are not.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Features(_Entry):
    """Names of format features; a reader refuses required ones that it does not know."""

    required: list[str] = []
    optional: list[str] = []


class _Header(_Entry):
    """What tells whether the rest can be read."""

    schema_: str = Field(alias="schema")
    features: Features


class PoolLayer(RoutedLayer):
    """Where the pool experts of a layer are.

    Attributes:
        file: Safetensors file.
        num_experts: Pool experts in it, named `e00000.<part>` onwards.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    file: BundlePath
    num_experts: int = Field(gt=0)


class VariantEntry(_Entry):
    """One variant.

    Attributes:
        source: Where it came from.
        fingerprint: See `checkpoint.fingerprint`.
        licence: As its card says, if it does.
        settings: Canonical settings of its config.
        tensors: File by exported name of every non-expert tensor.
        files: Bundle path by original name of config, tokenizer, template, generation config.
        maps: Expert map by layer index: for each slot the pool expert.
        errors: By layer index: for each slot, distance to the pool expert over the expert's norm.
    """

    source: str
    fingerprint: str
    licence: str | None = None
    settings: dict[str, Setting]
    tensors: dict[str, BundlePath]
    files: dict[FileName, BundlePath]
    maps: dict[int, list[int]]
    errors: dict[int, list[RelativeError]]


class Provenance(_Entry):
    """How the bundle was made."""

    policy: str
    budget: str
    within: bool
    base: str | None
    moemerge: str


class Manifest(_Header):
    """A bundle's index.

    Attributes:
        parts: Shape of each expert part.
        num_slots: E, the same in every layer and variant.
        variant_bytes: Expert bytes of the largest variant; the unit of the bytes ratio.
        pool_bytes: Bytes of all pool experts.
    """

    family: str
    num_slots: int = Field(gt=0)
    parts: dict[str, list[int]]
    variant_bytes: int = Field(gt=0)
    pool_bytes: int = Field(gt=0)
    layers: list[PoolLayer] = Field(min_length=1)
    variants: dict[VariantName, VariantEntry] = Field(min_length=1)
    provenance: Provenance

    @property
    def bytes_ratio(self) -> float:
        """Pool bytes over the expert bytes of one variant."""
        return self.pool_bytes / self.variant_bytes

    @model_validator(mode="after")
    def _maps_point_into_pools(self) -> "Manifest":
        sizes = {layer.index: layer.num_experts for layer in self.layers}
        if len(sizes) != len(self.layers):
            raise ValueError("a layer is listed twice")
        for name, variant in self.variants.items():
            for kind, by_layer in (("map", variant.maps), ("errors", variant.errors)):
                if by_layer.keys() != sizes.keys():
                    raise ValueError(
                        f"variant {name}: {kind} of layers {sorted(by_layer)}, expected {sorted(sizes)}"
                    )
            if any(len(errors) != self.num_slots for errors in variant.errors.values()):
                raise ValueError(f"variant {name}: expected {self.num_slots} errors in every layer")
            for index, expert_map in variant.maps.items():
                if len(expert_map) != self.num_slots or not all(0 <= e < sizes[index] for e in expert_map):
                    raise ValueError(f"variant {name}, layer {index}: expert map does not fit the pool")
        return self


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON, the same text for the same manifest."""
    return manifest.model_dump_json(indent=1, by_alias=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        NotFound: No such folder.
        UnsupportedCheckpoint: Not a bundle, or of a version or with features that are not known.
        DamagedBundle: Malformed, or with paths that leave the bundle.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such bundle")
    if not path.is_file():
        raise UnsupportedCheckpoint(f"{folder}: not a bundle: it has no {MANIFEST}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise DamagedBundle(f"{path}: larger than any manifest ({MAX_MANIFEST_BYTES} bytes)")
    raw = path.read_bytes()
    # A later major version may look different in everything else, and should be told as that.
    _check_version(_validate(_Header, raw, path), path)
    return _validate(Manifest, raw, path)


def _validate(kind: type[Kind], raw: bytes, path: Path) -> Kind:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise DamagedBundle(f"{path}: {place + ': ' if place else ''}{problem['msg']}") from error


def _check_version(header: _Header, path: Path) -> None:
    match = re.fullmatch(r"moemerge/bundle@(\d+)(\.\d+)?", header.schema_)
    if not match:
        raise DamagedBundle(f"{path}: schema {header.schema_!r}, expected {SCHEMA}")
    if match[1] != "1":
        raise UnsupportedCheckpoint(
            f"{path}: bundle format {match[1]}, this moemerge reads format 1. Install a newer moemerge"
        )
    unknown = sorted(set(header.features.required) - KNOWN_FEATURES)
    if unknown:
        raise UnsupportedCheckpoint(
            f"{path}: needs {', '.join(unknown)}, which this moemerge does not know. Install a newer moemerge"
        )
