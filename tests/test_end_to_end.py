"""The main job on the real SmolLM2 through the command line: fine-tune, generate, evaluate, merge, use in PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from helpers import relative, without_quantized_gemm
from without_us import logits_without_us

from qlora import load_base
from qlora.data.batch import pack
from qlora.data.records import read_records
from qlora.data.tokenize import tokenize
from qlora.export.bnb import quantize_checkpoint
from qlora.generate import generate_batch
from qlora.layers import nf4
from qlora.layers.forward import target_logits
from qlora.layers.linear import linear_names
from qlora.layers.loss import loss_sum

DATA = Path(__file__).parents[1] / "scripts" / "data"
STEPS = 24


def qlora(*arguments: object) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", "qlora", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`qlora finetune` on the tickets, with DoRA in 4 bits."""
    output = tmp_path_factory.mktemp("run") / "out"
    qlora(
        "finetune",
        "--model",
        "smollm2-135m",
        "--data",
        DATA / "tickets_train.jsonl",
        "--eval-data",
        DATA / "tickets_test.jsonl",
        "--output",
        output,
        "--bits",
        4,
        "--method",
        "dora",
        "--steps",
        STEPS,
        "--learning-rate",
        "2e-3",
        "--warmup",
        6,
        "--max-tokens",
        256,
        "--calibrate",
        2048,
    )
    return output


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return tokenize(read_records(str(DATA / "tickets_test.jsonl"))[:24], tokenizer).examples


def test_it_learns(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[0]["eval_loss"] > 2 and lines[-1]["eval_loss"] < 0.1


def test_generate_and_eval(run, tokenizer):
    record = read_records(str(DATA / "tickets_test.jsonl"))[0]
    answer = qlora(
        "generate", "--adapter", run / "adapter", "--prompt", record["prompt"], "--max-new-tokens", 48
    ).stdout
    assert set(json.loads(answer)) == set(json.loads(record["completion"]))
    report = json.loads(
        qlora("eval", "--adapter", run / "adapter", "--data", DATA / "tickets_test.jsonl", "--json").stdout
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert report["loss"] == pytest.approx(json.loads(lines[-1])["eval_loss"], rel=0.05)


def test_merged_in_bf16(run, held_out, tokenizer, tmp_path):
    """Weights rounded to bf16 and computed in float32: top-1 agreement at least 99.5 %, KL at most 1e-3 (issue 2)."""
    from qlora import load_adapter

    qlora("merge", "--adapter", run / "adapter", "--output", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = load_adapter(load_base("smollm2-135m", dtype="bf16").float(), run / "adapter").eval()
    agree = total = kl = 0.0
    with torch.no_grad():
        for i in range(0, len(held_out), 8):
            batch = pack(held_out[i : i + 8])
            expected = target_logits(exact, batch)[0].log_softmax(-1)
            found = target_logits(merged.float().eval(), batch)[0].log_softmax(-1)
            agree += (found.argmax(-1) == expected.argmax(-1)).sum().item()
            kl += torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum").item()
            total += len(expected)
    print(f"merged in bf16 on {total:.0f} tokens: top-1 agreement {agree / total:.4f}, KL {kl / total:.2e}")
    assert agree / total >= 0.995 and kl / total <= 1e-3
    answers = generate_batch(
        merged,
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged"),
        [read_records(str(DATA / "tickets_test.jsonl"))[0]["prompt"]],
        max_new_tokens=48,
    )
    assert json.loads(answers[0])


def test_folded_into_a_base_for_any_server(run, held_out, tmp_path):
    """`qlora export --to bnb4-lora`: in a process without qlora, bitsandbytes and PEFT compute the trained DoRA model
    of the files, and the command found the same.
    """
    from qlora import load_adapter

    out = tmp_path / "folded"
    done = qlora("export", "--adapter", run / "adapter", "--to", "bnb4-lora", "--dtype", "fp32", "--output", out)
    found = json.loads((out / "export_report.json").read_text())["verified"]
    assert found["kl"] < 1e-8 and found["top1_agreement"] == 1 and found["greedy_equal"] == 4 and "KL" in done.stdout
    ids = held_out[0].input_ids
    (theirs,) = logits_without_us([out], [ids], tmp_path)[str(out)]
    trained = json.loads((run / "adapter" / "qlora.json").read_text())["base"]["dtype"]
    ours = load_adapter(load_base("smollm2-135m", dtype=trained).float(), run / "adapter").eval()
    with torch.no_grad():
        assert relative(theirs, ours(input_ids=torch.tensor([ids])).logits[0]) < 1e-5


def test_fitted_scales_in_bitsandbytes(tmp_path):
    """`qlora quantize --scales mse`: transformers and bitsandbytes load it, and decode every weight to the value that
    we decode.
    """
    qlora("quantize", "--model", "smollm2-135m", "--output", tmp_path / "base", "--scales", "mse", "--dtype", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ours, absmax = (load_base("smollm2-135m", dtype="fp32", scales=scales) for scales in ("mse", "absmax"))
    names = linear_names(ours)
    assert len(names) == 210
    for name in names:
        weight, mine = theirs.get_submodule(name).weight, nf4.dequantize(ours.get_submodule(name).quantized)
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), mine), name
        assert not torch.equal(mine, nf4.dequantize(absmax.get_submodule(name).quantized)), name


def test_the_adapter_in_peft(run, held_out, tmp_path):
    """PEFT + bitsandbytes on the quantized base computes the loss that we computed."""
    from qlora import load_adapter

    quantize_checkpoint("smollm2-135m", tmp_path / "base", dtype="fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(without_quantized_gemm(base), run / "adapter").eval()
    ours = load_adapter(load_base("smollm2-135m", dtype="fp32"), run / "adapter").eval()
    batch = pack(held_out[:4])
    rounding = 1e-6 * batch.target_tokens  # a loss near 0 is what is left of logits of 40
    with torch.no_grad():
        expected = pytest.approx(loss_sum(ours, batch).item(), rel=1e-4, abs=rounding)
        assert loss_sum(theirs, batch).item() == expected
