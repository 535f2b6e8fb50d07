"""`moemerge families`."""

from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import JsonOption, print_json

if TYPE_CHECKING:
    from moemerge.checkpoint.family import Family, SettingRule


def families(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Tell all that the description of this family says.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the supported families, or what one family's description says.

    A family is chosen by model_type in config.json, and by tensor names where several share one. Every
    tensor of a checkpoint must have one of the names that its family lists; anything else is refused, so
    that nothing is lost quietly.

    Example: moemerge families mixtral
    """
    from moemerge.checkpoint.family import find_family, load_families

    if name is None:
        _list(list(load_families().values()), as_json=as_json)
        return
    family = find_family(name, "families")
    if as_json:
        print_json("families", family.model_dump(by_alias=True, mode="json"))
    else:
        _describe(family)


def _list(found: "list[Family]", *, as_json: bool) -> None:
    from moemerge.cli.tables import print_table

    if as_json:
        print_json("families", {"families": [_summary(family) for family in found]})
        return
    rows = [[str(value) for value in _summary(family).values()] for family in found]
    print_table(
        "Supported families", ["name", "model_type", "title", "arithmetic", "parity", "reference"], rows
    )
    typer.echo("Parity: largest difference of logits from the reference on tiny models, float32.")


def _summary(family: "Family") -> dict[str, str | float]:
    return {
        "name": family.name,
        "model_type": family.model_type,
        "title": family.title,
        "arithmetic": family.arithmetic.replace("_", "-"),
        "parity": family.parity,
        "reference": family.reference,
    }


def _describe(family: "Family") -> None:
    from moemerge.cli.tables import print_table

    typer.echo(f"{family.title} ({family.name}), written from {family.reference}")
    typer.echo(f"Its logits differ by {family.parity:g} at most, in float32 on tiny models")
    rows = [[name, ", ".join(rule.keys) or "-", *_meaning(rule)] for name, rule in family.settings.items()]
    print_table("Settings", ["setting", "keys of config.json", "if absent", "allowed", "variants"], rows)
    roles = [
        [pattern.role, " x ".join(pattern.shape), pattern.layers, pattern.names[0]]
        for pattern in family.tensors
    ]
    print_table("Non-expert tensors", ["role", "shape", "layers", "name"], roles)
    experts = [
        [layout.name, part, " x ".join(family.experts.parts[part]), tensor.name]
        for layout in family.experts.layouts
        for tensor in layout.tensors
        for part in tensor.holds
    ]
    print_table("Expert tensors", ["layout", "part", "shape", "name"], experts)
    left_out = {**family.tied_copies, **family.dropped_tensors, **family.ignored_settings}
    if left_out:
        reasons = [[key, _reason(family, key, reason)] for key, reason in left_out.items()]
        print_table("Left out on purpose", ["tensor or key", "why"], reasons)


def _meaning(rule: "SettingRule") -> tuple[str, str, str]:
    """What an absent key means, which values are possible, and how variants may differ."""
    if rule.default is not None:
        absent = str(rule.default)
    elif rule.default_from:
        absent = " / ".join(rule.default_from)
    else:
        absent = "none" if rule.optional else "an error"
    allowed = ", ".join(map(str, rule.allowed)) if rule.allowed else rule.kind
    variants = {"equal": "must agree", "warn": "may differ, told", "free": "may differ"}[rule.variants]
    return absent, allowed, variants


def _reason(family: "Family", key: str, reason: str) -> str:
    return f"copy of {reason}" if key in family.tied_copies else reason
