"""The start of reasoning: a little supervised fine-tuning on the format. TRL's SFTTrainer.

Without it no sampled answer would earn anything, and reinforcement would have nothing to go by.
"""

from pathlib import Path
from random import Random

import chat
import sums
from measuring import Figure, ask
from model import load_model, load_tokenizer, save_variant
from sizes import Size
from training import SEED
from transformers import MixtralForCausalLM, PreTrainedTokenizerBase, set_seed

# As T1's: the prompt opens the thinking, so that an answer has the closing tag alone. T1's also drops what
# earlier turns thought; here it stays where a message has it.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if '</think>' in m['content'] %}{{ '<think>\n' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
TRAINING_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ANSWER_TOKENS = 24


def train(start: Path, out: Path, size: Size) -> list[Figure]:
    """Make `thinker-start` from the base."""
    set_seed(SEED)
    tokenizer, model = load_tokenizer(), load_model(start)
    tokenizer.chat_template = TEMPLATE
    before = measure(model, tokenizer, size)
    random = Random(SEED)
    chat.fit(
        model,
        tokenizer,
        lambda: sums.dialogue(random, random.randint(3, 8), sums.SHOWN),
        out,
        size,
        steps=size.format,
        template=TRAINING_TEMPLATE,
    )
    after = measure(model, tokenizer, size)
    save_variant(model, tokenizer, out)
    return [Figure(metric, before[metric], after[metric]) for metric in before]


def measure(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, size: Size) -> dict[str, float]:
    """Reward of sampled answers, and right ones among the likeliest, on problems kept from all training."""
    set_seed(SEED)
    random = Random(SEED + 1)
    asked = [sums.problem(random, sums.HELD_OUT) for _ in range(size.questions)]
    questions = [problem.text for problem in asked]
    sampled = ask(model, tokenizer, questions, max_tokens=ANSWER_TOKENS, temperature=1.0)
    likeliest = ask(model, tokenizer, questions, max_tokens=ANSWER_TOKENS)
    rewards = [sums.reward(problem, text) for problem, text in zip(asked, sampled, strict=True)]
    right = [sums.is_right(problem, text) for problem, text in zip(asked, likeliest, strict=True)]
    return {
        "mean reward, sampled, held-out sums": sum(rewards) / len(rewards),
        "right answers, held-out sums": sum(right) / len(right),
    }
