"""Text from a model: the prompt that training wrote, greedy or sampled, up to the end of the turn.

Batches are padded on the left, so that every answer begins in the same column; what is padding follows from length.
Generation is transformers' own `generate`, which knows every architecture's cache. Of the model's generation_config
only the end tokens are used: it may carry a repetition penalty, and then "greedy" would not be greedy. The alternative,
a decoding loop of our own, would have to know the caches of all architectures.

An answer can be heard while it is written (`Listener`): what is heard adds up to what is returned. A piece is what a
token adds to the text of those since the last piece but one: a letter may lie in several tokens, and tokenizers treat
the first one of a text differently. So an answer costs as many tokenizer calls as it has tokens, each for a few of
them; to decode all of it each time would cost the square of its length.

Of a conversation, `Remembered` keeps the keys and values: its next answer computes only the tokens that are new.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from qlora.data.chat import prompt_ids, shared, stop_ids
from qlora.errors import UserError, problem
from qlora.layers.weight import multiply_frozen
from qlora.models.limits import model_limits, token_problems
from qlora_kernels import backends


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and needs no seed; `top_p` keeps the likeliest tokens with
    this probability together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()
CONTIGUOUS = torch.contiguous_format
Prompt = str | list[dict]  # the user's text, or the messages so far


@dataclass
class Listener:
    """Hears one answer as it is written.

    Attributes:
        heard: called with each new piece of text.
        stopped: asked after each token whether the answer is to end there.
        tokens: how many were written so far, the one that ends the answer included.
        remembered: what was computed for earlier answers of the conversation, by the same model and adapter.
    """

    heard: Callable[[str], object]
    stopped: Callable[[], bool] = lambda: False
    tokens: int = 0
    remembered: Remembered | None = None


@dataclass
class Remembered:
    """Keys and values of the first tokens of a conversation, in the model's own cache.

    It serves every prompt that begins with some of the same tokens: what follows them is dropped. A layer with a window
    that is full cannot drop anything, and other layers than attention keep no tokens: then all is computed again.
    """

    tokens: list[int] = field(default_factory=list)
    cache: DynamicCache | None = None
    begun: DynamicCache | None = None

    def begin(self, model: PreTrainedModel, row: list[int]) -> dict[str, Any]:
        """The options of `generate` that go on from what a prompt shares with what is held. Until `keep`, nothing is
        held: an answer may be interrupted with some of its layers done.
        """
        cache, held, same = self.cache, len(self.tokens), shared(self.tokens, row[:-1])
        self.cache, self.tokens = None, []
        if cache is None or same == 0 or not _cut(cache, held - same):
            cache = DynamicCache(config=model.config)
        self.begun = cache if all(type(layer) in _CUT for layer in cache.layers) else None
        return {} if self.begun is None else {"past_key_values": self.begun}

    def keep(self, tokens: list[int]) -> None:
        """Hold what `generate` computed of a prompt and its answer; the last token was never an input."""
        if self.begun is not None:
            self.cache, self.tokens = self.begun, tokens[: self.begun.get_seq_length()]


_CUT = (DynamicLayer, DynamicSlidingWindowLayer)


def _cut(cache: DynamicCache, count: int) -> bool:
    """Drop the last `count` tokens; False where that cannot be."""
    windows = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if count and any(layer.get_seq_length() >= layer.sliding_window for layer in windows):
        return False
    if count:
        cache.crop(-count)
    return True


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
    remembered = None if listener is None else listener.remembered
    positions = model_limits(model).positions
    width = max(map(len, rows))
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - width)
    stops = sorted({*stop_ids(tokenizer, system=system, raw=raw), *_stops_of(model)})
    pad = stops[0] if stops else 0  # masked, so any token will do
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, eos_token_id=stops or None, **_choice(sampling)
    )

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(_before_stop(tokens, stops), skip_special_tokens=True))

    training = model.training
    model.eval()
    speaker = speaker_of(model)
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            output = speaker.generate(  # type: ignore[operator]  # nn.Module's attributes are tensors and modules
                torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device),
                attention_mask=torch.tensor(
                    [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device
                ),
                generation_config=config,
                **({} if listener is None else _hearing(listener, Streamer(listener, text, strips=not raw))),
                **({} if remembered is None else remembered.begin(speaker, rows[0])),
            )
    finally:
        model.train(training)
    if remembered is not None:
        remembered.keep(output[0].tolist())
    answers = [text(tokens) for tokens in output[:, width:].tolist()]
    return answers if raw else [answer.strip() for answer in answers]


def speaker_of(model: PreTrainedModel) -> PreTrainedModel:
    """A shallow copy of the model for `generate`; what it has of its own would otherwise be seen by whoever else uses
    the model.

    Its generation_config is empty, as `generate` fills in from the model's what ours leaves open. A plain head is
    multiplied as in the loss (`multiply_frozen`), and contiguous rows of it: `generate` hands it the last column of the
    prompts' hidden states, and torch 2.13 takes 13 s of CPU for 60 such rows in bf16, with their strides.
    """
    speaker, head = copy.copy(model), model.get_output_embeddings()
    speaker.generation_config = GenerationConfig()
    for name, module in model._modules.items():
        if module is not None and module is head:
            own = copy.copy(module)
            own._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
            own.register_forward_pre_hook(lambda _, given: (given[0].clone(memory_format=CONTIGUOUS), *given[1:]))
            if type(own) is nn.Linear and "forward" not in vars(own):  # nobody has replaced it
                own.forward = partial(_logits, own)  # type: ignore[method-assign]
            speaker._modules = {**model._modules, name: own}
    return speaker


def _logits(head: nn.Linear, states: Tensor) -> Tensor:
    """states [..., hidden] W^T + bias, without a graph."""
    wide = states.float() if backends.is_widened(states) else states
    logits = wide.new_empty(*states.shape[:-1], head.out_features)
    rows = wide.reshape(-1, states.shape[-1])
    multiply_frozen(logits.view(len(rows), -1), rows, head.weight, transposed=True)
    return (logits if head.bias is None else logits.add_(head.bias)).to(states.dtype)


def _hearing(listener: Listener, streamer: Streamer) -> dict[str, Any]:
    """The options of `generate` that let a listener hear and stop an answer."""
    return {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([_Stop(listener)])}


class Streamer(BaseStreamer):
    """Hands on the new text of one answer. `generate` puts the prompt first, then token by token.

    Args:
        listener: hears it.
        text: of some tokens.
        strips: whether white space at both ends is not said.
    """

    def __init__(self, listener: Listener, text: Callable[[list[int]], str], *, strips: bool):
        self.listener, self.text, self.strips = listener, text, strips
        self.tokens: list[int] | None = None  # None: the prompt was not put yet
        self.pieces: list[str] = []
        self.held = ""  # white space that is said if something follows
        self._first = self._next = 0  # the tokens of the last piece, and where those that are not said begin

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.reshape(-1).tolist()
        self.listener.tokens = len(self.tokens)
        said, text = self.text(self.tokens[self._first : self._next]), self.text(self.tokens[self._first :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(said):
            return  # the next token may complete the letter
        self._first, self._next = self._next, len(self.tokens)
        self._say(text[len(said) :])

    def end(self) -> None:
        """Say what was held back; where a tokenizer rewrote what was said, what follows that place."""
        text, said = self.text(self.tokens or []), "".join(self.pieces)
        text = text.strip() if self.strips else text
        self._hand_on(text[shared(said, text) :])

    def _say(self, text: str) -> None:
        if self.strips:
            text = self.held + text if self.pieces else text.lstrip()
            kept = text.rstrip()
            text, self.held = kept, text[len(kept) :]
        self._hand_on(text)

    def _hand_on(self, text: str) -> None:
        if text:
            self.listener.heard(text)
            self.pieces.append(text)


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
