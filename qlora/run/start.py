"""How the adapters of a run begin: with no effect, or by undoing the error of the quantized base.

    begin(model, config, inputs) -> Beginning     the text, the start (`calibrate.start`), its gap to 16 bits, in words

A resumed run takes its adapters from the checkpoint and begins nothing. The alternative, a start as a command of its
own that writes an adapter to go on from, would be left out by everybody who does not know of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from qlora.calibrate.error_start import LayerError, error_table
from qlora.calibrate.gap import Gap, can_measure, measure_gap
from qlora.calibrate.moments import forward_tokens, rectangles
from qlora.calibrate.start import start_by_error
from qlora.config.commands import FinetuneConfig
from qlora.config.shared import calibration_text
from qlora.data.batch import Example
from qlora.data.order import epoch_order
from qlora.layers.attach import named_adapters
from qlora.models.originals import originals
from qlora.run.inputs import Inputs
from qlora.run.watch import watched

RECORDS = 16  # that the gap is measured on, at most
GAP_TOKENS = 512  # of these records where the start took few, else an eighth of its own: three models compute each


@dataclass(frozen=True)
class Beginning:
    """What came of an error start. `gap` is None where not every 16-bit weight could be read."""

    layers: dict[str, LayerError]
    adapted: int
    tokens: int
    gap: Gap | None
    seconds: float
    verbose: bool = False  # tell each layer's error too

    @property
    def errors(self) -> tuple[float, float]:
        """The weighted error of a layer before and after, as a share of its output: means over layers."""
        count = max(1, len(self.layers))
        return (
            sum(layer.before for layer in self.layers.values()) / count,
            sum(layer.after for layer in self.layers.values()) / count,
        )

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        before, after = self.errors
        found = {"layer_error_base": before, "layer_error": after}
        if self.gap is not None:
            found |= {f"gap_{name}": value for name, value in dataclasses.asdict(self.gap).items()}
        return found

    def notes(self) -> dict[str, Any]:
        """For the card and qlora.json."""
        found: dict[str, Any] = {"adapter_init": f"error, from {self.tokens} tokens"}
        if self.gap is not None:
            found |= {"loss_over_16_bits_at_the_start": self.gap.loss - self.gap.loss16, "kl_at_the_start": self.gap.kl}
        return found

    def __str__(self) -> str:
        """For the summary before training."""
        before, after = self.errors
        started = f"{len(self.layers)} of {self.adapted} layers undo their quantization error"
        errors = f"{100 * before:.2f} % of the output, now {100 * after:.2f} %"
        text = f"start    {started} ({errors}), by {self.tokens:,} tokens in {self.seconds:.0f} s"
        if self.verbose:
            text = f"{text}\n{error_table(self.layers)}"
        if self.gap is None:
            return f"{text}\n         the gap to 16 bits is not measured: not every weight was found in the checkpoint"
        gap, percent = self.gap, 100 / self.gap.loss16
        over, was = (gap.loss - gap.loss16) * percent, (gap.loss_base - gap.loss16) * percent
        losses = f"loss {over:+.1f} % ({was:+.1f} % without the start), KL {gap.kl:.3g} ({gap.kl_base:.3g})"
        return f"{text}\n         to 16 bits: {losses}, on {gap.target_tokens:,} tokens"


def begin(model: PreTrainedModel, config: FinetuneConfig, inputs: Inputs) -> Beginning:
    """Give the fresh adapters of `model` the start that undoes the quantization error, in place."""
    began = time.monotonic()
    fill = forward_tokens(config.batch_size, config.max_tokens)
    tokens = calibration_text(config.calibrate)[1]
    batches = rectangles(inputs.calibration, tokens, config.seed, config.batch_size, fill)
    taken = sum(batch.numel() for batch in batches)
    weights = originals(inputs.unquantized)
    adapted = sum(1 for _ in named_adapters(model))
    with watched("start", adapted) as done:
        layers = start_by_error(model, weights, batches, done=done)
    records = _records(inputs, config.seed, max(GAP_TOKENS, taken // 8))
    gap = measure_gap(model, weights, records, config.batch_size, fill) if can_measure(model, weights) else None
    return Beginning(layers, adapted, taken, gap, time.monotonic() - began, config.verbose)


def _records(inputs: Inputs, seed: int, tokens: int) -> list[Example]:
    """A few held-out records of about so many tokens, one at least; where there are none, those of the training data
    that come last.
    """
    order = epoch_order(len(inputs.train), seed, 0)[-RECORDS:]
    records = inputs.held_out[:RECORDS] or [inputs.train[i] for i in order]
    before = itertools.accumulate((len(record.input_ids) for record in records), initial=0)
    return [record for record, count in zip(records, before, strict=False) if count < tokens]
