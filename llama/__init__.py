"""Llama 3: a faithful, readable port of Meta's inference code. See `Llama.build`."""

from llama.distributed.job import RankError, is_leader
from llama.engine.engine import Engine
from llama.engine.request import Event, Generation, Request
from llama.engine.sampling import Sampling
from llama.engine.scoring import Perplexity
from llama.generation import ChatPrediction, CompletionPrediction, Llama, Piece, Stream
from llama.model import ModelArgs, Transformer
from llama.text.tool_parser import ToolReply, parse_tool_calls
from llama.text.tool_prompt import ToolCall
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Engine",
    "Event",
    "Generation",
    "Llama",
    "Message",
    "ModelArgs",
    "Perplexity",
    "Piece",
    "RankError",
    "Request",
    "Sampling",
    "Stream",
    "Tokenizer",
    "ToolCall",
    "ToolReply",
    "Transformer",
    "is_leader",
    "parse_tool_calls",
]
__version__ = "0.2.0"
