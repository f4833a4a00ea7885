"""TODO head of run.inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Batch, Example, by_length, collate
from qlora.data.order import split, step_indices
from qlora.data.records import read_records
from qlora.data.tokenize import Dataset, tokenize
from qlora.errors import UserError
from qlora.models.device import resolve_device
from qlora.models.quantize import resolve_quantization
from qlora.models.source import Source, load_tokenizer, resolve
from qlora.run.output import check_output
from qlora.specs import Quantization
from qlora.train.metrics import require_tensorboard


@dataclass(frozen=True)
class Data:
    """The tokenized examples of a run, where they came from, and how the base is quantized, resolved."""

    train: list[Example]
    held_out: list[Example]
    source: Dataset
    model: Source
    quantization: Quantization


def read_data(config: FinetuneConfig, output: Path):
    """(tokenizer, Data), after a look at everything else that is cheap to find out.

    Raises: UserError with all that is wrong.
    """
    problems: list[str] = []

    def gather(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except UserError as error:
            problems.extend(error.problems)
            return None

    gather(lambda: check_output(config, output))
    gather(lambda: resolve_device(config.device))
    if config.tensorboard:
        gather(require_tensorboard)
    source = gather(lambda: resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code))
    quantization, tokenizer = config.quantization(), None
    if source is not None:
        quantization = gather(lambda: resolve_quantization(source, config.quantization()))
        tokenizer = gather(lambda: load_tokenizer(source))
    records = gather(lambda: read_records(config.data))
    held_out = gather(lambda: read_records(config.eval_data)) if config.eval_data else []
    if problems:
        raise UserError(problems)
    if config.eval_fraction > 0:
        records, held_out = split(records, config.eval_fraction, config.seed)
    made = gather(lambda: tokens(config, tokenizer, records))
    held = gather(lambda: tokens(config, tokenizer, held_out).examples) if held_out else []
    if problems:
        raise UserError(problems)
    return tokenizer, Data(made.examples, held, made, source, quantization)


def tokens(config: FinetuneConfig, tokenizer, records: list[dict]) -> Dataset:
    return tokenize(
        records,
        tokenizer,
        format=config.format,
        max_tokens=config.max_tokens,
        train_on_prompt=config.train_on_prompt,
        truncate=config.truncate,
    )


def micro_batches(config: FinetuneConfig, examples: list[Example], limit: int) -> Callable[[int], list[Batch]]:
    """The batches of a step as a function of its number (`plan.largest` looks through the same ones)."""
    per_step = config.batch_size * config.accumulate

    def batches(step: int) -> list[Batch]:
        chosen = [examples[i] for i in step_indices(len(examples), per_step, config.seed, step, limit)]
        return [collate(batch) for batch in by_length(chosen, config.batch_size)]

    return batches
