"""Bodies -> prompts of ids, and what a checkpoint cannot do as errors that say so."""

from __future__ import annotations

from collections.abc import Sequence

from llama.generation import Llama
from llama.server.chat_body import ChatBody
from llama.server.errors import ApiError, invalid
from llama.text.messages import Message
from llama.text.plain_tools import with_plain_tools
from llama.text.tool_prompt import check_tools
from llama.tokenizer import ChatFormat


def chat_prompt(llama: Llama, body: ChatBody) -> list[int]:
    """The ids of a dialog, its tools, and what the answer begins with.

    Raises:
        ApiError: see `dialog_ids`; or there is no room for an answer.
    """
    ids = dialog_ids(llama, body)
    check_ids(llama, body.continue_ids, "continue_ids")
    ids += body.continue_ids
    check_room(llama, len(ids), 1, "messages")
    return ids


def dialog_ids(llama: Llama, body: ChatBody) -> list[int]:
    """The ids of a dialog and its tools, of any length. May take long for long texts.

    Texts of special tokens in messages and tools stay text.

    Raises:
        ApiError: the checkpoint's chat format lacks a role or tools, or there is none.
    """
    formatter, form = chat_format(llama), body.tool_form
    messages: Sequence[Message] = body.messages
    tools = body.offered_tools
    try:
        check_tools(tools, form)
    except (ValueError, TypeError) as e:
        raise invalid("tools", str(e)) from None
    try:
        if not formatter.takes_tools and (tools or "tool" not in formatter.roles):
            messages = with_plain_tools(messages, tools, llama.tokenizer.default_system)
            tools, form = (), "json"
        check_roles(formatter, messages)
        return formatter.encode_dialog_prompt(messages, tools or None, form)
    except (ValueError, TypeError) as e:
        raise invalid("messages", str(e)) from None


def chat_format(llama: Llama) -> ChatFormat:
    """The checkpoint's chat format, or an ApiError that says why there is none."""
    try:
        return llama.formatter or ChatFormat(llama.tokenizer)
    except ValueError as e:
        why = str(e).partition(":")[0]
        raise invalid("messages", f"{why}; use /v1/completions") from None


def check_roles(formatter: ChatFormat, messages: Sequence[Message]) -> None:
    """Raise an ApiError for roles that a chat format lacks."""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in formatter.roles:
            known = [known for known in formatter.roles if known != "ipython"]
            raise invalid(
                f"messages[{i}].role",
                f"this model's chat format has no role {role!r}; it has {', '.join(known)}",
            )


def text_prompt(llama: Llama, prompt: str | Sequence[int], param: str = "prompt") -> list[int]:
    """The ids of a text to complete, with the begin token; or checked ids."""
    if isinstance(prompt, str):
        try:
            ids = llama.tokenizer.encode(prompt, bos=True)
        except ValueError as e:
            raise invalid(param, f"{param}: {e}") from None
        if not ids:  # a vocabulary without a begin token
            raise invalid(param, f"{param} is empty; give at least one token")
        return ids
    check_ids(llama, prompt, param)
    return list(prompt)


def check_ids(llama: Llama, ids: Sequence[int], param: str) -> None:
    """Raise an ApiError for an id that the model lacks."""
    highest = llama.model.vocab_size - 1
    wrong = next((i for i in ids if not 0 <= i <= highest), None)
    if wrong is not None:
        raise invalid(param, f"{param} has the token id {wrong}; ids are 0 to {highest}")


def check_room(llama: Llama, length: int, least: int, param: str) -> None:
    """Raise an ApiError unless `least` tokens fit after a prompt of `length` tokens."""
    room = llama.engine.room
    if length + least > room:
        needs = f", and the answer needs {least}" if least and length <= room else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {room} tokens. However, your {param} "
            f"resulted in {length} tokens{needs}. Please reduce the length of the {param}.",
            param=param,
            code="context_length_exceeded",
        )
