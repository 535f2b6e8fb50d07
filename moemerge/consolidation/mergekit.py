"""Which checkpoints a mergekit configuration merges. How it merges them has no counterpart here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.consolidation.recipe import read_yaml
from moemerge.errors import Finding, InvalidRecipe, list_findings

_UNDERSTOOD = {"models", "slices", "modules", "base_model"}
_PATH_KEYS = {"path", "revision"}


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
        InvalidRecipe: Not such a file, or one that builds a mixture of dense models.
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
    """A model in any of mergekit's spellings, as `path@revision` or with an adapter as `path+path`.

    What is not one becomes a finding.
    """
    if value is None:
        return None
    halves = [value]
    if isinstance(value, dict) and ("lora" in value or isinstance(value.get("model"), dict)):
        halves = [value.get("model"), *([value["lora"]] if value.get("lora") else [])]
    if all(map(_is_path, halves)) and (halves == [value] or value.keys() <= {"model", "lora"}):
        return "+".join(map(_path, halves))
    findings.append(
        Finding(level="error", code="MERGEKIT", where=str(path), found=f"{value!r} is not a model")
    )
    return None


def _is_path(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("path"), str) and value.keys() <= _PATH_KEYS
    return isinstance(value, str) and bool(value)


def _path(value: Any) -> str:
    if isinstance(value, str):
        return value
    revision = value.get("revision")
    return f"{value['path']}@{revision}" if revision else str(value["path"])
