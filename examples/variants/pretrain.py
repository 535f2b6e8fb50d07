"""Pre-training: fresh weights on a mixture of prose, code, facts and sums. transformers' Trainer."""

from pathlib import Path

import corpus
from datasets import Dataset
from measuring import Figure, perplexity
from model import load_tokenizer, new_model, save_variant
from sizes import Size
from training import SEED, arguments
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed


def train(start: Path | None, out: Path, size: Size) -> list[Figure]:
    """Make the base, the common ancestor of all variants."""
    set_seed(SEED)
    tokenizer = load_tokenizer()
    model = new_model(size, tokenizer)
    held_out = {"prose": corpus.prose(60_000, held_out=True), "code": corpus.code(60_000, held_out=True)}

    def measure() -> dict[str, float]:
        return {name: perplexity(model, tokenizer, text, size.window) for name, text in held_out.items()}

    before = measure()
    passages = corpus.mixture(size.pretraining * size.batch * size.window)
    fit(model, windows(passages, tokenizer, size.window), out, size, steps=size.pretraining, rate=2e-3)
    after = measure()
    save_variant(model, tokenizer, out)
    return [Figure(f"perplexity, {name}", before[name], after[name]) for name in held_out]


def windows(passages: list[str], tokenizer, window: int) -> Dataset:  # noqa: ANN001
    """Passages, ended by the end token and cut into windows of equal length."""
    ids = [token for row in tokenizer(passages)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
    rows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def fit(model, rows: Dataset, out: Path, size: Size, *, steps: int, rate: float) -> None:  # noqa: ANN001
    """Train on running text, as pre-training and continual pre-training do."""
    settings = TrainingArguments(**arguments(out, steps=steps, rate=rate, batch=size.batch))
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=default_data_collator).train()
