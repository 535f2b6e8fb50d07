"""What the shell completes beyond commands and options: variants of the bundle on the command line.

Reads the manifest as plain JSON, so that an answer takes no longer than the program takes to start.
"""

import json
from pathlib import Path
from typing import Any

import typer


def complete_variant(context: typer.Context, incomplete: str) -> list[str]:
    """Names of variants that begin as typed; none where no bundle is named yet.

    An option that waits for its value leaves the arguments before it in `args`, not by their names.
    """
    names = _variants_of(Path(context.args[0])) if context.args else []
    return [name for name in names if name.startswith(incomplete)]


def _variants_of(bundle: Path) -> list[str]:
    try:
        manifest: dict[str, Any] = json.loads((bundle / "moemerge.json").read_text(encoding="utf-8"))
        return list(manifest["variants"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
