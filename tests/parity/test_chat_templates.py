"""Chat templates render as transformers renders them, and the tokenizer sees the same ids."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moemerge.checkpoint.tokenizer import load_tokenizer
from moemerge.text.templates import load_chat_template

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini" / "code"

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Whitespace is cut, roles must alternate, the system message moves into the first user message.
LLAMA = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = false %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.first and system %}
        {%- set content = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + content | trim + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}
        {{- ' ' + content | trim + ' ' + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
# Namespaces, macros, tools, filters, loop controls, slices and tests.
TOOLS = """{%- macro describe(tool, depth=0) %}
{{ ' ' * depth }}{{ tool.function.name | upper }}: {{ tool.function | tojson(indent=2) }}
{%- endmacro %}
{%- set ns = namespace(count=0, last='') %}
{%- if tools is not none and tools %}
  {%- for tool in tools %}{{ describe(tool, depth=loop.index) }}{% endfor %}
{%- endif %}
{% for message in messages if message.role != 'system' %}
  {%- if loop.index > 3 %}{% break %}{% endif %}
  {%- if message.content is not defined %}{% continue %}{% endif %}
  {%- set ns.count = ns.count + 1 %}
  {%- set ns.last = message.content.split('|')[0] %}
  {{- '<|' + message.role + '|>' + message.content.strip() + (eos_token if not loop.last else '') }}
  {{- loop.cycle('-', '=') }}{{ loop.previtem.role if loop.previtem is defined else 'none' }}
{%- endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ '%03d' % ns.count }} {{ ns.last | default('x', true) }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }} {{ dict(a=1).items() | list }}
{{- {'b': 2, 'a': [1, none, true, 1.5]} | tojson }} {{ "<&>'é" | tojson }} {{ range(2, 9, 3) | list }}
{%- for key, value in messages[0].items() recursive %} {{ key }}={{ value | length }}{% endfor %}
{%- if thinking is defined and thinking %}<think>{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
OWN = (MINI / "chat_template.jinja").read_text(encoding="utf-8")

CHATS = {
    "one": [{"role": "user", "content": "Q: 17 + 25"}],
    "turns": [
        {"role": "user", "content": "  for é <b>\n"},
        {"role": "assistant", "content": "x | y"},
        {"role": "user", "content": "and 日本 😀"},
    ],
    "system": [{"role": "system", "content": " be kind "}, {"role": "user", "content": "hello"}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer and no template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(MINI / name, tmp_path)
    return tmp_path


def both(folder, chat, **options):
    """What transformers and we render and tokenize."""
    reference = AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(lambda name: find(folder, name), "code")
    text = template.render(chat, **options)
    assert text == reference.apply_chat_template(chat, tokenize=False, **options)
    ids = load_tokenizer(lambda name: find(folder, name), "code").encode(text, add_special_tokens=False)
    assert ids == reference.apply_chat_template(chat, tokenize=True, **options)["input_ids"]
    return text


def find(folder, name):
    return folder / name if (folder / name).is_file() else None


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("source", [OWN, CHATML, LLAMA, TOOLS], ids=["own", "chatml", "llama", "tools"])
def test_text_is_that_of_transformers(source, chat, generation_prompt, folder):
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    text = both(folder, CHATS[chat], add_generation_prompt=generation_prompt, tools=None)
    assert CHATS[chat][-1]["content"].strip() in text


def test_tools_reach_the_template(folder):
    (folder / "chat_template.jinja").write_text(TOOLS, encoding="utf-8")
    assert "ADD" in both(folder, CHATS["turns"], add_generation_prompt=True, tools=[TOOL, TOOL])


def test_values_that_are_none_are_as_good_as_absent(folder):
    (folder / "chat_template.jinja").write_text(TOOLS, encoding="utf-8")
    chat = [*CHATS["one"], {"role": "assistant", "content": None, "tool_calls": None}]
    both(folder, chat, add_generation_prompt=True)


@pytest.mark.parametrize("named", [False, True])
def test_templates_in_the_configuration_count_and_files_win(named, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML
    if named:
        config["chat_template"] = [
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": TOOLS},
        ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "<|im_start|>user" in both(folder, CHATS["one"], add_generation_prompt=True)
    assert ("ADD" in both(folder, CHATS["one"], add_generation_prompt=True, tools=[TOOL])) == named
    (folder / "chat_template.jinja").write_text(OWN, encoding="utf-8")
    assert "<|im_start|>" not in both(folder, CHATS["one"], add_generation_prompt=True)


def test_special_tokens_written_as_objects_are_known(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"__type": "AddedToken", "content": "</s>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(OWN, encoding="utf-8")
    assert "</s>" in both(folder, CHATS["one"], add_generation_prompt=False)
