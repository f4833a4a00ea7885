"""A whole fine-tuning run in one flat file: base in NF4, DoRA adapters, a plain PyTorch loop, evaluation, one answer.

    python scripts/examples/finetune_loop.py [--steps 10] [--output runs/loop]

It is made to be read and copied. `qlora finetune` does the same and more: checkpoints and resume, batches without
padding, a budget for memory, a schedule, data in other formats, and a check of everything before the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

import qlora

TICKETS = Path(__file__).resolve().parents[1] / "data"
IGNORED = -100  # the label of a token that does not count in the loss: the prompt, and padding

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
parser.add_argument("--batch-size", type=int, default=4, help="examples in one forward pass")
parser.add_argument("--accumulate", type=int, default=2, help="forward passes in one optimizer step")
parser.add_argument("--held-out", type=int, default=8, help="held-out examples to evaluate on")
parser.add_argument("--output", default="runs/loop", help="the folder of the adapter")
arguments = parser.parse_args()
torch.manual_seed(0)

# The model: frozen weights in 4 bits, and small trainable matrices beside every linear layer. It stays a model of
# transformers, so all that follows is plain PyTorch.
tokenizer = qlora.load_tokenizer(arguments.model)
model = qlora.load_base(arguments.model, bits=4)
model = qlora.attach_adapters(model, method="dora", rank=16)
optimizer = qlora.PagedAdamW(qlora.adapter_parameters(model), lr=2e-3, weight_decay=0.0)  # torch.optim.AdamW works too


# The data: one list of token ids per record, and beside it the labels. Only the answer is learned.
def encode(record: dict[str, str]) -> tuple[list[int], list[int]]:
    """The token ids of a record and its labels, as long as they are."""
    asked = [{"role": "user", "content": record["prompt"]}]
    answered = [*asked, {"role": "assistant", "content": record["completion"]}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(whole.removeprefix(prompt), add_special_tokens=False).input_ids
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def read(name: str) -> list[tuple[list[int], list[int]]]:
    return [encode(json.loads(line)) for line in (TICKETS / name).read_text(encoding="utf-8").splitlines()]


train, held_out = read("tickets_train.jsonl"), read("tickets_test.jsonl")[: arguments.held_out]


# The loss, as a sum over the tokens that count. Whoever calls it divides, once, by the tokens of all its batches: a
# mean of the means of batches would weigh a token by the size of the batch that it fell into.
def loss_and_count(examples: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, int]:
    """The summed loss of one batch, and the number of its target tokens."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in examples])  # which token pads does not matter:
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])  # it is masked by length
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in examples])
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    targets = labels[:, 1:].to(model.device)  # the logits at one position predict the token at the next
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, int((targets != IGNORED).sum())


def cut(examples: list, size: int) -> list[list]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


@torch.no_grad()
def evaluate() -> float:
    """The mean loss of a held-out target token."""
    model.eval()
    sums, counts = zip(*(loss_and_count(batch) for batch in cut(held_out, arguments.batch_size)), strict=True)
    model.train()
    return sum(sums).item() / sum(counts)


# The loop. Gradients of the micro-batches add up; one factor makes them those of the mean over the step's tokens.
print(f"held-out loss {evaluate():.4f} before")
rng = random.Random(0)
for step in range(arguments.steps):
    chosen = rng.sample(train, arguments.batch_size * arguments.accumulate)
    loss_sum, tokens = 0.0, 0
    for batch in cut(chosen, arguments.batch_size):
        loss, count = loss_and_count(batch)
        loss.backward()
        loss_sum, tokens = loss_sum + loss.item(), tokens + count
    for parameter in qlora.adapter_parameters(model):
        parameter.grad /= tokens
    torch.nn.utils.clip_grad_norm_(qlora.adapter_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:3}  loss {loss_sum / tokens:.4f}  {tokens} tokens", flush=True)
print(f"held-out loss {evaluate():.4f} after")

# The adapter, in PEFT's layout; `qlora merge --adapter` makes an ordinary model of it.
print("adapter in", qlora.save_adapter(model, arguments.output, tokenizer))

# One answer.
model.eval()
question = [{"role": "user", "content": "Ada Bell, order 12345: my lamp never came. This is urgent."}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
written = model.generate(**prompt.to(model.device), max_new_tokens=60, do_sample=False, use_cache=True)
print(tokenizer.decode(written[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))
