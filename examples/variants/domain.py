"""Continual pre-training: the base goes on with the text of one domain, here code. transformers' Trainer."""

from pathlib import Path

import corpus
from measuring import Figure, perplexity
from model import load_model, load_tokenizer, save_variant
from pretrain import fit, windows
from sizes import Size
from training import SEED
from transformers import set_seed


def train(start: Path, out: Path, size: Size) -> list[Figure]:
    """Make `code` from the base; prose shows what is forgotten."""
    set_seed(SEED)
    tokenizer, model = load_tokenizer(), load_model(start)
    held_out = {"code": corpus.code(60_000, held_out=True), "prose": corpus.prose(60_000, held_out=True)}

    def measure() -> dict[str, float]:
        return {name: perplexity(model, tokenizer, text, size.window) for name, text in held_out.items()}

    before = measure()
    text = corpus.code(2 * corpus.CHARACTERS_PER_TOKEN * size.domain * size.batch * size.window)
    fit(
        model,
        windows(corpus.cut(text, 4000), tokenizer, size.window),
        out,
        size,
        steps=size.domain,
        rate=6e-4,
    )
    after = measure()
    save_variant(model, tokenizer, out)
    return [Figure(f"perplexity, {name}", before[name], after[name]) for name in held_out]
