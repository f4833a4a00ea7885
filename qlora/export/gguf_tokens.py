"""A tokenizer in GGUF: vocabulary, merges or scores, special tokens, and the name of its pre-tokenizer.

    byte-level BPE (Llama 3, Qwen, SmolLM)      model "gpt2": tokens, merges, and `pre`, which names the regular
                                                expression that llama.cpp splits text by
    SentencePiece's BPE (Llama 2, Gemma, Phi-3) model "llama": tokens with scores; llama.cpp merges the pair whose
                                                result has the best score, so a score is the rank of its merge, negative

llama.cpp's converter finds `pre` by hashing how a text is tokenized, and a tokenizer that differs in one added token
has another hash. Here it is found by what it stands for: the splits that the tokenizer makes. What is in no row of
`PRE` is refused: under "default" a model reads other tokens than it was trained on, and nothing says so. The tokenizer
of a base that is a GGUF file is copied as it stands there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.data.chat import stop_ids
from qlora.errors import UserError, problem
from qlora.models.gguf_header import read_keys

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END
LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END
TEKKEN = f"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
GPT4O = (
    f"{_LETTERS}{_UPPER}*{_LOWER}+{_WORDS}?|{_LETTERS}{_UPPER}+{_LOWER}*{_WORDS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _END
)
# (the splits that are made one after the other, whether a word that is a token stays whole): llama.cpp's name.
PRE = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",  # Phi-4 too
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_REMEDY = "Export to a folder of transformers, and convert that with llama.cpp's own converter"


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, source: Path | None) -> None:
    """Write all that a tokenizer is.

    Args:
        writer: a GGUFWriter.
        tokenizer: with its chat template.
        rows: of the embedding; those that no token has are filled up.
        source: the GGUF file that the tokenizer comes from, whose keys are then copied.

    Raises:
        UserError: a kind of tokenizer, or splits, that llama.cpp has no name for; more tokens than rows.
    """
    if len(tokenizer) > rows:
        rule = f"has {len(tokenizer)} tokens, and the model's embedding {rows} rows"
        raise UserError(problem("tokenizer", tokenizer.name_or_path, rule, "Use the tokenizer of this model"))
    if source is not None:
        _copy(writer, source)
    else:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            rule = f"({type(tokenizer).__name__}) has no tokenizer.json, which is what can be written"
            raise UserError(problem("tokenizer", tokenizer.name_or_path, rule, _REMEDY))
        _add_vocabulary(writer, json.loads(backend.to_str()), tokenizer, rows)
        _add_special(writer, tokenizer)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def model_name(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name under which llama.cpp reads the tokenizer as it is: "phi-3" in it, in any case, means that special tokens
    take the blanks after them, and stops the loading where Phi-3's own tokens are missing.
    """
    own = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= tokenizer.get_vocab().keys()
    strips = own and any(token.rstrip and token.special for token in tokenizer.added_tokens_decoder.values())
    if strips and not re.search("phi-?3", name, re.IGNORECASE):
        return f"Phi-3 {name}"
    return name if strips else re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)


def _copy(writer: Any, source: Path) -> None:
    """The tokenizer's keys of a GGUF file, but for its chat templates."""
    import gguf

    for key, (kind, inner, value) in read_keys(source, "tokenizer.ggml.").items():
        element = None if inner is None else gguf.GGUFValueType(inner)
        writer.add_key_value(key, value, gguf.GGUFValueType(kind), element)


def _add_vocabulary(writer: Any, state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    model = state["model"]
    pieces = _is_sentencepiece(state)
    if model["type"] != "BPE":
        rule = f"({model['type']}) is of a kind that is not written as GGUF, only BPE is"
        raise UserError(problem("tokenizer", tokenizer.name_or_path, rule, _REMEDY))
    tokens, kinds = _tokens(state, tokenizer, rows)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _pre_tokenizer(state, tokenizer))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(_scores(tokens, kinds, merges))
    writer.add_token_types(kinds)
    if not pieces:  # of a token that has a blank in it llama.cpp's converter hides it too
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges])
    writer.add_add_space_prefix(pieces and _prefixed(state))


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether blanks are ▁ and unknown letters bytes: a converted SentencePiece model."""
    return bool(state["model"].get("byte_fallback"))


def _tokens(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    pieces, unknown = _is_sentencepiece(state), state["model"].get("unk_token")
    for text, i in state["model"]["vocab"].items():
        tokens[i] = text
        is_byte = pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kinds[i] = BYTE if is_byte else UNKNOWN if pieces and text == unknown else NORMAL
    for added in state["added_tokens"]:
        i, text = added["id"], added["content"]
        special = added["special"] or text in tokenizer.all_special_tokens
        if kinds[i] != UNKNOWN:
            kinds[i] = CONTROL if special else USER_DEFINED
        tokens[i] = text.replace("▁", " ") if pieces and not special else text
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[list[str]]) -> list[float]:
    """-rank of the first merge that makes a token; below all those for a token that no merge makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [
        0.0 if kind in (CONTROL, UNKNOWN, BYTE, UNUSED) else -float(ranks.get(token, len(merges)))
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _prefixed(state: dict[str, Any]) -> bool:
    """Whether a blank is put before the text."""
    parts = [part for key in ("normalizer", "pre_tokenizer") for part in _flat(state[key], f"{key}s")]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if part is None:
        return []
    name = "pretokenizers" if inner == "pre_tokenizers" else inner
    return part[name] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for the splits of a byte-level tokenizer.

    Raises:
        UserError: it has none that we know.
    """
    splits: list[str] = []
    for step in _flat(state["pre_tokenizer"], "pre_tokenizers"):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(next(iter(step["pattern"].values())))
        elif kind == "Digits" and step["individual_digits"]:
            splits.append("digits")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            splits += ["gpt-2"] if step["use_regex"] else []
        else:
            splits.append(json.dumps(step))
    key = (tuple(splits), bool(state["model"].get("ignore_merges")))
    if key in PRE:
        return PRE[key]
    rule = f"splits text in a way that we know no name of llama.cpp's for ({'; '.join(splits) or 'not at all'})"
    raise UserError(problem("tokenizer", tokenizer.name_or_path, rule, _REMEDY))


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokens that begin and end texts and turns."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add, token in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, eos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    others = [token for token in stop_ids(tokenizer) if token != eos]
    if others:
        writer.add_eot_token_id(others[0])
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(eos is not None and len(ids) > 1 and ids[-1] == eos)
