"""Adapters on a model: attach, detach, switch, disable.

    attach(model, spec)            freeze the model, put adapters on its layers
    attach(model, spec, "second")  another adapter on the same base; the first is set aside
    activate(model, "default")     the first again
    detach(model, "second")        take one away for good; without adapters the model is its base again
    with disabled(model): ...      the base alone, for a moment
    with bare(model): ...          no adapter in the model at all, for a moment

Different adapters in one batch are in `mixed`, sums of adapters in `combine`. One adapter is active at a time: its
layers stand in the model, in the places of the layers they hold; the others wait beside the model, not in it, so that
`state_dict`, `parameters` and a layer's forward know one adapter. The alternative, a dictionary of adapters in every
layer (PEFT), is searched in every forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from qlora.errors import UserError, problem
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.dropout import Draws
from qlora.layers.linear import NF4Linear
from qlora.layers.norms import Version, count_optimizer_steps
from qlora.layers.targets import match_targets
from qlora.models.info import info
from qlora.models.saver import saves_what_loads
from qlora.specs import AdapterSpec
from qlora_kernels import backends, ops
from qlora_kernels.weight import QuantizedWeight


@dataclass
class Adapter:
    """An adapter of a model: its spec, with the names of its modules, and its layers by these names.

    `start`: its parameters by name (<module>.lora_A) before training, where they did not leave the base as it is.
    """

    spec: AdapterSpec
    layers: dict[str, AdaptedLinear]
    start: dict[str, torch.Tensor] | None = None
    hook: Any = None  # computes n before a forward pass on a GPU


class Adapters(dict[str, Adapter]):
    """All adapters of a model by name; `active` is the one in it, or None. `hooked`: see `_without_its_base`."""

    active: str | None = None
    hooked: bool = False


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of a model; empty where none was attached."""
    record = info(model)
    if record.adapters is None:
        record.adapters = Adapters()
    adapters: Adapters = record.adapters
    return adapters


def active_adapter(model: nn.Module) -> AdapterSpec | None:
    """The spec of the active adapter, or None."""
    adapters = adapters_of(model)
    return None if adapters.active is None else adapters[adapters.active].spec


def adapter_start(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The parameters of the active adapter before training by name, or None where it began as its base."""
    adapters = adapters_of(model)
    return None if adapters.active is None else adapters[adapters.active].start


def attach_adapters(model: nn.Module, **options: Any) -> nn.Module:
    """`attach` with the fields of `specs.AdapterSpec` as keywords, such as method, rank, alpha, targets."""
    return attach(model, AdapterSpec(**options))


def attach(model: nn.Module, spec: AdapterSpec, name: str = "default", draws: Draws | None = None) -> nn.Module:
    """Freeze `model` and put trainable adapters on the layers that `spec.targets` names, in place; returns the model.

    A and dropout are drawn from `draws`, without them from torch's global random state: seed before. The fresh model
    computes exactly what the base computes. An adapter that was active is set aside.

    Raises:
        UserError: everything wrong with the spec and the name at once.
    """
    problems, before = spec.problems() + taken(model, name), adapters_of(model).active
    if before is not None:
        _take_out(model)
    try:
        modules = match_targets(model, spec.targets)
    except UserError as error:
        problems += error.problems
    if problems:
        if before is not None:
            activate(model, before)
        raise UserError(problems)
    spec = dataclasses.replace(spec, alpha=float(spec.alpha), dropout=float(spec.dropout), modules=tuple(modules))
    count_optimizer_steps()
    model.requires_grad_(False)
    layers = {}
    for module in modules:
        layer = model.get_submodule(module)
        layers[module] = AdaptedLinear(layer, spec, draws).train(layer.training)
    adapters = adapters_of(model)
    if not adapters.hooked:
        model.register_load_state_dict_post_hook(_without_its_base)
        adapters.hooked = True
    adapters[name] = Adapter(spec, layers)
    saves_what_loads(model)
    for device in {layer.lora_A.device for layer in layers.values()}:
        backends.prepare(device)
    return activate(model, name)


def taken(model: nn.Module, name: str) -> list[str]:
    """The reason why no adapter of this name can be put on the model, in a list; or none."""
    if not isinstance(name, str) or not name:
        return [problem("name", name, "must be text, and not empty", "Give the adapter a name")]
    if name in adapters_of(model):
        return [problem("name", name, "the model has an adapter of this name", "Detach it, or give another name")]
    return []


def activate(model: nn.Module, name: str) -> nn.Module:
    """Put the adapter of this name in the place of the one that is active; returns the model. No base byte is touched.

    Raises:
        UserError: there is no adapter of this name.
    """
    adapters = adapters_of(model)
    unknown = unknown_adapters(model, [name])
    if unknown:
        raise UserError(unknown)
    if adapters.active is not None:
        _take_out(model)
    adapter = adapters[name]
    settle(model, adapter)
    for module, layer in adapter.layers.items():
        model.set_submodule(module, layer)
    if adapter.spec.method == "dora":
        inner = getattr(model, "base_model", model)  # without the head, which the loss goes past
        adapter.hook = inner.register_forward_pre_hook(partial(_before_forward, tuple(adapter.layers.values())))
    adapters.active = name
    return model


def unknown_adapters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """A line for each name that no adapter of the model has."""
    there = ", ".join(adapters_of(model)) or "none"
    rule = f"the model has no adapter of this name, but {there}"
    return [problem("adapter", name, rule, "Attach it first") for name in names if name not in adapters_of(model)]


def settle(model: nn.Module, adapter: Adapter) -> None:
    """Bring layers that were set aside to their bases, which may have been moved, or gone to training, meanwhile. Only
    while no adapter stands in the model.
    """
    for module, layer in adapter.layers.items():
        layer.base = model.get_submodule(module)
        layer.training = layer.base.training
        device = next(layer.base.buffers(), next(layer.base.parameters(), layer.lora_A)).device
        if layer.lora_A.device != device:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            layer.forget_row_norms()


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter away, the active one without a name; returns the model.

    Raises:
        UserError: there is no such adapter.
    """
    adapters = adapters_of(model)
    name = adapters.active if name is None else name
    if name is None or name not in adapters:
        there = ", ".join(adapters) or "none"
        raise UserError(problem("adapter", name, f"the model has no such adapter, but {there}", "Name one of these"))
    if name == adapters.active:
        _take_out(model)
    del adapters[name]
    return model


def _take_out(model: nn.Module) -> None:
    adapters = adapters_of(model)
    assert adapters.active is not None
    adapter = adapters[adapters.active]
    for module, layer in adapter.layers.items():
        model.set_submodule(module, layer.base)
    if adapter.hook is not None:
        adapter.hook.remove()
        adapter.hook = None
    adapters.active = None


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base without its active adapter while entered: the reference model of DPO, or a comparison."""
    layers = [layer for _, layer in named_adapters(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The model without an adapter in it while entered; the one that was active then comes back, if it is still there.

    Another may be attached inside: it stays.
    """
    adapters = adapters_of(model)
    before = adapters.active
    if before is not None:
        _take_out(model)
    try:
        yield model
    finally:
        if adapters.active is None and before is not None and before in adapters:
            activate(model, before)


def named_adapters(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(module name, layer) of the active adapter in model order. Adapters are known by their type, never by a name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every trainable parameter of the active adapter: what an optimizer needs."""
    return [p for _, adapter in named_adapters(model) for p in adapter.parameters(recurse=False)]


def _without_its_base(model: nn.Module, keys: Any) -> None:
    """A state of the active adapter alone, such as Trainer's checkpoint, lacks nothing: the base is frozen, and there.

    A hook of `load_state_dict`. `keys.missing_keys` is emptied where it is every key of the base and no other.
    """
    ours = {
        f"{name}.{part}" for name, layer in named_adapters(model) for part, _ in layer.named_parameters(recurse=False)
    }
    if ours and set(keys.missing_keys) == set(model.state_dict()) - ours:
        keys.missing_keys.clear()


# ---------------------------------------------------------------- row norms of a whole model


def _before_forward(layers: tuple[AdaptedLinear, ...], model: nn.Module, inputs: tuple) -> None:
    # In training; to look at every layer for each token generated would be dear. The layers are known: to look for them
    # among all modules takes longer than to ask them, and a card waits for it at each micro-batch.
    if torch.is_grad_enabled() and backends.kind_of(layers[0].lora_A.device) == "cuda":
        _refresh_row_norms(layers)


def refresh_row_norms(model: nn.Module) -> None:
    """Compute every n of quantized layers that may have changed, all in one operator. `attach` makes it run on a GPU
    before the forward passes of training: what a layer cannot know, that its neighbours want theirs as well, saves
    launches. A layer run by itself computes its own.
    """
    _refresh_row_norms(layer for _, layer in named_adapters(model))


@torch.no_grad()
def _refresh_row_norms(layers: Iterable[AdaptedLinear]) -> None:
    stale: dict[tuple, list[tuple[AdaptedLinear, Version]]] = {}
    for adapter in layers:
        base = adapter._modules["base"]  # past `Module.__getattr__`, as `AdaptedLinear.version` goes
        if isinstance(base, NF4Linear) and adapter._parameters.get("magnitude") is not None:
            version = adapter.version()
            if adapter.row_norms.get(version) is None:
                w = base.quantized
                stale.setdefault((w.device, w.nested), []).append((adapter, version))
    for changed in stale.values():
        weights: list[QuantizedWeight] = [cast(NF4Linear, adapter.base).quantized for adapter, _ in changed]
        norms = ops.row_norms_4bit_all(
            [part for w in weights for part in w.parts],
            [size for w in weights for size in w.layout],
            [a.lora_A for a, _ in changed],
            [a.lora_B for a, _ in changed],
            [a.scaling for a, _ in changed],
        )
        for (adapter, version), n in zip(changed, norms, strict=True):
            adapter.row_norms.put(version, n)


def forget_row_norms(model: nn.Module) -> None:
    """Forget every kept n: needed only after writes to A, B or a base weight that torch cannot see."""
    for _, adapter in named_adapters(model):
        adapter.forget_row_norms()
