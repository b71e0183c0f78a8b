"""A checkpoint's own chat template -> a prompt of texts and special tokens.

Knows nothing about token ids.

What users write must not become a special token. In a template's messages the first character of
each special token's text is a private character that stands for it. The template still can trim,
split or search the messages; only what the template itself writes is a special token afterwards.
A dialog is refused if the template makes a special token out of other text that users write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llama.text.tool_prompt import check_tools

Piece = tuple[str, bool]  # a text, and whether it is a special token
Messages = Sequence[Mapping[str, Any]]

_PRIVATE = range(0xE000, 0xF900)  # Unicode's private characters
# What templates are tried with.
USER, SYSTEM, ANSWER, RESULT = "Hello there?", "Be brief.", "Good day.", "42 degrees"
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Look outside",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
_CALL = {"name": "get_weather", "arguments": {"town": "Oslo"}}


class ChatTemplate:
    """A checkpoint's own chat template, rendered as transformers does.

    What it can do is found by trying it with short dialogs.

    Args:
        source: in Jinja.
        variables: `bos_token`, `eos_token`, ...: the texts that templates write by these names.
        special: texts of the special tokens that only the template may write.
        for_tools: it is for prompts with tools only.

    Attributes:
        roles: the roles that the template writes.
        takes_tools, takes_calls: whether it writes definitions of tools, and calls.

    Raises:
        ValueError: the template does not write a user's message.
    """

    description = "the checkpoint's own chat template"
    tokens = ()

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        special: Collection[str],
        for_tools: bool = False,
    ):
        from llama.text.template_sandbox import Sandbox

        self.variables, self._sandbox = dict(variables), Sandbox()
        self._special = sorted(filter(None, special), key=len, reverse=True)
        self._first = {token[0] for token in self._special}
        first = f"(?=[{re.escape(''.join(sorted(self._first)))}])" if self._first else "(?!)"
        self._pattern = re.compile(f"({first}(?:{'|'.join(map(re.escape, self._special))}))")
        try:
            self._template = self._sandbox.compile_source(source)
        except Exception as e:
            raise _refusal(e) from None
        tools = [TOOL] if for_tools else None
        self._tool_role, self._text_arguments = "tool", False
        if USER not in self.text([turn("user", USER)], tools):
            raise ValueError("the checkpoint's chat template does not write the user's message")
        self._try_roles(tools)

    def _try_roles(self, tools: list[Any] | None) -> None:
        """Find what the template writes."""
        user, calls = turn("user", USER), {**turn("assistant", ""), "tool_calls": [_CALL]}
        roles = []
        if self._writes([turn("system", SYSTEM), user], SYSTEM, tools=tools):
            roles.append("system")
        roles.append("user")
        if self._writes([user, turn("assistant", ANSWER), user], ANSWER, tools=tools):
            roles.append("assistant")
        self.takes_calls = False
        for self._text_arguments in (False, True):
            if self._writes([user, calls], "get_weather", "town", "Oslo", tools=tools):
                self.takes_calls = True
                break
        asked = calls if self.takes_calls else turn("assistant", ANSWER)
        for self._tool_role in ("tool", "ipython"):
            if self._writes([user, asked, turn("tool", RESULT)], RESULT, tools=tools):
                roles += ["ipython", "tool"]
                break
        self.takes_tools = self._writes([user], "get_weather", "Look outside", tools=[TOOL])
        self.roles: tuple[str, ...] = tuple(roles)

    def _writes(self, dialog: Messages, *texts: str, tools: list[Any] | None = None) -> bool:
        try:
            written = self.text(dialog, tools)
        except ValueError:
            return False
        # 'town' is an argument in Python's quotes, not in JSON's.
        return all(text in written for text in texts) and "'town'" not in written

    def text(
        self, dialog: Messages, tools: Sequence[Any] | None = None, answer: bool = True
    ) -> str:
        """The prompt as the template writes it.

        Args:
            tools: JSON-schema definitions.
            answer: end with the beginning of the assistant's turn.

        Raises:
            ValueError: the template refuses the dialog, fails, or does too much.
        """
        return self._render([self._message(m) for m in dialog], _definitions(tools), answer)

    def _render(self, messages: list[Any], tools: list[Any] | None, answer: bool = True) -> str:
        given = {"messages": messages, "tools": tools, "documents": None}
        variables = {**self.variables, **given, "add_generation_prompt": answer}
        try:
            return self._sandbox.render(self._template, variables)
        except Exception as e:
            raise _refusal(e) from None

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as templates expect it."""
        role = self._tool_role if message["role"] in ("tool", "ipython") else message["role"]
        found: dict[str, Any] = {"role": role, "content": message["content"]}
        if message.get("tool_calls"):
            found["tool_calls"] = []
        for call in message.get("tool_calls") or ():
            arguments: Any = call["arguments"]
            if self._text_arguments:
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            found["tool_calls"].append({"type": "function", "function": function})
        return found

    def prompt(
        self, dialog: Messages, tools: Sequence[Any] | None = None, answer: bool = True
    ) -> list[Piece]:
        """The prompt of a dialog. Special tokens are those that the template itself writes.

        Args:
            answer: end with the beginning of the assistant's turn.

        Raises:
            ValueError: see `text`; or a message would become a special token.
        """
        messages, definitions = [self._message(m) for m in dialog], _definitions(tools)
        given = json.dumps([messages, definitions], ensure_ascii=False)
        free = (chr(i) for i in _PRIVATE if chr(i) not in given)
        stand_in = dict(zip(sorted(self._first), free, strict=False))
        if len(stand_in) < len(self._first):
            raise ValueError("the dialog has too many private characters of Unicode; remove some")
        meant = str.maketrans({private: c for c, private in stand_in.items()})
        hidden = str.maketrans(stand_in)
        protected = _map_texts(messages, definitions, lambda s: self._protected(s, stand_in))
        parts = self._pattern.split(self._render(*protected, answer))
        # A template may delete or change characters (`replace`, `lower`), and so complete a special
        # token. It cannot where no first character of one is left.
        harmless = _map_texts(messages, definitions, lambda s: s.translate(hidden))
        same = harmless == protected
        expected = parts if same else self._pattern.split(self._render(*harmless, answer))
        if parts[1::2] != expected[1::2]:
            raise ValueError(
                "the checkpoint's chat template makes special tokens out of what a message says; "
                "remove the text that resembles one, such as <|...|>"
            )
        return [(part.translate(meant), i % 2 == 1) for i, part in enumerate(parts) if part]

    def _protected(self, text: str, stand_in: Mapping[str, str]) -> str:
        """`text` without special tokens, also when other text follows it."""
        text = self._pattern.sub(lambda match: stand_in[match[0][0]] + match[0][1:], text)
        end = text.rstrip()
        longest = len(self._special[0]) if self._special else 0
        for i in range(max(0, len(end) - longest), len(end)):
            if end[i] in self._first and any(t.startswith(end[i:]) for t in self._special):
                return text[:i] + stand_in[text[i]] + text[i + 1 :]
        return text

    def header(self, role: str) -> list[Piece]:
        raise ValueError("a chat template writes whole dialogs only; use encode_dialog_prompt")

    def message(self, message: Mapping[str, Any]) -> list[Piece]:
        return self.header("")

    def turn_marks(self) -> set[str]:
        """The special tokens that begin or end turns: text that stands for them would forge one."""
        user, found = turn("user", USER), set()
        for dialog in ([user], [turn("system", SYSTEM), user]):
            try:
                asked, whole = self.text(dialog, answer=False), self.text(dialog)
            except ValueError:
                continue
            found |= set(self._pattern.findall(asked))
            if match := self._pattern.match(whole.removeprefix(asked).lstrip()):
                found.add(match[0])
        return found

    def turn_end(self) -> str | None:
        """The special token that ends the assistant's turn; None if there is none."""
        asked = [turn("user", USER), turn("assistant", ANSWER)]
        for dialog in (asked, [*asked, turn("user", USER)]):
            try:
                rest = self.text(dialog, answer=False).partition(ANSWER)[2]
            except ValueError:
                continue
            if match := self._pattern.match(rest.lstrip()):
                return match[0]
        return None


def named_template(
    sources: Mapping[str, str], name: str, variables: Mapping[str, str], special: Collection[str]
) -> ChatTemplate:
    """A chat template by its name: "default", or "tool_use" for prompts with tools.

    Raises:
        ValueError: it cannot be used, or there is none of this name.
    """
    if name not in sources:
        raise ValueError(
            f"the checkpoint has chat templates named {sorted(sources)}, and none named {name!r}; "
            "rename one in tokenizer_config.json or the sidecar (tokenizer.model.json), or use "
            "text completion"
        )
    return ChatTemplate(sources[name], variables, special, for_tools=name == "tool_use")


def turn(role: str, content: str) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def _definitions(tools: Sequence[Any] | None) -> list[Any] | None:
    """Definitions as templates expect them.

    Raises:
        TypeError, ValueError: see `check_tools`, or a built-in tool.
    """
    if not tools:
        return None
    builtin, functions = check_tools(tools, "json")
    if builtin:
        raise ValueError(f"the chat template has no built-in tools; define {builtin[0]} itself")
    return [{"type": "function", "function": dict(function)} for function in functions]


def _map_texts(
    messages: list[Any], definitions: list[Any] | None, change: Callable[[str], str]
) -> tuple[list[Any], list[Any] | None]:
    """Messages, without their roles, and definitions of tools with each text in them changed."""
    changed = [{**_map_strings(m, change), "role": m["role"]} for m in messages]
    return changed, _map_strings(definitions, change)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with each string in it changed, and keys that are no plain names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            k if k.isidentifier() else change(k): _map_strings(v, change) for k, v in value.items()
        }
    if isinstance(value, Sequence):
        return [_map_strings(v, change) for v in value]
    return value


def _refusal(error: Exception) -> ValueError:
    reason = str(error)[:500] or type(error).__name__
    if isinstance(error, MemoryError):
        reason = "it needs more memory than there is"
    return ValueError(
        f"the checkpoint's chat template cannot write this: {reason}; "
        "change the dialog, or use text completion"
    )
