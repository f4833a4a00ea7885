"""Every option once: name, type, default, help and rule. Flags, YAML keys, checks and `--help` all come from here.

An option is a dataclass field made by `option(...)`; what several commands share stands in one mixin, so nothing is
typed twice. pydantic coerces and checks field by field: "1e-5" becomes a number, True is no integer, NaN no float. A
value that fails does not hide the next one: all problems, those between options included, are one UserError.

YAML is read as text (no YAML 1.1 guessing, where 1e-5 is a string, `no` a bool and 0123456 an octal number), so a value
means in a file what it means behind a flag. Alternative not taken: one pydantic model. It stops at the first bad field
before it compares fields, and users would get a foreign class; ours are plain dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from qlora.errors import UserError, problem

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Format = Literal["chat", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]
FORMATS: tuple[str, ...] = get_args(Format)

GROUPS = (
    "model and data",
    "quantization",
    "adapter",
    "training",
    "data",
    "evaluation and checkpoints",
    "generation",
    "output",
    "machine",
)
MODEL, QUANTIZATION, ADAPTER, TRAINING, DATA, CHECKPOINTS, GENERATION, OUTPUT, MACHINE = GROUPS


def option(default: Any = MISSING, *, group: str, help: str, rule: str = "", aka: str = "", **limits: Any) -> Any:
    """A dataclass field. `help` begins with a noun where the option is required (it also reads after "Give ...");
    `limits` are pydantic's (ge, lt, min_length, pattern, ...); `rule` replaces the sentence made from them; `aka` holds
    names that other trainers use, so that an unknown one leads here."""
    return field(
        default=default, metadata={"help": help, "group": group, "rule": rule, "aka": aka.split(), "limits": limits}
    )


@dataclass(kw_only=True)
class Options:
    """What the options of every command do: coerce and check themselves when made.

    Raises: UserError with every problem found.
    """

    def __post_init__(self) -> None:
        for name, value in _checked(type(self), vars(self)).items():
            setattr(self, name, value)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        """Problems between options. `values` holds only those that passed on their own, coerced."""
        return []


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


EXCLUSIVE = (("steps", "epochs"), ("eval_data", "eval_fraction"))


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


# Reading the declarations.

Entry = dataclasses.Field[Any]
AnyOptions = TypeVar("AnyOptions", bound=Options)


def entries(cls: type[Options] | Options) -> list[Entry]:
    """The options of a command, in the order of their groups."""
    return sorted(dataclasses.fields(cls), key=lambda entry: GROUPS.index(entry.metadata["group"]))


@functools.cache
def kinds(cls: type[Options]) -> dict[str, Any]:
    """Option name -> its type."""
    return get_type_hints(cls)


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of an optional one; () for other types."""
    return next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal), ())


def shown_default(entry: Entry) -> str:
    """A default as a user would type it; "" where there is none."""
    if entry.default is MISSING or entry.default is None:
        return ""
    if entry.name == "shard_size":
        return f"{entry.default // 10**9}GB"
    return ("yes" if entry.default else "no") if isinstance(entry.default, bool) else f"{entry.default}"


def show(value: object) -> str:
    """A value on one line of an error message."""
    text = str(value)
    if isinstance(value, str) and (not text.strip() or not text.isprintable()):
        text = repr(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, or None."""
    names = list(names)
    found = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1)
    return found[0] if found else next((longer for longer in names if name and longer.startswith(name)), None)


def nearest_option(cls: type[Options], name: str) -> str | None:
    """The option that was probably meant by an unknown name, or None."""
    known = {alias: entry.name for entry in entries(cls) for alias in (entry.name, *entry.metadata["aka"])}
    return known.get(nearest(name, known) or "")


# Checking.


def _number(value: object) -> object:
    """bool is no number; text such as 1e3 may be a whole one."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?[eE][+-]?\d+\s*", value):
        return float(value)
    return value


def _numbered_choice(value: object) -> object:
    """ "16" -> 16, for a Literal of numbers."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value) else _number(value)


def parse_memory(value: object) -> int | str:
    """A budget of the optimizer's state: "auto", "all", "none", or bytes, also as "200MB". Raises: ValueError."""
    value = _size(value)
    if value in ("auto", "all", "none") or (type(value) in (int, float) and value >= 0 and value == int(value)):
        return value if isinstance(value, str) else int(value)
    raise ValueError("must be auto, all, none or a size such as 200MB")


def _size(value: object) -> object:
    """ "1GB", "500 MB", "2GiB" -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower()) if isinstance(value, str) else None
    if not match:
        return _number(value)
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


SIZES = {"shard_size": _size, "memory": _size, "optimizer_memory": parse_memory}  # options in bytes


@functools.cache
def _checker(cls: type[Options], name: str) -> Any:
    """pydantic's checker of one option. Imported here, as `--help` does not need it."""
    from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

    kind, limits = kinds(cls)[name], next(entry for entry in entries(cls) if entry.name == name).metadata["limits"]
    marks: list[Any] = [Field(**limits)]
    if name in SIZES:
        marks.append(BeforeValidator(SIZES[name]))
    elif isinstance((choices(kind) or [""])[0], int):
        marks.append(BeforeValidator(_numbered_choice))
    elif {int, float} & {kind, *get_args(kind)}:
        marks.append(BeforeValidator(_number))
    return TypeAdapter(Annotated[(kind, *marks)], config=ConfigDict(allow_inf_nan=False))


_TYPE_RULES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
}


def _problem(entry: Entry, kind: Any, value: object, error: Mapping[str, Any]) -> str:
    """One line from pydantic's first error about an option: what is wrong, and what to do."""
    words = [choice for choice in choices(kind) if isinstance(choice, str)]
    meant = nearest(value, words) if isinstance(value, str) else None
    what, _, how = error["type"].partition("_")
    if how in ("parsing", "type", "from_float", "parsing_size") and what in _TYPE_RULES:
        rule = _TYPE_RULES[what]
    else:
        rule = error["msg"].replace("Value error, ", "").replace("Input should", "must").replace("'", "")
        rule = rule.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    rule = entry.metadata["rule"] or rule
    if error["type"].endswith("too_short"):
        rule, remedy = "must not be empty", f"Give {entry.metadata['help']}"
    elif meant:
        return f"{entry.name}={show(value)}: {rule}. Did you mean {meant}?"
    elif entry.default is MISSING:
        remedy = f"Give {entry.metadata['help']}"
    else:
        default = shown_default(entry)
        remedy = "Correct it or leave it out" + (f" for the default, {default}" if default else "")
    return problem(entry.name, show(value), rule, remedy)


def _checked(cls: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """All options of `cls`: those given, coerced and checked, and defaults. Raises: UserError with every problem."""
    from pydantic import ValidationError

    names = [entry.name for entry in entries(cls)]
    problems, good = [], {}
    for name in (name for name in values if name not in names):
        meant = nearest_option(cls, name)
        problems.append(
            f"{show(name)}={show(values[name])}: not an option. "
            + (f"Did you mean {meant}?" if meant else "Remove it.")
        )
    for entry in entries(cls):
        name = entry.name
        if name not in values and entry.default is MISSING:
            problems.append(problem(name, "(not given)", "required", f"Give {entry.metadata['help']}"))
            continue
        value = values.get(name, entry.default)
        try:
            good[name] = _checker(cls, name).validate_python(value)
        except ValidationError as error:
            problems.append(_problem(entry, kinds(cls)[name], value, error.errors()[0]))
    problems += cls.conflicts(good)
    if problems:
        raise UserError(problems)
    return good


# Options from a file, and a file from options.


def from_options(cls: type[AnyOptions], values: Mapping[str, Any]) -> AnyOptions:
    """Options by name, as text or Python values. Like `cls(**values)`, but a name that is missing or unknown is one
    more problem among the others. Raises: UserError."""
    return cls(**_checked(cls, values))


def from_yaml(cls: type[AnyOptions], path: str | Path, overrides: Mapping[str, Any] | None = None) -> AnyOptions:
    """Options from a YAML file. `overrides` (the flags) win, also over an option of the file that they exclude.

    Raises: UserError: no such file, not YAML, a key twice, an unknown key (with the nearest name), any bad value.
    """
    overrides = overrides or {}
    values = _read_yaml(path)
    for first, second in (*EXCLUSIVE, *(pair[::-1] for pair in EXCLUSIVE)):
        if first in overrides and second not in overrides:
            values.pop(second, None)
    return from_options(cls, {**values, **overrides})


def to_yaml(config: Options) -> str:
    """Every option, resolved, as YAML that `from_yaml` reads back to an equal config."""
    values = {entry.name: getattr(config, entry.name) for entry in entries(config)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class _Loader(yaml.BaseLoader):
    """Scalars stay text, but for a plain null."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's options, as text or None or lists of text."""

    def failure(rule: str, remedy: str) -> UserError:
        return UserError(problem("config", show(str(path)), rule, remedy))

    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    except OSError as error:
        raise failure(f"cannot be read ({error.strerror})", "Give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise failure("is not UTF-8 text", "Give the path of a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise failure(f"is not valid YAML{where}: {said}", "Correct that place") from error
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise failure("must hold one `option: value` a line", "Write for example `rank: 16`")
    lines: dict[str, list[int]] = {}
    for key, _ in node.value:
        lines.setdefault(key.value, []).append(key.start_mark.line + 1)
    twice = [
        problem(
            name,
            show(values.get(name)),
            f"given {len(at)} times in {path}, lines {', '.join(map(str, at))}",
            "Keep one of them",
        )
        for name, at in lines.items()
        if len(at) > 1
    ]
    if twice:
        raise UserError(twice)
    return {str(name): value for name, value in values.items()}
