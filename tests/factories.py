"""Tiny checkpoints, written from the family descriptions and never through transformers.

    from tests.factories import write_checkpoint, write_siblings

    base = write_checkpoint(tmp_path / "base")                          # Mixtral, bf16, one file
    code = write_checkpoint(tmp_path / "code", base=base, noise=0.05, seed=1)   # a fine-tune of it
    base, tunes = write_siblings(tmp_path, names=("code", "law"), family="switch_transformers")

The same arguments give the same bytes. A weight depends on the seed and on its canonical name only
(`decoder.0.router`, `experts.0.3.gate`), so layout, sharding, dtype and file kind may vary while the
weights stay the same. Vocabularies of different lengths share their first rows. Mixtral has 2 layers,
Switch 4 + 4 of which 1 and 3 are sparse; D = 32, F = 48, E = 4. Each folder also has a tokenizer
that knows 61 characters, a generation config, a chat template, a licence and a model card.

`edit_json`, `edit_tensors`, `edit_header`, `flip_byte`, `truncate` and `write_lfs_pointer` damage or
change what was written.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.family import Family, Settings, evaluate_shape, load_families
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader

TINY: Settings = {
    "hidden_size": 32,
    "expert_size": 48,
    "dense_size": 56,
    "shared_size": 40,
    "latent_size": 20,
    "unrotated_size": 12,
    "value_size": 10,
    "query_rank": None,
    "num_layers": 2,
    "num_encoder_layers": 4,
    "num_decoder_layers": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "position_buckets": 8,
    "position_max_distance": 32,
    "max_positions": 128,
    "rope_theta": 10000.0,
    "rope_base_length": 64,
    "rope_trained_length": 128,
    "vocab_size": 64,
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CHARACTERS = " \n.,!?:;'\"()-<>|/_=+*[]#@0123456789abcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "telechat": "TelechatForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "phimoe": "PhimoeForCausalLM",
}
_DRAWN_ROWS = 512


def write_checkpoint(
    folder: Path,
    family: str = "mixtral",
    *,
    seed: int = 0,
    base: Path | None = None,
    noise: float = 0.0,
    only: Callable[[str], bool] | None = None,
    vocab: int | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    shard_bytes: int | None = None,
    weights: str = "safetensors",
    tied: bool | None = None,
    tied_copies: bool = False,
    generation: str = "5",
    settings: Settings | None = None,
    config: dict[str, Any] | None = None,
    prefixed: bool = True,
    side_files: bool = True,
) -> Path:
    """Write one checkpoint into `folder`, which is created.

    Args:
        folder: Where to.
        family: Its name; taken from `base` when there is one.
        seed: Of weights, or of the noise when `base` is given.
        base: Folder of a checkpoint to be a fine-tune of; settings, dtype and vocabulary follow it.
        noise: Size of the difference to `base`, relative to each tensor's standard deviation.
        only: Canonical names that get noise, for example `lambda n: n.startswith("experts.1.")`.
        vocab: Rows of embedding and head; rows that `base` lacks are drawn anew.
        dtype: `BF16` (default), `F16`, `F32` or `F64`.
        layout: One of the family's, by name; the first unless given.
        shard_bytes: Start another file when one has so many bytes. Parts of an expert are far apart.
        weights: `safetensors`, or `pickle` for `pytorch_model.bin`.
        tied: Whether the head is the embedding and absent; the class default otherwise.
        tied_copies: Store tied copies all the same, as pickles of transformers do.
        generation: `4` or `5`, the major version of transformers whose config keys are written.
        settings: Canonical settings that replace the tiny ones.
        config: Keys put into `config.json` as they are; None removes one.
        prefixed: Whether names have the prefix that their family may leave out.
        side_files: Whether to write tokenizer, generation config, template, licence and model card.
    """
    tensors: dict[str, Tensor] | None = None
    inherited: Settings = {}
    if base is not None:
        family, inherited, tensors, stored = _read_canonical(base)
        dtype = dtype or stored
        tied = bool(inherited["tied_head"]) if tied is None else tied
    description = load_families()[family]
    values = _tiny_settings(description, {**inherited, **(settings or {})}, vocab)
    if tied is not None:
        values["tied_head"] = tied
    dtype = dtype or "BF16"
    drawn = _draw_weights(description, values, seed)
    if tensors is not None:
        drawn = _fine_tune(tensors, drawn, noise, only)
    named = _name_tensors(description, values, drawn, layout, DTYPES[dtype])
    if tied_copies:
        named |= _tied_copies(description, values, named)
    if not prefixed:
        named = {name.removeprefix(description.optional_prefix): tensor for name, tensor in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = _config(description, values, dtype, generation)
    removed = {key for key, value in (config or {}).items() if value is None}
    written = {key: value for key, value in {**written, **(config or {})}.items() if key not in removed}
    write_json(folder / "config.json", written)
    write_weights(folder, named, shard_bytes=shard_bytes, kind=weights)
    if side_files:
        _write_side_files(folder, family, int(values["vocab_size"] or 0), generation)
    return folder


def write_siblings(
    folder: Path,
    family: str = "mixtral",
    *,
    names: Sequence[str] = ("code", "law"),
    noise: float = 0.1,
    **options: Any,
) -> tuple[Path, dict[str, Path]]:
    """A base in `folder/base` and one fine-tune of it per name; `options` as `write_checkpoint` has them."""
    base = write_checkpoint(folder / "base", family, **options)
    tunes = {
        name: write_checkpoint(folder / name, base=base, noise=noise, seed=number + 1, **options)
        for number, name in enumerate(names)
    }
    return base, tunes


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: item for key, item in value.items() if item is not None})


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Let `edit` change the dictionary of tensors of one safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the header of a safetensors file; the tensor bytes stay as they are."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def flip_byte(path: Path, offset: int = -1) -> None:
    """Invert one byte; negative offsets count from the end."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0xFF
    path.write_bytes(raw)


def truncate(path: Path, keep: int) -> None:
    """Cut a file to `keep` bytes; negative: that many less than it has."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(keep if keep >= 0 else size + keep)


def write_lfs_pointer(path: Path) -> None:
    """Replace a file by the pointer that Git leaves when LFS is not installed."""
    size = path.stat().st_size if path.exists() else 0
    digest = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n")


def write_weights(
    folder: Path, tensors: dict[str, Tensor], *, shard_bytes: int | None = None, kind: str = "safetensors"
) -> list[Path]:
    """Write tensors as one file, or as shards with an index."""
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    shards = _split(tensors, shard_bytes)
    names = [f"{stem}.{ending}"]
    if shard_bytes is not None:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.{ending}" for i in range(1, len(shards) + 1)]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{ending}.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        if kind == "safetensors":
            save_file({key: tensor.clone() for key, tensor in shard.items()}, folder / name, {"format": "pt"})
        else:
            torch.save(shard, folder / name)
    return [folder / name for name in names]


def read_canonical(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by canonical name, in its stored dtype."""
    checkpoint = open_checkpoint(LocalFolder(folder))
    with TensorReader() as reader:
        tensors = {role: reader.read(tensor) for role, tensor in checkpoint.tensors.items()}
        for (layer, slot), parts in checkpoint.experts.items():
            tensors |= {f"experts.{layer}.{slot}.{part}": reader.read(t) for part, t in parts.items()}
    return tensors


def _read_canonical(folder: Path) -> tuple[str, Settings, dict[str, Tensor], str]:
    checkpoint = open_checkpoint(LocalFolder(folder))
    return (
        checkpoint.family.name,
        checkpoint.settings,
        read_canonical(folder),
        next(iter(checkpoint.dtype_bytes())),
    )


def _tiny_settings(family: Family, overrides: Settings, vocab: int | None) -> Settings:
    values: Settings = {}
    for name, rule in family.settings.items():
        choice = TINY.get(name, rule.default) if rule.keys else rule.default
        if isinstance(rule.allowed, list) and choice not in rule.allowed:
            choice = rule.default
        if choice is None and rule.default_from:
            first, *divisor = (int(values[source]) for source in rule.default_from)
            choice = first // divisor[0] if divisor else first
        values[name] = overrides.get(name, choice)
    if vocab is not None:
        values["vocab_size"] = vocab
    return values


def _draw_weights(family: Family, settings: Settings, seed: int) -> dict[str, Tensor]:
    """Canonical weights in float32: norms near one, matrices that keep the size of what they multiply."""
    symbols = family.symbols(settings)
    drawn = {}
    for role, _, pattern in family.expected_tensors(settings):
        shape = evaluate_shape(pattern.shape, symbols)
        if role == "head" and settings["tied_head"]:
            continue
        rows = max(shape[0], _DRAWN_ROWS) if pattern.shape[0] == "Vo" else shape[0]
        values = _normal((rows, *shape[1:]), f"{seed}:{role}")[: shape[0]]
        drawn[role] = 1 + 0.1 * values if role.endswith("norm") else values / math.sqrt(shape[-1])
    for layer in family.routed_layers(settings):
        for slot in range(int(settings["num_experts"] or 0)):
            for part in family.experts.parts:
                name = f"experts.{layer.index}.{slot}.{part}"
                shape = family.part_shape(part, settings)
                drawn[name] = _normal(shape, f"{seed}:{name}") / math.sqrt(shape[-1])
    return drawn


def _normal(shape: tuple[int, ...], key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator)


def _fine_tune(
    base: dict[str, Tensor], drawn: dict[str, Tensor], noise: float, only: Callable[[str], bool] | None
) -> dict[str, Tensor]:
    tuned = {}
    for name, fresh in drawn.items():
        if name not in base:
            tuned[name] = fresh
            continue
        original = base[name].float()
        rows = min(len(original), len(fresh))
        values = fresh.clone()
        values[:rows] = original[:rows]
        if noise and (only is None or only(name)):
            direction = fresh - 1 if name.endswith("norm") else fresh
            scale = original.std() / direction.std().clamp_min(1e-12)
            values[:rows] += noise * scale * direction[:rows]
        tuned[name] = values
    return tuned


def _name_tensors(
    family: Family, settings: Settings, drawn: dict[str, Tensor], layout_name: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by their names on disk, with the parts of an expert far apart."""
    layouts = [layout.name for layout in family.experts.layouts]
    number = layouts.index(layout_name or layouts[0])
    named = {
        names[min(number, len(names) - 1)]: drawn[role].to(dtype)
        for role, names, _ in family.expected_tensors(settings)
        if role in drawn
    }
    slots = range(int(settings["num_experts"] or 0))
    for layer in family.routed_layers(settings):
        for tensor in reversed(family.experts.layouts[number].tensors):
            experts = torch.stack(
                [
                    torch.stack([drawn[f"experts.{layer.index}.{slot}.{part}"] for part in tensor.holds])
                    for slot in slots
                ]
            ).to(dtype)
            if tensor.is_stacked:
                named[family.expert_tensor_name(tensor, layer)] = _lay_out(experts, tensor.axes)
                continue
            for slot in slots:
                one = _lay_out(experts[slot : slot + 1], ["expert", *tensor.axes])
                named[family.expert_tensor_name(tensor, layer, slot)] = one[0]
    return named


def _lay_out(experts: Tensor, axes: list[str]) -> Tensor:
    """Experts [expert, part, row, column] or [expert, part, row] with their dimensions as `axes` say."""
    dimensions = ["expert", "part", "row", "column"][: experts.ndim]
    factors = [axis.split("*") for axis in axes]
    named = [dimensions.index(factor) for own in factors for factor in own]
    order = [number for number in range(experts.ndim) if number not in named] + named
    sizes = [math.prod(experts.shape[dimensions.index(factor)] for factor in own) for own in factors]
    return experts.permute(order).reshape(sizes).contiguous()


def _tied_copies(family: Family, settings: Settings, named: dict[str, Tensor]) -> dict[str, Tensor]:
    names = family.role_names(settings)
    copies = {copy: named[names[role]] for copy, role in family.tied_copies.items()}
    if settings["tied_head"]:
        copies[names["head"]] = named[names["embedding"]]
    return copies


def _config(family: Family, settings: Settings, dtype: str, generation: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [_CLASSES[family.model_type]],
        "transformers_version": "5.23.0" if generation == "5" else "4.57.6",
        "dtype" if generation == "5" else "torch_dtype": CONFIG_DTYPES[dtype],
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if family.arithmetic == "encoder_decoder":
        config |= {"is_encoder_decoder": True, "eos_token_id": 1}
    else:
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    for name, rule in family.settings.items():
        value = settings[name]
        if not rule.keys or (value is None and rule.default is None):
            continue
        if isinstance(rule.allowed, dict):
            value = next((key for key, renamed in rule.allowed.items() if renamed == value), value)
        if isinstance(value, str) and (rule.kind == "boolean" or rule.is_list):
            value = json.loads(value)
        if generation == "4" and name == "tied_head" and value == rule.default:
            continue
        _put(config, rule.keys, value, generation)
    return config


def _put(config: dict[str, Any], keys: list[str], value: object, generation: str) -> None:
    flat = [key for key in keys if "." not in key]
    key = keys[0] if generation == "5" else next(iter(flat), None)
    if key is None:
        return
    *outer, last = key.split(".")
    for step in outer:
        config = config.setdefault(step, {})
    config[last] = value


def _split(tensors: dict[str, Tensor], shard_bytes: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shard_bytes is not None and shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _write_side_files(folder: Path, family: str, vocab: int, generation: str) -> None:
    seq2seq = load_families()[family].arithmetic == "encoder_decoder"
    special = ["<pad>", "</s>", "<unk>"] if seq2seq else ["<unk>", "<s>", "</s>"]
    write_tokenizer(folder / "tokenizer.json", special, vocab)
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    names |= {"pad_token": "<pad>"} if seq2seq else {"bos_token": "<s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    if generation == "4":
        write_json(folder / "special_tokens_map.json", names)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if not seq2seq:
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "generation_config.json", ids)
    (folder / "LICENSE").write_text("Apache License, Version 2.0\n", encoding="utf-8")
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {folder.name}\n", encoding="utf-8")


def write_tokenizer(path: Path, special: Sequence[str], vocab: int) -> None:
    """A real character tokenizer: three special tokens, 61 characters, then ChatML markers if they fit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokens = [*special, *CHARACTERS][: min(vocab, 64)]
    model = models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    markers = ["<|im_end|>", "<|im_start|>"] if vocab >= 66 else []
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in [*special, *markers]])
    begins = "<s>" in special
    edge = "<s>" if begins else "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{edge} $A" if begins else f"$A {edge}",
        special_tokens=[(edge, list(special).index(edge))],
    )
    tokenizer.save(str(path))
