"""Reading: text stays the text in the file, and every problem names its line."""

from __future__ import annotations

import json
import os
import tempfile

import pyarrow
import pytest
from pyarrow import parquet

from qlora.data.records import load_with_datasets, read_records, text_of
from qlora.errors import UserError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def problems(source):
    with pytest.raises(UserError) as caught:
        read_records(source)
    return caught.value.problems


AS_WRITTEN = {"question": "007", "answer": "NA", "when": "2020-01-31", "note": ' 1e3, "q"\nü😀 '}


def test_text_is_the_text_in_the_file_whatever_the_file(tmp_path):
    lines = write(tmp_path, "a.jsonl", json.dumps(AS_WRITTEN) + "\n")
    listed = write(tmp_path, "b.json", json.dumps([AS_WRITTEN], ensure_ascii=False, indent=2))
    below = write(tmp_path, "c.json", json.dumps({"data": [AS_WRITTEN]}))
    table = write(tmp_path, "d.csv", 'question,answer,when,note\n007,NA,2020-01-31," 1e3, ""q""\nü😀 "\n')
    columns = tmp_path / "e.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([AS_WRITTEN]), columns)
    for source in (lines, listed, below, table, str(columns)):
        assert read_records(source) == [AS_WRITTEN]
    assert read_records(str(tmp_path)) == [AS_WRITTEN] * 5  # a folder may mix them


def test_json_numbers_and_booleans_are_their_literal_text(tmp_path):
    line = '{"a": 1.50, "b": 42, "c": 1e-3, "d": true, "e": -0.0, "f": null, "g": [1.50, 2]}'
    source = write(tmp_path, "a.jsonl", line)
    (record,) = read_records(source)
    nested = record.pop("g")
    assert record == {"a": "1.50", "b": "42", "c": "1e-3", "d": "true", "e": "-0.0", "f": None}
    assert nested == [1.5, 2] and json.dumps(nested) == "[1.5, 2]"  # inside tool calls they stay numbers
    assert text_of(nested[0]) == "1.50" and text_of(nested[1]) == "2"


def test_typed_values_without_one_spelling_have_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"whole": [7], "float": [0.5], "flag": [False]}), path)
    (record,) = read_records(str(path))
    assert [text_of(record[name]) for name in ("whole", "float", "flag")] == ["7", None, "false"]


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    source = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r"}')
    assert read_records(source) == [{"text": "a"}, {"text": "b\r"}]
    assert [record.place for record in read_records(source)] == ["line 1", "line 4"]
    table = write(tmp_path, "a.csv", b"\xef\xbb\xbftext\r\nx\r\n\r\ny\r\n")
    assert read_records(table) == [{"text": "x"}, {"text": "y"}]
    assert read_records(write(tmp_path, "a.json", b'\xef\xbb\xbf[{"text": "a"}]')) == [{"text": "a"}]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    assert read_records(write(tmp_path, "a.json", '{"text": "a"}\n{"text": "b"}\n')) == [{"text": "a"}, {"text": "b"}]


def test_a_line_separator_inside_text_is_not_the_end_of_a_line(tmp_path):
    source = write(tmp_path, "a.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')
    assert read_records(source) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]


def test_a_csv_cell_may_be_longer_than_the_default_limit(tmp_path):
    assert read_records(write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n"))[0]["text"] == "x" * 200_000


def test_broken_json_names_its_line(tmp_path):
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n' * 16 + '{"text": "b"\n' + "[1]\n" + '{"text": NaN}\n')
    assert problems(source) == [
        f"data={source}: line 17 is not JSON (Expecting ',' delimiter, column 13). Write one complete object on each "
        "line.",
        f'data={source}: line 18 is a list, not an object with columns. Write {{"column": "text", ...}}.',
        f"data={source}: line 19 is not JSON (NaN is not a JSON number). Write one complete object on each line.",
    ]
    source = write(tmp_path, "a.json", '[\n  {"text": "a"},\n  {"text": }\n]')
    assert problems(source) == [f"data={source}: line 3 is not JSON (Expecting value, column 12). Repair that line."]


def test_problems_are_gathered_and_capped(tmp_path):
    found = problems(write(tmp_path, "a.jsonl", "{\n" * 25))
    assert len(found) == 11 and "line 10 is" in found[9] and found[10] == "data: and 15 more problems like these."


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    for name, content in (
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
        ("a.csv", b"text\n\xe9\n"),
        ("a.json", b'[\n{"text": "\xff"}]'),
    ):
        (found,) = problems(write(tmp_path, name, content))
        assert "line 2 is not UTF-8 (byte" in found


def test_one_object_is_not_a_list_of_records(tmp_path):
    (found,) = problems(write(tmp_path, "a.json", '{\n"text": "a"\n}'))
    assert "the file is an object, where a list of records is needed" in found


def test_csv_rows_and_headers(tmp_path):
    found = problems(write(tmp_path, "a.csv", "question,answer\na,b\na,b,c\na\n"))
    assert [line.split(": ", 1)[1].split(".")[0] for line in found] == [
        "line 3 has 3 values where the header has 2",
        "line 4 has 1 values where the header has 2",
    ]
    assert "line 1 names a column twice (a,a)" in problems(write(tmp_path, "b.csv", "a,a\nx,y\n"))[0]
    assert (
        "line 2 is not CSV (a quote in the row that begins here is not closed)"
        in problems(write(tmp_path, "c.csv", 'text\n"open\nend\n'))[0]
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_files(tmp_path, name):
    assert "the file is empty" in problems(write(tmp_path, name, b""))[0]


def test_files_without_records(tmp_path):
    for name, content in (("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "question,answer\n")):
        assert "the file holds no records" in problems(write(tmp_path, name, content))[0]
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert "the file holds no records" in problems(str(tmp_path / "a.parquet"))[0]


def test_what_is_not_parquet(tmp_path):
    assert "the file is not Parquet" in problems(write(tmp_path, "a.parquet", b"PAR1, or so it says"))[0]


def test_wrong_paths_name_the_nearest_files(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    (found,) = problems(str(tmp_path / "trian.jsonl"))
    assert "no such file or folder" in found and "train.jsonl" in found
    assert "does not exist either" in problems(str(tmp_path / "nowhere" / "a.jsonl"))[0]
    (tmp_path / "notes").mkdir()
    write(tmp_path / "notes", "a.txt", "x")
    assert "holds no .jsonl, .json, .csv, .parquet file" in problems(str(tmp_path / "notes"))[0]
    assert "its ending is none of" in problems(str(tmp_path / "notes" / "a.txt"))[0]


def test_a_folder_is_read_in_order_and_needs_the_same_columns(tmp_path):
    write(tmp_path, "2.jsonl", '{"text": "c"}\n')
    write(tmp_path, "1.csv", "text\na\nb\n")
    write(tmp_path, ".hidden.csv", "other\nx\n")
    write(tmp_path, "README.md", "not data")
    assert [record["text"] for record in read_records(str(tmp_path))] == ["a", "b", "c"]
    write(tmp_path, "3.jsonl", '{"prompt": "d"}\n')
    write(tmp_path, "4.jsonl", "broken\n")
    assert [line.split(": ", 1)[1].split(".", 1)[0] for line in problems(str(tmp_path))] == [
        "line 1 is not JSON (Expecting value, column 1)",
        "3",
    ]
    assert "3.jsonl has the columns prompt where 1.csv has text" in problems(str(tmp_path))[1]


def test_a_hub_dataset_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for source in ("no-such-owner/no-such-dataset", "no-such-dataset:main:train"):
        (found,) = problems(source)
        assert found.startswith(f"data={source}: there is no such file, and no hub dataset could be read")
        assert "\n" not in found


def test_what_datasets_reads_stays_text(tmp_path):
    """`datasets` reads a local folder as it reads a hub repository; by itself it gives 7.0, None and a datetime."""
    os.makedirs(tmp_path / "hub")
    write(tmp_path / "hub", "train.csv", "question,answer,when\n007,NA,2020-01-31\nx,1.50,\n")
    with tempfile.TemporaryDirectory() as cache:
        rows = list(load_with_datasets(str(tmp_path / "hub"), None, "train", cache))
    assert rows == [
        {"question": "007", "answer": "NA", "when": "2020-01-31"},
        {"question": "x", "answer": "1.50", "when": ""},
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "question;answer\na;b\n", "its columns are separated by ;. Save it with commas"),
        ("a.csv", "question\tanswer\na\tb\n", "its columns are separated by tabs"),
        ("a.csv", ",question,answer\n0,a,b\n", "column 1 has no name (,question,answer). Name it, or leave it out"),
        (
            "a.csv",
            b"question,answer\nf\xfcr,b\n",
            "line 2 is not UTF-8 (byte 2 of the line). Save the file as UTF-8 (from",
        ),
        ("a.jsonl", '[{"text": "a"}]', "Rename the file to .json"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not JSON (its values are nested too deeply)"),
        ("a.json", "[" * 100_000, "is not JSON (its values are nested too deeply)"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 is not JSON (Exceeds the limit"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not the data"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        ("a.parquet", b"PAR1 and no more PAR1", "the file is not Parquet"),
        ("a.ndjson", "{}", "Rename it to .jsonl"),
        ("a.tsv", "a", "Save it with commas between the values, as .csv"),
        ("a.jsonl.gz", "a", "Unpack it: gunzip FILE"),
        ("a.txt", "a", 'Write each text as a line {"text": "..."}'),
    ],
)
def test_what_other_programs_write_is_refused_with_the_remedy(tmp_path, name, content, said):
    (line,) = problems(write(tmp_path, name, content))
    assert said in line and len(line) < 500 and "\n" not in line


def test_a_row_over_several_lines_is_known_by_where_it_begins(tmp_path):
    source = write(tmp_path, "a.csv", 'text\n"a\nb"\nc\n')
    assert [record.place for record in read_records(source)] == ["line 2", "line 4"]
