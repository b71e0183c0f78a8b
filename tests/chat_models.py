# ruff: noqa: RUF001 - published tokens with | of another width
"""Published chat templates of Llama 3 and its fine-tunes, and a small vocabulary for all of them.

`templates/` has their texts, as their authors wrote them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.hf_tokenizer_export import write_tokenizer
from llama.text.rank_file import LLAMA3_PATTERN
from llama.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "templates"
BEGIN, END, EOT, IM_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"
R1_BEGIN, R1_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (
    BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", EOT, "<|eom_id|>", "<|python_tag|>",
    "<|im_start|>", IM_END, R1_BEGIN, R1_END, "<｜User｜>", "<｜Assistant｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "[INST]", "[/INST]",
)  # fmt: skip
FIRST = 256


@dataclass(frozen=True)
class ChatModel:
    """A published model's chat settings.

    Attributes:
        file: its template, in `templates/`.
        chat_format: what it is recognised as.
        bos, eos: its tokens.
        end: the token that ends an answer.
        tool_use: its template for prompts with tools.
    """

    file: str
    chat_format: str = "template"
    bos: str = BEGIN
    eos: str = EOT
    end: str | None = EOT
    tool_use: str | None = None

    def settings(self) -> dict[str, Any]:
        """The entries of tokenizer_config.json."""
        template: Any = (FOLDER / f"{self.file}.jinja").read_text("utf-8")
        if self.tool_use:
            named = {"default": template}
            named["tool_use"] = (FOLDER / f"{self.tool_use}.jinja").read_text("utf-8")
            template = [{"name": name, "template": text} for name, text in named.items()]
        return {"chat_template": template, "bos_token": self.bos, "eos_token": self.eos}


MODELS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ChatModel("llama-3", "llama3"),
    "meta-llama/Llama-3.1-8B-Instruct": ChatModel("llama-3.1", "llama3"),
    "meta-llama/Llama-3.2-1B-Instruct": ChatModel("llama-3.2", "llama3"),
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF": ChatModel("llama-3.1", "llama3"),
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": ChatModel("nemotron-nano"),
    "allenai/Llama-3.1-Tulu-3-8B": ChatModel("tulu-3", eos=END, end=END),
    "openchat/openchat-3.6-8b-20240522": ChatModel("openchat-3.6"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ChatModel(
        "r1-distill-llama", bos=R1_BEGIN, eos=R1_END, end=R1_END
    ),
    "cognitivecomputations/dolphin-2.9-llama3-8b": ChatModel(
        "dolphin-2.9", "chatml", eos=IM_END, end=IM_END
    ),
    "teknium/Hermes-2-Pro, its default template": ChatModel(
        "hermes-2-pro", "chatml", eos=IM_END, end=IM_END
    ),
    "NousResearch/Hermes-3-Llama-3.1-8B": ChatModel(
        "hermes-2-pro", eos=IM_END, end=IM_END, tool_use="hermes-3-tools"
    ),
    "a Zephyr recipe over Llama 3": ChatModel("zephyr", eos=END, end=END),
    "Llama 2's [INST] over Llama 3": ChatModel("inst", eos=END, end=END),
}
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather, today",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "A town"}},
        "required": ["city"],
    },
}


def vocabulary() -> tuple[bytes, dict[str, Any]]:
    """(rank file, sidecar) with 256 bytes and SPECIAL."""
    tokens = (base64.b64encode(bytes([i])).decode() for i in range(FIRST))
    ranks = "".join(f"{token} {i}\n" for i, token in enumerate(tokens))
    return ranks.encode(), {
        "pat_str": LLAMA3_PATTERN,
        "special_tokens": {text: FIRST + i for i, text in enumerate(SPECIAL)},
        "bos_token": BEGIN,
        "eos_token": EOT,
        "pad_token": None,
        "stop_tokens": [END, EOT],
        "chat_format": "llama3",
        "default_system": None,
    }


def write_hf_tokenizer(folder: Path, model: ChatModel, **changes: Any) -> None:
    """Write tokenizer.json and its settings as `model` has them."""
    write_tokenizer(Tokenizer.from_vocabulary(*vocabulary(), "test"), folder, 8192)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | model.settings() | changes
    path.write_text(json.dumps(settings), "utf-8")
    (folder / "special_tokens_map.json").unlink()
