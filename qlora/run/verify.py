"""Whether runs on this machine can be resumed: killed at random moments, gone on with, and compared to the bit.

    OUTPUT/undisturbed/   the run, in a process of its own, from its first step to its last
    OUTPUT/killed/        the same run, ended by SIGKILL again and again, each time gone on with (`resume=auto`)
    compared              adapter, optimizer, state of the last checkpoint, and the numbers in metrics.jsonl

SIGKILL is what the kernel sends when memory runs out, and all that a power cut leaves of a process. The alternative,
an exception raised in the same process, leaves buffers to be flushed and blocks to be left in order.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora.config.commands import FinetuneConfig, VerifyConfig
from qlora.config.options import entries, to_yaml
from qlora.errors import UserError, problem
from qlora.train.checkpoint import latest_checkpoint, read_state

NUMBERS = ("step", "loss", "tokens", "learning_rate", "grad_norm", "eval_loss", "skipped")  # of a metrics line


@dataclass
class Tally:
    """What came of the kills: how many, how many runs went on from a checkpoint, and each difference found."""

    kills: int = 0
    resumed: int = 0
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.kills} kills, {self.resumed} times gone on from a checkpoint"
        return f"{text}: " + ("; ".join(self.differences) or "equal to the undisturbed run, to the bit")


def verify_resume(config: VerifyConfig) -> Tally:
    """Train, kill, resume and compare as `config` says, in `config.output`, which must be new or empty.

    Raises:
        UserError: the output folder is in use, or the undisturbed run failed.
    """
    folder = Path(config.output).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(problem("output", config.output, "is not an empty folder", "Choose another folder"))
    folder.mkdir(parents=True, exist_ok=True)
    whole, cut = folder / "undisturbed", folder / "killed"
    began = time.monotonic()
    with _running(config, whole) as process:
        code, said = _ended(process)
    if code != 0:
        raise UserError(said.strip().splitlines() or problem("output", whole, "the run failed", "See its folder"))
    spans = time.monotonic() - began, _training_seconds(whole)
    dice, tally = random.Random(config.seed), Tally()
    while tally.kills < config.kills and not tally.differences:
        went_on = latest_checkpoint(cut) is not None
        with _running(config, cut) as process:
            tally.kills += _killed(process, cut, dice, spans)
            code, said = _ended(process)
        tally.resumed += went_on
        if code == 0:  # it came through: the kills left come in a run of their own
            tally.differences += differences(whole, cut)
            cut = folder / f"killed-{tally.kills}"
        elif code != -signal.SIGKILL:
            tally.differences.append(f"after {tally.kills} kills the run failed: {said.strip()}")
    if not tally.differences:
        with _running(config, cut) as process:
            code, said = _ended(process)
        tally.differences += differences(whole, cut) if code == 0 else [f"the last resume failed: {said.strip()}"]
    return tally


def _training_seconds(output: Path) -> float:
    """How long a finished run trained, from the times of its files."""
    newest = latest_checkpoint(output)
    assert newest is not None
    return max(0.1, newest.stat().st_mtime - (output / "config.yaml").stat().st_mtime)


def _killed(process: subprocess.Popen[str], output: Path, dice: random.Random, spans: tuple[float, float]) -> bool:
    """Kill a run at a random moment, every other time one of its training; False if it had ended by then."""
    whole, training = spans
    begins, wait = time.time(), dice.uniform(0.0, whole)
    if dice.random() < 0.5:
        wait = dice.uniform(0.0, training)
        config = output / "config.yaml"  # written when training begins
        while process.poll() is None and not (config.is_file() and config.stat().st_mtime >= begins):
            time.sleep(0.005)
    try:
        process.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return True
    return False


@contextmanager
def _running(config: VerifyConfig, output: Path) -> Iterator[subprocess.Popen[str]]:
    """The run in a process of its own, going on where its folder has a checkpoint; it does not outlive the block."""
    options = {entry.name: getattr(config, entry.name) for entry in entries(FinetuneConfig)}
    options |= {"steps": config.trial_steps, "epochs": None, "warmup": min(config.warmup, config.trial_steps)}
    options |= {"output": str(output), "resume": "auto", "save_every": config.save_every or 1}
    file = output.with_name(f"{output.name}.yaml")
    file.write_text(to_yaml(FinetuneConfig(**options)), encoding="utf-8")
    command = [sys.executable, "-m", "qlora", "finetune", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said on stderr) of a process, waited for."""
    said = process.communicate()[1]
    return process.returncode, said or ""


def differences(whole: Path, cut: Path) -> list[str]:
    """What differs between two finished runs: tensors by their bits, the state of a resume, the metrics' numbers."""
    one, two = latest_checkpoint(whole), latest_checkpoint(cut)
    if one is None or two is None or one.name != two.name:
        return [f"the last checkpoint is {one and one.name} in {whole}, and {two and two.name} in {cut}"]
    found = []
    for first, second in ((whole / "adapter", cut / "adapter"), (one, two)):
        for file in sorted(first.glob("*.safetensors")):
            found += _tensor_differences(file, second / file.name)
    states = [read_state(checkpoint) for checkpoint in (one, two)]
    found += [f"{key} of {two / 'state.json'}" for key in states[0] if states[0][key] != states[1].get(key)]
    lines = [_numbers(output / "metrics.jsonl") for output in (whole, cut)]
    found += [f"the numbers of {cut / 'metrics.jsonl'}"] if lines[0] != lines[1] else []
    return found


def _tensor_differences(one: Path, two: Path) -> list[str]:
    if not two.is_file():
        return [f"{two} is missing"]
    with safe_open(one, framework="pt") as first, safe_open(two, framework="pt") as second:
        if set(first.keys()) != set(second.keys()):
            return [f"{two} holds other tensors"]
        same = [_bytes(first.get_tensor(key)) == _bytes(second.get_tensor(key)) for key in first.keys()]
    return [] if all(same) else [f"{same.count(False)} of {len(same)} tensors of {two}"]


def _bytes(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _numbers(path: Path) -> list[list[Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [[line.get(name) for name in NUMBERS] for line in lines]
