"""What stages are measured by: likelihood of text, and answers to questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of a stage on held-out data."""

    metric: str
    before: float
    after: float


@torch.inference_mode()
def perplexity(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, window: int, windows: int = 64
) -> float:
    """Of a text, cut into windows."""
    model.eval()
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(windows, len(ids) // window)
    rows = ids[: count * window].view(count, window)
    losses = [
        model(input_ids=part, labels=part, output_router_logits=False).loss * len(part)
        for part in rows.split(16)
    ]
    return math.exp(sum(losses).item() / count)


@torch.inference_mode()
def ask(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """Answers in the chat template, the likeliest tokens or sampled ones."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    found = model.generate(**inputs, max_new_tokens=max_tokens, output_router_logits=False, **sampling)
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
