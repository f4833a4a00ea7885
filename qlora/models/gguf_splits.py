r"""How the tokenizer of a GGUF file splits text before it merges, where transformers reads that otherwise.

    tokenizer.ggml.pre = "smollm"      digits one by one, then words as GPT-2 has them

transformers 5.23 knows the splits of the other names that we write, and reads this one as GPT-2's: blanks and line ends
before a digit ("\n\n1") are then other tokens than the model was trained on, and than llama.cpp makes. The alternative,
a reader of our own for every vocabulary, would repeat what transformers does right.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from qlora.models.gguf_header import read_header


def split_as_named(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers read from the GGUF file `path`, splitting text as the file says.

    Raises:
        UserError: the file cannot be read.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and read_header(path).values.get("tokenizer.ggml.pre") == "smollm":
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer
