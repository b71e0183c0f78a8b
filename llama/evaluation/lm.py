"""`LlamaLM`: a `Llama` as a model of lm-eval, with the scores of its Hugging Face model.

Importing this module registers it as "llama3". Needs the package lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from llama.checkpoints.formats.hf_chat_template import chat_template as jinja_of
from llama.common.progress import progress
from llama.distributed import job
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.evaluation.answers import interleaved, run, text_of
from llama.generation import Answer, Llama, fingerprint
from llama.text.text_tokens import TextTokens
from llama.tokenizer import ChatFormat

log = logging.getLogger("llama")
MAX_GEN_TOKS = 256  # lm-eval's default
BATCH_SIZE = 8
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
Row = tuple[Any, list[int], list[int]]  # (context, continuation), and the ids of both


@register_model("llama3")
class LlamaLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-eval: `simple_evaluate(model=LlamaLM(llama), tasks=[...])`.

    By name: `simple_evaluate(model="llama3", model_args="ckpt_dir=...")`, where model_args are
    those of `Llama.build`, and `max_length`.

    Args:
        llama: an open model. Its max_batch_size is how many requests run at once.
        max_length: most tokens that predict another. By default one less than max_seq_len: the
            last token of a text is computed too.

    Raises:
        ValueError: max_length does not fit, or the vocabulary has neither a begin nor an end.
    """

    def __init__(self, llama: Llama, max_length: int | None = None):
        super().__init__()
        room = llama.engine.room
        if max_length is None:
            max_length = room - 1
        if type(max_length) is not int or not 1 <= max_length < room:
            raise ValueError(
                f"max_length must be 1 to {room - 1}, not {max_length!r}; a larger one needs a "
                "Llama with max_seq_len max_length + 1"
            )
        self.llama, self.max_length, self.max_gen_toks = llama, max_length, MAX_GEN_TOKS
        self._device = llama.model.norm.weight.device
        tokenizer = llama.tokenizer
        flags = dict.fromkeys(tokenizer.special_tokens, ()) | tokenizer.token_flags
        self._special = TextTokens(flags | tokenizer.text_tokens.flags)
        if self.prefix_token_id < 0:
            raise ValueError(
                "this vocabulary has neither a begin nor an end token, which an empty context "
                "needs; name one in the sidecar (tokenizer.model.json)"
            )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> LlamaLM:
        """From "ckpt_dir=...,dtype=fp32"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> LlamaLM:
        """From arguments of `Llama.build` and `max_length`; lm-eval adds batch_size and device.

        Raises:
            ValueError, TypeError: as `Llama.build`; or there is no ckpt_dir.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        given |= arg_dict
        batch_size = given.pop("batch_size", None)
        given.pop("max_batch_size" if type(batch_size) is int else "", None)
        if type(batch_size) is not int:  # None or "auto"
            batch_size = given.pop("max_batch_size", BATCH_SIZE)
        if "ckpt_dir" not in given:
            raise ValueError('model_args needs the checkpoint: model_args="ckpt_dir=PATH"')
        max_length = given.pop("max_length", None)
        if max_length is not None:
            given["max_seq_len"] = max_length + 1
        return cls(Llama.build(**given, max_batch_size=batch_size), max_length)

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        tokenizer = self.llama.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"llama3-{fingerprint(self.llama.tokenizer)}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, in which the text of a special token is that token.

        It begins with the begin token, if the vocabulary has one, once.
        """
        tokenizer = self.llama.tokenizer
        ids: list[int] = []
        for part, is_token in self._special.split(string):
            encode, special = tokenizer.encode, tokenizer.special_tokens
            ids += [special[part]] if is_token else encode(part, bos=False, eos=False)
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        return [tokenizer.bos_id, *ids] if add_special_tokens and tokenizer.bos_id >= 0 else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat format as a Jinja template, which lm-eval keeps with the results."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(
                f"chat template {chat_template!r}: llama3 has the checkpoint's chat format only; "
                "give --apply_chat_template without a name"
            )
        return jinja_of(self._formatter.tokenizer)

    @property
    def _formatter(self) -> ChatFormat:
        return self.llama.formatter or ChatFormat(self.llama.tokenizer)  # raises, saying why

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A dialog as text.

        Args:
            add_generation_prompt: False if the last message is the beginning of the answer.
        """
        formatter, dialog, begun = self._formatter, list(chat_history), ""
        if "system" not in formatter.roles and any(m["role"] == "system" for m in dialog):
            log.warning("the chat format has no system message; it is left out")
            dialog = [message for message in dialog if message["role"] != "system"]
        if not add_generation_prompt:
            begun = dialog.pop()["content"]
            begun = begun.strip() if type(formatter) is ChatFormat else begun
        prompt = formatter.encode_dialog_prompt(dialog)  # type: ignore[arg-type]
        return self.llama.tokenizer.decode(prompt) + begun

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of continuations of contexts."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Row], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """`loglikelihood` of ids, one pass over each context that several continuations share."""
        windows = []  # ids, and how many of them are scored
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"{texts}: a text to score has {len(continuation)} tokens, and 1 to "
                    f"{self.max_length} (max_length) are possible; change the task, or max_length"
                )
            windows.append(([*context, *continuation][-self.max_length - 1 :], len(continuation)))
        contexts = [tuple(ids[: len(ids) - n]) for ids, n in windows]
        longest_first = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
        rows = len(self.llama.engine.cache[0].k)
        order = [longest_first[j] for j in interleaved([contexts[i] for i in longest_first], rows)]
        asked = [
            Request(windows[i][0], 0, score_from=len(contexts[i]), top_logprobs=1) for i in order
        ]
        found: dict[int, tuple[float, bool]] = {}
        for j, answer in self._run(asked, [()] * len(asked), "scoring"):
            i, generation = order[j], answer.generation
            ids, n = windows[i]
            scores = generation.prompt_logprobs[-n:]
            best = [None if top is None else top[0][0] for top in generation.prompt_top_logprobs]
            found[i] = sum(score or 0.0 for score in scores), best[-n:] == ids[-n:]
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, every token of it once, in windows of max_length."""
        windows: list[Row] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += score
        for request, score in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a stop text, without special tokens."""
        asked, stops = [], []
        for i, (context, given) in enumerate(request.args for request in requests):
            request, stop = self._generation(context, given, seed=i)
            asked.append(request)
            stops.append(stop)
        texts: dict[int, str] = {}
        for i, answer in self._run(asked, stops, "generating"):
            texts[i] = text_of(answer, self.llama.tokenizer)
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generation(
        self, context: str, given: Mapping[str, Any], seed: int
    ) -> tuple[Request, list[str]]:
        """What the engine runs, and the stop strings.

        Raises:
            ValueError: an unknown setting, or no room for the context.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        stop, most = [t for t in settings.pop("until") if t], settings.pop("max_gen_toks")
        settings.setdefault("top_p", 1.0)
        settings["temperature"] = settings.get("temperature", 1.0) * settings.pop("do_sample")
        if unknown := sorted(set(settings) - set(SAMPLING)):
            raise ValueError(
                f"generation_kwargs {unknown}: llama3 knows until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}; leave the others out"
            )
        if not 1 <= most < self.max_length:
            raise ValueError(
                f"max_gen_toks is {most} and max_length {self.max_length}, which leaves no room "
                "for a question; set max_gen_toks in the task, or use a larger max_length"
            )
        tokenizer = self.llama.tokenizer
        special = tokenizer.special_tokens
        request = Request(
            self.tok_encode(context)[most - self.max_length :],
            most,
            sampling=Sampling(**settings),
            seed=seed,
            stop_tokens=[*tokenizer.stop_tokens, *(special[t] for t in stop if t in special)],
        )
        return request, stop

    def _run(
        self, requests: Sequence[Request], stops: Sequence[Sequence[str]], what: str
    ) -> Iterator[tuple[int, Answer]]:
        answers = run(self.llama, requests, stops)
        if not job.is_leader():
            return answers
        return progress(answers, what, len(requests), unit="request")
