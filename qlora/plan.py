"""What a fine-tuning run needs in memory, from the model's config and the options alone: no weights, no data.

    peak = max(loading, training, training)     training = model + adapters + gradients + optimizer + activations + workspace
                                  loading = model + its two largest tensors; libraries (what they take at first use) in
                                  both

What lies still is counted from the shapes of the whole model, built on the meta device. What a step needs in passing is
found by running the step itself, `loss_sum` and its backward pass, on meta tensors of the largest micro-batch, with an
account of every storage that comes and goes (`Account`). Three layers and two are run and the difference is that of
every further layer; layers that are not alike are all run. So the plan follows the code and knows every architecture
that trains. The alternative, a formula of bytes a layer, is faster but has to be kept true by hand for each of them,
and cannot know what a backward pass holds at its worst moment.

On a CPU the figures are anonymous memory (RssAnon) above the process' baseline after its imports, without what is freed
but kept by
glibc: a process with a budget gives that back when memory comes near it (`train.PeakMemory`), one without peaks higher
by a fifth. On CUDA they are allocated bytes, by the same account, which no card has verified yet.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora import linear, loss
from qlora.adapters import attach_adapters, linear_names, match_targets
from qlora.config import FinetuneConfig, PlanConfig
from qlora.data import Batch, Example, by_length, collate, run_length, step_indices
from qlora.errors import UserError, problem
from qlora.evaluate import token_sums
from qlora.fused import fuse
from qlora.linear import NF4Linear
from qlora.model import DTYPES, LinearLayers, resolve_dtype
from qlora.nf4 import PART_KEYS
from qlora.optim import state_bytes
from qlora.sources import load_config, resolve, stored_types
from qlora.train import anonymous_memory, checkpoint_activations, return_freed_memory
from qlora_kernels import ops

# CPU: oneDNN's compiled kernels, modules imported at first use, threads; measured (scripts/measure_plan.py)
LIBRARIES = 100_000_000
SHAPES = 20_000_000  # and more kernels where each batch has another number of tokens (`model.bound_kernel_caches`)
MARGIN = 0.1  # what a budget leaves free of a predicted peak


# ---------------------------------------------------------------- an account of storages


class Account(TorchDispatchMode):
    """Bytes of the meta storages that operations have made since it was entered and that still live: `now`, and their
    `peak`.

    Storages in `known` are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    self.now += self._live[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


# ---------------------------------------------------------------- what a step needs in passing


@dataclass(frozen=True)
class Step:
    """Bytes of what passes: `kept` from the forward to the backward pass, `passing` on top of it at the worst moment
    (gradients not counted), `evaluating` all that an evaluation takes.
    """

    kept: int
    passing: int
    evaluating: int


def run_on_meta(model: nn.Module, batch: Batch) -> Step:
    """Forward and backward pass of one micro-batch, and an evaluation of it, on the meta device."""
    linear.forget_scratch("meta")
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with Account([*model.parameters(), *model.buffers()]) as account:
        total = loss.loss_sum(model.train(), batch)
        forward = account.now
        total.backward()
        del total
        kept, peak = forward - account.now, account.peak
        account.peak = account.now
        with torch.no_grad():
            for _ in token_sums(model.eval(), batch):
                pass
    for hook in hooks:
        hook.remove()
    linear.forget_scratch("meta")
    return Step(kept, peak - kept, account.peak)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


# ---------------------------------------------------------------- the model without its weights


class Skeleton:
    """The model of a run on the meta device: the exact sizes of all that lies still, and steps of any micro-batch.
    `real`: it runs on records, whose batches differ in length.

    Raises:
        UserError: the model, its targets or its type are wrong.
    """

    def __init__(self, config: FinetuneConfig, real: bool = False):
        self.step, self._runnable = functools.cache(self.step), functools.cache(self._runnable)  # that go with it
        self.options = config
        self.device = device_of(config.device)
        self.libraries = LIBRARIES + SHAPES * real if self.device == "cpu" else 0
        name = config.dtype
        if name == "auto":
            name = (
                "bf16"
                if self.device == "cuda" and not torch.cuda.is_available()
                else resolve_dtype(name, torch.device(self.device))
            )
        self.dtype = DTYPES[name]
        self.source = resolve(config.model, config.revision, weights=False)
        self.config = load_config(self.source, config.trust_remote_code)
        stated = getattr(self.config, "dtype", None)  # before transformers writes ours over it
        model = self._build(self.config)
        modules = dict(model.named_modules())
        layers = [
            modules[name]
            for name in (linear_names(model) if config.bits == 16 else modules)
            if name and _is_weight(modules[name])
        ]
        layers = [layer for layer in layers if config.bits == 16 or isinstance(layer, NF4Linear)]
        constants = [
            t for layer in layers if config.bits == 4 for t in (layer.absmax, layer.nested_absmax, layer.nested_offset)
        ]
        quantized = {id(layer.weight) for layer in layers}
        rest = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.weights, self.constants = _bytes(layer.weight for layer in layers), _bytes(constants)
        self.others = _bytes(rest.values()) - self.weights - self.constants
        here = [] if config.bits == 16 or self.source.packed else [*(layer.weight for layer in layers), *constants]
        self.mapped = self._mapped(model, here, stated) if self.device == "cpu" and self.source.gguf is None else 0
        sizes = [numel(layer) * self.dtype.itemsize for layer in layers]
        sizes += [_bytes([t]) for key, t in rest.items() if key not in quantized]
        self.loading = sum(sorted(sizes)[-2:])
        self.targets = match_targets(model, config.targets)
        r, dora = config.rank, config.method == "dora"
        shapes = [out_in(modules[name]) for name in self.targets]
        self.adapters = [
            n for out, columns in shapes for n in (r * columns, out * r)
        ]  # in the order of the optimizer's groups
        self.adapters += [out for out, _ in shapes if dora]
        self.adapter_bytes = 4 * sum(self.adapters)
        self.count, self.alike = self._layers(model)

    def _build(self, architecture) -> nn.Module:
        config = self.options
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=self.dtype, trust_remote_code=config.trust_remote_code
            )
        LinearLayers(
            dataclasses.replace(self.source, packed=False), config.bits, config.blocksize, config.double_quant
        ).prepare(model)
        model.requires_grad_(False)
        model.config.use_cache = False
        return model

    def _mapped(self, model: nn.Module, quantized_here: list[Tensor | None], stated: torch.dtype | None) -> int:
        """Bytes that stay in the checkpoint's files: of what is used in the type that it is stored in. The files'
        headers tell that type; the config, which can be wrong or silent, only where the files are not here.
        """
        there = dict(model.named_parameters(remove_duplicate=False))
        stored = stored_types(self.source) or dict.fromkeys(there, stated)
        made, held = {id(t) for t in quantized_here}, {}
        for name, tensor in (there | dict(model.named_buffers())).items():
            layer, _, part = name.rpartition(".")
            key = f"{layer}.weight.{part}" if part in PART_KEYS else name
            kind = stored.get(
                key, stored.get(key.removeprefix(f"{model.base_model_prefix}."))
            )  # as GPT-2's own file has it
            if kind == tensor.dtype and id(tensor) not in made:
                held[id(tensor)] = tensor
        return _bytes(held.values())

    def _layers(self, model: nn.Module) -> tuple[int, bool]:
        """How many layers there are, and whether one tells what another needs."""
        text = self.config.get_text_config()
        count = text.num_hidden_layers
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if len(found) != 1 or count <= 3 or len(set(getattr(text, "layer_types", None) or [0])) > 1:
            return count, False
        name, layers = found[0]

        def tells(i: int) -> list:
            prefix = f"{name}.{i}."
            shapes = [
                (n, type(m), [tuple(t.shape) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None])
                for n, m in layers[i].named_modules()
            ]
            return [shapes, [target.removeprefix(prefix) for target in self.targets if target.startswith(prefix)]]

        return count, all(tells(i) == tells(0) for i in range(1, count))

    def step(self, lengths: tuple[int, ...], checkpointing: bool) -> Step:
        """What a micro-batch of examples of these lengths needs, all of it targets."""
        batch = collate([Example((1,) * length, (False,) + (True,) * (length - 1)) for length in lengths])
        try:
            if not self.alike:
                return run_on_meta(self._runnable(self.count, checkpointing), batch)
            three, two = (dataclasses.astuple(run_on_meta(self._runnable(n, checkpointing), batch)) for n in (3, 2))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            kind = self.config.model_type
            raise UserError(
                problem(
                    "model", kind, f"its steps cannot be followed without its weights ({reason})", "Leave --memory out"
                )
            ) from error
        return Step(*(c + (self.count - 3) * (c - b) for b, c in zip(two, three, strict=True)))

    def _runnable(self, count: int, checkpointing: bool) -> nn.Module:
        """The model with its first `count` layers, with what else a run puts into it."""
        short = copy.deepcopy(self.config)
        short.get_text_config().num_hidden_layers = count
        model = self._build(short)
        if self.device == "cpu" and ops.NATIVE is not None:
            _fuse(model)
        options, there = self.options, dict(model.named_modules())
        with torch.device("meta"):
            attach_adapters(
                model,
                method=options.method,
                rank=options.rank,
                alpha=options.alpha,
                dropout=options.dropout,
                targets=[name for name in self.targets if name in there],
                rslora=options.rslora,
            )
        if checkpointing:
            checkpoint_activations(model)
        model.qlora_layout = loss.expected_layout(model)
        return model


def device_of(device: str) -> str:
    """ "cpu" or "cuda"; a card that is not here can be planned for."""
    return "cuda" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "cpu"


def _is_weight(module: nn.Module) -> bool:
    return isinstance(module, (NF4Linear, nn.Linear, Conv1D))


def out_in(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def numel(layer: nn.Module) -> int:
    out, columns = out_in(layer)
    return out * columns


def _fuse(model: nn.Module) -> None:
    """`fuse` compares results, so the vectors (norms) have values for a moment."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() == 1:
                module._parameters[name] = nn.Parameter(torch.ones(p.shape, dtype=p.dtype), requires_grad=False)
    fuse(model)
    model.to("meta")


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Settings:
    """What may give way to a budget. None of it changes what is computed, but for rounding."""

    batch_size: int
    accumulate: int
    gradient_checkpointing: bool
    optimizer_memory: int | str

    def flags(self) -> str:
        words = ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [
            f"--batch-size {self.batch_size} --accumulate {self.accumulate}",
            f"--optimizer-memory {self.optimizer_memory}",
        ]
        return " ".join(words)


@dataclass(frozen=True)
class Plan:
    """Bytes. `parts` by component add up to the peak of training; `peak` is that, or `loading` or `evaluating` where
    they are higher.
    """

    settings: Settings
    parts: dict[str, int]
    spilled: int
    mapped: int
    loading: int
    evaluating: int
    tokens: int

    @property
    def peak(self) -> int:
        return max(sum(self.parts.values()), self.loading, self.evaluating)

    @property
    def budget(self) -> int:
        """The peak and a margin for what cannot be foreseen."""
        return int(self.peak * (1 + MARGIN)) + 1


Lengths = tuple[int, ...]  # of the examples of a micro-batch
Largest = Callable[
    [int], tuple[list[Lengths], list[Lengths]]
]  # batch size -> the largest micro-batches of the steps, of the evaluations


def predict(skeleton: Skeleton, settings: Settings, largest: Largest) -> Plan:
    """What a run with these settings needs."""
    s, (trained, evaluated) = skeleton, largest(settings.batch_size)
    steps = {batch: s.step(batch, settings.gradient_checkpointing) for batch in trained}
    batch, step = max(steps.items(), key=lambda item: item[1].kept + item[1].passing)
    evaluating = max(
        (s.step(lengths, settings.gradient_checkpointing).evaluating for lengths in evaluated), default=None
    )
    resident, spilled = state_bytes(s.adapters, s.options.optimizer_state, settings.optimizer_memory)
    gradients, kept = s.adapter_bytes, step.kept
    model = s.weights + s.constants + s.others - s.mapped
    libraries = s.libraries
    # In the first micro-batch of a step the gradients come as the activations go, a layer at a time.
    both = (
        kept + gradients if settings.accumulate > 1 else max(kept + gradients // s.count, gradients + kept // s.count)
    )
    parts = {
        "weights": s.weights,
        "constants": s.constants,
        "embeddings, head, norms": s.others,
        "adapters": s.adapter_bytes,
        "gradients": gradients,
        "optimizer": resident,
        "activations": kept,
        "not at the same time": both - kept - gradients,
        "workspace": step.passing,
        "libraries": libraries,
        "mapped from the file": -s.mapped,
    }
    still = model + s.adapter_bytes + gradients + resident + libraries
    evaluation = 0 if evaluating is None else still + evaluating
    return Plan(settings, parts, spilled, s.mapped, model + s.loading + libraries, evaluation, sum(batch))


def choices(config: FinetuneConfig) -> Iterator[tuple[int, int, bool]]:
    """(batch size, batches a step, checkpointing), cheapest first: recomputation costs time, smaller batches cost more
    of it.

    Dropout draws another mask for other batches, so a run with dropout keeps its own.
    """
    yield config.batch_size, config.accumulate, config.gradient_checkpointing
    for size in range(config.batch_size, 0, -1):
        if config.batch_size % size == 0 and (size == config.batch_size or config.dropout == 0):
            if size < config.batch_size or not config.gradient_checkpointing:
                yield size, config.accumulate * (config.batch_size // size), True


def asked(config: FinetuneConfig) -> Settings:
    return Settings(config.batch_size, config.accumulate, config.gradient_checkpointing, config.optimizer_memory)


def fit(skeleton: Skeleton, available: int, largest: Largest) -> tuple[Plan | None, Plan]:
    """(the cheapest plan whose `budget` is at most `available` bytes or None, the smallest plan there is)."""
    config = skeleton.options
    smallest = None
    wanted = predict(skeleton, asked(config), largest)
    if wanted.budget <= available:
        return wanted, wanted
    for size, accumulate, checkpointing in choices(config):
        least = predict(skeleton, Settings(size, accumulate, checkpointing, "none"), largest)
        smallest = least if smallest is None or least.budget < smallest.budget else smallest
        if least.budget > available:
            continue
        room = int(available / (1 + MARGIN)) - least.peak - 1
        more = wanted.parts["optimizer"]
        best = predict(skeleton, Settings(size, accumulate, checkpointing, min(more, max(0, room))), largest)
        return (best if best.budget <= available else least), smallest
    return None, smallest


def largest(
    config: FinetuneConfig, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> Largest:
    """The largest micro-batches of the run, those of most tokens without and with padding: its steps are looked through
    in their order, since the longest examples rarely meet in one. Without data every example has max_tokens.
    """

    def most(batches: Iterable[Sequence[Example]]) -> list[Lengths]:
        found = {tuple(len(example.ids) for example in batch) for batch in batches}
        return list({max(found, key=sum), max(found, key=lambda lengths: len(lengths) * max(lengths))}) if found else []

    @functools.cache
    def of(size: int) -> tuple[list[Lengths], list[Lengths]]:
        if train is None:
            full = [(config.max_tokens,) * size]
            return full, full if config.eval_data is not None or config.eval_fraction > 0 else []
        length, per_step = run_length(config, len(train)), config.batch_size * config.accumulate
        steps = (
            step_indices(len(train), per_step, config.seed, step, length["examples"]) for step in range(length["steps"])
        )
        return most(b for chosen in steps for b in by_length([train[i] for i in chosen], size)), most(
            by_length(held_out, size)
        )

    return of


# ---------------------------------------------------------------- what is said


def table(plan: Plan) -> str:
    """The plan in MB, a component a line."""
    lines = [f"  {name:<24} {nbytes / 1e6:>10.1f} MB" for name, nbytes in plan.parts.items() if nbytes]
    lines += [
        f"  {'training':<24} {sum(plan.parts.values()) / 1e6:>10.1f} MB",
        f"  {'loading':<24} {plan.loading / 1e6:>10.1f} MB",
    ]
    if plan.spilled:
        lines.append(f"  {'(optimizer, spilled)':<24} {plan.spilled / 1e6:>10.1f} MB")
    return "\n".join([*lines, f"  {'peak':<24} {plan.peak / 1e6:>10.1f} MB, in a micro-batch of {plan.tokens} tokens"])


def refusal(memory: int, smallest: Plan, baseline: int) -> UserError:
    least = (
        -(-(smallest.budget + baseline) // 1_000_000) + 5
    )  # the process' own size differs by a little from run to run
    rule = f"the smallest that works is {least}MB ({baseline / 1e6:.0f} MB of it the process itself, then {smallest.settings.flags()})"
    return UserError(
        problem(
            "memory",
            f"{memory / 1e6:.0f}MB",
            f"too little for this model and these options: {rule}",
            f"Give --memory {least}MB",
        )
    )


def within(
    config: FinetuneConfig, train: Sequence[Example], held_out: Sequence[Example]
) -> tuple[FinetuneConfig, Plan, int]:
    """`config` with settings that keep `config.memory`, their plan, and what this process holds now (on a CPU), which
    counts.

    Raises:
        UserError: nothing keeps it; the smallest budget that works.
    """
    used = held(config)
    skeleton = Skeleton(config, real=True)
    chosen, smallest = fit(skeleton, config.memory - used, largest(config, train, held_out))
    if chosen is None:
        raise refusal(config.memory, smallest, used)
    return dataclasses.replace(config, **dataclasses.asdict(chosen.settings)), chosen, used


def held(config: FinetuneConfig) -> int:
    """What this process holds before a run on a CPU, without what is free."""
    if device_of(config.device) != "cpu":
        return 0
    return_freed_memory()
    return anonymous_memory()


def plan_command(
    config: PlanConfig, train: Sequence[Example] | None = None, held_out: Sequence[Example] = ()
) -> dict[str, Any]:
    """`qlora plan`: what a run with these options needs, whether it fits `config.memory`, and the settings that do.
    With the examples of its data, in batches of their lengths; else of max_tokens.
    """
    baseline, batches = held(config), largest(config, train, held_out)
    skeleton = Skeleton(config, real=train is not None)
    wanted = predict(skeleton, asked(config), batches)
    found = {
        "device": skeleton.device,
        "baseline": baseline,
        "peak": wanted.peak,
        "total": baseline + wanted.peak,
        **_shown(wanted),
    }
    text = [
        f"{config.model} on {skeleton.device}" + (" (not verified on a card)" if skeleton.device == "cuda" else ""),
        table(wanted),
    ]
    if baseline:
        text.append(
            f"  {'with the process itself':<24} {(baseline + wanted.peak) / 1e6:>10.1f} MB; without --memory up to a fifth more, freed but kept"
        )
    if config.memory is not None:
        fitting, smallest = fit(skeleton, config.memory - baseline, batches)
        found |= {
            "memory": config.memory,
            "fits": fitting is wanted or (fitting is not None and fitting.settings == asked(config)),
        }
        found |= {"fitting": _shown(fitting) if fitting else None, "smallest": smallest.budget + baseline}
        if fitting is None:
            text.append(refusal(config.memory, smallest, baseline).problems[0])
        elif found["fits"]:
            text.append(f"It fits {config.memory / 1e6:.0f} MB.")
        else:
            text.append(
                f"It does not fit {config.memory / 1e6:.0f} MB as it is. It does with: {fitting.settings.flags()}"
            )
            text.append(table(fitting))
    return {**found, "text": "\n".join(text)}


def _shown(plan: Plan) -> dict[str, Any]:
    return {**dataclasses.asdict(plan), "peak": plan.peak}
