"""A 4-bit base whose codes text chose, on disk: `quantize --codes gptq`, and beside a run `finetune --codes gptq`.

    text -> model in NF4 -> codes chosen in memory (`calibrate.codes`) -> the folder that `quantize` writes

An adapter belongs to the codes it was trained on, and these are not those that anybody gets who quantizes the original;
so the run's base is a folder, and the adapter names it. It says in its config.json what it was made of, and a run that
is begun or resumed again takes it as it is. The alternative, codes inside the adapter, would be no PEFT adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.calibrate.codes import choose_codes_of
from qlora.calibrate.error_start import error_table
from qlora.calibrate.moments import rectangles
from qlora.config.commands import FinetuneConfig, QuantizeConfig
from qlora.config.shared import calibration_text
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.errors import UserError, guard, problem
from qlora.export.bnb import quantize_checkpoint, write_quantized
from qlora.export.shards import check_new_folder
from qlora.files import read_json
from qlora.models.limits import refuse_tokens, source_limits
from qlora.models.load import load_source
from qlora.models.originals import originals
from qlora.models.source import Source, load_tokenizer, resolve
from qlora.run.inputs import Inputs
from qlora.run.watch import watched
from qlora.specs import Quantization

BATCH = 4  # rows of calibration text in one forward pass
TOKENS = 1024  # of an example at most, as in a run


def quantize_command(config: QuantizeConfig) -> Path:
    """`qlora quantize`: the folder that was written.

    Raises:
        UserError: see `quantize_checkpoint`; the calibration data cannot be read.
    """
    if config.codes == "nearest":
        return quantize_checkpoint(
            config.model,
            config.output,
            quantization=config.quantization(),
            dtype=config.dtype,
            shard_size=config.shard_size,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
        )
    folder = check_new_folder(config.output)
    data, count = calibration_text(config.calibrate)
    assert data is not None, "codes=gptq needs data, as the options say"
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if source.packed:
        raise UserError(problem("model", config.model, "is NF4 already", "Use it as it is"))
    tokenizer = load_tokenizer(source)
    examples = tokenize(read_records(data), tokenizer, max_tokens=TOKENS).examples
    refuse_tokens(source_limits(source), examples, tokenizer, "calibrate")
    text = rectangles(examples, count, 0, BATCH)
    model, said = chosen_base(source, config.quantization(), text, config.dtype, verbose=config.verbose)
    print(said, flush=True)
    made = made_by(source, config.quantization(), text)
    return write_quantized(
        source, folder, config.quantization(), dtype=config.dtype, shard_size=config.shard_size, chosen=(model, made)
    )


def chosen_base(
    source: Source,
    quantization: Quantization,
    text: Sequence[Tensor],
    dtype: str,
    device: str = "auto",
    verbose: bool = False,
) -> tuple[PreTrainedModel, str]:
    """The model in NF4 with codes chosen by batches of token ids, and a line about it.

    Raises:
        UserError: see `load_base`; no 16-bit weight can be read by itself, or the text has less than two tokens.
    """
    began = time.monotonic()
    tokens = sum(batch.numel() for batch in text)
    if not tokens:
        raise UserError(problem("calibrate", f"{tokens} tokens", "holds no text to choose codes by", "Give other data"))
    weights = originals(source)
    if not weights.there:
        rule = f"no 16-bit weight of {source.name} can be read by itself: a pickle, or under other names than its own"
        raise UserError(problem("codes", "gptq", rule, "Save the model as safetensors, or leave it out"))
    model = load_source(source, quantization, dtype=dtype, device=device)
    with watched("codes", len(weights.shapes)) as done:
        layers = choose_codes_of(model, weights, text, done=done)
    moved = [layer for layer in layers.values() if layer.after < layer.before]
    before, after = (
        100 * sum(errors) / max(1, len(layers))
        for errors in ([layer.before for layer in layers.values()], [layer.after for layer in layers.values()])
    )
    errors = f"{before:.2f} % of the output, now {after:.2f} %"
    seconds = time.monotonic() - began
    said = f"codes    chosen in {len(moved)} of {len(weights.shapes)} layers ({errors}), by {tokens:,} tokens"
    said = f"{said} in {seconds:.0f} s"
    return model, f"{said}\n{error_table(layers)}" if verbose else said


def made_by(source: Source, quantization: Quantization, text: Sequence[Tensor]) -> str:
    """A hash over what decides the codes: the model's name, how it is quantized, the text."""
    about = [source.name, source.revision, dataclasses.astuple(quantization.resolved())]
    digest = hashlib.sha256(json.dumps(about).encode())
    for batch in text:
        digest.update(str(tuple(batch.shape)).encode() + array("q", batch.flatten().tolist()).tobytes())
    return digest.hexdigest()


def base_of_run(config: FinetuneConfig, inputs: Inputs, output: Path, dtype: str, device: torch.device) -> Inputs:
    """`inputs` with the base that the run trains on, `output`/base, in the place of the model; written if need be.

    Raises:
        UserError: the folder holds something else; see `chosen_base` and `write_quantized`.
    """
    folder, source = output / "base", inputs.source
    _, count = calibration_text(config.calibrate)
    text = rectangles(inputs.calibration, count, config.seed, config.batch_size)
    made = made_by(source, config.quantization(), text)
    if folder.exists():
        remedy = "Remove it, or choose another folder"
        with guard("output", folder, "is no base that this run wrote", remedy):
            found = read_json(folder / "config.json").get("qlora") or {}
        if found.get("made_by") != made:
            rule = "holds a base that was made by other text, or of another model"
            raise UserError(problem("output", folder, rule, remedy))
    else:
        model, said = chosen_base(source, config.quantization(), text, dtype, str(device), config.verbose)
        print(said, flush=True)
        write_quantized(source, folder, config.quantization(), dtype=dtype, chosen=(model, made))
    base = resolve(str(folder), trust_remote_code=config.trust_remote_code)
    return dataclasses.replace(inputs, source=base, original=source)
