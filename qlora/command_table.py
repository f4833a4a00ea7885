"""The commands: each a word after `qlora`, with its options and the function that does it and prints what came out.

Heavy imports happen inside the functions, and `qlora --help` answers in a fraction of a second. The alternative, a
module for each command, spreads one table over eight files.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.commands import (
    ChatConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    SelftestConfig,
    VerifyConfig,
)
from qlora.config.data_command import DataConfig
from qlora.config.options import Options
from qlora.errors import guard
from qlora.streams import steady


@contextmanager
def _imports() -> Iterator[None]:
    """Import torch, transformers and what needs them, with other libraries' chatter kept off the terminal; their
    errors, and the bars of long downloads, stay.

    A process of the command begins without collecting garbage (`__main__`). It begins to collect here, and passes over
    the objects of the modules, which stay.
    """
    _quiet()
    yield
    _collect()


def _collect() -> None:
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _quiet() -> None:
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells which kernels it could not download
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()


def _finetune(config: FinetuneConfig) -> None:
    with _imports():
        from qlora.run.recipe import finetune

    folder = finetune(config).output
    folder = folder if folder != Path(config.output).absolute() else Path(config.output)  # it may have been moved
    adapter, merged = (shlex.quote(str(folder / name)) for name in ("adapter", "merged"))
    with steady():  # the adapter is there, whoever reads of it
        print(
            f'\nTry it:    qlora generate --adapter {adapter} --prompt "..."\n'
            f"Merge it:  qlora merge --adapter {adapter} --output {merged}",
            flush=True,
        )


def _verify_resume(config: VerifyConfig) -> int:
    with _imports():
        from qlora.run.verify import verify_resume

    tally = verify_resume(config)
    print(tally)
    return 1 if tally.differences else 0


def _export(config: MergeConfig) -> None:
    with _imports():
        from qlora.export.formats import export_adapter

    folder = shlex.quote(config.output)
    with steady():  # a reader that goes ends no work
        spec, trust = config.spec(), config.trust_remote_code
        done = export_adapter(
            config.adapter,
            config.output,
            spec,
            model=config.model,
            trust_remote_code=trust,
            verify=config.verification(),
        )
        said = "not verified" if done.closeness is None else f"verified: {done.closeness}"
        onto = f" (merged into the {done.base} weights)" if spec.base == "best" else ""
        print(f"{said}{onto}\n\nThe model in {folder} needs no qlora: {done.use}", flush=True)
        if spec.to == "hf":
            print(f'Try it:    qlora generate --model {folder} --bits 16 --prompt "..."', flush=True)


def _generate(config: GenerateConfig) -> None:
    with _imports():
        from qlora.run.commands import generate_command

    answers = generate_command(config, lambda text: print(text, end="", flush=True))
    if config.output is not None:
        print(f"{len(answers)} answers in {config.output}")


def _chat(config: ChatConfig) -> None:
    with _imports():
        from qlora.run.commands import chat_command

    chat_command(config)


def _eval(config: EvalConfig) -> None:
    with _imports():
        from qlora.run.commands import evaluate_command

    result = evaluate_command(config)
    if config.json:  # JSON has no infinity
        infinite = {name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)}
        print(json.dumps({**result, **dict.fromkeys(infinite)}, indent=2))
        return
    width = max(len(name) for name in result)
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def _quantize(config: QuantizeConfig) -> None:
    with _imports():
        from qlora.run.codes import quantize_command

    with steady():
        quantize_command(config)
        print(f'\nTry it:    qlora generate --model {shlex.quote(config.output)} --prompt "..."', flush=True)


def _plan(config: PlanConfig) -> None:
    with _imports():
        from qlora.run.commands import plan_command

    found = plan_command(config)
    text = found.pop("text")
    print(json.dumps(found, indent=2) if config.json else text)


def _data(config: DataConfig) -> None:
    with _imports():
        from qlora.run.data_command import data_command

    print(data_command(config))


def _selftest(config: SelftestConfig) -> int:
    from qlora.selftest.report import as_json, as_text, selftest

    _collect()
    found = selftest(config.device, config.only)
    if config.json is not None:
        with guard("json", config.json, "cannot be written", "Choose another file"):
            Path(config.json).write_text(json.dumps(as_json(found), indent=2), encoding="utf-8")
    print(as_text(found))
    return 0 if all(row.ok for row in found["rows"]) else 1


def _doctor(config: DoctorConfig) -> None:
    from qlora import doctor

    found = doctor.report()
    if config.trace:
        with _imports():
            from qlora.run.trace import trace
        found["trace"] = trace()
    print(json.dumps(found, indent=2) if config.json else doctor.as_text(found))


@dataclass(frozen=True)
class Command:
    """A word after `qlora`: its options, what it does (an exit code, None: 0), and a line about it.

    `config_file`: it takes --config FILE.
    """

    options: type[Options]
    run: Callable[[Any], int | None]
    summary: str
    example: str
    config_file: bool = False
    word: str = ""  # the option that a word without a flag is


COMMANDS = {
    "finetune": Command(
        FinetuneConfig,
        _finetune,
        "train an adapter on your data",
        "--model smollm2-135m --data train.jsonl --output runs/first",
        config_file=True,
    ),
    "plan": Command(
        PlanConfig,
        _plan,
        "predict the memory of a fine-tuning run, without its weights",
        "--model smollm2-135m --batch-size 8 --memory 2GB",
        config_file=True,
    ),
    "verify-resume": Command(
        VerifyConfig,
        _verify_resume,
        "kill a short run at random moments, resume it, and compare to the bit",
        "--model smollm2-135m --data train.jsonl --output runs/verify --steps 8",
        config_file=True,
    ),
    "data": Command(
        DataConfig,
        _data,
        "show what a fine-tuning run would learn from data, token by token",
        "train.jsonl --model smollm2-135m --html data.html",
        config_file=True,
        word="data",
    ),
    "generate": Command(
        GenerateConfig,
        _generate,
        "let a model, or a model with an adapter, write",
        '--adapter runs/first/adapter --prompt "Hello"',
    ),
    "chat": Command(
        ChatConfig, _chat, "talk to a model and its adapters, side by side", "--adapter runs/first/adapter"
    ),
    "eval": Command(
        EvalConfig,
        _eval,
        "measure loss, perplexity and token accuracy on data",
        "--adapter runs/first/adapter --data test.jsonl",
    ),
    "merge": Command(
        MergeConfig,
        _export,
        "write base and adapter as one ordinary model folder",
        "--adapter runs/first/adapter --output runs/first/merged",
    ),
    "export": Command(
        ExportConfig,
        _export,
        "write an adapter as others serve it, and verify that it is the same model",
        "--adapter runs/first/adapter --to bnb4-lora --output runs/first/folded",
    ),
    "quantize": Command(
        QuantizeConfig,
        _quantize,
        "write a 4-bit checkpoint that bitsandbytes reads",
        "--model smollm2-135m --output smollm2-nf4",
    ),
    "selftest": Command(
        SelftestConfig,
        _selftest,
        "test every kernel on this machine, and go round those that are wrong",
        "--json selftest.json",
    ),
    "doctor": Command(DoctorConfig, _doctor, "tell what this machine has, what will be used, what is missing", ""),
}
