"""The recipe of `qlora finetune`: from options to an adapter, one line a step.

    check what is cheap -> tokens -> base in NF4 -> adapter -> optimizer -> (checkpoint) -> train -> adapter/

Everything that can be wrong before the model is loaded is gathered and said at once. A run is known by what decides its
numbers (`run_identity`): a resume with another identity is refused, because its result would be neither run. The
alternative, to take over what the checkpoint says, would make flags that do nothing. The module is not named
finetune.py, since `qlora.finetune` is the function.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from qlora.adapter_files import save_adapter
from qlora.adapters import adapter_parameters, attach_adapters, named_adapters
from qlora.checkpoint import drop_checkpoints, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from qlora.config import FinetuneConfig, PlanConfig, to_yaml
from qlora.data import (
    Batch,
    Dataset,
    Example,
    by_length,
    collate,
    read_records,
    run_length,
    split,
    step_indices,
    tokenize,
)
from qlora.errors import UserError, problem
from qlora.evaluate import evaluate
from qlora.files import disk_full, disk_problem, remove_partial
from qlora.loss import layout_of
from qlora.model import LinearLayers, load_base, resolve_device, resolve_dtype
from qlora.optim import PagedAdamW
from qlora.plan import plan_command, table, within
from qlora.sources import load_tokenizer, resolve
from qlora.train import (
    Interrupted,
    MetricsLog,
    PeakMemory,
    checkpoint_activations,
    cut_back,
    duration,
    learning_rate,
    require_tensorboard,
    train,
)

# Options that may change between the parts of a run. `model` and `data` may lie elsewhere, but must be the same: the
# base's fingerprint and the tokens are compared. `steps` and `epochs` are compared where the schedule depends on them.
FREE_TO_CHANGE = {
    "data",
    "device",
    "epochs",
    "eval_data",
    "eval_every",
    "gradient_checkpointing",
    "keep_checkpoints",
    "memory",
    "model",
    "optimizer_memory",
    "output",
    "resume",
    "revision",
    "save_every",
    "steps",
    "tensorboard",
    "trust_remote_code",
}


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to. `loss` is the last step's; evaluations are None without held-out data. Seconds, bytes:
    `memory_bytes` is the measured peak of the process, `predicted_bytes` the plan's, None without --memory.
    """

    output: Path
    adapter: Path
    steps: int
    tokens: int
    loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    seconds: float
    memory_bytes: int
    predicted_bytes: int | None = None


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

        model = load_base(
            config.model,
            bits=config.bits,
            dtype=config.dtype,
            device=config.device,
            blocksize=config.blocksize,
            double_quant=config.double_quant,
            scales=config.scales,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
        )
        base_bytes = model.get_memory_footprint()
        set_seed(config.seed)
        attach_adapters(
            model,
            method=config.method,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            targets=config.targets,
            rslora=config.rslora,
        )
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


# ---------------------------------------------------------------- the output folder

OWN_FILES = {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold the output folder for this process alone; made if need be, and taken away again if it stays empty.

    The kernel drops the lock with the process, however that ends. Raises: UserError if it cannot be had.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(disk_problem(output, error)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        remedy = "Wait for that run, or choose another folder"
        raise UserError(problem("output", output, "another run is writing to it", remedy)) from None
    try:
        yield
    finally:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        os.close(handle)


@contextmanager
def room_on_disk(output: Path) -> Iterator[None]:
    """A full disk is said in one line, wherever it was met."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise UserError(disk_problem(output, error)) from error
        raise


def check_output(config: FinetuneConfig, output: Path) -> None:
    """The folder is empty, or holds an earlier run and --resume was given.

    What a run left behind that ended before its first checkpoint is no run: it may be written over.
    """
    if not os.access(output, os.W_OK):
        raise UserError(problem("output", output, "cannot be written", "Choose a folder you may write to"))
    remove_partial(output)
    remove_partial(output / "checkpoints")
    held = sorted(path.name for path in output.iterdir())
    checkpoint = latest_checkpoint(output)
    if config.resume:
        if checkpoint is None:
            rule = f"{output} holds no checkpoint to go on from"
            raise UserError(problem("resume", True, rule, "Start without --resume"))
    elif checkpoint is not None or "adapter" in held:
        what = f"its last checkpoint is {checkpoint.name}" if checkpoint is not None else "it has an adapter"
        remedy = "Go on with --resume, or choose another folder"
        raise UserError(problem("output", output, f"holds an earlier run; {what}", remedy))
    elif foreign := [name for name in held if name not in OWN_FILES]:
        raise UserError(problem("output", output, f"is not empty ({', '.join(foreign[:5])})", "Choose another folder"))


def begin_output(config: FinetuneConfig, output: Path, first: int) -> None:
    """Write the resolved config, reusable with --config, and cut the metrics back to the checkpoint's step."""
    (output / "config.yaml").write_text(to_yaml(dataclasses.replace(config, resume=False)), encoding="utf-8")
    cut_back(output / "metrics.jsonl", first if first > 0 else -1)


# ---------------------------------------------------------------- what goes in


@dataclass(frozen=True)
class Data:
    """The tokenized examples of a run, where they came from, and how the base is quantized (`LinearLayers`), resolved."""

    train: list[Example]
    held_out: list[Example]
    source: Dataset
    quantization: dict[str, int | bool | str | None]


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
    code = config.trust_remote_code
    source = gather(lambda: resolve(config.model, config.revision))
    layers = tokenizer = None
    if source is not None:
        layers = gather(lambda: LinearLayers(source, config.bits, config.blocksize, config.double_quant, config.scales))
        tokenizer = gather(lambda: load_tokenizer(config.model, trust_remote_code=code, revision=config.revision))
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
    quantization = {"blocksize": layers.blocksize, "double_quant": layers.double_quant, "scales": layers.scales}
    return tokenizer, Data(made.examples, held, made, quantization)


def tokens(config: FinetuneConfig, tokenizer, records: list[dict]) -> Dataset:
    return tokenize(
        records,
        tokenizer,
        format=config.format,
        max_tokens=config.max_tokens,
        train_on_prompt=config.train_on_prompt,
        truncate=config.truncate,
    )


def planned(config: PlanConfig) -> dict[str, Any]:
    """`qlora plan` (see `plan.plan_command`), with --data of the batches that this run would have."""
    if config.data is None:
        return plan_command(config)
    tokenizer = load_tokenizer(
        config.model, trust_remote_code=config.trust_remote_code, revision=config.revision, weights=False
    )
    records, held_out = read_records(config.data), read_records(config.eval_data) if config.eval_data else []
    if config.eval_fraction > 0:
        records, held_out = split(records, config.eval_fraction, config.seed)
    held = tokens(config, tokenizer, held_out).examples if held_out else []
    return plan_command(config, tokens(config, tokenizer, records).examples, held)


def micro_batches(config: FinetuneConfig, examples: list[Example], limit: int) -> Callable[[int], list[Batch]]:
    """The batches of a step as a function of its number (`plan.largest` looks through the same ones)."""
    per_step = config.batch_size * config.accumulate

    def batches(step: int) -> list[Batch]:
        chosen = [examples[i] for i in step_indices(len(examples), per_step, config.seed, step, limit)]
        return [collate(batch) for batch in by_length(chosen, config.batch_size)]

    return batches


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


# ---------------------------------------------------------------- the same run


def run_identity(config: FinetuneConfig, data: Data, length: dict[str, int]) -> dict[str, Any]:
    """What decides the numbers of a run: its options, its tokens, its length."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}
    options |= data.quantization  # as it is, given or not
    options["dtype"] = resolve_dtype(config.dtype, resolve_device(config.device))  # auto depends on the machine
    digest = hashlib.sha256()
    for example in data.train:
        digest.update(struct.pack("q", len(example.ids)) + array("q", example.ids).tobytes())
        digest.update(bytes(map(bool, example.targets)))
    return {"options": options, "length": length, "data": {"examples": len(data.train), "sha256": digest.hexdigest()}}


def check_same_run(identity: dict[str, Any], checkpoint: Path) -> None:
    """Raises: UserError with every difference from the run that wrote `checkpoint`."""
    state = read_state(checkpoint)
    began, done = state["run"], state["step"]
    now = identity["options"]
    was = {"scales": now["scales"] and "absmax"} | began[
        "options"
    ]  # checkpoints from before that option do not name it
    anew = "or start anew in another folder"
    problems = [
        problem(name, now.get(name), f"the run began with {name}={was.get(name)}", f"Resume with that, {anew}")
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if not problems and began["data"] != identity["data"]:
        first, these = began["data"]["examples"], identity["data"]["examples"]
        rule = f"the run began on {first} training examples that are not these {these}"
        problems.append(problem("data", "(changed)", rule, f"Resume with that data and the same tokenizer, {anew}"))
    if not problems and began["length"] != identity["length"]:
        problems += _length_problems(began["length"], identity["length"], done, was)
    if problems:
        raise UserError(problems)


def _length_problems(was: dict[str, int], now: dict[str, int], done: int, options: dict[str, Any]) -> list[str]:
    """Whether a run of length `was` can become one of length `now` after `done` steps and be the same run so far."""
    seen = done * options["batch_size"] * options["accumulate"]
    if options["schedule"] != "constant":
        laid_out = f"{was['steps']} steps and {was['examples']} examples"
        rule = f"the {options['schedule']} schedule was laid out for {laid_out}, not for {now['examples']}"
        remedy = "Resume with the same --steps or --epochs; only a run with --schedule constant can change its length"
    elif now["steps"] < done:
        rule = f"the run has taken {done} steps already"
        remedy = "Give at least as many, or start anew in another folder"
    elif min(seen, was["examples"]) != min(seen, now["examples"]):
        rule = "the last step of the run was a short one, as it ended with an epoch"
        remedy = "Start anew in another folder"
    else:
        return []
    return [problem("steps", now["steps"], rule, remedy)]


# ---------------------------------------------------------------- what is said


def before(
    config: FinetuneConfig,
    data: Data,
    model: torch.nn.Module,
    optimizer: PagedAdamW,
    base_bytes: int,
    first: int,
    steps: int,
) -> str:
    """The summary before training."""
    pager = optimizer.pager
    spilled = f", {pager.spilled / 1e6:.1f} MB of it spilled" if pager.spilled else ""
    trained, adapters = sum(p.numel() for p in adapter_parameters(model)), sum(1 for _ in named_adapters(model))
    base, source = model.qlora_base, data.source
    fitted = " with mse scales" if base.scales == "mse" else ""
    kind = f"NF4 in blocks of {base.blocksize}{fitted}" if base.bits == 4 else f"{base.dtype}"
    held = f", {len(data.held_out)} held out" if data.held_out else ""
    lost = f", {source.truncated} cut to {config.max_tokens} tokens" if source.truncated else ""
    lost += f", {source.dropped} dropped" if source.dropped else ""
    lost += f", {source.skipped_turns} assistant turns not trained on" if source.skipped_turns else ""
    going = f", going on from step {first}" if first else ""
    laid = "end to end without padding" if layout_of(model).packed else "padded to one length"
    lines = [
        ("model", f"{config.model}: {kind}, {base_bytes / 1e6:.0f} MB, computed in {base.dtype} on {model.device}"),
        ("adapter", f"{config.method} of rank {config.rank} on {adapters} layers, {trained:,} trainable parameters"),
        ("state", f"AdamW in {config.optimizer_state}, {(pager.resident + pager.spilled) / 1e6:.1f} MB{spilled}"),
        ("data", f"{config.data} ({source.format}): {len(data.train)} examples{held}{lost}"),
        ("", f"{source.tokens:,} tokens, {source.target_tokens:,} of them count in the loss"),
        ("steps", f"{steps} of {config.batch_size * config.accumulate} examples, {laid}{going}"),
    ]
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def after(result: FinetuneResult) -> str:
    """The summary after training; the command line adds what can be done next."""
    lines = []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        lines.append(("held out", f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    lines.append(("time", f"{duration(result.seconds)}, peak memory {result.memory_bytes / 1e9:.2f} GB"))
    lines.append(("adapter", str(result.adapter)))
    return "\n".join(f"{name:8} {text}" for name, text in lines)


def how_to_go_on(step: int, output: str) -> str:
    """What to type after an interruption."""
    command = f"qlora finetune --config {shlex.quote(os.path.join(output, 'config.yaml'))}"
    if latest_checkpoint(output) is None:
        return f"Stopped before the first step; nothing was lost. Start again:\n    {command}"
    return f"Stopped after step {step}, with a checkpoint. Go on:\n    {command} --resume"


def summarize(output: Path, seconds: float, predicted: int | None) -> FinetuneResult:
    """The result, from metrics.jsonl: a resumed run counts with all its parts (but for the time)."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return FinetuneResult(
        output=output,
        adapter=output / "adapter",
        steps=steps[-1]["step"],
        tokens=sum(line["tokens"] for line in steps),
        loss=steps[-1]["loss"],
        eval_loss_before=lines[0].get("eval_loss") if lines[0]["step"] == 0 else None,
        eval_loss_after=evaluations[-1] if evaluations else None,
        seconds=seconds,
        memory_bytes=max(line["memory_bytes"] for line in lines),
        predicted_bytes=predicted,
    )
