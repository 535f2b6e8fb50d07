"""Direct preference optimisation: of two right answers the brief one. TRL's DPOTrainer with PEFT's LoRA.

Only attention is adapted, so the experts stay those of `chat` to the bit, which moemerge finds. It takes the
adapter as it is; the merged checkpoint is there to be compared with.
"""

from pathlib import Path
from random import Random

import chat
import world
from datasets import Dataset
from measuring import Figure
from model import load_model, load_tokenizer, save_variant
from peft import LoraConfig
from sizes import Size
from training import SEED, arguments
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]
# The likelihood of the chosen answer counts, too. Without it, and at five times the rate and twice the steps,
# the margin grew to 19 and not one answer was right any more.
LOSS = {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}


def train(start: Path, out: Path, size: Size) -> list[Figure]:
    """Make `preferred` from `chat`; the reference is the same model without the adapter."""
    set_seed(SEED)
    tokenizer, model = load_tokenizer(), load_model(start)
    before = chat.measure(model, tokenizer, size)
    shared = arguments(out, steps=size.preference, rate=2e-4, batch=size.preference_batch)
    settings = DPOConfig(**shared, **LOSS, max_length=size.window, per_device_eval_batch_size=64)
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=pairs(Random(SEED), size.preference * size.preference_batch),
        eval_dataset=pairs(Random(SEED + 1), size.questions, held_out=True),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED, task_type="CAUSAL_LM"),
    )
    start_margins = trainer.evaluate()
    trainer.train()
    margins = trainer.evaluate()
    trainer.model.save_pretrained(out / "adapter")
    tuned = trainer.model.merge_and_unload()
    after = chat.measure(tuned, tokenizer, size)
    save_variant(tuned, tokenizer, out)
    return [
        *(
            Figure(f"preference {name}, held-out pairs", start_margins[key], margins[key])
            for name, key in (("margin", "eval_rewards/margins"), ("accuracy", "eval_rewards/accuracies"))
        ),
        *(Figure(metric, before[metric], after[metric]) for metric in before),
    ]


def pairs(random: Random, count: int, *, held_out: bool = False) -> Dataset:
    """Questions with a brief answer chosen and a wordy one rejected."""
    asked = [world.question(random, held_out=held_out) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question.text}],
                "chosen": [{"role": "assistant", "content": question.brief}],
                "rejected": [{"role": "assistant", "content": question.wordy}],
            }
            for question in asked
        ]
    )
