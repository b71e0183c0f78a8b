"""With speculation the replies are those without: streams, tools, grammars, stop strings."""

from __future__ import annotations

from llama import Llama
from tests.engine.guessing import FREE
from tests.server.folding import ask
from tests.server.running import RunningServer
from tests.server.test_stream_equals_completion import check_same, requests
from tests.server.test_worker import figures


def test_replies_are_those_without(tiny_llama: Llama, server: RunningServer) -> None:
    model, tokenizer = tiny_llama.model, tiny_llama.tokenizer
    running = RunningServer(lambda: Llama(model, tokenizer, speculation=FREE)).wait_until_ready()
    try:
        fast, plain = running.openai(), server.openai()
        for case in requests(tiny_llama):
            expected = ask(plain, case, stream=False)
            check_same(ask(fast, case, stream=True), expected)
            check_same(ask(fast, case, stream=False), expected)
        with running.http() as http:
            found = figures(http)
        assert 0 < found["llama3_accepted_tokens_total"] < found["llama3_proposed_tokens_total"]
    finally:
        running.close()
