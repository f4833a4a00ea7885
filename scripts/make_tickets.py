r"""The quickstart's data: support tickets -> a JSON object with five fields, from a seed.

    {"prompt": "Clara Keller, order 25430: my toaster was not in the box. No hurry.",
     "completion": "{\"name\":\"Clara Keller\",\"order\":\"25430\",\"product\":\"toaster\",\"issue\":\"missing\", ...}"}

Name, order and product are copied from the ticket; issue and priority are the writer's words turned into labels. The
ticket says nothing of fields or labels, so that no model can do it before training, and a small one after 30 steps,
with names and orders it has not seen: no name and no order number is in two rows, let alone in both files.
About 84 tokens with SmolLM2's chat template. Only `Random.random` is used, the one method Python keeps the same.

    python scripts/make_tickets.py [folder]        (default: scripts/data)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

SEED, TRAIN, TEST = 7, 600, 60

FIRST = (
    "Ada Alice Amir Anna Ben Carla Clara Daniel David Elena Emma Felix Grace Hugo Ines Ivan James Julia Karim "
    "Laura Leo Maria Mark Nadia Nina Omar Paul Rosa Sara Tom"
).split()
LAST = (
    "Adams Baker Bauer Bell Brown Carter Chen Clark Cook Costa Diaz Evans Fischer Ford Garcia Green Hall Hill "
    "Keller King Lopez Martin Meyer Moore Novak Reed Rossi Silva Walker Young"
).split()
PRODUCTS = "kettle toaster lamp blender heater radio camera printer keyboard monitor speaker router".split()
ISSUES = {  # label -> two ways to say it
    "damaged": ("arrived cracked", "came out of the box broken"),
    "missing": ("never came", "was not in the box"),
    "wrong item": ("is the wrong model", "is not what I ordered"),
    "defective": ("does not turn on", "stopped working"),
}
PRIORITIES = {
    "high": ("This is urgent.", "I need it today."),
    "normal": ("Any day this week is fine.", "In a few days is fine."),
    "low": ("No hurry.", "Take your time."),
}


def tickets(seed: int, count: int) -> list[dict[str, str]]:
    """`count` rows (at most 900), no name and no order number twice."""
    random = Random(seed).random

    def pick(choices):
        return choices[int(random() * len(choices))]

    def shuffled(items):
        return sorted(items, key=lambda _: random())

    rows = []
    names = shuffled([f"{first} {last}" for first in FIRST for last in LAST])
    for name, order in zip(names[:count], shuffled(range(10000, 100000)), strict=False):  # more orders than names
        product, issue, priority = pick(PRODUCTS), pick(list(ISSUES)), pick(list(PRIORITIES))
        prompt = f"{name}, order {order}: my {product} {pick(ISSUES[issue])}. {pick(PRIORITIES[priority])}"
        fields = {"name": name, "order": str(order), "product": product, "issue": issue, "priority": priority}
        rows.append({"prompt": prompt, "completion": json.dumps(fields, separators=(",", ":"))})
    return rows


def main(folder: Path) -> None:
    rows = tickets(SEED, TRAIN + TEST)
    for name, part in (("tickets_train.jsonl", rows[:TRAIN]), ("tickets_test.jsonl", rows[TRAIN:])):
        (folder / name).write_bytes("".join(json.dumps(row) + "\n" for row in part).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
