"""Every option once, by command: name, type, default, help and rule. Flags, YAML, checks and `--help` come from here.

An option is a dataclass field made by `option(...)`; what several commands share is a mixin of `config.shared`, so
nothing is typed twice. Options that become a whole object (`quantization()`, `adapter()`, `optimizer()`) take default
and range from that object's field. The alternative, options at the code that reads them, leaves nobody who can check
two of them against each other, or list them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.config.options import ADAPTER, CHECKPOINTS, DATA, GENERATION, MACHINE, MODEL, OUTPUT, TRAINING, option, show
from qlora.config.shared import (
    Adapted,
    Bits,
    Blocks,
    Calibrated,
    Code,
    Compute,
    Device,
    Dtype,
    Json,
    NamedModel,
    Output,
    Records,
    Seed,
    Shards,
    Spoken,
    Verified,
    calibration_text,
)
from qlora.errors import problem
from qlora.sizes import parse_memory, parse_size
from qlora.specs import (
    AdapterSpec,
    ExportFormat,
    ExportSpec,
    GGUFType,
    Init,
    MergeBase,
    Method,
    OptimizerSpec,
    Quantization,
    declared,
)


@dataclass(kw_only=True)
class FinetuneConfig(Compute, Seed, Calibrated, Blocks, Bits, Output, Records, NamedModel):
    """Options of `qlora finetune`. Of `steps` and `epochs` at most one; with neither, `epochs` is 1."""

    method: Method = option(**declared(AdapterSpec, "method"), group=ADAPTER, help="the kind of adapter")
    rank: int = option(
        **declared(AdapterSpec, "rank"), group=ADAPTER, aka="r lora_r", help="the rank r of the update B A"
    )
    alpha: float = option(
        **declared(AdapterSpec, "alpha"), group=ADAPTER, aka="lora_alpha", help="the update is scaled by alpha / rank"
    )
    rslora: bool = option(
        **declared(AdapterSpec, "rslora"), group=ADAPTER, aka="use_rslora", help="scale by alpha / sqrt(rank) instead"
    )
    dropout: float = option(
        **declared(AdapterSpec, "dropout"),
        group=ADAPTER,
        aka="lora_dropout",
        help="the probability of dropping an input of the adapter",
    )
    init: Init = option(
        **declared(AdapterSpec, "init"), group=ADAPTER, aka="init_lora_weights", help="how A is drawn at the start"
    )
    adapter_init: Literal["auto", "error", "zero"] = option(
        "auto",
        group=ADAPTER,
        help="what the adapter does at the start: undo the error of a 4-bit base, or nothing; "
        "auto: error, where the 16-bit weights are at hand",
    )
    targets: str | list[str] = option(
        **declared(AdapterSpec, "targets"),
        group=ADAPTER,
        min_length=1,
        aka="target_modules",
        rule="must be all-linear, names, or a regular expression",
        help="the layers to adapt: all-linear, names with commas, or a regex",
    )

    steps: int | None = option(
        None, group=TRAINING, ge=1, aka="max_steps", resume="free", help="optimizer steps; excludes epochs"
    )
    epochs: float | None = option(
        None,
        group=TRAINING,
        gt=0,
        excludes="steps",
        resume="free",
        aka="num_train_epochs",
        help="passes over the data; 1 if steps is not given either",
    )
    accumulate: int = option(
        1, group=TRAINING, ge=1, aka="gradient_accumulation_steps", help="batches in one optimizer step"
    )
    learning_rate: float = option(
        **declared(OptimizerSpec, "learning_rate"), group=TRAINING, aka="lr", help="the highest learning rate"
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", group=TRAINING, aka="lr_scheduler_type", help="how the learning rate falls after the warmup"
    )
    warmup: int = option(0, group=TRAINING, ge=0, aka="warmup_steps", help="steps until the learning rate is highest")
    weight_decay: float = option(**declared(OptimizerSpec, "weight_decay"), group=TRAINING, help="AdamW's weight decay")
    clip: float = option(1.0, group=TRAINING, ge=0, aka="max_grad_norm", help="the largest gradient norm; 0: any")
    beta1: float = option(0.9, group=TRAINING, ge=0, lt=1, aka="adam_beta1", help="AdamW's decay of the mean")
    beta2: float = option(0.999, group=TRAINING, ge=0, lt=1, aka="adam_beta2", help="AdamW's decay of the variance")
    eps: float = option(**declared(OptimizerSpec, "eps"), group=TRAINING, aka="adam_epsilon", help="AdamW's epsilon")
    optimizer_memory: int | str = option(
        **declared(OptimizerSpec, "memory"),
        group=TRAINING,
        size=parse_memory,
        resume="free",
        rule="must be auto, all, none or a size such as 200MB",
        help="memory for AdamW's state, the rest spills: 200MB, none, all; auto: all until it runs out",
    )
    optimizer_state: Literal["float32", "8bit"] = option(
        **declared(OptimizerSpec, "state"), group=TRAINING, aka="optim", help="how AdamW keeps its state"
    )
    packing: Literal["auto", "on", "off"] = option(
        "auto",
        group=TRAINING,
        help="examples of a batch in one row without padding: where the model can, or on (it must), or off",
    )
    gradient_checkpointing: bool = option(
        False, group=TRAINING, resume="free", help="less memory, more time: recompute layers in the backward pass"
    )

    memory: int | None = option(
        None,
        group=MACHINE,
        size=parse_size,
        resume="free",
        rule="must be a size such as 24GB",
        help="a budget for the whole process: settings are chosen that keep it",
    )

    truncate: Literal["end", "drop"] = option("end", group=DATA, help="a longer example loses its end, or is dropped")

    allow_endless: bool = option(
        False,
        group=DATA,
        resume="free",
        help="train although no example keeps the end of its answer, so that the model does not learn to stop",
    )

    eval_data: str | None = option(
        None,
        group=CHECKPOINTS,
        min_length=1,
        path=True,
        resume="free",
        help="held-out data to evaluate on; excludes eval_fraction",
    )
    eval_fraction: float = option(
        0.0, group=CHECKPOINTS, ge=0, lt=1, excludes="eval_data", help="the part of the data to hold out for evaluation"
    )
    eval_every: int = option(
        0,
        group=CHECKPOINTS,
        ge=0,
        aka="eval_steps",
        resume="free",
        help="steps between evaluations; 0: only at the start and the end",
    )
    save_every: int = option(
        0,
        group=CHECKPOINTS,
        ge=0,
        aka="save_steps",
        resume="free",
        help="steps between checkpoints; 0: only at the end",
    )
    save_minutes: float = option(
        10.0,
        group=CHECKPOINTS,
        ge=0,
        resume="free",
        help="also save when so many minutes have passed since the last checkpoint (two of these stay); 0: never",
    )
    keep_checkpoints: int = option(
        0,
        group=CHECKPOINTS,
        ge=0,
        aka="save_total_limit",
        resume="free",
        help="checkpoints to keep, the newest ones; 0: all",
    )
    resume: bool | Literal["auto"] = option(
        False,
        group=CHECKPOINTS,
        aka="resume_from_checkpoint",
        resume="free",
        rule="must be true, false or auto",
        help="go on from the last checkpoint in the output folder; auto: if there is one, else start",
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop",
        group=TRAINING,
        resume="free",
        help="what to do when a loss or gradient is no finite number: stop, or skip the update (10 in a row at most)",
    )
    tensorboard: bool = option(
        False, group=CHECKPOINTS, resume="free", help="write TensorBoard events beside metrics.jsonl"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None and self.epochs is None:
            self.epochs = 1.0

    def adapter(self) -> AdapterSpec:
        """What to attach."""
        targets = self.targets if isinstance(self.targets, str) else tuple(self.targets)
        return AdapterSpec(self.method, self.rank, self.alpha, self.dropout, self.rslora, self.init, targets)

    def optimizer(self) -> OptimizerSpec:
        """What steps."""
        betas = self.beta1, self.beta2
        return OptimizerSpec(
            self.learning_rate, betas, self.eps, self.weight_decay, self.optimizer_memory, self.optimizer_state
        )

    def quantization(self) -> Quantization:
        """How the base is kept."""
        return Quantization(self.bits, self.blocksize, self.double_quant, self.scales)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        given = {name: value for name, value in values.items() if value}
        found = Calibrated.conflicts(values)
        if values.get("bits") == 16 and given.get("adapter_init") == "error":
            rule = "16-bit weights have no quantization error"
            found.append(problem("adapter_init", "error", rule, "Leave it out, or use `bits=4`"))
        if values.get("bits") == 16 and given.get("codes") == "gptq":
            found.append(problem("codes", "gptq", "16-bit weights have no codes", "Leave it out, or use `bits=4`"))
        nothing = given.get("adapter_init") == "zero" or values.get("bits") == 16
        if "calibrate" in given and nothing and given.get("codes") == "nearest":
            rule, remedy = "nothing is calibrated without an error to undo", "Leave it out, or use `adapter_init=error`"
            found.append(problem("calibrate", given["calibrate"], rule, remedy))
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
        if 0 < given.get("clip", 1.0) < 1e-12:
            rule = "leaves nothing of any gradient"
            found.append(problem("clip", given["clip"], rule, "Give a number such as 1.0, or 0 for no clipping"))
        if given.get("dropout", 0.0) > 0.99:
            found.append(problem("dropout", given["dropout"], "drops all but nothing", "Give at most 0.99"))
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
class PlanConfig(Json, FinetuneConfig):
    """Options of `qlora plan`: those of finetune, so that its config file serves."""

    data: str | None = option(  # type: ignore[assignment]  # a plan can do without
        None,
        group=MODEL,
        min_length=1,
        path=True,
        help="plan for the batches of this data; without it for examples of max_tokens",
    )
    output: str | None = option(  # type: ignore[assignment]
        None, group=MODEL, min_length=1, path=True, help="not written to"
    )


@dataclass(kw_only=True)
class VerifyConfig(FinetuneConfig):
    """Options of `qlora verify-resume`: those of finetune, so that its config file serves; the run is cut short, and
    saved after every step unless told otherwise.
    """

    trial_steps: int = option(
        8, group=CHECKPOINTS, ge=1, le=10_000, help="optimizer steps of the run, in place of steps and epochs"
    )
    kills: int = option(5, group=CHECKPOINTS, ge=1, le=10_000, help="how often the run is killed")


@dataclass(kw_only=True)
class MergeConfig(Code, Verified, Shards, Output):
    """Options of `qlora merge`."""

    adapter: str = option(group=MODEL, min_length=1, path=True, help="the adapter folder")
    model: str | None = option(
        None, group=MODEL, min_length=1, path=True, help="where the base model lies now, if not where the adapter says"
    )
    base: MergeBase = option(
        **declared(ExportSpec, "base"),
        group=OUTPUT,
        help="merge into the NF4 values that training saw, into the original weights, or into what comes closer",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", group=OUTPUT, help="the dtype of the merged weights")

    def spec(self) -> ExportSpec:
        """What is written."""
        return ExportSpec("hf", self.base, self.dtype, shard_size=self.shard_size)


@dataclass(kw_only=True)
class ExportConfig(MergeConfig):
    """Options of `qlora export`: those of merge, and the format."""

    to: ExportFormat = option(
        **declared(ExportSpec, "to"),
        group=OUTPUT,
        help="16-bit weights (hf), a 4-bit base with a plain LoRA adapter (bnb4-lora), 4 bits merged (bnb4), one file "
        "for llama.cpp (gguf), a LoRA for llama.cpp (gguf-lora)",
    )
    dtype: Dtype = option(  # type: ignore[assignment]  # it knows that of the training
        **declared(ExportSpec, "dtype"),
        group=OUTPUT,
        help="the dtype of weights that are not quantized; auto: bf16 for hf, else what the training computed in",
    )
    double_quant: bool = option(
        **declared(ExportSpec, "double_quant"),
        group=OUTPUT,
        help="bnb4-lora: keep the rescaled constants in 8 bits, which is smaller and no longer exact",
    )
    type: GGUFType = option(
        **declared(ExportSpec, "type"),
        group=OUTPUT,
        help="gguf, gguf-lora: the type of matrices; auto: F16 for gguf, Q8_0 for the base of a DoRA in gguf-lora",
    )

    def spec(self) -> ExportSpec:
        return ExportSpec(self.to, self.base, self.dtype, self.double_quant, self.shard_size, self.type)


@dataclass(kw_only=True)
class QuantizeConfig(Code, Shards, Calibrated, Blocks, Output, NamedModel):
    """Options of `qlora quantize`."""

    dtype: Dtype = option("auto", group=OUTPUT, help="the dtype of the weights that are not quantized")

    def quantization(self) -> Quantization:
        """How linear weights are written."""
        return Quantization(4, self.blocksize, self.double_quant, self.scales)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        found = Calibrated.conflicts(values)
        given, codes = values.get("calibrate"), values.get("codes")
        if calibration_text(given)[0] is None and codes == "gptq":
            rule = "is needed by codes=gptq" if given is None else "names no data"
            remedy = "Give data such as train.jsonl, like what the model will read"
            found.append(problem("calibrate", given or "(not given)", rule, remedy))
        if given is not None and codes == "nearest":
            rule = "nothing is calibrated with the nearest codes"
            found.append(problem("calibrate", given, rule, "Leave it out, or use `codes=gptq`"))
        return found


@dataclass(kw_only=True)
class GenerateConfig(Seed, Spoken):
    """Options of `qlora generate`."""

    prompt: str | None = option(None, group=MODEL, min_length=1, help="the prompt, in quotes")
    prompts: str | None = option(
        None,
        group=MODEL,
        min_length=1,
        path=True,
        help="a file of prompts: a text file with one a line, or data, of which the last answer is left out",
    )
    batch_size: int = option(
        1,
        group=GENERATION,
        ge=1,
        help="prompts that are answered together; one by one they are shown as they are written",
    )
    raw: bool = option(False, group=GENERATION, help="continue the prompt as it stands, without the chat template")
    output: str | None = option(
        None, group=OUTPUT, min_length=1, path=True, help="write the answers to this new file, as JSON Lines"
    )

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        found = Spoken.conflicts(values)
        if values.get("prompt", "bad") is None and values.get("prompts", "bad") is None:
            found.append(problem("prompt", "(not given)", "required without a file of prompts", "Give the prompt"))
        if values.get("raw") and values.get("system") is not None:
            found.append(
                problem(
                    "system", show(values["system"]), "a raw prompt has no system message", "Leave out raw or system"
                )
            )
        return found


@dataclass(kw_only=True)
class ChatConfig(Seed, Spoken):
    """Options of `qlora chat`."""

    max_new_tokens: int = option(512, group=GENERATION, ge=1, help="tokens of a reply at most")
    compare: bool = option(False, group=GENERATION, help="every adapter and the base reply (`/compare` in the chat)")


@dataclass(kw_only=True)
class EvalConfig(Json, Records, Adapted):
    """Options of `qlora eval`."""


@dataclass(kw_only=True)
class SelftestConfig(Device):
    """Options of `qlora selftest`."""

    only: str | None = option(None, group=MACHINE, help="checks with commas between them, by the names of the table")
    json: str | None = option(None, group=OUTPUT, path=True, help="file to write everything to, for a report")


@dataclass(kw_only=True)
class DoctorConfig(Json):
    """Options of `qlora doctor`."""

    trace: bool = option(
        False, group=MACHINE, help="take a training step of a tiny model and tell which kernels it ran, and how often"
    )
