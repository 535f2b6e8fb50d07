"""The model of all stages: a small Mixtral, with the tokenizer and chat template of the shipped family."""

from pathlib import Path

import torch
from sizes import Size
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

TOKENIZER = Path(__file__).parents[1] / "families" / "mini" / "base"


def load_tokenizer(folder: Path = TOKENIZER) -> PreTrainedTokenizerBase:
    """Byte-level BPE with role tokens, padded on the left as generating needs it."""
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def new_model(size: Size, tokenizer: PreTrainedTokenizerBase) -> MixtralForCausalLM:
    """A Mixtral with fresh weights."""
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2 * size.window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    return MixtralForCausalLM(config)


def load_model(folder: Path) -> MixtralForCausalLM:
    """A stage's model, in float32 to be trained on."""
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_variant(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary checkpoint in bfloat16 with its tokenizer."""
    model.config.output_router_logits = False
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
