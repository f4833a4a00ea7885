"""What an option is: its declaration, its check, its YAML, and the option that a mistyped name meant.

    option(...)        a dataclass field with all that is known of an option: help, group, range, other names, ...
    Options            a dataclass of options that coerces and checks itself; `commands` holds those of each command
    from_options, from_yaml, to_yaml

pydantic coerces and checks field by field: "1e-5" becomes a number, True is no integer, NaN no float. A value that
fails does not hide the next one: all problems, those between options included, are one UserError. YAML is read as text
(no YAML 1.1 guessing, where 1e-5 is a string, `no` a bool and 0123456 an octal number), so a value means in a file what
it means behind a flag. Alternative not taken: one pydantic model. It stops at the first bad field before it compares
fields, and users would get a foreign class; ours are plain dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from qlora.errors import UserError, brief, guard, problem, shortened
from qlora.paths import expanded, local_path
from qlora.sizes import number, show_size

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


def option(default: Any = MISSING, *, group: str, help: str, **about: Any) -> Any:
    """A dataclass field that is an option. All that the command line and the checks know of it stands here.

    Args:
        default: without one the option is required.
        group: one of GROUPS.
        help: begins with a noun where the option is required (it also reads after "Give ...").
        **about: `rule` replaces the sentence made from the limits; `aka` holds names that other trainers use, so that
            an unknown one leads here; `size` parses text such as 200MB into bytes; `path` says that text names a file
            or folder, or may; `repeats` that the flag may be given several times; `excludes` names an option that
            cannot be given beside this one; `resume="free"` lets it change between the parts of a run. All others are
            pydantic's limits (ge, lt, min_length, pattern, ...).
    """
    known = {"help": help, "group": group, "rule": "", "aka": "", "size": None, "path": False}
    known |= {"repeats": False, "excludes": None, "resume": "same"}
    metadata = known | {name: value for name, value in about.items() if name in known}
    metadata["aka"] = metadata["aka"].split()
    metadata["limits"] = {name: value for name, value in about.items() if name not in known}
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Options:
    """What the options of every command do: coerce and check themselves when made.

    Raises:
        UserError: every problem found.
    """

    def __post_init__(self) -> None:
        given = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in vars(self).items()}
        for name, value in _checked(type(self), given).items():
            setattr(self, name, value)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> list[str]:
        """Problems between options. `values` holds only those that passed on their own, coerced."""
        return []


# Reading the declarations.

Entry = dataclasses.Field[Any]
AnyOptions = TypeVar("AnyOptions", bound=Options)


def entries(cls: type[Options] | Options) -> list[Entry]:
    """The options of a command, in the order of their groups."""
    return sorted(dataclasses.fields(cls), key=lambda entry: GROUPS.index(entry.metadata["group"]))


def kinds(cls: type[Options]) -> dict[str, Any]:
    """Option name -> its type."""
    return get_type_hints(cls)


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of an optional one; () for other types."""
    return next((get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal), ())


def changeable(cls: type[Options]) -> set[str]:
    """Options that may change between the parts of a run (`resume="free"`)."""
    return {entry.name for entry in entries(cls) if entry.metadata["resume"] == "free"}


def defaults(cls: type[Options]) -> dict[str, Any]:
    """Option name -> its default; None where it is required."""
    return {entry.name: None if entry.default is MISSING else entry.default for entry in entries(cls)}


def shown_default(entry: Entry) -> str:
    """A default as a user would type it; "" where there is none."""
    if entry.default is MISSING or entry.default is None:
        return ""
    if entry.metadata["size"] and isinstance(entry.default, int):
        return show_size(entry.default)
    return ("yes" if entry.default else "no") if isinstance(entry.default, bool) else f"{entry.default}"


def metavar(entry: Entry, kind: Any) -> str:
    """What stands for the value in `--help`: SIZE, the choices if they are short, NUMBER, N or TEXT."""
    words = "{" + ",".join(map(str, choices(kind))) + "}"
    types = {kind, *get_args(kind), *map(type, choices(kind))}
    if entry.metadata["size"]:
        return "SIZE"
    if choices(kind) and len(words) < 30:
        return words
    return "NUMBER" if float in types else "N" if int in types else "TEXT"


def show(value: object) -> str:
    """A value on one line of an error message."""
    if isinstance(value, str) and (not value.strip() or not value[:200].isprintable()):
        value = repr(value[:200])
    text = shortened(value)
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

_LARGEST = 2**31 - 1  # of a count: steps, examples, tokens, ranks
_CHECKERS: dict[type[Options], dict[str, Any]] = {}  # pydantic's, by option, made at the first use of a command


def _numbered_choice(value: object) -> object:
    """ "16" -> 16, for a Literal of numbers."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value) else number(value)


def exclusive(cls: type[Options]) -> list[tuple[str, str]]:
    """Pairs of options of which at most one may be given."""
    return [(entry.metadata["excludes"], entry.name) for entry in entries(cls) if entry.metadata["excludes"]]


def _checker(entry: Entry, kind: Any) -> Any:
    """pydantic's checker of one option. Imported here, as `--help` does not need it."""
    from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

    limits = entry.metadata["limits"]
    if int in {kind, *get_args(kind)} and not entry.metadata["size"] and not {"le", "lt"} & set(limits):
        limits = limits | {"le": _LARGEST}
    marks: list[Any] = [Field(**limits)]
    if entry.metadata["size"]:
        marks.append(BeforeValidator(entry.metadata["size"]))
    elif isinstance((choices(kind) or [""])[0], int):
        marks.append(BeforeValidator(_numbered_choice))
    elif {int, float} & {kind, *get_args(kind)}:
        marks.append(BeforeValidator(number))
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
    if error["type"] == "string_unicode":
        rule = "must be UTF-8 text"
    elif how in ("parsing", "type", "from_float", "parsing_size") and what in _TYPE_RULES:
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
    """All options of `cls`: those given, coerced and checked, and defaults.

    Raises:
        UserError: every problem.
    """
    from pydantic import ValidationError

    names = [entry.name for entry in entries(cls)]
    if cls not in _CHECKERS:
        _CHECKERS[cls] = {entry.name: _checker(entry, kinds(cls)[entry.name]) for entry in entries(cls)}
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
            checked = _CHECKERS[cls][name].validate_python(value)
            good[name] = _expanded(name, checked) if entry.metadata["path"] and checked else checked
        except ValidationError as error:
            problems.append(_problem(entry, kinds(cls)[name], value, error.errors(include_url=False)[0]))
        except UserError as error:
            problems += error.problems
    problems += _exclusions(cls, good) + cls.conflicts(good)
    if problems:
        raise UserError(problems)
    return good


def _expanded(name: str, paths: str | list[str]) -> str | list[str]:
    return expanded(name, paths) if isinstance(paths, str) else [expanded(name, path) for path in paths]


def _exclusions(cls: type[Options], values: Mapping[str, Any]) -> list[str]:
    """A line for every two options given that exclude each other."""
    return [
        problem(second, show(values[second]), f"excludes {first}={show(values[first])}", "Give one of the two")
        for first, second in exclusive(cls)
        if values.get(first) and values.get(second)
    ]


# Options from a file, and a file from options.


def from_options(cls: type[AnyOptions], values: Mapping[str, Any]) -> AnyOptions:
    """Options by name, as text or Python values.

    Like `cls(**values)`, but a name that is missing or unknown is one more problem among the others.

    Raises:
        UserError: every problem.
    """
    return cls(**_checked(cls, values))


def from_yaml(cls: type[AnyOptions], path: str | Path, overrides: Mapping[str, Any] | None = None) -> AnyOptions:
    """Options from a YAML file. `overrides` (the flags) win, also over an option of the file that they exclude.

    Raises:
        UserError: no such file, not YAML, a key twice, an unknown key (with the nearest name), any bad value.
    """
    overrides = overrides or {}
    values = _read_yaml(path)
    for first, second in (*exclusive(cls), *(pair[::-1] for pair in exclusive(cls))):
        if first in overrides and second not in overrides:
            values.pop(second, None)
    return from_options(cls, {**values, **overrides})


def to_yaml(config: Options) -> str:
    """Every option, resolved, as YAML that `from_yaml` reads back to an equal config."""
    values = {entry.name: getattr(config, entry.name) for entry in entries(config)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


_MOST_BYTES, _MOST_NODES = 1 << 20, 20_000  # of an options file; ours have 2 kB


class _Loader(yaml.BaseLoader):
    """Scalars stay text, but for a plain null."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's options, as text or None or lists of text.

    Raises:
        UserError: no such file, not YAML of that kind, too large, a key twice.
    """

    def failure(rule: str, remedy: str) -> UserError:
        return UserError(problem("config", show(str(path)), rule, remedy))

    with guard("config", show(str(path)), "cannot be read", "Give the path of a YAML file"):
        with local_path("config", path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise failure(f"has more than {_MOST_BYTES} bytes", "Give a file of options")
    try:
        loader = _Loader(raw.decode())
        node = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise failure("is not UTF-8 text", "Give the path of a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or brief(error)
        raise failure(f"is not valid YAML{where}: {said}", "Correct that place") from error
    if node is None or node.tag.endswith(":null"):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise failure("must hold one `option: value` a line", "Write for example `rank: 16`")
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise failure("is not valid YAML: a key is no text", "Write for example `rank: 16`")
    if _nodes(node, {}) > _MOST_NODES:
        raise failure(f"holds more than {_MOST_NODES} values, its aliases written out", "Write them without aliases")
    with guard("config", show(str(path)), "is not valid YAML", "Write one `option: value` a line"):
        values = loader.construct_document(node)
    lines: dict[str, list[int]] = {}
    for key, _ in node.value:
        lines.setdefault(key.value, []).append(key.start_mark.line + 1)
    twice = [
        problem(
            show(name),
            show(values.get(name)),
            f"given {len(at)} times in {path}, lines {', '.join(map(str, at[:10]))}",
            "Keep one of them",
        )
        for name, at in lines.items()
        if len(at) > 1
    ]
    if twice:
        raise UserError(twice)
    return {str(name): value for name, value in values.items()}


def _nodes(node: yaml.Node, seen: dict[int, int]) -> int:
    """How many values there are with aliases written out: each anchor is counted once, and multiplied."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in seen:
        seen[id(node)] = _MOST_NODES + 1  # what an alias inside its own anchor comes to
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        seen[id(node)] = 1 + sum(_nodes(part, seen) for part in parts)
    return seen[id(node)]
