"""A base and two adapters behind one server, by the official client; the flags of `llama3 serve`.

Oracle: models with the adapter merged in plain arithmetic, without the engine's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from llama import Llama
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.open import open_checkpoint
from llama.commands.model import CheckpointFlags
from llama.commands.serve import named_adapters, serve, whole_adapter
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.generation import BuildOptions
from llama.model import ModelArgs
from llama.server.ranks import shared_fields
from llama.server.settings import ServerSettings
from llama.tokenizer import Tokenizer
from tests.adapters import Adapter, merged_model, random_adapter
from tests.models import TINY, random_weights
from tests.server.running import NAME, RunningServer

PARAMS: dict[str, Any] = TINY
ARGS = ModelArgs(**PARAMS, max_seq_len=256, max_batch_size=3)
ADAPTERS: dict[str, Adapter] = {
    "poet": random_adapter(1, ARGS, rank=2, alpha=4.0),
    "law/v1.0": random_adapter(2, ARGS, rank=3, alpha=3.0, dora=True, targets=("wq", "w2")),
}
MODELS = [NAME, *ADAPTERS]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> dict[str, Path]:
    """The base under NAME, and the adapters."""
    found = {NAME: tiny_checkpoint()}
    for name, (config, weights) in ADAPTERS.items():
        found[name] = tmp_path_factory.mktemp("adapter") / "folder"
        found[name].mkdir()
        write_adapter(found[name], open_checkpoint(found[NAME]), config, weights)
    return found


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], llama3_tokenizer_path: Path) -> Iterator[RunningServer]:
    adapters = {name: folders[name] for name in ADAPTERS}
    options: Any = {"device": "cpu", "dtype": torch.float32, "adapters": adapters}
    llama = Llama.build(folders[NAME], llama3_tokenizer_path, 256, 3, **options)
    running = RunningServer(lambda: llama).wait_until_ready()
    yield running
    running.close()


@pytest.fixture(scope="module")
def oracles(llama3_tokenizer_path: Path) -> dict[str, Llama]:
    weights = random_weights(**PARAMS)
    named = {NAME: None, **ADAPTERS}
    tokenizer = Tokenizer(str(llama3_tokenizer_path))
    return {name: Llama(merged_model(ARGS, weights, named[name]), tokenizer) for name in MODELS}


def test_adapters_answer_at_the_same_time(server: RunningServer, oracles: dict[str, Llama]) -> None:
    """Chats, streams and completions of three models at once, each as its merged model's."""
    client = server.openai()

    def chat(model: str) -> tuple[str, str | None]:
        reply = client.chat.completions.create(
            model=model, messages=HELLO, max_completion_tokens=24, temperature=0
        )
        return reply.model, reply.choices[0].message.content

    def stream(model: str) -> tuple[str, str | None]:
        chunks = list(
            client.chat.completions.create(
                model=model, messages=HELLO, max_completion_tokens=24, temperature=0, stream=True
            )
        )
        [name] = {chunk.model for chunk in chunks}
        return name, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def complete(model: str) -> tuple[str, str | None]:
        reply = client.completions.create(
            model=model, prompt="Once upon", max_tokens=24, temperature=0
        )
        return reply.model, reply.choices[0].text

    kinds = [chat, stream, complete]
    with ThreadPoolExecutor(9) as pool:
        asked = [(model, kind, pool.submit(kind, model)) for model in MODELS for kind in kinds]
        found = [(model, kind, future.result()) for model, kind, future in asked]
    for model, kind, (name, text) in found:
        llama = oracles[model]
        if kind is complete:
            [want] = llama.text_completion(["Once upon"], 0.0, max_gen_len=24)
            expected = want["generation"]
        else:
            expected = llama.chat_completion([HELLO], 0.0, max_gen_len=24)[0]["generation"][
                "content"
            ]
        assert (name, text) == (model, expected), kind
    assert len({text for _, kind, (_, text) in found if kind is chat}) == 3


def test_models_are_listed_with_their_base(server: RunningServer) -> None:
    client = server.openai()
    models = list(client.models.list())
    assert [model.id for model in models] == MODELS
    parents = [(model.model_extra or {})["parent"] for model in models]
    assert parents == [None, NAME, NAME]
    assert {(model.model_extra or {})["root"] for model in models} == {NAME}
    assert client.models.retrieve("law/v1.0") == models[2]
    with server.http() as http:
        assert http.get("/v1/models/law/v1.0").json()["id"] == "law/v1.0"


def test_another_name_is_a_404_that_lists_the_models(server: RunningServer) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert "use one of 'tiny', 'poet', 'law/v1.0'" in error.value.message.replace('"', "'")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with server.http() as http:
        unknown = http.post("/tokenize", json={"prompt": "a", "model": "x"})
        known = http.post("/tokenize", json={"prompt": "a", "model": "poet"})
    assert (unknown.status_code, known.json()["count"]) == (404, 2)


def test_other_ranks_get_the_adapter() -> None:
    assert Request(**shared_fields(Request([1], adapter="poet"))).adapter == "poet"


def test_flags(folders: dict[str, Path], tmp_path: Path) -> None:
    poet = str(folders["poet"])
    assert named_adapters([f"a={poet}", poet]) == {"a": Path(poet), "folder": Path(poet)}
    for flags, message in (
        ([f"={poet}"], "NAME=DIR, or the folder DIR"),
        (["a="], "NAME=DIR, or the folder DIR"),
        ([f"a\n={poet}"], "NAME=DIR, or the folder DIR"),
        ([f"a={poet}", f"a={poet}"], "--adapter a: two have this name"),
    ):
        with pytest.raises(ValueError, match=message):
            named_adapters(flags)
    parts: Any = {"sampling": Sampling(), "checkpoint": CheckpointFlags(), "build": BuildOptions()}
    with pytest.raises(ValueError, match="--adapter a: the base has this name"):
        serve(adapter=[f"a={poet}"], settings=ServerSettings(model_name="a"), **parts)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        named_adapters([f"a={tmp_path / 'none'}"])


def test_an_adapter_with_its_own_embedding_is_served_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config, weights = ADAPTERS["poet"]
    source = open_checkpoint(folders[NAME])
    whole = {"tok_embeddings.weight": random_weights(5, **PARAMS)["tok_embeddings.weight"]}
    write_adapter(tmp_path, source, config, weights, whole=whole)
    assert whole_adapter({"new": tmp_path}) == "new"
    assert whole_adapter({"poet": folders["poet"]}) is None
    with pytest.raises(ValueError, match=r"--adapter new: .* llama3 merge"):
        whole_adapter({"poet": folders["poet"], "new": tmp_path})
