"""Whether a model can run split and packed: found once, by comparing with its own forward on two short examples.

    packed == whole, and the second example does not notice what the first one is    -> packed
    padded == whole                                                                  -> split, padded
    the model's own forward of the padded two == of each                             -> the model's own forward
    else                                                                             -> that, one example at a time

Before that, a later token must not move earlier logits: an encoder would see what it is to predict. Windows of
attention are made 8 tokens for the comparison (`narrowed`): the examples are shorter than any real one.

Packing reaches into every architecture (its attention has to ask for our borders, nothing else may look along the row),
so a model is asked and not its name. The alternative, a list of architectures, is wrong for remote code and for the
next release of transformers. The mode stays in `info(model).mode`; `choose_forward_mode` can force it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.data.batch import Batch, Example, pack
from qlora.errors import UserError, guard, problem
from qlora.layers import attention
from qlora.layers.adapters import AdaptedLinear
from qlora.layers.forward import ForwardMode, head_logits, target_logits, target_states
from qlora.models.info import info
from qlora.models.transformers_seam import attention_implementation, takes_attention
from qlora.optim.memory_errors import memory_told, out_of_memory

PACKING = ("auto", "on", "off")
# How far (in units of their spread) logits may lie from the model's own. An example that sees another, or a wrong
# position, moves them by tenths; rounding by less than this.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
LENGTHS = (12, 7)  # of the examples compared
# Why a model is not packed.
_NO_PARTS = "its decoder and its head cannot be told apart"
_OTHER_LOGITS = "its decoder and its head, run apart, give other logits"
_REFUSED = "its layers do not keep packed examples apart"
_ALONE = "it sees the padding of a batch"
RECURRENT = ("conv", "linear_attention", "mamba", "recurrent")  # layer types of transformers that are no attention
WINDOW = 8  # tokens, while examples are compared
# What transformers makes masks of, and what layers pass on to attention.
WINDOWS = ("sliding_window", "attention_chunk_size")


def forward_mode(model: nn.Module) -> ForwardMode:
    """How `model` runs in training; chosen at the first call, if nobody has chosen before."""
    mode: ForwardMode | None = info(model).mode
    return choose_forward_mode(model) if mode is None else mode


def choose_forward_mode(model: nn.Module, packing: str = "auto") -> ForwardMode:
    """Decide how `model` runs in training, set it up for that, and keep the decision.

    The training mode and the random state stay as they are.

    Args:
        model: any causal language model; one that is not transformers' runs by its own forward.
        packing: "auto" packs if the model can, "on" insists on it, "off" pads.

    Raises:
        UserError: packing="on" and the model cannot run packed; the model is not causal, or does not run at all.
    """
    if packing not in PACKING:
        raise UserError(problem("packing", packing, f"must be one of {', '.join(PACKING)}", "Choose one of them"))
    if isinstance(model, PreTrainedModel):
        if attention_implementation(model) == attention.NAME:  # chosen before
            model.set_attn_implementation("sdpa")
        with narrowed(model), copied_outputs(model):
            mode = _find(model, packing != "off")
    else:
        mode = ForwardMode(False, False, "it is not a model of transformers")
    if packing == "on" and not mode.packed:
        rule = f"{type(model).__name__} cannot run packed: {mode.reason}"
        raise UserError(problem("packing", packing, rule, "Use `packing=auto`"))
    return _keep(model, mode)


@torch.no_grad()
def expected_forward_mode(model: PreTrainedModel) -> ForwardMode:
    """What `choose_forward_mode` will find, of a model on the meta device, where there are no numbers to compare; kept
    in the same way.
    """
    if not _has_parts(model):
        return _keep(model, ForwardMode(False, False, _NO_PARTS))
    with copied_outputs(model):
        _tried(model, pack([_example([1] * LENGTHS[0])]), ForwardMode(True, False))
    reason = _obstacle(model) or (_REFUSED if _looks_along_the_row(model) else "")
    if not reason:
        model.set_attn_implementation(attention.NAME)
        packed = ForwardMode(True, True)
        if _tried(model, pack([_example([1] * length) for length in LENGTHS]), packed) is not None:
            return _keep(model, packed)
        model.set_attn_implementation("sdpa")
    return _keep(model, ForwardMode(True, False, reason or _REFUSED))


def _looks_along_the_row(model: PreTrainedModel) -> bool:
    """Whether a decoder's layers mix tokens by other means than attention: convolutions, or states of a recurrence."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    convolves = any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())
    return convolves or any(str(kind) in RECURRENT for kind in kinds)


@torch.no_grad()
def _find(model: PreTrainedModel, may_pack: bool) -> ForwardMode:
    training, parts, precision = model.training, _has_parts(model), torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")  # logits are compared
    try:
        vocabulary = model.config.get_text_config().vocab_size
        first, second = probe_examples(vocabulary)
        batch = pack([first, second])
        rule = "does not run on two short examples"
        with guard("model", model.config.model_type, rule, "Use another model"), memory_told("two short examples"):
            later = _example([*first.input_ids[:-1], (first.input_ids[-1] + 1) % vocabulary])
            logits, changed = target_logits(model, pack([first, later]))[0].chunk(2)
            _check_causal(model, logits, changed)
            expected = torch.cat([logits, target_logits(model, pack([second]))[0]])
        if not (parts and _close(expected, _tried(model, batch, ForwardMode(True, False)))):
            reason = _OTHER_LOGITS if parts else _NO_PARTS
            if _close(expected, _tried(model, batch, ForwardMode(False, False))):
                return ForwardMode(False, False, reason)
            return ForwardMode(False, False, _ALONE, apart=True)
        reason = _obstacle(model) if may_pack else "packing=off"
        if reason:
            return ForwardMode(True, False, reason)
        model.set_attn_implementation(attention.NAME)
        packed = ForwardMode(True, True)
        together = _tried(model, batch, packed)
        other = _tried(model, pack([_example([first.input_ids[0]] * LENGTHS[0]), second]), packed)
        # the logits of the second example, whose neighbour is another one in `other`
        rest = slice(LENGTHS[0] - 1, None)
        if _close(expected, together) and together is not None and other is not None:
            if _close(together[rest], other[rest], 0.25):
                return packed
        model.set_attn_implementation("sdpa")
        return ForwardMode(True, False, _REFUSED)
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)


def _check_causal(model: PreTrainedModel, logits: Tensor, changed: Tensor) -> None:
    """Raises:
    UserError: the last token of an example, another one in `changed`, has a say in the logits before it.
    """
    if not (logits.isfinite().all() and changed.isfinite().all()):
        return  # nothing can be said
    if not _close(logits, changed, 0.25):  # those at the last token are not among them: nothing follows it
        remedy = "Use a causal language model"
        if hasattr(model.config, "is_decoder"):
            remedy = "Set is_decoder to true in its config.json, or use a causal language model"
        rule = "a later token changes earlier logits: training would see what it is to predict"
        raise UserError(problem("model", model.config.model_type, rule, remedy))


@contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """While entered, no window or chunk of attention is wider than WINDOW tokens, in the configs that masks are made
    from and in the layers alike.

    A window that the mask alone carries is lost when packed (Qwen2-MoE, Llama 4's chunks); two short examples do not
    fill a real one.
    """
    owners: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        owners |= {id(owner): owner for owner in (module, config) if owner is not None}
    owners[id(model.config.get_text_config())] = model.config.get_text_config()
    before = [
        (owner, name, width)
        for owner in owners.values()
        for name in WINDOWS
        if type(width := vars(owner).get(name)) is int and width > WINDOW
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, WINDOW)
        yield
    finally:
        for owner, name, width in before:
            setattr(owner, name, width)


@contextmanager
def copied_outputs(model: nn.Module) -> Iterator[None]:
    """Find the adapted layers whose output the model writes into (Falcon's MLP): these return a copy from then on.

    DoRA needs its output in the backward pass.
    """
    seen: list[tuple[AdaptedLinear, Tensor, int]] = []

    def remember(layer: Any, inputs: object, output: Tensor) -> None:
        if not layer.copies_output:
            seen.append((layer, output, output._version))

    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, output, version in seen:
            layer.copies_output |= output._version != version


def _keep(model: nn.Module, mode: ForwardMode) -> ForwardMode:
    info(model).mode = mode
    return mode


def _has_parts(model: PreTrainedModel) -> bool:
    decoder = model.get_decoder()
    return model.get_output_embeddings() is not None and decoder is not None and decoder is not model


def _obstacle(model: PreTrainedModel) -> str:
    """Why packing need not be tried, or ""."""
    if attention_implementation(model) != "sdpa" or not takes_attention(model):
        return f"its attention ({attention_implementation(model)}) cannot be replaced"
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        return "it takes no positions"
    return ""


def _example(input_ids: list[int]) -> Example:
    return Example(tuple(input_ids), (False,) + (True,) * (len(input_ids) - 1))


def probe_examples(vocabulary: int) -> list[Example]:
    """Two short examples of different length, every token but the first a target."""
    ids = torch.arange(24).mul_(7919).add_(13).remainder_(vocabulary).view(2, 12).tolist()
    return [_example(row[:length]) for row, length in zip(ids, LENGTHS, strict=True)]


def _tried(model: PreTrainedModel, batch: Batch, mode: ForwardMode) -> Tensor | None:
    """Logits in this mode, or None where the architecture refuses it."""
    try:
        return (
            head_logits(model, target_states(model, batch, mode)[0]) if mode.split else target_logits(model, batch)[0]
        )
    except Exception as error:  # whatever another architecture's code raises where it meets what it does not know
        if out_of_memory(error):
            raise
        return None


def _close(expected: Tensor, found: Tensor | None, share: float = 1.0) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    tolerance, wide = share * TOLERANCE[expected.dtype], expected.double()
    spread = (wide - wide.mean()).square().mean().sqrt()
    return bool((found.double() - wide).square().mean().sqrt() <= tolerance * spread)
