"""TODO head of run.commands."""

from __future__ import annotations

import dataclasses
from typing import Any

from qlora.config.commands import EvalConfig, GenerateConfig, PlanConfig
from qlora.data.order import split
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.evaluate import evaluate
from qlora.generate import generate_batch
from qlora.models.info import base_info
from qlora.models.source import load_tokenizer, resolve
from qlora.plan.say import plan_command
from qlora.run.adapted import load_adapted
from qlora.run.inputs import tokens


def planned(config: PlanConfig) -> dict[str, Any]:
    """`qlora plan` (see `plan.plan_command`), with --data of the batches that this run would have."""
    if config.data is None:
        return plan_command(config)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code, weights=False)
    tokenizer = load_tokenizer(source)
    records, held_out = read_records(config.data), read_records(config.eval_data) if config.eval_data else []
    if config.eval_fraction > 0:
        records, held_out = split(records, config.eval_fraction, config.seed)
    held = tokens(config, tokenizer, held_out).examples if held_out else []
    return plan_command(config, tokens(config, tokenizer, records).examples, held)


def evaluate_command(config: EvalConfig) -> dict[str, Any]:
    """`qlora eval`: an adapter on its base, or a bare base, on `config.data`. Returns what EvalResult holds, and what
    was evaluated.

    Raises:
        UserError: data, model or adapter cannot be read.
    """
    records = read_records(config.data)
    model, tokenizer = load_adapted(
        config.adapter,
        model=config.model,
        bits=config.bits,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    data = tokenize(
        records, tokenizer, format=config.format, max_tokens=config.max_tokens, train_on_prompt=config.train_on_prompt
    )
    result = evaluate(model, data.examples, config.batch_size)
    about = {"model": base_info(model).model, "adapter": config.adapter, "data": config.data, "format": data.format}
    return {
        **dataclasses.asdict(result),
        **about,
        "examples": len(data.examples),
        "truncated": data.truncated,
        "dropped": data.dropped,
    }


def generate_text(config: GenerateConfig) -> str:
    """`qlora generate`: what the model answers to `config.prompt`, with the base and recipe that the adapter names.

    Raises UserError if model or adapter cannot be loaded, or the prompt does not fit.
    """
    model, tokenizer = load_adapted(
        config.adapter,
        model=config.model,
        bits=config.bits,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    return generate_batch(
        model,
        tokenizer,
        [config.prompt],
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        temperature=config.temperature,
        top_p=config.top_p,
        system=config.system,
        raw=config.raw,
    )[0]
