"""Writes the tables of fields into docs/server.md, from the dataclasses that check the bodies.

python docs/list_fields.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llama.server.chat_body import REFUSED as REFUSED_BY_CHAT
from llama.server.chat_body import ChatBody
from llama.server.common_body import IGNORED, CommonBody
from llama.server.completion_body import REFUSED as REFUSED_BY_COMPLETIONS
from llama.server.completion_body import CompletionBody

PAGE = Path(__file__).parent / "server.md"
BEGIN = "<!-- written by docs/list_fields.py: begin -->\n"
END = "<!-- written by docs/list_fields.py: end -->\n"
MANY = 2**20  # a limit that is not worth a mention


def tables() -> str:
    """All tables, with their headings."""
    common = [field.name for field in dataclasses.fields(CommonBody)]
    refused = {"messages": "image, audio and file parts: the models take text only"}
    refused |= REFUSED_BY_CHAT | REFUSED_BY_COMPLETIONS
    lines = ["### Of both endpoints", "", *table(CommonBody)]
    lines += ["", "### Of /v1/chat/completions", "", *table(ChatBody, common)]
    lines += ["", "### Of /v1/completions", "", *table(CompletionBody, common)]
    ignored = ", ".join(f"`{name}`" for name in IGNORED)
    lines += ["", f"**Ignored**: {ignored}, and every key that no table has.", ""]
    lines += ["**Refused** with a 400 that names the field:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in refused.items()]
    return "\n".join(lines) + "\n"


def table(record: type, without: list[str] | None = None) -> list[str]:
    """A table of a body's fields."""
    lines = ["| field | values | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(record):
        if field.name in (without or ()):
            continue
        values = words(field.metadata["kind"].schema())
        default = shown(field.default)
        lines.append(f"| `{field.name}` | {values} | {default} | {field.metadata['help']} |")
    return lines


def shown(default: Any) -> str:
    """A default; nothing where the text says it, or there is none to say."""
    if default is dataclasses.MISSING:
        return "**needed**"
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default in (None, ()) else str(default).removesuffix(".0")


def words(schema: dict[str, Any]) -> str:
    """What a JSON schema of this server allows."""
    if "anyOf" in schema:
        found = dict.fromkeys(map(words, schema["anyOf"]))
        return " or ".join(word for word in found if "list" not in found or "list of" not in word)
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kind = schema["type"]
    if kind in ("number", "integer"):
        low, high = schema["minimum"], schema["maximum"]
        if low < -MANY or low == high:
            return str(kind) if low < high else f"{low:g}"
        return f"{low:g} to {high:g}" if high < MANY else f"{low:g} or more"
    if kind == "array":
        most = schema.get("maxItems", MANY)
        return "list" if most >= MANY else f"list of up to {most}"
    return {"string": "text", "boolean": "true, false"}.get(kind, str(kind))


def written(page: str) -> str:
    """The page's text with the tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"{PAGE} has lost its markers"
    return before + BEGIN + tables() + END + after


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
