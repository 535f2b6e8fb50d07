"""`moemerge schema`."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from moemerge.cli.command import SCHEMA, JsonOption, print_json

EXIT_CODES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130, 143)
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_FINDING = ("level", "code", "where", "found", "expected", "fix")


class SchemaName(StrEnum):
    """What has a schema."""

    RECIPE = "recipe"
    MANIFEST = "manifest"
    PLAN = "plan"
    CLI = "cli"


def schema(
    name: Annotated[
        SchemaName, typer.Argument(metavar="NAME", help="recipe, manifest, plan or cli (--json).")
    ],
    as_json: JsonOption = False,
) -> None:
    """Print the JSON Schema of a recipe, a bundle's manifest, a plan, or of what --json prints.

    An editor completes and checks a recipe that begins with the line
    "# yaml-language-server: $schema=recipe.schema.json".

    Example: moemerge schema recipe
    """
    found = _find(name)
    if as_json:
        print_json("schema", found)
    else:
        typer.echo(json.dumps(found, indent=2))


def _find(name: SchemaName) -> dict[str, Any]:
    if name is SchemaName.CLI:
        return envelope_schema()
    if name is SchemaName.RECIPE:
        from moemerge.consolidation.recipe_schema import recipe_schema

        return recipe_schema()
    if name is SchemaName.MANIFEST:
        from moemerge.bundle.manifest import Manifest

        return {"$schema": _DRAFT, **Manifest.model_json_schema(by_alias=True)}
    from moemerge.consolidation.plan import ConsolidationPlan

    return {"$schema": _DRAFT, **ConsolidationPlan.model_json_schema(by_alias=True)}


def envelope_schema() -> dict[str, Any]:
    """What every command prints with `--json`; `data` is the command's own."""
    finding = {
        "type": "object",
        "properties": {
            **{key: {"type": "string"} for key in _FINDING},
            "level": {"enum": ["error", "warning", "note"]},
        },
        "required": list(_FINDING),
    }
    properties = {
        "schema": {"const": SCHEMA},
        "command": {"type": "string"},
        "ok": {"type": "boolean"},
        "exit_code": {"enum": list(EXIT_CODES)},
        "data": {"type": "object"},
        "findings": {"type": "array", "items": finding},
    }
    return {
        "$schema": _DRAFT,
        "title": "What a moemerge command prints with --json",
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }
