"""Generated reports of any shape, with numbers like those of real fine-tunes and no weights at all.

folder = write_reports(tmp_path / "x.moe", variants=4, slots=8, layers=32)
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WIDTH, HIDDEN = 32, 64
PARTS = {"gate": [HIDDEN, WIDTH], "up": [HIDDEN, WIDTH], "down": [WIDTH, HIDDEN]}
DISTANCES = ("l2", "relative_l2", "cosine", "delta_l2", "delta_cosine")
POOL_CODE = {"kind": "bits", "bits": 5, "group": None, "rank": None}
RESIDUAL_CODE = {"kind": "bits", "bits": 2, "group": None, "rank": None}


def names_of(count):
    return [f"v{number}" for number in range(count)]


def write_reports(
    folder: Path,
    *,
    variants: int = 3,
    slots: int = 4,
    layers: int = 3,
    source: str = "org/model",
    seed: int = 0,
) -> Path:
    """A bundle's manifest and reports, as `--policy measured` leaves them."""
    random = np.random.default_rng(seed)
    names = names_of(variants)
    reports = folder / "reports"
    write_similarity(reports, names, slots, layers, seed=seed)
    write_json(folder / "moemerge.json", manifest_of(names, slots, layers, source, random))
    write_json(reports / "plan.json", plan_of(names, slots, layers, source))
    write_json(reports / "curve.json", curve_of(names, variant_bytes(slots, layers)))
    for layer in range(layers):
        write_json(reports / f"costs-layer-{layer:05d}.json", costs_of(layer, names, slots, random))
    return folder


def write_similarity(folder: Path, names, slots: int, layers: int, *, seed: int = 0) -> Path:
    """A folder as `moemerge similarity` leaves it."""
    random = np.random.default_rng(seed)
    lines = []
    for layer in range(layers):
        arrays = matrices_of(len(names), slots, 0.1 + 0.2 * layer / max(1, layers - 1), random)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(arrays, folder / f"similarity-layer-{layer:05d}.safetensors")
        lines.append(summary_of(layer, arrays["distance.relative_l2"].numpy(), len(names)))
    index = {
        "schema": "moemerge/similarity@1",
        "family": "mixtral",
        "variants": list(names),
        "has_base": True,
        "num_slots": slots,
        "distances": {name: f"what {name} means" for name in DISTANCES},
        "not_computed": {},
        "layers": lines,
    }
    write_json(folder / "similarity.json", index)
    return folder


def matrices_of(variants, slots, apart, random):
    count = variants * slots
    slot = np.arange(count) % slots
    noise = random.uniform(0.9, 1.1, (count, count))
    siblings = slot[:, None] == slot[None, :]
    matrix = np.where(siblings, apart, 1.41) * (noise + noise.T) / 2
    np.fill_diagonal(matrix, 0.0)
    arrays = {f"distance.{name}": matrix.copy() for name in DISTANCES}
    arrays |= {f"part_l2.{part}": 3 * matrix for part in PARTS}
    arrays |= {f"part_norms.{part}": np.full(count, 3.0) for part in PARTS}
    arrays["norms"] = np.full(count, 5.0)
    arrays["delta_norms"] = 5 * apart * random.uniform(0.5, 1, count)
    arrays["router_l2"] = np.full((variants, variants, slots), apart) * (1 - np.eye(variants))[:, :, None]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return tensors | {"identity": torch.arange(count)}


def summary_of(layer, matrix, variants):
    count = len(matrix)
    index = np.arange(count)
    slots = count // variants
    other_variant = index[:, None] // slots != index[None, :] // slots
    same = (index[:, None] % slots == index[None, :] % slots) & other_variant
    return {
        "index": layer,
        "file": f"similarity-layer-{layer:05d}.safetensors",
        "same_slot_median": float(np.median(matrix[same])) if same.any() else None,
        "same_slot_max": float(matrix[same].max()) if same.any() else None,
        "other_slot_median": float(np.median(matrix[other_variant & ~same])) if same.any() else None,
        "distinct": float(count),
    }


def manifest_of(names, slots, layers, source, random):
    every_layer = range(layers)
    variants = {
        name: {
            "source": source,
            "fingerprint": "0" * 64,
            "licence": "apache-2.0",
            "settings": {},
            "tensors": {},
            "files": {},
            "maps": {layer: list(range(slots)) for layer in every_layer},
            "errors": {layer: random.uniform(0, 0.2, slots).round(4).tolist() for layer in every_layer},
            "residuals": {layer: [RESIDUAL_CODE] * slots for layer in every_layer},
            "damage": {"predicted": 0.002, "measured": 0.003, "kl": 0.001, "gain_recovered": 0.98},
        }
        for name in names
    }
    return {
        "schema": "moemerge/bundle@1",
        "features": {"required": ["quantised-pool", "residuals"], "optional": []},
        "family": "mixtral",
        "num_slots": slots,
        "parts": PARTS,
        "variant_bytes": variant_bytes(slots, layers),
        "pool_bytes": variant_bytes(slots, layers) // 3,
        "residual_bytes": variant_bytes(slots, layers) // 2,
        "layers": [
            {
                "index": layer,
                "stack": "decoder",
                "block": layer,
                "file": f"pool/layer-{layer:05d}.safetensors",
                "num_experts": slots,
                "codes": [POOL_CODE] * slots,
                "dtype": "BF16",
            }
            for layer in every_layer
        ],
        "variants": variants,
        "provenance": {"policy": "measured", "budget": "1x", "within": False, "base": None, "moemerge": "0"},
    }


def plan_of(names, slots, layers, source):
    return {
        "schema": "moemerge/plan@2",
        "family": "mixtral",
        "budget": "1x",
        "policy": "measured",
        "within": False,
        "num_slots": slots,
        "variants": {name: {"source": source, "fingerprint": "0"} for name in names},
        "base": None,
        "variant_bytes": variant_bytes(slots, layers),
        "pool_bytes": variant_bytes(slots, layers) // 3,
        "residual_bytes": variant_bytes(slots, layers) // 2,
        "allowed_bytes": None,
        "predicted_damage": dict.fromkeys(names, 0.002),
        "evidence": "text:0",
        "layers": [
            {
                "index": layer,
                "pool": [
                    {
                        "members": [[name, slot] for name in names],
                        "operator": "regmean",
                        "sources": [[name, slot] for name in names],
                        "code": POOL_CODE,
                    }
                    for slot in range(slots)
                ],
                "residuals": {name: [RESIDUAL_CODE] * slots for name in names},
            }
            for layer in range(layers)
        ],
    }


def curve_of(names, unit):
    points = [
        {"bytes": unit * step // 8, "loss": {name: 2.0**-step * (1 + n / 9) for n, name in enumerate(names)}}
        for step in range(1, 16)
    ]
    return {"schema": "moemerge/curve@1", "evidence": "text:0", "points": points}


def costs_of(layer, names, slots, random):
    everybody = ",".join(map(str, range(len(names))))
    return {
        "index": layer,
        "slots": [
            {
                "owners": [[[name, slot]] for name in names],
                "shared": {everybody: ["regmean", [0.001 * (layer + 1)] * len(names)]}
                if len(names) > 1
                else {},
            }
            for slot in range(slots)
        ],
        "tokens": dict.fromkeys(names, 1000),
        "routed": {name: random.integers(1, 500, slots).tolist() for name in names},
    }


def variant_bytes(slots, layers):
    return 2 * 3 * WIDTH * HIDDEN * slots * layers


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
