"""Similarity on disk: one safetensors file of matrices a layer, and a JSON index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moemerge.checkpoint.tensors import map_tensors
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.similarity.distances import DISTANCES
from moemerge.similarity.matrices import LayerSimilarity

SCHEMA = "moemerge/similarity@1"
INDEX = "similarity.json"


def dump_index(index: dict[str, Any]) -> str:
    """The index as JSON."""
    return json.dumps(index, indent=1, sort_keys=True) + "\n"


def layer_file(layer_index: int) -> str:
    """File of a layer's matrices."""
    return f"similarity-layer-{layer_index:05d}.safetensors"


def write_layer_similarity(folder: Path, subfolder: str, layer: LayerSimilarity) -> dict[str, str]:
    """Write a layer's matrices; returns SHA-256 by path relative to `folder`."""
    arrays = {f"distance.{name}": matrix for name, matrix in layer.distances.items()}
    arrays |= {f"part_l2.{part}": matrix for part, matrix in layer.part_l2.items()}
    arrays["norms"] = layer.norms
    arrays |= {f"part_norms.{part}": norms for part, norms in layer.part_norms.items()}
    if layer.delta_norms is not None:
        arrays["delta_norms"] = layer.delta_norms
    if layer.router_l2 is not None:
        arrays["router_l2"] = layer.router_l2
    tensors = [memory_tensor(name, torch.from_numpy(np.ascontiguousarray(a))) for name, a in arrays.items()]
    tensors.append(memory_tensor("identity", torch.from_numpy(layer.identity)))
    name = f"{subfolder}/{layer_file(layer.layer)}" if subfolder else layer_file(layer.layer)
    return {name: write_tensors(folder / name, tensors, {"format": "pt"})}


def load_layer_similarity(folder: Path, layer_index: int, variants: tuple[str, ...]) -> LayerSimilarity:
    """A layer's matrices as they were written.

    Raises:
        NotFound, DamagedInput: The file is missing or damaged.
    """
    arrays = {
        name: tensor.numpy().copy() for name, tensor in map_tensors(folder / layer_file(layer_index)).items()
    }
    return LayerSimilarity(
        layer=layer_index,
        variants=variants,
        num_slots=len(arrays["identity"]) // len(variants),
        distances=_with_prefix(arrays, "distance."),
        part_l2=_with_prefix(arrays, "part_l2."),
        norms=arrays["norms"],
        identity=arrays["identity"],
        delta_norms=arrays.get("delta_norms"),
        part_norms=_with_prefix(arrays, "part_norms."),
        router_l2=arrays.get("router_l2"),
    )


def similarity_index(layers: list[LayerSimilarity], variants: VariantSet) -> dict[str, Any]:
    """What the matrices are, with a summary of each layer.

    Rows and columns are experts in order (variant, slot).
    """
    computed = list(layers[0].distances)
    return {
        "schema": SCHEMA,
        "family": variants.first.family.name,
        "variants": list(variants.variants),
        "has_base": variants.base is not None,
        "num_slots": layers[0].num_slots,
        "order": "variant, slot",
        "distances": {name: DISTANCES[name].meaning for name in computed},
        "not_computed": {name: "needs a base" for name in DISTANCES if name not in computed},
        "layers": [
            {
                "index": layer.layer,
                "file": layer_file(layer.layer),
                **{
                    key: None if value is None else float(f"{value:.6g}")
                    for key, value in layer.summary().items()
                },
            }
            for layer in layers
        ],
    }


def _with_prefix(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
