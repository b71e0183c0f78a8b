"""Unicode scripts: which characters, and which bytes inside of them, belong to some."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

# The first byte of a character in UTF-8 -> the bytes that follow it.
_FOLLOWING = {b: 1 if b < 0xE0 else 2 if b < 0xF0 else 3 for b in range(0xC2, 0xF5)}
_UNFINISHED = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


class Scripts:
    """A choice of scripts.

    A character belongs to every script that uses it (Unicode's Script_Extensions, UAX #24): the
    Chinese full stop to Han, Hiragana and others.

    Args:
        names: Unicode's names of scripts, such as "Han"; ["all"]: every character. None: every
            script but Latin, and no characters of all scripts, such as digits and most punctuation.

    Raises:
        ValueError: Unicode has no such script.
    """

    def __init__(self, names: Collection[str] | None = None):
        import regex

        self.every = names is not None and "all" in names
        if names is None:
            others = "".join(rf"\p{{scx={s}}}" for s in ("Latin", "Common", "Inherited", "Unknown"))
            members = f"[^{others}]"
        elif self.every:
            members = r"[\s\S]"
        else:
            for name in names or [""]:
                try:
                    if not re.fullmatch(r"\w+", name):
                        raise regex.error("no name")
                    regex.compile(rf"\p{{scx={name}}}")
                except regex.error:
                    raise ValueError(
                        f"Unicode has no script {name!r}; use names such as Han, Hiragana, Hangul, "
                        "Cyrillic, Arabic, Devanagari, or all"
                    ) from None
            members = "[" + "".join(rf"\p{{scx={name}}}" for name in names) + "]"
        self.pattern = regex.compile(members)
        self._members = regex.compile(f" ?{members}*")
        self._members_or_unassigned = regex.compile(rf"(?:{members}|\p{{Cn}})*")
        self._fits = cache(self._all_in_scripts)

    def contain(self, token: bytes) -> bool:
        """Whether a token of these bytes is only ever found in text of these scripts.

        It may begin with one space, as words do. It may end inside of a character, if every
        character that could follow belongs to the scripts, and may not begin inside of one.
        """
        if self.every:
            return True
        unfinished = _UNFINISHED.search(token)
        start = unfinished.group() if unfinished else b""
        try:
            text = token[: len(token) - len(start)].decode()
        except UnicodeDecodeError:
            return False
        return bool(self._members.fullmatch(text)) and (not start or self._fits(start))

    def _all_in_scripts(self, start: bytes) -> bool:
        """Whether all characters whose first bytes are `start` belong to the scripts."""
        missing = 1 + _FOLLOWING[start[0]] - len(start)
        endings = [b""]
        for _ in range(missing):
            endings = [end + bytes([b]) for end in endings for b in range(0x80, 0xC0)]
        text = b"".join(start + end for end in endings).decode("utf-8", "ignore")
        return bool(self._members_or_unassigned.fullmatch(text))
