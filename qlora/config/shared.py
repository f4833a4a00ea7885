"""Options that more than one command has, each group of them one mixin. (The fields of a class's last base come first.)

The alternative, to repeat an option where a second command needs it, lets its help and its range drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qlora.config.options import DATA, GENERATION, MACHINE, MODEL, OUTPUT, QUANTIZATION, Options, option
from qlora.errors import problem
from qlora.sizes import parse_size
from qlora.specs import Blocksize, Codes, Scales, VerifySpec

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Format = Literal["chat", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
MOST_TOKENS, DIGITS = 10**9, 18  # of calibration text: more than fits any memory; Python refuses to read 4,301 digits
CALIBRATION_TOKENS = 8192  # four times as many moved the KL of a start by 2 % (docs/log.md)


@dataclass(kw_only=True)
class NamedModel(Options):
    model: str = option(
        group=MODEL,
        min_length=1,
        path=True,
        resume="free",
        help="the base model: a folder, a hub id, a .gguf file, or smollm2-135m",
    )
    revision: str | None = option(
        None, group=MODEL, min_length=1, resume="free", help="the branch, tag or commit of a hub model"
    )


@dataclass(kw_only=True)
class Output(Options):
    output: str = option(group=MODEL, min_length=1, path=True, resume="free", help="the folder to write to")


@dataclass(kw_only=True)
class Code(Options):
    trust_remote_code: bool = option(
        False, group=MACHINE, resume="free", help="run Python code that comes with the model"
    )


@dataclass(kw_only=True)
class Device(Options):
    device: str = option(
        "auto",
        group=MACHINE,
        resume="free",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        help="auto, cpu, cuda or cuda:N",
        rule="must be auto, cpu, cuda or cuda:N",
    )


@dataclass(kw_only=True)
class Compute(Code, Device):
    dtype: Dtype = option("auto", group=MACHINE, help="what layers compute in; `qlora doctor` tells what auto means")


@dataclass(kw_only=True)
class Bits(Options):
    bits: Literal[4, 16] = option(4, group=QUANTIZATION, help="bits of the frozen weights: 4 (NF4) or 16")


@dataclass(kw_only=True)
class Blocks(Options):
    # None: the default for weights to quantize, and for a 4-bit checkpoint what it holds.
    blocksize: Blocksize | None = option(
        None, group=QUANTIZATION, help="weights that share one NF4 scale (default 64, or as in a 4-bit checkpoint)"
    )
    double_quant: bool | None = option(
        None,
        group=QUANTIZATION,
        help="store the NF4 scales in 8 bits: 0.516 instead of 0.563 bytes a weight "
        "(default yes, or as in a 4-bit checkpoint)",
    )
    scales: Scales | None = option(
        None,
        group=QUANTIZATION,
        help="NF4 scales from each block's largest weight, as bitsandbytes has them, or of least squared error "
        "(default absmax)",
    )


@dataclass(kw_only=True)
class Calibrated(Options):
    calibrate: str | None = option(
        None,
        group=QUANTIZATION,
        min_length=1,
        help="text that shows which errors of the base matter, as data, data:tokens, or tokens of a run's training "
        f"data (default: {CALIBRATION_TOKENS} of these)",
    )
    codes: Codes = option(
        "nearest",
        group=QUANTIZATION,
        help="NF4 codes nearest to each weight, or chosen by calibration text so that a layer's output errs least",
    )
    verbose: bool = option(
        False, group=OUTPUT, resume="free", help="tell the quantization error of each layer that text has lowered"
    )

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        given = values.get("calibrate")
        if given is None or 2 <= calibration_text(given)[1] <= MOST_TOKENS:
            return []
        rule = f"must be 2 to {MOST_TOKENS:,} tokens"
        return [problem("calibrate", given, rule, f"{CALIBRATION_TOKENS} are the default")]


def calibration_text(given: str | None) -> tuple[str | None, int]:
    """(data, tokens) of an option such as my.jsonl:65536 or 65536; None for the training data."""
    if given is None:
        return None, CALIBRATION_TOKENS
    name, colon, count = given.rpartition(":")
    if count.isascii() and count.isdigit() and (name or not colon):
        return name or None, int(count) if len(count) <= DIGITS else MOST_TOKENS + 1
    return given, CALIBRATION_TOKENS


@dataclass(kw_only=True)
class Records(Options):
    data: str = option(
        group=MODEL,
        resume="free",
        min_length=1,
        path=True,
        help="the data: a JSONL, JSON, CSV or Parquet file, a folder of them, or a hub data set",
    )
    format: Format | None = option(None, group=DATA, help="the data format, where its columns do not tell")
    max_tokens: int = option(
        1024, group=DATA, ge=2, aka="max_length max_seq_length cutoff_len", help="tokens an example may have"
    )
    batch_size: int = option(
        4, group=DATA, ge=1, aka="per_device_train_batch_size", help="examples in one forward pass"
    )
    train_on_prompt: bool = option(False, group=DATA, help="count the prompt's tokens in the loss too")


@dataclass(kw_only=True)
class Seed(Options):
    seed: int = option(0, group=MACHINE, ge=0, lt=2**32, help="the seed of every random choice")  # numpy's range


@dataclass(kw_only=True)
class Shards(Options):
    shard_size: int = option(
        10**9,
        group=OUTPUT,
        ge=1,
        size=parse_size,
        help="the largest output file, such as 500MB, 1GB or 2GiB",
        rule="must be a size such as 500MB, 1GB or 2GiB",
    )


@dataclass(kw_only=True)
class Verified(Options):
    verify: bool = option(
        True, group=OUTPUT, help="compute with what was written, and refuse what is not the adapted model"
    )
    data: str | None = option(
        None, group=OUTPUT, min_length=1, path=True, help="data to verify on (default: prompts of our own)"
    )
    max_kl: float | None = option(
        None,
        group=OUTPUT,
        ge=0,
        help="the largest distance from the adapted model, a KL in nats a token (default: by format and dtype)",
    )

    def verification(self) -> VerifySpec | None:
        """How an export is verified, or None."""
        return VerifySpec(self.data, self.max_kl) if self.verify else None

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        given = [name for name in ("data", "max_kl") if values.get(name) is not None and not values.get("verify", True)]
        rule, remedy = "has no effect without the verification", "Leave it out, or verify"
        return [problem(name, values[name], rule, remedy) for name in given]


@dataclass(kw_only=True)
class Json(Options):
    json: bool = option(False, group=OUTPUT, help="print JSON instead of text")


@dataclass(kw_only=True)
class Adapted(Compute):
    bits: Literal[4, 16] | None = option(
        None,
        group=QUANTIZATION,
        help="bits of the frozen weights: what the adapter was trained on, else 4 (NF4); or 16",
    )
    model: str | None = option(
        None,
        group=MODEL,
        min_length=1,
        path=True,
        help="the base model; only needed without an adapter, which names its own",
    )
    adapter: str | None = option(None, group=MODEL, min_length=1, path=True, help="the adapter folder")

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        if values.get("model", "bad") is None and values.get("adapter", "bad") is None:
            return [
                problem(
                    "model",
                    "(not given)",
                    "required without an adapter",
                    "Give a model, or the adapter folder that finetune wrote",
                )
            ]
        return []


@dataclass(kw_only=True)
class Spoken(Adapted):
    adapter: str | list[str] | None = option(  # type: ignore[assignment]  # several can speak
        None,
        group=MODEL,
        min_length=1,
        path=True,
        repeats=True,
        help="the adapter folder; given several times, each of them answers",
    )
    system: str | None = option(None, group=MODEL, help="the system message before it")
    max_new_tokens: int = option(128, group=GENERATION, ge=1, help="tokens to write at most")
    temperature: float = option(0.0, group=GENERATION, ge=0, help="of the sampling; 0 always takes the likeliest token")
    top_p: float = option(
        1.0, group=GENERATION, gt=0, le=1, help="sample among the likeliest tokens that together have this probability"
    )

    @property
    def adapters(self) -> list[str]:
        """The adapter folders: none, one or several."""
        given = self.adapter
        return [] if given is None else [given] if isinstance(given, str) else list(given)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        found = Adapted.conflicts(values)
        if 0 < values.get("temperature", 0.0) < 1e-4:
            rule = "is so low that the likeliest token is always taken"
            found.append(problem("temperature", values["temperature"], rule, "Give 0 for that, or at least 0.0001"))
        if values.get("top_p", 1.0) < 1.0 and values.get("temperature") == 0.0:
            rule, remedy = "has no effect at temperature=0.0", "Give a temperature such as 0.7, or leave it out"
            found.append(problem("top_p", values["top_p"], rule, remedy))
        return found
