"""An export held against the adapted model: the same tokens through both, one model in memory at a time.

    expect(found, texts, kept) -> Expected                the adapted model's logits, and what it writes greedily
    compare(expected, folder, load, base) -> Closeness    the written files, loaded and computed by those who serve them

    KL = mean over tokens of sum_v p_v (log p_v - log q_v), p of the adapted model, q of the export, in nats

Two questions. Is the format close enough to the adapted model? KL and its limit tell. Are the files whole? Then they
are the model that the format keeps (`kept`), but for the order of sums: their logits may differ by WHOLE times what one
more rounding of every product does to them, which is measured. One changed tensor shows there,
however coarse the format.

Both see a prompt and the text that the adapted model writes after it, so that the export writes the same text greedily
if and only if its largest logits name it, one pass instead of a decoding. Models of up to FLOAT32 parameters compute
in float32 here, whatever their files hold: in bf16 the rounding of both computations (KL 4e-3 on SmolLM2) hides what
the files differ in (2e-4). The alternative, to compare tensors, would check the writer with the writer's own idea of
the format.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from qlora.data.batch import Example
from qlora.data.chat import prompt_ids
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.errors import guard, problem
from qlora.export.adapted_source import AdaptedSource
from qlora.export.kept import Kept
from qlora.export.peft import AdapterFiles, put_adapter
from qlora.generate import speaker_of
from qlora.layers.attach import detach, disabled
from qlora.models.limits import Limits, refuse_tokens, source_limits
from qlora.models.source import load_tokenizer
from qlora.models.transformers_seam import LOADING

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "A train leaves at 9:40 and arrives at 12:15. How long does it take?",
    "Extract the name and the city as JSON: Maria Lopez moved from Lima to Toronto in 2019.",
    "Write a short, polite e-mail that moves our meeting from Monday to Thursday.",
)
WRITTEN = 12  # tokens that the adapted model writes after a prompt
LONGEST = 256  # tokens of a record
RECORDS = 16
FLOAT32 = 5 * 10**8
HELD_LOGITS = 1 << 25  # float32 values that are held while the export is loaded: 128 MB
WHOLE = 30  # times the noise. A whole export has about 1, one norm or 16 rows scaled by 1.5 over 1,000 (docs/guide.md)


@dataclass(frozen=True)
class Text:
    """Tokens that both models see; the last `written` of them are what the adapted model wrote."""

    ids: tuple[int, ...]
    written: int = 0


@dataclass(frozen=True)
class Whole:
    """What an export should compute: logits [tokens, vocabulary] of each text in float32, and `noise`, their error if
    every product is rounded once more.
    """

    logits: list[Tensor]
    noise: float


@dataclass(frozen=True)
class Expected:
    """What the adapted model computes on `texts` in `dtype`: logits [tokens, vocabulary] of each in float32. `effect`:
    KL between it and what it was before the training. `whole`: what is kept of it, by the base of the export.
    """

    dtype: str
    texts: list[Text]
    logits: list[Tensor]
    effect: float
    whole: dict[str, Whole]


@dataclass(frozen=True)
class Closeness:
    """How far an export is from its adapted model, over `tokens` tokens: KL in nats a token (mean and largest), the
    error of logits (the root of the mean square of the difference, over that of the logits, each less its token's
    mean), the largest difference of two logits and the largest logit, the part of tokens where both name the same next
    one, and in how many of the `texts` that the adapted model wrote the export writes the same. `kept_error`: the error
    of logits beside those of what the format keeps, and `noise`, see `Whole`.
    """

    kl: float
    largest_kl: float
    logit_error: float
    logit_difference: float
    largest_logit: float
    top1_agreement: float
    greedy_equal: int
    greedy_texts: int
    tokens: int
    kept_error: float
    noise: float

    @property
    def is_whole(self) -> bool:
        """Whether the files are what the format keeps; NaN is not."""
        return self.kept_error <= WHOLE * self.noise

    def __str__(self) -> str:
        logits = f"logits {100 * self.logit_error:.2g} % off ({self.logit_difference:.2g} of {self.largest_logit:.3g})"
        same = f"top-1 agreement {100 * self.top1_agreement:.2f} %"
        greedy = f"greedy text equal in {self.greedy_equal} of {self.greedy_texts}"
        return f"KL {self.kl:.2g}, {logits}, {same}, {greedy} ({self.tokens} tokens)"


def texts_of(found: AdaptedSource, data: str | None) -> tuple[list[Text], list[Text]]:
    """(texts to compare as they are, prompts to write after): from `data`, or prompts of our own.

    Raises:
        UserError: the data cannot be read, or holds tokens that the model has not.
    """
    limits, tokenizer = source_limits(found.source), found.tokenizer
    if data is None:
        return [], [Text(tuple(prompt_ids(prompt, tokenizer)[: _room(limits)])) for prompt in PROMPTS]
    examples = tokenize(read_records(data)[:RECORDS], tokenizer, max_tokens=min(LONGEST, _room(limits))).examples
    refuse_tokens(limits, examples, tokenizer)
    prompts = [Text(example.input_ids[: _answer(example)]) for example in examples[: len(PROMPTS)]]
    return [Text(example.input_ids) for example in examples], prompts


def _room(limits: Limits) -> int:
    """Tokens of a prompt after which something can be written."""
    return max(2, (limits.positions or LONGEST + WRITTEN) - WRITTEN)


def _answer(example: Example) -> int:
    """Where the answer of an example begins; the middle of one that is all answer."""
    first = example.loss_mask.index(True)
    return first if first > 1 else -(-len(example.input_ids) // 2)


@torch.no_grad()
def expect(found: AdaptedSource, texts: tuple[list[Text], list[Text]], kept: dict[str, Kept]) -> Expected:
    """Load the adapted model, let it write and compute, then what is `kept` of it by base, and forget it.

    Raises:
        UserError: see `load_source` and `put_adapter`.
    """
    dtype = "fp32" if found.parameters() <= FLOAT32 else found.dtype
    model: Any = found.load(dtype)
    plain, prompts = texts
    count = HELD_LOGITS // len(model.get_output_embeddings().weight) // (1 + len(kept))
    held = _within(_continued(model, prompts) + plain, count)
    logits = [_logits(model, text) for text in held]
    with _before_training(model, found.files):
        kl = [_kl(after, _logits(model, text)) for after, text in zip(logits, held, strict=True)]
    detach(model)
    whole = {}
    for base, values in sorted(kept.items(), key=lambda item: not item[1].on_trained):
        if not values.on_trained:
            del model
            gc.collect()
            model = values.load_base(dtype)
        values.settle(model)
        computed = [_logits(model, text) for text in held]
        whole[base] = Whole(computed, _noise(model, held[0], computed[0]))
    return Expected(dtype, held, logits, torch.cat(kl).mean().item(), whole)


def _noise(model: nn.Module, text: Text, logits: Tensor) -> float:
    """The error of logits if every product is rounded once more, up or down by chance."""
    dice = torch.Generator().manual_seed(0)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        step = torch.finfo(y.dtype).eps * (2 * torch.rand(y.shape, generator=dice) - 1)
        return (y.float() * (1 + step)).to(y.dtype)

    hooks = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, nn.Linear)]
    other = _logits(model, text)
    for held in hooks:
        held.remove()
    return _error(*_squares(logits, other))


def _squares(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """Sums over tokens of the variance of the difference of logits, and of the logits."""
    return (wanted - got).var(-1, correction=0).sum().item(), wanted.var(-1, correction=0).sum().item()


def _error(off: float, whole: float) -> float:
    """The error of logits from sums of `_squares`."""
    return math.sqrt(off / whole)


def _within(texts: Sequence[Text], count: int) -> list[Text]:
    """The first texts that have about `count` tokens together; at least one."""
    kept: list[Text] = []
    for text in texts:
        if kept and sum(len(one.ids) for one in kept) + len(text.ids) > count:
            break
        kept.append(text)
    return kept


def _continued(model: Any, prompts: Sequence[Text]) -> list[Text]:
    """The prompts with what the model writes after them, greedily, past any end of the answer."""
    greedy = GenerationConfig(max_new_tokens=WRITTEN, do_sample=False, use_cache=True, pad_token_id=0)
    width = max(len(prompt.ids) for prompt in prompts)
    gaps = [width - len(prompt.ids) for prompt in prompts]  # padded on the left, so that all write at the same place
    ids = torch.tensor([[0] * gap + list(prompt.ids) for gap, prompt in zip(gaps, prompts, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    speaker: Any = speaker_of(model)
    output = speaker.generate(ids, attention_mask=mask, generation_config=greedy).tolist()
    return [Text(tuple(row[gap:]), len(row) - width) for row, gap in zip(output, gaps, strict=True)]


def _before_training(model: nn.Module, files: AdapterFiles) -> AbstractContextManager[Any]:
    """The model as it was when the training began, while entered; the adapter may be lost."""
    if files.start is None:
        return disabled(model)
    put_adapter(model, dataclasses.replace(files, tensors=files.start))
    return nullcontext()


@torch.no_grad()
def compare(expected: Expected, folder: Path, load: Callable[[Path], nn.Module], base: str) -> Closeness:
    """Load what was written into `folder`, compute `expected.texts`, and forget it. `base`: it was exported onto.

    Raises:
        UserError: it cannot be loaded, or does not compute.
    """
    remedy = "Write it again; if that does not help, report it, with `qlora doctor`"
    with warnings.catch_warnings(), guard("verify", "failed", "what was written cannot be loaded and run", remedy):
        warnings.simplefilter("ignore")  # of those who read the files: to their readers, not to ours
        with LOADING:
            model = load(folder).eval()
        kl, same, greedy, difference, squares, kept_squares = [], 0, 0, 0.0, [], []
        whole = expected.whole[base]
        for text, wanted, kept in zip(expected.texts, expected.logits, whole.logits, strict=True):
            got = _logits(model, text)
            kl.append(_kl(wanted, got))
            difference = max(difference, (wanted - got).abs().max().item())
            squares.append(_squares(wanted, got))
            kept_squares.append(_squares(kept, got))
            named = got.argmax(-1) == wanted.argmax(-1)
            same += int(named.sum())
            greedy += bool(text.written) and bool(named[-text.written - 1 : -1].all())
    every = torch.cat(kl)
    return Closeness(
        kl=every.mean().item(),
        largest_kl=every.max().item(),
        logit_error=_error(*map(sum, zip(*squares, strict=True))),
        logit_difference=difference,
        largest_logit=max(wanted.abs().max().item() for wanted in expected.logits),
        top1_agreement=same / len(every),
        greedy_equal=greedy,
        greedy_texts=sum(1 for text in expected.texts if text.written),
        tokens=len(every),
        kept_error=_error(*map(sum, zip(*kept_squares, strict=True))),
        noise=whole.noise,
    )


def tokenizer_problems(found: AdaptedSource, folder: Path, gguf: str | None = None) -> list[str]:
    """A line if the tokenizer in `folder`, or in the file `gguf` in it, makes other tokens of our prompts than that of
    the training.
    """
    trust = found.source.trust_remote_code
    with guard("verify", "failed", "the tokenizer that was written cannot be loaded", "Write it again"):
        written = (
            load_tokenizer(str(folder / gguf))
            if gguf
            else AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        )
    changed = [prompt for prompt in PROMPTS if prompt_ids(prompt, written) != prompt_ids(prompt, found.tokenizer)]
    rule = "the tokenizer that was written makes other tokens of it than that of the adapter"
    return [problem("verify", changed[0], rule, "Report it, with `qlora doctor`")] if changed else []


@dataclass(frozen=True)
class Limit:
    """How far an export may be: KL in nats a token, and the error of logits, which tells where all tokens are about as
    likely; NaN is too far.
    """

    kl: float
    logit_error: float = math.inf

    def holds(self, closeness: Closeness) -> bool:
        return closeness.kl <= self.kl and closeness.logit_error <= self.logit_error


# Of exports that lose nothing but rounding, by (what is written, what both compute in): 5 to 100 times what a trained
# SmolLM2 loses where float32 computes; where bf16 or fp16 does, the measurement itself is that coarse.
LOSSY = Limit(1.0)
ROUNDING = {
    ("fp32", "fp32"): Limit(1e-6, 1e-3),
    ("fp16", "fp32"): Limit(1e-4, 4e-2),
    ("bf16", "fp32"): Limit(3e-3, 0.15),
}
COARSE = {"fp32": ROUNDING["fp32", "fp32"], "fp16": Limit(1e-3, 0.1), "bf16": Limit(3e-2, 0.3)}


def usual_limit(exact: bool, written: str, computed: str) -> Limit:
    """The limit of an export.

    Args:
        exact: whether the format loses nothing but rounding.
        written: the dtype of the files.
        computed: that of the comparison.
    """
    return ROUNDING.get((written, computed), COARSE[computed]) if exact else LOSSY


def _logits(model: nn.Module, text: Text) -> Tensor:
    """[tokens, vocabulary] in float32."""
    logits: Tensor = model(input_ids=torch.tensor([text.ids]), use_cache=False).logits
    return logits[0].float()


def _kl(wanted: Tensor, got: Tensor) -> Tensor:
    """KL of every token in nats, [tokens]; in float64, a few tokens at a time: equal models differ by less than float32
    can tell.
    """
    pairs = zip(wanted.split(16), got.split(16), strict=True)
    logs = ((F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)) for p, q in pairs)
    return torch.cat([(log_p.exp() * (log_p - log_q)).sum(-1) for log_p, log_q in logs])
