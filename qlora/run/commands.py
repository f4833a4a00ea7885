"""The commands beside `finetune`, from their options to what they print: plan, eval, generate.

    config -> load_adapted (or read_inputs) -> one function below -> a dictionary or a text

They only pass on: what a command does stands in the module that it calls. The alternative, commands inside evaluate.py
and generate.py, made those know every option.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.config.commands import EvalConfig, GenerateConfig, PlanConfig
from qlora.data.doctor import notes
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.evaluate import evaluate
from qlora.generate import Sampling, generate_batch
from qlora.models.info import base_info
from qlora.models.limits import model_limits, refuse_length, refuse_tokens, source_limits
from qlora.plan.report import describe
from qlora.run.adapted import load_adapted
from qlora.run.inputs import find_model, read_inputs


def plan_command(config: PlanConfig) -> dict[str, Any]:
    """`qlora plan`: what a run needs (`plan.report.describe`), with data for the batches that it would have.

    Raises:
        UserError: all that is wrong with model and data; the model's type or its targets are.
    """
    if config.data is None:
        source = find_model(config, weights=False)
        refuse_length(source_limits(source), config.max_tokens)
        return describe(config, source)
    inputs = read_inputs(config, weights=False)
    return describe(config, inputs.source, inputs.train, inputs.held_out)


def evaluate_command(config: EvalConfig) -> dict[str, Any]:
    """`qlora eval`: an adapter on its base, or a bare base, on `config.data`.

    Returns:
        The fields of EvalResult, and what was evaluated.

    Raises:
        UserError: data, model or adapter cannot be read.
    """
    records = read_records(config.data)
    model, tokenizer = _loaded(config)
    data = tokenize(
        records, tokenizer, format=config.format, max_tokens=config.max_tokens, train_on_prompt=config.train_on_prompt
    )
    refuse_tokens(model_limits(model), data.examples, tokenizer)
    result = evaluate(model, data.examples, config.batch_size)
    base = base_info(model)
    about = {"model": base.model, "adapter": config.adapter, "data": config.data, "format": data.format}
    counts = {"examples": len(data.examples), "truncated": data.truncated, "dropped": data.dropped}
    return {**dataclasses.asdict(result), **about, **counts, "notes": notes(data, config.max_tokens)}


def generate_command(config: GenerateConfig) -> str:
    """`qlora generate`: what the model answers to `config.prompt`.

    Raises:
        UserError: model or adapter cannot be loaded, or the prompt does not fit.
    """
    model, tokenizer = _loaded(config)
    return generate_batch(
        model,
        tokenizer,
        [config.prompt],
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.seed),
        system=config.system,
        raw=config.raw,
    )[0]


def _loaded(config: EvalConfig | GenerateConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options name, with the base and settings that its adapter was trained on."""
    return load_adapted(
        config.adapter,
        model=config.model,
        bits=config.bits,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
