"""Templates that reach out, do not end, or make something huge: an error in a moment, and little memory."""

import resource
import sys
import time

import pytest

from moemerge.errors import DamagedInput, InvalidRecipe
from moemerge.text.templates import ChatTemplate

CHAT = [{"role": "user", "content": "hello"}]
BIG = 10**10


def render(source, messages=CHAT, **options):
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}, "trio.moe, variant code").render(
        messages, **options
    )


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a generator": "{% for a in range(999)|map('abs') %}"
    "{% for b in range(9999)|select %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}"
    "{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "long output": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}
HUGE = {
    "repeated text": f"{{{{ 'x' * {BIG} }}}}",
    "repeated list": f"{{{{ ([1] * {BIG}) | length }}}}",
    "repeated from the left": f"{{{{ {BIG} * 'x' }}}}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "growing number": "{% set n = namespace(x=9) %}"
    "{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled by joining": "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by adding": "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled in a block": "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubled by a macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(x='x') %}"
    "{% for i in range(60) %}{% set n.x = d(n.x) %}{% endfor %}",
    "doubled by replacing": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set n.x = n.x|replace('x', n.x) %}{% endfor %}",
    "doubled by a method": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set n.x = n.x.replace('x', n.x) %}{% endfor %}",
    "doubled by join": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set n.x = n.x.join(['y', 'y', 'y']) %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested lists as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson | length }}",
    "wide filter": f"{{{{ 'x' | center({BIG}) }}}}",
    "wide method": f"{{{{ 'x'.ljust({BIG}) }}}}",
    "wide through map": f"{{{{ ['x'] | map('center', {BIG}) | list }}}}",
    "wide attribute": f"{{{{ ('x' | attr('rjust'))({BIG}) }}}}",
    "wide format": f"{{{{ '{{:>{BIG}}}'.format('x') }}}}",
    "wide format from an argument": f"{{{{ '{{:>{{}}}}'.format('x', '{BIG}') }}}}",
    "wide percent": f"{{{{ '%{BIG}d' % 1 }}}}",
    "wide percent from an argument": f"{{{{ '%*d' | format({BIG}, 1) }}}}",
    "indented": f"{{{{ 'x\n\n\n' | indent({BIG}) }}}}",
    "tabs": f"{{{{ '\t'.expandtabs({BIG}) }}}}",
    "batches": f"{{{{ [1] | batch({BIG}, 2) | list }}}}",
    "large range": f"{{{{ range({BIG}) | list }}}}",
}
OUTWARD = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "functions": "{{ namespace.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "own context": "{{ self._TemplateReference__context }}",
    "changed messages": "{{ messages.append(1) }}",
    "underscores": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "files": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.getcwd() }}",
}


# Whose result is an undefined value, which prints as nothing.
SILENT = ("globals", "own context")


@pytest.mark.parametrize("name", [*ENDLESS, *HUGE])
def test_template_that_does_not_end_is_an_error_in_a_moment(name):
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InvalidRecipe, match=r"trio\.moe, variant code: the chat template"):
        render({**ENDLESS, **HUGE}[name])
    assert time.process_time() - begin < 10
    megabytes = 1 if sys.platform == "linux" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024 * megabytes


@pytest.mark.parametrize("name", OUTWARD)
def test_template_that_reaches_out_finds_nothing(name):
    if name in SILENT:
        assert render(OUTWARD[name]) == ""
    else:
        with pytest.raises(InvalidRecipe, match="the chat template says"):
            render(OUTWARD[name])


def test_every_rendering_has_a_budget_of_its_own():
    source = "{% for a in range(90000) %}{% endfor %}{{ messages[0].content }}"
    template = ChatTemplate({"default": source}, {}, "x")
    assert {template.render(CHAT) for _ in range(10)} == {"hello"}


def test_long_conversations_fit_the_budget():
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ '<|' ~ m.role ~ '|>' ~ (m.content | trim).replace('\\r\\n', '\\n') }}"
        "{% if m.content is string and 'x' in m.content %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hello " * 200} for _ in range(3000)]
    assert len(render(source, messages)) > 3_000_000


def test_template_tells_its_reason():
    with pytest.raises(InvalidRecipe, match=r"the chat template says: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRecipe, match=r"says: .*'dict object' has no attribute 'name'"):
        render("{{ messages[0].name.first }}")
    with pytest.raises(InvalidRecipe, match=r"says: .*division"):
        render("{{ 1 // 0 }}")


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'x' ", "{% bogus %}", "{{ x|bogus }}", "(" * 5 + "{{" + "(" * 9999]
)
def test_what_is_no_template_is_damage(source):
    with pytest.raises(DamagedInput, match="variant code: the chat template cannot be compiled"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] has no role"),
        (["x"], r"messages\[0\] has no role"),
        ([*CHAT, {"role": "user", "content": 7}], r"messages\[1\].content is 7"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "part of type 'x'"),
    ],
)
def test_messages_that_cannot_be_are_refused(messages, named):
    with pytest.raises(InvalidRecipe, match=named):
        render("{{ messages }}", messages)


def test_parts_of_text_become_one():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"


def test_variables_reach_the_template_and_cannot_replace_the_messages():
    assert render("{{ thinking }}{{ messages[0].content }}", variables={"thinking": True}) == "Truehello"
    with pytest.raises(InvalidRecipe, match="messages, which the template is given anyway"):
        render("{{ messages[0].content }}", variables={"messages": []})
