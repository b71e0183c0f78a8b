"""Which split patterns of a sidecar are accepted. Runs no pattern."""

from __future__ import annotations

import re

MAX_PATTERN = 4096  # characters; the published ones have up to 400
# An escape, a class, the start of a lookaround, a parenthesis, a repeat without an end, or another
# character.
_ATOM = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<?[=!]|[()*+]|\{\d*,\}|.",
    re.DOTALL,
)


def check_pattern(pattern: str, where: str) -> None:
    """Check that splitting by `pattern` cannot take quadratic time because of a lookaround.

    A lookaround is tried at every character: if it may read to the end of the text, a megabyte
    takes hours. Back-references are refused for the same reason.

    Raises:
        ValueError: `where` names the file in the message.
    """
    problem = None
    if len(pattern) > MAX_PATTERN:
        problem = f"has more than {MAX_PATTERN} characters"
    lookarounds: list[int] = []  # depths
    depth = 0
    for atom in _ATOM.findall(pattern[:MAX_PATTERN]):
        if atom.startswith("("):
            depth += 1
            if len(atom) > 1:
                lookarounds.append(depth)
        elif atom == ")":
            if lookarounds and lookarounds[-1] == depth:
                lookarounds.pop()
            depth -= 1
        elif lookarounds and (atom in ("*", "+") or atom.endswith(",}")):
            problem = "has a repeat without an end in a lookahead or lookbehind"
        elif re.fullmatch(r"\\[1-9kg]", atom):
            problem = "has a back-reference"
    if problem:
        raise ValueError(
            f"{where}: the split pattern {problem}: long texts would take hours; get the "
            "tokenizer's published files"
        )
