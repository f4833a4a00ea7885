"""How the command begins and ends: Ctrl-C, standard streams that are closed, full, or lack letters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from qlora.streams import tell_now

HOUSE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "kernels")])}


def test_ctrl_c_is_130(tmp_path):
    """The process waits for a writer of its config; it is interrupted exactly there."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from qlora.cli import main; sys.exit(main(['finetune', '--config', {str(pipe)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    with pipe.open("w"):  # opens when the process has it open too
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "\nqlora finetune: interrupted\n"


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qlora", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr == "output=(standard output): the disk is full. Free space there, or write elsewhere.\n"


def test_control_c_while_the_command_line_is_imported(tmp_path):
    """The first tenth of a second: one line, and no traceback."""
    (tmp_path / "argparse.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nfrom qlora.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (130, "\nqlora: interrupted\n")


LAST = r"""
import atexit, os, sys, threading, time
from qlora.__main__ import main

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart\n")

def ends():
    time.sleep(0.3)
    print("thread")

kept = Kept()
sys.argv[1:] = [%r]
code = main()
atexit.register(print, "registered")
threading.Thread(target=ends).start()
child = os.fork()
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.exit(code)
"""


@pytest.mark.parametrize("argument, code", [("--version", 0), ("nothing", 2)])
def test_the_process_ends_when_all_is_said_and_is_not_taken_apart(argument, code):
    """A thread ends first, then what was registered; a process forked from it has an end of its own."""
    done = subprocess.run([sys.executable, "-c", LAST % argument], capture_output=True, text=True, env=ENVIRONMENT)
    said = done.stdout.splitlines()
    assert done.returncode == code, done.stderr
    assert said[-3:] == ["7", "thread", "registered"] and "taken apart" not in said


def test_what_nobody_caught_is_a_traceback_and_code_1():
    code = "import sys\nfrom qlora.__main__ import main\nsys.argv = None\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_garbage_is_collected_once_all_is_imported(tmp_path):
    tiny.write_model(tmp_path / "model")
    code = (
        "import gc, sys\nfrom qlora.__main__ import main\n"
        f"sys.argv[1:] = ['plan', '--json', '--model', {str(tmp_path / 'model')!r}]\n"
        "code = main(); print(gc.isenabled(), gc.get_freeze_count() > 100_000); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True True"), done.stderr


@pytest.mark.parametrize("stream", [1, 2])
def test_streams_that_are_closed_or_lack_letters(stream):
    """As by cron; nothing that is opened later gets the number of a standard stream."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m qlora --version {stream}>&-"], env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == b""
    code = "from qlora.cli import main; main(['--version']); print('\\ud55c')"
    ascii_only = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0 and done.stdout.endswith("\\ud55c\n")


def test_a_signal_handler_neither_blocks_nor_raises():
    """Its word goes into a pipe that is full, or that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    before = os.dup(2)
    try:
        os.dup2(writer, 2)
        tell_now("stopping")
        os.close(reader)
        tell_now("stopping")
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writer)
