"""What a model will learn from data, shown before it learns it: tokens, masks, and what is missing or twice.

    Dataset -> notes (counts that are not zero), lengths, duplicates, leaks -> lines, JSON; `doctor_page` makes HTML

`qlora data` shows all of it, every finetune the short form (`summary`). Text between the marks is trained on; on a
terminal it has a colour instead. The alternative, a warning where something is found, scrolls away one by one.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora.data.batch import Example
from qlora.data.tokenize import Dataset
from qlora.errors import UserError, problem, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]  # the text of a token, and whether it is trained on


def refuse_endless(dataset: Dataset, data: str, *, allowed: bool) -> None:
    """Nothing, if some example teaches where an answer ends; plain text has no answers.

    Raises:
        UserError: none does, and it is not allowed.
    """
    if dataset.endless and dataset.format != "text" and not allowed:
        what = "all are cut before it" if dataset.truncated == len(dataset.examples) else "the template writes none"
        rule = f"no example keeps the end of its answer ({what}), so the model would not learn to stop"
        raise UserError(problem("data", data, rule, "Raise `max_tokens`, or use `allow_endless`"))


def notes(dataset: Dataset, max_tokens: int) -> list[str]:
    """What a person should know of a dataset, one phrase each; nothing where all is as it should be."""
    counts = [
        (dataset.truncated, f"cut to {max_tokens} tokens"),
        (dataset.dropped, "dropped, as no token of them counts or they are too long"),
        (dataset.empty, "empty records passed over"),
        (dataset.empty_answers, "empty answers"),
        (
            dataset.skipped_turns,
            "assistant turns not trained on, as the template writes them differently later (split the conversations)",
        ),
        (dataset.muted_turns, "assistant turns of weight 0, not trained on"),
        (dataset.changed_turns, "answers that the template does not write as they stand"),
        (dataset.with_controls, "records whose answers hold control tokens of the template"),
        (dataset.with_typed, "records in which control tokens were typed: they stay text"),
        (dataset.ends - dataset.learned_ends, "ends of answers not trained on"),
        (dataset.doubled_bos, "examples that begin with two BOS tokens"),
    ]
    found = [f"{count} {what}" for count, what in counts if count]
    shown = ", ".join(shortened(name, 40) for name in dataset.unused[:10])
    more = f" and {len(dataset.unused) - 10} more" if len(dataset.unused) > 10 else ""
    return [*found, f"not used: {shown}{more}"] if dataset.unused else found


def overlaps(train: Dataset, held_out: Dataset | None) -> dict[str, int]:
    """How many examples repeat an earlier one, and how many held-out ones are in the training data.

    Exactly: the same tokens; else in other spelling: the same text but for case and white space.
    """
    tokens, prints = Counter(example.input_ids for example in train.examples), Counter(train.prints)
    repeated, alike = len(train.examples) - len(tokens), len(train.prints) - len(prints)
    found = {"duplicates": repeated, "duplicates_in_other_spelling": alike - repeated}
    if held_out is not None:
        exact = sum(example.input_ids in tokens for example in held_out.examples)
        like = sum(print in prints for print in held_out.prints)
        found |= {"leaks": exact, "leaks_in_other_spelling": max(0, like - exact)}
    return found


_OVERLAPS = {
    "duplicates": "examples repeat an earlier one",
    "duplicates_in_other_spelling": "repeat an earlier one but for case and spacing",
    "leaks": "held-out examples are in the training data too",
    "leaks_in_other_spelling": "held-out examples are in the training data but for case and spacing",
}


def lengths(dataset: Dataset) -> dict[str, int]:
    """Tokens of the shortest, the middle, the 95th of a hundred, and the longest example."""
    found = sorted(len(example.input_ids) for example in dataset.examples)
    last = len(found) - 1
    return {"min": found[0], "median": found[last // 2], "p95": found[-(-last * 95 // 100)], "max": found[-1]}


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The tokens of an example as text. Tokens that hold parts of a character stand together."""
    found: list[Piece] = []
    pending: list[int] = []
    last = len(example.input_ids) - 1
    for at, (number, trained) in enumerate(zip(example.input_ids, example.loss_mask, strict=True)):
        pending.append(number)
        ends = at == last or example.loss_mask[at + 1] != trained
        text = _text_of(pending, tokenizer)
        if "\ufffd" not in text or ends or len(pending) > 5:
            found.append((text, trained))
            pending = []
    return found


def _text_of(numbers: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, with the space that SentencePiece decoders take from the first."""
    text = str(tokenizer.decode(numbers, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    first = tokenizer.convert_ids_to_tokens(numbers[:1])[0]
    spaced = isinstance(first, str) and first.startswith("\u2581") and not text.startswith(" ")
    return f" {text}" if spaced else text


def marked(found: list[Piece], *, most: int = 160, color: bool = False) -> str:
    r"""Pieces on one line: trained text between marks, or green; line ends as \n; long stretches lose their middle."""
    left, right = ("\x1b[32m", "\x1b[0m") if color else _marks()
    out = []
    for trained, group in groupby(found, key=lambda piece: piece[1]):
        text = "".join(text for text, _ in group)
        text = shortened(text, most) if len(text) > most else text
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
        out.append(f"{left}{text}{right}" if trained else text)
    return "".join(out)


def _marks() -> tuple[str, str]:
    """Around what is trained on, where there are no colours."""
    try:
        "⟦⟧".encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "[[", "]]"
    return "⟦", "⟧"


def on_terminal() -> bool:
    """Whether what is printed is seen in colours."""
    return sys.stdout is not None and sys.stdout.isatty()


def summary(
    train: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase, data: str, max_tokens: int
) -> list[tuple[str, str]]:
    """The short form: (label, text) lines for the summary before training."""
    held = f", {len(held_out.examples)} held out" if held_out else ""
    found = overlaps(train, held_out)
    said = [*notes(train, max_tokens), *(f"{count} {_OVERLAPS[name]}" for name, count in found.items() if count)]
    lines = [
        ("data", f"{data} ({train.format}): {len(train.examples)} examples{held}"),
        ("", f"{train.tokens:,} tokens, {train.target_tokens:,} of them count in the loss"),
        *(("", note) for note in said),
        *(("", f"held out: {note}") for note in (notes(held_out, max_tokens) if held_out else [])),
    ]
    example = marked(pieces(train.examples[0], tokenizer), color=on_terminal())
    return [*lines, ("example", example)]


def report(
    train: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, examples: int
) -> dict[str, Any]:
    """Everything, as JSON has it: counts, notes, lengths, overlaps, and the first `examples` as pieces."""
    parts = {"train": train, "held_out": held_out}
    return {
        "format": train.format,
        "max_tokens": max_tokens,
        **{
            name: {
                "examples": len(part.examples),
                "tokens": part.tokens,
                "target_tokens": part.target_tokens,
                "truncated": part.truncated,
                "dropped": part.dropped,
                "empty_records": part.empty,
                "empty_answers": part.empty_answers,
                "ends": part.ends,
                "ends_not_trained": part.ends - part.learned_ends,
                "doubled_bos": part.doubled_bos,
                "turns_not_trained": part.skipped_turns,
                "turns_of_weight_0": part.muted_turns,
                "answers_changed": part.changed_turns,
                "answers_with_control_tokens": part.with_controls,
                "records_with_typed_control_tokens": part.with_typed,
                "not_used": part.unused,
                "lengths": lengths(part),
                "notes": notes(part, max_tokens),
            }
            for name, part in parts.items()
            if part is not None
        },
        "overlaps": overlaps(train, held_out),
        "shown": [
            {"place": " ".join(example.place or ("record", str(number))), "pieces": pieces(example, tokenizer)}
            for number, example in enumerate(train.examples[:examples], 1)
        ],
    }


def as_text(found: dict[str, Any], *, color: bool = False) -> str:
    """A report for a terminal."""
    out = []
    for name in ("train", "held_out"):
        if name not in found:
            continue
        part, size = found[name], found[name]["lengths"]
        out.append((name.replace("_", " "), f"{part['examples']} examples ({found['format']})"))
        out.append(("", f"{part['tokens']:,} tokens, {part['target_tokens']:,} of them count in the loss"))
        shown = f"{size['min']} to {size['max']} tokens, half of them at most {size['median']}"
        out.append(("", f"{shown}, 95 of 100 at most {size['p95']}"))
        out += [("", note) for note in part["notes"]]
    out += [("overlap", f"{count} {_OVERLAPS[name]}") for name, count in found["overlaps"].items() if count]
    lines = [f"{label:8} {text}" for label, text in out]
    how = "green is trained on" if color else f"between {' and '.join(_marks())} is trained on"
    lines += ["", f"Examples ({how}):"]
    for example in found["shown"]:
        lines.append(f"{example['place']}: {marked(example['pieces'], most=600, color=color)}")
    return "\n".join(lines)
