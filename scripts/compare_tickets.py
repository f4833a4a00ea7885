"""What the quickstart learned: a few answers of the base and of the adapter side by side, and the adapter's exact match
on tickets not trained on.

    python scripts/compare_tickets.py --adapter runs/quickstart/adapter --data scripts/data/tickets_test.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True, help="records with prompt and completion")
    parser.add_argument("--show", type=int, default=4, help="how many answers to print, of the base too")
    parser.add_argument(
        "--at-least", type=float, default=0.0, help="fail if the adapter's exact match is below this share"
    )
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    if arguments.show < 1:
        parser.error(f"show={arguments.show}: must be at least 1. Leave it out for 4.")
    gc.disable()  # importing makes no garbage, and to look for some takes a fifth of the time (qlora/__main__.py)
    import transformers
    from rich.console import Console
    from rich.table import Table

    import qlora
    from qlora.data.records import read_records
    from qlora.generate import generate_batch
    from qlora.models.device import products_of

    gc.enable()
    transformers.utils.logging.disable_progress_bar()

    records = read_records(arguments.data)
    prompts = [record["prompt"] for record in records]
    wanted = [record["completion"] for record in records]
    longest = max(len(text) for text in wanted)
    tokenizer = qlora.load_tokenizer(arguments.model)
    model = qlora.load_base(arguments.model, bits=4)
    with products_of("auto", model.device):  # as the adapter was trained
        before = generate_batch(model, tokenizer, prompts[: arguments.show], max_new_tokens=longest // 2)
        qlora.load_adapter(model, arguments.adapter)
        after = generate_batch(model, tokenizer, prompts, max_new_tokens=longest // 2)

    console = Console(width=150)
    table = Table(title="Held-out tickets", show_lines=True)
    for column, width in (("ticket", 38), ("before", 44), ("after", 56)):
        table.add_column(column, width=width, overflow="fold")
    for prompt, was, now in zip(prompts, before, after, strict=False):
        table.add_row(prompt, was.strip()[:200], now.strip())
    console.print(table)

    def matches(answers: list[str]) -> int:
        return sum(a.strip() == w for a, w in zip(answers, wanted, strict=False))

    share = matches(after) / len(wanted)
    console.print(
        f"exact match: {share:.0%} of {len(wanted)} held-out tickets; before training, "
        f"{matches(before)} of the {len(before)} shown"
    )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"exact_match_after": share, "tickets": len(wanted)}, file, indent=2)
    if share < arguments.at_least:
        sys.exit(f"exact match {share:.0%}: less than {arguments.at_least:.0%} was expected. Train longer: --steps 60.")


if __name__ == "__main__":
    main()
