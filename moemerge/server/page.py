"""A page that lists what the server offers, made from its own description; needs no network."""

from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:0 .25em}td,th{text-align:left;padding:.1em 1em .1em 0;vertical-align:top}"
    "h2{font-size:1.1rem;margin-top:2rem}"
)


def render_page(description: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: every operation, its text, and the fields of its body."""
    schemas = description.get("components", {}).get("schemas", {})
    operations = [
        _operation(method, path, operation, schemas)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title} {escape(description['info']['version'])}</h1>"
        f"<p>{escape(description['info'].get('description', ''))} "
        f'For programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(operations)}</html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td>{escape(_kind(field))}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return (
        f"<h2>{method.upper()} <code>{escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', ''))}</p>" + (f"<table>{rows}</table>" if rows else "")
    )


def _kind(field: dict[str, Any]) -> str:
    """A field's type in words."""
    alternatives = field.get("anyOf") or field.get("oneOf")
    if alternatives:
        kinds = [_kind(alternative) for alternative in alternatives]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    kind = str(field.get("type", "value"))
    return f"{kind} of {_kind(field['items'])}" if "items" in field else kind
