"""Text from a model: the prompt that training wrote, greedy or sampled, up to the end of the turn.

Batches are padded on the left, so that every answer begins in the same column; what is padding follows from length.
Generation is transformers' own `generate`, which knows every architecture's cache. Of the model's generation_config
only the end tokens are used: it may carry a repetition penalty, and then "greedy" would not be greedy. The alternative,
a decoding loop of our own, would have to know the caches of all architectures.

An answer can be heard while it is written (`Listener`): what is heard adds up to what is returned. Its text is decoded
anew with each token, since a letter may lie in several of them and tokenizers treat the first one differently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qlora.data.chat import prompt_ids, shared, stop_ids
from qlora.errors import UserError, problem
from qlora.models.limits import model_limits, token_problems


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and needs no seed; `top_p` keeps the likeliest tokens with
    this probability together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()
Prompt = str | list[dict]  # the user's text, or the messages so far


@dataclass
class Listener:
    """Hears one answer as it is written.

    Attributes:
        heard: called with each new piece of text.
        stopped: asked after each token whether the answer is to end there.
        tokens: how many were written so far, the one that ends the answer included.
    """

    heard: Callable[[str], object]
    stopped: Callable[[], bool] = lambda: False
    tokens: int = 0


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    system: str | None = None,
    raw: bool = False,
    listener: Listener | None = None,
) -> list[str]:
    """The answers to a batch of prompts, without prompt and end-of-turn token.

    The global random state and the model's mode (train, eval) stay as they are.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompts: what the user says, each a text or the messages of a conversation.
        max_new_tokens: the longest answer.
        sampling: greedy, if it is left out.
        system: a system message in front of every prompt.
        raw: continue the prompts as they stand, and do not render them as in training.
        listener: hears the answer to a single prompt.

    Raises:
        UserError: an empty prompt, one the chat template refuses, or one longer than the model's positions.
    """
    rows = prompt_rows(model, tokenizer, prompts, system=system, raw=raw)
    positions = model_limits(model).positions
    width = max(map(len, rows))
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - width)
    stops = sorted({*stop_ids(tokenizer, system=system, raw=raw), *_stops_of(model)})
    pad = stops[0] if stops else 0  # masked, so any token will do
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None, **_choice(sampling)
    )

    def answer(tokens: list[int]) -> str:
        text = str(tokenizer.decode(_before_stop(tokens, stops), skip_special_tokens=True))
        return text if raw else text.strip()

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
                **({} if listener is None else _hearing(listener, answer)),
            )
    finally:
        model.train(training)
    return [answer(tokens) for tokens in output[:, width:].tolist()]


def _hearing(listener: Listener, answer: Callable[[list[int]], str]) -> dict[str, Any]:
    """The options of `generate` that let a listener hear and stop an answer."""
    return {"streamer": Streamer(listener, answer), "stopping_criteria": StoppingCriteriaList([_Stop(listener)])}


class Streamer(BaseStreamer):
    """Hands on the new text of one answer. `generate` puts the prompt first, then token by token."""

    def __init__(self, listener: Listener, answer: Callable[[list[int]], str]):
        self.listener, self.answer = listener, answer
        self.tokens: list[int] | None = None  # None: the prompt was not put yet
        self.said = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.reshape(-1).tolist()
        self.listener.tokens = len(self.tokens)
        text = self.answer(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the next token may complete the letter
            self._say(text)

    def end(self) -> None:
        """Say what was held back; where a tokenizer rewrote what was said, what follows that place."""
        text = self.answer(self.tokens or [])
        self.said = self.said[: shared(self.said, text)]
        self._say(text)

    def _say(self, text: str) -> None:
        if len(text) > len(self.said) and text.startswith(self.said):
            self.listener.heard(text[len(self.said) :])
            self.said = text


class _Stop(StoppingCriteria):
    """Ends the answer that a listener does not want to hear any more."""

    def __init__(self, listener: Listener):
        self.listener = listener

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((len(input_ids),), self.listener.stopped(), device=input_ids.device)


def prompt_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    raw: bool = False,
) -> list[list[int]]:
    """The tokens of each prompt, all of which can be answered; the arguments are those of `generate_batch`.

    Raises:
        UserError: all prompts without tokens, with tokens that the model has not, or with as many as it has positions;
            a prompt that the chat template refuses.
    """
    rows = [prompt_ids(prompt, tokenizer, system=system, raw=raw) for prompt in prompts]
    limits, problems = model_limits(model), []
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
    return rows


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
