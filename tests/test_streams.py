"""How the command begins and ends: Ctrl-C, standard streams that are closed, full, or lack letters."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
        command = [sys.executable, "-m", "qlora.cli", "--help"]
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


@pytest.mark.parametrize("stream", [1, 2])
def test_streams_that_are_closed_or_lack_letters(stream):
    """As by cron; nothing that is opened later gets the number of a standard stream."""
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m qlora.cli --version {stream}>&-"], env=ENVIRONMENT, capture_output=True
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
