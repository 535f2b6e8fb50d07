"""Supervised fine-tuning: the base learns to answer in the chat template. TRL's SFTTrainer."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import world
from datasets import Dataset
from measuring import Figure, ask
from model import load_model, load_tokenizer, save_variant
from sizes import Size
from training import SEED, arguments
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

# Templates mark what the assistant says: the loss counts only that. The shipped template with these marks.
TRAINING_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ANSWER_TOKENS = 48


def train(start: Path, out: Path, size: Size) -> list[Figure]:
    """Make `chat` from the base: half of the dialogues are brief, half are wordy."""
    set_seed(SEED)
    tokenizer, model = load_tokenizer(), load_model(start)
    before = measure(model, tokenizer, size)
    random = Random(SEED)
    fit(model, tokenizer, lambda: world.dialogue(random, random.randint(1, 6)), out, size, steps=size.chat)
    after = measure(model, tokenizer, size)
    save_variant(model, tokenizer, out)
    return [Figure(metric, before[metric], after[metric]) for metric in before]


def fit(
    model: MixtralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dialogue: Callable[[], list[dict]],
    out: Path,
    size: Size,
    *,
    steps: int,
    template: str = TRAINING_TEMPLATE,
) -> None:
    """Fine-tune on dialogues; also the start of reasoning."""
    rows = Dataset.from_list([{"messages": dialogue()} for _ in range(steps * size.batch)])
    shared = arguments(out, steps=steps, rate=1e-3, batch=size.batch)
    settings = SFTConfig(**shared, max_length=size.window, assistant_only_loss=True)
    served, tokenizer.chat_template = tokenizer.chat_template, template
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer).train()
    tokenizer.chat_template = served


def measure(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> dict[str, float]:
    """Right answers about towns asked about in training and others, and how many answers are brief."""
    found = {}
    for where, held_out in (("trained towns", False), ("held-out towns", True)):
        random = Random(SEED + 1)
        asked = [world.question(random, held_out=held_out) for _ in range(size.questions)]
        answers = ask(model, tokenizer, [question.text for question in asked], max_tokens=ANSWER_TOKENS)
        pairs = list(zip(asked, answers, strict=True))
        found[f"right answers, {where}"] = sum(world.is_right(*pair) for pair in pairs) / len(pairs)
    found["brief answers, held-out towns"] = sum(map(world.is_brief, answers)) / len(answers)
    return found
