"""The command line: every flag arrives, every mistake is one line and exit code 2, and the commands work together."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny

import qlora
from qlora.cli import COMMANDS, as_flags, bound_kernel_caches, main, parse, parser
from qlora.config.options import choices, entries, kinds
from qlora.errors import UserError
from qlora.models.device import arithmetic_of, resolve_device
from qlora_kernels import ops

HOUSE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "kernels")])}
NEEDED = {
    "finetune": ["--model", "m", "--data", "d", "--output", "o"],
    "generate": ["--model", "m", "--prompt", "p"],
    "chat": ["--model", "m"],
    "eval": ["--model", "m", "--data", "d"],
    "merge": ["--adapter", "a", "--output", "o"],
    "export": ["--adapter", "a", "--output", "o"],
    "quantize": ["--model", "m", "--output", "o"],
    **{name: [] for name in ("doctor", "selftest")},
    "plan": ["--model", "m"],
    "verify-resume": ["--model", "m", "--data", "d", "--output", "o"],
    "data": ["--model", "m", "--data", "d"],
}
COMPANIONS = {  # what another flag needs beside it to make sense
    "calibrate": ["--adapter-init", "error"],
    "eval_every": ["--eval-fraction", "0.1"],
    "top_p": ["--temperature", "0.5"],
    "warmup": ["--steps", "100"],
}
PAIRED = {"quantize-calibrate", "quantize-codes"}  # run/test_codes.py
OPTIONS = [(c, e) for c in COMMANDS for e in entries(COMMANDS[c].options) if f"{c}-{e.name}" not in PAIRED]


def other_value(entry, kind) -> tuple[list[str], Any]:
    """Flags that set an option to something else than its default, and that value."""
    flag = "--" + entry.name.replace("_", "-")
    if entry.name == "device":
        return [flag, "cuda:1"], "cuda:1"
    if bool in (kind, *get_args(kind)):
        return [flag.replace("--", "--no-") if entry.default else flag], not entry.default
    if choices(kind):
        value = next(value for value in choices(kind) if value != entry.default)
        return [flag, str(value)], value
    if "float" in str(kind):
        value = 0.5 if entry.default != 0.5 else 0.25
        return [flag, str(value)], value
    if "int" in str(kind):
        return [flag, "7"], 7
    return [f"{flag}=-some value"], "-some value"


@pytest.mark.parametrize("command, entry", OPTIONS, ids=[f"{command}-{entry.name}" for command, entry in OPTIONS])
def test_every_flag_changes_its_option_and_no_other(command, entry):
    flags, value = other_value(entry, kinds(COMMANDS[command].options)[entry.name])
    around = NEEDED[command] + COMPANIONS.get(entry.name, [])
    plain, changed = vars(parse(command, around)), vars(parse(command, around + flags))
    assert plain[entry.name] != value and changed[entry.name] == value
    moved = {name for name in plain if plain[name] != changed[name]} - {entry.name}
    assert moved <= ({"epochs"} if entry.name == "steps" else set())  # neither given: epochs 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_its_default(command, capsys):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in entries(COMMANDS[command].options):
        assert f"--{entry.name.replace('_', '-')}" in text and entry.metadata["help"] in text
    assert COMMANDS[command].summary in text.lower()


def run(*argv: str, **settings) -> subprocess.CompletedProcess:
    """`python -m qlora.cli` in a process of its own."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run([sys.executable, "-m", "qlora", *argv], text=True, env=ENVIRONMENT, **settings)


def test_help_and_checks_import_no_torch():
    code = (
        "import sys\nfrom qlora import cli\nfor name in cli.COMMANDS: cli.parser(name).format_help()\n"
        "code = cli.main(['finetune', '--model', 'm', '--data', 'd', '--output', 'o', '--rank', '0'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\nassert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.startswith("rank=0: must be at least 1."), done.stderr


@pytest.mark.parametrize(
    "argv, said",
    [
        (["finetune", *NEEDED["finetune"], "--rank", "0"], ["rank=0: must be at least 1."]),
        (
            ["finetune", "--model", "m", "--output", "o", "--rank", "0", "--method", "dorra"],
            ["data=(not given): required.", "method=dorra: must be lora or dora. Did you mean dora?", "rank=0:"],
        ),
        (
            ["finetune", *NEEDED["finetune"], "--lern-rate", "1e-5"],
            ["--lern-rate: not an option of `qlora finetune`. Did you mean --learning-rate?"],
        ),
        (["finetune", *NEEDED["finetune"], "--steps", "3", "--epochs", "1"], ["epochs=1.0: excludes steps=3."]),
        (["finetune", "--config", "nowhere.yaml"], ["config=nowhere.yaml: cannot be read"]),
        (["doctor", "--jsn"], ["--jsn: not an option of `qlora doctor`. Did you mean --json?"]),
    ],
)
def test_mistakes_end_in_one_line_each_and_code_2(argv, said):
    done = run(*argv)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(said)
    for part in said:
        assert [line for line in lines if line.startswith(part)], done.stderr


@pytest.mark.parametrize(
    "argv, said",
    [
        (["finetun"], "finetun: not a command. Did you mean finetune?"),
        (["train-it"], f"train-it: not a command. Choose from {', '.join(COMMANDS)}."),
        (["finetune", "--rank"], "--rank: needs a value. One that begins with a dash is given as --rank=VALUE."),
        (
            ["finetune", "--batch_size", "3"],
            "--batch_size: not an option of `qlora finetune`. Did you mean --batch-size?",
        ),
        (["finetune", "--lr=3"], "--lr: not an option of `qlora finetune`. Did you mean --learning-rate?"),
        (["finetune", "--confg", "x"], "--confg: not an option of `qlora finetune`. Did you mean --config?"),
        (["finetune", "--xyzzy"], "--xyzzy: not an option of `qlora finetune`. See `qlora finetune --help`."),
        (
            ["finetune", "--ran", "3"],
            "--ran: not an option of `qlora finetune`. Did you mean --rank?",
        ),  # no abbreviations
        (["finetune", "run.yaml"], "run.yaml: not expected here. Options begin with --, see `qlora finetune --help`."),
        (
            ["finetune", "--tensorboard=1"],
            "--tensorboard/--no-tensorboard: ignored explicit argument '1'. See `qlora finetune --help`.",
        ),
    ],
)
def test_mistyped_words(argv, said, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [said]


def test_resume_is_a_switch_with_a_third_position(capsys):
    around = NEEDED["finetune"]
    given = {(): False, ("--resume",): True, ("--no-resume",): False, ("--resume", "auto"): "auto"}
    for flags, value in given.items():
        assert parse("finetune", [*flags, *around]).resume is value or value == "auto"
        assert parse("finetune", [*around, *flags]).resume == value
    for flags in (["--resume", "no way"], ["--no-resume", "auto"]):
        assert main(["finetune", *around, *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "resume=no way: must be true, false or auto. Correct it or leave it out for the default, no.",
        "--no-resume: takes no value. See `qlora finetune --help`.",
    ]
    assert as_flags("or `resume=auto`, `resume`, `resume=False`") == "or --resume auto, --resume, --no-resume"


def test_a_temperature_that_divides_by_nothing(capsys):
    assert main(["generate", *NEEDED["generate"], "--temperature", "1e-320"]) == 2
    assert capsys.readouterr().err.startswith("temperature=1e-320: is so low that the likeliest token is always taken")


def test_the_working_folder_is_gone(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["finetune", *NEEDED["finetune"]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is gone" in line or "no longer" in line


def test_several_unknown_flags_are_all_named(capsys):
    assert main(["finetune", "--rnk", "3", "--lr", "1"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["--rnk", "--lr"]


@pytest.mark.parametrize(
    "said, shown",
    [
        ("Use `bits=4`, or the 16-bit original.", "Use --bits 4, or the 16-bit original."),
        ("Give a smaller `batch_size` or `max_tokens`", "Give a smaller --batch-size or --max-tokens"),
        ("give `trust_remote_code=True`, or `resume`", "give --trust-remote-code, or --resume"),
        ("Give `double_quant=False`", "Give --no-double-quant"),
        (
            "Run `qlora doctor`; `option: value` and `x_y=1` stay",
            "Run `qlora doctor`; `option: value` and `x_y=1` stay",
        ),
    ],
)
def test_messages_name_options_and_the_command_line_spells_them_as_flags(said, shown):
    assert as_flags(said) == shown


def test_a_message_from_below_is_printed_with_flags(tmp_path, capsys):
    """An adapter in the model's place: `resolve` names the option, the command line the flag."""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["quantize", "--model", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("This is an adapter: give it as --adapter.\n")


def test_overview_and_version(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qlora {qlora.__version__}\n"


def test_flags_win_over_the_config_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlearning_rate: 1e-5\nrank: 8\nepochs: 3\n")
    config = parse("finetune", ["--config", str(file), "--rank", "4", "--steps", "5"])
    assert (config.learning_rate, config.rank, config.steps, config.epochs) == (1e-5, 4, 5, None)
    file.write_text("model: m\ndata: d\noutput: o\nlearning_rat: 1e-5\n")
    with pytest.raises(UserError, match=r"learning_rat=1e-5: not an option\. Did you mean learning_rate\?"):
        parse("finetune", ["--config", str(file)])


def test_every_flag_is_in_the_parser_once():
    for command in COMMANDS:
        flags = [flag for action in parser(command)._actions for flag in action.option_strings]
        assert len(flags) == len(set(flags))


def test_doctor_tells_what_is_here(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    import torch

    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["pydantic"]
    assert found["used"]["kernels"][found["used"]["device"].split(":")[0]]
    assert found["used"]["dtype"] in ("bf16", "fp32") and found["threads"] == torch.get_num_threads()
    assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0
    assert not [entry for entry in found["missing"] if "required" in entry["why"]]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("This machine", "What will be used", "What is missing", found["cpu"]["name"], torch.__version__):
        assert part in text
    integers = arithmetic_of("auto", resolve_device("auto")) == "auto (fp32, products by integers)"
    assert ("by 16-bit integers" in text) == found["used"]["integers"] == integers


def test_doctor_traces_a_step(capsys):
    """Every operator of a step on DoRA layers in NF4 with a paged optimizer is told, or the layer that was one call; on
    a CPU the kernels are ours.
    """
    assert main(["doctor", "--trace", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trace"]
    whole = {"decoder_layer", "decoder_layer_backward"}
    assert {"matmul_4bit", "adapted_linear", *whole} & set(found) and any("adamw" in name for name in found), found
    assert set(found) <= {*ops.OPERATORS, *whole} and all(sum(counts.values()) for counts in found.values())
    assert main(["doctor", "--trace"]) == 0
    text = capsys.readouterr().out
    assert "Kernels of a training step" in text and all(f"  {name} " in text for name in found)


def test_a_command_tells_its_kernels(tmp_path):
    """With QLORA_TRACE=1, on standard error, so that JSON stays JSON."""
    command = [sys.executable, "-m", "qlora", "doctor", "--trace", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, "QLORA_TRACE": "1"})
    assert done.returncode == 0, done.stderr
    ran = {line.split()[0] for line in done.stderr.partition("Kernels that ran")[2].splitlines()[1:]}
    assert set(json.loads(done.stdout)["trace"]) <= ran
    plain = subprocess.run(command[:4], capture_output=True, text=True, env=ENVIRONMENT)
    assert plain.returncode == 0 and not plain.stderr


def test_doctor_answers_without_torch(tmp_path):
    """A torch that does not import, as after a broken installation."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qlora.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "libtorch.so: cannot open shared object file: pip install" in done.stdout
    assert "What will be used" not in done.stdout


# The commands, on a tiny model.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model, data, and the run of `qlora finetune` on them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data.jsonl")
    assert (
        main(
            [
                "finetune",
                "--model",
                str(folder / "model"),
                "--data",
                str(folder / "data.jsonl"),
                "--output",
                str(folder / "run one"),
                "--steps",
                "2",
                "--rank",
                "2",
                "--max-tokens",
                "64",
                "--dtype",
                "fp32",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    return folder


def test_finetune_leaves_what_the_next_commands_need(trained, capsys):
    run_folder = trained / "run one"
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"adapter", "checkpoints", "metrics.jsonl", "config.yaml"}
    config = parse("finetune", ["--config", str(run_folder / "config.yaml")])
    assert (config.steps, config.rank, config.dtype) == (2, 2, "fp32")

    command = ["generate", "--adapter", str(run_folder / "adapter"), "--prompt", "1+1?", "--max-new-tokens", "4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == said


def test_eval_prints_a_table_or_json(trained, capsys):
    command = ["eval", "--adapter", str(trained / "run one" / "adapter"), "--data", str(trained / "data.jsonl")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] > 0 and 0 <= result["token_accuracy"] <= 1 and result["target_tokens"] > 0
    assert main(command) == 0
    table = capsys.readouterr().out
    assert f"{result['loss']:.4f}" in table and "token accuracy" in table and "{" not in table


def test_merge_and_quantize_write_models_that_generate(trained, capsys):
    for command in (
        ["merge", "--adapter", str(trained / "run one" / "adapter"), "--output", str(trained / "merged")],
        ["quantize", "--model", str(trained / "model"), "--output", str(trained / "nf4")],
    ):
        assert main(command) == 0
        assert f"--model {command[-1]} " in capsys.readouterr().out
    for model, bits in (("merged", "16"), ("nf4", "4")):
        command = ["generate", "--model", str(trained / model), "--bits", bits, "--prompt", "1+1?"]
        assert main([*command, "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    "command, option",
    [
        ("generate", "adapter"),
        ("eval", "adapter"),
        ("merge", "adapter"),
        ("quantize", "model"),
        ("finetune", "model"),
        ("finetune", "data"),
    ],
)
def test_a_wrong_path_is_one_line(command, option, trained, tmp_path, capsys):
    values = {
        "model": trained / "model",
        "adapter": trained / "run one" / "adapter",
        "data": trained / "data.jsonl",
        "output": tmp_path / "out",
        "prompt": "x",
    }
    values[option] = tmp_path / "nowhere"
    known = {entry.name for entry in entries(COMMANDS[command].options)}
    assert main([command, *(f"--{name}={value}" for name, value in values.items() if name in known)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{option}={tmp_path / 'nowhere'}: ")


def test_next_steps_are_commands_that_parse(trained, capsys):
    assert (
        main(
            [
                "finetune",
                "--model",
                str(trained / "model"),
                "--data",
                str(trained / "data.jsonl"),
                "--output",
                str(trained / "run two"),
                "--steps",
                "1",
                "--rank",
                "2",
                "--max-tokens",
                "64",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    lines = [line.partition(" qlora ")[2] for line in capsys.readouterr().out.splitlines()]
    commands = [shlex.split(line) for line in lines if line]
    assert [command[0] for command in commands] == ["generate", "merge"]
    for command in commands:
        assert parse(command[0], command[1:]).adapter == str(trained / "run two" / "adapter")


# `import qlora`.


def test_functions_stay_functions_whatever_is_imported():
    import importlib

    for module in ("run.recipe", "export.formats", "config.commands", "evaluate", "generate"):
        importlib.import_module(f"qlora.{module}")
    assert callable(qlora.finetune) and callable(qlora.merge) and qlora.finetune.__module__ == "qlora.run.recipe"
    for name in qlora.__all__:
        assert getattr(qlora, name) is not None and name in dir(qlora)
    with pytest.raises(AttributeError, match="no attribute 'finetun'"):
        _ = qlora.finetun


def test_kernel_caches_are_bounded_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    bound_kernel_caches()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("128", "7")
