"""Names of files and tensors inside a bundle."""

POOL_METADATA = {"format": "pt"}
RESIDUAL_FOLDER = "residuals"
CODES, SCALES, LEFT, RIGHT = "codes", "scales", "left", "right"
"""Suffixes of the tensors of a coded matrix: packed codes and their scales, or two factors."""


def pool_file(layer_index: int) -> str:
    """File of a layer's pool."""
    return f"pool/layer-{layer_index:05d}.safetensors"


def pool_tensor(index: int, part: str) -> str:
    """Name of one part of a pool expert, to which a suffix comes where it is coded.

    Sorting by name keeps an expert's parts together.
    """
    return f"e{index:05d}.{part}"


def residual_file(variant: str, layer_index: int) -> str:
    """File of a variant's residuals in a layer."""
    return f"{RESIDUAL_FOLDER}/{variant}/layer-{layer_index:05d}.safetensors"


def residual_tensor(slot: int, part: str) -> str:
    """Name of one part of a slot's residual, to which a suffix comes."""
    return f"s{slot:05d}.{part}"


def shared_file(number: int) -> str:
    """File of non-expert tensors that several variants have; counted from 1."""
    return f"shared/tensors-{number:05d}.safetensors"


def variant_file(name: str) -> str:
    """File of the non-expert tensors that only one variant has."""
    return f"variants/{name}/tensors.safetensors"


def side_file(variant: str, name: str) -> str:
    """Place of a variant's tokenizer, config or template file."""
    return f"variants/{variant}/{name}"


def joining_file(variant: str) -> str:
    """Decisions about a variant that joined the bundle."""
    return f"reports/joining-{variant}.json"


def licence_file(variant: str, name: str) -> str:
    """Place of a variant's licence text."""
    return f"LICENSES/{variant}-{name}"
