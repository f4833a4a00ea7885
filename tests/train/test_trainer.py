"""The model with adapters is an ordinary transformers model: transformers.Trainer trains it."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import relative

from qlora import PagedAdamW, adapter_parameters, attach_adapters, load_adapter, load_base, named_adapters, save_adapter
from qlora.layers.adapters import row_norms
from qlora.layers.linear import frozen_weight


class Sentences(torch.utils.data.Dataset):
    def __init__(self, count: int = 16, length: int = 12):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 320, (count, length), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trainer(saved_models, tmp_path, method):
    """It learns, the norms followed the fused AdamW, its checkpoint has the adapters, and the adapter loads."""
    model = attach_adapters(load_base(str(saved_models("llama")), dtype="fp32"), method=method, rank=4)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "trainer",
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_steps=30,
        warmup_steps=2,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in adapter_parameters(model)
    )
    if method == "dora":
        for _, adapter in named_adapters(model):
            expected = row_norms(
                frozen_weight(adapter.base), adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scaling
            )
            assert torch.equal(adapter.current_row_norms(), expected)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(str(saved_models("llama")), dtype="fp32"), tmp_path / "adapter")
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        assert relative(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits) < 1e-6


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)  # the name that transformers 5.17 knows
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_kwargs. is deprecated:FutureWarning")
def test_trainer_with_activation_checkpointing(saved_models, tmp_path):
    model = attach_adapters(load_base(str(saved_models("llama")), dtype="fp32"), method="dora", rank=4)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=False,
    )
    before = [p.detach().clone() for p in adapter_parameters(model)]
    transformers.Trainer(model=model, args=arguments, train_dataset=Sentences()).train()
    assert any(not torch.equal(p, b) for p, b in zip(adapter_parameters(model), before, strict=True))


def test_trainer_with_the_paged_optimizer(saved_models, tmp_path):
    """The weights are those of torch's AdamW, to the bit, also where Trainer goes on from its own checkpoint."""

    def run(make, steps: int, resume: str | None = None) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = attach_adapters(load_base(str(saved_models("llama")), dtype="fp32"), method="dora", rank=4)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / "trainer",
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_steps=3,
            warmup_steps=2,
            dataloader_pin_memory=False,
            lr_scheduler_type="constant_with_warmup",
        )
        optimizer = make(adapter_parameters(model))
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Sentences(), optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in adapter_parameters(model)]

    expected = run(lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False, fused=False), 6)
    whole = run(lambda params: PagedAdamW(params, lr=1e-2, memory="none", folder=tmp_path), 6)
    resumed = run(
        lambda params: PagedAdamW(params, lr=1e-2, memory=50_000, folder=tmp_path),
        6,
        str(tmp_path / "trainer/checkpoint-3"),
    )
    for other in (whole, resumed):
        assert all(torch.equal(p, q) for p, q in zip(expected, other, strict=True))
