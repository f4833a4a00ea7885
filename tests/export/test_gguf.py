"""Models written as GGUF: every tensor through our reader, every architecture in llama.cpp itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import gguf
import ggufs
import pytest
import tiny
import torch
import transformers
from helpers import relative
from llama_cpp import LlamaCpp
from tiny import adapted

from qlora import UserError, load_base, save_adapter
from qlora.cli import main
from qlora.export.formats import FORMATS, export_adapter
from qlora.export.gguf import ADAPTER, BASE, MODEL, convert_to_gguf, write_gguf
from qlora.models.gguf_header import read_header, read_keys
from qlora.models.source import resolve
from qlora.specs import ExportSpec

IDS = tuple(range(3, 43))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
PRINTABLE = 35  # a token of one letter


def model(name: str, rope: dict | None = None, **changes) -> transformers.PreTrainedModel:
    """A tiny model, with values that fp16 has, whose vocabulary has room for `ggufs.bpe_tokenizer`."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 264, 265, 265
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = config.head_dim
    config = type(config).from_dict(config.to_dict() | changes)
    if rope is not None:
        config.rope_parameters = config.rope_parameters | rope
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.half())
    return made


def saved(made: transformers.PreTrainedModel, folder):
    made.save_pretrained(folder)
    ggufs.bpe_tokenizer().save_pretrained(folder)
    return folder


def logs(made: torch.nn.Module, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return made(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


def served_logs(path, lora=None) -> torch.Tensor:
    with LlamaCpp(path, lora) as served:
        return torch.tensor(served.next_logs(IDS, 320, PRINTABLE))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_comes_back(tmp_path, name):
    """To the bit: F16 and float32 norms of values that fp16 has; BF16 once rounded."""
    made = model(name)
    folder = saved(made, tmp_path / "model")
    for type, dtype in (("F16", torch.float32), ("BF16", torch.bfloat16)):
        again = load_base(str(convert_to_gguf(str(folder), tmp_path / type, type=type)), bits=16, dtype="fp32")
        for key, value in made.state_dict().items():
            wanted = value if "norm" in key or value.dim() == 1 else value.to(dtype).float()
            if name.startswith("gemma") and "norm" in key:
                wanted = (wanted + 1) - 1  # as it is stored
            assert torch.equal(again.state_dict()[key], wanted), (type, key)
        if type == "F16":
            assert relative(logs(again), logs(made)) < 1e-5


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTED = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0] * 8, "rope_type": "longrope"}
VARIANTS = {
    "llama": {"head_dim": 32, "tie_word_embeddings": False},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, 3": {"rope": LLAMA3 | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 65536},
    "llama, linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "llama, yarn": {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    "llama, listed": {
        "rope": LISTED
        | {"long_factor": LISTED["short_factor"], "attention_factor": 1.0, "original_max_position_embeddings": 2048}
    },
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"sliding_window": 16, "num_hidden_layers": 3, "layer_types": None},
    "gemma3": {"sliding_window": 16, "num_hidden_layers": 7, "layer_types": None},
    "phi3": {"rope": {"partial_rotary_factor": 0.5}},
    "phi3, listed": {
        "rope": LISTED | {"original_max_position_embeddings": 1024},
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("case", VARIANTS)
def test_llama_cpp_computes_the_same(tmp_path, case):
    """The whole distribution after 40 tokens, up to what llama.cpp's fp16 arithmetic rounds; our reader sees the same
    model.
    """
    made = model(case.split(",")[0].split()[0], **VARIANTS[case])
    path = convert_to_gguf(str(saved(made, tmp_path / "model")), tmp_path / "gguf")
    assert (served_logs(path) - logs(made)).abs().max() < 0.02
    assert relative(logs(load_base(str(path), bits=16, dtype="fp32")), logs(made)) < 1e-5


def test_a_wrong_model_would_be_seen(tmp_path):
    """The bound above is far below what one forgotten rule makes: here the rotation's base."""
    made = model("llama")
    path = convert_to_gguf(str(saved(made, tmp_path / "model")), tmp_path / "gguf")
    other = model("llama", rope={"rope_theta": 500.0})
    assert (served_logs(path) - logs(other)).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, method", [("llama", "lora"), ("llama", "dora"), ("qwen2", "dora"), ("gemma", "dora"), ("phi3", "lora")]
)
def test_an_adapter_in_llama_cpp(tmp_path, name, method):
    """Merged, and as a LoRA beside its base (of DoRA with rows scaled), llama.cpp computes the adapted model."""
    base = saved(model(name), tmp_path / "base")
    ours = adapted(load_base(str(base), dtype="fp32"), method, rslora=True)
    save_adapter(ours, tmp_path / "adapter")
    expected, plain = logs(ours), logs(load_base(str(base), dtype="fp32"))
    assert kl(expected, plain) > 0.02  # the adapter does something
    folder = export_adapter(tmp_path / "adapter", tmp_path / "merged", ExportSpec("gguf"), verify=None).folder
    assert kl(expected, served_logs(folder / MODEL)) < 1e-5
    for type, most in (("F16", 1e-5), ("Q8_0", 1e-3)):
        spec = ExportSpec("gguf-lora", type=type)
        folder = export_adapter(tmp_path / "adapter", tmp_path / type, spec, verify=None).folder
        assert kl(expected, served_logs(folder / BASE, folder / ADAPTER)) < most


REFUSED = [
    ("phi", {}, r"model=phi: cannot be written as GGUF, only llama, mistral"),
    ("llama", {"hidden_act": "gelu"}, r"hidden_act=gelu: llama.cpp's llama takes silu for granted"),
    ("qwen3", {"attention_bias": True}, r"attention_bias=True: llama.cpp's qwen3 takes None for granted"),
    ("gemma2", {"query_pre_attn_scalar": 100}, r"query_pre_attn_scalar=100: llama.cpp's gemma2 of this size takes 16"),
    ("gemma3", {"layer_types": ["full_attention"] * 2}, r"has full attention in every layer 6 of 6, and only there"),
    ("llama", {"rope": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type=dynamic: llama.cpp's llama has no such"),
    ("qwen2", {"rope": LLAMA3 | {"original_max_position_embeddings": 8192}}, r"llama.cpp's qwen2 has no such"),
]


@pytest.mark.parametrize("name, changes, said", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, name, changes, said):
    folder = saved(model(name, **changes), tmp_path / "model")
    with pytest.raises(UserError, match=said):
        convert_to_gguf(str(folder), tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_other_refusals(tmp_path):
    made = model("llama")
    folder = saved(made, tmp_path / "model")
    with pytest.raises(UserError, match=r"type=Q4_K_M: must be one of F16, BF16, Q8_0, Q4_0\. .*llama-quantize"):
        convert_to_gguf(str(folder), tmp_path / "gguf", type="Q4_K_M")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        convert_to_gguf(str(folder), tmp_path / "full")
    with torch.no_grad():
        made.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    made.save_pretrained(folder)
    with pytest.raises(UserError, match=r"up_proj.weight holds values beyond its range. Use `type=BF16`"):
        convert_to_gguf(str(folder), tmp_path / "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
    convert_to_gguf(str(folder), tmp_path / "gguf", type="BF16")


def test_the_context_is_where_both_compute_the_same(tmp_path):
    """llama.cpp's llama has no windows: the file states as many positions as one of Mistral's has."""
    folder = saved(model("mistral", sliding_window=64), tmp_path / "model")
    assert read_header(convert_to_gguf(str(folder), tmp_path / "gguf")).get("context_length") == 64


def test_quantized_types(tmp_path):
    """The library's own blocks; a head of a Q4_0 file has 8 bits; rows of 150 values and V of a Q8_0 file are F16."""
    folder = saved(model("qwen2"), tmp_path / "model")
    for type, kinds in (("Q8_0", {"Q8_0", "F16", "F32"}), ("Q4_0", {"Q4_0", "Q8_0", "F16", "F32"})):
        path = convert_to_gguf(str(folder), tmp_path / type, type=type)
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert {tensor.tensor_type.name for tensor in stored.values()} == kinds
        assert stored["output.weight"].tensor_type.name == "Q8_0"
        assert stored["blk.0.ffn_down.weight"].tensor_type.name == "F16"
        assert stored["blk.1.attn_v.weight"].tensor_type.name == ("F16" if type == "Q8_0" else type)
        up = model("qwen2").model.layers[1].mlp.up_proj.weight.detach().numpy()
        kind = stored["blk.1.ffn_up.weight"].tensor_type
        assert kind.name == type
        assert (stored["blk.1.ffn_up.weight"].data == gguf.quantize(up, kind)).all()


def test_two_tensors_of_memory(tmp_path):
    """Of eight layers, no more than two of the largest tensors are in memory, beside what an import takes."""
    largest, total = tiny.eight_layers(tmp_path / "model")
    ggufs.bpe_tokenizer().save_pretrained(tmp_path / "model")
    code = (
        "import resource, sys; from qlora.export.gguf import convert_to_gguf\n"
        "import transformers.models.llama.modeling_llama\n"
        "convert_to_gguf(sys.argv[1] + '/small', sys.argv[1] + '/a')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert_to_gguf(sys.argv[1] + '/model', sys.argv[1] + '/b')\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"
    )
    saved(model("llama"), tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert int(done.stdout) < 6 * largest < total / 4, done.stderr


def test_smollm2(tmp_path, smollm2_dense, tokenizer):
    """Its own file says the same of itself; llama.cpp answers as transformers, by the chat template in the file."""
    own, path = resolve("smollm2-135m").gguf, convert_to_gguf("smollm2-135m", tmp_path / "gguf")
    fields, written = read_keys(own, ""), read_keys(path, "")
    assert [key for key in fields if fields[key] != written.get(key)] == ["general.file_type"]
    with LlamaCpp(path, context=512) as served:
        text = "List:\n\n1. one\n\n22. two   3"  # split before every digit, as the file says
        assert served.tokenize(text) == tokenizer(text).input_ids
        for prompt in ("The capital of France is", "Water boils at 100"):
            ids = tokenizer(prompt).input_ids
            assert served.tokenize(prompt) == ids
            found, listed = served.write(ids, 12, 400)
            with torch.no_grad():
                logits = smollm2_dense(input_ids=torch.tensor([ids + found])).logits[0, len(ids) - 1 : -1]
            chosen = logits.gather(-1, torch.tensor(found).unsqueeze(-1))
            assert (logits.amax(-1, keepdim=True) - chosen).max() < 0.02  # another token only where two are as likely
            for logs, top in zip(logits.log_softmax(-1), listed, strict=True):
                q = torch.tensor(list(top.values()))
                p = logs[list(top)]
                assert (p.exp() * (p - q)).sum() < 1e-3
        messages = [{"role": "user", "content": "Name a colour."}]
        templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert served.chat(messages, 4)[0] == len(templated)


def test_the_command(tmp_path, capsys):
    """A verified file; an option of GGUF has no meaning elsewhere; a LoRA is written without a base."""
    base = saved(model("llama"), tmp_path / "base")
    save_adapter(adapted(load_base(str(base), dtype="fp32"), "lora"), tmp_path / "adapter")
    common = ["export", "--adapter", str(tmp_path / "adapter"), "--output"]
    assert main([*common, str(tmp_path / "out"), "--to", "gguf", "--type", "Q8_0"]) == 0
    said = capsys.readouterr().out
    assert "verified: KL" in said and f"llama-server -m {tmp_path / 'out'}/model.gguf" in said
    assert json.loads((tmp_path / "out/export_report.json").read_text())["type"] == "Q8_0"
    assert main([*common, str(tmp_path / "lora"), "--to", "gguf-lora"]) == 0
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"adapter.gguf", "export_report.json"}
    assert f"-m BASE.gguf --lora {tmp_path / 'lora'}/adapter.gguf" in capsys.readouterr().out
    assert main([*common, str(tmp_path / "no"), "--type", "Q8_0"]) == 2
    assert "type=Q8_0: has no meaning for --to hf" in capsys.readouterr().err


def test_a_damaged_file_is_seen(tmp_path, monkeypatch):
    """One matrix changed after it was written: the verification refuses, and nothing is left."""
    base = saved(model("llama"), tmp_path / "base")
    save_adapter(adapted(load_base(str(base), dtype="fp32"), "lora"), tmp_path / "adapter")

    def damaged(found, spec, folder):
        write_gguf(found, spec, folder)
        _, start = read_header(folder / MODEL).tensors["blk.1.attn_v.weight"]
        with (folder / MODEL).open("r+b") as file:
            file.seek(start)
            file.write(b"\0" * 2048)

    row = dataclasses.replace(FORMATS["gguf"], write=damaged)
    monkeypatch.setitem(FORMATS, "gguf", row)
    with pytest.raises(UserError, match="computes another model than its format keeps"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", ExportSpec("gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
