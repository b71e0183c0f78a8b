"""Text <-> token ids: byte-pair encoding and chat prompts. Knows nothing about tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from pathlib import Path
from typing import Any, Literal, cast

from llama.text import tool_prompt
from llama.text.chat_formats import ChatML, Writer, is_result, writer_of_results
from llama.text.chat_template import Piece, named_template
from llama.text.long_text import UncutEncoder, check_characters, make_encoding
from llama.text.messages import NO_TOOLS, Dialog, Message, Role, check_dialog, check_message
from llama.text.rank_file import check_spec, default_spec, parse_ranks, read_ranks, read_sidecar
from llama.text.text_tokens import TextTokens, strip_beside_tokens
from llama.text.tool_prompt import Tool, ToolForm, check_form, encode_tool_calls, with_tools

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]


class Tokenizer:
    """Byte-pair encoding by tiktoken, with Llama 3's special tokens.

    Args:
        model_path: a rank file (`tokenizer.model`): a local path, or a URL that blobfile opens.
        version: which special tokens follow the ranks: "llama3", or "llama3.1" (3.1 and later).
            `Llama.build` chooses it by the checkpoint; None means "llama3".

    A sidecar, a JSON file named like the rank file plus ".json", may describe another vocabulary:
    `pat_str` (the split pattern), `special_tokens` ({text: id}), `bos_token`, `eos_token`,
    `pad_token` (text of a special token, id of an ordinary one, or null), `stop_tokens` (a list of
    those), `text_tokens` ({text: flags}, see `TextTokens`), `token_flags` (flags of other special
    tokens, for chat prompts), `unused_ids`, `chat_format` ("llama3", "chatml", "template" or null),
    `default_system` and `chat_bos` (of ChatML), `chat_templates` ({name: Jinja source}) and
    `template_tokens` (texts that these write by name, such as `eos_token`). It takes precedence
    over `version`.

    Attributes:
        model: the tiktoken encoding.
        n_words: one more than the highest id of a token; unused ids may be higher.
        special_tokens: {text: id}.
        bos_id, eos_id, eot_id, eom_id, pad_id: -1 where the vocabulary has no such token.
        stop_tokens: ids that end a generation.
        unused_ids: ids of rows without a token, see `pad_to`. They decode to nothing.

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
        self.chat_bos: str | None = spec["chat_bos"]
        self.chat_templates: dict[str, str] = spec["chat_templates"]
        self.template_tokens: dict[str, str] = spec["template_tokens"]
        check_spec(spec, ranks, where)
        # Those whose text in a message stays text.
        self.control_tokens = frozenset(self.special_tokens) - set(spec["text_tokens"])
        self.pat_str: str = spec["pat_str"]
        self.model = make_encoding(Path(where).name, self.pat_str, ranks, self.special_tokens)
        self.ranks = ranks
        self._encoder = UncutEncoder(self.model, self.pat_str, ranks)
        self._missing_bytes = frozenset(b for b in range(256) if bytes([b]) not in ranks)
        self.n_words: int = self.model.n_vocab
        self.unused_ids: Set[int] = frozenset(spec["unused_ids"])
        self.text_tokens = TextTokens(spec["text_tokens"])
        self.token_flags: dict[str, Sequence[str]] = spec["token_flags"]

        def id_of(token: str | int | None) -> int:
            return token if isinstance(token, int) else self.special_tokens.get(token or "", -1)

        self.bos_id: int = id_of(spec["bos_token"])
        self.eos_id: int = id_of(spec["eos_token"])
        self.pad_id: int = id_of(spec["pad_token"])
        self.eot_id: int = id_of("<|eot_id|>")
        self.eom_id: int = id_of("<|eom_id|>")
        self.stop_tokens = list(dict.fromkeys(map(id_of, spec["stop_tokens"])))

    def encode(
        self,
        s: str,
        *,
        bos: bool = True,
        eos: bool = False,
        allowed_special: Literal["all"] | Set[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode `s`, of any length.

        Args:
            bos, eos: add the begin / end token, if the vocabulary has one. By default as for
                a text to complete.
            allowed_special: special tokens whose text in `s` becomes their id; "all" for every
                one. By default none but `text_tokens`: the text of others is encoded as ordinary
                characters, so that content cannot forge a turn.
            disallowed_special: special tokens whose text in `s` raises a ValueError.

        Unlike the reference, this does not cut long runs of characters, which would change tokens.

        Raises:
            TypeError, ValueError: no str, a disallowed special token, a character without tokens.
        """
        if not isinstance(s, str):
            raise TypeError(f"text to encode must be a str, not {type(s).__name__}")
        allowed, t = allowed_special or set(), []
        for part, is_token in self.text_tokens.split(s):
            if is_token:
                t.append(self.special_tokens[part])
                continue
            if self._missing_bytes:
                check_characters(part, self.pat_str, self.ranks, self._missing_bytes)
            t += self._encoder.encode(part, allowed, disallowed_special)
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
            return self.model.decode_bytes([i for i in t if i not in self.unused_ids])
        except (KeyError, OverflowError):
            known = {*self.ranks.values(), *self.special_tokens.values(), *self.unused_ids}
            wrong = next(i for i in t if i not in known)
            raise ValueError(f"no token has the id {wrong}; use 0 to {max(known)}") from None

    def pad_to(self, rows: int) -> list[int]:
        """The ids below `rows` that no token has; from now on they are `unused_ids`."""
        self.unused_ids |= frozenset(range(self.n_words, rows))
        return sorted(i for i in self.unused_ids if i < rows)


class ChatFormat:
    """Llama 3's chat prompt: BOS, then for each message header, content and end-of-turn token.

    With the vocabulary of Llama 3.1 and later, messages may also be tool calls and tool results.

    `ChatFormat(tokenizer)` returns a `TextFormat` where `tokenizer.chat_format` is another one.

    Raises:
        ValueError: the tokenizer has no chat format, or lacks a token of it, or its chat template
            cannot be used.
    """

    description = "Llama 3's"
    roles: tuple[str, ...] = ("system", "user", "assistant")
    tokens: tuple[str, ...] = (
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    )  # fmt: skip

    def __new__(cls, tokenizer: Tokenizer) -> ChatFormat:
        if cls is ChatFormat:
            if tokenizer.chat_format is None:
                raise ValueError("this tokenizer has no chat format: use text completion")
            cls = ChatFormat if tokenizer.chat_format == "llama3" else TextFormat
        return super().__new__(cls)

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        if missing := [t for t in self.tokens if t not in tokenizer.special_tokens]:
            raise ValueError(f"this vocabulary has no {missing}, which its chat format needs")
        of_tools = {"<|python_tag|>", "<|eom_id|>"}  # Llama 3.1 and later
        self.takes_tools = type(self) is ChatFormat and of_tools <= tokenizer.special_tokens.keys()
        if self.takes_tools:
            self.roles = (*self.roles, "ipython", "tool")

    def check_message(self, message: Message) -> None:
        """Raise a TypeError or a ValueError if the format has no such message."""
        check_message(message, self.roles, self.takes_tools)

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
        self.check_message(message)
        special, calls = self.tokenizer.special_tokens, message.get("tool_calls") or []
        texts = encode_tool_calls(calls, tool_form)
        tokens = self.encode_header(message)
        tokens += self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        if len(calls) == 1 and tool_prompt.is_code(calls[0]):
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
        check_dialog(dialog)
        check_form(tool_form)
        if tools and not self.takes_tools:
            raise ValueError(f"tools: {NO_TOOLS}")
        if tools:
            self.check_message(dialog[0])
            dialog = cast(Dialog, with_tools(dialog, tools, tool_form))
        tokens = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            tokens.extend(self.encode_message(message, tool_form))
        return tokens + self.encode_header({"role": "assistant", "content": ""})


class TextFormat(ChatFormat):
    """A chat format that `llama.text` writes as texts and special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        sources = tokenizer.chat_templates
        tokens = tokenizer.template_tokens, tokenizer.control_tokens
        self.writer: Writer = ChatML(tokenizer.default_system, tokenizer.chat_bos)
        if tokenizer.chat_format == "template":
            self.writer = named_template(sources, "default", *tokens)
        self.result_writer = writer_of_results(self.writer, sources, *tokens)
        self.tool_writer = self.writer  # of prompts with tools
        if "tool_use" in sources:
            self.tool_writer = named_template(sources, "tool_use", *tokens)
        self.tokens, self.description = self.writer.tokens, self.writer.description
        super().__init__(tokenizer)
        writers = self.writer, self.tool_writer, self.result_writer
        self.roles = tuple(dict.fromkeys(role for writer in writers for role in writer.roles))
        self.takes_tools = self.writer.takes_calls or self.tool_writer.takes_calls

    def encode_header(self, message: Message) -> list[int]:
        return self.encode_pieces(self.writer.header(message["role"]))

    def encode_message(self, message: Message, tool_form: ToolForm = "json") -> list[int]:
        check_message(message, self.writer.roles, self.writer.takes_calls)
        return self.encode_pieces(self.writer.message(message))

    def encode_dialog_prompt(
        self, dialog: Dialog, tools: Sequence[Tool] | None = None, tool_form: ToolForm = "json"
    ) -> list[int]:
        check_dialog(dialog)
        check_form(tool_form)
        writer = self.writer_of(dialog, tools)
        if tools and not writer.takes_tools:
            raise ValueError(f"tools: {NO_TOOLS}")
        if tools and tool_form != "json":
            raise ValueError("the chat template decides how calls are written; omit tool_form")
        for message in dialog:
            check_message(message, writer.roles, writer.takes_calls)
        return self.encode_pieces(writer.prompt(dialog, tools))

    def writer_of(self, dialog: Dialog, tools: Sequence[Tool] | None) -> Writer:
        writer = self.result_writer if any(map(is_result, dialog)) else self.writer
        return self.tool_writer if tools else writer

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        t: list[int] = []
        for text, is_token in strip_beside_tokens(pieces, self.tokenizer.token_flags):
            special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
            t += [special[text]] if is_token else encode(text, bos=False, eos=False)
        return t
