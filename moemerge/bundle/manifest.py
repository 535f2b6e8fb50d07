"""The manifest `moemerge.json`: what a bundle holds and where. Every value is checked when read."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from moemerge.checkpoint.family import RoutedLayer, Setting
from moemerge.checkpoint.side_files import is_side_file
from moemerge.errors import DamagedBundle, NotFound, UnsupportedCheckpoint, list_problems
from moemerge.refs import VARIANT_NAME

MANIFEST = "moemerge.json"
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"
SCHEMA = "moemerge/bundle@1"
RESIDUALS = "residuals"
QUANTISED_POOL = "quantised-pool"
KNOWN_FEATURES = frozenset({RESIDUALS, QUANTISED_POOL})
"""Features this version reads."""

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
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
FACTOR_BITS = 16
"""Bits of a factor's entries: low rank is stored as bf16."""
COLUMN_MULTIPLE = 8
"""Codes of fewer than eight bits need a multiple of so many columns; as `models.packed` has it, whose import
takes a second that not every reader of a manifest has."""
MAP_ENTRY_BYTES = 4


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


class CodeSpec(_Entry):
    """How every part of a pool expert or residual is stored, if not as a plain tensor.

    Attributes:
        kind: `bits`: packed codes and scales; `low_rank`: two bf16 factors.
        bits: Of a code, 1 to 6 or 8; 16 for factors.
        group: Columns that share a scale; None: one scale per row.
        rank: Of the factors.
    """

    kind: Literal["bits", "low_rank"]
    bits: Literal[1, 2, 3, 4, 5, 6, 8, 16]
    group: int | None = Field(default=None, gt=0)
    rank: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "CodeSpec":
        if self.kind == "bits" and (self.bits == FACTOR_BITS or self.rank is not None):
            raise ValueError("packed codes have 1 to 8 bits and no rank")
        if self.kind == "low_rank" and (self.bits != FACTOR_BITS or self.group is not None or not self.rank):
            raise ValueError(f"low rank has {FACTOR_BITS} bits, a rank and no group")
        return self

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.rank else f"{self.bits}-bit"

    def group_of(self, num_columns: int) -> int:
        """Columns that share a scale in a matrix of so many; a row has at least one scale."""
        return min(self.group or num_columns, num_columns)

    def part_bytes(self, num_rows: int, num_columns: int) -> int:
        """Bytes that a matrix of that shape takes."""
        if self.rank is not None:
            return self.rank * (num_rows + num_columns) * FACTOR_BITS // 8
        scales = -(-num_columns // self.group_of(num_columns))
        return num_rows * (num_columns * self.bits // 8 + 2 * scales)


class PoolLayer(RoutedLayer):
    """Where the pool experts of a layer are.

    Attributes:
        file: Safetensors file.
        num_experts: Pool experts in it, named `e00000.<part>` onwards.
        codes: For each pool expert how it is coded, None where it is plain; empty when all are plain.
        dtype: Of effective experts, where codes or residuals are added up to them.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    file: BundlePath
    num_experts: int = Field(gt=0)
    codes: list[CodeSpec | None] = Field(default_factory=list)
    dtype: Literal["F64", "F32", "F16", "BF16"] | None = None

    @model_validator(mode="after")
    def _codes_fit(self) -> "PoolLayer":
        if self.codes and len(self.codes) != self.num_experts:
            raise ValueError(f"layer {self.index}: {len(self.codes)} codes, expected {self.num_experts}")
        if any(code is not None and code.kind != "bits" for code in self.codes):
            raise ValueError(f"layer {self.index}: a pool expert has codes of bits, or none")
        return self

    @property
    def is_coded(self) -> bool:
        """Whether any of its pool experts is."""
        return any(self.codes)

    def code(self, index: int) -> CodeSpec | None:
        """How a pool expert is coded, if it is."""
        return self.codes[index] if self.codes else None


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
        errors: By layer index: for each slot, distance to the effective expert over the expert's norm.
        residuals: By layer index: for each slot how its residual is coded, None where it has none; layers
            without any may be absent.
        damage: What sharing and codes cost this variant, predicted and measured, by free names.
        repaired: Exported names of those of its tensors that are not the source's but fitted to the pool.
    """

    source: str
    fingerprint: str
    licence: str | None = None
    settings: dict[str, Setting]
    tensors: dict[str, BundlePath]
    files: dict[FileName, BundlePath]
    maps: dict[int, list[int]]
    errors: dict[int, list[RelativeError]]
    residuals: dict[int, list[CodeSpec | None]] = Field(default_factory=dict)
    damage: dict[str, FiniteFloat] | None = None
    repaired: list[str] = Field(default_factory=list)

    @property
    def residual_layers(self) -> list[int]:
        """Indices of layers in which a slot has a residual."""
        return sorted(index for index, codes in self.residuals.items() if any(codes))

    def residual(self, layer_index: int, slot: int) -> CodeSpec | None:
        """How the residual of a slot is coded, if there is one."""
        codes = self.residuals.get(layer_index)
        return codes[slot] if codes else None


class Change(_Entry):
    """A variant that joined a bundle, or left it.

    Attributes:
        action: Which of both.
        variant: Its name.
        budget: What it might add.
        evidence: What decided; a calibration, noise, or nothing.
        moemerge: Version that did it.
    """

    action: Literal["add", "remove"]
    variant: VariantName
    budget: str | None = None
    evidence: str | None = None
    moemerge: str


class Provenance(_Entry):
    """How the bundle was made; `changes` in the order in which they were made since."""

    policy: str
    budget: str
    within: bool
    base: str | None
    moemerge: str
    changes: list[Change] = Field(default_factory=list)


class Manifest(_Header):
    """A bundle's index.

    Attributes:
        parts: Shape of each expert part.
        num_slots: E, the same in every layer and variant.
        variant_bytes: Expert bytes of the largest variant; the unit of the bytes ratio.
        pool_bytes: Bytes of all pool experts, codes and scales included.
        residual_bytes: Bytes of all residuals.
    """

    family: str
    num_slots: int = Field(gt=0)
    parts: dict[str, list[int]]
    variant_bytes: int = Field(gt=0)
    pool_bytes: int = Field(gt=0)
    residual_bytes: int = Field(default=0, ge=0)
    layers: list[PoolLayer] = Field(min_length=1)
    variants: dict[VariantName, VariantEntry] = Field(min_length=1)
    provenance: Provenance

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shapes of the parts that are matrices, which alone are ever coded; the others are biases."""
        return {part: (shape[0], shape[1]) for part, shape in self.parts.items() if len(shape) == 2}

    @property
    def bytes_ratio(self) -> float:
        """Expert bytes, pool, residuals and maps, over the expert bytes of one variant."""
        maps = map_bytes(len(self.variants), len(self.layers), self.num_slots)
        return (self.pool_bytes + self.residual_bytes + maps) / self.variant_bytes

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
            if unknown := set(variant.repaired) - variant.tensors.keys():
                raise ValueError(f"variant {name}: {min(unknown)} is repaired, and not one of its tensors")
            if any(len(errors) != self.num_slots for errors in variant.errors.values()):
                raise ValueError(f"variant {name}: expected {self.num_slots} errors in every layer")
            for index, expert_map in variant.maps.items():
                if len(expert_map) != self.num_slots or not all(0 <= e < sizes[index] for e in expert_map):
                    raise ValueError(f"variant {name}, layer {index}: expert map does not fit the pool")
        return self

    @model_validator(mode="after")
    def _codes_fit(self) -> "Manifest":
        layers = {layer.index: layer for layer in self.layers}
        coded = {index for index, layer in layers.items() if layer.is_coded}
        specs = [code for layer in self.layers for code in layer.codes if code]
        for name, variant in self.variants.items():
            for index, codes in variant.residuals.items():
                if index not in layers or len(codes) != self.num_slots:
                    raise ValueError(
                        f"variant {name}, layer {index}: residuals of {len(codes)} slots, expected "
                        f"{self.num_slots} in a layer that has a pool"
                    )
                specs += [code for code in codes if code]
            coded |= set(variant.residual_layers)
        for index in sorted(coded):
            if layers[index].dtype is None:
                raise ValueError(f"layer {index}: no dtype of effective experts")
        columns = [shape[1] for shape in self.matrices.values()]
        if any(spec.bits < 8 for spec in specs) and any(count % COLUMN_MULTIPLE for count in columns):
            raise ValueError(f"codes of less than 8 bits need a multiple of {COLUMN_MULTIPLE} columns")
        return self

    @model_validator(mode="after")
    def _features_agree(self) -> "Manifest":
        present = {
            QUANTISED_POOL: any(layer.is_coded for layer in self.layers),
            RESIDUALS: any(variant.residual_layers for variant in self.variants.values()),
        }
        for feature, is_there in present.items():
            if is_there != (feature in self.features.required):
                raise ValueError(
                    f"required features are {self.features.required}, but {feature} "
                    f"{'is' if is_there else 'is not'} there"
                )
        return self


def map_bytes(num_variants: int, num_layers: int, num_slots: int) -> int:
    """Bytes of all expert maps, as the bytes ratio counts them."""
    return MAP_ENTRY_BYTES * num_variants * num_layers * num_slots


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
        raise DamagedBundle(f"{path}: {list_problems(error)}") from error


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
