"""The commands beside `finetune`, from their options to what they print: plan, eval, generate, chat.

    config -> load_adapted (or read_inputs) -> one function below -> a dictionary or a text

They only pass on: what a command does stands in the module that it calls. The alternative, commands inside evaluate.py
and generate.py, made those know every option.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.chat import Conversation, Manner, Screen, chat
from qlora.config.commands import ChatConfig, EvalConfig, GenerateConfig, PlanConfig
from qlora.data.doctor import notes
from qlora.data.prompts import read_prompts
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.errors import UserError, problem
from qlora.evaluate import evaluate
from qlora.files import replace_file
from qlora.generate import Listener, Prompt, Sampling, generate_batch, prompt_rows
from qlora.models.device import products_of
from qlora.models.info import base_info
from qlora.models.limits import model_limits, refuse_length, refuse_tokens, source_limits
from qlora.plan.report import describe
from qlora.run.adapted import Voice, load_adapted, load_voices, speaking
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
    with products_of(config.dtype, model.device):
        result = evaluate(model, data.examples, config.batch_size)
    base = base_info(model)
    about = {"model": base.model, "adapter": config.adapter, "data": config.data, "format": data.format}
    counts = {"examples": len(data.examples), "truncated": data.truncated, "dropped": data.dropped}
    return {**dataclasses.asdict(result), **about, **counts, "notes": notes(data, config.max_tokens)}


@dataclass(frozen=True)
class Answer:
    """What one voice said to one prompt; `adapter`: its folder, None for the base."""

    prompt: Prompt
    adapter: str | None
    answer: str


def generate_command(config: GenerateConfig, show: Callable[[str], object] = lambda text: None) -> list[Answer]:
    """`qlora generate`: what each adapter, or else the base, answers to `config.prompt` and those of `config.prompts`.

    Args:
        config: its options.
        show: called with the text to be seen, piece by piece; with `config.output` never.

    Raises:
        UserError: the prompts cannot be read, model or adapters cannot be loaded, a prompt does not fit, or the output
            exists already or cannot be written.
    """
    prompts: list[Prompt] = [] if config.prompt is None else [config.prompt]
    prompts += [] if config.prompts is None else read_prompts(config.prompts)
    output = None if config.output is None else _new_file(config.output)
    model, voices = _voices(config)
    voices = [voice for voice in voices if voice.folder is not None] or voices
    for voice in voices:  # before the first is answered
        prompt_rows(model, voice.tokenizer, prompts, system=config.system, raw=config.raw)
    page = _Page(show if output is None else lambda text: None, len(prompts) > 1, len(voices) > 1)
    answers: list[Answer] = []
    for start in range(0, len(prompts), config.batch_size):
        batch = prompts[start : start + config.batch_size]
        for voice in voices:
            with speaking(model, voice), products_of(config.dtype, model.device):
                page.title(batch[0], voice.name)
                listener = Listener(page.piece) if len(batch) == 1 else None
                texts = _generated(model, voice, batch, config, listener)
            for number, (prompt, text) in enumerate(zip(batch, texts, strict=True)):
                if listener is None:
                    if number:
                        page.title(prompt, voice.name)
                    page.piece(text)
                page.end()
                answers.append(Answer(prompt, voice.folder, text))
    if output is not None:
        lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) for answer in answers]
        replace_file(output, "".join(f"{line}\n" for line in lines))
    return answers


def chat_command(config: ChatConfig) -> None:
    """`qlora chat`: talk to a model and its adapters, on a terminal or through a pipe.

    Raises:
        UserError: model or adapters cannot be loaded, or a tokenizer has no chat template.
    """
    if config.compare and not config.adapters:
        raise UserError(problem("compare", True, "only the base is here", "Give an `adapter`"))
    model, voices = _voices(config)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no UTF-8 ends no conversation
        sys.stdin.reconfigure(errors="replace")
    conversation = Conversation(voices, voices[0], config.system, config.compare)
    manner = Manner(config.max_new_tokens, Sampling(config.temperature, config.top_p, config.seed))
    with products_of(config.dtype, model.device):
        chat(model, conversation, manner, Screen(sys.stdin.isatty() and sys.stdout.isatty()))


class _Page:
    """How answers are laid out: each by itself is only its text; several have the prompt and the adapter above."""

    def __init__(self, show: Callable[[str], object], prompts: bool, voices: bool):
        self.show, self.prompts, self.voices = show, prompts, voices
        self.begun = False

    def title(self, prompt: Prompt, voice: str) -> None:
        """What stands above an answer."""
        gap = "\n" if self.begun else ""
        self.begun = True
        asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        above = "".join(f"> {line}\n" for line in asked.splitlines()) if self.prompts else ""
        named = f"[{voice}]\n" if self.voices else ""
        if above or named:
            self.show(gap + above + named)

    def piece(self, text: str) -> None:
        """A piece of an answer."""
        self.show(text)

    def end(self) -> None:
        """The end of an answer."""
        self.show("\n")


def _generated(
    model: PreTrainedModel, voice: Voice, prompts: list[Prompt], config: GenerateConfig, listener: Listener | None
) -> list[str]:
    return generate_batch(
        model,
        voice.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.seed),
        system=config.system,
        raw=config.raw,
        listener=listener,
    )


def _new_file(output: str) -> Path:
    """The path of a file to write.

    Raises:
        UserError: something is there, or its folder is not.
    """
    path = Path(output).expanduser().absolute()
    if os.path.lexists(path):
        raise UserError(problem("output", output, "exists already", "Choose a new file"))
    if not path.parent.is_dir():
        raise UserError(problem("output", output, f"there is no folder {path.parent}", "Make it, or choose another"))
    return path


def _loaded(config: EvalConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options name, with the base and settings that its adapter was trained on."""
    return load_adapted(
        config.adapter,
        model=config.model,
        bits=config.bits,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _voices(config: GenerateConfig | ChatConfig) -> tuple[PreTrainedModel, list[Voice]]:
    """`load_voices` of the adapters that the options name."""
    return load_voices(
        config.adapters,
        model=config.model,
        bits=config.bits,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
