"""A checkpoint as its family sees it: every tensor in exactly one role.

Opened from headers alone, so all of this works before weights are downloaded.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from moemerge.checkpoint.family import Family, RoutedLayer, Settings, choose_family, effective_step
from moemerge.checkpoint.headers import FLOAT_DTYPES, StoredTensor
from moemerge.checkpoint.match import MatchedTensors, match_tensors
from moemerge.checkpoint.repository import LocalFolder, Repository, read_json
from moemerge.checkpoint.settings import read_settings
from moemerge.checkpoint.weights import (
    find_quantised,
    read_tensor_names,
    read_weight_headers,
    refuse_adapter,
)
from moemerge.errors import Finding, UnsupportedCheckpoint, raise_findings

logger = logging.getLogger(__name__)
Parts = dict[str, StoredTensor]
_UNQUANTISED = "Use the unquantised repository"
_DEQUANTISED = {
    "mxfp4": "Load it in transformers with Mxfp4Config(dequantize=True), save it, and give that folder"
}
EXPERTS = "experts."
"""How canonical names of expert tensors begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model: its family, settings and the place of every tensor.

    Attributes:
        label: How messages name it: path or repository.
        family: Its description.
        settings: Canonical settings, complete.
        config: `config.json` as found.
        layout: Name of the expert layout found on disk.
        tensors: Non-expert tensors by role; a tied head is absent once `resolve_ties` compared it.
        experts: Parts by (layer index, slot).
        routed_layers: Layers with experts.
        dropped: Names that are in the files and deliberately not kept, with the reason.
        repository: Where its files are.
        findings: Warnings and notes.
    """

    label: str
    family: Family
    settings: Settings
    config: dict[str, Any]
    layout: str
    tensors: dict[str, StoredTensor]
    experts: dict[tuple[int, int], Parts]
    routed_layers: list[RoutedLayer]
    dropped: dict[str, str]
    repository: Repository
    findings: tuple[Finding, ...]

    @property
    def num_experts(self) -> int:
        """Slots per routed layer, E."""
        return int(self.settings["num_experts"] or 0)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(part.nbytes for parts in self.experts.values() for part in parts.values())

    @property
    def other_bytes(self) -> int:
        """Bytes of all non-expert tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_local(self) -> bool:
        """Whether the weights can be read without a download."""
        return all(tensor.is_local for tensor in self.by_name().values())

    def by_name(self) -> dict[str, StoredTensor]:
        """Every tensor by its canonical name: its role, or its expert's part, whatever the layout."""
        named = dict(self.tensors)
        for (layer, slot), parts in self.experts.items():
            named |= {expert_name(layer, slot, part): tensor for part, tensor in parts.items()}
        return named

    def replaced(self, tensors: dict[str, StoredTensor], **changes: Any) -> "Checkpoint":
        """The same with other tensors under these canonical names, and other attributes."""
        experts = {
            (layer, slot): {part: tensors.get(expert_name(layer, slot, part), t) for part, t in parts.items()}
            for (layer, slot), parts in self.experts.items()
        }
        others = {role: tensors.get(role, tensor) for role, tensor in self.tensors.items()}
        return replace(self, tensors=others, experts=experts, **changes)

    @property
    def files(self) -> frozenset[Path]:
        """Files with its tensors."""
        experts = (part for parts in self.experts.values() for part in parts.values())
        return frozenset(tensor.path for tensor in (*self.tensors.values(), *experts))

    def at_layer(self, layer_index: int) -> "Checkpoint":
        """The same with nothing but what one routed layer's experts need: what is sent with work on it."""
        layer = next(layer for layer in self.routed_layers if layer.index == layer_index)
        block = f"{layer.stack}.{layer.block}."
        return replace(
            self,
            tensors={role: tensor for role, tensor in self.tensors.items() if role.startswith(block)},
            experts={place: parts for place, parts in self.experts.items() if place[0] == layer_index},
        )

    def side_file(self, name: str) -> Path | None:
        """Place of a tokenizer, template or configuration file, if it is there and local."""
        if not isinstance(self.repository, LocalFolder) or name not in self.repository.files():
            return None
        return self.repository.path / name

    def dtype_bytes(self) -> dict[str, int]:
        """Bytes per stored dtype, largest first."""
        totals: dict[str, int] = {}
        for tensor in self.by_name().values():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def expert_name(layer_index: int, slot: int, part: str) -> str:
    """Canonical name of an expert tensor."""
    return f"{EXPERTS}{layer_index}.{slot}.{part}"


def open_checkpoint(repository: Repository) -> Checkpoint:
    """Read configuration and headers, and account for every tensor.

    Raises:
        IncompatibleInputs: With every finding: settings, unknown or missing tensors, shapes.
        UnsupportedCheckpoint: A kind of checkpoint that is not read.
        NotFound, DamagedInput: Files missing or damaged.
    """
    refuse_adapter(repository)
    if "config.json" not in repository.files():
        # Kinds that have no config.json have a message of their own.
        read_weight_headers(repository)
        raise UnsupportedCheckpoint(
            f"{repository.label}: not a checkpoint: it has weights but no config.json"
        )
    where = f"{repository.label}/config.json"
    config, family, settings, findings = read_config(repository)
    stored = read_weight_headers(repository)
    findings += find_quantised(stored, repository.label)
    raise_findings(findings, f"{repository.label} cannot be consolidated")
    matched = match_tensors(stored, family, settings, repository.label)
    findings += matched.findings
    findings += _check_dtypes(matched, repository.label)
    findings += _check_sparse_steps(family, settings, config, where)
    findings += _check_choice(settings, where)
    raise_findings(findings, f"{repository.label} does not match family {family.name}")
    logger.debug("%s: %s, %d tensors in %s", repository.label, family.title, len(stored), matched.layout)
    return Checkpoint(
        label=repository.label,
        family=family,
        settings=settings,
        config=config,
        layout=matched.layout,
        tensors=matched.tensors,
        experts=matched.experts,
        routed_layers=family.routed_layers(settings),
        dropped=matched.dropped,
        repository=repository,
        findings=tuple(findings),
    )


def read_config(repository: Repository) -> tuple[dict[str, Any], Family, Settings, list[Finding]]:
    """What `config.json` alone tells: itself, the family, its settings, warnings and notes.

    Raises:
        IncompatibleInputs: With every finding about the settings.
        UnsupportedCheckpoint: Unknown family, or quantised.
        NotFound, DamagedInput: The file is missing or damaged.
    """
    config = read_json(repository, "config.json")
    where = f"{repository.label}/config.json"
    _refuse_quantised(config, repository)
    names = cache(partial(read_tensor_names, repository))
    family = choose_family(config.get("model_type"), names, where)
    settings, findings = read_settings(config, family, where, names)
    raise_findings(findings, f"{repository.label} cannot be read as {family.title}")
    return config, family, settings, findings


def _refuse_quantised(config: dict[str, Any], repository: Repository) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            method = (
                config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else "unknown"
            )
            fix = _DEQUANTISED.get(method, _UNQUANTISED)
            raise _quantised(f"{repository.label}/config.json", f"{key}: quantised by {method}", fix)
    if "quantize_config.json" in repository.files():
        raise _quantised(f"{repository.label}/quantize_config.json", "quantised by GPTQ")


def _quantised(where: str, found: str, fix: str = _UNQUANTISED) -> UnsupportedCheckpoint:
    finding = Finding(level="error", code="QUANTISED", where=where, found=found, fix=fix)
    return UnsupportedCheckpoint(str(finding), [finding])


def _check_dtypes(matched: MatchedTensors, where: str) -> list[Finding]:
    parts = [part for parts in matched.experts.values() for part in parts.values()]
    wrong = [t for t in [*matched.tensors.values(), *parts] if t.dtype not in FLOAT_DTYPES]
    if not wrong:
        return []
    return [
        Finding(
            level="error",
            code="DTYPE",
            where=where,
            found=f"{len(wrong)} tensors are not floating point; first {wrong[0].name} ({wrong[0].dtype})",
            expected=", ".join(FLOAT_DTYPES),
        )
    ]


def _check_choice(settings: Settings, where: str) -> list[Finding]:
    """A router cannot choose more experts than there are, nor none."""
    chosen, available = int(settings["num_experts_per_token"] or 0), int(settings["num_experts"] or 0)
    if 1 <= chosen <= available:
        return []
    found = f"{chosen} experts per token of {available}"
    return [
        Finding(
            level="error", code="CONFIG_IMPLAUSIBLE", where=where, found=found, expected=f"1 to {available}"
        )
    ]


def _check_sparse_steps(
    family: Family, settings: Settings, config: dict[str, Any], where: str
) -> list[Finding]:
    """Explicit steps and counts of sparse layers may contradict each other; the step decides."""
    findings = []
    for stack in family.stacks:
        step_key, count_key = stack.routed.step, stack.routed.count
        if not step_key or not count_key or not (step_key in config and count_key in config):
            continue
        layers = [layer for layer in family.routed_layers(settings) if layer.stack == stack.name]
        if len(layers) != settings[count_key]:
            step = effective_step(stack, settings)
            found = (
                f"{step_key} = {step} makes {len(layers)} sparse layers, {count_key} = {settings[count_key]}"
            )
            findings.append(
                Finding(
                    level="error",
                    code="CONFIG_CONTRADICTS",
                    where=where,
                    found=found,
                    fix="Keep the key that agrees with the tensors",
                )
            )
    return findings
