"""Where the command `qlora` begins: a Ctrl-C while Python still imports is one line too.

The alternative, `cli.main` as the entry, answers the first tenth of a second with a traceback.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process; returns its exit code."""
    try:
        from qlora.cli import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("\nqlora: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
