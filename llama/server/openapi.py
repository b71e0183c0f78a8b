"""The OpenAPI document, made from the dataclasses that check the bodies."""

from __future__ import annotations

from typing import Any

from llama.common.version import __version__
from llama.server.chat_body import ChatBody
from llama.server.completion_body import CompletionBody
from llama.server.fields import record_schema
from llama.server.reply_schemas import SCHEMAS, TEXT, Schema, ref
from llama.server.token_bodies import DetokenizeBody, TokenizeBody

_BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
# Of every endpoint, and of those with a body.
_ERRORS = {
    "401": "The key is missing or wrong.",
    "403": "The host or origin is not allowed.",
    "404": "There is no such model or path.",
    "405": "The path has no such method.",
    "500": "The server failed.",
    "503": "The model is loading or dead, or the queue is full; see Retry-After.",
}
_BODY_ERRORS = {
    "400": "A field is wrong: `param` names it.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "431": "The headers are too large.",
    "504": "The answer took longer than the server's limit.",
}


def openapi() -> dict[str, Any]:
    """The document, version 3.1."""
    schemas = {body.__name__: record_schema(body) for body in _BODIES}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llama3 serve",
            "version": __version__,
            "description": "OpenAI's API for a model and its adapters. Unknown fields are ignored.",
        },
        "paths": _paths(),
        "components": {
            "schemas": schemas | SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> dict[str, Any]:
    chat = _post("Answer a dialog", "ChatBody", "ChatCompletion", "ChatCompletionChunk")
    name = {"name": "model", "in": "path", "required": True, "schema": TEXT}
    anything: Schema = {"type": "object"}
    health = _get("Whether the model is ready (503 if not)", _json(anything))
    health["responses"]["503"]["content"] = _json(anything)
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {
            "post": _post("Continue texts", "CompletionBody", "Completion", "CompletionChunk")
        },
        "/v1/models": {"get": _get("The served model and its adapters", _json(ref("Models")))},
        "/v1/models/{model}": {
            "get": _get("One of them", _json(ref("Model"))) | {"parameters": [name]}
        },
        "/tokenize": {"post": _post("Token ids of a text or a dialog", "TokenizeBody", "Tokens")},
        "/detokenize": {"post": _post("Text of token ids", "DetokenizeBody", "Detokenized")},
        "/health": {"get": health | {"security": []}},
        "/metrics": {"get": _get("Metrics of Prometheus", {"text/plain": {"schema": TEXT}})},
        "/openapi.json": {"get": _get("This document", _json(anything))},
    }


def _get(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses(content, _ERRORS)}


def _post(summary: str, body: str, reply: str, chunk: str | None = None) -> dict[str, Any]:
    content = _json(ref(reply))
    if chunk is not None:
        content["text/event-stream"] = {"schema": _event(chunk)}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(ref(body))},
        "responses": _responses(content, _ERRORS | _BODY_ERRORS),
    }


def _event(chunk: str) -> Schema:
    """Each event of a stream: its data is a chunk, an error, or [DONE]."""
    data = {"anyOf": [ref(chunk), ref("Error")]}
    described = {"contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": TEXT | described}, "required": ["data"]}


def _responses(content: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status, words in sorted(errors.items()):
        found[status] = {"description": words, "content": _json(ref("Error"))}
    return found


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
