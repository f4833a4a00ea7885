#!/usr/bin/env bash
# Formatters and checkers over the whole project, none of which changes a file; `scripts/lint.sh --fix` lets them mend what they can.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
sources=(kernels/qlora_kernels/cpu/csrc/*)
if [ "${1:-}" = "--fix" ]; then
    ruff format --quiet .
    ruff check --fix --quiet . || true
    clang-format -i "${sources[@]}"
fi
ruff format --check --quiet . || { echo "The files above are not formatted: run scripts/lint.sh --fix" >&2; exit 1; }
ruff check --quiet .
clang-format --dry-run --Werror "${sources[@]}"
mypy
