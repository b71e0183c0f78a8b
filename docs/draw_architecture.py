"""The rooms of llama/ and what each may import; draws them in docs/architecture.md.

    python docs/draw_architecture.py

`tests/test_layers.py` checks every import of the package against this table. Imports no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent / "architecture.md"
BEGIN = "<!-- drawn by docs/draw_architecture.py: begin -->\n"
END = "<!-- drawn by docs/draw_architecture.py: end -->\n"


@dataclass(frozen=True)
class Room:
    """A folder or a file of llama/.

    Attributes:
        does: what it is for.
        imports: the rooms directly below it. It may also import whatever these may import.
    """

    does: str
    imports: tuple[str, ...] = ()


# From top to bottom. "llama" is the package itself: __init__.py and __main__.py.
ROOMS = {
    "llama": Room("the public names", ("commands",)),
    "commands": Room("the verbs of llama3", ("server", "train", "evaluation")),
    "server": Room("OpenAI-compatible HTTP, the chat page", ("generation",)),
    "train": Room("data, optimizer, training loop", ("generation",)),
    "evaluation": Room("lm-eval's tasks", ("generation",)),
    "generation": Room("class Llama: text in, text out", ("explain", "engine", "checkpoints")),
    "explain": Room("what a model computes for a prompt", ("engine", "tokenizer")),
    "engine": Room("requests of ids in, ids out", ("layers",)),
    "checkpoints": Room("files to weights and back", ("layers", "tokenizer")),
    "layers": Room("faster and quantized modules", ("model",)),
    "tokenizer": Room("text to ids, chat formats", ("text",)),
    "model": Room("the transformer", ("distributed",)),
    "text": Room("rank files, tools, detokenizer", ("common",)),
    "distributed": Room("ranks, tensor parallelism", ("common",)),
    "common": Room("progress bars, files, dtypes by name"),
}
FILES = ("generation", "tokenizer", "model")  # the rooms that are one file each


def room_of(module: str) -> str:
    """The room of a module: "engine" for "llama.engine.slots"."""
    parts = module.split(".")
    return "llama" if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def allowed(room: str) -> frozenset[str]:
    """The rooms that `room` may import, itself included."""
    below = (allowed(other) for other in ROOMS[room].imports)
    return frozenset({room}).union(*below)


def drawing() -> str:
    """The table as a Mermaid diagram, and in words."""
    lines = ["```mermaid", "flowchart TD"]
    for name, room in ROOMS.items():
        lines.append(f'    {name}["<b>{path(name)}</b><br>{room.does}"]')
    for name, room in ROOMS.items():
        lines += [f"    {name} --> {other}" for other in room.imports]
    lines += ["```", "", "| room | what it is for | may import |", "|---|---|---|"]
    for name, room in ROOMS.items():
        others = [other for other in ROOMS if other in allowed(name) and other != name]
        lines.append(f"| `{path(name)}` | {room.does} | {', '.join(others) or 'nothing'} |")
    return "\n".join(lines) + "\n"


def path(name: str) -> str:
    """Where a room is, relative to llama/."""
    if name == "llama":
        return "__init__.py"
    return f"{name}.py" if name in FILES else f"{name}/"


def drawn(page: str) -> str:
    """The page's text with the drawing between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"{PAGE} has lost its markers"
    return before + BEGIN + drawing() + END + after


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text("utf-8")), "utf-8")
