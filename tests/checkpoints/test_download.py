"""download.py, with a small hub on 127.0.0.1 that implements the endpoints it needs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from llama.checkpoints.download import choose_files, repository

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOP = ("config.json", "tokenizer.json", "model.safetensors.index.json", "README.md")
HF = {name: f"{name} of HF".encode() for name in (*TOP, "model-00001-of-00001.safetensors")}
META = {
    f"original/{name}": f"{name} of Meta".encode()
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model")
}
LARGE = bytes(range(256)) * (96 << 10)  # 24 MiB: more than two chunks of 10 MiB
REPOS = {
    "meta/both": HF | META,
    "hf/only": HF,
    "cut/once": META | {"original/consolidated.00.pth": LARGE},
    "fails/once": META | {"original/consolidated.00.pth": LARGE},
    "meta/gated": META,
    "meta/login": META,
    "bad/token": HF,
    "down/now": HF,
    "huge/one": META,
    "no/weights": {"README.md": b"nothing"},
}


class Hub(BaseHTTPRequestHandler):
    """Model info, file tree, files with ETag and ranges; the repository name selects a fault."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, str | None]] = []  # noqa: RUF012  (method, path, range)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        first = (self.command, path) not in [(m, p) for m, p, _ in self.seen]
        self.seen.append((self.command, path, self.headers.get("Range")))
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        if repo not in REPOS:
            self.send(404, error="RepoNotFound")
        elif repo == "bad/token" and self.headers.get("Authorization") == "Bearer wrong":
            self.send(401, message="Invalid credentials in Authorization header")
        elif repo == "down/now":
            self.send(500)
        elif path.startswith("api/"):
            self.send(200, json.dumps(self.tree(repo) if "tree" in parts else self.info(repo)))
        elif repo in ("meta/gated", "meta/login"):
            self.send(403 if repo == "meta/gated" else 401, error="GatedRepo", message="ask first")
        else:
            self.send_file(repo, "/".join(parts[4:]), first)  # REPO/resolve/COMMIT/FILE

    def info(self, repo: str) -> dict[str, Any]:
        factor = 10**15 if repo == "huge/one" else 1
        siblings = [{"rfilename": n, "size": len(c) * factor} for n, c in REPOS[repo].items()]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in REPOS[repo].items()
        ]

    def send_file(self, repo: str, name: str, first: bool) -> None:
        content, weights = REPOS[repo][name], name.endswith(".pth")
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        get = self.command == "GET"
        if repo == "fails/once" and weights and get and first:
            return self.send(500)
        start, status = 0, 200
        if range_ := self.headers.get("Range"):
            start, status = int(range_.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = len(content) // 2 if repo == "cut/once" and weights and get and first else None
        return self.send(status, content[start:], headers, cut=cut)

    def send(
        self,
        status: int,
        body: str | bytes = b"",
        headers: dict[str, str] | None = None,
        error: str = "",
        message: str = "",
        cut: int | None = None,
    ) -> None:
        """Answer; `cut`: close the connection after so many bytes of the body."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        told = {"X-Error-Code": error, "X-Error-Message": message}
        for key, value in ((headers or {}) | {k: v for k, v in told.items() if v}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


DRIVER = """
import json, sys
from pathlib import Path
from llama.checkpoints.download import download, download_once
for line in sys.stdin:
    call = json.loads(line)
    if call.get("cache"):
        print(json.dumps(["", str(download_once(call["repo"], Path(call["cache"])))]), flush=True)
        continue
    if call.get("dst"):
        call["dst"] = Path(call["dst"])
    try:
        answer = ["", str(download(**call))]
    except Exception as e:
        answer = [type(e).__name__, str(e)]
    print(json.dumps(answer), flush=True)
"""


class Client:
    """`download` in another process: the hub's library reads its settings when imported."""

    def __init__(self, endpoint: str, home: Path, **more: str):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env=kept
            | {
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(home / "hf"),
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            }
            | more,
        )

    def __call__(self, repo: str, **call: Any) -> tuple[str, str]:
        """(type of the error or "", its message or the folder)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"repo": repo} | call) + "\n")
        self.process.stdin.flush()
        error, text = json.loads(self.process.stdout.readline())
        assert "\n" not in text
        return error, text

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    client = Client(f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("home"))
    yield client
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Hub.seen.clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and ".cache" not in f.parts
    }


def fetched() -> set[str]:
    return {
        path.split("/", 4)[-1]
        for method, path, _ in Hub.seen
        if "/resolve/" in path and method == "GET"
    }


def test_prefers_metas_files(client: Client, tmp_path: Path) -> None:
    dst = tmp_path / "new" / "model"
    assert client("meta/both", dst=str(dst)) == ("", str(dst / "original"))
    assert contents(dst) == META


def test_whole_repository(client: Client, tmp_path: Path) -> None:
    assert client("meta/both", dst=str(tmp_path), include="*") == ("", str(tmp_path))
    assert contents(tmp_path) == HF | META


def test_hugging_face_files(client: Client, tmp_path: Path) -> None:
    assert client("hf/only", dst=str(tmp_path)) == ("", str(tmp_path))
    assert contents(tmp_path) == {n: c for n, c in HF.items() if n != "README.md"}


def test_default_folder(client: Client) -> None:
    assert client("hf/only", include=["config.json"]) == ("", "only")


def test_include(client: Client, tmp_path: Path) -> None:
    assert client("meta/both", dst=str(tmp_path), include=["*/params.json"])[0] == ""
    assert set(contents(tmp_path)) == {"original/params.json"}
    error, text = client("meta/both", dst=str(tmp_path), include="*.onnx")
    assert error == "RuntimeError" and "has no file like ['*.onnx']; it has README.md" in text


def test_gated(client: Client, tmp_path: Path) -> None:
    error, text = client("meta/gated", dst=str(tmp_path))
    assert error == "RuntimeError" and "meta/gated is gated" in text
    assert re.search(r"accept the licence on http\S+/meta/gated ", text) and "ask first" in text


def test_gated_without_a_token(client: Client, tmp_path: Path) -> None:
    error, text = client("meta/login", dst=str(tmp_path))
    assert error == "RuntimeError" and "`hf auth login` or set HF_TOKEN" in text


def test_wrong_token(client: Client, tmp_path: Path) -> None:
    error, text = client("bad/token", dst=str(tmp_path), token="wrong")
    assert error == "RuntimeError" and "refused bad/token (401); check your token" in text
    assert client("bad/token", dst=str(tmp_path), token="right")[0] == ""


def test_unknown(client: Client, tmp_path: Path) -> None:
    error, text = client("meta/bth", dst=str(tmp_path))
    assert error == "RuntimeError" and "no repository meta/bth" in text and "check the name" in text


def test_bad_name(client: Client) -> None:
    error, text = client("https://example.org/a/b")
    assert error == "ValueError" and "owner/name" in text


@pytest.mark.parametrize("page", ["", "/", "/tree/main", "/blob/main/config.json"])
def test_the_address_of_a_page_is_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:80")
    for host in ("https://huggingface.co", "https://hf.co", "http://mirror:80"):
        assert repository(f"{host}/owner/a.name{page}") == "owner/a.name"
    assert repository("owner/a.name") == "owner/a.name" and repository("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["https://huggingface.co/", "a/b/c", "", "../a", "a b/c"])
def test_what_is_no_repository(name: str) -> None:
    with pytest.raises(ValueError, match="looks like owner/name"):
        repository(name)


def test_once(client: Client, tmp_path: Path) -> None:
    """The second call needs no connection."""
    folder = str(tmp_path / "meta" / "both" / "original")
    assert client("meta/both", cache=str(tmp_path)) == ("", folder)
    assert Hub.seen
    Hub.seen.clear()
    assert client("meta/both", cache=str(tmp_path)) == ("", folder) and not Hub.seen


def test_server_error(client: Client, tmp_path: Path) -> None:
    error, text = client("down/now", dst=str(tmp_path))
    assert error == "RuntimeError" and "(500); wait a little and call again" in text


def test_interrupted_transfer_continues(client: Client, tmp_path: Path) -> None:
    """The connection breaks half-way; only the rest is requested."""
    assert client("cut/once", dst=str(tmp_path))[0] == ""
    assert contents(tmp_path)["original/consolidated.00.pth"] == LARGE
    ranges = [r for method, path, r in Hub.seen if path.endswith(".pth") and method == "GET"]
    assert len(ranges) == 2 and ranges[0] is None
    assert ranges[1] is not None and 0 < int(ranges[1][6:-1]) <= len(LARGE) // 2


def test_second_call(client: Client, tmp_path: Path) -> None:
    """It does not fetch the files that the first one completed before it failed."""
    error, text = client("fails/once", dst=str(tmp_path))
    assert error == "RuntimeError" and "call again" in text
    kept = set(contents(tmp_path))
    Hub.seen[:] = [(m, p, r) for m, p, r in Hub.seen if p.endswith(".pth")]  # that it has failed
    assert fetched() == {"original/consolidated.00.pth"}
    assert client("fails/once", dst=str(tmp_path))[0] == ""
    assert contents(tmp_path) == REPOS["fails/once"]
    assert fetched() == set(META) - kept


def test_file_truncated_afterwards(client: Client, tmp_path: Path) -> None:
    """The hub's library takes it for the complete file; it has another size."""
    assert client("hf/only", dst=str(tmp_path))[0] == ""
    (tmp_path / "config.json").write_bytes(b"{")
    error, text = client("hf/only", dst=str(tmp_path))
    assert error == "RuntimeError" and f"{tmp_path}/config.json has another size than in" in text


def test_disk_too_small(client: Client, tmp_path: Path) -> None:
    error, text = client("huge/one", dst=str(tmp_path / "new"))
    assert error == "OSError" and "writing" in text and "GB free; free some" in text
    assert not (tmp_path / "new").exists() and not fetched()


def test_folder_is_a_file(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error, text = client("hf/only", dst=str(tmp_path / "file"))
    assert error == "NotADirectoryError" and "give another folder" in text


def test_no_checkpoint(client: Client, tmp_path: Path) -> None:
    error, text = client("no/weights", dst=str(tmp_path))
    assert error == "RuntimeError" and "no weights that this library reads" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "no connection to the hub"), ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE")],
)
def test_no_connection(tmp_path: Path, more: dict[str, str], message: str) -> None:
    """An error also if the folder exists, which the hub's library would simply return."""
    client = Client("http://127.0.0.1:9", tmp_path, **more)
    error, text = client("hf/only", dst=str(tmp_path))
    assert error == "ConnectionError" and message in text
    client.close()


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ("consolidated.00.pth params.json a.json tokenizer.model",
         "consolidated.00.pth params.json tokenizer.model"),
        ("o/8/consolidated.00.pth o/8/params.json o/16/consolidated.00.pth o/16/consolidated.01.pth"
         " o/16/params.json", "o/8/consolidated.00.pth o/8/params.json"),
        ("original/consolidated.00.pth model.safetensors", "model.safetensors"),
        ("model.safetensors consolidated.safetensors model.fp16.safetensors", "model.safetensors"),
        ("adapter.safetensors onnx/config.json", "adapter.safetensors"),
        ("model.safetensors pytorch_model.bin a.gguf", "model.safetensors"),
        ("README.md a.Q4.gguf", "a.Q4.gguf"),
        ("additional_chat_templates/a.jinja chat_template.jinja b.jinja c/d.jinja a.safetensors",
         "a.safetensors additional_chat_templates/a.jinja chat_template.jinja"),
    ],
)  # fmt: skip
def test_choose_files(has: str, chosen: str) -> None:
    assert choose_files(dict.fromkeys(has.split(), 1), None, "a/b") == chosen.split()


def test_several_gguf_files() -> None:
    with pytest.raises(RuntimeError, match=r"has 2 GGUF files: a\.gguf, b\.gguf; choose one with"):
        choose_files({"a.gguf": 1, "b.gguf": 1}, None, "a/b")
