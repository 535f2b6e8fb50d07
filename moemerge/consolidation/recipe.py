"""A merge as a YAML file, or as options: which variants, and how to decide.

Unknown keys are refused with the nearest known one; all problems of a file are told together.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.plan import ConsolidationPlan, read_plan
from moemerge.consolidation.planning import PlanOptions
from moemerge.consolidation.policies import DEFAULT_POLICY
from moemerge.errors import Finding, InvalidRecipe, MoemergeError, NotFound
from moemerge.refs import FolderRef, parse_named_sources, parse_source

SCHEMA = "moemerge/recipe@1"
_KINDS: dict[str, type] = {
    "schema": str,
    "variants": dict,
    "base": str,
    "budget": str,
    "policy": str,
    "within": bool,
    "max_ram": str,
}
_REQUIRED = ("schema", "variants", "budget")


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


def options_of(budget: str, policy: str | None, *, within: bool) -> PlanOptions:
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
    raw = _load(path)
    findings = _check_keys(raw, path)
    if not findings:
        findings = _check_values(raw, path)
    if findings:
        lines = "\n".join(f"  - {finding}" for finding in findings)
        raise InvalidRecipe(f"{path}: {len(findings)} problems\n{lines}", findings)
    return MergeTask(
        sources=[f"{name}={_from_folder(str(ref), path)}" for name, ref in raw["variants"].items()],
        base=_from_folder(raw["base"], path) if raw.get("base") else None,
        decision=options_of(raw["budget"], raw.get("policy"), within=raw.get("within", False)),
        max_ram=raw.get("max_ram"),
    )


def _load(path: Path) -> Any:
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
        where = f"{path}, line {raw.lc.key(key)[0] + 1}"
        if key not in _KINDS:
            close = difflib.get_close_matches(str(key), _KINDS, n=1, cutoff=0.5)
            fix = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(_KINDS)}"
            findings.append(_error(where, f"unknown key {key!r}", fix=fix))
        elif not isinstance(value, _KINDS[key]):
            findings.append(_error(where, f"{key} is {value!r}", expected=_KINDS[key].__name__))
    findings += [_error(str(path), f"no {key!r}", fix="Add it") for key in _REQUIRED if key not in raw]
    return findings


def _check_values(raw: Any, path: Path) -> list[Finding]:
    findings = []

    def check(key: str, action: Any) -> None:
        try:
            action()
        except MoemergeError as error:
            findings.append(_error(f"{path}, line {raw.lc.key(key)[0] + 1}", str(error)))

    if raw["schema"] != SCHEMA:
        line = raw.lc.key("schema")[0] + 1
        findings.append(_error(f"{path}, line {line}", f"schema is {raw['schema']!r}", expected=SCHEMA))
    named = [f"{name}={_from_folder(str(ref), path)}" for name, ref in raw["variants"].items()]
    check("variants", lambda: parse_named_sources(named))
    if raw.get("base"):
        check("base", lambda: parse_source(_from_folder(raw["base"], path)))
    policy_key = "policy" if "policy" in raw else "budget"
    check("budget", lambda: parse_budget(raw["budget"]))
    if not findings:
        check(
            policy_key, lambda: options_of(raw["budget"], raw.get("policy"), within=raw.get("within", False))
        )
    return findings


def _from_folder(reference: str, path: Path) -> str:
    if not reference.startswith("."):
        return reference
    ref = parse_source(reference)
    return str(path.parent.absolute() / ref.path) if isinstance(ref, FolderRef) else reference


def _error(where: str, found: str, expected: str = "", fix: str = "") -> Finding:
    return Finding(level="error", code="RECIPE", where=where, found=found, expected=expected, fix=fix)
