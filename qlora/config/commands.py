"""Every option once: name, type, default, help and rule. Flags, YAML keys, checks and `--help` all come from here.

An option is a dataclass field made by `option(...)`; what several commands share stands in one mixin, so nothing is
typed twice. pydantic coerces and checks field by field: "1e-5" becomes a number, True is no integer, NaN no float. A
value that fails does not hide the next one: all problems, those between options included, are one UserError.

YAML is read as text (no YAML 1.1 guessing, where 1e-5 is a string, `no` a bool and 0123456 an octal number), so a value
means in a file what it means behind a flag. Alternative not taken: one pydantic model. It stops at the first bad field
before it compares fields, and users would get a foreign class; ours are plain dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qlora.config.options import (
    ADAPTER,
    CHECKPOINTS,
    DATA,
    EXCLUSIVE,
    GENERATION,
    MACHINE,
    MODEL,
    OUTPUT,
    QUANTIZATION,
    TRAINING,
    Options,
    option,
    show,
)
from qlora.errors import problem
from qlora.specs import AdapterSpec, OptimizerSpec, Quantization

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Format = Literal["chat", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]
FORMATS: tuple[str, ...] = get_args(Format)
# Options that more than one command has. (The fields of a class's last base come first.)


@dataclass(kw_only=True)
class _NamedModel(Options):
    model: str = option(
        group=MODEL, min_length=1, help="the base model: a folder, a hub id, a .gguf file, or smollm2-135m"
    )
    revision: str | None = option(None, group=MODEL, min_length=1, help="the branch, tag or commit of a hub model")


@dataclass(kw_only=True)
class _Output(Options):
    output: str = option(group=MODEL, min_length=1, help="the folder to write to")


@dataclass(kw_only=True)
class _Code(Options):
    trust_remote_code: bool = option(False, group=MACHINE, help="run Python code that comes with the model")


@dataclass(kw_only=True)
class _Compute(_Code):
    device: str = option(
        "auto",
        group=MACHINE,
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        help="auto, cpu, cuda or cuda:N",
        rule="must be auto, cpu, cuda or cuda:N",
    )
    dtype: Dtype = option("auto", group=MACHINE, help="what layers compute in; `qlora doctor` tells what auto means")


@dataclass(kw_only=True)
class _Bits(Options):
    bits: Literal[4, 16] = option(4, group=QUANTIZATION, help="bits of the frozen weights: 4 (NF4) or 16")


@dataclass(kw_only=True)
class _Blocks(Options):
    # None: the default for weights to quantize, and for a 4-bit checkpoint what it holds. So what is given means
    # something.
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] | None = option(
        None, group=QUANTIZATION, help="weights that share one NF4 scale (default 64, or as in a 4-bit checkpoint)"
    )
    double_quant: bool | None = option(
        None,
        group=QUANTIZATION,
        help="store the NF4 scales in 8 bits: 0.516 instead of 0.563 bytes a weight (default yes, or as in a 4-bit checkpoint)",
    )
    scales: Literal["absmax", "mse"] | None = option(
        None,
        group=QUANTIZATION,
        help="NF4 scales from each block's largest weight, as bitsandbytes has them, or of least squared error (default absmax)",
    )


@dataclass(kw_only=True)
class _Records(Options):
    data: str = option(
        group=MODEL,
        min_length=1,
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
class _Seed(Options):
    seed: int = option(0, group=MACHINE, ge=0, lt=2**32, help="the seed of every random choice")  # numpy's range


@dataclass(kw_only=True)
class _Shards(Options):
    shard_size: int = option(
        10**9,
        group=OUTPUT,
        ge=1,
        help="the largest output file, such as 500MB, 1GB or 2GiB",
        rule="must be a size such as 500MB, 1GB or 2GiB",
    )


@dataclass(kw_only=True)
class _Json(Options):
    json: bool = option(False, group=OUTPUT, help="print JSON instead of text")


@dataclass(kw_only=True)
class _Adapted(_Compute):
    bits: Literal[4, 16] | None = option(
        None,
        group=QUANTIZATION,
        help="bits of the frozen weights: what the adapter was trained on, else 4 (NF4); or 16",
    )
    model: str | None = option(
        None, group=MODEL, min_length=1, help="the base model; only needed without an adapter, which names its own"
    )
    adapter: str | None = option(None, group=MODEL, min_length=1, help="the adapter folder")

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


# The commands.


@dataclass(kw_only=True)
class FinetuneConfig(_Compute, _Seed, _Blocks, _Bits, _Output, _Records, _NamedModel):
    """Options of `qlora finetune`. Of `steps` and `epochs` at most one; with neither, `epochs` is 1."""

    method: Literal["lora", "dora"] = option("dora", group=ADAPTER, help="the kind of adapter")
    rank: int = option(16, group=ADAPTER, ge=1, aka="r lora_r", help="the rank r of the update B A")
    alpha: float = option(32.0, group=ADAPTER, gt=0, aka="lora_alpha", help="the update is scaled by alpha / rank")
    rslora: bool = option(False, group=ADAPTER, aka="use_rslora", help="scale by alpha / sqrt(rank) instead")
    dropout: float = option(
        0.0, group=ADAPTER, ge=0, lt=1, aka="lora_dropout", help="the probability of dropping an input of the adapter"
    )
    targets: str | list[str] = option(
        "all-linear",
        group=ADAPTER,
        min_length=1,
        aka="target_modules",
        rule="must be all-linear, names, or a regular expression",
        help="the layers to adapt: all-linear, names with commas, or a regex",
    )

    steps: int | None = option(None, group=TRAINING, ge=1, aka="max_steps", help="optimizer steps; excludes epochs")
    epochs: float | None = option(
        None, group=TRAINING, gt=0, aka="num_train_epochs", help="passes over the data; 1 if steps is not given either"
    )
    accumulate: int = option(
        1, group=TRAINING, ge=1, aka="gradient_accumulation_steps", help="batches in one optimizer step"
    )
    learning_rate: float = option(2e-4, group=TRAINING, gt=0, aka="lr", help="the highest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", group=TRAINING, aka="lr_scheduler_type", help="how the learning rate falls after the warmup"
    )
    warmup: int = option(0, group=TRAINING, ge=0, aka="warmup_steps", help="steps until the learning rate is highest")
    weight_decay: float = option(0.0, group=TRAINING, ge=0, help="AdamW's weight decay")
    clip: float = option(1.0, group=TRAINING, ge=0, aka="max_grad_norm", help="the largest gradient norm; 0: any")
    beta1: float = option(0.9, group=TRAINING, ge=0, lt=1, aka="adam_beta1", help="AdamW's decay of the mean")
    beta2: float = option(0.999, group=TRAINING, ge=0, lt=1, aka="adam_beta2", help="AdamW's decay of the variance")
    eps: float = option(1e-8, group=TRAINING, gt=0, aka="adam_epsilon", help="AdamW's epsilon")
    optimizer_memory: int | str = option(
        "auto",
        group=TRAINING,
        rule="must be auto, all, none or a size such as 200MB",
        help="memory for AdamW's state, the rest spills: 200MB, none, all; auto: all until it runs out",
    )
    optimizer_state: Literal["float32", "8bit"] = option(
        "float32", group=TRAINING, aka="optim", help="how AdamW keeps its state"
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        group=TRAINING,
        help="examples of a batch in one row without padding: where the model can, or on (it must), or off",
    )
    gradient_checkpointing: bool = option(
        False, group=TRAINING, help="less memory, more time: recompute layers in the backward pass"
    )

    memory: int | None = option(
        None,
        group=MACHINE,
        rule="must be a size such as 24GB",
        help="a budget for the whole process: settings are chosen that keep it",
    )

    truncate: Literal["end", "drop"] = option("end", group=DATA, help="a longer example loses its end, or is dropped")

    eval_data: str | None = option(
        None, group=CHECKPOINTS, min_length=1, help="held-out data to evaluate on; excludes eval_fraction"
    )
    eval_fraction: float = option(
        0.0, group=CHECKPOINTS, ge=0, lt=1, help="the part of the data to hold out for evaluation"
    )
    eval_every: int = option(
        0, group=CHECKPOINTS, ge=0, aka="eval_steps", help="steps between evaluations; 0: only at the start and the end"
    )
    save_every: int = option(
        0, group=CHECKPOINTS, ge=0, aka="save_steps", help="steps between checkpoints; 0: only at the end"
    )
    keep_checkpoints: int = option(
        0, group=CHECKPOINTS, ge=0, aka="save_total_limit", help="checkpoints to keep, the newest ones; 0: all"
    )
    resume: bool = option(
        False,
        group=CHECKPOINTS,
        aka="resume_from_checkpoint",
        help="go on from the last checkpoint in the output folder",
    )
    tensorboard: bool = option(False, group=CHECKPOINTS, help="write TensorBoard events beside metrics.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None and self.epochs is None:
            self.epochs = 1.0

    def adapter(self) -> AdapterSpec:
        targets = self.targets if isinstance(self.targets, str) else tuple(self.targets)
        return AdapterSpec(self.method, self.rank, self.alpha, self.dropout, self.rslora, targets)

    def optimizer(self) -> OptimizerSpec:
        betas = self.beta1, self.beta2
        return OptimizerSpec(
            self.learning_rate, betas, self.eps, self.weight_decay, self.optimizer_memory, self.optimizer_state
        )

    def quantization(self) -> Quantization:
        return Quantization(self.bits, self.blocksize, self.double_quant, self.scales)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        given = {name: value for name, value in values.items() if value}
        found = [
            problem(second, show(given[second]), f"excludes {first}={show(given[first])}", "Give one of the two")
            for first, second in EXCLUSIVE
            if first in given and second in given
        ]
        held_out = {"eval_data", "eval_fraction"}
        if "eval_every" in given and held_out <= values.keys() and not held_out & given.keys():
            found.append(
                problem(
                    "eval_every",
                    given["eval_every"],
                    "there is no held-out data to evaluate on",
                    "Give eval_data, or eval_fraction such as 0.05",
                )
            )
        if "steps" in given and given.get("warmup", 0) > given["steps"]:
            found.append(
                problem(
                    "warmup",
                    given["warmup"],
                    f"must be at most steps={given['steps']}",
                    "Give more steps or a shorter warmup",
                )
            )
        return found


@dataclass(kw_only=True)
class PlanConfig(_Json, FinetuneConfig):
    """Options of `qlora plan`: those of finetune, so that its config file serves."""

    data: str | None = option(
        None, group=MODEL, min_length=1, help="plan for the batches of this data; without it for examples of max_tokens"
    )
    output: str | None = option(None, group=MODEL, min_length=1, help="not written to")


@dataclass(kw_only=True)
class MergeConfig(_Code, _Shards, _Output):
    """Options of `qlora merge`."""

    adapter: str = option(group=MODEL, min_length=1, help="the adapter folder")
    model: str | None = option(
        None, group=MODEL, min_length=1, help="where the base model lies now, if not where the adapter says"
    )
    base: Literal["dequantized", "original"] = option(
        "dequantized", group=OUTPUT, help="merge into the NF4 values that training saw, or into the original weights"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", group=OUTPUT, help="the dtype of the merged weights")


@dataclass(kw_only=True)
class QuantizeConfig(_Code, _Shards, _Blocks, _Output, _NamedModel):
    """Options of `qlora quantize`."""

    dtype: Dtype = option("auto", group=OUTPUT, help="the dtype of the weights that are not quantized")


@dataclass(kw_only=True)
class GenerateConfig(_Seed, _Adapted):
    """Options of `qlora generate`."""

    prompt: str = option(group=MODEL, min_length=1, help="the prompt, in quotes")
    system: str | None = option(None, group=MODEL, help="the system message before it")
    max_new_tokens: int = option(128, group=GENERATION, ge=1, help="tokens to write at most")
    temperature: float = option(0.0, group=GENERATION, ge=0, help="of the sampling; 0 always takes the likeliest token")
    top_p: float = option(
        1.0, group=GENERATION, gt=0, le=1, help="sample among the likeliest tokens that together have this probability"
    )
    raw: bool = option(False, group=GENERATION, help="continue the prompt as it stands, without the chat template")

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        found = _Adapted.conflicts(values)
        if values.get("top_p", 1.0) < 1.0 and values.get("temperature") == 0.0:
            found.append(
                problem(
                    "top_p",
                    values["top_p"],
                    "has no effect at temperature=0.0",
                    "Give a temperature such as 0.7, or leave it out",
                )
            )
        if values.get("raw") and values.get("system") is not None:
            found.append(
                problem(
                    "system", show(values["system"]), "a raw prompt has no system message", "Leave out raw or system"
                )
            )
        return found


@dataclass(kw_only=True)
class EvalConfig(_Json, _Records, _Adapted):
    """Options of `qlora eval`."""


@dataclass(kw_only=True)
class DoctorConfig(_Json):
    """Options of `qlora doctor`."""
