"""What a chat body demands of the answer's text -> a grammar."""

from __future__ import annotations

from llama.generation import Llama
from llama.server.chat_body import ChatBody
from llama.server.errors import invalid
from llama.server.prompts import chat_format
from llama.text.grammar import Grammar, json_object_grammar, json_schema_grammar
from llama.text.tool_grammar import tool_call_grammar


def constraint(llama: Llama, body: ChatBody) -> Grammar | None:
    """The grammar of `response_format` or of a forced tool call; None if the answer is free.

    Takes some milliseconds, rarely a second, and holds no lock while it compiles: call it in a
    thread other than the engine's.

    Raises:
        ApiError: the schema is not supported or too large.
        ImportError: llguidance is not installed.
    """
    tokenizer, rows = llama.tokenizer, llama.model.vocab_size
    wanted = body.response_format
    if body.forced_tools:
        names = None if body.named_tool is None else [body.named_tool]
        form = body.tool_form if chat_format(llama).takes_tools else "json"
        try:
            return tool_call_grammar(
                tokenizer,
                body.tools,
                rows,
                form=form,
                names=names,
                parallel=body.parallel_tool_calls,
            )
        except (TypeError, ValueError) as error:
            raise invalid("tools", str(error)) from None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_object_grammar(tokenizer, rows)
    assert wanted.schema is not None
    try:
        return json_schema_grammar(tokenizer, wanted.schema, rows)
    except (TypeError, ValueError) as error:
        raise invalid("response_format.json_schema.schema", str(error)) from None
