"""Generation: the prompt of training, left padding, stops; held against a loop without cache, padding or batches."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from tiny import talkative

import qlora
from qlora.cli import main
from qlora.config.commands import GenerateConfig
from qlora.data.chat import prompt_ids, stop_ids
from qlora.data.prompts import read_prompts
from qlora.errors import UserError
from qlora.export.peft_write import save_adapter
from qlora.generate import Listener, Remembered, Sampling, Streamer, generate_batch, speaker_of
from qlora.run.commands import generate_command
from qlora_kernels import backends

PROMPTS = ["a", "What is 2+2?", "x y z " * 5]


@torch.no_grad()
def by_hand(model, ids: list[int], count: int, stops: list[int]) -> list[int]:
    """Greedy tokens from whole forward passes."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + count:
        token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return ids[start:]


def expected(model, tokenizer, prompt, count, stops=None):
    stops = stop_ids(tokenizer) if stops is None else stops
    tokens = by_hand(model, prompt_ids(prompt, tokenizer), count, stops)
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_a_batch_of_any_lengths_is_what_each_prompt_gives_alone(name):
    tokenizer, model = tiny.tokenizer(), talkative(name)
    texts = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert texts == [expected(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(texts)) == 3 and all(texts)


def test_the_head_multiplies_what_lies_in_one_piece():
    """torch 2.13 multiplies the last column of a batch of prompts, with its strides, a thousand times slower in bf16.
    The model itself gets no hook.
    """
    tokenizer, model = tiny.tokenizer(), talkative("llama")
    strides = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: strides.append(inputs[0].stride()))
    generate_batch(model, tokenizer, PROMPTS, max_new_tokens=3)
    width = model.config.hidden_size
    assert strides == [(width, width, 1)] * 3
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_generated_tokens_is_multiplied_as_in_the_loss(dtype, precision):
    """A bias, a batch, one token each; by integers where they may be. A forward that somebody replaced is called."""
    model = talkative("llama")
    torch.manual_seed(0)
    model.lm_head = torch.nn.Linear(64, 331, dtype=dtype)
    states, before, routes = torch.randn(3, 1, 64, dtype=dtype), torch.get_float32_matmul_precision(), {}
    try:
        torch.set_float32_matmul_precision(precision)
        routes = backends.ROUTES.copy()
        with torch.no_grad():
            logits = speaker_of(model).lm_head(states)
    finally:
        torch.set_float32_matmul_precision(before)
    wide = dtype == torch.float32 or backends.is_widened(states)
    integers = wide and precision == "high" and backends.multiplies_by_integers()
    floats = wide and backends.NATIVE is not None and backends.NATIVE.dense_in_float32
    assert backends.routes(routes).get("matmul_dense_into", {}) == ({"native": 1} if integers or floats else {})
    wanted = torch.nn.functional.linear(states.double(), model.lm_head.weight.double(), model.lm_head.bias.double())
    assert logits.dtype == dtype and logits.shape == (3, 1, 331)
    limit = 1e-2 if dtype == torch.bfloat16 else 6e-4 if integers else 1e-5
    assert (logits.double() - wanted).abs().max() < limit * wanted.abs().max()
    model.lm_head.forward = lambda states: states + 1
    assert torch.equal(speaker_of(model).lm_head(states), states + 1)


def test_it_stops_at_any_end_token_of_tokenizer_template_or_model():
    tokenizer, model = tiny.tokenizer(), talkative()
    tokens = by_hand(model, prompt_ids("a", tokenizer), 12, [])
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    assert stop not in stop_ids(tokenizer)
    for eos in (stop, [stop, 255]):
        model.generation_config.eos_token_id = eos
        (text,) = generate_batch(model, tokenizer, ["a"], max_new_tokens=12)
        assert text == expected(model, tokenizer, "a", 12, [stop])
        assert len(text) < len(expected(model, tokenizer, "a", 12, []))
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.decode([stop])
    assert generate_batch(model, tokenizer, ["a"], max_new_tokens=12) == [text]


def test_greedy_is_greedy_whatever_the_models_generation_config_says():
    tokenizer, model = tiny.tokenizer(), talkative()
    before = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(
        repetition_penalty=5.0,
        do_sample=True,
        temperature=2.0,
        top_k=3,
        min_new_tokens=5,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(50, 200)),
    )
    assert generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12) == before


def test_the_models_own_generation_config_is_never_touched():
    """Another thread may be generating with the same model."""
    tokenizer, model, seen = tiny.tokenizer(), talkative(), []
    own, before = model.generation_config, model.generation_config.to_dict()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(model.generation_config is own))
    generate_batch(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert len(seen) >= 4 and all(seen) and own.to_dict() == before


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    tokenizer, model = tiny.tokenizer(), talkative()
    state = torch.get_rng_state()

    def sample(**options):
        return generate_batch(model, tokenizer, PROMPTS, max_new_tokens=12, sampling=Sampling(**options))

    greedy = sample()
    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    assert sample(temperature=1e-4) == sample(temperature=5.0, top_p=1e-6) == greedy != sample(temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_mode_is_kept_and_dropout_is_off():
    tokenizer, model = tiny.tokenizer(), talkative("gpt2")  # GPT-2 has dropout
    before = generate_batch(model.eval(), tokenizer, PROMPTS, max_new_tokens=8)
    assert generate_batch(model.train(), tokenizer, PROMPTS, max_new_tokens=8) == before
    assert model.training
    model.eval()
    assert generate_batch(model, tokenizer, PROMPTS, max_new_tokens=8) == before and not model.training


def test_system_raw_and_base_models_change_the_prompt():
    tokenizer, model = tiny.tokenizer(), talkative()
    base = copy.deepcopy(tokenizer)
    base.chat_template = None

    def text(own, ids):
        return own.decode(by_hand(model, ids, 8, stop_ids(own)), skip_special_tokens=True)

    (system,) = generate_batch(model, tokenizer, ["a"], max_new_tokens=8, system="b")
    assert (
        system
        == text(
            tokenizer,
            tokenizer(
                "<|im_start|>system\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
            ).input_ids,
        ).strip()
    )
    (raw,) = generate_batch(model, tokenizer, ["a b"], max_new_tokens=8, raw=True)
    assert raw == text(tokenizer, tokenizer("a b").input_ids)  # not stripped: it continues the prompt
    (plain,) = generate_batch(model, base, ["a"], max_new_tokens=8)
    assert plain == text(base, base("### Instruction:\na\n\n### Response:\n").input_ids).strip()


def test_prompts_that_do_not_fit():
    tokenizer, model = tiny.tokenizer(), talkative(max_position_embeddings=64)
    with pytest.raises(UserError) as caught:
        generate_batch(model, tokenizer, ["", "a", "b" * 64], max_new_tokens=8, raw=True)
    assert [line.split(". ")[0] for line in caught.value.problems] == [
        "prompt='': has no tokens",
        f"prompt={repr('b' * 64)[:60]}: has 64 tokens, and the model 64 positions",
    ]
    tokens = by_hand(model, tokenizer("b" * 60).input_ids, 4, stop_ids(tokenizer))
    assert generate_batch(model, tokenizer, ["b" * 60], max_new_tokens=50, raw=True) == [tokenizer.decode(tokens)]


# ---------------------------------------------------------------- heard as it is written


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_heard_adds_up_to_the_answer(name, raw):
    """Token by token; no piece ends within a letter of several bytes; white space at the ends is not said."""
    tokenizer, model = tiny.tokenizer(), talkative(name)
    options = {"max_new_tokens": 40, "raw": raw, "sampling": Sampling(temperature=1.0, seed=3)}
    for prompt in PROMPTS:
        pieces: list[str] = []
        listener = Listener(pieces.append)
        (answer,) = generate_batch(model, tokenizer, [prompt], listener=listener, **options)
        assert [answer] == generate_batch(model, tokenizer, [prompt], **options)
        assert "".join(pieces) == answer and len(pieces) > 5 and 5 < listener.tokens <= 40


def test_a_letter_of_several_tokens_is_heard_whole():
    tokenizer, pieces = tiny.tokenizer(), []
    streamer = Streamer(Listener(pieces.append), lambda tokens: tokenizer.decode(tokens), strips=True)
    for token in [0, *tokenizer("  aé€ \n🙂b ").input_ids]:  # the prompt comes first
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["a", "é", "€", " \n🙂", "b"]


def test_a_piece_decodes_a_few_tokens_only(tokenizer):
    """Of SmolLM2's tokenizer, whose tokens hold parts of letters: what is decoded grows with the text, not with its
    square. Half of a letter at the end is said as it is decoded.
    """
    pieces, decoded = [], []

    def text(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return tokenizer.decode(tokens)

    written = "naïve café — 你好世界, 🙂🙃 e\u0301 ﬁ ٣٤٥.\n" * 20
    tokens = (
        tokenizer(written, add_special_tokens=False).input_ids + tokenizer("🙂", add_special_tokens=False).input_ids[:1]
    )
    streamer = Streamer(Listener(pieces.append), text, strips=False)
    for token in [0, *tokens]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(tokens) == written + "\N{REPLACEMENT CHARACTER}"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])
    assert sum(decoded) < 10 * len(tokens) < len(tokens) ** 2 / 20


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "windowed", "lfm2"])
def test_what_is_remembered_changes_no_answer(name):
    """Prompts that go on, go back and begin anew, with windows that are full and layers that are no attention; where
    everything is attended to, only what is new is computed.
    """
    tokenizer, model = tiny.tokenizer(), talkative(name)
    remembered, options, fed = Remembered(), {"max_new_tokens": 8, "raw": True}, []
    handle = model.register_forward_pre_hook(
        lambda model, arguments, named: fed.append(named["input_ids"].shape[1]), with_kwargs=True
    )

    def answered(prompt: str) -> tuple[str, int]:
        """(the answer, the tokens that the first forward pass took)."""
        (expected,) = generate_batch(model, tokenizer, [prompt], **options)
        fed.clear()
        listener = Listener(lambda text: None, remembered=remembered)
        assert generate_batch(model, tokenizer, [prompt], listener=listener, **options) == [expected]
        return expected, fed[0]

    first = "x y z " * 5
    found, computed = answered(first)
    assert computed == len(first)
    counts = [answered(prompt)[1] for prompt in (first + found + " more", first + "and", first[:10], "other", "o")]
    handle.remove()
    if name not in ("windowed", "lfm2"):
        assert counts[0] < len(found.encode()) + 6 and counts[1:] == [3, 1, 5, 1]
    else:
        assert counts[1:] == [len(first + "and"), 10, 5, 1]


def test_a_listener_ends_the_answer():
    tokenizer, model, pieces = tiny.tokenizer(), talkative(), []
    (whole,) = generate_batch(model, tokenizer, ["a"], max_new_tokens=30)
    listener = Listener(pieces.append, lambda: listener.tokens >= 5)
    (answer,) = generate_batch(model, tokenizer, ["a"], max_new_tokens=30, listener=listener)
    assert 5 <= listener.tokens <= 6  # the token that was being made is still heard
    assert whole.startswith(answer) and len(answer) < len(whole) and "".join(pieces) == answer


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and adapters of both methods on it: runs/one/adapter and two."""
    folder = tmp_path_factory.mktemp("made")
    talkative().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    for seed, (name, method) in enumerate((("runs/one/adapter", "dora"), ("two", "lora"))):
        model = qlora.load_base(str(folder / "base"), bits=4, dtype="fp32", device="cpu")
        save_adapter(tiny.adapted(model, method, seed), folder / name, tiny.tokenizer())
    return folder


OPTIONS = {"max_new_tokens": 8, "device": "cpu", "dtype": "fp32"}


def test_several_adapters_and_prompts(made, tmp_path, capsys):
    """Each adapter answers each prompt as it does by itself; what is printed is labelled; the file says it as JSON."""
    adapters = [str(made / "runs/one/adapter"), str(made / "two")]
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\n")
    flags = ["--max-new-tokens", "8", "--device", "cpu", "--adapter", adapters[0], "--adapter", adapters[1]]
    alone = {
        (prompt, adapter): generate_command(GenerateConfig(adapter=adapter, prompt=prompt, **OPTIONS))[0].answer
        for prompt in ("zero", "first", "second")
        for adapter in adapters
    }
    assert len(set(alone.values())) == 6
    asked = ["--prompt", "zero", "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["generate", *flags, *asked]) == 0
    printed = capsys.readouterr().out
    blocks = [
        f"> {prompt}\n[{name}]\n{alone[prompt, adapter]}\n"
        for prompt in ("zero", "first", "second")
        for name, adapter in zip(("one", "two"), adapters, strict=True)
    ]
    assert printed == "\n".join(blocks)
    for number, more in enumerate(([], ["--batch-size", "2"])):
        file = tmp_path / f"answers{number}.jsonl"
        assert main(["generate", *flags, *asked, "--output", str(file), *more]) == 0
        assert capsys.readouterr().out == f"6 answers in {file}\n"
        found = [json.loads(line) for line in file.read_text().splitlines()]
        assert {(one["prompt"], one["adapter"]): one["answer"] for one in found} == alone and len(found) == 6
    assert main(["generate", *flags, "--prompt", "zero"]) == 0
    assert capsys.readouterr().out == "\n".join(
        f"[{name}]\n{alone['zero', adapter]}\n" for name, adapter in zip(("one", "two"), adapters, strict=True)
    )


def test_prompts_of_data_are_what_stands_before_the_last_answer(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    for records, expected in (
        (
            [{"prompt": "x"}, {"prompt": "y", "system": "s"}],
            ["x", [{"role": "system", "content": "s"}, {"role": "user", "content": "y"}]],
        ),
        ([{"question": "x", "answer": "1"}], ["x"]),
        ([{"messages": [*turns, {"role": "assistant", "content": "d"}]}], [turns]),
        ([{"instruction": "x", "input": "y", "output": "z"}], ["x\n\ny"]),
    ):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert read_prompts(str(tmp_path / "p.jsonl")) == expected
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="`prompt` is missing"):
        read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"prompts": "nowhere.txt"}, "prompts=nowhere.txt: cannot be read"),
        ({"prompts": "empty.txt"}, "prompts=empty.txt: holds no prompt"),
        ({"prompts": "latin.txt"}, "prompts=latin.txt: cannot be read"),
        ({"prompt": "a", "output": "empty.txt"}, "output=empty.txt: exists already"),
        ({"prompt": "a", "output": "nowhere/a.jsonl"}, "output=nowhere/a.jsonl: there is no folder"),
        ({"prompts": "long.txt", "output": "new.jsonl"}, "prompt='xxxx"),
        ({"prompt": "a", "adapter": ["two", "runs/one/adapter", "two"]}, "adapter="),
        ({"prompt": "a", "adapter": ["two", "other"]}, "adapter=other: was trained on"),
    ],
)
def test_what_cannot_be_answered_is_one_line(made, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "two", "base"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    (tmp_path / "long.txt").write_text("a\n" + "x" * 4000 + "\n")
    if "other" in options.get("adapter", ()):
        base = made / "other base"
        if not base.exists():
            talkative(hidden_act="gelu").save_pretrained(base)
            tiny.tokenizer().save_pretrained(base)
        other = qlora.load_base(str(base), bits=4, blocksize=32, dtype="fp32", device="cpu")
        save_adapter(tiny.adapted(other), tmp_path / "other")
    with pytest.raises(UserError) as error:
        generate_command(GenerateConfig(**{"adapter": "two", **OPTIONS, **options}))
    (line,) = error.value.problems
    assert line.startswith(said) and not (tmp_path / "new.jsonl").exists()


def test_generate_text_takes_the_base_from_the_adapter(tmp_path):
    with pytest.raises(UserError, match="model"):
        GenerateConfig(prompt="a")
    folder = str(tmp_path / "base")
    talkative().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    options = {"prompt": "a", "max_new_tokens": 12, "device": "cpu", "dtype": "fp32"}
    model = tiny.adapted(qlora.load_base(folder, bits=4, dtype="fp32", device="cpu"))
    save_adapter(model, tmp_path / "adapter", tiny.tokenizer())
    (found,) = generate_command(GenerateConfig(adapter=str(tmp_path / "adapter"), **options))
    answer = found.answer
    assert answer == expected(model.eval(), tiny.tokenizer(), "a", 12)
    assert answer != generate_command(GenerateConfig(model=folder, **options))[0].answer
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = GenerateConfig(adapter=str(tmp_path / "adapter"), model=str(tmp_path / "moved"), **options)
    assert generate_command(moved)[0].answer == answer


def test_smollm2_answers(tokenizer, smollm2_dense):
    answers = generate_batch(
        smollm2_dense, tokenizer, ["What is the capital of France?", "Say hello."], max_new_tokens=10
    )
    assert "Paris" in answers[0]
    assert answers[1] == generate_batch(smollm2_dense, tokenizer, ["Say hello."], max_new_tokens=10)[0]
