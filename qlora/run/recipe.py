"""The recipe of `qlora finetune`: from options to an adapter, one line a step.

    check what is cheap -> tokens -> base in NF4 -> adapter -> optimizer -> (checkpoint) -> train -> adapter/

Everything that can be wrong before the model is loaded is gathered and said at once. A run is known by what decides its
numbers (`run_identity`): a resume with another identity is refused, because its result would be neither run. The
alternative, to take over what the checkpoint says, would make flags that do nothing. The module is not named
finetune.py, since `qlora.finetune` is the function.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from transformers import set_seed

from qlora.config.commands import FinetuneConfig
from qlora.data.order import run_length
from qlora.evaluate import evaluate
from qlora.export.peft_write import save_adapter
from qlora.layers.attach import adapter_parameters, attach, named_adapters
from qlora.models.device import resolve_device
from qlora.models.load import load_source
from qlora.optim.adamw import PagedAdamW
from qlora.plan.say import table, within
from qlora.run.identity import check_same_run, run_identity
from qlora.run.inputs import micro_batches, read_data
from qlora.run.output import begin_output, claimed, room_on_disk
from qlora.run.report import FinetuneResult, after, before, how_to_go_on, summarize
from qlora.train.checkpoint import drop_checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from qlora.train.loop import train
from qlora.train.memory import PeakMemory
from qlora.train.metrics import MetricsLog
from qlora.train.signals import Interrupted
from qlora.train.step import checkpoint_activations, learning_rate


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune as `config` says; `config.output` then holds adapter/, checkpoints/, metrics.jsonl and config.yaml.

    Raises:
        UserError: anything that is wrong with the options, the data, the model or the output folder.
        Interrupted: after Ctrl-C, when a checkpoint is written; --resume goes on from it.
    """
    began = time.monotonic()
    output = Path(config.output).absolute()
    with claimed(output), room_on_disk(output), ExitStack() as owned:
        tokenizer, data = read_data(config, output)
        checkpoint = latest_checkpoint(output) if config.resume else None
        length = run_length(config, len(data.train))
        steps = length["steps"]
        identity = run_identity(config, data, length)
        if checkpoint is not None:
            check_same_run(identity, checkpoint)
        memory = owned.enter_context(hold(config))
        asked, plan, baseline = config, None, 0
        if config.memory is not None:
            config, plan, baseline = within(config, data.train, data.held_out)
            print(f"memory   {config.memory / 1e6:.0f} MB: {plan.settings.flags()}\n{table(plan)}", flush=True)

        model = load_source(data.model, config.quantization(), dtype=config.dtype, device=config.device)
        base_bytes = model.get_memory_footprint()
        set_seed(config.seed)
        attach(model, config.adapter())
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        optimizer = owned.enter_context(closing(adamw(model, config)))
        first = load_checkpoint(checkpoint, model, optimizer)["step"] if checkpoint is not None else 0

        begin_output(asked, output, first)
        print(before(config, data, model, optimizer, base_bytes, first, steps), flush=True)
        notes = {"data": config.data, "examples": len(data.train), "steps": steps}
        notes |= {"learning_rate": config.learning_rate, "seed": config.seed}
        with MetricsLog(output / "metrics.jsonl", steps=steps, first=first, tensorboard=config.tensorboard) as log:

            def save(step: int) -> None:
                log.sync()
                saved = save_checkpoint(output, step, model, optimizer, identity, tokenizer, notes=notes)
                drop_checkpoints(saved, config.keep_checkpoints)

            def held_out_loss() -> float:
                return evaluate(model, data.held_out, config.batch_size).loss

            try:
                train(
                    model,
                    optimizer,
                    micro_batches(config, data.train, length["examples"]),
                    steps=steps,
                    first=first,
                    clip=config.clip,
                    log=log,
                    save=save,
                    save_every=config.save_every,
                    rate=lambda step: learning_rate(step, steps, config.learning_rate, config.warmup, config.schedule),
                    evaluate=held_out_loss if data.held_out else None,
                    eval_every=config.eval_every,
                    memory=memory,
                )
            except Interrupted as stop:
                print(how_to_go_on(stop.step, config.output), file=sys.stderr, flush=True)
                raise
        result = summarize(output, time.monotonic() - began, None if plan is None else plan.peak + baseline)
        measured = ("tokens", "loss", "eval_loss_before", "eval_loss_after")
        notes |= {name: getattr(result, name) for name in measured}
        save_adapter(model, result.adapter, tokenizer, notes=notes)
    print(after(result), flush=True)
    if plan is not None:
        predicted = f"predicted {result.predicted_bytes / 1e6:.0f} MB, measured {memory.peak() / 1e6:.0f} MB"
        print(f"memory   {predicted}, of {config.memory / 1e6:.0f} MB", flush=True)
    return result


def hold(config: FinetuneConfig) -> PeakMemory:
    """The peak of this process, kept to `config.memory`: on CUDA no more can be allocated, on a CPU freed memory goes
    back to the system.
    """
    device = resolve_device(config.device)
    if config.memory is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory / total), device)
    return PeakMemory(device, limit=config.memory)


def adamw(model: torch.nn.Module, config: FinetuneConfig) -> PagedAdamW:
    """AdamW over the adapters; what of its state is spilled lies on the disk of the output folder.

    Weight decay pulls on A and B only: magnitudes pulled to 0 would shrink the base too.
    """
    magnitudes = {id(adapter.magnitude) for _, adapter in named_adapters(model)}
    parameters = adapter_parameters(model)
    groups = [
        {"params": [p for p in parameters if id(p) not in magnitudes], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) in magnitudes], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    options |= {"memory": config.optimizer_memory, "state": config.optimizer_state, "folder": config.output}
    return PagedAdamW([group for group in groups if group["params"]], **options)
