"""Fetch the libraries of the chat page again from npm, with their licences and hashes.

    python docs/fetch_vendor.py

Writes `llama/server/page/vendor/`. To update a library, change its version here and run this.
`tests/server/page/test_vendor.py` compares the files with `vendor.json`. Needs `npm`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "llama" / "server" / "page" / "vendor"


@dataclass(frozen=True)
class Library:
    """One package of npm.

    Attributes:
        license: its SPDX name.
        files: path in the package to the name here.
    """

    name: str
    version: str
    license: str
    files: dict[str, str]


LIBRARIES = (
    Library(
        "marked",
        "18.2.1",
        "MIT",
        {"lib/marked.esm.js": "marked.js", "LICENSE": "marked.LICENSE.txt"},
    ),
    Library(
        "dompurify",
        "3.5.0",
        "(MPL-2.0 OR Apache-2.0)",
        {"dist/purify.min.js": "purify.js", "LICENSE": "purify.LICENSE.txt"},
    ),
    Library(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        {"es/highlight.min.js": "highlight.js", "LICENSE": "highlight.LICENSE.txt"},
    ),
)


def fetch(library: Library, folder: Path) -> dict[str, bytes]:
    """The files of a library, by their names here."""
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{library.name}@{library.version}"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    found = {}
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        for path, name in library.files.items():
            member = archive.extractfile(f"package/{path}")
            assert member is not None, path
            found[name] = member.read()
    return found


def main() -> None:
    VENDOR.mkdir(exist_ok=True)
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for library in LIBRARIES:
            files = fetch(library, Path(folder))
            for name, data in files.items():
                (VENDOR / name).write_bytes(data)
            entries.append(
                {
                    "name": library.name,
                    "version": library.version,
                    "license": library.license,
                    "files": {
                        name: {"path": path, "sha256": hashlib.sha256(files[name]).hexdigest()}
                        for path, name in library.files.items()
                    },
                }
            )
    (VENDOR / "vendor.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
