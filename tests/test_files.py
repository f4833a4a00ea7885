"""Folders that appear whole: what is replaced, what is left alone, and what a disk may do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import subprocess
import sys

import pytest

from qlora.errors import UserError
from qlora.files import remove_partial, whole_folder


def contents(folder) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(final, text="new", **options) -> None:
    with whole_folder(final, **options) as part:
        (part / "file").write_text(text)


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch):
    """With RENAME_EXCHANGE, and as on a file system without."""
    if request.param == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *name, **options: object())  # a C library without renameat2
    return request.param


def test_what_is_replaced_is_gone_and_nothing_is_left_beside(tmp_path, renames):
    for text in ("one", "two"):
        write(tmp_path / "deep/out", text)
        assert contents(tmp_path) == {"deep/out/file": text}
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "deep/out") as part:
        (part / "file").write_text("three")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"deep/out/file": "two"}


def test_through_a_link_the_folder_it_names_is_written(tmp_path, renames):
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/file").read_text() == "two"


KILLED_AT = ["before the first rename", "between the two"]


@pytest.mark.parametrize("when", KILLED_AT)
@pytest.mark.parametrize("then", ["remove_partial", "write"])
def test_a_kill_while_replacing_never_leaves_none(tmp_path, monkeypatch, when, then):
    write(tmp_path / "out", "old")
    monkeypatch.setattr(ctypes, "CDLL", lambda *name, **options: object())  # a C library without renameat2
    child = os.fork()
    if child == 0:
        left, rename = iter(range(KILLED_AT.index(when), -1, -1)), os.rename

        def dies(*names):
            if next(left) == 0:
                os._exit(9)
            rename(*names)

        os.rename = dies
        write(tmp_path / "out", "new")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if then == "remove_partial":
        remove_partial(tmp_path)
        assert contents(tmp_path) == {"out/file": "old"}
    else:
        with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out"):
            assert (tmp_path / "out/file").read_text() == "old"
            raise ZeroDivisionError
        assert contents(tmp_path) == {"out/file": "old"}


@pytest.mark.parametrize("what", ["a file", "an empty folder", "a full folder", "another empty folder"])
def test_what_appears_meanwhile_is_left_alone(tmp_path, what):
    out = tmp_path / "out"
    if what == "another empty folder":
        out.mkdir()
    with pytest.raises(UserError, match=f"left alone. The result is whole, in {out}-2."):
        with whole_folder(out, replaces=False) as part:
            (part / "file").write_text("new")
            if what == "a file":
                out.write_text("mine")
            elif what == "another empty folder":
                out.rename(tmp_path / "away")
                out.mkdir()
            else:
                out.mkdir()
            if what == "a full folder":
                (out / "mine").write_text("mine")
    kept = {"a file": {"out": "mine"}, "a full folder": {"out/mine": "mine"}}
    assert contents(tmp_path) == {"out-2/file": "new"} | kept.get(what, {})
    assert out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_that_was_there_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", replaces=False)
    assert contents(tmp_path) == {"out/file": "new"}


def test_two_writers_of_one_folder(tmp_path):
    with whole_folder(tmp_path / "out", replaces=False) as part:
        (part / "file").write_text("first")
        with pytest.raises(UserError, match="another process is writing it"):
            write(tmp_path / "out", "second", replaces=False)
    assert contents(tmp_path) == {"out/file": "first"}


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".out.part/deep").mkdir(parents=True)
    (tmp_path / ".out.part/deep/half").write_text("half")
    write(tmp_path / "out")
    assert contents(tmp_path) == {"out/file": "new"}


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_second_signal_while_it_clears_up_leaves_nothing_either(tmp_path, number):
    """It comes with the first file that is removed, and is heard when all are gone."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from qlora.files import whole_folder\n"
        "from qlora.train.signals import as_interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sent = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'os.remove' and not sent:\n"
        "        sent.append(event)\n"
        "        os.kill(os.getpid(), signal.Signals[sys.argv[2]])\n"
        "with as_interrupts():\n"
        "    try:\n"
        "        with whole_folder(pathlib.Path(sys.argv[1])) as part:\n"
        "            for i in range(20):\n"
        "                (part / str(i)).touch()\n"
        "            sys.addaudithook(hook)\n"
        "            raise ValueError\n"
        "    except KeyboardInterrupt:\n"
        "        print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), number], capture_output=True, text=True)
    assert done.stdout == "heard\n" and list(tmp_path.iterdir()) == [], done.stderr


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("theirs")
    (tmp_path / ".out.part").symlink_to("theirs")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "out")
    assert (tmp_path / "theirs/file").read_text() == "theirs"


def refusing(call, number, wanted=lambda *arguments: True):
    def refuses(*arguments):
        if wanted(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return refuses


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_file_systems_without_locks_and_without_fsync(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, number))
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number))
    for replaces in (True, False):
        write(tmp_path / f"out-{replaces}", replaces=replaces)
    assert contents(tmp_path) == {"out-True/file": "new", "out-False/file": "new"}


def test_a_dying_disk_is_one_line(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EIO))
    with pytest.raises(UserError) as error:
        write(tmp_path / "out")
    assert len(error.value.problems) == 1 and "Input/output error" in str(error.value)
    assert contents(tmp_path) == {"out/file": "old"}


def test_new_folders_above_are_synced_too(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def noting(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    write(tmp_path / "run/checkpoints/step")
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run/checkpoints")} <= synced
