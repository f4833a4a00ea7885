"""TODO head of plan.meta."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora.config.commands import FinetuneConfig
from qlora.data.batch import Batch, Example, collate
from qlora.errors import UserError, problem
from qlora.evaluate import token_sums
from qlora.layers.attach import attach_adapters, linear_names, match_targets
from qlora.layers.fused import fuse
from qlora.layers.linear import NF4Linear, forget_scratch
from qlora.layers.loss import expected_layout, loss_sum
from qlora.layers.nf4 import PART_KEYS
from qlora.models.device import DTYPES, resolve_dtype
from qlora.models.info import info
from qlora.models.packed import stored_types
from qlora.models.quantize import QuantizePass
from qlora.models.source import load_config, resolve
from qlora.train.step import checkpoint_activations
from qlora_kernels import ops

# CPU: oneDNN's compiled kernels, modules imported at first use, threads; measured (scripts/measure_plan.py)
LIBRARIES = 100_000_000
SHAPES = 20_000_000  # and more kernels where each batch has another number of tokens (`cli.bound_kernel_caches`)


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
    forget_scratch("meta")
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with Account([*model.parameters(), *model.buffers()]) as account:
        total = loss_sum(model.train(), batch)
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
    forget_scratch("meta")
    return Step(kept, peak - kept, account.peak)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


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
        self.source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code, weights=False)
        self.config = load_config(self.source)
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
        QuantizePass(
            dataclasses.replace(self.source, packed=False), dataclasses.replace(config.quantization(), scales=None)
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
        info(model).mode = expected_layout(model)
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
