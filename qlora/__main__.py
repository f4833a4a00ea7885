"""Where the command `qlora` begins, and where it ends.

A Ctrl-C while Python still imports is one line too. The alternative, `cli.main` as the entry, answers the first tenth
of a second with a traceback.

While modules are imported no garbage is collected: a collector walks through all of their million objects again and
again, for a fifth of the time. `command_table` lets it begin after them.

The process ends when all is written and what was registered for its end has run. Python would then take the modules
apart, object by object: 1.7 s after torch and transformers, where the system takes no time. So the last function that
runs at the end, which is the one registered first, leaves at once (`os._exit`).
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import suppress


class _End:
    """Leaves this process, though none forked from it, with `code`: 1 as long as nobody said another one."""

    def __init__(self) -> None:
        self.code, self.process = 1, os.getpid()

    def __call__(self) -> None:
        if os.getpid() == self.process:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # closed, or None; the command has flushed what it must
                    stream.flush()
            os._exit(self.code)


def main() -> int:
    """Run the command line of this process, which ends after it; returns its exit code."""
    gc.disable()
    end = _End()
    atexit.register(end)
    try:
        from qlora.cli import main as run

        end.code = run()
    except KeyboardInterrupt:
        sys.stderr.write("\nqlora: interrupted\n")
        end.code = 130
    except SystemExit as stop:
        end.code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    return end.code


if __name__ == "__main__":
    sys.exit(main())
