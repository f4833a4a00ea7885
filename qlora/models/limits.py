"""The two numbers that tokens must keep: rows of the embedding, and positions.

    every token id < rows            every example and prompt <= positions

config.json and a GGUF file's header know both, so a run is refused before its weights are read; torch would answer with
an IndexError in the first step, and a card with an assertion that ends the process. Rotary positions have no table that
ends, and compute on past what the model has seen: that is refused as well, as nobody means it by accident, and who does
raises max_position_embeddings in config.json. Scaled positions count as scaled. The alternative, a note, scrolls by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.data.batch import Example
from qlora.errors import UserError, problem
from qlora.models.gguf_header import read_header, rope_scale
from qlora.models.source import Source, load_config

_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """Of a model; None where there is no such limit, or nobody says."""

    rows: int | None
    positions: int | None


def source_limits(source: Source) -> Limits:
    """The limits of a model on disk, without its weights.

    Raises:
        UserError: see `load_config`.
    """
    if source.gguf is None:
        return config_limits(load_config(source))
    header = read_header(source.gguf)  # transformers takes seconds to make a config of it
    shape, length = header.shapes.get("token_embd.weight"), header.get("context_length")
    return Limits(shape[0] if shape else None, int(length * rope_scale(header)) if isinstance(length, int) else None)


def model_limits(model: PreTrainedModel) -> Limits:
    """The limits of a loaded model, whose embedding may have been resized."""
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (None,))[0]
    return Limits(rows, config_limits(model.config).positions)


def config_limits(config: PretrainedConfig) -> Limits:
    """The limits that a config states."""
    text: Any = config.get_text_config()
    return Limits(_count(text, "vocab_size"), _positions(text))


def _count(config: Any, name: str) -> int | None:
    """A positive whole number of a config, or None: XLNet says -1 for "no end"."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _positions(config: Any) -> int | None:
    """Positions, those of scaled rotations as scaled."""
    positions = _count(config, "max_position_embeddings")
    if positions is None or getattr(config, "alibi", False):
        return None
    scaling = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in scaling.values() if isinstance(value, dict)]
    for found in nested or [scaling]:
        factor, original = found.get("factor"), found.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and factor > 1:
            positions = max(positions, int(factor * (original or config.max_position_embeddings)))
    return positions


def refuse_tokens(
    limits: Limits, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None = None, name: str = "data"
) -> None:
    """Nothing, if the model can take all `examples`.

    Raises:
        UserError: the first few that it cannot: the record, and its token or its length.
    """
    problems: list[str] = []
    for number, example in enumerate(examples):
        where = " ".join(example.place) if example.place else f"example {number + 1}"
        problems += token_problems(name, where, example.input_ids, limits, tokenizer)
        if len(problems) >= _SHOWN:
            break
    if problems:
        raise UserError(problems)


def token_problems(
    name: str, where: str, ids: Iterable[int], limits: Limits, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """What is wrong with the tokens of one example or prompt for a model of these limits."""
    ids, problems = list(ids), []
    largest = max(ids, default=0)
    if limits.rows is not None and largest >= limits.rows:
        token = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(largest)!r}"
        rule = f"holds the token{token} with number {largest}, and the model's embedding has {limits.rows} rows"
        problems.append(problem(name, where, rule, "Use the tokenizer of this model, or resize its embedding"))
    if limits.positions is not None and len(ids) > limits.positions:
        rule = f"has {len(ids)} tokens, and the model {limits.positions} positions"
        remedy = f"Use `max_tokens={limits.positions}`, or split it"
        problems.append(problem(name, where, rule, remedy))
    return problems


def refuse_length(limits: Limits, max_tokens: int) -> None:
    """For a plan without data, whose examples all have `max_tokens`.

    Raises:
        UserError: the model has fewer positions.
    """
    if limits.positions is not None and max_tokens > limits.positions:
        rule = f"the model has {limits.positions} positions"
        raise UserError(problem("max_tokens", max_tokens, rule, f"Use `max_tokens={limits.positions}`"))
