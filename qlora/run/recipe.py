"""The recipe of `qlora finetune`: from options to an adapter, one line a step.

    check what is cheap -> tokens -> base in NF4 -> adapter -> optimizer -> (checkpoint) -> train -> adapter/

Everything that can be wrong before the model is loaded is gathered and said at once. A run is known by what decides its
numbers (`run_identity`): a resume with another identity is refused, because its result would be neither run. The
alternative, to take over what the checkpoint says, would make flags that do nothing. The module is not named
finetune.py, since `qlora.finetune` is the function.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Batch, Example
from qlora.data.order import run_length
from qlora.errors import UserError
from qlora.evaluate import evaluate
from qlora.export.peft_write import save_adapter
from qlora.models.device import arithmetic_of, device_notes, products_of, resolve_device, resolve_dtype
from qlora.optim.adamw import PagedAdamW
from qlora.run.assemble import ModelSpec, assemble
from qlora.run.codes import base_of_run
from qlora.run.identity import check_same_run, moment_of, quantization_of, run_identity
from qlora.run.inputs import Inputs, begins_by_error, examples_of_step, micro_batches, read_inputs
from qlora.run.optimizer import adapter_optimizer
from qlora.run.output import check_output
from qlora.run.report import FinetuneResult, after, before, how_to_go_on, not_finite, outcome
from qlora.run.run import Run
from qlora.run.start import Beginning, begin
from qlora.specs import Quantization
from qlora.train.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from qlora.train.loop import Schedule, train
from qlora.train.metrics import require_tensorboard
from qlora.train.step import NotFinite, learning_rate, refuse_infinite_parameters


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune as `config` says; `config.output` then holds adapter/, checkpoints/, metrics.jsonl and config.yaml.

    What it prints cannot end it: a reader of stdout or stderr may go, a terminal may be closed.

    Raises:
        UserError: anything that is wrong with the options, the data, the model or the output folder.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, when a checkpoint is written; `resume` goes on from it.
    """
    with Run(config) as run:
        inputs = read_inputs(config, cheap_checks(run), began=lambda: moment_of(run.checkpoint))
        length = run_length(
            len(inputs.train),
            config.batch_size * config.accumulate,
            steps=config.steps,
            epochs=config.epochs,
            warmup=config.warmup,
        )
        checkpoint = run.checkpoint
        identity = run_identity(config, inputs, length, arithmetic_of(config.dtype, run.device), checkpoint)
        if checkpoint is not None:
            check_same_run(identity, checkpoint)
        run.keep_memory(inputs)
        config = run.config  # with settings that keep the budget
        if config.codes == "gptq":
            inputs = base_of_run(config, inputs, run.keep_place(), resolve_dtype(config.dtype, run.device), run.device)

        parts = build(config, inputs, length, run.device, run.output, checkpoint)
        model, optimizer = parts.model, run.own(parts.optimizer)
        first = 0 if checkpoint is None else load_checkpoint(checkpoint, model, optimizer)["step"]
        notes = {"data": config.data, "examples": len(inputs.train), "steps": length["steps"]}
        notes |= {"learning_rate": config.learning_rate, "seed": config.seed}
        print(before(config, inputs, model, optimizer, first, length["steps"]), flush=True)
        started = {} if parts.beginning is None else parts.beginning.metrics()
        if parts.beginning is not None:
            notes |= parts.beginning.notes()
            print(parts.beginning, flush=True)
        elif checkpoint is None and config.bits == 4 and config.adapter_init == "auto":
            print("start    adapters of no effect: a model that is 4-bit already has no 16-bit weights", flush=True)

        def save(step: int) -> None:
            refuse_infinite_parameters(model, step)
            log.sync()
            saved = save_checkpoint(run.keep_place(), step, model, optimizer, identity, inputs.tokenizer, notes=notes)
            run.saved(saved, passing=not parts.schedule.saves_after(step))
            drop_checkpoints(saved, config.keep_checkpoints)

        def held_out_loss(before_batch: Callable[[], None]) -> float:
            return evaluate(model, inputs.held_out, config.batch_size, before_batch=before_batch).loss

        precision = products_of(config.dtype, run.device)
        with precision, stops_explained(run, parts), run.begin(first, length["steps"]) as log:
            if started and not inputs.held_out:
                log({"step": 0, "tokens": 0, "memory_bytes": run.memory.peak()} | started)
            train(
                model,
                optimizer,
                parts.batches,
                parts.schedule.after(first, log.totals),
                log=lambda line: log(line | started if line["step"] == 0 else line),
                evaluate=held_out_loss if inputs.held_out else None,
                save=save,
                memory=run.memory,
            )
            result = outcome(run.keep_place(), log.totals, length["steps"], run.seconds, run.predicted_bytes)
            done, notes = length["steps"], notes | result.losses()
            save_adapter(model, result.adapter, inputs.tokenizer, notes=notes, step=done, run=identity)
        print(after(result, run.memory.peak(), config.memory), flush=True)
    return result


@contextmanager
def stops_explained(run: Run, parts: Parts) -> Iterator[None]:
    """Say how to go on when training is interrupted, or meets a number that is not finite.

    Raises:
        UserError: in place of NotFinite, with the examples of the step.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if run.begun:
            print(how_to_go_on(run.output, run.requested.output, stop), file=sys.stderr, flush=True)
        raise
    except NotFinite as error:
        examples = parts.examples(error.step - 1) if error.skippable else []
        raise UserError(not_finite(error, examples, run.output, run.requested.output)) from error


def cheap_checks(run: Run) -> list[Callable[[], Any]]:
    """What can be found out before anything is read."""
    checks: list[Callable[[], Any]] = [
        lambda: check_output(run.requested.resume, run.output),
        lambda: resolve_device(run.requested.device),
    ]
    return [*checks, require_tensorboard] if run.requested.tensorboard else checks


@dataclass(frozen=True)
class Parts:
    """What a run trains with."""

    model: PreTrainedModel
    optimizer: PagedAdamW
    batches: Callable[[int], list[Batch]]
    schedule: Schedule
    examples: Callable[[int], list[Example]]  # of a step
    beginning: Beginning | None = None  # of adapters that undo the error of the base


def build(
    config: FinetuneConfig,
    inputs: Inputs,
    length: dict[str, int],
    device: torch.device,
    folder: Path,
    checkpoint: Path | None = None,
) -> Parts:
    """Everything that the options decide about training, before its first step.

    Args:
        length: see `run_length`.
        folder: where optimizer state may spill to.
        checkpoint: what the run goes on from, which tells the adapters how they began.

    Raises:
        UserError: see `assemble` and `PagedAdamW`.
    """
    dtype = resolve_dtype(config.dtype, device)
    if config.dtype == "auto":
        for note in device_notes(device, dtype):
            print(f"device   {note}", file=sys.stderr, flush=True)
    made = quantization_of(config, checkpoint) if inputs.original is None else Quantization(4)  # as the run's base is
    spec = ModelSpec(made, config.adapter(), dtype, config.gradient_checkpointing, config.packing, config.seed)
    model = assemble(inputs.source, spec, device)
    beginning = None
    if checkpoint is None and begins_by_error(config, inputs.unquantized):
        with products_of(config.dtype, device):
            beginning = begin(model, config, inputs)
    optimizer = adapter_optimizer(model, config.optimizer(), folder)
    examples = examples_of_step(config, inputs.train, length["examples"])
    batches = micro_batches(config, inputs.train, length["examples"])
    rate = functools.partial(
        learning_rate, steps=length["steps"], peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule
    )
    schedule = Schedule(
        length["steps"],
        rate,
        clip=config.clip,
        eval_every=config.eval_every,
        save_every=config.save_every,
        save_seconds=60 * config.save_minutes,
        skips=config.on_nan == "skip",
    )
    return Parts(model, optimizer, batches, schedule, examples, beginning)
