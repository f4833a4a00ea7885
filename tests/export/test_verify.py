"""Every export is held against the adapted model: what is damaged, or is another model, gets no name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import adapted

from qlora import ExportSpec, UserError, VerifySpec, attach_adapters, export_adapter, load_base, merge, save_adapter
from qlora.config.commands import ExportConfig, MergeConfig
from qlora.export import formats
from qlora.export.peft import read_adapter
from qlora.export.verify import Closeness, compare, expect, texts_of, tokenizer_problems, usual_limit
from qlora.models.device import DTYPES
from qlora.specs import ExportFormat


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A DoRA adapter on a tiny Llama."""
    place = tmp_path_factory.mktemp("adapter")
    tiny.write_model(place / "model")
    return save_adapter(adapted(load_base(str(place / "model"), dtype="fp32")), place / "adapter", tiny.tokenizer())


def opened(adapter, output):
    return formats.open_adapted(read_adapter(adapter), output, [], model=None, trust_remote_code=False)[0]


def damage(path, wanted):
    """Turn the sign of half of one tensor of a file."""
    tensors = load_file(path)
    name = next(name for name in tensors if wanted in name)
    tensors[name] = tensors[name].clone()
    tensors[name][: len(tensors[name]) // 2] *= -1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spec, file, tensor",
    [
        (ExportSpec("hf", dtype="fp32"), "model.safetensors", "layers.1.mlp.up_proj.weight"),
        (ExportSpec("hf", dtype="bf16"), "model.safetensors", "layers.0.self_attn.v_proj.weight"),
        (ExportSpec("bnb4-lora"), "model.safetensors", "layers.1.mlp.down_proj.weight.absmax"),
        (ExportSpec("bnb4-lora"), "adapter/adapter_model.safetensors", "layers.1.mlp.down_proj.lora_B"),
    ],
)
def test_one_damaged_tensor_is_caught(adapter, tmp_path, spec, file, tensor):
    found = opened(adapter, tmp_path / "out")
    export_adapter(adapter, tmp_path / "out", spec, verify=None)
    dtype = "fp32" if spec.dtype == "auto" else spec.dtype
    kept = formats.FORMATS[spec.to].keeps(found, dataclasses.replace(spec, dtype=dtype))
    expected = expect(found, texts_of(found, None), {spec.base: kept})
    limit, row = usual_limit(True, dtype, expected.dtype), formats.FORMATS[spec.to]

    def closeness() -> Closeness:
        return compare(
            expected, tmp_path / "out", lambda folder: row.load(folder, found, DTYPES[expected.dtype]), spec.base
        )

    whole = closeness()
    assert limit.holds(whole) and whole.greedy_equal == whole.greedy_texts == 4 and whole.tokens > 100
    damage(tmp_path / "out" / file, tensor)
    assert not limit.holds(closeness())


def test_a_fold_of_a_bf16_training_is_computed_in_float32_and_held_to_its_limit(adapter, tmp_path):
    """transformers leaves what is not in 4 bits in bf16 beside 4-bit layers, which would then compute in it: logits 1 %
    off, and the limit had to let damages of that size pass.
    """
    model = adapted(load_base(str(adapter.parent / "model"), dtype="bf16"))
    save_adapter(model, tmp_path / "adapter", tiny.tokenizer())
    done = export_adapter(tmp_path / "adapter", tmp_path / "out", ExportSpec("bnb4-lora"))
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert done.closeness.logit_error < 1e-5 and done.closeness.kl < 1e-9


def test_figures_are_those_of_the_definition(adapter, tmp_path):
    """KL by float64 from the definition; the largest difference; the errors add up."""
    found = opened(adapter, tmp_path / "out")
    spec = ExportSpec("bnb4", dtype="fp32")
    expected = expect(found, texts_of(found, None), {"dequantized": formats.FORMATS["bnb4"].keeps(found, spec)})
    export_adapter(adapter, tmp_path / "out", spec, verify=None)
    theirs = formats.FORMATS["bnb4"].load(tmp_path / "out", found, torch.float32).eval()
    got = compare(expected, tmp_path / "out", lambda _: theirs, "dequantized")
    with torch.no_grad():
        pairs = [
            (wanted.double(), theirs(input_ids=torch.tensor([text.ids])).logits[0].double())
            for wanted, text in zip(expected.logits, expected.texts, strict=True)
        ]
    kl = torch.cat([(p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1) for p, q in pairs])
    assert got.kl == pytest.approx(kl.mean().item(), rel=1e-6) and got.largest_kl == pytest.approx(kl.max().item())
    assert got.logit_difference == pytest.approx(max((p - q).abs().max().item() for p, q in pairs))
    assert got.top1_agreement == torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).double().mean().item()
    assert got.kl > 1e-5 and 0.01 < got.logit_error < 0.5


def test_the_report_says_what_was_found(adapter, tmp_path):
    done = export_adapter(adapter, tmp_path / "out", ExportSpec("hf", dtype="fp32"))
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["verified"] == dataclasses.asdict(done.closeness) and done.closeness.kl < 1e-8
    assert report["to"] == "hf" and report["base"] == "dequantized" and report["effect_kl"] > 1e-4
    assert report["readers"].keys() == {"transformers"} and report["computed_in"] == "fp32"


def test_a_distant_export_leaves_nothing(adapter, tmp_path):
    """The figures are said; what the user has beside it stays."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        export_adapter(adapter, tmp_path / "out", ExportSpec("bnb4"), verify=VerifySpec(max_kl=1e-9))
    (line,) = error.value.problems
    assert line.startswith("max_kl=1e-09: the export is further") and "top-1 agreement" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    export_adapter(adapter, tmp_path / "out", ExportSpec("bnb4"), verify=VerifySpec(max_kl=0.5))


def test_it_is_verified_on_data(adapter, tmp_path):
    tiny.write_data(tmp_path / "data.jsonl")
    done = export_adapter(adapter, tmp_path / "out", verify=VerifySpec(str(tmp_path / "data.jsonl")))
    assert done.closeness.greedy_texts == 4 and 300 < done.closeness.tokens < 2000
    (tmp_path / "bad.jsonl").write_text('{"question": "1"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        export_adapter(adapter, tmp_path / "other", verify=VerifySpec(str(tmp_path / "bad.jsonl")))
    assert not (tmp_path / "other").exists()


def test_the_closer_base_is_kept(adapter, tmp_path):
    """Training saw the dequantized weights; both figures are in the report, and only one model in the folder."""
    done = export_adapter(adapter, tmp_path / "out", ExportSpec("hf", base="best", dtype="fp32"))
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert done.base == report["base"] == "dequantized" and report["others"]["original"]["kl"] > 100 * done.closeness.kl
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    merge(adapter, tmp_path / "merged", dtype="fp32", verify=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "merged"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(UserError, match="base=best: needs the verification"):
        merge(adapter, tmp_path / "other", base="best", verify=False)


def test_an_adapter_that_does_nothing_is_said(adapter, tmp_path, capsys):
    save_adapter(attach_adapters(load_base(str(adapter.parent / "model"), dtype="fp32")), tmp_path / "fresh")
    merge(tmp_path / "fresh", tmp_path / "one")
    assert "note: the adapter changes almost nothing" in capsys.readouterr().err
    merge(adapter, tmp_path / "two")
    assert "note" not in capsys.readouterr().err


def test_another_tokenizer_is_caught(adapter, tmp_path):
    found = opened(adapter, tmp_path / "out")
    export_adapter(adapter, tmp_path / "out", verify=None)
    assert tokenizer_problems(found, tmp_path / "out") == []
    template = tmp_path / "out" / "chat_template.jinja"
    template.write_text(template.read_text().replace("im_start", "im_begin"))
    (line,) = tokenizer_problems(found, tmp_path / "out")
    assert line.startswith("verify=Explain") and "other tokens" in line


def test_what_cannot_be_loaded_is_one_line(adapter, tmp_path):
    found = opened(adapter, tmp_path / "out")
    row, spec = formats.FORMATS["hf"], ExportSpec("hf", dtype="fp32")
    expected = expect(found, texts_of(found, None), {"dequantized": row.keeps(found, spec)})
    export_adapter(adapter, tmp_path / "out", verify=None)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="verify=failed: what was written cannot be loaded and run"):
        compare(expected, tmp_path / "out", lambda folder: row.load(folder, found, torch.float32), "dequantized")


def test_options_of_the_commands_arrive():
    given = {"adapter": "a", "output": "o", "max_kl": 0.1, "data": "d", "shard_size": 7, "base": "best"}
    for config in (MergeConfig(**given), ExportConfig(**given, dtype="bf16")):
        assert config.verification() == VerifySpec("d", 0.1)
        assert config.spec() == ExportSpec("hf", "best", "bf16", shard_size=7)
    made = ExportConfig(adapter="a", output="o", to="bnb4-lora", double_quant=True, verify=False)
    assert made.verification() is None and made.spec() == ExportSpec("bnb4-lora", double_quant=True)
    with pytest.raises(UserError, match=r"max_kl=0\.1: has no effect without the verification"):
        MergeConfig(adapter="a", output="o", max_kl=0.1, verify=False)


def test_formats_are_those_of_the_option():
    assert tuple(formats.FORMATS) == get_args(ExportFormat)
    fields = {field.name for field in dataclasses.fields(ExportSpec)}
    assert all(row.takes <= fields for row in formats.FORMATS.values())


def test_an_interrupted_export_leaves_no_folder(adapter, tmp_path):
    """Ctrl-C while it verifies what it wrote: nothing under the name, nothing beside it, and the next one works."""
    code = f"import qlora; qlora.export_adapter({str(adapter)!r}, {str(tmp_path / 'out')!r})"
    for _ in range(5):  # an interpreter may be where it ignores one
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        while not (tmp_path / ".out.part" / "config.json").exists() and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=120)
        if child.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert child.returncode != 0 and list(tmp_path.iterdir()) == []
    assert export_adapter(adapter, tmp_path / "out", ExportSpec("hf", dtype="fp32"), verify=None).closeness is None
