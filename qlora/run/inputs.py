"""What a run reads: the model's place and tokenizer, records, tokens; everything that is wrong with them in one error.

    resolve -> quantization, tokenizer        read records -> split -> tokenize -> Inputs

`finetune` and `plan` call the same function. Checks of the caller's own run with it, so that a wrong output folder and
a wrong data file are said together. The alternative, to stop at the first problem, costs a start of the program each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from qlora.config.commands import FinetuneConfig
from qlora.config.shared import calibration_text
from qlora.data.batch import Batch, Example, by_length, pack
from qlora.data.doctor import refuse_endless
from qlora.data.order import split, step_indices
from qlora.data.records import read_records
from qlora.data.template import writes_date
from qlora.data.tokenize import Dataset, tokenize
from qlora.errors import UserError, problem
from qlora.models.limits import refuse_tokens, source_limits
from qlora.models.quantize import resolve_quantization
from qlora.models.source import Source, load_tokenizer, resolve
from qlora.specs import Quantization

T = TypeVar("T")


class _Missing(Exception):
    """A check needs what another one did not find, which has been told."""


class Result(Generic[T]):
    """What a check returned, if it did. Reading `value` where it did not ends the check that reads it."""

    def __init__(self, *values: T):
        self._values = values

    @property
    def value(self) -> T:
        """The result itself."""
        if not self._values:
            raise _Missing
        return self._values[0]


class Problems:
    """Collects what checks find, until all of it is raised at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def gather(self, check: Callable[[], T]) -> Result[T]:
        """The result of `check`, an empty one where it raised a UserError or needs an empty one."""
        try:
            return Result(check())
        except UserError as error:
            self.found += error.problems
        except _Missing:
            pass
        return Result()

    def refuse(self) -> None:
        """End with all that was found.

        Raises:
            UserError: something was.
        """
        if self.found:
            raise UserError(self.found)


@dataclass(frozen=True)
class Inputs:
    """The tokenized examples of a run, where they came from, and the model that they are for.

    Attributes:
        dataset: what became of the training data; `held_dataset`: of the held-out data, None without any.
        quantization: how the base is quantized, resolved: what an option that was not given means for this model.
        calibration: the text of `calibrate`, or that of the training.
        original: the model in 16 bits, where `source` is a 4-bit base that the run wrote of it.
        moment: what the chat template took for now; None where it writes no date.
    """

    train: list[Example]
    held_out: list[Example]
    dataset: Dataset
    held_dataset: Dataset | None
    source: Source
    tokenizer: PreTrainedTokenizerBase
    quantization: Quantization
    calibration: list[Example]
    moment: datetime | None = None
    original: Source | None = None

    @property
    def unquantized(self) -> Source:
        """Where the weights are before they are quantized."""
        return self.original or self.source


def read_inputs(
    config: FinetuneConfig,
    checks: Sequence[Callable[[], object]] = (),
    *,
    weights: bool = True,
    began: Callable[[], datetime | None] | None = None,
) -> Inputs:
    """Read everything that a run needs but the weights.

    Args:
        checks: functions that raise a UserError; what they find is told with the rest, and before it.
        weights: False if they need not be there.
        began: gives the moment whose date a template is to write, of a run that goes on; None: now.

    Raises:
        UserError: all that is wrong.
    """
    problems = Problems()
    calibrating, _ = calibration_text(config.calibrate)
    for check in checks:
        problems.gather(check)
    source = problems.gather(lambda: find_model(config, weights=weights))
    quantization = problems.gather(lambda: _resolved(source.value, config.quantization(), weights))
    problems.gather(lambda: begins_by_error(config, source.value))
    problems.gather(lambda: chooses_codes(config, source.value))
    problems.gather(lambda: _refuse_ambiguous(config.calibrate))
    tokenizer = problems.gather(lambda: load_tokenizer(source.value))
    found = problems.gather(lambda: read_records(config.data))
    shown = problems.gather(lambda: read_records(calibrating) if calibrating else [])
    more = problems.gather(lambda: read_records(config.eval_data) if config.eval_data else [])
    first = problems.gather(began or (lambda: None))
    problems.refuse()
    moment = (first.value or datetime.now().replace(microsecond=0)) if writes_date(tokenizer.value) else None
    records, held_out = found.value, more.value
    if config.eval_fraction > 0:
        records, held_out = split(records, config.eval_fraction, config.seed)
    train = problems.gather(lambda: tokens(config, tokenizer.value, records, moment))
    held = problems.gather(lambda: tokens(config, tokenizer.value, held_out, moment) if held_out else None)
    text = problems.gather(lambda: _calibration(config, tokenizer.value, shown.value))
    problems.gather(lambda: refuse_endless(train.value, config.data, allowed=config.allow_endless))
    limits = problems.gather(lambda: source_limits(source.value))
    problems.gather(lambda: refuse_tokens(limits.value, train.value.examples, tokenizer.value))
    problems.gather(lambda: refuse_tokens(limits.value, _examples(held.value), tokenizer.value, "eval_data"))
    problems.gather(lambda: refuse_tokens(limits.value, text.value, tokenizer.value, "calibrate"))
    problems.refuse()
    examples, dataset, held_dataset = train.value.examples, train.value, held.value
    return Inputs(
        train=examples,
        held_out=_examples(held_dataset),
        dataset=dataset,
        held_dataset=held_dataset,
        source=source.value,
        tokenizer=tokenizer.value,
        quantization=quantization.value,
        calibration=text.value or examples,
        moment=moment,
    )


def _examples(dataset: Dataset | None) -> list[Example]:
    return [] if dataset is None else dataset.examples


def _calibration(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, records: list[dict]) -> list[Example]:
    """The examples of calibration data, whose format need not be that of the training; none without records.

    Raises:
        UserError: the option with what is wrong.
    """
    return tokenize(records, tokenizer, max_tokens=config.max_tokens).examples if records else []


def _refuse_ambiguous(calibrate: str | None) -> None:
    """A number alone is how many tokens of the training data, unless it may be the name of the user's own data.

    Raises:
        UserError: something here bears it.
    """
    if calibrate is not None and calibration_text(calibrate)[0] is None and os.path.lexists(calibrate):
        remedy = f"Give `./{calibrate}` for the data, or data with its tokens such as train.jsonl:{calibrate}"
        raise UserError(problem("calibrate", calibrate, "is a number of tokens, and a name in this folder", remedy))


def find_model(config: FinetuneConfig, *, weights: bool = True) -> Source:
    """Where the model lies. Asked once by a command: for a hub id it is a question to the network."""
    return resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code, weights=weights)


def begins_by_error(config: FinetuneConfig, source: Source) -> bool:
    """Whether the adapters begin by undoing the base's error.

    Raises:
        UserError: they should, and the source has no 16-bit weights.
    """
    if source.packed and config.adapter_init == "error":
        rule, remedy = "the model is 4-bit already and has no 16-bit weights", "Leave it out, or use the original"
        raise UserError(problem("adapter_init", "error", rule, remedy))
    wanted = config.adapter_init != "zero" and config.bits == 4
    return wanted and not source.packed


def chooses_codes(config: FinetuneConfig, source: Source) -> bool:
    """Whether the run trains on a base of its own, with codes that its text chose.

    Raises:
        UserError: it should, and the source has no 16-bit weights.
    """
    if config.codes == "gptq" and source.packed:
        rule, remedy = "the model is 4-bit already and has no 16-bit weights", "Leave it out, or use the original"
        raise UserError(problem("codes", "gptq", rule, remedy))
    return config.codes == "gptq"


def _resolved(source: Source, quantization: Quantization, weights: bool) -> Quantization:
    """The options as they are, given or not; without weights as they were asked for."""
    return resolve_quantization(source, quantization) if weights else quantization


def tokens(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, records: list[dict], moment: datetime | None = None
) -> Dataset:
    """The examples of records, as the options say."""
    return tokenize(
        records,
        tokenizer,
        format=config.format,
        max_tokens=config.max_tokens,
        train_on_prompt=config.train_on_prompt,
        truncate=config.truncate,
        moment=moment,
    )


def micro_batches(config: FinetuneConfig, examples: list[Example], limit: int) -> Callable[[int], list[Batch]]:
    """The batches of a step as a function of its number (`plan.fit.peak_batches` looks through the same ones).

    Args:
        limit: how many examples the run sees.
    """
    examples_of = examples_of_step(config, examples, limit)

    def batches(step: int) -> list[Batch]:
        return [pack(batch) for batch in by_length(examples_of(step), config.batch_size)]

    return batches


def examples_of_step(config: FinetuneConfig, examples: list[Example], limit: int) -> Callable[[int], list[Example]]:
    """The examples of a step as a function of its number; `limit` as in `micro_batches`."""
    per_step = config.batch_size * config.accumulate
    return lambda step: [examples[i] for i in step_indices(len(examples), per_step, config.seed, step, limit)]
