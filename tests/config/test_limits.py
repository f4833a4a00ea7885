"""What a stranger's options file may cost, numbers that no machine has, and paths that cannot be."""

from __future__ import annotations

import os

import pytest

from qlora.config.commands import FinetuneConfig, MergeConfig
from qlora.config.options import from_options, from_yaml
from qlora.errors import UserError, brief, guard, problem, shortened

NEEDED = {"model": "m", "data": "d", "output": "o"}


def refused(function, *args, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert all("\n" not in line and len(line) < 1000 for line in caught.value.problems)
    return caught.value.problems


def aliases(levels: int) -> str:
    """A list of 9**levels values in a few hundred bytes."""
    lines = ["a0: &a0 [" + ",".join("1" * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "\n".join([*lines, f"targets: *a{levels - 1}\n"])


@pytest.mark.parametrize(
    "text, said",
    [
        (aliases(12), "its aliases written out"),
        ("targets: &a [*a]\n", "its aliases written out"),
        ("[" * 3000, "nested too deeply"),
        ("rank: '" + "9" * (1 << 20) + "'\n", "has more than 1048576 bytes"),
        ("? [rank]\n: 8\n", "a key is no text"),
        ("rank: \x01\n", "is not valid YAML"),
        (aliases(2).replace("targets: *a1", "targets: [q_proj]"), "not an option"),
    ],
    ids=["alias bomb", "alias in itself", "nested", "long", "key", "control", "small aliases"],
)
def test_an_options_file_costs_little(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    assert said in refused(from_yaml, FinetuneConfig, tmp_path / "run.yaml", NEEDED)[0]


def test_aliases_that_cost_nothing_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("rank: &r 8\nalpha: *r\n")
    config = from_yaml(FinetuneConfig, tmp_path / "run.yaml", NEEDED)
    assert (config.rank, config.alpha) == (8, 8.0)


@pytest.mark.parametrize("value", ["9" * 5000, "1e400", "9" * 300 + "GB", 10**400, float("inf"), "9223372036854775808"])
@pytest.mark.parametrize("name", ["optimizer_memory", "memory", "batch_size", "steps", "max_tokens"])
def test_numbers_that_no_machine_has(name, value):
    (line,) = refused(from_options, FinetuneConfig, NEEDED | {name: value})
    assert line.startswith(f"{name}=")


PATHS = [
    (cls, name)
    for cls, names in ((FinetuneConfig, ("model", "data", "output", "eval_data")), (MergeConfig, ("adapter", "model")))
    for name in names
]


@pytest.mark.parametrize("cls, name", PATHS)
def test_every_path_is_looked_at(cls, name, tmp_path, monkeypatch):
    """`~` is home wherever a path is meant; what the file system cannot answer is one line."""
    needed = {"adapter": "a", "output": "o"} if cls is MergeConfig else NEEDED
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(cls(**needed | {name: "~/x"}), name) == f"{tmp_path}/x"
    assert getattr(cls(**needed | {name: "x~/./y"}), name) == "x~/./y"
    (tmp_path / "loop").symlink_to("loop")
    for bad in ("a\0b", "x" * 300, "~nobody-of-this-name/x", f"{tmp_path}/loop"):
        (line,) = refused(cls, **needed | {name: bad})
        assert line.startswith(f"{name}=") and "cannot be looked at" in line
    (line,) = refused(cls, **needed | {name: os.fsdecode(b"caf\xe9")})
    assert "must be UTF-8 text" in line


def test_values_are_shortened_before_they_are_written_out():
    deep: list = []
    for _ in range(30):
        deep = [deep] * 9  # 9**30 values
    assert len(shortened(deep)) <= 300 and len(problem("x", "y" * 10**6, "is long", "Cut it")) < 400
    assert "16610 bits" in shortened(10**5000)
    assert problem("a\nb", "c\nd", "e\nf", "g\nh") == r"a\nb=c\nd: e\nf. g\nh."


def test_a_guard_knows_no_list_of_exceptions():
    class Foreign(Exception):
        """Of a library that derives from nothing in particular."""

    class PanicException(BaseException):
        """As pyo3 raises it."""

    for error in (Foreign("bad"), PanicException("bad"), MemoryError(), RecursionError(), KeyError("k"), OSError()):
        with pytest.raises(UserError, match=r"file=x: cannot be read \("), guard("file", "x", "cannot be read", "Look"):
            raise error
    for error in (KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)), guard("file", "x", "cannot be read", "Look"):
            raise error
    with pytest.raises(UserError, match=r"^ours$"), guard("file", "x", "cannot be read", "Look"):
        raise UserError("ours")
    assert brief(OSError(13, "Permission denied", "/x")) == "Permission denied"
