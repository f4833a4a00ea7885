#!/usr/bin/env bash
# Makes the environment, runs the linters and all tests; arguments go to pytest alone, e.g. scripts/test.sh -k merging
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    scripts/lint.sh
fi
source scripts/environment.sh test
exec python -m pytest "$@"
