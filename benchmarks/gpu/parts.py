"""The parts of `benchmarks.gpu` in order of worth. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Something to measure, in a process of its own.

    Attributes:
        function: "module:function"; it takes a `Run` and the arguments. Imported in the process.
        limit: most seconds that it may take.
        arguments: of the function, after the `Run`.
    """

    name: str
    function: str
    limit: float
    arguments: tuple[str, ...] = ()


PARTS = (
    Part("tests", "benchmarks.gpu.tests:run", 150),
    Part("ceilings", "benchmarks.gpu.ceilings:run", 30),
    Part("decode-bf16", "benchmarks.gpu.decode:run", 120, ("bf16",)),
    Part("decode-int4", "benchmarks.gpu.decode:run", 100, ("int4",)),
    Part("decode-int8", "benchmarks.gpu.decode:run", 100, ("int8",)),
    Part("prefill-bf16", "benchmarks.gpu.prefill:run", 45, ("bf16",)),
    Part("transformers", "benchmarks.gpu.peers:run", 100),
    Part("engine", "benchmarks.gpu.serving:run", 100),
    Part("speculation", "benchmarks.gpu.speculation:run", 90),
    Part("train", "benchmarks.gpu.training:run", 60),
    Part("finetune-packed", "benchmarks.gpu.finetuning:packed", 90),
    Part("finetune-int4", "benchmarks.gpu.finetuning:quantized", 90),
    Part("nccl", "benchmarks.gpu.collectives:run", 60),
    Part("kernels", "benchmarks.gpu.kernels:run", 90),
    Part("prefill-int4", "benchmarks.gpu.prefill:run", 45, ("int4",)),
    Part("prefill-int8", "benchmarks.gpu.prefill:run", 45, ("int8",)),
)


def chosen(names: str) -> list[Part]:
    """The parts that a list such as "tests,decode" names, in the order of `PARTS`; "" names all.

    Raises:
        ValueError: a name fits no part.
    """
    if not names:
        return list(PARTS)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if not any(fits(name, part) for part in PARTS):
            known = ", ".join(part.name for part in PARTS)
            raise ValueError(f"--parts: there is no part {name!r}; use some of {known}")
    return [part for part in PARTS if any(fits(name, part) for name in wanted)]


def fits(name: str, part: Part) -> bool:
    return part.name == name or part.name.startswith(f"{name}-")
