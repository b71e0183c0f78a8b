"""Bodies of POST /tokenize and /detokenize, and what answers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama.generation import Llama
from llama.server.chat_body import ChatBody
from llama.server.chat_messages import read_messages, read_tools
from llama.server.chat_schemas import MESSAGES_SCHEMA, TOOLS_SCHEMA
from llama.server.common_body import IDS, MODEL
from llama.server.errors import invalid
from llama.server.fields import Choice, Custom, Flag, Text, read_record, wire
from llama.server.prompts import dialog_ids
from llama.text.messages import Message
from llama.text.tool_prompt import TOOL_FORMS, ToolForm


@dataclass(frozen=True, kw_only=True)
class TokenizeBody:
    """One of `prompt`, `content` and `messages`."""

    model: str | None = wire(MODEL, "A served model; all have the same tokens.", None)
    prompt: str | None = wire(Text(), "A text to complete.", None)
    content: str | None = wire(Text(), "As prompt, without the begin token by default.", None)
    messages: tuple[Message, ...] = wire(
        Custom(read_messages, MESSAGES_SCHEMA), "A dialog, as for a chat.", ()
    )
    tools: tuple[dict[str, Any], ...] = wire(
        Custom(read_tools, TOOLS_SCHEMA), "With messages: as for a chat.", ()
    )
    tool_form: ToolForm = wire(Choice(TOOL_FORMS), "With tools: as for a chat.", "json")
    add_special_tokens: bool | None = wire(
        Flag(), "Whether a text gets the begin token. Default: prompt does, content does not.", None
    )
    add_special: bool | None = wire(Flag(), "Another name of add_special_tokens.", None)
    with_pieces: bool = wire(
        Flag(), "Tokens are {id, piece}: its text, or its bytes where it has no text.", False
    )

    def __post_init__(self) -> None:
        given = (self.prompt is not None, self.content is not None, bool(self.messages))
        if sum(given) != 1:
            raise invalid("prompt", "give one of prompt, content and messages")
        if self.tools and not self.messages:
            raise invalid("tools", "tools need messages; leave them out")


@dataclass(frozen=True, kw_only=True)
class DetokenizeBody:
    model: str | None = wire(MODEL, "A served model; all have the same tokens.", None)
    tokens: tuple[int, ...] = wire(IDS, "Token ids.")


def parse_tokenize(data: object) -> TokenizeBody:
    """A body from JSON, or an ApiError."""
    return read_record(TokenizeBody, data)


def parse_detokenize(data: object) -> DetokenizeBody:
    """A body from JSON, or an ApiError."""
    return read_record(DetokenizeBody, data)


def tokenize(llama: Llama, body: TokenizeBody) -> dict[str, Any]:
    """The reply. May take long for long texts."""
    if body.messages:
        chat = ChatBody(messages=body.messages, tools=body.tools, tool_form=body.tool_form)
        ids = dialog_ids(llama, chat)
    else:
        name, text = ("prompt", body.prompt) if body.content is None else ("content", body.content)
        given = [flag for flag in (body.add_special_tokens, body.add_special) if flag is not None]
        try:
            ids = llama.tokenizer.encode(text or "", bos=given[0] if given else name == "prompt")
        except ValueError as e:
            raise invalid(name, f"{name}: {e}") from None
    tokens: list[Any] = [_piece(llama, i) for i in ids] if body.with_pieces else ids
    return {"tokens": tokens, "count": len(ids), "max_model_len": llama.engine.room}


def _piece(llama: Llama, id: int) -> dict[str, Any]:
    data = llama.tokenizer.decode_bytes([id])
    try:
        return {"id": id, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": list(data)}


def detokenize(llama: Llama, body: DetokenizeBody) -> dict[str, Any]:
    """The reply: the text under the names that two other servers use."""
    try:
        text = llama.tokenizer.decode(body.tokens)
    except ValueError as e:
        raise invalid("tokens", f"tokens: {e}") from None
    return {"prompt": text, "content": text}
