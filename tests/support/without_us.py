"""transformers, bitsandbytes and PEFT in a process that has no qlora: what a server computes of an exported folder.

    logits_without_us(folders, texts) -> {folder: [logits [tokens, vocabulary] of each text]}     float32, on the CPU

A folder may hold an adapter in `adapter/`, as `bnb4-lora` has it. bitsandbytes on a CPU with AVX512-BF16 would round
the constants of 4-bit layers to bf16 in its own product; on cards it does not, and here it is told not to.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

OURS = ("qlora", "qlora_kernels")


def logits_without_us(folders: Iterable[Path], texts: Sequence[Sequence[int]], place: Path):
    """One process for all folders. `place`: a folder for what it writes."""
    from safetensors.torch import load_file

    folders, out = [str(folder) for folder in folders], place / "without_us.safetensors"
    request = {"folders": folders, "texts": [list(text) for text in texts], "out": str(out)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        text=True,
        capture_output=True,
        cwd=place,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    out.unlink()
    return {folder: [found[f"{folder} {number}"] for number in range(len(texts))] for folder in folders}


def _serve(request: dict) -> None:
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    logits = {}
    for folder in request["folders"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
        assert model.config.quantization_config.load_in_4bit
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if os.path.isdir(f"{folder}/adapter"):
            model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter")
        transformers.AutoTokenizer.from_pretrained(folder)  # loads
        for number, text in enumerate(request["texts"]):
            with torch.no_grad():
                found = model.eval()(input_ids=torch.tensor([text])).logits[0]
            assert found.dtype == torch.float32
            logits[f"{folder} {number}"] = found.contiguous()
        del model
    assert not [name for name in sys.modules if name.split(".")[0] in OURS]
    save_file(logits, request["out"])


if __name__ == "__main__":
    # An editable installation finds the tree by a finder of its own.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    sys.path[:] = [path for path in sys.path if not any((Path(path or ".") / name).exists() for name in OURS)]
    assert not any(importlib.util.find_spec(name) for name in OURS), "qlora is installed; run this where it is not"
    _serve(json.load(sys.stdin))
