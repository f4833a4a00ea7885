"""The plan against what is really built, held and measured."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

from qlora import attach_adapters, finetune, load_base, named_adapters
from qlora.calibrate.moments import in_step
from qlora.cli import main
from qlora.config.commands import FinetuneConfig, PlanConfig
from qlora.data.batch import Example
from qlora.errors import UserError
from qlora.export.bnb import quantize_checkpoint
from qlora.layers.attach import adapter_parameters
from qlora.layers.forward_mode import forward_mode
from qlora.plan.fit import baseline_bytes, fit, peak_batches, predict, requested
from qlora.plan.meta import MetaRun
from qlora.run.inputs import find_model, micro_batches
from qlora.run.optimizer import adapter_optimizer
from qlora_kernels import backends

HOUSE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data.jsonl")
    return folder


def meta_run(config: FinetuneConfig) -> MetaRun:
    return MetaRun(config, find_model(config, weights=False))


def held(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 16},
        {"method": "lora", "bits": 16},
        {"double_quant": False, "blocksize": 128},
        {"targets": "q_proj,down_proj"},
    ],
)
def test_what_lies_still_is_exact(place, tmp_path, options):
    name = str(place / "model")
    config = FinetuneConfig(model=name, data="-", output=str(tmp_path), device="cpu", dtype="bf16", **options)
    run = meta_run(config)
    plan = predict(run, requested(config), lambda size: ([(8,) * size], []))
    built = load_base(
        name, bits=config.bits, dtype="bf16", device="cpu", blocksize=config.blocksize, double_quant=config.double_quant
    )
    assert run.still.model == held([*built.parameters(), *built.buffers()])
    attach_adapters(built, method=config.method, rank=config.rank, targets=config.targets)
    assert plan.parts["adapters"] == plan.parts["gradients"] == held(adapter_parameters(built))
    optimizer = adapter_optimizer(built, config.optimizer(), tmp_path)
    assert plan.parts["optimizer"] == optimizer.pager.resident
    optimizer.close()


def mapped(model) -> int:
    """Bytes of the tensors of a model that lie where a file of safetensors is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    tensors = [
        t for t in (*model.parameters(), *model.buffers()) if any(start <= t.data_ptr() < end for start, end in places)
    ]
    return held(tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_stays_in_the_file_is_exact(tmp_path, name):
    """The file's header tells, tensor by tensor, whatever the config says; GPT-2's own file names its tensors without a
    prefix.
    """
    model = tiny.random_model(name)
    model.config.save_pretrained(tmp_path)  # which says float32
    stored = {
        key.removeprefix("transformer."): value for key, value in model.state_dict().items() if key != "lm_head.weight"
    }
    stored = {
        key: value.clone() if i % 2 else value.bfloat16() for i, (key, value) in enumerate(sorted(stored.items()))
    }
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(tmp_path)
    quantize_checkpoint(str(tmp_path), tmp_path / "nf4", dtype="bf16")
    for folder, bits, dtype in (
        (".", 4, "bf16"),
        (".", 16, "bf16"),
        (".", 16, "fp32"),
        ("nf4", 4, "bf16"),
        ("nf4", 4, "fp32"),
    ):
        where = str(tmp_path / folder)
        run = meta_run(FinetuneConfig(model=where, data="-", output="-", bits=bits, dtype=dtype, device="cpu"))
        loaded = load_base(where, bits=bits, dtype=dtype, device="cpu")
        assert 0 < run.still.mapped == mapped(loaded) < held([*loaded.parameters(), *loaded.buffers()]), (
            folder,
            bits,
            dtype,
        )


def test_layers_alike_are_extrapolated():
    """Three layers and two tell what all 30 need."""
    config = FinetuneConfig(model="smollm2-135m", data="-", output="-", device="cpu", dtype="bf16")
    run = meta_run(config)
    assert run.stack.alike
    short = run.step((64, 64), False)
    whole = meta_run(config)
    whole.stack.alike = False
    assert dataclasses.astuple(whole.step((64, 64), False)) == pytest.approx(dataclasses.astuple(short), rel=0.01)
    model = load_base("smollm2-135m", dtype="bf16", device="cpu")
    assert forward_mode(model) == forward_mode(run.model(3, False))


def test_peak_is_what_is_measured():
    """SmolLM2 within 10 %, in processes of their own; the script also compares what lies still with the real model, to
    the byte.
    """
    done = subprocess.run(
        [sys.executable, str(HOUSE / "scripts/benchmarks/measure_plan.py"), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def live_bytes() -> int:
    """Of all tensors that somebody holds."""
    storages = {t.untyped_storage().data_ptr(): t for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


# gpt2: Conv1D; phi: attention beside MLP; gemma2: scores that are held
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "phi", "phi3"])
def test_passes_that_wait_hold_what_is_planned(saved_models, name):
    """The start of an adapter, with what every pass holds ahead of a layer."""
    where = str(saved_models(name))
    config = FinetuneConfig(
        model=where, data="-", output="-", device="cpu", dtype="fp32", batch_size=4, max_tokens=64, calibrate="-:2048"
    )
    planned = MetaRun(config, find_model(config))._waiting_bytes()
    model = attach_adapters(load_base(where, dtype="fp32", device="cpu")).eval()
    modules = {layer: layer_name for layer_name, layer in named_adapters(model)}
    batches = [torch.arange(2, 258).view(4, 64) for _ in range(8)]
    with torch.no_grad():
        model(input_ids=batches[0])  # what stays of a first pass, such as tables of rotations, is none of theirs
        before = live_bytes()
        most = max(live_bytes() for _ in in_step(model, modules, batches)) - before
    # 8 bytes a token of a mask of ones are not planned; a mask that the real model finds it does not need is
    assert most - 8 * 2048 <= planned <= 1.2 * most


def test_70b_needs_no_weights(tmp_path):
    transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path / "config.json"), device="cuda", dtype="bf16", batch_size=1)
    plan = predict(meta_run(config), requested(config), peak_batches(config))
    assert plan.parts["weights"] == 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672) // 2
    assert plan.parts["weights"] < plan.peak < 100e9


def test_a_plan_follows_the_planned_device(tmp_path, monkeypatch):
    """Not the machine that plans: a card runs its own kernels, whatever this CPU has; and CUDA's own part counts."""
    transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=512
    ).save_pretrained(tmp_path)
    config = PlanConfig(model=str(tmp_path), device="cuda", dtype="bf16", batch_size=2, max_tokens=512)
    found = []
    kernels = ("supports_attention", "supports_fused_gemm", "supports_matmul_dense")
    every = SimpleNamespace(layers=2, **dict.fromkeys(kernels, lambda *_: True))  # a CPU that has all of them, as AMX
    for native in (backends.NATIVE, every, None):
        monkeypatch.setattr(backends, "NATIVE", native)
        run = meta_run(config)
        found.append(predict(run, requested(config), peak_batches(config)))
        assert any(type(module).__name__ == "GatedMLP" for module in run.model(3, False).modules())
    assert found[0] == found[1] == found[2]
    assert found[0].parts["libraries"] == 64 << 20 and baseline_bytes("cuda") == 500_000_000
    beside = {}
    for device in ("cpu", "cuda"):  # on a card, of pages in one piece (test_flat.py measures them)
        run = meta_run(dataclasses.replace(config, device=device))
        beside[device] = predict(run, requested(config), peak_batches(config)).parts["gradients beside sums"]
    assert beside == {"cpu": 0, "cuda": 4 * sum(run.adapters)}  # one page holds them all, and its sums are another


def test_the_order_of_sacrifice():
    config = PlanConfig(model="smollm2-135m", device="cpu", dtype="bf16", batch_size=4, max_tokens=256, rank=64)
    config = dataclasses.replace(config, adapter_init="zero")  # a start takes more than the least of these steps do
    run, lengths = meta_run(config), peak_batches(config)
    wanted = predict(run, requested(config), lengths)
    assert fit(run, wanted.budget, lengths)[0] == wanted
    less, smallest = fit(run, wanted.budget - 10_000_000, lengths)
    assert less.settings.batch_size == 4 and not less.settings.gradient_checkpointing
    assert 0 < less.parts["optimizer"] < wanted.parts["optimizer"] and less.budget <= wanted.budget - 10_000_000
    recomputed, smallest = fit(run, wanted.budget // 2, lengths)
    assert recomputed.settings.gradient_checkpointing and recomputed.settings.batch_size == 4
    nothing, smallest = fit(run, 1, lengths)
    assert (
        nothing is None and smallest.peak <= recomputed.peak
    )  # of one example, or of any number where loading takes more
    assert smallest.settings.gradient_checkpointing and smallest.settings.optimizer_memory == "none"
    assert smallest.settings.batch_size * smallest.settings.accumulate == 4
    assert fit(run, smallest.budget, lengths)[0].budget <= smallest.budget
    assert fit(run, smallest.budget - 1, lengths)[0] is None


def test_the_largest_batch_is_one_of_the_run(tmp_path):
    """Of most tokens, and of most with padding, among the very batches that `finetune` makes."""
    lengths = [3, 40, 5, 9, 22, 8, 31, 17, 4, 6, 90, 12, 13]
    examples = [Example((1,) * n, (False,) + (True,) * (n - 1)) for n in lengths]
    config = FinetuneConfig(model="-", data="-", output="-", batch_size=4, accumulate=2, steps=5, seed=3)
    for size in (4, 2, 1):
        trained, evaluated = peak_batches(config, examples, examples[:3])(size)
        cut = dataclasses.replace(config, batch_size=size, accumulate=8 // size)
        batches = [batch for step in range(5) for batch in micro_batches(cut, examples, 40)(step)]
        assert max(map(sum, trained)) == max(batch.tokens for batch in batches)
        assert max(len(b) * max(b) for b in trained) == max(batch.padded().input_ids.numel() for batch in batches)
        assert max(map(sum, evaluated)) == {4: 48, 2: 40, 1: 40}[size]  # 3, 5, 40: of like length together
    assert peak_batches(config)(2) == ([(1024, 1024)], [])


def test_command(capsys):
    line = ["plan", "--model", "smollm2-135m", "--max-tokens", "256", "--device", "cpu", "--dtype", "bf16"]
    assert main([*line, "--memory", "100GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and all(nbytes >= 0 for nbytes in found["parts"].values())
    assert sum(found["parts"].values()) - found["overlap"] - found["mapped"] == found["training"] == found["peak"]
    assert main([*line, "--memory", "50MB"]) == 0
    assert "the smallest that works is" in capsys.readouterr().out
    data = str(HOUSE / "scripts/data/tickets_train.jsonl")
    assert main([*line, "--data", data, "--json"]) == 0  # of real records, which are shorter
    real = json.loads(capsys.readouterr().out)
    assert 4 * 70 < real["tokens"] < 4 * 256 == found["tokens"] and real["peak"] < found["peak"]


# ---------------------------------------------------------------- finetune --memory


def options(place, output, **changes) -> FinetuneConfig:
    usual = {
        "model": str(place / "model"),
        "data": str(place / "data.jsonl"),
        "output": str(output),
        "steps": 4,
        "batch_size": 4,
        "rank": 64,
        "adapter_init": "zero",
    }
    return FinetuneConfig(**usual | {"learning_rate": 1e-2, "device": "cpu", "dtype": "fp32"} | changes)


def losses(output) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_same_losses_within_a_budget(place, tmp_path, capsys):
    finetune(options(place, tmp_path / "free"))
    with pytest.raises(UserError) as refused:
        finetune(options(place, tmp_path / "tight", memory=1_000_000))
    (line,) = refused.value.problems
    assert line.startswith("memory=1MB: too little") and not (tmp_path / "tight").exists()
    least = int(line.split("the smallest that works is ")[1].split("MB")[0]) * 1_000_000
    finetune(options(place, tmp_path / "tight", memory=least + 2_000_000, save_every=2))
    said = capsys.readouterr().out
    assert "predicted" in said and f"of {least // 1_000_000 + 2} MB" in said
    assert losses(tmp_path / "tight") == pytest.approx(losses(tmp_path / "free"), rel=1e-4)
    finetune(options(place, tmp_path / "tight", memory=None, save_every=2, resume=True))  # a budget may change


@pytest.mark.parametrize("bf16", [False, True])
def test_a_refusal_says_what_takes_half(place, tmp_path, monkeypatch, bf16):
    """Where auto is fp32 on a CPU, and only there; it is true."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: bf16)
    for dtype in ("auto", "fp32"):
        with pytest.raises(UserError) as refused:
            finetune(options(place, tmp_path / "tight", memory=1_000_000, dtype=dtype))
        assert ("or `dtype=bf16`" in refused.value.problems[0]) == (dtype == "auto" and not bf16)
    kept = [meta_run(options(place, tmp_path, dtype=dtype)).step((64, 64), False).kept for dtype in ("bf16", "fp32")]
    assert kept[0] < 0.6 * kept[1]


def test_no_other_masks_for_a_budget(place, tmp_path):
    """Dropout draws by batch: a run with it keeps its batches."""
    config = options(place, tmp_path / "x", dropout=0.1)
    assert fit(meta_run(config), 1, peak_batches(config))[1].settings.batch_size == 4
