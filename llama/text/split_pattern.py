"""Which split patterns of a sidecar are accepted. Runs no pattern."""

from __future__ import annotations

import re

MAX_PATTERN = 4096  # characters; the published ones have up to 400
# An escape, a class, a comment, the start of a lookaround, flags, a parenthesis, a repeat without
# an end, or another character.
_ATOM = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?<?[=!]|\(\?[a-zA-Z-]+[:)]|[()]"
    r"|(?:[*+]|\{\d*,\})\??|.",
    re.DOTALL,
)


def check_pattern(pattern: str, where: str) -> None:
    """Check that splitting by `pattern` cannot take quadratic time because of a lookaround.

    A lookaround is tried at every character: if it may read to the end of the text, a megabyte
    takes hours. So do a lookbehind after a repeat, lazy repeats and back-references. With the flag
    x, parentheses in comments would be taken for groups.

    Raises:
        ValueError: `where` names the file in the message.
    """
    problem = None
    if len(pattern) > MAX_PATTERN:
        problem = f"has more than {MAX_PATTERN} characters"
    lookarounds: list[int] = []  # depths
    depth, repeated = 0, False  # whether a repeat without an end is before, in this alternative
    for atom in _ATOM.findall(pattern[:MAX_PATTERN]):
        repeat = atom[0] in "*+" or re.match(r"\{\d*,\}", atom)
        if re.match(r"\(\?[a-wyzA-Z]*x", atom):
            problem = "has the flag x, which is not supported"
        elif atom.startswith("(") and not atom.endswith(")"):
            if atom.startswith("(?<") and repeated:
                problem = "has a lookbehind after a repeat without an end"
            depth += 1
            if atom.endswith(("=", "!")):
                lookarounds.append(depth)
        elif atom == ")":
            if lookarounds and lookarounds[-1] == depth:
                lookarounds.pop()
            depth -= 1
        elif repeat and lookarounds:
            problem = "has a repeat without an end in a lookahead or lookbehind"
        elif repeat and atom.endswith("?"):
            problem = "has a lazy repeat without an end"
        elif re.fullmatch(r"\\[1-9kg]", atom):
            problem = "has a back-reference"
        repeated = bool(repeat) or (repeated and not (atom == "|" and depth == 0))
    if problem:
        raise ValueError(
            f"{where}: the split pattern {problem}: long texts would take hours; get the "
            "tokenizer's published files"
        )
