"""Damaged, lying and absurd files against everything that reads a user's file, in process.

    python scripts/trials/fuzz.py --cases 20000 [--only yaml] [--seed 0]

Each case takes whole files, damages one (cut, flipped bits, wrong types, lying sizes, nesting) and reads them as a
command would. Right is either a result of finite numbers (ok) or one UserError of short lines (clean). Everything else
is counted and told: traceback, hang (10 s of processor time), growth (1 GB), silent (a result with NaN or inf). Each
place of a traceback is printed once, with its smallest case and how to run that again.

Cases run in forked children with limits on time and memory, so that one that never ends costs one child. The damage of
a case depends on target, seed and its number alone. The alternative, hypothesis, shrinks better but runs in the process
itself, where a hang or a crash of the interpreter ends everything. One thread, because the threads of OpenMP do not
live on in a forked child, which would wait for them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
HOUSE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "tests/support"), str(HOUSE / "scripts/trials")]

import pyarrow
import pyarrow.parquet
import tiny
import torch
import transformers
import yaml
from ggufs import write_gguf
from mutations import WRONG, damage_bytes, damage_folder, damage_value
from safetensors.torch import load_file

import qlora
from qlora import cli
from qlora.config.commands import FinetuneConfig
from qlora.config.options import entries, from_options, from_yaml, to_yaml
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.errors import UserError
from qlora.export.bnb import quantize_checkpoint
from qlora.export.formats import merge
from qlora.export.peft import load_adapter
from qlora.generate import generate_batch
from qlora.layers.attach import attach_adapters
from qlora.models.source import load_tokenizer
from qlora.run.optimizer import adapter_optimizer
from qlora.run.recipe import finetune
from qlora.specs import Quantization
from qlora.train.checkpoint import latest_checkpoint, load_checkpoint
from qlora_kernels import BackendError

SECONDS, BYTES, LONGEST = 10, 10**9, 5000  # a hang, a growth, a message
BATCH = 100  # cases of one child


# Targets: each takes the dice and a folder of its own, and returns the numbers that came out, if any.

Numbers = Any


@dataclass
class Wholes:
    """Whole files of every kind, and what reads them, made once and shared with the children."""

    folder: Path
    note: str = ""

    def __post_init__(self) -> None:
        make = self.folder
        tiny.write_model(make / "model")
        tiny.write_data(make / "data.jsonl")
        quantize_checkpoint(str(make / "model"), make / "packed", quantization=Quantization(), dtype="fp32")
        write_gguf(make / "model.gguf", tiny.llama())
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            finetune(
                from_options(
                    FinetuneConfig, self.options() | {"output": str(make / "run"), "steps": 2, "save_every": 1}
                )
            )
        self.tokenizer = load_tokenizer(str(make / "model"))
        self.base = qlora.load_base(str(make / "model"), dtype="fp32", device="cpu")
        self.whole_header = (make / "model.gguf").read_bytes().index(b"token_embd.weight") + 3000

    def options(self) -> dict[str, Any]:
        """A small run."""
        paths = {"model": str(self.folder / "model"), "data": str(self.folder / "data.jsonl")}
        return paths | {"output": "run", "rank": 4, "batch_size": 2, "steps": 2, "device": "cpu", "dtype": "fp32"}

    # What a person writes

    def records(self, dice: random.Random, folder: Path) -> Numbers:
        rows = [{"question": "1+1?", "answer": "2"}, {"question": "é", "answer": "x\ny"}]
        chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": None}]
        rows = damage_value(dice, dice.choice((rows, chat, [{"text": "a"}, {"text": "b"}])))
        kind = dice.choice(("jsonl", "json", "csv", "parquet"))
        path = folder / f"data.{kind}"
        if kind == "parquet":
            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            except (pyarrow.ArrowException, TypeError, AttributeError, OverflowError, ValueError):
                pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff", b"a"]}), path)
        elif kind == "csv":
            path.write_text("question,answer\n" + "".join(f"{json.dumps(row)[:40]},x\n" for row in rows))
        else:
            lines = [json.dumps(row) for row in rows]
            path.write_text("\n".join(lines) if kind == "jsonl" else "[" + ",".join(lines) + "]")
        if dice.random() < 0.5:
            path.write_bytes(damage_bytes(dice, path.read_bytes()))
        if dice.random() < 0.02 and kind in ("json", "jsonl"):
            path.write_text('{"question": ' + "[" * 3000)
        self.note = f"{path.name}: {path.read_bytes()[:150]!r}"
        tokenize(read_records(str(path)), self.tokenizer, max_tokens=64)

    def option(self, dice: random.Random, folder: Path) -> Numbers:
        command = dice.choice(("finetune", "eval", "generate", "merge", "quantize", "plan"))
        cls = cli.COMMANDS[command].options
        names = [entry.name for entry in entries(cls)]
        given = {
            name: dice.choice([*WRONG, "1e400", "9" * 5000, "~", "200MB", "auto"]) for name in dice.sample(names, 3)
        }
        if dice.random() < 0.1:
            given[dice.choice(["", "x", "\x00", "lora_r", "--"])] = dice.choice(WRONG)
        self.note = f"{command} {str(given)[:150]}"
        if dice.random() < 0.4:
            argv = [f"{cli.flag(name)}={value}" for name, value in given.items()]
            cli.parse(command, argv)
        else:
            from_options(cls, given)

    def yaml(self, dice: random.Random, folder: Path) -> Numbers:
        path = folder / "run.yaml"
        text = yaml.safe_dump(damage_value(dice, self.options()), allow_unicode=True)
        kind = dice.random()
        if kind < 0.4:
            path.write_bytes(damage_bytes(dice, text.encode()))
        elif kind < 0.45:
            path.write_text(
                dice.choice(("[" * 3000, "a: &a [*a, *a]", "? {a: b}\n: c", "{a: " * 2000, "&a a: *a", "--- 1\n--- 2"))
            )
        elif kind < 0.5:
            path.write_text("targets: &a [x]\n" + "".join(f"k{i}: &b{i} [*a, *a, *a]\n" for i in range(50)))
        else:
            path.write_text(text)
        self.note = repr(path.read_bytes()[:150])
        config = from_yaml(FinetuneConfig, path)
        path.write_text(to_yaml(config))
        if from_yaml(FinetuneConfig, path) != config:
            raise AssertionError("another config came back")

    # What is downloaded

    def tokenizer_files(self, dice: random.Random, folder: Path) -> Numbers:
        names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        self.note = damage_folder(dice, self.folder / "model", folder / "model", names)
        tokenizer = load_tokenizer(str(folder / "model"))
        tokenize(read_records(str(self.folder / "data.jsonl"))[:3], tokenizer, max_tokens=64)
        generate_batch(self.base, tokenizer, ["1+1?"], max_new_tokens=1)

    def weights(self, dice: random.Random, folder: Path) -> Numbers:
        self.note = damage_folder(dice, self.folder / "model", folder / "model", ["model.safetensors"])
        return self._loaded(folder / "model", dice)

    def config(self, dice: random.Random, folder: Path) -> Numbers:
        self.note = damage_folder(
            dice, self.folder / "model", folder / "model", ["config.json", "generation_config.json"]
        )
        return self._loaded(folder / "model", dice)

    def packed(self, dice: random.Random, folder: Path) -> Numbers:
        self.note = damage_folder(dice, self.folder / "packed", folder / "model", ["model.safetensors", "config.json"])
        return self._loaded(folder / "model", dice)

    def gguf(self, dice: random.Random, folder: Path) -> Numbers:
        whole = (self.folder / "model.gguf").read_bytes()
        header, rest = whole[: self.whole_header], whole[self.whole_header :]
        path = folder / "model.gguf"
        path.write_bytes(damage_bytes(dice, header) + rest if dice.random() < 0.8 else damage_bytes(dice, whole))
        self.note = f"{path.stat().st_size} bytes"
        load_tokenizer(str(path))
        return self._loaded(path, dice)

    def adapter(self, dice: random.Random, folder: Path) -> Numbers:
        self.note = damage_folder(dice, self.folder / "run/adapter", folder / "adapter")
        if dice.random() < 0.2:
            shutil.rmtree(folder / "merged", ignore_errors=True)
            merge(folder / "adapter", folder / "merged", dtype="fp32")
            return load_file(folder / "merged/model.safetensors")
        return load_adapter(copy.deepcopy(self.base), folder / "adapter").state_dict()

    def checkpoint(self, dice: random.Random, folder: Path) -> Numbers:
        step = latest_checkpoint(self.folder / "run")
        assert step is not None
        self.note = damage_folder(dice, step, folder / "checkpoints" / step.name)
        found = latest_checkpoint(folder)
        if found is None:
            raise UserError("checkpoint: none. Start anew.")
        model = attach_adapters(copy.deepcopy(self.base), method="dora", rank=4)
        load_checkpoint(found, model, adapter_optimizer(model, FinetuneConfig(**self.options()).optimizer(), folder))
        return model.state_dict()

    def _loaded(self, path: Path, dice: random.Random) -> Numbers:
        model = qlora.load_base(str(path), bits=dice.choice((4, 4, 16)), dtype="fp32", device="cpu")
        with torch.no_grad():
            model(input_ids=torch.arange(2, 10)[None])
        return model.state_dict()


SHARES = {  # of a hundred cases
    "option": 25,
    "yaml": 18,
    "records": 25,
    "tokenizer_files": 8,
    "weights": 5,
    "config": 5,
    "packed": 3,
    "gguf": 3,
    "adapter": 6,
    "checkpoint": 2,
}


# Running


class Hang(BaseException):
    """A case took too long."""


@dataclass
class Tally:
    """What came of the cases of each target, and the smallest case of each place that went wrong."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    places: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, target: str, number: int, outcome: str, place: str, note: str) -> None:
        """Count one case."""
        self.counts.setdefault(target, Counter())[outcome] += 1
        if outcome not in ("ok", "clean"):
            key = f"{outcome}  {target}  {place}"
            again = f"--only {target} --first {number} --cases 1: {note}"
            if key not in self.places:
                print(f"NEW {key}\n    {again}", flush=True)
            if key not in self.places or len(note) < len(self.places[key][1]):
                self.places[key] = (again, note)

    @property
    def bad(self) -> int:
        """Cases that were neither ok nor clean."""
        return sum(
            count for found in self.counts.values() for what, count in found.items() if what not in ("ok", "clean")
        )


def outcome(wholes: Wholes, target: str, number: int, seed: int, folder: Path) -> tuple[str, str]:
    """(what came of one case, where it went wrong)."""
    dice = random.Random(f"{seed} {target} {number}")
    try:
        numbers = getattr(wholes, target)(dice, folder) or {}
        torn = [name for name, value in numbers.items() if value.is_floating_point() and not value.isfinite().all()]
        return ("silent", torn[0]) if torn else ("ok", "")
    except UserError as error:
        torn = [line for line in error.problems if "\n" in line or len(line) > LONGEST]
        return ("long line", torn[0][:80]) if torn else ("clean", "")
    except BackendError:
        return "clean", ""
    except Hang as error:
        return "hang", _place(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__} {_place(error)}"


def _place(error: BaseException) -> str:
    """The innermost line of ours."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/qlora/" in frame.filename]
    where = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(where.filename).parent.name}/{Path(where.filename).name}:{where.lineno}"


def _child(wholes: Wholes, target: str, numbers: range, seed: int, pipe: int) -> None:
    """Run cases and write a line for each to `pipe`."""

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 4 * BYTES, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for number in numbers:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wholes.note = ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found, place = outcome(wholes, target, number, seed, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > BYTES:
            found, place = "growth", f"{grown / 1e9:.1f} GB"
        line = json.dumps([number, found, place, wholes.note[:200]]) + "\n"
        os.write(pipe, line.encode())
    shutil.rmtree(folder, ignore_errors=True)


def run(wholes: Wholes, target: str, numbers: range, seed: int, tally: Tally) -> None:
    """Cases of one target, each exactly once; a child that dies or hangs costs its case alone."""
    while len(numbers):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reads)
                _child(wholes, target, numbers[:BATCH], seed, writes)
            finally:
                os._exit(0)
        os.close(writes)
        done = 0
        for number, found, place, note in _lines(reads, child):
            tally.add(target, number, found, place, note)
            done += 1
        _, status = os.waitpid(child, 0)
        if done < len(numbers[:BATCH]):
            tally.add(target, numbers[done], "died", f"status {status}", "")
            done += 1
        numbers = numbers[done:]


def _lines(pipe: int, child: int) -> Iterator[list[Any]]:
    """What the child writes; it is killed when it has been silent for a minute and more."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    with os.fdopen(pipe) as file:
        signal.alarm(20 * SECONDS)
        for line in file:
            signal.alarm(20 * SECONDS)
            yield json.loads(line)
    signal.alarm(0)


def fuzz(cases: int, only: str | None = None, seed: int = 0, first: int = 0) -> Tally:
    """Run `cases` cases, dealt to the targets by SHARES, or all to one."""
    transformers.utils.logging.set_verbosity_error()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-wholes-") as folder:
        wholes = Wholes(Path(folder))
        for target, share in SHARES.items():
            count = cases * share // 100 if only is None else cases * (target == only)
            run(wholes, target, range(first, first + count), seed, tally)
    return tally


def main() -> int:
    """Run, print the table, and return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--only", choices=SHARES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--json", type=Path, help="write the tally here")
    given = parser.parse_args()
    tally = fuzz(given.cases, given.only, given.seed, given.first)
    if given.json:
        given.json.write_text(json.dumps({"counts": tally.counts, "places": tally.places}))
    for target, counts in tally.counts.items():
        print(f"{target:<16}{sum(counts.values()):>7}  " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    for place, (again, _) in sorted(tally.places.items()):
        print(f"{place}\n    {again}")
    return int(tally.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
