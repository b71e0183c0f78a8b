"""`Tokenizer` -> Hugging Face's files: tokenizer.json, its settings and a chat template.

The `tokenizers` library then encodes as `Tokenizer` and `ChatFormat` do. Knows no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.checkpoints.formats.bpe_ranks import gpt2_bytes
from llama.checkpoints.formats.hf_chat_template import chat_template
from llama.common.files import write_json
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        context: tokens in a row that the model was trained for.

    Raises:
        ValueError: tokenizer.json cannot give a special token its id.
    """
    text = build_tokenizer(tokenizer).to_str(pretty=True)  # its `save` raises no OSError
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    roles = {f"{role}_token": token_text(tokenizer, i) for role, i in ids.items() if i >= 0}
    roles |= tokenizer.template_tokens
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if tokenizer.chat_templates:
        named = [{"name": k, "template": v} for k, v in tokenizer.chat_templates.items()]
        only = list(tokenizer.chat_templates) == ["default"]
        settings["chat_template"] = tokenizer.chat_templates["default"] if only else named
    elif (template := chat_template(tokenizer)) is not None:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", roles)


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """What tokenizer.json calls the token `i`."""
    special = {i: text for text, i in tokenizer.special_tokens.items()}
    character = {b: c for c, b in gpt2_bytes().items()}
    return special.get(i) or "".join(character[b] for b in tokenizer.decode_bytes([i]))


def build_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library; it adds BOS."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as HFTokenizer

    character = {b: c for c, b in gpt2_bytes().items()}

    def to_text(token: bytes) -> str:
        return "".join(character[b] for b in token)

    ranks = tokenizer.ranks
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    vocab = {to_text(token): i for token, i in ranks.items()}
    if [i for _, i in special] != list(range(len(ranks), len(ranks) + len(special))):
        vocab |= tokenizer.special_tokens  # otherwise the library numbers them after the ranks
    merges = [(to_text(left), to_text(right)) for left, right in recover_merges(ranks)]
    out = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.pat_str), "isolated", invert=False)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    out.decoder = decoders.ByteLevel()
    flags_of = tokenizer.text_tokens.flags | tokenizer.token_flags
    for text, _ in special:
        flags = dict.fromkeys(flags_of.get(text, ()), True)
        in_text = text in tokenizer.text_tokens.flags
        token = AddedToken(text, special=not in_text, normalized=False, **flags)
        (out.add_tokens if in_text else out.add_special_tokens)([token])
    wrong = [text for text, i in special if out.token_to_id(text) != i]
    if wrong:
        raise ValueError(f"the special token {wrong[0]!r} cannot have its id in tokenizer.json")
    after: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if tokenizer.bos_id >= 0:
        bos = token_text(tokenizer, tokenizer.bos_id)
        after.append(
            processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", f"{bos}:1", "$B:1"],
                special_tokens=[(bos, tokenizer.bos_id)],
            )
        )
    out.post_processor = processors.Sequence(after)
    return out


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a tiktoken vocabulary, in the order of their priority.

    tiktoken joins the neighbours whose concatenation has the lowest rank. How it merges the bytes
    of a token does not depend on the text around them, so each token results from one pair: its
    last two parts. If more than two parts remain, or a part is not a token (a character whose bytes
    are not tokens), merging never produces the token; it is found only as a whole piece of text
    (`ignore_merges`).
    """
    merges: list[tuple[bytes, bytes]] = []
    never = max(ranks.values()) + 1  # for a pair that is not a token
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = list(range(len(token) + 1))  # part i is token[cuts[i] : cuts[i + 1]]
        # joined[i]: the rank of the concatenation of parts i and i + 1
        joined = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
        while len(cuts) > 3 and (lowest := min(joined)) < never:
            i = joined.index(lowest)
            del cuts[i + 1], joined[i]
            if i < len(joined):
                joined[i] = ranks.get(token[cuts[i] : cuts[i + 2]], never)
            if i > 0:
                joined[i - 1] = ranks.get(token[cuts[i - 1] : cuts[i + 1]], never)
        left, right = token[: cuts[1]], token[cuts[1] :]
        if len(cuts) == 3 and left in ranks and right in ranks:
            merges.append((left, right))
    return merges
