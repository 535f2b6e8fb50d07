"""A merge as a YAML file, or as options: which variants, and how to decide.

Unknown keys are refused with the nearest known one; all problems of a file are told together.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moemerge.checkpoint.sizes import parse_size
from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.plan import ConsolidationPlan, read_plan
from moemerge.consolidation.planning import PlanOptions
from moemerge.consolidation.policies import DEFAULT_POLICY
from moemerge.errors import Finding, InvalidRecipe, MoemergeError, NotFound, list_findings
from moemerge.refs import check_variant_name, parse_repository, parse_source, split_adapted

SCHEMA = "moemerge/recipe@1"
KINDS: dict[str, type] = {
    "schema": str,
    "variants": dict,
    "base": str,
    "budget": str,
    "policy": str,
    "within": bool,
    "max_ram": str,
}
"""What the value of each key is."""
_KIND_NAMES = {str: "text", dict: "names and references", bool: "true or false"}
REQUIRED = ("schema", "variants", "budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeTask:
    """What to merge and how to decide.

    Attributes:
        sources: `NAME=REF` of every variant.
        base: Reference of the common ancestor.
        decision: Options for a plan, or a plan.
        max_ram: Memory to stay within, as written.
    """

    sources: list[str]
    base: str | None
    decision: PlanOptions | ConsolidationPlan
    max_ram: str | None = None


def options_of(budget: str, policy: str | None = None, *, within: bool = False) -> PlanOptions:
    """Plan options from what a user wrote.

    Raises:
        InvalidRecipe: A value that cannot be right.
    """
    return PlanOptions(budget=parse_budget(budget), policy=policy or DEFAULT_POLICY, within=within)


def choose_task(
    sources: list[str],
    base: str | None,
    *,
    budget: str | None,
    policy: str | None,
    within: bool,
    plan: Path | None,
    recipe: Path | None,
) -> MergeTask:
    """The task that command-line options name.

    Raises:
        InvalidRecipe: Not exactly one of budget, plan and recipe, or options that do not go together.
        NotFound: The plan or recipe file does not exist.
    """
    given = [
        name
        for name, value in (("--budget", budget), ("--plan", plan), ("--recipe", recipe))
        if value is not None
    ]
    if len(given) != 1:
        raise InvalidRecipe(
            f"give exactly one of --budget, --plan and --recipe; given: {', '.join(given) or 'none'}"
        )
    if given != ["--budget"] and (policy or within):
        raise InvalidRecipe(f"--policy and --within go with --budget; {given[0]} has its own")
    if recipe is not None:
        if sources or base:
            raise InvalidRecipe("variants and base are in the recipe; leave them out of the command")
        return read_recipe(recipe)
    if plan is not None:
        return MergeTask(sources=sources, base=base, decision=read_plan(plan))
    assert budget is not None
    return MergeTask(sources=sources, base=base, decision=options_of(budget, policy, within=within))


def read_recipe(path: Path) -> MergeTask:
    """The task that a recipe file describes; relative folders in it start at the file's folder.

    Raises:
        NotFound: No such file.
        InvalidRecipe: With every problem of the file, each with its line.
    """
    raw = read_yaml(path)
    findings = [*_check_keys(raw, path), *_check_variants(raw, path), *_check_values(raw, path)]
    if findings:
        raise InvalidRecipe(list_findings(findings, str(path)), findings)
    return MergeTask(
        sources=[f"{name}={_from_folder(ref, path)}" for name, ref in raw["variants"].items()],
        base=_from_folder(raw["base"], path) if raw.get("base") else None,
        decision=options_of(raw["budget"], raw.get("policy"), within=raw.get("within", False)),
        max_ram=raw.get("max_ram"),
    )


def read_yaml(path: Path) -> Any:
    """Keys and values of a YAML file, which know their lines.

    Raises:
        NotFound: No such file.
        InvalidRecipe: It cannot be read, or is something else.
    """
    try:
        raw = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{path}: cannot be read ({error})") from error
    except (YAMLError, RecursionError) as error:
        raise InvalidRecipe(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InvalidRecipe(f"{path}: expected keys and values, found {type(raw).__name__}")
    return raw


def _check_keys(raw: Any, path: Path) -> list[Finding]:
    findings = []
    for key, value in raw.items():
        if key not in KINDS:
            close = difflib.get_close_matches(str(key), KINDS, n=1, cutoff=0.5)
            fix = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(KINDS)}"
            findings.append(_error(_where(path, raw, key), f"unknown key {key!r}", fix=fix))
        elif not isinstance(value, KINDS[key]):
            expected = _KIND_NAMES[KINDS[key]]
            findings.append(_error(_where(path, raw, key), f"{key} is {value!r}", expected=expected))
    findings += [_error(str(path), f"no {key!r}", fix="Add it") for key in REQUIRED if key not in raw]
    return findings


def _check_variants(raw: Any, path: Path) -> list[Finding]:
    variants = raw.get("variants")
    if not isinstance(variants, dict):
        return []
    if not variants:
        return [_error(_where(path, raw, "variants"), "no variants", fix="Write name: reference")]
    findings, taken = [], set[str]()
    for name, reference in variants.items():
        where = _where(path, variants, name)
        findings += _problem(where, check_variant_name, str(name), taken)
        taken.add(str(name))
        if isinstance(reference, str):
            findings += _problem(where, _parse_from, reference, path)
        else:
            findings.append(_error(where, f"{name} is {reference!r}", expected="a reference"))
    return findings


def _check_values(raw: Any, path: Path) -> list[Finding]:
    checks: dict[str, Callable[[Any], object]] = {
        "schema": _check_schema,
        "base": lambda reference: _parse_from(reference, path),
        "budget": parse_budget,
        "max_ram": parse_size,
        "policy": lambda policy: options_of("exact", policy, within=raw.get("within") is True),
    }
    return [
        finding
        for key, check in checks.items()
        if isinstance(raw.get(key), KINDS[key])
        for finding in _problem(_where(path, raw, key), check, raw[key])
    ]


def _check_schema(schema: str) -> None:
    if schema != SCHEMA:
        raise InvalidRecipe(f"schema is {schema!r}, expected {SCHEMA}")


def _problem(where: str, check: Callable[..., object], *values: object) -> list[Finding]:
    try:
        check(*values)
    except MoemergeError as error:
        return [_error(where, str(error))]
    return []


def _where(path: Path, mapping: Any, key: object) -> str:
    """File and line of a key; keys that a YAML merge brought in have no line of their own."""
    position = (mapping.lc.data or {}).get(key)
    return f"{path}, line {position[0] + 1}" if position else str(path)


def _parse_from(reference: str, path: Path) -> None:
    parse_source(_from_folder(reference, path))


def _from_folder(reference: str, path: Path) -> str:
    """The reference, a relative folder counted from the recipe's folder wherever the program runs."""
    if halves := split_adapted(reference, path.parent):
        return "+".join(_from_folder(half, path) for half in halves)
    if not reference.strip() or reference.startswith(("/", "~", "hf://")):
        return reference
    try:
        return str(parse_repository(reference))
    except InvalidRecipe:
        return str(path.parent.absolute() / reference)


def _error(where: str, found: str, expected: str = "", fix: str = "") -> Finding:
    return Finding(level="error", code="RECIPE", where=where, found=found, expected=expected, fix=fix)
