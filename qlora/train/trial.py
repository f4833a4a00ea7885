"""A trial step before a run: two short examples forward and backward, in training mode, as the run will do it.

    loss_sum(model, two examples).backward()    -> the adapters that no gradient reaches, or one line why it fails

What an architecture's own code cannot do in training (a layer that reads weights past our layers, lengths that must be
multiples of a chunk, recomputation of what it writes into) shows here, before any data is computed, and not as a
traceback an hour later. The alternative, a list of architectures, is wrong for the next release of transformers.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora.data.batch import pack
from qlora.errors import UserError, guard, problem
from qlora.layers.attach import adapter_parameters, named_adapters
from qlora.layers.forward_mode import probe_examples
from qlora.layers.loss import loss_sum
from qlora.models.info import info
from qlora.optim.memory_errors import memory_told
from qlora.train.rng import undisturbed


def trial_step(model: PreTrainedModel) -> None:
    """Take the gradient of two short examples, note which adapters it does not reach, and throw it away.

    Parameters, random states and mode stay as they are.

    Raises:
        UserError: memory ran out, or the model cannot be trained, in one line with its type and what its code said.
    """
    kind, training = model.config.model_type, model.training
    batch = pack(probe_examples(model.config.get_text_config().vocab_size))
    dropouts = [(layer, layer.dropout_p) for _, layer in named_adapters(model)]
    rule = "cannot be trained here: a step on two short examples failed"
    remedy = "Try it without `gradient_checkpointing`, or use another model"
    try:
        for layer, _ in dropouts:
            layer.dropout_p = 0.0  # nothing is drawn
        with guard("model", kind, rule, remedy), torch.enable_grad(), undisturbed():
            with memory_told("a step on two short examples"):
                loss_sum(model.train(), batch).backward()
        reached = {name: _reached(layer.lora_B.grad) for name, layer in named_adapters(model)}
    finally:
        for layer, dropout in dropouts:
            layer.dropout_p = dropout
        for parameter in adapter_parameters(model):
            parameter.grad = None
        model.train(training)
    if reached and not any(reached.values()):
        raise UserError(problem("model", kind, "no gradient reaches any adapter", "Choose other `targets`"))
    info(model).unreached = tuple(name for name, found in reached.items() if not found)


def _reached(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
