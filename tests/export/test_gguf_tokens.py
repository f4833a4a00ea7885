"""Tokenizers in GGUF files: llama.cpp makes the same tokens of every text, or the export is refused."""

from __future__ import annotations

import json
from pathlib import Path

import ggufs
import pytest
import tiny
import transformers
from llama_cpp import LlamaCpp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qlora import UserError, load_tokenizer
from qlora.export.gguf import convert_to_gguf
from qlora.export.gguf_tokens import GPT4O, LLAMA3, PRE, QWEN2, TEKKEN

TICKETS = Path(__file__).resolve().parents[2] / "scripts/data/tickets_train.jsonl"
TEXTS = [
    "Order 123456789 isn't here, and I'LL cancel it in 2024.",
    "  two blanks,\ttabs\n\n\nand   lines \r\n end   ",
    "naïve café — Ünïcode… 你好世界 ٣٤٥ 🙂🙂 e\u0301 ﬁ",
    "snake_case(x) == CamelCase->y; // http://a.b/c?d=e&f",
    "<|im_start|>user\nWhat's 1+1?<|im_end|>\n<|im_start|>assistant\n",
    "<think>the 12</think>",
    "List:\n\n1. one\n\n22. two   3",
]


def lines() -> list[str]:
    return [json.dumps(json.loads(line))[:300] for line in TICKETS.read_text().splitlines()[:60]] + TEXTS


def byte_level(*splits: pre_tokenizers.PreTokenizer, **options) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with 500 tokens, trained on our tickets."""
    backend = Tokenizer(models.BPE(**options))
    regex = any(isinstance(split, pre_tokenizers.Split) for split in splits)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(lines(), trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.add_tokens(["<think>"])
    made.chat_template = tiny.TEMPLATE
    return made


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def sentencepiece(prefixed: bool) -> transformers.PreTrainedTokenizerFast:
    """Blanks are ▁, unknown letters bytes, as in Llama 2 (a blank before the text) and Gemma (none)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefixed else blanks
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, max_token_length=12)
    words = [word for line in lines() for word in line.replace(" ", " ▁").split()]
    backend.train_from_iterator(words, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return made


def written(tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, family: str = "llama") -> Path:
    config = tiny.CONFIGS[family]()
    config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id = 720, 1, 0, None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return convert_to_gguf(str(folder / "model"), folder / "gguf")


KINDS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "qwen2": lambda: byte_level(split(QWEN2)),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "gpt-4o": lambda: byte_level(split(GPT4O)),
    "llama": lambda: sentencepiece(True),
    "gemma": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_tokens(tmp_path, kind):
    tokenizer = KINDS[kind]()
    path = written(tokenizer, tmp_path)
    with LlamaCpp(path) as served:
        for text in lines():
            assert served.tokenize(text) == tokenizer(text).input_ids, text
    again = load_tokenizer(str(path))
    if kind in PRE.values():
        assert [text for text in lines() if again(text).input_ids != tokenizer(text).input_ids] == []
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_every_name_is_tested():
    assert set(PRE.values()) == KINDS.keys() - {"llama", "gemma"}
    assert QWEN2 == PRETOKENIZE_REGEX


def test_what_llama_cpp_has_no_name_for_is_refused(tmp_path):
    tokenizer = byte_level(split(r"\d{1,2}|\D+"))
    with pytest.raises(UserError, match=r"know no name of llama.cpp's for \(\\d"):
        written(tokenizer, tmp_path)
    assert not (tmp_path / "gguf").exists()
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"\(WordLevel\) is of a kind that is not written"):
        written(tokenizer, tmp_path / "words")


def test_more_tokens_than_rows_are_refused(tmp_path):
    tokenizer = ggufs.bpe_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(500)])
    with pytest.raises(UserError, match="has 767 tokens, and the model's embedding 720 rows"):
        written(tokenizer, tmp_path)
