"""Reinforcement learning with a verifiable reward: sampled answers, rated by rule. TRL's GRPOTrainer."""

from pathlib import Path
from random import Random

import sums
from datasets import Dataset
from measuring import Figure
from model import load_model, load_tokenizer, save_variant
from sizes import Size
from think import ANSWER_TOKENS, measure
from training import SEED, arguments
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer


def train(start: Path, out: Path, size: Size) -> list[Figure]:
    """Make `thinker` from its start."""
    tokenizer, model = load_tokenizer(start), load_model(start)
    before = measure(model, tokenizer, size)
    set_seed(SEED)
    random = Random(SEED + 2)
    asked = [sums.problem(random, sums.REWARDED) for _ in range(size.reinforcement * size.prompts)]
    rows = [
        {"prompt": [{"role": "user", "content": problem.text}], "numbers": problem.numbers}
        for problem in asked
    ]
    shared = arguments(out, steps=size.reinforcement, rate=3e-4, batch=size.prompts * size.answers)
    settings = GRPOConfig(
        **shared, num_generations=size.answers, max_completion_length=ANSWER_TOKENS, temperature=1.0, beta=0.0
    )
    GRPOTrainer(
        model=model,
        args=settings,
        reward_funcs=rate,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train()
    after = measure(model, tokenizer, size)
    save_variant(model, tokenizer, out)
    return [Figure(metric, before[metric], after[metric]) for metric in before]


def rate(completions: list[list[dict]], numbers: list[list[int]], **_: object) -> list[float]:
    """Rewards of a batch, as GRPOTrainer asks for them."""
    return [
        sums.reward(sums.Problem(tuple(asked)), completion[0]["content"])
        for asked, completion in zip(numbers, completions, strict=True)
    ]
