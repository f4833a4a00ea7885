"""Options: coercion, every rule, all problems at once, YAML there and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qlora.config.commands import DoctorConfig, EvalConfig, FinetuneConfig, GenerateConfig, MergeConfig, QuantizeConfig
from qlora.config.options import changeable, choices, entries, from_options, from_yaml, kinds, to_yaml
from qlora.config.shared import FORMATS
from qlora.errors import UserError
from qlora.specs import BLOCKSIZES, AdapterSpec, OptimizerSpec, Quantization

NEEDED = {"model": "m", "data": "d.jsonl", "output": "out"}


def problems(cls=FinetuneConfig, **values) -> list[str]:
    with pytest.raises(UserError) as caught:
        from_options(cls, values if cls is not FinetuneConfig else {**NEEDED, **values})
    return caught.value.problems


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults():
    config = FinetuneConfig(**NEEDED)
    assert dataclasses.is_dataclass(config)
    assert (config.bits, config.method, config.rank, config.alpha, config.learning_rate) == (4, "dora", 16, 32.0, 2e-4)
    assert (config.steps, config.epochs) == (None, 1.0)
    assert FinetuneConfig(**NEEDED, steps=5).epochs is None
    assert MergeConfig(adapter="a", output="o").shard_size == 10**9
    assert QuantizeConfig(model="m", output="o").double_quant is None  # yes, unless the checkpoint says otherwise
    assert DoctorConfig().json is False


@pytest.mark.parametrize("cls", [FinetuneConfig, MergeConfig, QuantizeConfig, GenerateConfig, EvalConfig, DoctorConfig])
def test_every_option_explains_itself(cls):
    for entry in entries(cls):
        assert entry.metadata["help"] and not entry.metadata["help"].endswith("."), entry.name


def test_text_becomes_what_it_says():
    config = FinetuneConfig(
        **NEEDED,
        learning_rate="1e-5",
        steps="1e3",
        bits="16",
        blocksize=" 128",
        resume="yes",
        dropout="0",
        targets="q_proj,v_proj",
        revision="0123456",
    )
    assert (config.learning_rate, config.steps, config.bits, config.blocksize) == (1e-5, 1000, 16, 128)
    assert type(config.steps) is int and config.resume is True and config.dropout == 0.0
    assert config.targets == "q_proj,v_proj" and config.revision == "0123456"
    assert FinetuneConfig(**NEEDED, targets=["q_proj", "v_proj"]).targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "text, size", [("1GB", 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), (7, 7)]
)
def test_sizes(text, size):
    assert MergeConfig(adapter="a", output="o", shard_size=text).shard_size == size
    assert FinetuneConfig(**NEEDED, optimizer_memory=text).optimizer_memory == size


def test_optimizer_memory():
    for word in ("auto", "all", "none"):
        assert FinetuneConfig(**NEEDED, optimizer_memory=word).optimizer_memory == word
    assert FinetuneConfig(**NEEDED, optimizer_memory="0").optimizer_memory == 0
    for value in ("some", "-1", -1, "10%", 1.5, True, ""):
        (line,) = problems(optimizer_memory=value)
        assert "must be auto, all, none or a size such as 200MB" in line


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", ""),
        ("data", ""),
        ("output", 5),
        ("revision", 3),
        ("bits", 8),
        ("bits", True),
        ("bits", "four"),
        ("method", "qdora"),
        ("rank", 0),
        ("rank", "0"),
        ("rank", 4.5),
        ("rank", "4.5"),
        ("rank", True),
        ("rank", None),
        ("rank", "many"),
        ("alpha", 0),
        ("alpha", float("nan")),
        ("alpha", "nan"),
        ("alpha", float("inf")),
        ("alpha", True),
        ("dropout", 1),
        ("dropout", -0.1),
        ("targets", ""),
        ("targets", []),
        ("targets", 3),
        ("blocksize", 48),
        ("blocksize", 16),
        ("blocksize", 8192),
        ("learning_rate", 0),
        ("learning_rate", -1e-5),
        ("learning_rate", "1e-5x"),
        ("learning_rate", "1e999"),
        ("schedule", "cosine2"),
        ("warmup", -1),
        ("weight_decay", -1),
        ("clip", -1),
        ("beta1", 1),
        ("beta2", 1.5),
        ("eps", 0),
        ("steps", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("max_tokens", 1),
        ("format", "csv"),
        ("train_on_prompt", 2),
        ("truncate", "start"),
        ("eval_data", ""),
        ("eval_fraction", 1),
        ("eval_fraction", -0.1),
        ("eval_every", -1),
        ("save_every", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("resume", "maybe"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("dtype", "int8"),
        ("double_quant", "perhaps"),
        ("tensorboard", None),
        ("scales", "max"),
        ("scales", 1),
    ],
)
def test_bad_values_are_named_with_a_remedy(name, value):
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}=") and ": must " in line
    _, remedy = line.split(": ", 1)[1].split(". ", 1)
    assert remedy and "\n" not in line


def test_the_nearest_choice_is_named():
    assert problems(method="dorra") == ["method=dorra: must be lora or dora. Did you mean dora?"]
    assert problems(format="prompt_completion")[0].endswith("Did you mean prompt-completion?")
    assert problems(rank=0) == ["rank=0: must be at least 1. Correct it or leave it out for the default, 16."]


def test_all_problems_at_once():
    with pytest.raises(UserError) as caught:
        from_options(
            FinetuneConfig,
            {
                "model": "m",
                "rank": 0,
                "learning_rat": "1e-5",
                "steps": 5,
                "epochs": 2,
                "alpha": "nan",
                "eval_data": "e",
                "eval_fraction": 0.1,
            },
        )
    names = [line.partition("=")[0] for line in caught.value.problems]
    assert sorted(names) == ["alpha", "data", "epochs", "eval_fraction", "learning_rat", "output", "rank"]
    assert len(set(names)) == len(names)
    assert "learning_rat=1e-5: not an option. Did you mean learning_rate?" in caught.value.problems
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_the_same_checks_hold_without_the_command_line():
    with pytest.raises(UserError) as caught:
        FinetuneConfig(**NEEDED, rank=0, steps=5, epochs=1)
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError):
        dataclasses.replace(FinetuneConfig(**NEEDED), learning_rate=-1)


def test_options_that_contradict_each_other():
    assert problems(steps=3, epochs=2) == ["epochs=2.0: excludes steps=3. Give one of the two."]
    assert problems(eval_data="x", eval_fraction=0.1)[0].startswith("eval_fraction=0.1: excludes eval_data=x")
    assert "no held-out data" in problems(eval_every=5)[0]
    assert FinetuneConfig(**NEEDED, eval_every=5, eval_fraction=0.1).eval_every == 5
    assert problems(steps=10, warmup=11)[0].startswith("warmup=11: must be at most steps=10")
    assert FinetuneConfig(**NEEDED, steps=10, warmup=10).warmup == 10
    assert problems(GenerateConfig, prompt="x")[0].startswith("model=(not given): required without an adapter")
    assert problems(EvalConfig, data="x")[0].startswith("model=(not given): required without an adapter")
    assert "no effect" in problems(GenerateConfig, model="m", prompt="x", top_p=0.5)[0]
    assert "no system message" in problems(GenerateConfig, model="m", prompt="x", raw=True, system="s")[0]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("lern_rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("lora_r", "rank"),
        ("batch-size", "batch_size"),
        ("max_seq_length", "max_tokens"),
        ("target_modules", "targets"),
        ("gradient_accumulation_steps", "accumulate"),
    ],
)
def test_unknown_options_lead_to_the_known(name, meant):
    assert problems(**{name: "1"}) == [f"{name}=1: not an option. Did you mean {meant}?"]


def test_values_stay_on_one_line():
    (line,) = problems(format="chat\n" * 100)
    assert "\n" not in line and len(line) < 300


def test_formats_are_those_of_the_type():
    assert FORMATS == ("chat", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text")
    for name in FORMATS:
        assert FinetuneConfig(**NEEDED, format=name).format == name


# YAML.


def test_yaml_numbers_are_numbers_and_text_stays_text(tmp_path):
    path = written(
        tmp_path,
        "# a run\nmodel: m\ndata: 2024-01-01\noutput: 'null'\nlearning_rate: 1e-5\nrevision: 0123456\n"
        "steps: 30\neval_data: null\nresume: no\ntargets: [q_proj, v_proj]\ndropout: .1\n",
    )
    config = from_yaml(FinetuneConfig, path)
    assert config.learning_rate == 1e-5 and config.dropout == 0.1 and config.steps == 30
    assert (config.data, config.output, config.revision) == ("2024-01-01", "null", "0123456")
    assert config.eval_data is None and config.resume is False and config.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "config",
    [
        FinetuneConfig(**NEEDED),
        FinetuneConfig(
            model="null",
            data="1e-5",
            output="été: #1\nx",
            revision="0777",
            targets=["a", "b.c"],
            steps=7,
            eps=1e-8,
            learning_rate=1 / 3,
            eval_data="~",
            resume=True,
            double_quant=False,
            format="chat",
            seed=2**32 - 1,
        ),
        GenerateConfig(model="m", prompt=" two\nlines ", system="", temperature=0.7, top_p=0.9),
        EvalConfig(adapter="a", data="d"),
        MergeConfig(adapter="a", output="o", shard_size="500MB"),
        QuantizeConfig(model="m", output="yes"),
        DoctorConfig(json=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_yaml_round_trip(tmp_path, config):
    text = to_yaml(config)
    again = from_yaml(type(config), written(tmp_path, text))
    assert again == config
    assert to_yaml(again) == text and "#" not in text.replace("#1", "")
    assert [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha() and ":" in line] == [
        entry.name for entry in entries(config)
    ]


def test_flags_win_over_yaml(tmp_path):
    path = written(tmp_path, to_yaml(FinetuneConfig(**NEEDED, rank=8, eval_data="e.jsonl")))
    config = from_yaml(FinetuneConfig, path, {"rank": "4", "steps": "9", "eval_fraction": "0.1"})
    assert (config.rank, config.steps, config.epochs) == (4, 9, None)
    assert (config.eval_data, config.eval_fraction) == (None, 0.1)
    with pytest.raises(UserError, match="excludes"):
        from_yaml(FinetuneConfig, path, {"steps": "9", "epochs": "2"})


@pytest.mark.parametrize(
    "text, said",
    [
        ("rank: 8\nalpha: 1\nrank: 9\n", "rank=9: given 2 times in"),
        ("rank: [1\n", "is not valid YAML, line 2"),
        ("a: b: c\n", "is not valid YAML, line 1"),
        ("- rank\n", "must hold one `option: value` a line"),
        ("just text\n", "must hold one `option: value` a line"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a: \x01\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ("[1]: b\n", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        from_yaml(FinetuneConfig, written(tmp_path, text))
    (line,) = caught.value.problems
    assert said in line and "\n" not in line


def test_yaml_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError) as caught:
            from_yaml(FinetuneConfig, path)
        assert caught.value.problems[0].startswith(f"config={path}: cannot be read")


def test_yaml_problems_come_together_with_those_of_the_flags(tmp_path):
    path = written(tmp_path, "model: m\ndata: d\nlern_rate: 1e-5\nrank: 0\n")
    with pytest.raises(UserError) as caught:
        from_yaml(FinetuneConfig, path, {"alpha": "-1"})
    assert caught.value.problems[0] == "lern_rate=1e-5: not an option. Did you mean learning_rate?"
    assert {line.partition("=")[0] for line in caught.value.problems} == {"lern_rate", "output", "rank", "alpha"}


# One declaration of each option.


@pytest.mark.parametrize(
    "name, value",
    [
        ("method", "qdora"),
        ("rank", 0),
        ("rank", 4.5),
        ("rank", True),
        ("alpha", 0),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("dropout", 1),
        ("dropout", -0.1),
        ("init", "uniform"),
    ],
)
def test_an_adapter_is_held_to_the_same_ranges_without_options(name, value):
    (line,) = AdapterSpec(**{name: value}).problems()
    assert line.startswith(f"{name}={value}: must be")
    assert problems(**{name: value})
    assert AdapterSpec().problems() == []


@pytest.mark.parametrize("name, value", [("bits", 8), ("blocksize", 48), ("blocksize", 8192), ("scales", "max")])
def test_a_quantization_is_held_to_the_same_choices_without_options(name, value):
    (line,) = Quantization(**{name: value}).problems()
    assert line.startswith(f"{name}={value}: must be")
    assert problems(**{name: value})
    assert Quantization().problems() == []


def test_defaults_of_the_options_are_those_of_the_objects():
    config = FinetuneConfig(**NEEDED)
    assert (config.adapter(), config.optimizer(), config.quantization()) == (
        AdapterSpec(),
        OptimizerSpec(),
        Quantization(),
    )
    assert set(choices(kinds(FinetuneConfig)["blocksize"])) == set(BLOCKSIZES)


def test_what_may_change_between_the_parts_of_a_run():
    """Where things lie and how much memory they take, not what decides the numbers."""
    free = changeable(FinetuneConfig)
    assert {"model", "data", "output", "device", "memory", "optimizer_memory", "resume", "steps", "epochs"} <= free
    assert not free & {"rank", "seed", "learning_rate", "batch_size", "optimizer_state", "eval_fraction", "dtype"}
