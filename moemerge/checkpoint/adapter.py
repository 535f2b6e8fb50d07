"""What an adapter is: its configuration, checked, and the place of every tensor it has.

Only what changes weights in ways that are computed here is accepted. Knows nothing of the model that
an adapter belongs to.

Source: peft 0.21.2, `tuners/lora/config.py`.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge.checkpoint.headers import FLOAT_DTYPES, StoredTensor
from moemerge.checkpoint.repository import Repository, read_json
from moemerge.checkpoint.weights import ADAPTER, ADAPTER_CONFIG, is_adapter, read_weight_headers
from moemerge.errors import DamagedInput, Finding, UnsupportedCheckpoint, list_findings

# What these say concerns training, or which tensors there are, which the tensors themselves tell.
_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip
_REASONS = {
    "lora_bias": "biases of the factors are not applied",
    "layer_replication": "layers that are repeated make another model",
    "trainable_token_indices": "single rows of an embedding are not applied",
}
# Other ways to begin, such as pissa and olora, take something from the base before training.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# How peft looks a module up.
_ENDS_WITH = r"(.*\.)?({})$"


class AdapterConfig(BaseModel):
    """The keys of `adapter_config.json` that decide what a merge computes.

    Attributes:
        r: Rank, of modules that `rank_pattern` does not name.
        lora_alpha: What the sum is scaled by, over the rank; `alpha_pattern` overrides it.
        use_rslora: Whether the scale divides by the root of the rank.
        use_dora: Whether rows keep a norm of their own.
        peft_version: What wrote it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None
    r: int = Field(8, ge=1, le=2**20)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    @property
    def kind(self) -> str:
        """The method, as people call it."""
        return ("rs" if self.use_rslora else "") + ("DoRA" if self.use_dora else "LoRA")

    def rank(self, module: str) -> int:
        """Rank of a module, named as in the model."""
        return int(_find_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank(module)
        alpha = _find_pattern(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha / (rank**0.5 if self.use_rslora else rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as it is stored.

    Attributes:
        repository: Its files.
        config: Checked.
        tensors: By name.
    """

    repository: Repository
    config: AdapterConfig
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(repository: Repository) -> Adapter:
    """An adapter, from its configuration and header.

    Raises:
        UnsupportedCheckpoint: With everything about it that is not computed here.
        NotFound, DamagedInput: Files missing or damaged.
    """
    config, findings = read_adapter_config(repository)
    if findings:
        raise UnsupportedCheckpoint(
            list_findings(findings, f"{repository.label} cannot be applied"), findings
        )
    tensors = read_weight_headers(repository)
    if wrong := [tensor for tensor in tensors.values() if tensor.dtype not in FLOAT_DTYPES]:
        raise UnsupportedCheckpoint(
            f"{repository.label}/{ADAPTER}: {wrong[0].name} is stored as {wrong[0].dtype}, expected "
            f"{', '.join(FLOAT_DTYPES)}"
        )
    return Adapter(repository=repository, config=config, tensors=tensors)


def read_adapter_config(repository: Repository) -> tuple[AdapterConfig, list[Finding]]:
    """The configuration, and an error for everything in it that is not computed here.

    Raises:
        UnsupportedCheckpoint: Not an adapter, or one of another method than LoRA.
        DamagedInput: A key has a value that it cannot have.
    """
    where = f"{repository.label}/{ADAPTER_CONFIG}"
    if not is_adapter(repository):
        found = (
            "it has weights of a whole model"
            if ADAPTER_CONFIG in repository.files()
            else f"no {ADAPTER_CONFIG}"
        )
        raise UnsupportedCheckpoint(f"{repository.label}: not an adapter: {found}. Write BASE+ADAPTER")
    raw = read_json(repository, ADAPTER_CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedCheckpoint(
            f"{where}: peft_type is {raw.get('peft_type')!r}, expected 'LORA' (LoRA, rsLoRA or DoRA). "
            f"If peft can merge it, do that first and give the result"
        )
    try:
        config = AdapterConfig.model_validate(raw)
        for pattern in [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]:
            re.compile(_ENDS_WITH.format(pattern))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DamagedInput(f"{where}: {key} is {first['input']!r}: {first['msg'].lower()}") from error
    except re.error as error:
        raise DamagedInput(
            f"{where}: a key of rank_pattern or alpha_pattern is no pattern: {error}"
        ) from error
    return config, _find_unsupported(raw, where)


def _find_unsupported(raw: dict[str, Any], where: str) -> list[Finding]:
    found = []
    if (raw.get("bias") or "none") != "none":
        found.append((f"bias is {raw['bias']!r}", "trained biases of the base are not applied"))
    begin = raw.get("init_lora_weights")
    if begin not in _KEEP_BASE:
        found.append(
            (f"init_lora_weights is {begin!r}", "this way to begin changes the base that it was trained on")
        )
    known = AdapterConfig.model_fields.keys() | _WITHOUT_EFFECT
    found += [
        (f"{key} is {raw[key]!r:.80}", _REASONS.get(key, "what it changes is not known here"))
        for key in sorted(raw.keys() - known)
        if raw[key]
    ]
    fix = "Merge it with peft and give the result"
    return [
        Finding(level="error", code="ADAPTER_CONFIG", where=where, found=f"{what}; {why}", fix=fix)
        for what, why in found
    ]


def _find_pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with."""
    for pattern, value in (patterns or {}).items():
        if re.match(_ENDS_WITH.format(pattern), module):
            return float(value)
    return default
