"""Random damage to checkpoints and the adapter of a tiny run, then resume, eval or merge: is anything silently wrong?

    python scripts/trials/damage.py --cases 1000 --seed 0

One case: a copy of the run's folder, one damage (a bit, a cut, bytes overwritten, a file deleted, emptied, swapped with
that of another step, a folder renamed, a number edited), one command in process. It ends as one of

    refused     one UserError
    said        an older checkpoint was used, and stderr says so
    harmless    the result is that of the undamaged run, to the bit
    SILENT      the result is another
    TRACEBACK   anything but a UserError

and the script with 1 if there is a SILENT or a TRACEBACK.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
import tiny

from qlora.config.commands import EvalConfig, FinetuneConfig
from qlora.errors import UserError
from qlora.export.formats import REPORT, merge
from qlora.run.commands import evaluate_command
from qlora.run.recipe import finetune

CHECKPOINT, OTHER = Path("run/checkpoints/step-000004"), Path("run/checkpoints/step-000002")
ADAPTER = Path("run/adapter")
LAST = Path("run/checkpoints/step-000006")


def options(place: Path) -> FinetuneConfig:
    """A run of six steps with a checkpoint every two; the adapter is DoRA of rank 2."""
    return FinetuneConfig(
        model=str(place / "model"),
        data=str(place / "data.jsonl"),
        output=str(place / "run"),
        steps=6,
        save_every=2,
        batch_size=2,
        rank=2,
        targets="q_proj,down_proj",
        dropout=0.1,
        learning_rate=1e-2,
        device="cpu",
        dtype="fp32",
        resume=(place / "run").exists(),
    )


# ---------------------------------------------------------------- what is done with the folder


def resumed(place: Path) -> object:
    """The adapter and the optimizer at the end of a run that goes on."""
    finetune(options(place))
    return [_bits(place / LAST / name) for name in ("adapter_model.safetensors", "optimizer.safetensors")]


def evaluated(place: Path) -> object:
    """The loss of the adapter."""
    config = EvalConfig(adapter=str(place / ADAPTER), data=str(place / "data.jsonl"), device="cpu", dtype="fp32")
    return evaluate_command(config)["loss"]


def merged(place: Path) -> object:
    """The weights of the merged model, and its files."""
    folder = merge(place / ADAPTER, place / "merged", dtype="fp32")
    told = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")]
    files = {path.name: path.read_bytes() for path in told if path.name != REPORT}  # which names the adapter's folder
    return _bits(folder / "model.safetensors"), files


def _bits(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


COMMANDS: dict[str, Callable[[Path], object]] = {"resume": resumed, "eval": evaluated, "merge": merged}


# ---------------------------------------------------------------- damage


def damage(place: Path, folder: Path, dice: random.Random) -> str:
    """Do one damage to `folder` in `place`; says which."""
    files = sorted(path for path in (place / folder).rglob("*") if path.is_file())
    path = dice.choice(files)
    other = place / OTHER / path.name
    kinds = ["bit", "bit", "bit", "cut", "bytes", "delete", "empty", "number", "swap", "rename"]
    kind = dice.choice(kinds)
    data = bytearray(path.read_bytes())
    if kind == "bit" and data:
        at = dice.randrange(len(data))
        data[at] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "bytes" and data:
        at = dice.randrange(len(data))
        data[at : at + 16] = dice.randbytes(len(data[at : at + 16]))
        path.write_bytes(data)
    elif kind == "delete":
        path.unlink()
    elif kind == "number" and path.suffix == ".json":
        kind = _edit_number(path, dice)
    elif kind == "swap" and other.is_file():
        shutil.copy(other, path)
    elif kind == "rename" and folder == CHECKPOINT:
        (place / folder).rename(place / folder.with_name("step-000005"))
    else:
        kind = "empty"
        path.write_bytes(b"")
    return f"{kind} {path.name}"


def _edit_number(path: Path, dice: random.Random) -> str:
    """Change one number or truth in a JSON file, or take a key away."""
    value = json.loads(path.read_text())
    places: list[tuple] = []

    def walk(node: object) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(pairs):
            places.append((node, key))
            walk(child)

    walk(value)
    node, key = dice.choice(places)
    if isinstance(node[key], bool):
        node[key] = not node[key]
    elif isinstance(node[key], (int, float)):
        node[key] = node[key] * 2 + 1
    else:
        del node[key]
    path.write_text(json.dumps(value))
    return "edit"


# ---------------------------------------------------------------- the trial


def one_case(whole: Path, expected: dict[str, object], dice: random.Random) -> tuple[str, str]:
    """(how it ended, what was done)."""
    command = dice.choice([*COMMANDS])
    with tempfile.TemporaryDirectory(dir=whole.parent) as name:
        place = Path(name)
        shutil.copytree(whole / "run", place / "run", symlinks=True)
        for shared in ("model", "data.jsonl"):
            (place / shared).symlink_to(whole / shared)
        folder = CHECKPOINT if command == "resume" else ADAPTER
        if command == "resume":  # it was cut off behind step 4
            shutil.rmtree(place / LAST)
            shutil.rmtree(place / ADAPTER)
        what = f"{command}: {damage(place, folder, dice)}"
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                result = COMMANDS[command](place)
        except UserError as error:
            return ("refused" if all(len(line.splitlines()) == 1 for line in error.problems) else "TRACEBACK"), what
        except Exception as error:  # of any kind: what is counted here
            return "TRACEBACK", f"{what}: {type(error).__name__}: {error}"
        if result != expected[command]:
            return "SILENT", what
        return ("said" if "is damaged" in said.getvalue() else "harmless"), what


def prepared(folder: Path) -> tuple[Path, dict[str, object]]:
    """(a place with a finished run, what each command gives on it)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    tiny.write_model(whole / "model")
    tiny.write_data(whole / "data.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        finetune(options(whole))
        expected = {name: command(whole) for name, command in COMMANDS.items()}
    shutil.rmtree(whole / "merged")
    return whole, expected


def trial(cases: int, seed: int, folder: Path) -> Counter[str]:
    """How many cases ended in which way; what went wrong is printed."""
    whole, expected = prepared(folder)
    dice, tally = random.Random(seed), Counter[str]()
    for case in range(cases):
        ended, what = one_case(whole, expected, dice)
        tally[ended] += 1
        if ended.isupper():
            print(f"{ended} case {case}: {what}", flush=True)
    return tally


def main() -> None:
    """Run the trial and print the tally."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tally = trial(arguments.cases, arguments.seed, Path(name))
    print(", ".join(f"{name} {count}" for name, count in sorted(tally.items())))
    sys.exit(1 if tally["SILENT"] or tally["TRACEBACK"] else 0)


if __name__ == "__main__":
    main()
