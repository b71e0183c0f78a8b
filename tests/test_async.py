"""Streams for asyncio: shared steps, cancelled tasks, a loop that is never blocked, memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Piece
from llama.common.async_reader import read_in_thread

TEXTS = ["Hello", "A longer text", "x"]


@pytest.fixture
def build(folder: Path, byte_tokenizer_path: Path) -> Callable[[], Llama]:
    return lambda: Llama.build(folder, byte_tokenizer_path, 200, 3, device="cpu", dtype="fp32")


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def read(llama: Llama, text: str, **options: Any) -> list[Piece]:
    return [piece async for piece in llama.text_stream_async(text, temperature=0, **options)]


def test_pieces_are_those_of_the_stream(build: Callable[[], Llama]) -> None:
    llama = build()
    options: dict[str, Any] = {"max_gen_len": 9, "logprobs": True, "reuse_prefix": False}
    assert run(read(llama, "Hello", **options)) == list(
        llama.text_stream("Hello", temperature=0, **options)
    )
    options["temperature"] = 0
    dialog: Any = [{"role": "user", "content": "Hi"}]

    async def chat() -> list[Piece]:
        return [piece async for piece in llama.chat_stream_async(dialog, **options)]

    assert run(chat()) == list(llama.chat_stream(dialog, **options))


def test_tasks_share_steps(build: Callable[[], Llama]) -> None:
    llama, alone = build(), build()
    want = [[p.tokens for p in alone.text_stream(t, temperature=0, max_gen_len=40)] for t in TEXTS]

    async def all_at_once() -> Any:
        return await asyncio.gather(*(read(llama, text, max_gen_len=40) for text in TEXTS))

    found = run(all_at_once())
    ids = [[i for p in pieces for i in p.tokens] for pieces in found]
    assert ids == [[i for tokens in row for i in tokens] for row in want]
    assert llama.engine.steps < 80  # one after the other they are 120


def test_a_cancelled_task_frees_its_slot_and_others_go_on(build: Callable[[], Llama]) -> None:
    llama = build()

    async def main() -> None:
        started = asyncio.Event()

        async def endless() -> None:
            async for _ in llama.text_stream_async("Hello", temperature=0):
                started.set()

        tasks = [asyncio.create_task(endless()) for _ in range(3)]
        await started.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        assert not llama.engine.busy
        assert (await read(llama, "A text", max_gen_len=4))[-1].finish_reason

    run(main())


def test_leaving_the_loop_or_closing_ends_the_generation(build: Callable[[], Llama]) -> None:
    llama = build()

    async def main() -> None:
        stream = llama.text_stream_async("Hello", temperature=0)
        async for _ in stream:
            break
        assert llama.engine.busy
        await stream.aclose()
        assert not llama.engine.busy

    run(main())


def test_the_loop_goes_on_during_a_step(build: Callable[[], Llama]) -> None:
    """The first step waits for something that only the event loop does."""
    llama, released = build(), threading.Event()
    hidden = llama.model.hidden

    def waiting(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert released.wait(30)
        return hidden(*args, **kwargs)

    llama.model.hidden = waiting  # type: ignore[method-assign]

    async def main() -> None:
        task = asyncio.create_task(read(llama, "Hello", max_gen_len=2))
        while not llama.engine.busy:
            await asyncio.sleep(0.001)
        released.set()
        assert (await task)[-1].finish_reason

    run(main())


def test_many_streams_do_not_need_asyncios_threads(build: Callable[[], Llama]) -> None:
    llama = build()

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        released = threading.Event()
        busy = asyncio.get_running_loop().run_in_executor(None, released.wait, 30)
        rows = await asyncio.gather(*(read(llama, "x", max_gen_len=3) for _ in range(20)))
        assert all(row[-1].finish_reason for row in rows)
        released.set()
        await busy

    run(main())


async def fails(llama: Llama, message: str, text: str, **options: Any) -> None:
    """Within the task: asyncio itself keeps the error of a task, and its frames."""
    with pytest.raises((ValueError, TypeError), match=message):
        await read(llama, text, **options)


def test_errors_arrive_and_keep_no_memory(build: Callable[[], Llama]) -> None:
    llama = build()
    reference = weakref.ref(llama.model)
    gc.collect()
    gc.disable()
    try:
        run(fails(llama, "more than max_seq_len", "a" * 900))
        run(fails(llama, "'temprature'", "a", temprature=1))
        with torch.no_grad():
            llama.model.norm.weight[:] = float("nan")
        run(fails(llama, "not a number", "Hello"))
        for thread in threading.enumerate():  # which end on their own
            if thread.name.startswith("llama-stream"):
                thread.join(30)
        del llama
        assert reference() is None
    finally:
        gc.enable()


def test_a_reader_closes_what_it_opened() -> None:
    class Endless:
        closed = 0

        def __next__(self) -> int:
            return 1

        def close(self) -> None:
            self.closed += 1

    opened = Endless()

    async def main() -> None:
        reader = read_in_thread(lambda: opened)
        assert [await anext(reader), await anext(reader)] == [1, 1]
        await reader.aclose()

    run(main())
    assert opened.closed == 1
