"""Text <-> token ids: the BPE and chat prompts. Knows nothing about tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, TypedDict

import tiktoken

from llama.vocabulary import check_spec, default_spec, parse_ranks, read_ranks, read_sidecar

Role = Literal["system", "user", "assistant", "ipython"]


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]

# tiktoken's regex engine runs out of stack on a whitespace run of somewhat under 10^6 characters.
_LONG_WHITESPACE = re.compile(r"\s{100000}")


class Tokenizer:
    """Byte-pair encoding over tiktoken, with Llama 3's special tokens.

    Args:
        model_path: a rank file (`tokenizer.model`), local or anything blobfile opens.
        version: "llama3" or "llama3.1" (and later): which special tokens follow the ranks.
            `Llama.build` chooses by the checkpoint; None here means "llama3".

    A JSON file named like the rank file plus ".json" may describe another vocabulary: `pat_str`
    (the split pattern), `special_tokens` ({text: id}), `bos_token`, `eos_token`, `pad_token` (a
    special token's text, or null for none), `stop_tokens` (a list of texts), `chat_format`
    ("llama3" or "chatml") and `default_system`. It wins over `version`.
    """

    def __init__(self, model_path: str | Path, version: str | None = None):
        model_path = str(model_path)
        self._set_up(read_ranks(model_path), read_sidecar(model_path), model_path, version)

    @classmethod
    def from_vocabulary(
        cls, rank_file: bytes, sidecar: dict[str, Any], name: str, version: str | None = None
    ) -> Tokenizer:
        """A tokenizer of a rank file's contents and of what a sidecar would say.

        Args:
            name: where they come from, for messages.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(parse_ranks(rank_file, name), sidecar, name, version)
        return tokenizer

    def _set_up(
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
        self._lacking = frozenset(b for b in range(256) if bytes([b]) not in ranks)
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
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] | None = None,
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode `s`, of any length.

        Args:
            bos, eos: put the begin / end token around (nothing where the vocabulary has none).
            allowed_special: special tokens whose text in `s` becomes their id ("all": every one).
                By default none: such text is encoded as ordinary characters, so that content can
                not forge a turn.
            disallowed_special: special tokens whose text in `s` raises a ValueError.

        Unlike the reference this never cuts a run of characters, whose tokens would change there.
        """
        if not isinstance(s, str):
            raise TypeError(f"text to encode must be a str, not {type(s).__name__}")
        allowed = allowed_special or set()
        if self._lacking:
            self._check_characters(s)
        encode = self._encode_long_whitespace if _LONG_WHITESPACE.search(s) else self.model.encode
        t = encode(s, allowed_special=allowed, disallowed_special=disallowed_special)
        if bos and self.bos_id >= 0:
            t.insert(0, self.bos_id)
        if eos and self.eos_id >= 0:
            t.append(self.eos_id)
        return t

    def _check_characters(self, s: str) -> None:
        """Name the first character that this vocabulary has no tokens for."""
        import regex

        if self._lacking.isdisjoint(s.encode(errors="replace")):
            return
        for piece in regex.findall(self.pat_str, s):
            if piece.encode(errors="replace") in self.ranks:
                continue
            for character in piece:
                if not self._lacking.isdisjoint(character.encode(errors="replace")):
                    raise ValueError(f"this tokenizer's vocabulary lacks {character!r}; remove it")

    def _encode_long_whitespace(
        self,
        s: str,
        *,
        allowed_special: Literal["all"] | AbstractSet[str],
        disallowed_special: Literal["all"] | Collection[str],
    ) -> list[int]:
        """`tiktoken`'s algorithm with its regex engine replaced by one that does not overflow."""
        import regex

        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        refused = self.special_tokens if disallowed_special == "all" else disallowed_special
        for text in set(refused) - allowed:
            if text in s:
                raise ValueError(f"the text contains the disallowed special token {text!r}")
        one_piece = tiktoken.Encoding(
            name="one piece",
            pat_str=r"[\s\S]+",  # the whole text is one piece
            mergeable_ranks=self.ranks,
            special_tokens={},
        )
        special = "|".join(re.escape(text) for text in sorted(allowed, key=len, reverse=True))
        t: list[int] = []
        for part in re.split(f"({special})", s) if special else [s]:
            if part in allowed:
                t.append(self.special_tokens[part])
            else:
                for piece in regex.finditer(self.pat_str, part):
                    t.extend(one_piece.encode_ordinary(piece.group()))
        return t

    def decode(self, t: Sequence[int]) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Decode ids to bytes, which may begin or end inside a character."""
        try:
            return self.model.decode_bytes(list(t))
        except (KeyError, OverflowError):
            wrong = next(i for i in t if not self._has(i))
            raise ValueError(f"no token has the id {wrong}; {self.n_words} are known") from None

    def _has(self, token: int) -> bool:
        try:
            self.model.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return False
        return True


class ChatFormat:
    """Llama 3's chat prompt: BOS, then per message its header, content and end-of-turn token.

    `ChatFormat(tokenizer)` gives the format that the tokenizer's vocabulary was trained with.
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
        if lacking := [t for t in self.tokens if t not in tokenizer.special_tokens]:
            raise ValueError(f"this vocabulary has no {lacking}, which its chat format needs")
        if "<|python_tag|>" in tokenizer.special_tokens:  # 3.1 and later: results of tools
            self.roles = (*self.roles, "ipython")

    def encode_header(self, message: Message) -> list[int]:
        """The tokens before a message's content."""
        special, encode = self.tokenizer.special_tokens, self.tokenizer.encode
        return [
            special["<|start_header_id|>"],
            *encode(message["role"], bos=False, eos=False),
            special["<|end_header_id|>"],
            *encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        """One whole turn."""
        self._check(message)
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """A dialog, and the header of the assistant's turn for the model to complete."""
        self._check_dialog(dialog)
        tokens = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            tokens.extend(self.encode_message(message))
        return tokens + self.encode_header({"role": "assistant", "content": ""})

    def _check_dialog(self, dialog: Dialog) -> None:
        if isinstance(dialog, (str, dict)) or not isinstance(dialog, Sequence):
            raise TypeError("a dialog is a list of {'role': ..., 'content': ...} messages")
        if not dialog:
            raise ValueError("the dialog is empty; give at least one message")

    def _check(self, message: Message) -> None:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise TypeError(f"a message is {{'role': ..., 'content': ...}}, not {message!r}")
        if message["role"] not in self.roles:
            raise ValueError(f"unknown role {message['role']!r}; use one of {list(self.roles)}")
        if not isinstance(message["content"], str):
            raise TypeError(f"a message's content is a str, not {type(message['content'])}")


class ChatMLFormat(ChatFormat):
    """ChatML: `<|im_start|>role`, newline, content, `<|im_end|>`, newline; no BOS."""

    tokens = ("<|im_start|>", "<|im_end|>")

    def encode_header(self, message: Message) -> list[int]:
        return self._turn(message["role"] + "\n")

    def encode_message(self, message: Message) -> list[int]:
        self._check(message)
        # Encoded in one go, as the template's text was in training.
        text = f"{message['role']}\n{message['content']}"
        end = self.tokenizer.special_tokens["<|im_end|>"]
        return [*self._turn(text), end, *self.tokenizer.encode("\n", bos=False, eos=False)]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        self._check_dialog(dialog)
        tokens: list[int] = []
        self._check(dialog[0])
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
