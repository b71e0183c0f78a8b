"""`llama3 serve` under clients of which a third disconnect: nothing is lost, memory stays flat.

    python -m benchmarks.server_soak
    python -m benchmarks.server_soak --requests 200 --clients 4 --varied False

Each client sends one request after another: streams and whole replies, chats and texts, some with
the same beginning. A third is left at a random moment, also before its first byte. At the end every
other request must have all its tokens, and the server no request in a slot or in its queue. Prints
the resident memory after each quarter, and one JSON line, which --out saves.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.flags import check_counts, check_file
from benchmarks.http_client import Client, Reply, generated_tokens
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.server_processes import ServerProcess, free_port, our_command
from llama import ensure_demo_model

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "quiet", "hills")
ROWS, LENGTH = 8, 512  # of the KV cache
LEAVES_WITHIN = 1.0  # seconds; uniformly distributed
IDLE_WITHIN = 20.0  # seconds that the server has to free its slots at the end


@dataclass
class Soak:
    """What the clients have seen.

    Attributes:
        rss: MiB after each quarter of the requests.
        left: requests whose client disconnected before the end.
        wrong: messages about requests that did not get all their tokens.
    """

    port: int
    model: str
    requests: int
    varied: bool
    server: ServerProcess
    done: int = 0
    left: int = 0
    tokens: int = 0
    rss: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def run(self, clients: int) -> None:
        numbers = iter(range(self.requests))
        await asyncio.gather(*(self._client(numbers) for _ in range(clients)))

    async def _client(self, numbers: Any) -> None:
        client = Client(self.port)
        for number in numbers:
            path, body, tokens = random_request(self.model, number, self.varied)
            seconds = leaves_after(number)
            if seconds is None:
                reply = await client.request("POST", path, body)
            else:
                reply = await client.request_and_leave(path, body, seconds)
            self.done += 1
            if self.done % (self.requests // 4) == 0:
                self.rss.append(self.server.resident_mib())
            if seconds is not None and not reply.whole:
                self.left += 1
            else:
                self._check(number, reply, body["stream"], tokens)
        if client.repeated:
            self.wrong.append(f"the server closed {client.repeated} connections without a reply")
        client.close()

    def _check(self, number: int, reply: Reply, stream: bool, tokens: int) -> None:
        """Note the request if it has not all its tokens."""
        try:
            found = generated_tokens(reply.events()) if stream else whole_tokens(reply)
        except ValueError as e:
            self.wrong.append(f"request {number}: {e}")
            return
        self.tokens += found
        if found != tokens:
            self.wrong.append(f"request {number}: {found} tokens instead of {tokens}")


def leaves_after(number: int) -> float | None:
    """Seconds after which the client of a request disconnects; None: it does not."""
    rng = random.Random(-number - 1)
    return rng.uniform(0, LEAVES_WITHIN) if rng.random() < 1 / 3 else None


def random_request(model: str, number: int, varied: bool) -> tuple[str, dict[str, Any], int]:
    """(path, body, tokens that it generates) of a request, which depends on its number only."""
    rng = random.Random(number)
    tokens = rng.randint(4, 32)
    text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)) if varied else WORDS)
    if varied and rng.random() < 0.3:
        text = " ".join(WORDS * 3) + " " + text
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "ignore_eos": True}
    body |= {"temperature": rng.choice([0, 1]), "stream": rng.random() < 0.7}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if rng.random() < 0.5:
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", body | {"messages": messages}, tokens
    return "/v1/completions", body | {"prompt": text}, tokens


def whole_tokens(reply: Reply) -> int:
    """The tokens that a reply's usage counts."""
    if reply.status != 200 or not reply.whole:
        raise ValueError(f"status {reply.status}: {reply.body()[:500]!r}")
    return int(json.loads(reply.body())["usage"]["completion_tokens"])


async def final_metrics(port: int) -> dict[str, float]:
    """The server's figures when no request waits or runs, or after `IDLE_WITHIN` seconds."""
    client = Client(port)
    found: dict[str, float] = {}
    for _ in range(int(IDLE_WITHIN / 0.1)):
        text = (await client.request("GET", "/metrics")).body().decode()
        found = {
            name: float(value)
            for name, value in re.findall(r"^llama3_(\w+) ([0-9.e+]+)$", text, re.MULTILINE)
        }
        if found["running"] == found["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    client.close()
    return found


def main(
    requests: int = 2000,
    clients: int = 16,
    varied: bool = True,
    ckpt_dir: str | None = None,
    out: str | None = None,
) -> None:
    """Run, check and print. The exit code is 1 if anything was lost.

    Args:
        varied: prompts of many lengths. In bf16 on a CPU, oneDNN compiles and keeps kernels for
            each new number of rows; with one prompt for all, memory shows the server alone.
        ckpt_dir: of an instruct model; default: the demo model.
        requests: how many, of all clients together; at least 4.
        clients: how many at a time.
        out: a JSON file to write.
    """
    check_counts(requests=requests, clients=clients)
    if requests < 4:
        raise ValueError(f"--requests must be 4 or more, not {requests}")
    check_file("out", out, ".json")
    port = free_port()
    command = our_command(ckpt_dir or str(ensure_demo_model()), ROWS, LENGTH, port)
    with (
        TemporaryDirectory(prefix="benchmark-") as folder,
        ServerProcess("llama3 serve", command, port, Path(folder) / "log") as server,
    ):
        metrics, soak = asyncio.run(drive(server, requests, clients, varied))
    lost = soak.wrong + [
        f"{name}: {metrics[name]:g} at the end" for name in ("running", "waiting") if metrics[name]
    ]
    counts = {
        "requests": requests,
        "left by their client": soak.left,
        "lost or wrong": len(soak.wrong),
        "tokens received": soak.tokens,
        "in slots or waiting at the end": metrics["running"] + metrics["waiting"],
    }
    figures = [Figure(name, "value", "", [count]) for name, count in counts.items()]
    for i, mib in enumerate(soak.rss):
        row = f"resident memory after {requests * (i + 1) // 4} requests"
        figures.append(Figure(row, "value", "MiB", [round(mib, 1)], better="lower"))
    settings = {"requests": requests, "clients": clients, "varied": varied}
    settings |= {"rows": ROWS, "length": LENGTH}
    finish(make_result("server_soak", settings, figures), out)
    if lost:
        raise SystemExit("\n".join(lost[:20]))


async def drive(
    server: ServerProcess, requests: int, clients: int, varied: bool
) -> tuple[dict[str, float], Soak]:
    """Run the clients; returns the server's figures at the end, and what the clients saw."""
    client = Client(server.port)
    models = json.loads((await client.request("GET", "/v1/models")).body())
    client.close()
    soak = Soak(server.port, models["data"][0]["id"], requests, varied, server)
    await soak.run(clients)
    return await final_metrics(server.port), soak


if __name__ == "__main__":
    run_benchmark(main, "server_soak")
