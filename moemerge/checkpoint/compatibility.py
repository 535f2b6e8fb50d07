"""Whether checkpoints can be consolidated together: every reason at once.

Pure: opened checkpoints in, findings out.
"""

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.family import Family, Settings
from moemerge.errors import Finding


def compare_variants(variants: dict[str, Checkpoint]) -> list[Finding]:
    """What differs between variants, judged by their family's description.

    Settings marked `equal` must agree with the first variant; `warn` and `free` may differ. Stored
    dtypes and vocabularies may differ and are told.
    """
    names = list(variants)
    first_name, first = names[0], variants[names[0]]
    findings: list[Finding] = []
    for name in names[1:]:
        other = variants[name]
        findings += compare_with(name, other, first_name, first.family, first.settings)
        if other.family.name == first.family.name:
            findings += _compare_dtypes(name, other, first_name, first)
    findings += _find_repeated(variants)
    return findings


def compare_with(
    name: str, other: Checkpoint, first_name: str, family: Family, settings: Settings
) -> list[Finding]:
    """What differs between a checkpoint and a variant of which family and settings are known."""
    if other.family.name != family.name:
        return [_differs("error", name, "family", other.family.name, family.name, first_name)]
    findings = []
    for setting, rule in family.settings.items():
        ours, theirs = settings[setting], other.settings[setting]
        if ours == theirs:
            continue
        level = {"equal": "error", "warn": "warning", "free": "note"}[rule.variants]
        findings.append(_differs(level, name, setting, theirs, ours, first_name))
    return findings


def _compare_dtypes(name: str, other: Checkpoint, first_name: str, first: Checkpoint) -> list[Finding]:
    ours, theirs = list(first.dtype_bytes()), list(other.dtype_bytes())
    if sorted(ours) == sorted(theirs):
        return []
    return [_differs("note", name, "stored dtype", "+".join(theirs), "+".join(ours), first_name)]


def _find_repeated(variants: dict[str, Checkpoint]) -> list[Finding]:
    by_label: dict[str, list[str]] = {}
    for name, checkpoint in variants.items():
        by_label.setdefault(checkpoint.label, []).append(name)
    return [
        Finding(
            level="note",
            code="SAME_SOURCE",
            where=", ".join(names),
            found=f"are the same checkpoint, {label}; its tensors are stored once",
        )
        for label, names in by_label.items()
        if len(names) > 1
    ]


def _differs(level: str, name: str, what: str, found: object, expected: object, first_name: str) -> Finding:
    fix = "Only variants of one base can share experts" if level == "error" else ""
    return Finding(
        level=level,  # type: ignore[arg-type]
        code="VARIANTS_DIFFER",
        where=f"variant {name}",
        found=f"{what} is {found}",
        expected=f"{expected} as in {first_name}" if level == "error" else f"{first_name} has {expected}",
        fix=fix,
    )
