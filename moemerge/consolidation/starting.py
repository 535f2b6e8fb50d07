"""A recipe to begin with, written with comments from nothing but references."""

import json
import os
import re
from pathlib import Path

from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.recipe import SCHEMA
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.refs import (
    VARIANT_NAME,
    AdaptedRef,
    FolderRef,
    RepositoryRef,
    check_variant_name,
    parse_source,
    split_adapted,
)

_PLAIN = re.compile(r"[A-Za-z0-9./~_][\w./@~+-]*")
_LONGEST = 60


def name_variants(references: list[str]) -> dict[str, str]:
    """References by variant name; `NAME=REF` gives the name, otherwise it comes from the reference.

    Raises:
        InvalidRecipe: A reference that cannot be, or a name that is given twice.
    """
    named: dict[str, str] = {}
    for text in references:
        name, equals, reference = text.partition("=")
        if equals and VARIANT_NAME.fullmatch(name):
            check_variant_name(name, named)
        else:
            name, reference = _free_name(text, named), text
        named[name] = reference
    return named


def draft_recipe(
    references: list[str], base: str | None, budget: str, path: Path, notes: list[str] | None = None
) -> str:
    """The text of a recipe.

    Args:
        references: Of variants, each `REF` or `NAME=REF`; folders are counted from here.
        base: Reference of the common ancestor.
        budget: As `--budget`.
        path: Where the recipe will be; folders in it are counted from there.
        notes: Lines that a reader should know first.

    Raises:
        InvalidRecipe: References or a budget that cannot be.
        NotFound: A folder that does not exist.
    """
    parse_budget(budget)
    variants = name_variants(references)
    if not variants:
        raise InvalidRecipe("no variants given; write REF or NAME=REF for each, for example code=org/model")
    width = max(map(len, variants)) + 1
    lines = [f"  {name + ':':<{width}} {_place(ref, path.parent)}" for name, ref in variants.items()]
    ancestor = [f"base: {_place(base, path.parent)}"] if base else ["# base: org/model"]
    return "\n".join(
        [
            *(f"# {note}" for note in notes or ()),
            "# Check it, carry it out, look at it:",
            f"#   moemerge merge --recipe {path.name} -o out.moe",
            "#   moemerge report ./out.moe",
            f"schema: {SCHEMA}",
            "",
            "# Fine-tunes of one model: org/name[@revision] of the hub, or folders counted from this file.",
            "# Pin a revision (@commit) to get the same bundle again next year.",
            "variants:",
            *lines,
            "",
            "# Their common ancestor. It is not stored; with it reports also show what fine-tuning changed.",
            *ancestor,
            "",
            "# What experts may take: exact, a multiple of one variant's expert bytes, or a size (40GiB).",
            f"budget: {budget}",
            "",
            "# Or: as few bytes as keep this share of what fine-tuning gained; needs base and text.",
            "# quality: 0.99",
            "# What every variant is to keep at least; otherwise the merge ends with exit code 9.",
            "# floor: 0.98",
            "",
            "# Each variant's own text, on which costs are measured; without it, noise stands for it.",
            "# text:",
            *(f"#   {name + ':':<{width}} ./{name}.txt" for name in variants),
            "",
            "# Steps of distillation of routers, norms and output projections, after repair.",
            "# heal: 100",
            "# Memory to stay within; left out, what is free.",
            "# max_ram: 8GiB",
            "",
        ]
    )


def _free_name(reference: str, taken: dict[str, str]) -> str:
    """A variant name that nobody has, from the last step of a reference; an adapter gives its own."""
    _, reference = split_adapted(reference) or ("", reference)
    last = re.split(r"[\\/]", reference.partition("@")[0].rstrip("\\/"))[-1]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_")[:_LONGEST] or "variant"
    lower = {name.lower() for name in taken}
    names = [stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3))]
    name = next(name for name in names if name.lower() not in lower)
    check_variant_name(name, taken)
    return name


def _place(reference: str, folder: Path) -> str:
    """The reference as a recipe in `folder` writes it."""
    ref = parse_source(reference)
    halves = (ref.base, ref.adapter) if isinstance(ref, AdaptedRef) else (ref,)
    return _quoted("+".join(_seen_from(half, folder) for half in halves))


def _seen_from(ref: RepositoryRef, folder: Path) -> str:
    if not isinstance(ref, FolderRef):
        return str(ref)
    if not ref.path.is_dir():
        raise NotFound(f"{ref.path}: no such folder")
    if ref.path.is_absolute():
        return str(ref.path)
    relative = Path(os.path.relpath(ref.path, folder)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
