"""TODO head of layers.attach."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlora.errors import UserError, problem
from qlora.layers.adapters import LINEAR, AdaptedLinear
from qlora.layers.linear import NF4Linear
from qlora.models.info import info
from qlora.specs import AdapterSpec
from qlora_kernels import ops


def linear_names(model: nn.Module) -> list[str]:
    """The layers that `all-linear` means: every linear layer but the output head, in model order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head]


def match_targets(model: nn.Module, targets: str | list[str] | tuple[str, ...]) -> list[str]:
    """The linear layers that `targets` names, in model order.

    "all-linear"; names ("q_proj,v_proj" or a list), each a whole module name or its end after a dot; or one regular
    expression that must match a whole module name.

    Raises:
        UserError: every name that matches nothing, with the nearest names there are; a match that is no linear layer; a
        head
            tied to the embedding, whose merge would change the embedding as well.
    """
    if targets == "all-linear":
        return linear_names(model)
    modules = {name: module for name, module in model.named_modules() if name}
    names = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
    found: dict[str, None] = {}
    problems = []
    remedy = "Use all-linear, names separated by commas, or a regular expression for the whole module name"
    if (len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])) or (
        isinstance(targets, str) and not all(re.fullmatch(r"[\w.]+", n) for n in names)
    ):
        try:
            pattern = re.compile(targets if isinstance(targets, str) else names[0])
        except re.error as error:
            raise UserError(problem("targets", targets, f"is no valid regular expression ({error})", remedy)) from None
        found = {name: None for name in modules if pattern.fullmatch(name) and isinstance(modules[name], LINEAR)}
        if not found:
            problems.append(
                problem("targets", targets, "matches no linear layer", remedy + f". Layers: {_examples(model)}")
            )
    else:
        for target in names:
            matches = [name for name in modules if name == target or name.endswith("." + target)]
            if not matches:
                endings = sorted({n.split(".")[-1] for n in linear_names(model)} | set(linear_names(model)))
                near = difflib.get_close_matches(target, endings, n=3, cutoff=0.4) or _examples(model).split(", ")
                problems.append(
                    problem("targets", target, f"matches no layer; the nearest names are {', '.join(near)}", remedy)
                )
            for name in matches:
                if not isinstance(modules[name], LINEAR):
                    problems.append(
                        problem(
                            "targets", target, f"{name} is a {type(modules[name]).__name__}, not a linear layer", remedy
                        )
                    )
                    break
            found.update(dict.fromkeys(matches))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name in found:
        if modules[name] is head and embedding is not None and head.weight is embedding.weight:
            problems.append(
                problem(
                    "targets",
                    name,
                    "the head shares its weight with the embedding, which a merge would change too",
                    "Leave the head out",
                )
            )
    if problems:
        raise UserError(problems)
    return [name for name in modules if name in found]


def _examples(model: nn.Module) -> str:
    return ", ".join(sorted({n.split(".")[-1] for n in linear_names(model)})[:12])


def attach_adapters(model: nn.Module, **options: Any) -> nn.Module:
    """`attach` with the fields of `specs.AdapterSpec` as keywords, such as method, rank, alpha, targets."""
    return attach(model, AdapterSpec(**options))


def attach(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Freeze `model` and put trainable adapters on the layers that `spec.targets` names, in place; returns the model.

    A is drawn from torch's global random state: seed before. The fresh model computes exactly what the base computes.

    Raises:
        UserError: everything wrong with the spec at once; adapters are already attached.
    """
    problems = spec.problems()
    if any(True for _ in named_adapters(model)):
        problems.append(
            problem(
                "model", type(model).__name__, "has adapters already", "Load a fresh base, or merge the first adapter"
            )
        )
    try:
        modules = match_targets(model, spec.targets)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    spec = dataclasses.replace(spec, alpha=float(spec.alpha), dropout=float(spec.dropout), modules=tuple(modules))
    model.requires_grad_(False)
    for name in modules:
        layer = model.get_submodule(name)
        model.set_submodule(name, AdaptedLinear(layer, spec).train(layer.training))
    info(model).adapter = spec
    if spec.method == "dora":
        inner = getattr(model, "base_model", model)  # without the head, which the loss goes past
        inner.register_forward_pre_hook(_before_forward)
    return model


def named_adapters(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(module name, adapter) in model order. Adapters are known by their type, never by a name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every trainable parameter of the adapters: what an optimizer needs."""
    return [p for _, adapter in named_adapters(model) for p in adapter.parameters(recurse=False)]


def _before_forward(model: nn.Module, inputs: tuple) -> None:
    if (
        torch.is_grad_enabled() and next(model.parameters()).is_cuda
    ):  # in training; to look at every layer for each token generated would be dear
        compute_norms(model)


@torch.no_grad()
def compute_norms(model: nn.Module) -> None:
    """Compute every n of NF4 layers that may have changed, all in one operator. `attach_adapters` makes it run on a GPU
    before the forward passes of
    training: what a layer cannot know, that its neighbours want theirs as well, saves launches. A layer run by itself
    computes its own.
    """
    stale: dict[tuple, list[tuple[AdaptedLinear, tuple]]] = {}
    for _, adapter in named_adapters(model):
        if (
            adapter.magnitude is not None
            and isinstance(adapter.base, NF4Linear)
            and (state := adapter.norm_state()) != adapter._norms.state
        ):
            w = adapter.base.nf4
            stale.setdefault((w.packed.device, w.nested_absmax is not None, w.nested_blocksize), []).append(
                (adapter, state)
            )
    for (_, nested, nested_blocksize), changed in stale.items():
        weights = [adapter.base.nf4 for adapter, _ in changed]
        norms = ops.row_norms_nf4_all(
            [w.packed for w in weights],
            [w.absmax for w in weights],
            [w.nested_absmax for w in weights if nested],
            [w.nested_offset for w in weights if nested],
            [a.lora_A for a, _ in changed],
            [a.lora_B for a, _ in changed],
            [a.scaling for a, _ in changed],
            [w.shape[0] for w in weights],
            [w.shape[1] for w in weights],
            [w.blocksize for w in weights],
            nested_blocksize,
        )
        for (adapter, state), norm in zip(changed, norms, strict=True):
            adapter._norms.state, adapter._norms.n = state, norm.unsqueeze(0)


def refresh_norms(model: nn.Module) -> None:
    """Forget every kept n: needed only after writes to A, B or a base weight that torch cannot see."""
    for _, adapter in named_adapters(model):
        adapter.forget_norm()
