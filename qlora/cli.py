"""The command line: flags to a config, a config to one function, errors to one line and an exit code.

Flags are made from the fields of `qlora.config` and only collect text; the config coerces and checks it, together with
the YAML of `--config` (flags win). So an option is never declared here. Heavy imports happen inside the commands, and
`qlora --help` answers in a fraction of a second. Alternative not taken: letting jsonargparse or tyro build the parser
from the dataclasses. Both stop at the first bad value and say it in their own words; ours name them all, with a remedy.

Exit codes: 0 done, 1 what was looked for was found (verify-resume: a difference), 2 the user has to change something
(each problem is one line on stderr), 130, 143 and 129 ended by SIGINT, SIGTERM and SIGHUP, 141 nobody reads the output
any more (a finetune goes on then). A traceback means a defect of ours.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, NoReturn, get_args

from qlora.command_table import COMMANDS
from qlora.config.options import (
    GROUPS,
    MODEL,
    Entry,
    Options,
    choices,
    entries,
    from_options,
    from_yaml,
    kinds,
    metavar,
    nearest,
    nearest_option,
    shown_default,
)
from qlora.errors import UserError, guard, problem, shortened
from qlora.streams import drop, open_missing, steady
from qlora.threads import be_a_good_neighbour
from qlora.train.signals import as_interrupts, exit_code
from qlora_kernels import BackendError


class _Parser(argparse.ArgumentParser):
    """Tells its errors as ours, instead of a usage text and SystemExit."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found.

        Raises:
            UserError: always.
        """
        flag, _, rule = message.removeprefix("argument ").partition(": ")
        if rule == "expected one argument":
            rule, remedy = "needs a value", f"One that begins with a dash is given as {flag}=VALUE."
        else:
            remedy = f"See `{self.prog} --help`."
        raise UserError(f"{shortened(flag)}: {shortened(rule)}. {remedy}")


class _SwitchOrWord(argparse.Action):
    """--resume (yes), --no-resume, or --resume auto: a switch that has a third position."""

    def __init__(self, option_strings: Sequence[str], dest: str, **about: Any):
        strings = [*option_strings, *(f"--no-{text.removeprefix('--')}" for text in option_strings)]
        super().__init__(strings, dest, nargs="?", const=True, **about)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        off = option_string is not None and option_string.startswith("--no-")
        if off and values is not True:
            parser.error(f"argument {option_string}: takes no value")
        setattr(namespace, self.dest, False if off else values)


class _Repeated(argparse.Action):
    """--adapter a --adapter b: one value is that value, several are a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, [])
        before = before if isinstance(before, list) else [before]
        setattr(namespace, self.dest, [*before, values] if before else values)


def parser(name: str) -> argparse.ArgumentParser:
    """The flags of one command. A flag that is not given leaves no value: the config knows the default."""
    command = COMMANDS[name]
    result = _Parser(
        prog=f"qlora {name}",
        description=f"{command.summary.capitalize()}.",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=f"qlora {name} {command.example or '[--json]'}",
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=36, width=min(118, shutil.get_terminal_size((110, 24)).columns)
        ),
    )
    sections = {group: result.add_argument_group(group) for group in GROUPS}
    if command.config_file:
        sections[MODEL].add_argument(
            "--config", metavar="FILE", help="a YAML file with options of this page (names with _); flags win over it"
        )
    types = kinds(command.options)
    for entry in entries(command.options):
        sections[entry.metadata["group"]].add_argument(flag(entry.name), **_argument(entry, types[entry.name]))
    result.add_argument_group("help").add_argument("-h", "--help", action="store_true", help="show this page")
    return result


def flag(name: str) -> str:
    """An option as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _argument(entry: Entry, kind: Any) -> dict[str, Any]:
    """argparse's keywords for the flag of an option."""
    default = shown_default(entry)
    note = " (required)" if entry.default is MISSING else f" (default {default})" if default else ""
    about: dict[str, Any] = {"dest": entry.name, "help": (entry.metadata["help"] + note).replace("%", "%%")}
    if bool in (kind, *get_args(kind)) and choices(kind):
        return about | {"action": _SwitchOrWord, "metavar": "|".join(map(str, choices(kind)))}
    if bool in (kind, *get_args(kind)):
        return about | {"action": argparse.BooleanOptionalAction}
    repeated = {"action": _Repeated} if entry.metadata["repeats"] else {}
    return about | {"metavar": metavar(entry, kind)} | repeated


def overview() -> str:
    """The text of `qlora --help`."""
    lines = "\n".join(f"  {name:<15}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: qlora COMMAND [--option VALUE ...]\n\nFine-tune a language model in 4 bits with LoRA or DoRA.\n\n"
        f"{lines}\n\n`qlora COMMAND --help` lists the options of a command; `qlora --version` tells the version.\n"
        f"A first run:  qlora finetune {COMMANDS['finetune'].example}"
    )


def parse(name: str, argv: Sequence[str]) -> Options | None:
    """The checked config of one command; None if help was asked for.

    Raises:
        UserError: an unknown flag, or every problem of the options.
    """
    options = COMMANDS[name].options
    flags, rest = parser(name).parse_known_args(argv)
    values = vars(flags)
    if values.pop("help", False):
        return None
    if COMMANDS[name].word and rest and not rest[0].startswith("-"):
        values.setdefault(COMMANDS[name].word, rest.pop(0))
    unknown = [word for word in rest if word.startswith("-")]
    if rest:
        raise UserError(
            [_unknown_flag(name, word) for word in unknown]
            or [f"{shortened(rest[0])}: not expected here. Options begin with --, see `qlora {name} --help`."]
        )
    path = values.pop("config", None)
    return from_options(options, values) if path is None else from_yaml(options, path, values)


def _unknown_flag(name: str, word: str) -> str:
    """The line for a flag that the command does not have."""
    given = shortened(word.partition("=")[0], 100)
    bare = given.lstrip("-").replace("-", "_")
    meant = nearest_option(COMMANDS[name].options, bare)
    if COMMANDS[name].config_file and nearest(bare, ["config"]):
        meant = "config"
    remedy = f"Did you mean {flag(meant)}?" if meant else f"See `qlora {name} --help`."
    return f"{given}: not an option of `qlora {name}`. {remedy}"


def as_flags(line: str) -> str:
    """A message with its options spelled as flags: `batch_size` -> --batch-size, `bits=4` -> --bits 4.

    Messages from below name an option in backticks, as a Python caller gives it. Only names of options are taken, so
    other words in backticks, such as `qlora doctor`, stay.
    """
    known = {
        entry.name: kinds(command.options)[entry.name]
        for command in COMMANDS.values()
        for entry in entries(command.options)
    }

    def spelled(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in known:
            return match[0]
        if bool in (known[name], *get_args(known[name])) and value in (None, "True", "False"):
            return flag(f"no_{name}" if value == "False" else name)
        return flag(name) if value is None else f"{flag(name)} {value}"

    return re.sub(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`]*))?`", spelled, line)


def bound_kernel_caches() -> None:
    """Let oneDNN, which multiplies on a CPU, keep few of the kernels that it compiles, one for each shape.

    A micro-batch of another number of tokens has other shapes, and by default kernels for a thousand shapes are kept in
    each of two caches. These numbers are several times what the layers of one micro-batch need, and as fast: what is
    evicted is seldom asked for again (docs/log.md). oneDNN reads them at its first product; what the environment says
    already stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def let_segments_grow() -> None:
    """Let torch's allocator on a card extend its segments: each step has other sizes, and without this what is reserved
    grows over what is used. Read when CUDA starts, by torch 2.9 and later; what the environment says already stands.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and sys.platform == "linux":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _shortage(error: Exception, config: Options | None) -> str | None:
    """The line for a full disk or for memory that ran out that nobody below has said, or None for any other error."""
    if isinstance(error, ImportError):
        return None
    from qlora.files import disk_full

    output = getattr(config, "output", getattr(error, "filename", None) or "(standard output)")
    if disk_full(error):
        return problem("output", output, "the disk is full", "Free space there, or write elsewhere")
    if isinstance(error, MemoryError) or "torch" in sys.modules:
        from qlora.optim.memory_errors import out_of_memory

        if out_of_memory(error):
            said = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "Use a smaller model or `batch_size`, or a machine with more of it"
            return problem("memory", "(all used)", f"an allocation failed: {said}", remedy)
    return None


def _tell_routes() -> None:
    """With QLORA_TRACE=1, which code ran the operators of this command, and how often."""
    kernels = sys.modules.get("qlora_kernels.backends")  # not loaded: none ran
    if kernels is not None and os.environ.get("QLORA_TRACE") == "1":
        print(f"\nKernels that ran, with their calls\n{kernels.routes_as_text(kernels.routes())}", file=sys.stderr)


def _run(argv: list[str]) -> int:
    """Run one command line: what can be said is raised."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from qlora import __version__

        print(f"qlora {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        meant = nearest(name.lstrip("-"), COMMANDS)
        raise UserError(
            f"{name}: not a command. " + (f"Did you mean {meant}?" if meant else f"Choose from {', '.join(COMMANDS)}.")
        )
    with guard("(working folder)", ".", "is gone", "Change to a folder that is there"):
        os.getcwd()
    config = parse(name, argv[1:])
    if config is None:
        print(parser(name).format_help(), end="")
        return 0
    try:
        code = COMMANDS[name].run(config) or 0
    except Exception as error:  # goes on as it is unless it only says that disk or memory ran out
        line = None if isinstance(error, (UserError, BackendError, BrokenPipeError)) else _shortage(error, config)
        if line is None:
            raise
        drop(sys.stdout)
        raise UserError(line) from error
    _tell_routes()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        open_missing()
        be_a_good_neighbour()
        bound_kernel_caches()
        let_segments_grow()
        for stream in (sys.stdout, sys.stderr):  # letters that the encoding lacks are written as \\xNN
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        with as_interrupts():
            code = _run(argv)
            sys.stdout.flush()
            return code
    except UserError as error:
        _say("\n".join(map(as_flags, error.problems)))
        return 2
    except BackendError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt as stop:  # finetune has said how to go on, and its exception says where it stopped
        _say(f"\nqlora {(argv or [''])[0]}: {str(stop) or 'interrupted'}")
        return exit_code(stop)
    except BrokenPipeError:  # the reader, such as `head`, is gone; 141 is what a shell reports then
        drop(sys.stdout)
        return 141
    except OSError as error:
        line = _shortage(error, None)
        if line is None:
            raise
        drop(sys.stdout)
        _say(as_flags(line))
        return 2


def _say(text: str) -> None:
    """A last word on standard error, if anybody hears it."""
    with steady():
        print(text, file=sys.stderr, flush=True)
