"""Files -> records: JSONL, JSON, CSV, Parquet, a folder of them, or a hub dataset. Text stays the text in the file.

A record is a dict of columns that knows where it stands ("line 17"), so that every later error can say so. All
problems of a source are found before one is raised. The alternative, to read files with `datasets`, turns ISO dates
into datetimes, "007" into 7.0 and "NA" into None, and answers from an old cache; it is asked for hub datasets only.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora.errors import UserError, problem

_SHOWN = 10  # problems a person still reads


class Record(dict):
    """One record, and where it stands: `source` is the file, `place` is "line 17", "row 3" or "record 3"."""

    __slots__ = ("place", "source")

    def __init__(self, values: dict, source: str, place: str):
        super().__init__(values)
        self.source, self.place = source, place


def place_of(record: dict) -> tuple[str, str] | None:
    """(file, place in it) of a record that was read from one."""
    return (record.source, record.place) if isinstance(record, Record) else None


class _Decimal(float):
    """A JSON number that still knows its own text: 1.50 stays "1.50". Inside tool calls it is an ordinary float."""

    __slots__ = ("literal",)
    literal: str

    def __new__(cls, literal: str):
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    def __str__(self) -> str:
        return self.literal


def text_of(value: object) -> str | None:
    """The text of a value; None where it has not exactly one: null, lists, objects, floats and dates of typed files."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, _Decimal)):
        return str(value)
    return None


def kind_of(value: object) -> str:
    """What a value is, in words, for errors."""
    if value is None:
        return "null"
    words = {
        str: "text",
        bool: "a boolean",
        int: "a number",
        _Decimal: "a number",
        list: "a list",
        dict: "an object",
        float: "a float, which has no text of its own",
        bytes: "binary",
    }
    return words.get(type(value), f"a {type(value).__name__}")


def raise_all(problems: list[str]) -> None:
    """Nothing, if there are no problems.

    Raises:
        UserError: the first ten, and how many more.
    """
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], f"data: and {len(problems) - _SHOWN} more problems like these."]
    if problems:
        raise UserError(problems)


def read_records(source: str) -> list[dict]:
    """Read a file, the files of a folder (sorted, same columns), or a hub dataset (name[:split] or name:config:split).

    A path that exists wins over a hub dataset of that name. In JSON a number or boolean that is a column is its literal
    text (1.50 -> "1.50", true -> "true"); CSV is text throughout; values of Parquet and the hub stay what they are.

    Raises:
        UserError: all problems found: wrong path, empty file, broken line 17, ragged rows, columns that differ.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path)
    a_file = path.suffix.lower() in _READERS or source.startswith((".", "/", "~")) or source.count("/") > 1
    if a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}", source):
        raise UserError(problem("data", source, "no such file or folder", _nearby(path)))
    return _read_hub(source, _nearby(path))


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    close = close or [name for name in names if Path(name).suffix.lower() in _READERS][:3]
    folder = "this folder" if path.parent == Path() else path.parent
    return f"Nearest in {folder}: {', '.join(close)}" if close else f"There are no data files in {folder}"


def _read_folder(folder: Path) -> list[dict]:
    files = sorted(
        entry for entry in folder.iterdir() if entry.suffix.lower() in _READERS and not entry.name.startswith(".")
    )
    if not files:
        raise UserError(problem("data", folder, f"the folder holds no {_ENDINGS} file", "Name the file, or its folder"))
    records, problems, columns = [], [], {}
    for file in files:
        try:
            found = _read_file(file)
        except UserError as error:
            problems += error.problems
        else:
            columns[file.name] = sorted({column for record in found for column in record})
            records += found
    first, expected = next(iter(columns.items()), ("", []))
    problems += [
        problem(
            "data",
            folder,
            f"{name} has the columns {', '.join(own)} where {first} has {', '.join(expected)}",
            "Give every file of the folder the same columns, or name one file",
        )
        for name, own in columns.items()
        if own != expected
    ]
    raise_all(problems)
    return records


def _read_file(path: Path) -> list[dict]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(problem("data", path, f"its ending is none of {_ENDINGS}", "Convert or rename the file"))
    problems: list[str] = []
    try:
        if path.stat().st_size == 0:
            raise UserError(problem("data", path, "the file is empty", "Write at least one record into it"))
        records = reader(path, problems)
    except OSError as error:
        raise UserError(problem("data", path, f"cannot be read ({error.strerror})", "Check the file")) from error
    raise_all(problems)
    if not records:
        raise UserError(problem("data", path, "the file holds no records", "Write at least one record into it"))
    return records


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """(number, text) of every line; a byte order mark is dropped, a line that is not UTF-8 becomes a problem."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                rule = f"line {number} is not UTF-8 (byte {error.start + 1} of the line)"
                problems.append(problem("data", path, rule, "Save the file as UTF-8"))


def _parse(text: str) -> object:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_float=_Decimal, parse_constant=refuse)


def _why(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _json_record(value: object, path: Path, place: str, problems: list[str]) -> list[dict]:
    if isinstance(value, dict):
        return [
            Record(
                {
                    column: text_of(item) if isinstance(item, (bool, int, float)) else item
                    for column, item in value.items()
                },
                str(path),
                place,
            )
        ]
    rule = f"{place} is {kind_of(value)}, not an object with columns"
    problems.append(problem("data", path, rule, 'Write {"column": "text", ...}'))
    return []


def _read_jsonl(path: Path, problems: list[str]) -> list[dict]:
    records = []
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        try:
            value = _parse(line.rstrip("\r\n"))
        except ValueError as error:
            rule = f"line {number} is not JSON ({_why(error)})"
            problems.append(problem("data", path, rule, "Write one complete object on each line"))
        else:
            records += _json_record(value, path, f"line {number}", problems)
    return records


def _read_json(path: Path, problems: list[str]) -> list[dict]:
    lines = list(_lines(path, problems))
    if problems:
        return []
    try:
        value = _parse("".join(line for _, line in lines))
    except ValueError as error:
        first = next((line.strip() for _, line in lines if line.strip()), "")
        if first.startswith("{") and first.endswith("}"):
            return _read_jsonl(path, problems)  # many .json files hold one object a line
        where = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
        problems.append(problem("data", path, f"{where}is not JSON ({_why(error)})", "Repair that line"))
        return []
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        problems.append(
            problem(
                "data",
                path,
                f"the file is {kind_of(value)}, where a list of records is needed",
                "Put the records between [ and ], or one on each line of a .jsonl file",
            )
        )
        return []
    return [
        record
        for number, item in enumerate(value, 1)
        for record in _json_record(item, path, f"record {number}", problems)
    ]


def _read_csv(path: Path, problems: list[str]) -> list[dict]:
    limit = csv.field_size_limit(sys.maxsize)  # the default stops at 128 KiB, less than a long document
    reader = csv.reader((line for _, line in _lines(path, problems)), strict=True)
    records: list[dict] = []
    try:
        header = next(reader, [])
        if header and (not all(header) or len(set(header)) < len(header)):
            rule = f"line 1 names no column, or one twice ({','.join(header)})"
            problems.append(problem("data", path, rule, "Write a header such as prompt,completion"))
            return []
        for row in reader:
            place = f"line {reader.line_num}"  # for a row over several lines it is the last of them
            if len(row) == len(header):
                records.append(Record(dict(zip(header, row, strict=True)), str(path), place))
            elif row:
                rule = f"{place} has {len(row)} values where the header has {len(header)}"
                problems.append(problem("data", path, rule, "Quote values that hold a comma or a line end"))
    except csv.Error as error:
        problems.append(problem("data", path, f"line {reader.line_num} is not CSV ({error})", "Repair that line"))
    finally:
        csv.field_size_limit(limit)
    return records


def _read_parquet(path: Path, problems: list[str]) -> list[dict]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        problems.append(problem("data", path, f"the file is not Parquet ({reason})", "Write it again"))
        return []
    return [Record(row, str(path), f"row {number}") for number, row in enumerate(rows, 1)]


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_ENDINGS = ", ".join(_READERS)


def _read_hub(source: str, nearby: str) -> list[dict]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[Any] = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version of the hub speaks with
    name, *rest = source.split(":")
    config, split = rest if len(rest) == 2 else (None, rest[0] if rest else "train")
    try:
        if not constants.HF_HUB_OFFLINE:  # offline, a dataset that was read before is still in the hub's own cache
            HfApi().dataset_info(name, timeout=10)  # fails at once, where `datasets` goes on trying for half a minute
        with tempfile.TemporaryDirectory(prefix="qlora-data-") as cache:
            rows = load_with_datasets(name, config, split, cache)
            return [Record(row, source, f"row {number}") for number, row in enumerate(rows, 1)]
    except (OSError, ValueError, RuntimeError, DatasetsError, http_error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            problem(
                "data",
                source,
                f"there is no such file, and no hub dataset could be read ({reason})",
                f"{nearby}. If it is a hub dataset, check name, split and network",
            )
        ) from error


def load_with_datasets(name: str, config: str | None, split: str, cache: str) -> Iterable[dict]:
    """Rows of a hub dataset (a local folder is read in the same way). CSV stays text; `cache` takes the Arrow copy."""
    import datasets

    options: dict[str, Any] = {"split": split, "cache_dir": cache}
    if hasattr(datasets.load_dataset_builder(name, config, cache_dir=cache).config, "keep_default_na"):
        head = datasets.load_dataset(name, config, nrows=1, **options)  # the column names, before the types are guessed
        as_text = datasets.Features({column: datasets.Value("string") for column in head.column_names})
        options |= {"features": as_text, "keep_default_na": False}
    return datasets.load_dataset(name, config, **options)
