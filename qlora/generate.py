"""Text from a model: the prompt that training wrote, greedy or sampled, up to the end of the turn.

Batches are padded on the left, so that every answer begins in the same column; what is padding follows from length.
Generation is transformers' own `generate`, which knows every architecture's cache. Of the model's generation_config
only the end tokens are used: it may carry a repetition penalty, and then "greedy" would not be greedy. The alternative,
a decoding loop of our own, would have to know the caches of all architectures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.data.chat import prompt_ids, stop_ids
from qlora.errors import UserError, problem
from qlora.models.limits import Limits, model_limits, token_problems


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and needs no seed; `top_p` keeps the likeliest tokens with
    this probability together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    system: str | None = None,
    raw: bool = False,
) -> list[str]:
    """The answers to a batch of prompts, without prompt and end-of-turn token.

    The global random state and the model's mode (train, eval) stay as they are.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompts: what the user says.
        max_new_tokens: the longest answer.
        sampling: greedy, if it is left out.
        system: a system message in front of every prompt.
        raw: continue the prompts as they stand, and do not render them as in training.

    Raises:
        UserError: an empty prompt, one the chat template refuses, or one longer than the model's positions.
    """
    rows = [prompt_ids(prompt, tokenizer, system=system, raw=raw) for prompt in prompts]
    limits = model_limits(model)
    positions = limits.positions
    _check(prompts, rows, limits, tokenizer)
    width = max(map(len, rows))
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - width)
    stops = sorted({*stop_ids(tokenizer, system=system, raw=raw), *_stops_of(model)})
    pad = stops[0] if stops else 0  # masked, so any token will do
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None, **_choice(sampling)
    )
    training = model.training
    model.eval()
    # `generate` fills in from the model's generation_config what ours leaves open. A shallow copy, which shares
    # everything else, has an empty one; to swap it on the model itself would be seen by whoever else uses the model.
    speaker = copy.copy(model)
    speaker.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            output = speaker.generate(  # type: ignore[operator]  # nn.Module's attributes are tensors and modules
                torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device),
                attention_mask=torch.tensor(
                    [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device
                ),
                generation_config=config,
            )
    finally:
        model.train(training)
    found = [_before_stop(tokens, stops) for tokens in output[:, width:].tolist()]
    answers = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in found]
    return answers if raw else [answer.strip() for answer in answers]


def _check(prompts: Sequence[str], rows: list[list[int]], limits: Limits, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing, if every prompt can be answered.

    Raises:
        UserError: all prompts without tokens, with tokens that the model has not, or with as many as it has positions.
    """
    problems = []
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            problems.append(problem("prompt", repr(prompt), "has no tokens", "Write a prompt"))
        elif limits.positions is not None and len(row) >= limits.positions:
            rule = f"has {len(row)} tokens, and the model {limits.positions} positions"
            problems.append(problem("prompt", repr(prompt)[:60], rule, "Shorten it"))
        else:
            problems += token_problems("prompt", repr(prompt)[:60], row, limits, tokenizer)
    if problems:
        raise UserError(problems)


def _choice(sampling: Sampling) -> dict[str, bool | int | float]:
    """The options of `generate` that choose a token."""
    if sampling.temperature <= 0:
        return {}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _stops_of(model: PreTrainedModel) -> list[int]:
    """The end tokens of the model's own generation_config: one, several or none."""
    stops = model.generation_config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def _before_stop(tokens: list[int], stops: list[int]) -> list[int]:
    return next((tokens[:position] for position, token in enumerate(tokens) if token in stops), tokens)
