"""Cases that the tests run under torchrun on several ranks, and call directly on one rank.

    torchrun --nproc_per_node 2 tests/distributed/rank_cases.py cases DIR DIR ...

Every rank prints one line of JSON: the result of the function that the first argument names.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama import Llama
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from llama.distributed import job, tensor_parallel
from llama.distributed.shared_memory import SharedMemory
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.layers.adapter_rows import add_adapters
from llama.layers.blocks import dequantize_blocks
from llama.layers.optimize import optimize
from llama.layers.quantized_linear import quantized
from llama.layers.replace import replace_modules
from llama.layers.schemes import SCHEMES, Scheme, old_int4
from llama.model import ModelArgs, Transformer
from tests.adapters import Adapter, random_adapter
from tests.exact_products import exact_products

CPU = torch.device("cpu")
SHARED = [0, 3, 2, 1, 4, 2, 3, 1, 0, 4, 1, 1, 2, 3, 4, 0, 2, 2, 3, 1]
PROMPTS = [[1, 2, 3], SHARED, [4], [*SHARED, 2, 1]]


def open_model(folder: str | Path, scheme: str | None = None, group: int = 32) -> Transformer:
    source = open_checkpoint(folder)
    args = source.args(max_seq_len=48, max_batch_size=3)
    model = load_model(source, args, CPU, torch.float32)
    if scheme is not None:
        replace_modules(model, {nn.Linear: quantized(scheme_of(scheme, group), sharded=True)})
    optimize(model)
    return model


@exact_products()
def generate(folder: str | Path) -> dict[str, Any]:
    return generate_with(open_model(folder))


@exact_products()
def generate_with(model: Transformer) -> dict[str, Any]:
    """Greedy, seeded and unseeded batches; a late and a cancelled request; a reused prefix."""
    engine = Engine(model, prefill_chunk=7)
    torch.manual_seed(5 + tensor_parallel.rank())  # rank 0 samples for all ranks
    found: dict[str, Any] = {}
    for name, how, seed in (
        ("greedy", Sampling(0.0), None),
        ("seeded", Sampling(0.9, 0.95), 3),
        ("unseeded", Sampling(1.0), None),
    ):
        requests = [
            Request(p, 9, how, seed, logprobs=True, score_from=0, reuse=False) for p in PROMPTS
        ]
        generations = engine.run(requests)
        found[name] = [g.tokens for g in generations]
        found[f"{name} scores"] = [
            [*g.prompt_logprobs[1:], *g.generated_logprobs] for g in generations
        ]
    # All events; the second request joins late, the first is cancelled, the third reuses a prefix.
    events: list[list[int | None]] = []
    requests = [Request(p, 12, Sampling(0.0)) for p in PROMPTS[:2]]
    first = second = engine.add(requests[0])
    for step in range(20):
        if step == 3:
            second = engine.add(requests[1])
        if step == 6:
            engine.cancel(first.id)
        events += [[event.id, event.token] for event in engine.step()]
    [again] = engine.run([Request([*second.tokens, 1], 5, Sampling(0.0))])
    found |= {"events": events, "reused": again.reused, "again": again.tokens}
    return found | generate_steered(engine)


class Turns:
    """A grammar: the ids 1, 2, 1, ...; fails after `most`."""

    def __init__(self, most: int):
        self.most = most

    def start(self) -> TurnsState:
        return TurnsState(self.most)


class TurnsState:
    def __init__(self, most: int):
        self.accepted, self.most = 0, most

    def allowed(self) -> Tensor:
        if self.accepted == self.most:
            raise OSError("the grammar is at its end")
        return torch.arange(3) == 1 + self.accepted % 2

    def accept(self, token: int) -> None:
        self.accepted += 1


def generate_steered(engine: Engine) -> dict[str, Any]:
    """Siblings, bias, penalties, grammars, of which one fails. Only rank 0 has them."""
    asked: list[dict[str, Any]] = [
        {"sampling": Sampling(0.0, presence_penalty=1.0, frequency_penalty=0.5)},
        {"sampling": Sampling(0.0), "logit_bias": {3: 100.0}},
        {"sampling": Sampling(0.9), "grammar": Turns(9)},
        {"sampling": Sampling(0.0), "grammar": Turns(2)},
    ]
    if tensor_parallel.rank() > 0:
        asked = [{"sampling": Sampling(0.0)} for _ in asked]
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "score_from": 1, "reuse": False}
    group = [Generation(Request(SHARED, 6, seed=1, **fields, **options)) for options in asked]
    engine.queue_siblings(group)
    engine.wait(lambda: not engine.busy)
    if tensor_parallel.size() > 1:
        refused = error_of(lambda: engine.check(Request(SHARED, time_limit=9.0)))
        assert "time_limit is for one rank" in refused
    tops = [top for g in group for top in [*g.top_logprobs, *g.prompt_top_logprobs]]
    scores = [x for top in tops for x in top or []]
    return {
        "steered": [[g.tokens, g.finish_reason, g.reused] for g in group],
        "finished": engine.metrics().finished,
        "steered scores": [[score for _, score in scores]],
    }


def gradient(folder: str | Path) -> list[float]:
    """The gradient of the first norm, a replicated weight."""
    source = open_checkpoint(folder)
    model = load_model(source, source.args(), CPU, torch.float32)
    weight = next(w for name, w in model.named_parameters() if "attention_norm" in name)
    weight.requires_grad_()
    model(torch.tensor([SHARED])).logsumexp(-1).sum().backward()
    assert weight.grad is not None
    found: list[float] = weight.grad.tolist()
    return found


def count_collectives(model: Transformer) -> dict[str, int]:
    """{collective: calls} of one decode step."""
    engine, count = Engine(model), Counter[str]()
    engine.add(Request([1, 2, 3], 9, Sampling(0.0)))
    engine.step()
    for name in ("all_reduce", "all_gather", "broadcast", "reduce", "gather", "barrier"):
        setattr(dist, name, counted(getattr(dist, name), count))
    for name in ("sum", "stack"):  # through memory that the ranks share
        setattr(SharedMemory, name, counted(getattr(SharedMemory, name), count))
    engine.step()
    return dict(count)


def counted(function: Callable[..., Any], count: Counter[str]) -> Callable[..., Any]:
    """`function`, counting its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        count[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def error_of(call: Callable[[], Any]) -> str:
    """The class and message of the error that `call` raises."""
    try:
        call()
    except (ValueError, OSError, job.RankError) as e:
        return f"{type(e).__name__}: {e}"
    raise AssertionError("this should have failed")


def errors_of_wrong_calls(folders: list[str]) -> list[str]:
    """The error of each wrong call; the last but one ends the job."""
    second = tensor_parallel.rank() == 1

    def build(ckpt_dir: str, max_seq_len: int = 16) -> Llama:
        return Llama.build(ckpt_dir, None, max_seq_len, 1, device="cpu", dtype=torch.float32)

    other = str(Path(folders[0]).with_name("other"))  # other weights of the same shapes
    errors = [
        error_of(lambda: build("/nowhere")),
        error_of(lambda: build("/nowhere" if second else folders[0])),
        error_of(lambda: build(folders[0], 17 if second else 16)),
        error_of(lambda: build(other if second else folders[0])),
        error_of(lambda: build(str(Path(folders[0]).with_name("three")))),
    ]
    engine = Engine(open_model(folders[0]))
    longer = [3] if second else [3, 4]
    errors.append(error_of(lambda: engine.add(Request([1, *longer], 9, Sampling(0.0)))))
    added = [engine.add(Request([i, 3], 9, Sampling(0.0))) for i in (1, 2)]
    engine.cancel(added[second].id)
    errors.append(
        error_of(lambda: [engine.step() for _ in range(2)])
    )  # rank 0 notices it a step later
    return [*errors, error_of(tensor_parallel.size)]


def replicas(folder: str) -> dict[str, Any]:
    """Two replicas on two ranks each, which make different numbers of calls."""
    llama = Llama.build(
        folder, None, 48, 2, model_parallel_size=2, device="cpu", dtype=torch.float32
    )
    number = dist.get_rank() // 2
    calls = [llama.generate([[1, 2, number + i]], 6, 0.0)[0] for i in range(1 + 2 * number)]
    return {"replica": number, "calls": calls}


def demo(folder: str) -> dict[str, Any]:
    llama = Llama.build(folder, None, 256, 8, device="cpu", dtype=torch.float32)
    return generate_demo(llama)


def generate_demo(llama: Llama) -> dict[str, Any]:
    """A greedy and a seeded batch, and two turns of a chat."""
    prompts = ["The capital of France is", "Once upon a time", "2, 4, 6,"]
    dialog: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    greedy = llama.text_completion(prompts, 0.0, max_gen_len=16)
    seeded = llama.text_completion(prompts, 0.8, max_gen_len=16, seed=4)
    turns: list[Any] = []
    for _ in range(2):
        stream = llama.chat_stream(dialog, temperature=0.0, max_gen_len=16)
        pieces = [piece.text for piece in stream]
        turns.append([pieces, stream.generation.reused])
        dialog += [{"role": "assistant", "content": "".join(pieces)}]
        dialog += [{"role": "user", "content": "And of Italy?"}]
    return {"greedy": greedy, "seeded": seeded, "turns": turns}


def cases(*folders: str) -> dict[str, Any]:
    tensor_parallel.initialize(None, CPU)
    return {
        "generated": [generate(folder) for folder in folders],
        "gradient": gradient(folders[0]),
        "collectives": count_collectives(open_model(folders[0])),
        "errors": errors_of_wrong_calls(list(folders)),
    }


def quantized_models(arguments: str, folder: str) -> dict[str, Any]:
    """Compare models quantized at load with stored ones; write the result to FOLDER/RANK.json.

    Args:
        arguments: JSON of {"models": [[plain folder, quantized folder, scheme, group], ...],
            "wrong_builds": [arguments with which `Llama.build` fails, ...]}.
    """
    tensor_parallel.initialize(None, CPU)
    cases = json.loads(arguments)
    generated = []
    for plain, stored, scheme, group in cases["models"]:
        model, stored_model = open_model(plain, scheme, group), open_model(stored)
        stored_weights = stored_model.state_dict()
        different = [
            name
            for name, w in model.state_dict().items()
            if not same_weight(stored_weights[name], w, name, model)
        ]
        generated.append([generate_with(model), greedy(stored_model), different])
    nan_on_rank_1 = torch.nan if tensor_parallel.rank() == 1 else 0.0
    result = {
        "generated": generated,
        "maximum": tensor_parallel.max_over_ranks(
            torch.tensor([tensor_parallel.rank(), nan_on_rank_1])
        ).tolist(),
        "errors": [error_of(partial(build, **options)) for options in cases["wrong_builds"]],
        "collectives": count_collectives(model),
    }
    Path(folder, f"{tensor_parallel.rank()}.json").write_text(json.dumps(result))
    return {}


@exact_products()
def greedy(model: Transformer) -> list[int]:
    [generation] = Engine(model).run([Request(SHARED, 9, Sampling(0.0))])
    return generation.tokens


def scheme_of(scheme: str, group: int) -> Scheme:
    """A present scheme, or the first form of int4 if `group` is not 0."""
    return old_int4(group) if group else SCHEMES[scheme]


def same_weight(a: Tensor, b: Tensor, name: str, model: Transformer) -> bool:
    """Whether two stored tensors are equal, but for the rows that fill up the last tile."""
    if name.endswith("scale"):
        return torch.allclose(a, b, rtol=0, atol=1e-37)
    if name.endswith("blocks"):
        n: int = model.get_submodule(name.removesuffix(".blocks")).n  # type: ignore[assignment]
        return torch.equal(dequantize_blocks(a, n), dequantize_blocks(b, n))
    return torch.equal(a, b)


def build(**options: Any) -> Llama:
    fixed: dict[str, Any] = {
        "tokenizer_path": None,
        "max_seq_len": 16,
        "max_batch_size": 1,
        "device": "cpu",
    }
    return Llama.build(**fixed, **options)


def one(folder: str) -> dict[str, Any]:
    tensor_parallel.initialize(None, CPU)
    return generate(folder)


def stored(folder: str) -> dict[str, Any]:
    """Generate with the model of a folder, and with its vocabulary."""
    llama = Llama.build(folder, None, 48, 3, device="cpu", dtype=torch.float32)
    drawn = llama.generate([[1, 2, 3]] * 2, 40, temperature=9.0, top_p=1.0, seed=3)[0]
    return generate(folder) | {"drawn": drawn}


def adapted(*folders: str) -> dict[str, Any]:
    """Adapters per request, of plain and of quantized models."""
    tensor_parallel.initialize(None, CPU)
    return {"generated": [generate_adapted(f, s) for f in folders for s in (None, "int8")]}


@exact_products()
def generate_adapted(folder: str, scheme: str | None = None) -> dict[str, Any]:
    """Greedy answers of the base and of two adapters, in one batch; scores of the prompts."""
    source = open_checkpoint(folder)
    args = source.args(max_seq_len=48, max_batch_size=3)
    model = load_model(source, args, CPU, torch.float32)
    if scheme is not None:
        replace_modules(model, {nn.Linear: quantized(scheme, sharded=tensor_parallel.size() > 1)})
    add_adapters(model, adapters_for(args))
    optimize(model)
    names = [None, "plain", "dora"] * 2
    requests = [
        Request(p, 9, Sampling(0.0), logprobs=True, score_from=0, adapter=name)
        for p, name in zip([*PROMPTS, *PROMPTS], names, strict=False)
    ]
    generations = Engine(model, prefill_chunk=7).run(requests)
    scores = [[*g.prompt_logprobs[1:], *g.generated_logprobs] for g in generations]
    return {"adapted": [g.tokens for g in generations], "adapted scores": scores}


def adapters_for(args: ModelArgs) -> dict[str, Adapter]:
    return {
        "plain": random_adapter(1, args, rank=2, alpha=4.0),
        "dora": random_adapter(2, args, rank=3, alpha=3.0, dora=True),
    }


if __name__ == "__main__":
    modes: dict[str, Callable[..., dict[str, Any]]] = {
        "cases": cases, "demo": demo, "one": one, "replicas": replicas,
        "quantized": quantized_models, "stored": stored, "adapted": adapted,
    }  # fmt: skip
    mode = modes[sys.argv[1]]
    result = {"rank": int(os.environ["RANK"])} | mode(*sys.argv[2:])
    sys.stdout.write(json.dumps(result) + "\n")
