"""Llama 3: a faithful, readable port of Meta's inference code. See `Llama.build`.

Each name is imported on first use, so that `llama3 --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llama.common.version import __version__ as __version__

if TYPE_CHECKING:
    from llama.checkpoints.demo_model import checkpoint_or_demo, ensure_demo_model
    from llama.commands.script import run_script
    from llama.common.errors import QueueFull, RankError
    from llama.distributed.job import is_leader
    from llama.engine.engine import Engine
    from llama.engine.metrics import EngineMetrics
    from llama.engine.request import Event, Generation, Request
    from llama.engine.sampling import Sampling
    from llama.engine.scoring import Perplexity
    from llama.explain.trace import Trace
    from llama.generation import ChatPrediction, CompletionPrediction, Llama, Piece, Stream
    from llama.model import ModelArgs, Transformer
    from llama.text.tool_parser import ToolReply, parse_tool_calls
    from llama.text.tool_prompt import ToolCall
    from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

MODULES = {
    "checkpoints.demo_model": ["checkpoint_or_demo", "ensure_demo_model"],
    "commands.script": ["run_script"],
    "common.errors": ["QueueFull", "RankError"],
    "distributed.job": ["is_leader"],
    "engine.engine": ["Engine"],
    "engine.metrics": ["EngineMetrics"],
    "engine.request": ["Event", "Generation", "Request"],
    "engine.sampling": ["Sampling"],
    "engine.scoring": ["Perplexity"],
    "explain.trace": ["Trace"],
    "generation": ["ChatPrediction", "CompletionPrediction", "Llama", "Piece", "Stream"],
    "model": ["ModelArgs", "Transformer"],
    "text.tool_parser": ["ToolReply", "parse_tool_calls"],
    "text.tool_prompt": ["ToolCall"],
    "tokenizer": ["ChatFormat", "Dialog", "Message", "Tokenizer"],
}
__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Engine",
    "EngineMetrics",
    "Event",
    "Generation",
    "Llama",
    "Message",
    "ModelArgs",
    "Perplexity",
    "Piece",
    "QueueFull",
    "RankError",
    "Request",
    "Sampling",
    "Stream",
    "Tokenizer",
    "ToolCall",
    "ToolReply",
    "Trace",
    "Transformer",
    "checkpoint_or_demo",
    "ensure_demo_model",
    "is_leader",
    "parse_tool_calls",
    "run_script",
]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"llama.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
