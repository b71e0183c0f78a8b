"""Text <-> token ids: byte-pair encoding and chat prompts. Knows nothing about tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import tiktoken

from llama.text.long_text import check_characters, encode_uncut
from llama.text.messages import NO_TOOLS, check_dialog, check_message
from llama.text.rank_file import check_spec, default_spec, parse_ranks, read_ranks, read_sidecar
from llama.text.tool_prompt import (
    Tool,
    ToolCall,
    ToolForm,
    check_form,
    encode_tool_calls,
    is_code,
    with_tools,
)  # fmt: skip

Role = Literal["system", "user", "assistant", "ipython", "tool"]


class _AssistantFields(TypedDict, total=False):
    tool_calls: list[ToolCall]
    stop_reason: Literal["end_of_turn", "end_of_message"]


class Message(_AssistantFields):
    """One turn of a dialog.

    A tool's result has the role "ipython" or its synonym "tool". Messages of the assistant may
    have `tool_calls`, and a `stop_reason`: "end_of_message" if the model waits for tool results.
    """

    role: Role
    content: str


Dialog = Sequence[Message]


class Tokenizer:
    """Byte-pair encoding by tiktoken, with Llama 3's special tokens.

    Args:
        model_path: a rank file (`tokenizer.model`): a local path, or a URL that blobfile opens.
        version: which special tokens follow the ranks: "llama3", or "llama3.1" (3.1 and later).
            `Llama.build` chooses it by the checkpoint; None means "llama3".

    A sidecar, a JSON file named like the rank file plus ".json", may describe another vocabulary:
    `pat_str` (the split pattern), `special_tokens` ({text: id}), `bos_token`, `eos_token`,
    `pad_token` (text of a special token, or null), `stop_tokens` (a list of texts), `chat_format`
    ("llama3", "chatml" or null) and `default_system`. It takes precedence over `version`.

    Attributes:
        model: the tiktoken encoding.
        n_words: size of the vocabulary, special tokens included.
        special_tokens: {text: id}.
        bos_id, eos_id, eot_id, eom_id, pad_id: -1 where the vocabulary has no such token.
        stop_tokens: ids that end a generation.

    Raises:
        FileNotFoundError: there is no rank file.
        ValueError: the rank file or the sidecar is damaged, or `version` is unknown.
    """

    def __init__(self, model_path: str | Path, version: str | None = None):
        model_path = str(model_path)
        self._initialize(read_ranks(model_path), read_sidecar(model_path), model_path, version)

    @classmethod
    def from_vocabulary(
        cls, rank_file: bytes, sidecar: dict[str, Any], name: str, version: str | None = None
    ) -> Tokenizer:
        """A tokenizer from the contents of a rank file and a sidecar; `name` is for messages."""
        tokenizer = cls.__new__(cls)
        tokenizer._initialize(parse_ranks(rank_file, name), sidecar, name, version)
        return tokenizer

    def _initialize(
        self, ranks: dict[bytes, int], sidecar: dict[str, Any], where: str, version: str | None
    ) -> None:
        spec = default_spec(version or "llama3", max(ranks.values()) + 1) | sidecar
        self.special_tokens: dict[str, int] = spec["special_tokens"]
        self.chat_format: str | None = spec["chat_format"]
        self.default_system: str | None = spec["default_system"]
        check_spec(spec, ranks, where)
        self.pat_str: str = spec["pat_str"]
        self.model = tiktoken.Encoding(
            name=Path(where).name,
            pat_str=self.pat_str,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.ranks = ranks
        self._missing_bytes = frozenset(b for b in range(256) if bytes([b]) not in ranks)
        self.n_words: int = self.model.n_vocab

        def id_of(text: str | None) -> int:
            return self.special_tokens.get(text, -1) if text else -1

        self.bos_id: int = id_of(spec["bos_token"])
        self.eos_id: int = id_of(spec["eos_token"])
        self.pad_id: int = id_of(spec["pad_token"])
        self.eot_id: int = id_of("<|eot_id|>")
        self.eom_id: int = id_of("<|eom_id|>")
        self.stop_tokens: list[int] = [id_of(text) for text in spec["stop_tokens"]]

    def encode(
        self,
        s: str,
        *,
        bos: bool = True,
        eos: bool = False,
        allowed_special: Literal["all"] | AbstractSet[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode `s`, of any length.

        Args:
            bos, eos: add the begin / end token, if the vocabulary has one. By default as for
                a text to complete.
            allowed_special: special tokens whose text in `s` becomes their id; "all" for every
                one. By default none: the text of special tokens is encoded as ordinary characters,
                so that content cannot forge a turn.
            disallowed_special: special tokens whose text in `s` raises a ValueError.

        Unlike the reference, this does not cut long runs of characters, which would change tokens.

        Raises:
            TypeError: `s` is not a str.
            ValueError: `s` has a disallowed special token or a character without tokens.
        """
        if not isinstance(s, str):
            raise TypeError(f"text to encode must be a str, not {type(s).__name__}")
        allowed = allowed_special or set()
        if self._missing_bytes:
            check_characters(s, self.pat_str, self.ranks, self._missing_bytes)
        t = encode_uncut(s, self.model, self.pat_str, self.ranks, allowed, disallowed_special)
        if bos and self.bos_id >= 0:
            t.insert(0, self.bos_id)
        if eos and self.eos_id >= 0:
            t.append(self.eos_id)
        return t

    def decode(self, t: Sequence[int]) -> str:
        """Decode ids to text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Like `decode`, but to bytes, which may start or end inside a character."""
        try:
            return self.model.decode_bytes(list(t))
        except (KeyError, OverflowError):
            wrong = next(i for i in t if not self._has(i))
            raise ValueError(f"no token has the id {wrong}; use 0 to {self.n_words - 1}") from None

    def _has(self, token: int) -> bool:
        try:
            self.model.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return False
        return True


class ChatFormat:
    """Llama 3's chat prompt: BOS, then for each message header, content and end-of-turn token.

    With the vocabulary of Llama 3.1 and later, messages may also be tool calls and tool results.

    `ChatFormat(tokenizer)` returns the subclass for `tokenizer.chat_format`.

    Raises:
        ValueError: the tokenizer has no chat format, or lacks a token of it.
    """

    roles: tuple[str, ...] = ("system", "user", "assistant")
    tokens: tuple[str, ...] = (
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    )  # fmt: skip

    def __new__(cls, tokenizer: Tokenizer) -> ChatFormat:
        if cls is ChatFormat:
            if tokenizer.chat_format is None:
                raise ValueError("this tokenizer has no chat format: use text completion")
            cls = _FORMATS[tokenizer.chat_format]
        return super().__new__(cls)

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        if missing := [t for t in self.tokens if t not in tokenizer.special_tokens]:
            raise ValueError(f"this vocabulary has no {missing}, which its chat format needs")
        # Llama 3.1 and later. ChatML models have conventions of their own.
        self.takes_tools = type(self) is ChatFormat and {"<|python_tag|>", "<|eom_id|>"} <= set(
            tokenizer.special_tokens
        )
        if self.takes_tools:
            self.roles = (*self.roles, "ipython", "tool")

    def encode_header(self, message: Message) -> list[int]:
        """The tokens before a message's content."""
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        role = "ipython" if message["role"] == "tool" else message["role"]
        return [
            special["<|start_header_id|>"],
            *encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message, tool_form: ToolForm = "json") -> list[int]:
        """A whole turn: header, content, tool calls, end. `<|python_tag|>` comes before code."""
        check_message(message, self.roles, self.takes_tools)
        special, calls = self.tokenizer.special_tokens, message.get("tool_calls") or []
        texts = encode_tool_calls(calls, tool_form)
        tokens = self.encode_header(message)
        tokens += self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        if len(calls) == 1 and is_code(calls[0]):
            tokens.append(special["<|python_tag|>"])
        for text in texts:  # each call separately, as llama-models does
            tokens += self.tokenizer.encode(text, bos=False, eos=False)
        waits = message.get("stop_reason") == "end_of_message"
        return [*tokens, special["<|eom_id|>" if waits else "<|eot_id|>"]]

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Sequence[Tool] | None = None, tool_form: ToolForm = "json"
    ) -> list[int]:
        """A dialog, then the header of the assistant's turn that the model completes.

        Args:
            tools: tools that the model may call (Llama 3.1 and later): JSON-schema definitions,
                and names of Meta's built-in tools.
            tool_form: how calls are written: "json" (3.1), "python_list" (3.2, 3.3) or
                "function_tag"; see docs/chat.md.

        Raises:
            TypeError, ValueError: the dialog or a tool is invalid, or the vocabulary has no tools.
        """
        self._check_dialog(dialog, tools, tool_form)
        if tools:
            check_message(dialog[0], self.roles, self.takes_tools)
            dialog = cast(Dialog, with_tools(dialog, tools, tool_form))
        tokens = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            tokens.extend(self.encode_message(message, tool_form))
        return tokens + self.encode_header({"role": "assistant", "content": ""})

    def _check_dialog(self, dialog: Dialog, tools: Sequence[Tool] | None, tool_form: str) -> None:
        check_dialog(dialog)
        check_form(tool_form)
        if tools and not self.takes_tools:
            raise ValueError(f"tools: {NO_TOOLS}")


class ChatMLFormat(ChatFormat):
    """ChatML: `<|im_start|>role`, newline, content, `<|im_end|>`, newline; no BOS."""

    tokens = ("<|im_start|>", "<|im_end|>")

    def encode_header(self, message: Message) -> list[int]:
        return self._turn(message["role"] + "\n")

    def encode_message(self, message: Message, tool_form: ToolForm = "json") -> list[int]:
        check_message(message, self.roles, self.takes_tools)
        # Role and content are encoded as one text, as in training.
        text = f"{message['role']}\n{message['content']}"
        end = self.tokenizer.special_tokens["<|im_end|>"]
        return [*self._turn(text), end, *self.tokenizer.encode("\n", bos=False, eos=False)]

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Sequence[Tool] | None = None, tool_form: ToolForm = "json"
    ) -> list[int]:
        self._check_dialog(dialog, tools, tool_form)
        tokens: list[int] = []
        check_message(dialog[0], self.roles, self.takes_tools)
        if self.tokenizer.default_system and dialog[0]["role"] != "system":
            system: Message = {"role": "system", "content": self.tokenizer.default_system}
            tokens.extend(self.encode_message(system))
        for message in dialog:
            tokens.extend(self.encode_message(message))
        return tokens + self.encode_header({"role": "assistant", "content": ""})

    def _turn(self, text: str) -> list[int]:
        start = self.tokenizer.special_tokens["<|im_start|>"]
        return [start, *self.tokenizer.encode(text, bos=False, eos=False)]


_FORMATS: dict[str, type[ChatFormat]] = {"llama3": ChatFormat, "chatml": ChatMLFormat}
