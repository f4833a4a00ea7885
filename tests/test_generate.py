"""Generation: the prompt of training, left padding, stops; held against a loop without cache, padding or batches."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import qlora
from qlora.config.commands import GenerateConfig
from qlora.data.chat import prompt_ids, stop_ids
from qlora.errors import UserError
from qlora.export.peft_write import save_adapter
from qlora.generate import Sampling, generate_batch
from qlora.run.commands import generate_command

PROMPTS = ["a", "What is 2+2?", "x y z " * 5]


@torch.no_grad()
def talkative(name: str = "llama", **changes):
    """A random model of the tiny tokenizer's 258 tokens whose answers vary; with small weights they do not."""
    torch.manual_seed(1)
    config = tiny.CONFIGS[name]()
    for option, value in {
        "vocab_size": 258,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        **changes,
    }.items():
        setattr(config, option, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.3)
    return model


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


def test_generate_text_takes_the_base_from_the_adapter(tmp_path):
    with pytest.raises(UserError, match="model"):
        GenerateConfig(prompt="a")
    folder = str(tmp_path / "base")
    talkative().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    options = {"prompt": "a", "max_new_tokens": 12, "device": "cpu", "dtype": "fp32"}
    model = tiny.adapted(qlora.load_base(folder, bits=4, dtype="fp32", device="cpu"))
    save_adapter(model, tmp_path / "adapter", tiny.tokenizer())
    answer = generate_command(GenerateConfig(adapter=str(tmp_path / "adapter"), **options))
    assert answer == expected(model.eval(), tiny.tokenizer(), "a", 12)
    assert answer != generate_command(GenerateConfig(model=folder, **options))
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = GenerateConfig(adapter=str(tmp_path / "adapter"), model=str(tmp_path / "moved"), **options)
    assert generate_command(moved) == answer


def test_smollm2_answers(tokenizer, smollm2_dense):
    answers = generate_batch(
        smollm2_dense, tokenizer, ["What is the capital of France?", "Say hello."], max_new_tokens=10
    )
    assert "Paris" in answers[0]
    assert answers[1] == generate_batch(smollm2_dense, tokenizer, ["Say hello."], max_new_tokens=10)[0]
