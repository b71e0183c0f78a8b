"""What each suite asks that this server does not do, and why. A name is a check's, a test
function's, a class's or a file's. An entry that is no longer needed makes the run fail.
"""

from __future__ import annotations

DESELECTED: dict[str, dict[str, str]] = {}
