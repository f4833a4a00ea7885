"""Which modules of transformers compute what we have kernels for: told by the code of their forward.

transformers copies the same code into every architecture's file (its norms, gated MLPs, rotations, attentions). So a
module is known by a digest of the syntax tree of its `forward` without annotations, decorators and docstring: what has
the digest is that code, whatever it is called, and what a new version of transformers changed is no longer replaced.
The alternative, comparing results on a few values, is no proof; a list of class names is not one either.

Tried with transformers 5.17 and 5.23; a digest that is new there shows in tests/layers/test_fused.py.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class GatedForm:
    """What the gated MLPs differ in."""

    activation: str  # "silu" or "gelu_tanh"


@dataclass(frozen=True)
class AttentionForm:
    """What the rotary attentions differ in: norms over the heads of q and k, and where the sliding window stands."""

    norms: bool
    window: str  # "" (none), "config" or "module"


RMS_NORM = {"9635bcd843f3"}  # LlamaRMSNorm
GATED_MLP = {"7d2027d4464e"}  # LlamaMLP
RESIDUAL = {"1a8125909341"}  # LlamaDecoderLayer
ROTARY = {"4a8f8b85ee37"}  # apply_rotary_pos_emb
ROTATE_HALF = {"7b6c9b425ca0"}
ATTENTION = {
    "865d17a1b6ed": AttentionForm(norms=False, window=""),  # LlamaAttention
    "38eb7a675fc0": AttentionForm(norms=False, window="config"),  # MistralAttention
    "467d2e0bba2f": AttentionForm(norms=False, window="module"),  # Qwen2Attention
    "e0b15d778eec": AttentionForm(norms=True, window="module"),  # Qwen3Attention
}


LINEAR = {"fe6484dafa54"}  # FalconLinear: x Wt, then + bias

# Methods that read weights before training, or not at all in it.
_BEFORE = ("init", "tie", "resize", "load", "reset", "prune")
_NEVER = "slow_but_exact"  # Bloom's switch for reading weights in slices, off; where it is on, the trial step refuses


def digest_of(function: Callable | None) -> str:
    """A digest of the text of a function without what does not run; empty where its source cannot be had."""
    if function is None:
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    tree.decorator_list, tree.returns = [], None
    arguments = tree.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    first = tree.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def is_linear_code(kind: Any) -> bool:
    """Whether the forward of this subclass of nn.Linear is known to compute what nn.Linear does."""
    return _forward_digest(kind) in LINEAR


@functools.cache
def weights_read(kind: Any) -> frozenset[tuple[str, bool]]:
    """The layers whose `.weight` or `.bias` the methods of a model's class read: (path, whether it starts at `self`).

        self.out_proj.weight                  ("out_proj", True)
        block.attention.output.weight         ("attention.output", False): of whatever module it is a part

    Found in the syntax tree, so what runs on a GPU only, or in training only, is found too.
    """
    found: set[tuple[str, bool]] = set()
    for each in kind.__mro__:
        if _belongs_to_a_model(each.__module__):
            found |= _weights_read_in(each.__module__).get(each.__qualname__, set())
    return frozenset(found)


def _belongs_to_a_model(home: str) -> bool:
    of_libraries = ("torch.", "qlora.", "builtins", "peft.", "bitsandbytes.")
    return not (home.startswith(of_libraries) or (home.startswith("transformers.") and ".models." not in home))


@functools.cache
def _weights_read_in(home: str) -> dict[str, set[tuple[str, bool]]]:
    """`weights_read` of every class of a file; empty where its source cannot be had."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[home]))
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    return {
        owner.name: {path for method in _methods(owner) for path in _paths(method)}
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
    }


def _methods(owner: ast.ClassDef) -> list[ast.FunctionDef]:
    functions = (node for node in owner.body if isinstance(node, ast.FunctionDef))
    return [function for function in functions if not any(word in function.name for word in _BEFORE)]


def _paths(method: ast.AST) -> set[tuple[str, bool]]:
    found = set()
    for node in _walked(method):
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
            names: list[str] = []
            inner = node.value
            while isinstance(inner, ast.Attribute):
                names.insert(0, inner.attr)
                inner = inner.value
            if names:
                found.add((".".join(names), isinstance(inner, ast.Name) and inner.id == "self"))
    return found


def _walked(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but for what stands under a switch that is off."""
    yield node
    off = isinstance(node, ast.If) and _NEVER in ast.unparse(node.test)
    for child in node.orelse if off and isinstance(node, ast.If) else ast.iter_child_nodes(node):
        yield from _walked(child)


@functools.cache
def _forward_digest(kind: Any) -> str:
    return digest_of(kind.forward)


@functools.cache
def _rotates(home: str) -> bool:
    """Whether the rotation in this file of transformers is the one that is known."""
    there = sys.modules[home]
    found = (getattr(there, "apply_rotary_pos_emb", None), getattr(there, "rotate_half", None))
    return digest_of(found[0]) in ROTARY and digest_of(found[1]) in ROTATE_HALF


def activation_of(function: Any) -> str | None:
    """ "silu", "gelu_tanh", or None: what this module of transformers or torch computes.

    "gelu_tanh" is torch's own only: transformers has it also as a chain of operations, each of which rounds.
    """
    name = type(function).__name__
    if name in ("SiLUActivation", "SiLU"):
        return "silu"
    inner = getattr(function, "act", None) if name == "GELUTanh" else function
    if isinstance(inner, functools.partial) and inner.func is nn.functional.gelu:
        approximate = inner.keywords.get("approximate")
    else:
        approximate = inner.approximate if isinstance(inner, nn.GELU) else None
    return "gelu_tanh" if approximate == "tanh" else None


def kind_of(module: nn.Module) -> str | GatedForm | AttentionForm | None:
    """ "rms_norm", "residual" (a decoder layer), the form of a gated MLP or of a rotary attention, or None."""
    kind = type(module)
    if not kind.__module__.startswith(("transformers.", "transformers_modules.")):
        return None
    digest: str = _forward_digest(kind)  # type: ignore[arg-type]  # a class is hashable
    if digest in RMS_NORM and set(module._parameters) == {"weight"}:
        return "rms_norm"
    if digest in RESIDUAL:
        return "residual"
    activation = activation_of(getattr(module, "act_fn", None)) if digest in GATED_MLP else None
    if activation is not None:
        return GatedForm(activation)
    if digest in ATTENTION and _rotates(kind.__module__):
        return ATTENTION[digest]
    return None
