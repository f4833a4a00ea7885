#!/usr/bin/env bash
# Makes the environment, runs the linters and all tests by two processes; arguments go to pytest alone, e.g.
# scripts/test.sh -k merging, or scripts/test.sh -n 8 --dist worksteal where there are cores and 2 GB of memory for each
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    scripts/lint.sh
    set -- -n 2 --dist worksteal # most tests keep one core busy
fi
source scripts/environment.sh test
exec python -m pytest "$@"
