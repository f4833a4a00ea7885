"""What does not exist everywhere is absent: `import qlora`, `qlora --help` and `qlora doctor` answer, and say what that
costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
BLOCK = """
import importlib.abc, importlib.metadata, importlib.util, sys
try:
    import psutil  # of transformers, which has another one for Windows
except ImportError:
    pass
absent = {absent}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in absent:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
for name in absent:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
found, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, package=None: None if name in absent else found(name, package)
def told(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = told
"""


def run(code: str, *absent: str, **variables: str) -> subprocess.CompletedProcess:
    """`code` in a process without these modules."""
    paths = os.pathsep.join((str(HOUSE), str(HOUSE / "kernels")))
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}  # a command sets it
    environment = {**kept, "PYTHONPATH": paths} | variables
    script = BLOCK.format(absent=repr(set(absent))) + code
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


ALL = ("fcntl", "resource", "triton", "bitsandbytes", "datasets", "pyarrow")
UNBUILT = "from qlora_kernels.cpu import native; native.load = lambda: (None, 'reference, because not built'); "
ANSWER = """
import qlora
from qlora.cli import main
assert main(['finetune', '--help']) == 0
[getattr(qlora, name) for name in qlora.__all__]
print('DOCTOR', flush=True)
sys.exit(main(['doctor', '--json']))
"""


def test_import_help_and_doctor_answer():
    """And the last one says what each absence costs."""
    done = run(UNBUILT + ANSWER, *ALL, CXX="no-such-compiler")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    page, _, found = done.stdout.partition("DOCTOR")
    said = {entry["what"]: f"{entry['why']}: {entry['do']}" for entry in json.loads(found)["missing"]}
    assert "--learning-rate" in page
    assert "two runs can write to one" in said["Python's fcntl"] and "WSL2" in said["Python's fcntl"]
    assert "no limit on its memory" in said["Python's resource"]
    assert (
        "many times slower" in said["the native CPU kernels"]
        and "no no-such-compiler" in said["the native CPU kernels"]
    )
    purposes = {"bitsandbytes": "the 4-bit operators on cards", "datasets": "data sets of the hub"}
    for name, purpose in (purposes | {"pyarrow": "data in Parquet"}).items():
        assert said[name].startswith(f"optional, for {purpose}") and said[name].endswith(f"pip install {name}")


def test_training_goes_on_without_locks_and_without_extras(tmp_path):
    """A run from data to adapter, its pages spilled to a file."""
    sys.path.insert(0, str(HOUSE / "tests/support"))
    import tiny

    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "data.jsonl")
    line = ["finetune", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl")]
    line += ["--output", str(tmp_path / "run"), "--steps", "1", "--optimizer-memory", "none", "--device", "cpu"]
    absent = ("fcntl", "resource", "bitsandbytes", "datasets", "pyarrow", "pandas", "scipy", "peft")
    done = run(f"from qlora.cli import main; sys.exit(main({line!r}))", *absent)
    assert done.returncode == 0 and (tmp_path / "run/adapter/adapter_model.safetensors").exists(), done.stderr


def test_data_that_an_extra_reads_is_one_line_with_its_package(tmp_path):
    """Before anything is asked of the hub; a local file whose name was mistyped is still named."""
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "train.jsonl").write_text("{}")
    code = "from qlora.data.records import read_records; from qlora import UserError\n"
    code += "for data in {names!r}:\n try: read_records(data)\n except UserError as error: print(*error.problems)\n"
    names = [str(tmp_path / "rows.parquet"), "owner/name"]
    done = run(code.format(names=names), "datasets", "pyarrow")
    parquet, hub = done.stdout.splitlines()
    assert parquet.startswith(f"data={names[0]}: Parquet is read by the package pyarrow, which is not installed. Run")
    assert hub.startswith("data=owner/name: there is no such file, and hub datasets are read by the package datasets")
    assert "pip install datasets" in hub and done.stderr == ""


def test_segments_of_a_card_may_grow_unless_the_user_says_otherwise():
    """Set before torch, whose allocator reads it once."""
    show = "from qlora.cli import main; main(['--version']); import os; assert 'torch' not in sys.modules; "
    show += "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    for given, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ):
        assert run(show, **given).stdout.splitlines()[-1] == expected
