"""Adapters for tests: made and merged by peft, or written tensor by tensor.

    adapter = train_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    expected = merge_with_peft(base, adapter, tmp_path / "merged")      # a checkpoint's folder
    adapter = write_adapter(tmp_path / "adapter", {"model.norm.weight": tensor}, r=4)

Nothing is trained: every factor is drawn at random, so that a wrong scale, order or orientation shows.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from tests.factories import write_json


def train_adapter(
    base: Path, folder: Path, *, vocab: int | None = None, seed: int = 0, **config: Any
) -> Path:
    """Let peft make an adapter of a checkpoint; `config` as `LoraConfig` has it."""
    model = load_model(base)
    if vocab is not None:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                drawn = torch.randn(parameter.shape, generator=generator) / 8
                # Norms of rows, and weights that are kept whole, stay near what they were.
                parameter.data = parameter.data * (1 + drawn) if "lora_A" not in name else drawn
                if "lora_B" in name or "embedding" in name:
                    parameter.data = drawn.to(parameter.dtype)
        adapted.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapter: Path, folder: Path, *, vocab: int | None = None) -> Path:
    """The checkpoint that peft makes of base and adapter."""
    model = load_model(base)
    if vocab is not None:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> PreTrainedModel:
    """The reference library's model of a checkpoint, in its stored dtype."""
    for kind in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        try:
            return kind.from_pretrained(folder, dtype="auto")
        except ValueError as error:
            last = error
    raise last


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter of exactly these tensors, by names without `base_model.model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base", **config}
    write_json(folder / "adapter_config.json", {key: v for key, v in written.items() if v is not None})
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
