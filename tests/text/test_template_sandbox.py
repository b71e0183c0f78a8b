"""The sandbox of chat templates: what transformers renders, and what no template may do."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llama.text.template_meter import TooMuchError, measure
from llama.text.template_sandbox import Sandbox

MESSAGES: Any = [
    {"role": "system", "content": "a <b> 'c' é\n"},
    {"role": "user", "content": "x, y | z", "parts": [{"type": "text", "n": [1, 2.5, None, True]}]},
]
FEATURES = [
    "{% for m in messages %}\n  {% if loop.first %}\n  {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ messages|tojson(ensure_ascii=True) }}",
    "{{ messages[1].parts|tojson(separators=(',', ':'), sort_keys=True) }}",
    "{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 }}{% break %}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% set x = 1 %}{% endgeneration %}{{ x }}",
    "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}"
    "{{ ns.a }}",
    "{% macro f(x, y=2) %}{{ x }}-{{ y }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) }}{{ f('a', 3) }}{% call f(0) %}inner{% endcall %}",
    "{{ messages[1:][0].content.split(',')[-1].strip().title() }}{{ messages[::-1][0].role }}",
    "{{ messages|map(attribute='role')|join('+') }}{{ messages|selectattr('role', 'eq', 'user')"
    "|list|length }}{{ ['b', 'a']|sort }}{{ {'k': 1}.items()|list }}{{ {'k': 1}|items|list }}",
    "{{ 'a' in 'cat' and 2 > 1 and 'role' in messages[0] }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ '%d' % 3 }}"
    "{{ 123456789 * 1000 }}{{ 3 * 10 ** 9 }}{{ 0.5 * 123456789 }}{{ true * 99999999 }}",
    "{{ 'x' * 3 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ '{} {b}'.format(1, b=2) }}",
    "{{ messages[0].content|replace('a', 'b')|trim|upper|indent(2, true) }}{{ none|default('d') }}",
    "{{ nothing }}{{ tools is none }}{{ messages is iterable }}{{ 'x' is string }}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b[1] }}{{ dict(x=1).x }}{{ dict([['y', 2]])|tojson }}",
    "{% filter upper %}abc{% endfilter %}{% set c %}d{% endset %}{{ c }}{{ range(3)|list }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}|dictsort(reverse=true) %}{{ k ~ v }}{% endfor %}",
    "{{ messages[0].get('name', 'no') }}{{ messages[0]['content'].startswith('a') | int }}",
    "{% for m in messages %}{{ m.content.replace('a', 'b') }}{{ m.role.replace('s', '', 1) }}"
    "{{ m.content.split(' ')|join('_') }}{{ '+'.join(m.content) }}{% endfor %}",
    "{{ messages|join('-', attribute='role') }}{{ ['a', 1]|join(d=', ') }}"
    "{{ [['x', 2]]|join('', 1) }}",
    "{# a comment #}{%- if true -%}  x  {%- endif -%}\n y",
]


def render(source: str, variables: dict[str, Any]) -> str:
    sandbox = Sandbox()
    return sandbox.render(sandbox.compile_source(source), variables)


@pytest.mark.parametrize("source", FEATURES)
def test_renders_as_transformers(source: str) -> None:
    given = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True}
    [expected], _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True
    )
    assert render(source, given) == expected


LOOP = "{% set ns = namespace(x=FIRST) %}{% for i in range(200) %}{% set ns.x = NEXT %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999)|map('upper')|list|length }}{% endfor %}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% set x %}{% for i in range(99999) %}" + "y" * 90000 + "{% endfor %}{% endset %}",
        "{% macro f() %}" + "y" * 90000 + "{% endmacro %}{% set x %}{% for i in range(99999) %}"
        "{{ f() }}{% endfor %}{% endset %}",
        LOOP.replace("FIRST", "'a'").replace("NEXT", "ns.x ~ ns.x"),
        LOOP.replace("FIRST", "'a'").replace("NEXT", "ns.x + ns.x"),
        LOOP.replace("FIRST", "'a'").replace("NEXT", "'%s%s' % (ns.x, ns.x)"),
        LOOP.replace("FIRST", "'a'").replace("NEXT", "'{0}{0}'.format(ns.x)"),
        LOOP.replace("FIRST", "'a'").replace("NEXT", "ns.x.replace('a', 'aa')"),
        LOOP.replace("FIRST", "'a'").replace("NEXT", "ns.x|replace('a', 'aa')"),
        LOOP.replace("FIRST", "'ab'").replace("NEXT", "ns.x.join(ns.x)"),
        LOOP.replace("FIRST", "'ab'").replace("NEXT", "ns.x|join(ns.x)"),
        LOOP.replace("FIRST", "'ab'").replace("NEXT", "ns.x|escape ~ ns.x"),
        LOOP.replace("FIRST", "3").replace("NEXT", "ns.x * ns.x"),
        LOOP.replace("FIRST", "3").replace("NEXT", "ns.x ** 9"),
        LOOP.replace("FIRST", "[]").replace("NEXT", "[ns.x, ns.x]"),
        LOOP.replace("FIRST", "[]").replace("NEXT", "(ns.x, ns.x)"),
        LOOP.replace("FIRST", "[]").replace("NEXT", "{'a': ns.x, 'b': ns.x}"),
        LOOP.replace("FIRST", "[]").replace("NEXT", "dict(a=ns.x, b=ns.x)"),
        LOOP.replace("FIRST", "[]").replace("NEXT", "[ns.x]|map('default')|list + [ns.x]"),
        LOOP.replace("FIRST", "1").replace("NEXT", "[ns, ns]"),
        "{% set ns = namespace() %}{% set ns.x = namespace(y=ns) %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a\ta'.expandtabs(10 ** 9) }}",
        "{{ 'a'|center(10 ** 9) }}",
        "{{ 'a\n'|indent(10 ** 9) }}",
        "{{ [1]|tojson(indent=10 ** 9) }}",
        "{{ (1).to_bytes(10 ** 9, 'big') }}",
        "{{ 1|round(10 ** 9) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ range(10 ** 9) }}",
        "{% set b = 'a' * 90000 %}{% for i in range(99999) %}{{ 'ab' in b }}{% endfor %}",
        "{% set b = 'a' * 90000 %}{% for i in range(99999) %}{{ b[1:]|length }}{% endfor %}",
        "{% set b = 'a' * 90000 %}{% for i in range(99999) %}{{ b.count('ab') }}{% endfor %}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{{ 1" + " + 1" * 9000 + " }}",
        "x" * 300_000,
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(x)[5] }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include 'secret' %}",
        "{% import 'os' as os %}",
    ],
)
def test_hostile_templates(source: str) -> None:
    """Each is refused before it costs much: the whole table takes seconds."""
    given: Any = {"messages": [{"role": "user"}]}
    with pytest.raises(Exception) as caught:
        render(source, given)
    assert not isinstance(caught.value, MemoryError)
    assert given == {"messages": [{"role": "user"}]}


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(2000)|list|tojson(separators=('a' * 9000, ':')) }}",
        "{{ {'a': [1] * 2000}|tojson(indent='a' * 9000) }}",
        "{{ ('a\\r' * 2000)|indent(9000) }}",
        "{{ ('\\x0b' * 2000)|indent(9000, blank=true) }}",
        "{{ ('\\u2028' * 2000)|indent('a' * 9000, true, true) }}",
    ],
)
def test_large_values_are_refused_before_they_exist(source: str) -> None:
    sandbox = Sandbox()
    template = sandbox.compile_source(source)
    tracemalloc.start()
    try:
        with pytest.raises(TooMuchError, match="too large"):
            sandbox.render(template, {})
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_long_dialogs_are_rendered() -> None:
    """Limits grow with the input."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' and loop.index < messages|length %}"
        "{{ m.role ~ m.content|trim + '\n' }}{% endif %}{% endfor %}{{ messages[1:]|length }}"
    )
    for n, size in ((2000, 100), (3, 2_000_000)):
        messages = [{"role": "user", "content": "x" * size} for _ in range(n)]
        text = render(source, {"messages": messages})
        assert text == ("user" + "x" * size + "\n") * (n - 1) + str(n - 1)


def test_measure() -> None:
    assert measure("abc") == (1, 3, 0)
    assert measure(["ab", {"c": ["d", 1]}]) == (7, 4, 3)
    shared: list[Any] = ["ab"]
    for _ in range(10):
        shared = [shared, shared]
    assert measure(shared)[:2] == (2**11 - 1 + 2**10, 2 * 2**10)
    with pytest.raises(TooMuchError, match="too large"):
        measure(shared, 8 * 1000)
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(TooMuchError, match="deeply"):
        measure(deep)
