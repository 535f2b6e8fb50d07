"""Variants that think first, as T1 does: the template opens the thinking, the answer closes it."""

from pathlib import Path

from tokenizers import Tokenizer

from moemerge.text.reasoning import CLOSE

TEMPLATE = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ message['role'] }}: {{ content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def make_thinking(checkpoint: Path) -> Path:
    """Give a generated checkpoint of at least 67 tokens that template, and a token for the closing tag."""
    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([CLOSE])
    tokenizer.save(path)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return checkpoint
