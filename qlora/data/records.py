"""Files -> records: JSONL, JSON, CSV, Parquet, a folder of them, or a hub dataset. Text stays the text in the file.

A record is a dict of columns that knows where it stands ("line 17"), so that every later error can say so. All
problems of a source are found before one is raised. The alternative, to read files with `datasets`, turns ISO dates
into datetimes, "007" into 7.0 and "NA" into None, and answers from an old cache; it is asked for hub datasets only.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora.errors import UserError, brief, guard, problem, shortened

_SHOWN = 10  # problems a person still reads
_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF8 = "Save the file as UTF-8 (from Windows: iconv -f cp1252 -t utf-8 OLD > NEW)"
_CONVERT = {
    ".gz": "Unpack it: gunzip FILE",
    ".zip": "Unpack it",
    ".zst": "Unpack it: unzstd FILE",
    ".ndjson": "Rename it to .jsonl",
    ".jsonlines": "Rename it to .jsonl",
    ".tsv": "Save it with commas between the values, as .csv",
    ".xlsx": "Save it as CSV (UTF-8)",
    ".txt": 'Write each text as a line {"text": "..."} of a .jsonl file',
    ".md": 'Write each text as a line {"text": "..."} of a .jsonl file',
}


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


class Gathered:
    """Problems of a source: the first ten as lines, the others only counted, for there may be millions."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, name: str, value: object, rule: str, remedy: str) -> None:
        """One more problem."""
        self.count += 1
        if self.count <= _SHOWN:
            self.lines.append(problem(name, shortened(value), shortened(rule, 500), remedy))

    def take(self, error: UserError) -> None:
        """The problems of an error."""
        self.count += len(error.problems)
        self.lines += error.problems[: max(0, _SHOWN - len(self.lines))]

    def refuse(self) -> None:
        """Nothing, if there are no problems.

        Raises:
            UserError: the first ten, and how many more.
        """
        more = self.count - len(self.lines)
        if self.count:
            raise UserError([*self.lines, *([f"data: and {more} more problems like these."] if more else [])])


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
    records: list[dict] = []
    problems, columns = Gathered(), {}
    for file in files:
        try:
            found = _read_file(file)
        except UserError as error:
            problems.take(error)
        else:
            columns[file.name] = sorted({column for record in found for column in record})
            records += found
    first, expected = next(iter(columns.items()), ("", []))
    for name, own in columns.items():
        if own != expected:
            rule = f"{name} has the columns {', '.join(own)} where {first} has {', '.join(expected)}"
            remedy = "Give every file of the folder the same columns, or name one file"
            problems.add("data", folder, rule, remedy)
    problems.refuse()
    return records


def _read_file(path: Path) -> list[dict]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        remedy = _CONVERT.get(path.suffix.lower(), "Convert or rename the file")
        raise UserError(problem("data", path, f"its ending is none of {_ENDINGS}", remedy))
    problems = Gathered()
    with guard("data", path, "cannot be read", "Check the file, or write it again"):
        if path.stat().st_size == 0:
            raise UserError(problem("data", path, "the file is empty", "Write at least one record into it"))
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(problem("data", path, "is a pointer of Git LFS, not the data", "Run: git lfs pull"))
        records = reader(path, problems)
    problems.refuse()
    if not records:
        raise UserError(problem("data", path, "the file holds no records", "Write at least one record into it"))
    return records


def _lines(path: Path, problems: Gathered) -> Iterator[tuple[int, str]]:
    """(number, text) of every line; a byte order mark is dropped, a line that is not UTF-8 becomes a problem."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                rule = f"line {number} is not UTF-8 (byte {error.start + 1} of the line)"
                problems.add("data", path, rule, _UTF8)


def _parse(text: str) -> object:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_float=_Decimal, parse_constant=refuse)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _why(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else brief(error)


def _json_record(value: object, path: Path, place: str, problems: Gathered) -> list[dict]:
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
    listed = place == "line 1" and isinstance(value, list)
    problems.add("data", path, rule, "Rename the file to .json" if listed else 'Write {"column": "text", ...}')
    return []


def _read_jsonl(path: Path, problems: Gathered) -> list[dict]:
    records = []
    for number, line in _lines(path, problems):
        if not line.strip():
            continue
        try:
            value = _parse(line.rstrip("\r\n"))
        except ValueError as error:
            rule = f"line {number} is not JSON ({_why(error)})"
            listed = number == 1 and line.lstrip().startswith("[")
            remedy = "Rename the file to .json" if listed else "Write one complete object on each line"
            problems.add("data", path, rule, remedy)
        else:
            records += _json_record(value, path, f"line {number}", problems)
    return records


def _read_json(path: Path, problems: Gathered) -> list[dict]:
    lines = list(_lines(path, problems))
    if problems.count:
        return []
    try:
        value = _parse("".join(line for _, line in lines))
    except ValueError as error:
        first = next((line.strip() for _, line in lines if line.strip()), "")
        if first.startswith("{") and first.endswith("}"):
            return _read_jsonl(path, problems)  # many .json files hold one object a line
        where = f"line {error.lineno} " if isinstance(error, json.JSONDecodeError) else ""
        problems.add("data", path, f"{where}is not JSON ({_why(error)})", "Repair that line")
        return []
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        rule = f"the file is {kind_of(value)}, where a list of records is needed"
        problems.add("data", path, rule, "Put the records between [ and ], or one on each line of a .jsonl file")
        return []
    return [
        record
        for number, item in enumerate(value, 1)
        for record in _json_record(item, path, f"record {number}", problems)
    ]


def _read_csv(path: Path, problems: Gathered) -> list[dict]:
    limit = csv.field_size_limit(sys.maxsize)  # the default stops at 128 KiB, less than a long document
    reader = csv.reader((line for _, line in _lines(path, problems)), strict=True)
    records: list[dict] = []
    begin = 1
    try:
        header = next(reader, [])
        if wrong := _header_problem(header):
            problems.add("data", path, *wrong)
            return []
        begin = reader.line_num + 1
        for row in reader:
            if len(row) == len(header):
                records.append(Record(dict(zip(header, row, strict=True)), str(path), f"line {begin}"))
            elif row:
                rule = f"line {begin} has {len(row)} values where the header has {len(header)}"
                problems.add("data", path, rule, "Quote values that hold a comma or a line end")
            begin = reader.line_num + 1
    except csv.Error as error:
        said = "a quote in the row that begins here is not closed" if "unexpected end" in str(error) else error
        problems.add("data", path, f"line {begin} is not CSV ({said})", "Repair that row")
    finally:
        csv.field_size_limit(limit)
    return records


def _header_problem(header: list[str]) -> tuple[str, str] | None:
    """(rule, remedy) of a first line that does not name the columns of a CSV file."""
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        shown = "tabs" if other == "\t" else other
        return f"its columns are separated by {shown}", "Save it with commas between the values"
    if nameless := [number for number, name in enumerate(header, 1) if not name.strip()]:
        which = f"column {', '.join(map(str, nameless[:5]))} has no name"
        return f"line 1: {which} ({','.join(header)})", "Name it, or leave it out (pandas: to_csv(index=False))"
    if len(set(header)) < len(header):
        return f"line 1 names a column twice ({','.join(header)})", "Rename one of them"
    return None


def _read_parquet(path: Path, problems: Gathered) -> list[dict]:
    if importlib.util.find_spec("pyarrow") is None:
        rule = "Parquet is read by the package pyarrow, which is not installed"
        raise UserError(problem("data", path, rule, "Run `pip install pyarrow`, or give JSONL, JSON or CSV"))
    from pyarrow.parquet import ParquetFile

    with guard("data", path, "the file is not Parquet", "Write it again"), ParquetFile(path) as file:
        rows = file.read().to_pylist()
    return [Record(_without_filling(row), str(path), f"row {number}") for number, row in enumerate(rows, 1)]


def _without_filling(row: dict) -> dict:
    """A row without the nulls inside its columns that only fill up a struct: there every object has the keys of all.

    `content` of a turn stays, for templates ask whether it is null; and nulls in lists stay.
    """

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            keeps = "content" if "role" in value else None
            return {key: stripped(item) for key, item in value.items() if item is not None or key == keeps}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return {column: stripped(value) for column, value in row.items()}


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_ENDINGS = ", ".join(_READERS)


def _read_hub(source: str, nearby: str) -> list[dict]:
    from huggingface_hub import HfApi, constants

    name, *rest = source.split(":")
    config, split = rest if len(rest) == 2 else (None, rest[0] if rest else "train")
    if importlib.util.find_spec("datasets") is None:
        rule = "there is no such file, and hub datasets are read by the package datasets, which is not installed"
        raise UserError(problem("data", source, rule, f"{nearby}. If it is a hub dataset, run `pip install datasets`"))
    rule = "there is no such file, and no hub dataset could be read"
    with (
        guard("data", source, rule, f"{nearby}. If it is a hub dataset, check name, split and network"),
        tempfile.TemporaryDirectory(prefix="qlora-data-") as cache,
    ):
        if not constants.HF_HUB_OFFLINE:  # offline, a dataset that was read before is still in the hub's own cache
            HfApi().dataset_info(name, timeout=10)  # fails at once, where `datasets` goes on trying for half a minute
        rows = load_with_datasets(name, config, split, cache)
        return [Record(_without_filling(row), source, f"row {number}") for number, row in enumerate(rows, 1)]


def load_with_datasets(name: str, config: str | None, split: str, cache: str) -> Iterable[dict]:
    """Rows of a hub dataset (a local folder is read in the same way). CSV stays text; `cache` takes the Arrow copy."""
    import datasets

    options: dict[str, Any] = {"split": split, "cache_dir": cache}
    if hasattr(datasets.load_dataset_builder(name, config, cache_dir=cache).config, "keep_default_na"):
        head = datasets.load_dataset(name, config, nrows=1, **options)  # the column names, before the types are guessed
        as_text = datasets.Features({column: datasets.Value("string") for column in head.column_names})
        options |= {"features": as_text, "keep_default_na": False}
    return datasets.load_dataset(name, config, **options)
