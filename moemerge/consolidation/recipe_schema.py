"""JSON Schema of recipes, for editors. What a recipe may say is decided in `recipe.py`."""

from typing import Any

from moemerge.calibration.passes import DEFAULT_DTYPE, DEFAULT_TOKENS, DTYPES
from moemerge.consolidation.fitting import BATCH, TOKENS
from moemerge.consolidation.recipe import DECIDES, KINDS, REQUIRED, SCHEMA
from moemerge.refs import VARIANT_NAME

_FORMS: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    dict: {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1},
}
_SIZE = r"[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]"
_RATIO = r"[0-9]+(\.[0-9]+)?\s*[xX]"
_SHARE = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
_NAME = VARIANT_NAME.pattern.replace("a-z", "a-zA-Z")
_DETAILS: dict[str, dict[str, Any]] = {
    "schema": {"const": SCHEMA, "description": "Version of the format."},
    "variants": {
        "description": "Checkpoints by name: org/name[@revision], or a folder counted from this file.",
        "propertyNames": {"pattern": f"^({_NAME})$"},
    },
    "base": {"description": "Common ancestor of the variants; not stored."},
    "budget": {
        "description": "exact, a multiple of one variant's expert bytes (1.25x), or a size (40GiB).",
        "pattern": rf"^\s*([eE][xX][aA][cC][tT]|{_RATIO}|{_SIZE})\s*$",
    },
    "fit": {"description": "Memory of a device, in place of a budget: what it has left for experts."},
    "fit_batch": {"description": "Sequences at once on that device.", "minimum": 1, "default": BATCH},
    "fit_tokens": {"description": "Tokens of each of them.", "minimum": 1, "default": TOKENS},
    "quality": {"description": "Share of the fine-tuning gain to keep on average.", **_SHARE},
    "floor": {"description": "Share of it that every variant keeps at least.", **_SHARE},
    "text": {"description": "Each variant's own text: .txt, or .jsonl of input and target."},
    "tokens": {"description": "Most tokens of each text.", "minimum": 1, "default": DEFAULT_TOKENS},
    "dtype": {"description": "Of the computation on text.", "enum": list(DTYPES), "default": DEFAULT_DTYPE},
    "calibration": {"description": "Folder that moemerge calibrate has written, in place of text."},
    "repair": {"description": "Whether own tensors are fitted to what is stored.", "default": True},
    "heal": {"description": "Steps of distillation of the same tensors.", "minimum": 0, "default": 0},
    "policy": {"description": "How to decide which experts share; see moemerge plan --help."},
    "within": {"description": "Whether experts of one variant may share as well.", "default": False},
    "max_ram": {"description": "Memory to stay within, such as 8GiB.", "pattern": rf"^\s*{_SIZE}\s*$"},
}


def recipe_schema() -> dict[str, Any]:
    """What an editor needs to complete and check a recipe."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moemerge recipe",
        "type": "object",
        "properties": {key: {**_FORMS.get(kind, {}), **_DETAILS.get(key, {})} for key, kind in KINDS.items()},
        "required": list(REQUIRED),
        "anyOf": [{"required": [key]} for key in DECIDES],
        "additionalProperties": False,
    }
