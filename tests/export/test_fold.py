"""DoRA folded into a 4-bit base and a plain LoRA adapter: what bitsandbytes and PEFT compute of it without us is what
we trained, and what the other ways out lose.
"""

from __future__ import annotations

import functools
import json

import peft
import pytest
import tiny
import torch
import transformers
from helpers import relative, unsealed
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, adapted
from without_us import logits_without_us

from qlora import ExportSpec, UserError, attach_adapters, export_adapter, load_adapter, load_base, save_adapter
from qlora.calibrate.start import start_by_error
from qlora.export.fold import ADAPTER
from qlora.models.originals import originals
from qlora.models.source import resolve

IDS = torch.arange(2, 20).view(2, 9)
CASES = [
    ("llama", "dora"),
    ("llama", "lora"),
    ("qwen2", "dora"),  # biases, which stand outside of g
    ("gemma", "dora"),
    ("phi3", "dora"),  # q, k and v in one weight
    ("gpt2", "dora"),  # weights [in, out] in its file
    ("llama", "start"),  # an adapter that began by undoing the error of the base
]


def written(folder, name):
    """A tiny random model whose rows are whole blocks."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 192
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(name, method)`: (an adapted model's logits, its base's, the folder of the adapter)."""
    place = tmp_path_factory.mktemp("trained")

    @functools.cache
    def made(name: str, method: str):
        if not (place / name).exists():
            written(place / name, name)
        model = load_base(str(place / name), dtype="fp32")
        before = logits(model)
        if method == "start":
            attach_adapters(model, method="dora", rank=8, alpha=4.0)
            text = [torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))]
            start_by_error(model, originals(resolve(str(place / name))), text)
            with torch.no_grad():  # and learned since
                for parameter in model.parameters():
                    parameter.mul_(1.1 if parameter.requires_grad else 1.0)
        else:
            adapted(model, method)
        save_adapter(model, place / f"{name}-{method}")
        return logits(model), before, place / f"{name}-{method}"

    return made


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """Logits by case of what `bnb4-lora` writes, and with double-quantized constants, from one process without us."""
    place = tmp_path_factory.mktemp("served")
    folders = {}
    for name, method in CASES:
        folders[name, method] = place / f"{name}-{method}"
        export_adapter(trained(name, method)[2], folders[name, method], ExportSpec("bnb4-lora"), verify=None)
    folders["double"] = place / "double"
    export_adapter(
        trained("llama", "dora")[2], folders["double"], ExportSpec("bnb4-lora", double_quant=True), verify=None
    )
    found = logits_without_us(folders.values(), IDS.tolist(), place)
    return {case: torch.stack(found[str(folder)]) for case, folder in folders.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_without_us_it_is_the_model_that_was_trained(trained, served, case):
    after, before, _ = trained(*case)
    assert relative(served[case], after) < 1e-5
    assert relative(before, after) > 0.01  # the adapter does something


def test_what_the_other_ways_lose(trained, served, tmp_path):
    """Of the change that the adapter makes: nothing, a little in 8-bit constants, much by quantizing again, and most
    without the magnitude.
    """
    after, before, adapter = trained("llama", "dora")
    effect = (after - before).norm()
    lost = {"fold": served["llama", "dora"], "double": served["double"]}
    export_adapter(adapter, tmp_path / "bnb4", ExportSpec("bnb4"), verify=None)
    lost["again"] = logits(load_base(str(tmp_path / "bnb4"), dtype="fp32"))
    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "magnitude" not in k}
    peft_config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(peft_config))
    save_file(tensors, folder / "adapter_model.safetensors")
    base = load_base(str(adapter.parent / "llama"), dtype="fp32")
    lost["without m"] = logits(load_adapter(base, folder))
    loss = {name: ((found - after).norm() / effect).item() for name, found in lost.items()}
    print(loss)
    assert loss["fold"] < 1e-5 < loss["double"] < 0.05 < loss["again"] < loss["without m"]


def test_an_error_start_comes_out_right_in_each_format(trained, tmp_path):
    after, _, adapter = trained("llama", "start")
    found = {}
    for to in ("hf", "bnb4"):
        done = export_adapter(adapter, tmp_path / to, ExportSpec(to, dtype="fp32"))
        found[to] = logits(load_base(str(tmp_path / to), bits=16 if to == "hf" else 4, dtype="fp32"))
        assert done.closeness is not None
    assert relative(found["hf"], after) < 1e-5
    assert 1e-3 < relative(found["bnb4"], after) < 0.3


def test_codes_stay_and_magnitudes_are_gone(trained, tmp_path):
    _, _, adapter = trained("llama", "dora")
    export_adapter(adapter, tmp_path / "out", ExportSpec("bnb4-lora"), verify=None)
    base = load_base(str(adapter.parent / "llama"), dtype="fp32")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            assert torch.equal(value, base.get_buffer(name))
    tensors = load_file(tmp_path / "out" / ADAPTER / "adapter_model.safetensors")
    assert not peft.PeftConfig.from_pretrained(tmp_path / "out" / ADAPTER).use_dora
    assert tensors and not [name for name in tensors if "magnitude" in name]
    assert peft.PeftConfig.from_pretrained(tmp_path / "out" / ADAPTER).target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


# ---------------------------------------------------------------- what is refused


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        export_adapter(*arguments, **options)
    return error.value.problems


def test_rows_that_share_constants_are_refused_by_name(saved_models, tmp_path):
    """qwen2's down_proj is 150 wide here. LoRA has nothing to fold."""
    for method in ("dora", "lora"):
        save_adapter(adapted(load_base(str(saved_models("qwen2")), dtype="fp32"), method), tmp_path / method)
    problems = refused(tmp_path / "dora", tmp_path / "out", ExportSpec("bnb4-lora"))
    assert [line.split("=")[0] for line in problems] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "no multiple of the block size 64" in problems[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora", "lora"]
    export_adapter(tmp_path / "lora", tmp_path / "out", ExportSpec("bnb4-lora"), verify=None)


def test_a_head_with_a_magnitude_is_refused(saved_models, tmp_path):
    model = adapted(load_base(str(saved_models("mistral")), dtype="fp32"), targets="q_proj,lm_head")
    save_adapter(model, tmp_path / "adapter")
    (line,) = refused(tmp_path / "adapter", tmp_path / "out", ExportSpec("bnb4-lora"))
    assert line.startswith("lm_head=(dense): is not in 4 bits") and not (tmp_path / "out").exists()


def test_what_has_no_constants_is_refused(saved_models, tmp_path):
    save_adapter(adapted(load_base(str(saved_models("llama")), bits=16, dtype="fp32")), tmp_path / "adapter")
    (line,) = refused(tmp_path / "adapter", tmp_path / "out", ExportSpec("bnb4-lora"))
    assert line.startswith("to=bnb4-lora: the adapter was trained on 16-bit weights")
    (unsealed(tmp_path / "adapter") / "qlora.json").unlink()
    problems = refused(
        tmp_path / "adapter", tmp_path / "out", ExportSpec("bnb4-lora"), model=str(saved_models("llama"))
    )
    assert "does not say how its base was quantized" in problems[0] and "`to=hf`" in problems[0]


@pytest.mark.parametrize(
    "spec, said",
    [
        (ExportSpec("gglm"), "to=gglm: must be one of hf, bnb4-lora, bnb4"),
        (ExportSpec("bnb4-lora", base="original"), "base=original: has no meaning for `to=bnb4-lora`"),
        (ExportSpec("hf", double_quant=True), "double_quant=True: has no meaning for `to=hf`"),
        (ExportSpec("bnb4", dtype="int8"), "dtype=int8: must be one of"),
    ],
)
def test_options_without_a_meaning(trained, tmp_path, spec, said):
    (line,) = refused(trained("llama", "dora")[2], tmp_path / "out", spec)
    assert line.startswith(said) and not list(tmp_path.iterdir())
