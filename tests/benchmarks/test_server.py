"""The server's benchmark and soak run and count. How fast anything is, is not tested."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import server, server_soak
from benchmarks.http_client import Connection, Reply, generated_tokens, text_times
from benchmarks.random_checkpoint import SHAPES, RandomSource, write_rank_file
from benchmarks.server import percentile
from llama.checkpoints.formats.meta_export import write_meta
from llama.tokenizer import Tokenizer

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
TINY |= {"vocab_size": 700, "multiple_of": 32}
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: max=100\r\n\r\n"


def figures(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], list[float]]:
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {(f["row"], f["column"]): f["runs"] for f in result["figures"]}


def stream_of(*events: object) -> bytes:
    """A chunked body of server-sent events."""
    texts = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
    return b"".join(b"%x\r\n%s\r\n" % (len(text), text) for text in texts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_is_read_however_its_bytes_arrive(size: int) -> None:
    body = stream_of(
        {"choices": [{"text": "data: a"}]},
        {"choices": [{"text": ""}]},
        {"choices": [{"delta": {"content": "\r\n"}}]},
        {"choices": [], "usage": {"completion_tokens": 3}},
    )
    connection, reply = Connection(), Reply(0.0)
    connection.reply = reply
    arrivals = [HEAD] + [body[i : i + size] for i in range(0, len(body), size)]
    ended = []
    connection._end = lambda whole: ended.append(whole)  # type: ignore[method-assign]
    for arrival in arrivals:
        assert not ended
        connection.data_received(arrival)
    assert ended == [True]
    reply.whole = True
    events = reply.events()
    assert len(events) == 4 and generated_tokens(events) == 3
    assert len(text_times(events)) == 2
    with pytest.raises(ValueError, match="without usage"):
        generated_tokens(events[:2])


def test_a_cut_stream_is_an_error() -> None:
    reply = Reply(0.0, [(1.0, HEAD + stream_of({"choices": []})[:20])])
    with pytest.raises(ValueError, match="no whole stream, status 200"):
        reply.events()


def test_percentile() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, p) for p in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0


def test_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(server, "LONG", 40)
    monkeypatch.setattr(server, "TURNS", 1)
    server.main("tiny", rounds=2, streams="3", prompt=5, new=60)
    found = figures(capsys)
    for row in ("3 streams: llama3 serve", "3 streams: engine alone"):
        assert len(found[row, "tokens"]) == 2 and min(found[row, "tokens"]) > 0
        assert len(found[row, "first token"]) == 2
    assert found["3 streams: engine alone", "of the engine's"] == [1.0]
    assert found["llama3 serve", "asked"][0] > 0
    assert found["llama3 serve", "longest"] >= found["llama3 serve", "p99"]


def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_meta(RandomSource(TINY), None, tmp_path, torch.bfloat16)
    letters = string.ascii_lowercase.encode()
    write_rank_file(tmp_path / "tokenizer.model", TINY["vocab_size"], letters)
    assert Tokenizer(str(tmp_path / "tokenizer.model")).n_words == TINY["vocab_size"]
    server_soak.main(requests=24, clients=4, ckpt_dir=str(tmp_path))
    found = {row: runs for (row, _), runs in figures(capsys).items()}
    assert found["lost or wrong"] == [0] and found["in slots or waiting at the end"] == [0]
    assert found["tokens received"][0] > 0 and found["resident memory after 24 requests"][0] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shape": "2b"}, "unknown shape '2b'; use demo or one of 1b,"),
        ({"parts": "throughput,speed"}, "unknown part 'speed'; the parts are throughput, first"),
        ({"streams": "a"}, "--streams must be counts such as 1,8,16, not 'a'"),
        ({"rounds": 0}, "--rounds must be 1 or more"),
    ],
)
def test_bad_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server.main(**flags)
    with pytest.raises(ValueError, match="--requests must be 4 or more"):
        server_soak.main(requests=3)
    with pytest.raises(FileNotFoundError, match="no llama-server at /nosuch/binary"):
        server.main(llama_server="/nosuch/binary")
