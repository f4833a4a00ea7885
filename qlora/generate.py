"""Text from a model: the prompt that training wrote, greedy or sampled, up to the end of the turn.

Batches are padded on the left, so that every answer begins in the same column; what is padding follows from length.
Generation is transformers' own `generate`, which knows every architecture's cache. Of the model's generation_config
only the end tokens are used: it may carry a repetition penalty, and then "greedy" would not be greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationConfig

from qlora.data.chat import prompt_ids, stop_ids
from qlora.errors import UserError, problem


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    raw: bool = False,
) -> list[str]:
    """The answers to a batch of prompts, without prompt and end-of-turn token.

    Temperature 0 is greedy and needs no seed; sampling leaves the global random state as it was. `raw` continues the
    prompts as they stand, otherwise they are rendered as in training. The model's mode (train, eval) is kept.

    Raises UserError: an empty prompt, one the chat template refuses, or one longer than the model's positions.
    """
    rows = [prompt_ids(prompt, tokenizer, system=system, raw=raw) for prompt in prompts]
    room = getattr(model.config, "max_position_embeddings", None)
    problems = []
    for prompt, ids in zip(prompts, rows):
        if not ids:
            problems.append(problem("prompt", repr(prompt), "has no tokens", "Write a prompt"))
        elif room is not None and len(ids) >= room:
            rule = f"has {len(ids)} tokens, and the model {room} positions"
            problems.append(problem("prompt", repr(prompt)[:60], rule, "Shorten it"))
    if problems:
        raise UserError(problems)

    width = max(map(len, rows))
    stops = sorted({*stop_ids(tokenizer), *_stops_of(model)})
    pad = stops[0] if stops else 0  # masked, so any token will do
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=model.device)
    if room is not None:
        max_new_tokens = min(max_new_tokens, room - width)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None, **sampling
    )
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # or `generate` would fill in from the model's what ours leaves open
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(input_ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = own
        model.train(training)
    rows = [_before_stop(ids, stops) for ids in output[:, width:].tolist()]
    answers = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    return answers if raw else [answer.strip() for answer in answers]


def _stops_of(model: nn.Module) -> list[int]:
    """The end tokens of the model's own generation_config: one, several or none."""
    stops = model.generation_config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def _before_stop(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[:position] for position, token in enumerate(ids) if token in stops), ids)
