"""Which layers an adapter goes on: "all-linear", names, or a regular expression, checked against the model's layers.

The alternative, PEFT's substring and suffix rules together, matches layers nobody named; here a name is a whole module
name or its end after a dot.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from qlora.errors import UserError, problem, shortened
from qlora.layers.linear import is_linear, left_alone, linear_names, no_linear

REMEDY = "Use all-linear, names separated by commas, or a regular expression for the whole module name"
_NAME = re.compile(r"[\w.]+")


def match_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linear layers that `targets` names, in model order.

    "all-linear"; names ("q_proj,v_proj" or a list), each a whole module name or its end after a dot; or one regular
    expression that must match a whole module name.

    Raises:
        UserError: every name that matches nothing, with the nearest names there are; a match that is no linear layer; a
            head tied to the embedding, whose merge would change the embedding as well; a layer that is `left_alone`;
            "all-linear" on a model with a head of its own.
    """
    if targets == "all-linear":
        names = linear_names(model)
        if not names:
            raise UserError(no_linear(model))
        _refuse_heads(model, names)
        return names
    modules = {name: module for name, module in model.named_modules() if name}
    if not isinstance(targets, (str, list, tuple)) or not all(isinstance(name, str) for name in targets):
        raise UserError(problem("targets", targets, "must be text, or a list of it", REMEDY))
    names = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
    if not names:
        raise UserError(problem("targets", "(none)", "names no layer", REMEDY))
    one_pattern = len(names) == 1 and not _NAME.fullmatch(names[0])
    if one_pattern or (isinstance(targets, str) and not all(map(_NAME.fullmatch, names))):
        found, problems = _by_pattern(model, modules, targets if isinstance(targets, str) else names[0])
    else:
        found, problems = _by_names(model, modules, names)
    problems += _tied_head(model, modules, found) + _left_alone(model, found)
    if problems:
        raise UserError(problems)
    return [name for name in modules if name in found]


def _by_pattern(model: nn.Module, modules: dict[str, nn.Module], text: str) -> tuple[set[str], list[str]]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(problem("targets", text, f"is no valid regular expression ({error})", REMEDY)) from None
    found = {name for name, module in modules.items() if pattern.fullmatch(name) and is_linear(module)}
    if found:
        return found, []
    return found, [problem("targets", text, "matches no linear layer", f"{REMEDY}. Layers: {_examples(model)}")]


def _by_names(model: nn.Module, modules: dict[str, nn.Module], names: list[str]) -> tuple[set[str], list[str]]:
    found: set[str] = set()
    problems = []
    for target in names:
        matches = [name for name in modules if name == target or name.endswith("." + target)]
        if not matches:
            endings = sorted({n.split(".")[-1] for n in linear_names(model)} | set(linear_names(model)))
            near = difflib.get_close_matches(target, endings, n=3, cutoff=0.4) or _examples(model).split(", ")
            rule = f"matches no layer; the nearest names are {', '.join(near)}"
            problems.append(problem("targets", target, rule, REMEDY))
        for name in matches:
            if not is_linear(modules[name]):
                rule = f"{name} is a {type(modules[name]).__name__}, not a linear layer"
                problems.append(problem("targets", target, rule, REMEDY))
                break
        found |= set(matches)
    return found, problems


def _tied_head(model: nn.Module, modules: dict[str, nn.Module], found: set[str]) -> list[str]:
    found_by = [getattr(model, name, None) for name in ("get_output_embeddings", "get_input_embeddings")]
    head, embedding = (None if find is None else find() for find in found_by)
    if head is None or embedding is None or head.weight is not embedding.weight:
        return []
    rule = "the head shares its weight with the embedding, which a merge would change too"
    return [
        problem("targets", name, rule, "Leave the head out")
        for name in modules
        if name in found and modules[name] is head
    ]


def _refuse_heads(model: nn.Module, names: list[str]) -> None:
    """Raises:
    UserError: layers of a head that is no language model's (a classifier, often new and random): an adapter file does
        not hold what they hold, so an adapter on them would be loaded over another draw.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model or model.get_output_embeddings() is not None:
        return
    heads = [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        rule = (
            f"{shortened(', '.join(heads))} belongs to a head outside the base model, and adapter files do not hold it"
        )
        remedy = "Name the targets within the base model, and keep the head's weights beside the adapter"
        raise UserError(problem("targets", "all-linear", rule, remedy))


def _left_alone(model: nn.Module, found: set[str]) -> list[str]:
    """A line for each reason why a layer that was named takes no adapter."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_alone(model).items():
        if name in found:
            reasons.setdefault(reason, []).append(name)
    return [
        problem("targets", shortened(",".join(names)), f"takes no adapter: {reason}", "Leave it out")
        for reason, names in reasons.items()
    ]


def _examples(model: nn.Module) -> str:
    return ", ".join(sorted({n.split(".")[-1] for n in linear_names(model)})[:12])
