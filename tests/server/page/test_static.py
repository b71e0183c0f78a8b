"""Files of the chat page: vendored libraries, types, entity tags, headers, and no other file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from docs.fetch_vendor import LIBRARIES, VENDOR
from llama.server.static import FOLDER, page_routes

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NAMES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


def test_vendored_files_are_those_of_their_packages() -> None:
    entries = json.loads((VENDOR / "vendor.json").read_text())
    assert [(entry["name"], entry["version"], entry["license"]) for entry in entries] == [
        (library.name, library.version, library.license) for library in LIBRARIES
    ]
    hashes = {name: file["sha256"] for entry in entries for name, file in entry["files"].items()}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del found["vendor.json"]
    assert found == hashes
    for library in LIBRARIES:
        assert any(name.endswith(".LICENSE.txt") for name in library.files.values())


def test_every_file_is_served_with_its_type_and_the_policy(client: TestClient) -> None:
    types = {
        ".js": "text/javascript",
        ".css": "text/css",
        ".html": "text/html",
        ".svg": "image/svg+xml",
        ".json": "application/json",
        ".txt": "text/plain",
    }
    for name in NAMES:
        reply = client.get(f"/page/{name}")
        assert reply.status_code == 200
        assert reply.content == (FOLDER / name).read_bytes()
        assert reply.headers["content-type"].split(";")[0] == types[Path(name).suffix]
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/")
    again = client.get("/", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["../static.py", "..%2fstatic.py", "%2e%2e/static.py", "vendor/../../static.py", "/etc/passwd",
     "vendor", "vendor/", "", "index.html%00.js", "..\\static.py"],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


def test_the_page_has_no_inline_script_or_style() -> None:
    text = (FOLDER / "index.html").read_text()
    assert "<script>" not in text and "<style" not in text
    assert "style=" not in text and "onclick=" not in text
    assert "://" not in text


def test_files_stay_short() -> None:
    for name in NAMES:
        if not name.startswith("vendor/"):
            assert (FOLDER / name).read_text("utf-8").count("\n") < 300, name
