"""JSON Schema of recipes, for editors. What a recipe may say is decided in `recipe.py`."""

from typing import Any

from moemerge.consolidation.recipe import KINDS, REQUIRED, SCHEMA
from moemerge.refs import VARIANT_NAME

_FORMS: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    dict: {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1},
}
_SIZE = r"[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]"
_RATIO = r"[0-9]+(\.[0-9]+)?\s*[xX]"
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
        "additionalProperties": False,
    }
