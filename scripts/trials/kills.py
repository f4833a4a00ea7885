"""Kill a training run again and again, resume it, and compare with an undisturbed one, to the bit.

    python scripts/trials/kills.py --kills 1000 [--model smollm2-135m] [--seed 0] [--folder DIR]

Each run is a forked child that is ended by SIGKILL: at a random moment of its whole time, in its first second, within
an evaluation, or while a checkpoint or the adapter is being written (the child says through a pipe when it enters
these). After 1 to 6 kills the run is let through and compared: adapter, optimizer, state, metrics, and no litter.
`qlora verify-resume` does the same to a run of one's own, with processes of their own. The alternative, a process for
each part here too, spends nine tenths of the time on imports.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the threads of OpenMP do not live on in a forked child
HOUSE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "tests/support")]

import tiny
import torch

import qlora.run.recipe as recipe
from qlora.config.commands import FinetuneConfig
from qlora.models.source import resolve
from qlora.run.verify import differences
from qlora.train.checkpoint import latest_checkpoint

MOMENTS = ("any", "first second", "evaluation", "saving", "adapter")


def options(place: Path, output: Path, seed: int) -> FinetuneConfig:
    """A run whose options change with `seed`: what is to be kept differs with them."""
    dice = random.Random(seed)
    return FinetuneConfig(
        model=str((place / "model").resolve()),
        data=str(place / "data.jsonl"),
        output=str(output),
        steps=dice.randint(4, 10),
        batch_size=2,
        rank=4,
        learning_rate=1e-2,
        device="cpu",
        dtype="fp32",
        dropout=dice.choice([0.0, 0.2]),
        method=dice.choice(["dora", "lora"]),
        optimizer_state=dice.choice(["float32", "8bit"]),
        optimizer_memory=dice.choice(["auto", "none"]),
        gradient_checkpointing=dice.random() < 0.3,
        eval_fraction=0.2,
        eval_every=dice.choice([1, 2]),
        save_every=dice.choice([0, 1, 2, 3]),
        save_minutes=dice.choice([1e-9, 0.0005, 10.0]),
        keep_checkpoints=dice.choice([0, 1, 2]),
        adapter_init=dice.choice(["auto", "zero"]),
        resume="auto",
    )


def child(config: FinetuneConfig, tell: int) -> None:
    """Train, and say when an evaluation, a checkpoint, the adapter begins; never returns."""

    def telling(function, letter: bytes):
        def told(*arguments, **named):
            os.write(tell, letter)
            return function(*arguments, **named)

        return told

    names = {"evaluate": b"e", "save_checkpoint": b"s", "save_adapter": b"a"}
    for name, letter in names.items():
        setattr(recipe, name, telling(getattr(recipe, name), letter))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        recipe.finetune(config)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def run(config: FinetuneConfig, said: Path, moment: str | None, dice: random.Random, usual: float) -> tuple[int, bool]:
    """Run to the end, or to a kill at `moment`; returns (exit code, whether it was killed)."""
    ear, tell = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(ear)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        child(config, tell)
    os.close(tell)
    if moment is None:
        status = os.waitpid(process, 0)[1]
    else:
        if moment in ("evaluation", "saving", "adapter"):
            letter, times = {"evaluation": b"e", "saving": b"s", "adapter": b"a"}[moment], dice.randint(1, 3)
            while times and (heard := os.read(ear, 1)):
                times -= heard == letter or (heard == b"a" and times)  # there is one adapter
            time.sleep(dice.uniform(0.0, 0.03))
        else:
            time.sleep(dice.uniform(0.0, usual if moment == "any" else min(usual, 1.0)))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
    os.close(ear)
    code = os.waitstatus_to_exitcode(status)
    return code, code == -signal.SIGKILL


def litter(output: Path) -> list[str]:
    """What a finished run must not leave."""
    return [str(path) for path in output.rglob("*") if path.name.endswith(".part") or path.name.startswith(".")]


def trial(place: Path, seed: int, tally: collections.Counter) -> None:
    """One run: undisturbed, then killed one to six times."""
    dice = random.Random(f"kills {seed}")
    whole, cut, said = place / f"whole-{seed}", place / f"cut-{seed}", place / "said"
    began = time.monotonic()
    code, _ = run(options(place, whole, seed), said, None, dice, 0.0)
    usual = time.monotonic() - began
    if code:
        raise SystemExit(f"seed {seed}: the undisturbed run failed: {said.read_text()}")
    for _ in range(dice.randint(1, 6)):
        before = latest_checkpoint(cut)
        moment = dice.choice(MOMENTS)
        code, killed = run(options(place, cut, seed), said, moment, dice, usual)
        tally[moment if killed else "came through"] += 1
        tally["resumed"] += before is not None
        if code not in (0, -signal.SIGKILL):
            tally["FAILED"] += 1
            print(f"seed {seed}: failed after a kill: {said.read_text()}", flush=True)
            return
    code, _ = run(options(place, cut, seed), said, None, dice, usual)
    found = differences(whole, cut) if code == 0 else [f"the last run failed: {said.read_text()}"]
    found += [f"left behind: {name}" for name in litter(cut)]
    tally["DIFFERENT" if found else "equal"] += 1
    if found:
        print(f"seed {seed}: {'; '.join(found)}", flush=True)
    else:
        shutil.rmtree(whole)
        shutil.rmtree(cut)


def main() -> None:
    """Trials until there are enough kills; prints the tally as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--model", help="another model than a tiny one, made here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="kills-", dir=arguments.folder))
    torch.set_num_threads(1)
    if arguments.model:
        source = resolve(arguments.model)
        (place / "model").symlink_to(source.gguf or source.folder)
    else:
        tiny.write_model(place / "model")
    tiny.write_data(place / "data.jsonl")
    tally: collections.Counter[str] = collections.Counter()
    seed, began = arguments.seed, time.monotonic()
    while sum(tally[moment] for moment in MOMENTS) < arguments.kills:
        trial(place, seed, tally)
        seed += 1
        if seed % 20 == 0:
            print(json.dumps(tally), f"{time.monotonic() - began:.0f} s", flush=True)
    kills = sum(tally[moment] for moment in MOMENTS)
    print(json.dumps({"kills": kills, **dict(sorted(tally.items()))}))
    if not (tally["FAILED"] or tally["DIFFERENT"]):
        shutil.rmtree(place)
    sys.exit(1 if tally["FAILED"] or tally["DIFFERENT"] else 0)


if __name__ == "__main__":
    main()
