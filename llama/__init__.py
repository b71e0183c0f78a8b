"""Llama 3: a faithful, readable port of Meta's inference code. See `Llama.build`."""

from llama.generation import ChatPrediction, CompletionPrediction, Llama, Piece
from llama.model import ModelArgs, Transformer
from llama.text.tool_parser import ToolReply, parse_tool_calls
from llama.text.tool_prompt import ToolCall
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "Piece",
    "Tokenizer",
    "ToolCall",
    "ToolReply",
    "Transformer",
    "parse_tool_calls",
]
__version__ = "0.1.0"
