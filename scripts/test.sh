#!/usr/bin/env bash
# Makes the environment and runs all tests; arguments go to pytest, e.g. scripts/test.sh -k merging
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
exec python -m pytest "$@"
