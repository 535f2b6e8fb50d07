"""Which checkpoints a mergekit configuration merges. How it merges them has no counterpart here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.consolidation.recipe import read_yaml
from moemerge.errors import Finding, InvalidRecipe, list_findings

_UNDERSTOOD = {"models", "slices", "modules", "base_model"}
_MODEL_KEYS = {"model", "path", "revision"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergekitModels:
    """What is taken over.

    Attributes:
        sources: References in the order of the file, each once, without the base.
        base: Reference of the base model.
        left_out: Keys of the file that say how to merge.
    """

    sources: list[str]
    base: str | None
    left_out: list[str]


def read_mergekit(path: Path) -> MergekitModels:
    """The checkpoints that a mergekit configuration names, from `models`, `slices` or `modules`.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Not such a file, one that builds a mixture of dense models, or with adapters.
    """
    raw = read_yaml(path)
    if "experts" in raw:
        raise InvalidRecipe(
            f"{path}: builds a mixture of dense models (experts:), which moemerge does not do. "
            f"Give checkpoints that are mixtures already"
        )
    findings: list[Finding] = []
    base = _reference(raw.get("base_model"), path, findings)
    sources = [_reference(value, path, findings) for value in _models(raw)]
    if findings:
        raise InvalidRecipe(list_findings(findings, str(path)), findings)
    named = [source for source in dict.fromkeys(sources) if source and source != base]
    if not named:
        raise InvalidRecipe(f"{path}: names no models; expected models:, slices: or modules: of mergekit")
    return MergekitModels(sources=named, base=base, left_out=[str(key) for key in raw.keys() - _UNDERSTOOD])


def _models(raw: Any) -> Iterator[Any]:
    """Whatever stands where mergekit expects a model, in any of its three forms."""
    for entry in _list(raw.get("models")):
        yield entry.get("model") if isinstance(entry, dict) else entry
    modules = raw.get("modules")
    for part in [raw, *(modules.values() if isinstance(modules, dict) else ())]:
        for piece in _list(part.get("slices")) if isinstance(part, dict) else ():
            for source in _list(piece.get("sources")) if isinstance(piece, dict) else ():
                yield source.get("model") if isinstance(source, dict) else source


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _reference(value: Any, path: Path, findings: list[Finding]) -> str | None:
    """`path@revision` of a model in either of mergekit's spellings; what is not one becomes a finding."""
    if value is None:
        return None
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        inner: dict[str, Any] = value["model"]
        value = {**inner, **{key: item for key, item in value.items() if key != "model"}}
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.keys() <= _MODEL_KEYS:
        revision = value.get("revision")
        value = f"{value['path']}@{revision}" if revision else value["path"]
    if isinstance(value, str) and value and "+" not in value:
        return value
    is_adapter = isinstance(value, str) or (isinstance(value, dict) and "lora" in value)
    fix = "Merge adapters into their model first and give the result" if is_adapter else ""
    found = f"{value!r} has an adapter" if is_adapter else f"{value!r} is not a model"
    findings.append(Finding(level="error", code="MERGEKIT", where=str(path), found=found, fix=fix))
    return None
