"""A merge as a YAML file, or as options.

Unknown keys are refused with the nearest known one; all problems of a file are told together.
"""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moemerge.calibration.passes import check_dtype
from moemerge.checkpoint.sizes import parse_size
from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.gate import Gate
from moemerge.consolidation.plan import read_plan
from moemerge.consolidation.planning import PlanOptions
from moemerge.consolidation.quality import RepairOptions
from moemerge.consolidation.task import EvidenceOptions, Limits, MergeTask, options_of
from moemerge.errors import Finding, InvalidRecipe, MoemergeError, NotFound, list_findings
from moemerge.refs import check_variant_name, parse_repository, parse_source, split_adapted

SCHEMA = "moemerge/recipe@1"
KINDS: dict[str, type] = {
    "schema": str,
    "variants": dict,
    "base": str,
    "budget": str,
    "fit": str,
    "fit_batch": int,
    "fit_tokens": int,
    "quality": float,
    "floor": float,
    "text": dict,
    "tokens": int,
    "dtype": str,
    "calibration": str,
    "policy": str,
    "within": bool,
    "repair": bool,
    "heal": int,
    "max_ram": str,
}
"""What the value of each key is."""
_KIND_NAMES = {
    str: "text",
    dict: "names and references or files",
    bool: "true or false",
    int: "a number",
    float: "a share such as 0.99",
}
REQUIRED = ("schema", "variants")
DECIDES = ("budget", "fit", "quality", "floor")
"""One of these at least says how much is stored."""
_ANY_BUDGET = "1x"


def choose_task(
    sources: list[str],
    base: str | None,
    *,
    limits: Limits,
    policy: str | None,
    within: bool,
    evidence: EvidenceOptions,
    repair: RepairOptions | None,
    plan: Path | None,
    recipe: Path | None,
) -> MergeTask:
    """The task that command-line options name.

    Raises:
        InvalidRecipe: Not exactly one of limits, plan and recipe, or options that do not go together.
        NotFound: The plan or recipe file does not exist.
    """
    given = [
        name
        for name, is_given in (
            ("--budget (or --fit, --quality, --floor)", limits.is_given),
            ("--plan", plan is not None),
            ("--recipe", recipe is not None),
        )
        if is_given
    ]
    if len(given) != 1:
        raise InvalidRecipe(
            f"give exactly one of --budget (or --fit, --quality, --floor), --plan and --recipe; given: "
            f"{', '.join(given) or 'none'}"
        )
    if not limits.is_given and (policy or within):
        raise InvalidRecipe(f"--policy and --within go with --budget; {given[0]} has its own")
    if recipe is not None:
        if sources or base or evidence.is_given or repair is not None:
            raise InvalidRecipe(
                "variants, base, text, calibration and repair are in the recipe; leave them out of the "
                "command"
            )
        return read_recipe(recipe)
    decision = read_plan(plan) if plan is not None else options_of(limits, policy, within=within)
    return MergeTask(
        sources=sources,
        base=base,
        decision=decision,
        evidence=evidence,
        repair=repair or RepairOptions(),
    )


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
        decision=_options(raw),
        evidence=_evidence(raw, path),
        repair=_repair(raw),
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
        elif not _is_kind(value, KINDS[key]):
            expected = _KIND_NAMES[KINDS[key]]
            findings.append(_error(_where(path, raw, key), f"{key} is {value!r}", expected=expected))
    findings += [_error(str(path), f"no {key!r}", fix="Add it") for key in REQUIRED if key not in raw]
    if not any(key in raw for key in DECIDES):
        fix = f"Add it, or one of {', '.join(DECIDES[1:])}"
        findings.append(_error(str(path), f"no {DECIDES[0]!r}", fix=fix))
    return findings


def _is_kind(value: object, kind: type) -> bool:
    """Whether a value is of a kind; numbers may be whole, true and false are none."""
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _options(raw: Any) -> PlanOptions:
    limits = Limits(
        budget=raw.get("budget"),
        fit=raw.get("fit"),
        fit_batch=raw.get("fit_batch"),
        fit_tokens=raw.get("fit_tokens"),
        quality=raw.get("quality"),
        floor=raw.get("floor"),
    )
    return options_of(limits, raw.get("policy"), within=raw.get("within", False))


def _evidence(raw: Any, path: Path) -> EvidenceOptions:
    """Files count from the recipe's folder, as references do."""
    folder = path.parent.absolute()
    texts = [f"{name}={folder / Path(file).expanduser()}" for name, file in raw.get("text", {}).items()]
    calibration = raw.get("calibration")
    return EvidenceOptions.of(
        texts,
        raw.get("tokens"),
        raw.get("dtype"),
        None if calibration is None else folder / Path(calibration).expanduser(),
    )


def _repair(raw: Any) -> RepairOptions:
    defaults = RepairOptions()
    return RepairOptions(repair=raw.get("repair", defaults.repair), heal=raw.get("heal", defaults.heal))


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
        "fit": parse_size,
        "quality": lambda share: Gate(mean=share),
        "floor": lambda share: Gate(floor=share),
        "text": _check_texts,
        "dtype": check_dtype,
        "heal": lambda steps: RepairOptions(heal=steps),
        "policy": lambda policy: options_of(_ANY_BUDGET, policy, within=raw.get("within") is True),
    }
    findings = [
        finding
        for key, check in checks.items()
        if _is_kind(raw.get(key), KINDS[key])
        for finding in _problem(_where(path, raw, key), check, raw[key])
    ]
    # What does not go together; only when every value by itself is right.
    return findings or [
        finding
        for check in (_options, partial(_evidence, path=path))
        if all(_is_kind(value, KINDS[key]) for key, value in raw.items() if key in KINDS)
        for finding in _problem(str(path), check, raw)
        if any(key in raw for key in DECIDES)
    ]


def _check_texts(texts: Any) -> None:
    if wrong := [name for name, file in texts.items() if not isinstance(file, str)]:
        raise InvalidRecipe(f"text of {wrong[0]} is {texts[wrong[0]]!r}, expected the path of a file")


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
