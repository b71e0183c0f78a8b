"""Examples -> rows of token ids, with what is trained. Knows nothing about models or files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from llama.common.progress import progress
from llama.text.chat_template import ChatTemplate, Piece
from llama.text.long_text import passages
from llama.text.messages import Dialog, Message, check_message
from llama.text.tool_prompt import Tool, ToolForm
from llama.tokenizer import ChatFormat, TextFormat, Tokenizer
from llama.train.examples import Conversation, Document, Example, Instruction, Preference
from llama.train.rows import Row

Template = Literal["auto", "chat", "alpaca"]
TEMPLATES: tuple[str, ...] = get_args(Template)
PASSAGE = 1 << 20  # characters encoded at a time
# Alpaca's two prompts (stanford_alpaca). The answer follows the colon at once.
_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt, for models without a chat format."""
    if not input.strip():
        return f"{_TASK}. {_WRITE}\n\n### Instruction:\n{instruction}\n\n### Response:"
    return (
        f"{_TASK}, paired with an input that provides further context. {_WRITE}\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    )


class ExampleEncoder:
    """Encodes dialogs, instructions and preferences; for texts see `encode_documents`.

    A row begins with the ids that inference sends: `ChatFormat.encode_dialog_prompt` of the dialog
    up to an answer. Then come the ids that the model is to generate: the answer and its end. Only
    these are trained.

    Args:
        template: "chat" (the tokenizer's chat format), "alpaca" (Alpaca's prompts, for base
            models), or "auto": "chat" if the tokenizer has a chat format.
        tool_form: how calls are written, see `ChatFormat.encode_dialog_prompt`.

    Raises:
        ValueError: the tokenizer has no such format, or no token that ends an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Template = "auto", tool_form: ToolForm = "json"
    ):
        if template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; use one of {', '.join(TEMPLATES)}")
        self.tokenizer, self.tool_form = tokenizer, tool_form
        self.chat: ChatFormat | None = None
        if template == "chat" or (template == "auto" and tokenizer.chat_format is not None):
            self.chat = ChatFormat(tokenizer)
        self.end_id = self._end_id()
        self.stops = {self.end_id, *tokenizer.stop_tokens}

    def _end_id(self) -> int:
        """The id after an answer where the format has no other one."""
        ends = [self.tokenizer.eos_id, *self.tokenizer.stop_tokens]
        if isinstance(self.chat, TextFormat) and isinstance(self.chat.writer, ChatTemplate):
            mark = self.chat.writer.turn_end()
            ends.insert(0, self.tokenizer.special_tokens.get(mark or "", -1))
        end = next((token for token in ends if token >= 0), None)
        if end is None:
            raise ValueError(
                "this tokenizer has no token that ends a text, so a model could not stop; use "
                "another one, or name eos_token in its sidecar"
            )
        return end

    def rows(self, example: Conversation | Instruction) -> list[Row]:
        """One row; more if a later prompt does not begin with the ids before it.

        Raises:
            ValueError: the format has no such message; the error names the row.
        """
        try:
            if self.chat is None:
                return [self._alpaca_row(example)]
            if isinstance(example, Instruction):
                parts = [text for text in (example.instruction, example.input) if text.strip()]
                dialog: tuple[Message, ...] = (
                    {"role": "user", "content": "\n\n".join(parts)},
                    {"role": "assistant", "content": example.output},
                )
                example = Conversation(example.where, dialog)
            return self._dialog_rows(example)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{example.where}: {e}") from None

    def pair(self, example: Preference) -> tuple[Row, Row]:
        """Rows with the chosen and the rejected answer; only these answers are trained.

        Raises:
            ValueError: as `rows`.
        """
        chosen, rejected = (
            self.rows(
                Conversation(
                    example.where,
                    (*example.prompt, answer),
                    example.tools,
                    frozenset(range(len(example.prompt))),
                )
            )[-1]
            for answer in (example.chosen, example.rejected)
        )
        return chosen, rejected

    def _dialog_rows(self, example: Conversation) -> list[Row]:
        assert self.chat is not None
        rows: list[Row] = []
        ids: list[int] = []
        trained: list[bool] = []
        for i, message in enumerate(example.dialog):
            if message["role"] != "assistant" or i in example.not_trained:
                continue
            before, tools = example.dialog[:i], example.tools
            prompt = self.chat.encode_dialog_prompt(before, tools or None, self.tool_form)
            if prompt[: len(ids)] != ids:
                rows.append(_row(ids, trained))
                ids, trained = [], []
            answer = self._answer_ids(before, message, tools)
            trained += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
            ids = prompt + answer
        return [*rows, _row(ids, trained)]

    def _answer_ids(self, before: Dialog, answer: Message, tools: Sequence[Tool]) -> list[int]:
        """The ids that a model generates after the prompt of `before`, with the end."""
        if not isinstance(self.chat, TextFormat):
            assert self.chat is not None
            header = self.chat.encode_header(answer)
            return self.chat.encode_message(answer, self.tool_form)[len(header) :]
        writer, content = self.chat.writer_of(before, tools), answer["content"]
        check_message(answer, writer.roles, writer.takes_calls)
        if not isinstance(writer, ChatTemplate):
            return self.chat.encode_pieces([(content, False), (writer.tokens[1], True)])
        prompt = writer.prompt(before, tools)
        whole = writer.prompt([*before, answer], tools, answer=False)
        pieces = self._cut_at_end(_rest(prompt, whole))
        text = "".join(part for part, is_token in pieces if not is_token)
        # Of an answer without calls the template may leave out a part, such as its reasoning.
        if not pieces or not (answer.get("tool_calls") or text.strip() == content.strip()):
            if answer.get("tool_calls"):
                raise ValueError("the chat template does not write calls after its prompt")
            pieces = [(_without_opening(content, prompt), False)]
        ids = self.chat.encode_pieces(pieces)
        return ids if ids[-1] in self.stops else [*ids, self.end_id]

    def _cut_at_end(self, pieces: list[Piece]) -> list[Piece]:
        """`pieces` up to the last token that ends an answer; all of them if there is none."""
        special = self.tokenizer.special_tokens
        ends = [
            i
            for i, (text, is_token) in enumerate(pieces)
            if is_token and special[text] in self.stops
        ]
        return pieces[: ends[-1] + 1] if ends else pieces

    def _alpaca_row(self, example: Conversation | Instruction) -> Row:
        if isinstance(example, Instruction):
            instruction, given, output = example.instruction, example.input, example.output
        else:
            roles = [message["role"] for message in example.dialog]
            if (
                roles != ["user", "assistant"]
                or example.dialog[1].get("tool_calls")
                or example.tools
            ):
                raise ValueError(
                    f"Alpaca's template has one question and one answer, not {', '.join(roles)}; "
                    "use a model with a chat format (--template chat), or other data"
                )
            instruction, output = (message["content"] for message in example.dialog)
            given = ""
        prompt = self.tokenizer.encode(alpaca_prompt(instruction, given))
        answer = [*self.tokenizer.encode(output, bos=False), self.end_id]
        return _row(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer, block: int) -> list[Row]:
    """Blocks of `block` tokens of all documents, joined with EOS and BOS between them.

    Every id but the first is a target once: a row has `block` + 1 ids, of which the first is the
    last of the row before. The last row is shorter.

    Raises:
        ValueError: `block` is below 1, or the vocabulary lacks a character.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    parts = [np.array(ids, np.int32) for ids in _document_ids(documents, tokenizer)]
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    rows = []
    for start in range(0, len(stream) - 1, block):
        ids = stream[start : start + block + 1]
        trained = np.ones(len(ids), bool)
        trained[0] = False
        rows.append(Row(ids, trained))
    return rows


def _document_ids(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for document in progress(documents, "encoding", len(documents), "document"):
        end, size = 0, len(document.text)
        try:
            for passage in passages(document.text, PASSAGE):
                bos, end = document.begins and end == 0, end + len(passage)
                yield tokenizer.encode(passage, bos=bos, eos=document.ends and end == size)
        except ValueError as e:
            raise ValueError(f"{document.where}: {e}") from None


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    block: int = 512,
    template: Template = "auto",
    tool_form: ToolForm = "json",
) -> list[Row]:
    """The rows of examples of one kind: dialogs and instructions, or documents.

    Args:
        block: tokens of a row of text.
        template, tool_form: see `ExampleEncoder`.

    Raises:
        ValueError: as `ExampleEncoder.rows` and `encode_documents`.
    """
    documents = [example for example in examples if isinstance(example, Document)]
    if documents and len(documents) == len(examples):
        return encode_documents(documents, tokenizer, block)
    encoder = ExampleEncoder(tokenizer, template, tool_form)
    rows: list[Row] = []
    for example in progress(examples, "encoding", len(examples), "example"):
        if isinstance(example, (Document, Preference)):
            kind = type(example).__name__.lower()
            raise ValueError(f"{example.where}: a {kind} among dialogs; give one kind of data")
        rows += encoder.rows(example)
    return rows


def encode_example(
    example: Conversation | Instruction,
    tokenizer: Tokenizer,
    template: Template = "auto",
    tool_form: ToolForm = "json",
) -> list[Row]:
    """The rows of one example; for several, `encode_examples` is faster."""
    return ExampleEncoder(tokenizer, template, tool_form).rows(example)


def _rest(prompt: Sequence[Piece], whole: Sequence[Piece]) -> list[Piece]:
    """The pieces of `whole` after `prompt`; none if it does not begin with it."""
    if not prompt:
        return list(whole)
    last, is_token = prompt[-1]
    n = len(prompt) - 1
    if list(whole[:n]) != list(prompt[:n]) or len(whole) <= n or whole[n][1] != is_token:
        return []
    text = whole[n][0]
    if not text.startswith(last) or (is_token and text != last):
        return []
    return [piece for piece in ((text[len(last) :], False), *whole[n + 1 :]) if piece[0]]


def _without_opening(content: str, prompt: Sequence[Piece]) -> str:
    """`content` without the text that the prompt ends with, such as `<think>` and a newline."""
    opening = "" if not prompt or prompt[-1][1] else prompt[-1][0].strip()
    text = content.lstrip()
    return text[len(opening) :].lstrip() if opening and text.startswith(opening) else content


def _row(ids: list[int], trained: list[bool]) -> Row:
    return Row(np.array(ids, np.int32), np.array(trained, bool))
