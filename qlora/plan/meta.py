"""A run on meta tensors: the exact sizes of all that stays, and what a step of any micro-batch takes in passing.

    still bytes   counted from the shapes of the whole model, without adapters        (`count_still_bytes`)
    step bytes    a step of a short model is run under `tracker.AllocationTracker`    (`MetaRun.step`)

The short model comes from `run.assemble`, as the real one does. Three layers and two are run, and the difference is
that of every further layer; layers that are not alike are all run. The alternative, all layers always, takes seconds
more for each question.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.calibrate.codes import WIDEST
from qlora.calibrate.moments import forward_tokens, moment_bytes
from qlora.calibrate.start import ROWS
from qlora.config.commands import FinetuneConfig
from qlora.config.shared import calibration_text
from qlora.data.batch import Batch, Example, pack
from qlora.errors import UserError, brief, problem
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.linear import NF4Linear, linear_names
from qlora.layers.loss import chunk_size
from qlora.layers.nf4 import PART_KEYS
from qlora.layers.targets import match_targets
from qlora.models.device import DTYPES, resolve_dtype
from qlora.models.packed import stored_types
from qlora.models.source import Source, load_config
from qlora.plan.tracker import StepBytes, run_on_meta, waiting_on_meta
from qlora.run.assemble import ModelSpec, assemble, empty_base
from qlora.run.inputs import begins_by_error, chooses_codes
from qlora_kernels import backends

# CPU, bytes: oneDNN's compiled kernels, modules imported at first use, threads; measured (scripts/measure_plan.py)
LIBRARIES = 90_000_000
# of these, what a run has not where kernels of ours multiply its layers: in bf16 oneDNN compiles none for them
LAYER_LIBRARIES = {"bf16": 25_000_000, "fp32": 18_000_000}
# and more kernels where each batch has another number of tokens (`models.device.bound_kernel_caches`)
SHAPES = 20_000_000
# CUDA, bytes: the workspaces of cuBLAS, 32 MiB for each of the two threads that multiply (less before Hopper)
WORKSPACES = 2 * (32 << 20)
# and the driver's context with its kernels, which is not torch's: by other people's reports, no card has told us yet
CONTEXT = 500_000_000


@dataclass
class StillBytes:
    """Bytes of the frozen model. `mapped` of them stay in the checkpoint's files; `loading` come on top while it loads.

    `constants` are the scales of NF4 weights, `others` all that is neither a quantized weight nor a scale.
    """

    weights: int
    constants: int
    others: int
    mapped: int
    loading: int

    @property
    def model(self) -> int:
        """All of the model, mapped or not."""
        return self.weights + self.constants + self.others


@dataclass
class Stack:
    """The layers of a model: the name of their list ("" if there is none), their count, whether they are all alike."""

    name: str
    count: int
    alike: bool

    def beyond(self, module: str, count: int) -> bool:
        """Whether a module lies in a layer that a model of `count` layers does not have."""
        rest = module.removeprefix(f"{self.name}.")
        return bool(self.name) and rest != module and int(rest.split(".")[0]) >= count


class MetaRun:
    """The model of a run on the meta device.

    Args:
        varied_lengths: it runs on records, whose batches differ in length.

    Raises:
        UserError: the model, its targets or its type are wrong.
    """

    def __init__(self, config: FinetuneConfig, source: Source, *, varied_lengths: bool = False):
        self.options, self.source = config, source
        self.device = planned_device(config.device)
        dtype = _planned_dtype(config.dtype, self.device)
        self.libraries = WORKSPACES
        if self.device == "cpu":
            ours = {"bf16": backends.multiplies_layers_in_bf16(), "fp32": backends.multiplies_layers_in_float32()}
            self.libraries = LIBRARIES + SHAPES * varied_lengths
            if config.bits == 4 and ours.get(dtype):
                self.libraries -= LAYER_LIBRARIES[dtype]
        self.spec = ModelSpec(config.quantization(), config.adapter(), dtype, packing=config.packing)
        self.architecture = load_config(source)
        stated = getattr(self.architecture, "dtype", None)  # before transformers writes ours over it
        model = empty_base(source, self.spec, self.architecture)
        stored = self._stored_types(model, stated)
        quantized_here = config.bits == 4 and not source.packed
        self.still = count_still_bytes(model, DTYPES[dtype], stored, quantized_here)
        self.targets = match_targets(model, self.spec.adapter.targets)
        self.adapters = adapter_sizes(model, self.targets, config.rank, config.method == "dora")
        self.adapter_bytes = 4 * sum(self.adapters)
        self.starts, self.chooses = begins_by_error(config, source), chooses_codes(config, source)
        self.start_bytes = self.adapter_bytes if self.starts else 0  # kept for files and a later merge
        self.shapes = [out_in(model.get_submodule(name)) for name in self.targets]
        self.filled = (forward_tokens(config.batch_size, config.max_tokens),)  # a batch of calibration text
        self.stack = layer_stack(model, self.architecture, self.targets)
        self._steps: dict[tuple[tuple[int, ...], bool], StepBytes] = {}
        self._models: dict[tuple[int, bool], PreTrainedModel] = {}

    def _stored_types(self, model: nn.Module, stated: torch.dtype | None) -> dict[str, torch.dtype | None]:
        """The type of each tensor in files that a CPU maps; {} where none is mapped.

        The files' headers tell it; the config, which can be wrong or silent, only where the files are not here.
        """
        if self.device != "cpu" or self.source.gguf is not None:
            return {}
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        return stored_types(self.source) or dict.fromkeys(names, stated)

    def step(self, lengths: tuple[int, ...], checkpointing: bool) -> StepBytes:
        """What a micro-batch of examples of these lengths (tokens) takes, all of it targets.

        Raises:
            UserError: the architecture's steps need numbers.
        """
        key = lengths, checkpointing
        if key not in self._steps:
            self._steps[key] = self._run_step(*key)
        return self._steps[key]

    def _run_step(self, lengths: tuple[int, ...], checkpointing: bool) -> StepBytes:
        batch = pack([Example((1,) * length, (False,) + (True,) * (length - 1)) for length in lengths])
        count = self.stack.count
        with self._followed():
            if not self.stack.alike:
                return self._on_meta(count, checkpointing, batch)
            three, two = (dataclasses.astuple(self._on_meta(n, checkpointing, batch)) for n in (3, 2))
        return StepBytes(*(c + (count - 3) * (c - b) for b, c in zip(two, three, strict=True)))

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """What an architecture's code raises without numbers, in one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of any kind: the code of a stranger meets tensors without numbers
            rule = f"its steps cannot be followed without its weights ({brief(error)})"
            raise UserError(problem("model", self.architecture.model_type, rule, "Leave `memory` out")) from error

    @functools.cached_property
    def calibration_bytes(self) -> int:
        """What the start that undoes the base's error takes beside a forward pass, 0 for none: the passes that wait,
        one H, one layer's 16-bit weight, its error E and E H; or later one layer's 16-bit weight and the logits of
        three models. Codes that the text chooses take a layer's weight in float32 twice and its codes, and its H six
        times.

        Raises:
            UserError: the architecture's steps need numbers.
        """
        if not (self.starts or self.chooses):
            return 0
        size, vocabulary = DTYPES[self.spec.dtype].itemsize, self.architecture.get_text_config().vocab_size
        widest = max((columns for _, columns in self.shapes), default=0)
        largest = max((out * columns for out, columns in self.shapes), default=0)
        waiting = self._waiting_bytes()
        start = waiting + moment_bytes(widest) + (2 * 4 + size) * largest + 8 * 4 * ROWS
        cut = moment_bytes(widest, WIDEST) + 5 * 4 * min(widest, WIDEST) ** 2
        codes = waiting + cut + (2 * 4 + 1) * largest if self.chooses else 0
        most = self.options.batch_size * self.options.max_tokens  # tokens of a batch on which the gap is measured
        logits = 3 * min(most, chunk_size(self.device, vocabulary)) * vocabulary * (size + 4)
        return max(start, codes, 2 * size * largest + logits)

    def _waiting_bytes(self) -> int:
        """What the forward passes over the text hold while they wait for each other."""
        length = min(self.filled[0], self.options.max_tokens)
        shape = self.filled[0] // length, length
        model = self.model(2 if self.stack.alike else self.stack.count, False)
        with self._followed(), backends.planned_for(self.device):
            layers = [layer for layer in model.modules() if isinstance(layer, (AdaptedLinear, NF4Linear))]
            held = waiting_on_meta(model, shape, layers)
        return held * calibration_text(self.options.calibrate)[1] // (shape[0] * shape[1])

    def _on_meta(self, count: int, checkpointing: bool, batch: Batch) -> StepBytes:
        with backends.planned_for(self.device):
            return run_on_meta(self.model(count, checkpointing), batch)

    def model(self, count: int, checkpointing: bool) -> PreTrainedModel:
        """The model with its first `count` layers, as it would be trained."""
        key = count, checkpointing
        if key not in self._models:
            short = copy.deepcopy(self.architecture)
            if count != self.stack.count:
                short.get_text_config().num_hidden_layers = count
            targets = tuple(name for name in self.targets if not self.stack.beyond(name, count))
            adapter = dataclasses.replace(self.spec.adapter, targets=targets)
            spec = dataclasses.replace(self.spec, adapter=adapter, gradient_checkpointing=checkpointing)
            with backends.planned_for(self.device):
                self._models[key] = assemble(self.source, spec, torch.device(self.device), short)
        return self._models[key]


def planned_device(device: str) -> str:
    """ "cpu" or "cuda"; a card that is not here can be planned for."""
    return "cuda" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "cpu"


def _planned_dtype(dtype: str, device: str) -> str:
    if dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return "bf16"
    return resolve_dtype(dtype, torch.device(device))


def count_still_bytes(
    model: PreTrainedModel, dtype: torch.dtype, stored: dict[str, torch.dtype | None], quantized_here: bool
) -> StillBytes:
    """What lies still of an empty model.

    Args:
        dtype: of its weights before they are quantized.
        stored: the type of each tensor in the files that are mapped.
        quantized_here: its NF4 weights are made in memory, and come from no file.
    """
    layers = frozen_layers(model)
    scales = [t for m in layers if isinstance(m, NF4Linear) for t in (m.absmax, m.nested_absmax, m.nested_offset)]
    rest = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    weights, constants = _bytes(layer.weight for layer in layers), _bytes(scales)
    made = {id(t) for t in [*(layer.weight for layer in layers), *scales]} if quantized_here else set()
    quantized = {id(layer.weight) for layer in layers}
    sizes = [numel(layer) * dtype.itemsize for layer in layers]
    sizes += [_bytes([t]) for key, t in rest.items() if key not in quantized]
    return StillBytes(
        weights=weights,
        constants=constants,
        others=_bytes(rest.values()) - weights - constants,
        mapped=_mapped_bytes(model, stored, made),
        loading=sum(sorted(sizes)[-2:]),
    )


def _mapped_bytes(model: PreTrainedModel, stored: dict[str, torch.dtype | None], made: set[int]) -> int:
    """Bytes that stay in the checkpoint's files: of what is used in the type that it is stored in."""
    there = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, Tensor] = {}
    for name, tensor in (there | dict(model.named_buffers())).items():
        layer, _, part = name.rpartition(".")
        key = f"{layer}.weight.{part}" if part in PART_KEYS else name
        bare = key.removeprefix(f"{model.base_model_prefix}.")  # as GPT-2's own file has it
        if stored.get(key, stored.get(bare)) == tensor.dtype and id(tensor) not in made:
            held[id(tensor)] = tensor
    return _bytes(held.values())


def frozen_layers(model: PreTrainedModel) -> list[NF4Linear] | list[nn.Linear | Conv1D]:
    """The NF4 layers of a model or, with 16 bits, its linear layers but the head."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if packed:
        return packed
    dense = (model.get_submodule(name) for name in linear_names(model))
    return [layer for layer in dense if isinstance(layer, (nn.Linear, Conv1D))]


def adapter_sizes(model: nn.Module, targets: list[str], rank: int, dora: bool) -> list[int]:
    """The elements of each adapter parameter, in the order of the optimizer's groups: A and B, then magnitudes."""
    shapes = [out_in(model.get_submodule(name)) for name in targets]
    factors = [n for out, columns in shapes for n in (rank * columns, out * rank)]
    return factors + [out for out, _ in shapes if dora]


def layer_stack(model: nn.Module, architecture: PretrainedConfig, targets: list[str]) -> Stack:
    """How many layers there are, and whether one tells what another needs."""
    text = architecture.get_text_config()
    count = text.num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1 or count <= 3 or len(set(getattr(text, "layer_types", None) or [0])) > 1:
        return Stack("", count, False)
    name, layers = found[0]
    first = _described(name, layers, 0, targets)
    return Stack(name, count, all(_described(name, layers, i, targets) == first for i in range(1, count)))


def _described(name: str, layers: nn.ModuleList, i: int, targets: list[str]) -> list:
    """The modules of a layer with their types and shapes, and which of them are adapted."""
    prefix = f"{name}.{i}."
    shapes = [
        (n, type(m), [tuple(t.shape) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None])
        for n, m in layers[i].named_modules()
    ]
    return [shapes, [target.removeprefix(prefix) for target in targets if target.startswith(prefix)]]


def out_in(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    if not isinstance(layer, (nn.Linear, NF4Linear)):
        raise TypeError(f"{type(layer).__name__} is no linear layer")
    return layer.out_features, layer.in_features


def numel(layer: nn.Module) -> int:
    """The elements of a linear layer's weight before it is quantized."""
    out, columns = out_in(layer)
    return out * columns


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
