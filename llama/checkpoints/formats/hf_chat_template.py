"""The Jinja chat template of an export, for `ChatFormat`'s built-in formats. Knows no files.

The template runs in other programs (transformers, vLLM), which render a whole prompt as text and
then encode it. It gives the ids of `ChatFormat.encode_dialog_prompt`, or it raises:

- Text of a special token in a message would become that token, and so could end the turn.
- Calls are encoded apart from the text before them. It raises where one encoding would join them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from llama.text.tool_prompt import BUILTIN_TOOLS, describe_tools
from llama.tokenizer import ChatFormat, Tokenizer

# Names in capitals are replaced by literals. `trim` is Python's `str.strip`.
_CHECKS = r"""
{%- macro plain(text) -%}
  {%- if text is not string -%}
    {{- raise_exception('the content of a message must be text') -}}
  {%- endif -%}
  {%- for token in SPECIAL_TOKENS if token in text -%}
    {{- raise_exception('a message or tool has ' ~ token ~ ', which would become a special token; '
                        ~ 'remove it, or encode the dialog with ChatFormat of llama3') -}}
  {%- endfor -%}
  {{- text -}}
{%- endmacro -%}
{%- if documents -%}
  {{- raise_exception('this chat format has no documents; put them into a message') -}}
{%- endif -%}
"""
_ROLE = r"""
  {%- if message.role not in ROLES -%}
    {{- raise_exception('unknown role ' ~ message.role ~ '; use one of ' ~ ROLES) -}}
  {%- endif -%}
"""
_NO_TOOLS = r"""
{%- if tools or builtin_tools -%}
  {{- raise_exception('this chat format has no tools; they need Llama 3.1 or later') -}}
{%- endif -%}
{%- for message in messages if message.tool_calls -%}
  {{- raise_exception('this chat format has no tool_calls; they need Llama 3.1 or later') -}}
{%- endfor -%}
"""
_LLAMA3_PLAIN = r"""
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}ROLE_CHECK
  {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n'
      ~ plain(message.content) | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
_LLAMA3_TOOLS = r"""
{%- macro turn(role, text, end='<|eot_id|>') -%}
  {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text ~ end -}}
{%- endmacro -%}
{{- '<|begin_of_text|>' -}}
{%- if tool_form is defined and tool_form != 'json' -%}
  {{- raise_exception('this template writes tools as JSON only; leave out tool_form') -}}
{%- endif -%}
{%- set rest = messages -%}
{%- if tools or builtin_tools -%}
  {%- set parts = ['Environment: ipython'] -%}
  {%- set searching = (builtin_tools or []) | reject('eq', 'code_interpreter') | list -%}
  {%- if searching -%}
    {%- set parts = ['Environment: ipython\nTools: ' ~ searching | join(', ')] -%}
  {%- endif -%}
  {%- if messages and messages[0].role == 'system' -%}
    {%- set rest = messages[1:] -%}
    {%- set parts = parts + [plain(messages[0].content) | trim] -%}
  {%- endif -%}
  {{- turn('system', plain(parts | select | join('\n\n'))) -}}
{%- endif -%}
{%- if tools -%}
  {%- set listed = namespace(text='') -%}
  {%- for tool in tools -%}
    {%- set function = tool.function or tool -%}
    {%- if function is not mapping or not function.name -%}
      {{- raise_exception('a tool is {"type": "function", "function": {"name": ...}}') -}}
    {%- endif -%}
    {%- set wrapped = {'type': 'function', 'function': function} | tojson(indent=4) -%}
    {%- set listed.text = listed.text ~ ('' if loop.first else '\n') ~ wrapped -%}
  {%- endfor -%}
  {{- turn('user', plain(BEFORE_TOOLS ~ listed.text ~ AFTER_TOOLS)) -}}
{%- endif -%}
{%- for message in rest -%}ROLE_CHECK
  {%- set calls = message.tool_calls or [] -%}
  {%- if calls and message.role != 'assistant' -%}
    {{- raise_exception('only an assistant has tool_calls') -}}
  {%- endif -%}
  {%- set content = '' if calls and not message.content else message.content -%}
  {%- set said = namespace(text=plain(content) | trim, code='') -%}
  {%- for call in calls -%}
    {%- set function = call.function or call -%}
    {%- set values = function.arguments -%}
    {%- if values is not mapping -%}
      {{- raise_exception('the arguments of a call are an object, not text; decode the JSON') -}}
    {%- endif -%}
    {%- set names = values | list if calls | length == 1 else [] -%}
    {%- if function.name == 'code_interpreter' and names == ['code'] and values.code is string -%}
      {%- set said.code = '<|python_tag|>' ~ plain(values.code) -%}
    {%- elif function.name in BUILTIN_TOOLS and names == ['query'] and values.query is string -%}
      {%- if said.text or '\\"' in values.query or values.query.endswith('\\') -%}
        {{- raise_exception('text before a call of ' ~ function.name ~ ', or a backslash before a '
                            ~ 'quote in it: encode the dialog with ChatFormat of llama3') -}}
      {%- endif -%}
      {%- set query = values.query | replace('"', '\\"') -%}
      {%- set said.text = function.name ~ '.call(query="' ~ query ~ '")' -%}
    {%- else -%}
      {%- for end in JOINED if said.text.endswith(end) -%}
        {{- raise_exception('the text before a call ends with ' ~ end ~ ', whose tokens would '
                            ~ 'differ; end it with a letter or a full stop') -}}
      {%- endfor -%}
      {%- set value = {'type': 'function', 'name': function.name, 'parameters': values} -%}
      {%- set said.text = said.text ~ value | tojson(ensure_ascii=True) -%}
    {%- endif -%}
  {%- endfor -%}
  {{- turn('ipython' if message.role == 'tool' else message.role, plain(said.text) ~ said.code,
           '<|eom_id|>' if message.stop_reason == 'end_of_message' else '<|eot_id|>') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
_CHATML = r"""
{%- for message in messages -%}ROLE_CHECK
  {{- '<|im_start|>' ~ message.role ~ '\n' ~ plain(message.content) ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
_BEGIN = r"""
{{- CHAT_BOS -}}
"""
_DEFAULT_SYSTEM = r"""
{%- if messages and messages[0].role != 'system' -%}{{- DEFAULT_SYSTEM -}}{%- endif -%}
"""


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja template of `tokenizer`'s chat format; None: it has no format.

    Raises:
        ValueError: the vocabulary lacks a token of the format.
    """
    if tokenizer.chat_format is None:
        return None
    chat = ChatFormat(tokenizer)
    default = tokenizer.default_system
    if tokenizer.chat_format == "chatml":
        begin = _BEGIN if tokenizer.chat_bos else ""
        template = _NO_TOOLS + begin + (_DEFAULT_SYSTEM if default else "") + _CHATML
    else:
        template = _LLAMA3_TOOLS if chat.takes_tools else _NO_TOOLS + _LLAMA3_PLAIN
    wrapper = json.dumps({"type": "function", "function": {}}, indent=4)
    before, after = describe_tools([{}], "json").split(wrapper)
    literals = {
        "SPECIAL_TOKENS": _list(shared_starts(sorted(tokenizer.control_tokens))),
        "CHAT_BOS": _quote(tokenizer.chat_bos or ""),
        "ROLES": _list(chat.roles),
        "BUILTIN_TOOLS": _list(BUILTIN_TOOLS),
        "BEFORE_TOOLS": _quote(before),
        "AFTER_TOOLS": _quote(after),
        "JOINED": _list(joined_ends(tokenizer.ranks)),
        "DEFAULT_SYSTEM": _quote(f"<|im_start|>system\n{default}<|im_end|>\n"),
    }
    template = (_CHECKS + template).replace("ROLE_CHECK", _ROLE)
    return re.sub("|".join(literals), lambda found: literals[found[0]], template).strip()


def shared_starts(tokens: Iterable[str]) -> list[str]:
    """`tokens`, but those that differ in their number only, as the text before the number.

    Llama 3.1 has 246 tokens `<|reserved_special_token_N|>`.
    """
    starts = {token: re.sub(r"\d+\W*$", "", token) for token in tokens}
    times = Counter(starts.values())
    return list(dict.fromkeys(s if s and times[s] > 1 else token for token, s in starts.items()))


def joined_ends(ranks: Mapping[bytes, int]) -> list[str]:
    r"""Texts at whose end the BPE may join a `{"` that follows.

    A merge over the border makes a token that goes on with `{"`, or ends with `{`. The latter
    happens only if its rank is lower than that of `{"`, which is merged first otherwise.
    """
    own = ranks.get(b'{"', len(ranks))
    ends: set[bytes] = set()
    for token, rank in ranks.items():
        if rank < own and token.endswith(b"{"):
            ends.add(token[:-1])
        ends |= {token[: found.start()] for found in re.finditer(rb'\{"', token)}
    ends = {end for end in ends if end and not end.endswith(tuple(ends - {end, b""}))}
    return sorted(end.decode("utf-8", "ignore") for end in ends)


def _list(texts: Iterable[str]) -> str:
    """A list of texts as Jinja writes it."""
    return f"[{', '.join(map(_quote, texts))}]"


def _quote(text: str) -> str:
    """A text as a string of Jinja."""
    for character, escape in (
        ("\\", "\\\\"), ("'", "\\'"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")
    ):  # fmt: skip
        text = text.replace(character, escape)
    return f"'{text}'"
