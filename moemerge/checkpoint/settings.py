"""From a `config.json` of any generation to the settings its family names.

Aliases must agree, absent keys take the reference implementation's class default, and a key that
nobody described is refused when it could alter routing and is truthy.
"""

import json
import re
import textwrap
from collections.abc import Callable, Collection
from typing import Any

from moemerge.checkpoint.family import Family, Setting, SettingRule, Settings, effective_step
from moemerge.errors import Finding

# Keys that transformers writes for every model and that do not change what the network computes.
_BOOKKEEPING = frozenset(
    """
    _attn_implementation _commit_hash _experts_implementation _from_model_config _name_or_path
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_past pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate rope_parameters
    rope_scaling sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
_LISTS = {"integers": "integer", "numbers": "number", "strings": "string"}
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 1_000_000
_ALTERS_ROUTING = re.compile(r"rout|expert|moe|capacity|top_?k|gate|sparse", re.IGNORECASE)


def read_settings(
    config: dict[str, Any], family: Family, where: str, names: Callable[[], Collection[str]] = tuple
) -> tuple[Settings, list[Finding]]:
    """The family's settings as this config gives them, with everything found on the way.

    Args:
        config: Parsed `config.json`.
        family: Description to read it by.
        where: File name for findings.
        names: Of the checkpoint's tensors; asked for only where a setting is counted from them.

    Returns:
        Settings by canonical name (complete even when there are errors, as far as possible), findings.
    """
    settings: Settings = {}
    findings: list[Finding] = []
    for name, rule in family.settings.items():
        value, problems = _read_setting(config, name, rule, settings, where)
        if problems and rule.from_names and (counted := family.count_experts(names())):
            value, problems = counted, []
        settings[name] = value
        findings += problems
    for stack in family.stacks:
        if stack.routed.step:
            # Written or implied by a count of sparse layers: variants are compared by what is meant.
            settings[stack.routed.step] = effective_step(stack, settings)
    findings += _implausible_sizes(settings, family, where)
    findings += _unknown_keys(config, family, where)
    return settings, findings


def _implausible_sizes(settings: Settings, family: Family, where: str) -> list[Finding]:
    """Every layer and expert is enumerated, so a hostile count must end here."""
    layers = sum(int(settings[stack.layers] or 0) for stack in family.stacks)
    experts = int(settings["num_experts"] or 0)
    if layers <= _MOST_LAYERS and layers * experts <= _MOST_EXPERTS:
        return []
    found = f"{layers} layers with {experts} experts"
    expected = f"at most {_MOST_LAYERS} layers and {_MOST_EXPERTS} experts"
    return [_error("CONFIG_IMPLAUSIBLE", where, found, expected)]


def _read_setting(
    config: dict[str, Any], name: str, rule: SettingRule, settings: Settings, where: str
) -> tuple[Setting, list[Finding]]:
    present = {key: value for key in rule.keys if (value := _lookup(config, key)) is not None}
    if len({_comparable(value) for value in present.values()}) > 1:
        listed = ", ".join(f"{key} = {value!r}" for key, value in present.items())
        return None, [
            Finding(
                level="error",
                code="CONFIG_CONTRADICTS",
                where=where,
                found=f"two spellings of {name} disagree: {listed}",
                fix="Keep the right one",
            )
        ]
    if not present and rule.optional and any(_is_null(config, key) for key in rule.keys):
        return None, []
    if not present:
        return _absent(name, rule, settings, where)
    key, value = next(iter(present.items()))
    if not _is_kind(value, rule.kind):
        found = f"{key} = {value!r}"
        return None, [_error("CONFIG_TYPE", where, found, _expected_kind(rule.kind))]
    if value == 0 and not isinstance(value, bool) and not rule.may_be_zero:
        return None, [_error("CONFIG_TYPE", where, f"{key} = {value!r}", "more than 0")]
    return _allowed(key, value, rule, where)


def _absent(name: str, rule: SettingRule, settings: Settings, where: str) -> tuple[Setting, list[Finding]]:
    if rule.default_from:
        values = [settings.get(source) for source in rule.default_from]
        if len(values) == 1 and values[0] is not None:
            return values[0], []
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) == 2 and numbers[1] > 0 and numbers[0] % numbers[1] == 0:
            return numbers[0] // numbers[1], []
    for truth, default in (rule.default_if or {}).items():
        if settings.get(truth):
            return default, []
    if rule.is_list and rule.default is not None:
        return rule.default, []
    if rule.default is not None:
        return _allowed(name, rule.default, rule, where)
    if rule.optional:
        return None, []
    return None, [_error("CONFIG_MISSING", where, f"no {' or '.join(rule.keys)}", f"a value for {name}")]


def _allowed(key: str, value: Any, rule: SettingRule, where: str) -> tuple[Setting, list[Finding]]:
    if rule.is_list:
        wrong = [entry for entry in value if rule.allowed is not None and entry not in rule.allowed]
        if not wrong:
            return json.dumps(value), []
        value = wrong[0]
    if rule.allowed is None or (isinstance(rule.allowed, list) and value in rule.allowed):
        return value, []
    if isinstance(rule.allowed, dict) and (spelt := _spelt(value)) in rule.allowed:
        return rule.allowed[spelt], []
    choices = ", ".join(repr(choice) for choice in rule.allowed or ())
    return None, [_error("CONFIG_UNSUPPORTED", where, f"{key} = {value!r}", choices)]


def _spelt(value: Any) -> str:
    """A value as mappings name it: truth values as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown_keys(config: dict[str, Any], family: Family, where: str) -> list[Finding]:
    known = _BOOKKEEPING | family.ignored_settings.keys()
    known |= {key.partition(".")[0] for rule in family.settings.values() for key in rule.keys}
    custom_code = "auto_map" in config
    findings = []
    for key in sorted(config.keys() - known):
        value = textwrap.shorten(repr(config[key]), 80)
        if config[key] and (custom_code or _ALTERS_ROUTING.search(key)):
            findings.append(
                Finding(
                    level="error",
                    code="CONFIG_UNKNOWN",
                    where=where,
                    found=f"{key} = {value} is not part of {family.name} and may alter routing",
                    fix="Remove the key if the model does not need it; custom model code is never run",
                )
            )
        else:
            found = f"{key} = {value} is not part of family {family.name}; ignored"
            findings.append(Finding(level="note", code="CONFIG_UNKNOWN", where=where, found=found))
    return findings


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _is_null(config: dict[str, Any], key: str) -> bool:
    """Whether the key is there and says that there is none."""
    *outer, last = key.split(".")
    place = _lookup(config, ".".join(outer)) if outer else config
    return isinstance(place, dict) and last in place and place[last] is None


def _is_kind(value: Any, kind: str) -> bool:
    if kind in _LISTS:
        return isinstance(value, list) and all(_is_kind(entry, _LISTS[kind]) for entry in value)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Larger numbers, and infinities, come from damaged or hostile files only.
    return 0 <= value <= 10**9 and (kind == "number" or isinstance(value, int))


def is_list_text(value: object, kind: str) -> bool:
    """Whether a setting is the JSON text of a list of that kind."""
    try:
        return _is_kind(json.loads(str(value)), kind)
    except json.JSONDecodeError:
        return False


def _expected_kind(kind: str) -> str:
    if kind in _LISTS:
        return f"a list of {kind}"
    if kind == "integer":
        return "a whole number from 0 to 10^9"
    return "a number from 0 to 10^9" if kind == "number" else f"a {kind}"


def _comparable(value: Any) -> str:
    return repr(float(value)) if isinstance(value, int | float) else repr(value)


def _error(code: str, where: str, found: str, expected: str) -> Finding:
    return Finding(level="error", code=code, where=where, found=found, expected=expected)
