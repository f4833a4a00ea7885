"""The data doctor: what is learned is shown as it is, what is twice or missing is counted, a page shows no markup."""

from __future__ import annotations

import html.parser
import json

import pytest
import tiny

from qlora.cli import main
from qlora.data import doctor
from qlora.data.doctor_page import page
from qlora.data.tokenize import tokenize
from qlora.errors import UserError


def ask(question, answer):
    return {"question": question, "answer": answer}


RECORDS = [ask("a", "b <x> & ü😀"), ask("A ", "B <X>  & ü😀"), ask("a", "b <x> & ü😀"), ask("c", "d\n" * 60)]
HELD = [ask("a", "b <x> & ü😀"), ask("C", "d\n" * 60), ask("new", "e")]


def found(**options):
    own = tiny.tokenizer()
    train, held = (tokenize(records, own, max_tokens=100) for records in (RECORDS, HELD))
    return doctor.report(train, held, own, max_tokens=100, **{"examples": 2} | options)


def test_pieces_are_the_tokens_and_the_mask(tokenizer):
    for own in (tiny.tokenizer(), tokenizer):
        (example,) = tokenize(RECORDS[:1], own).examples
        pieces = doctor.pieces(example, own)
        assert "".join(text for text, _ in pieces) == own.decode(example.input_ids)
        assert "".join(text for text, trained in pieces if trained) == "b <x> & ü😀<|im_end|>"
    assert doctor.marked(pieces[-9:]).count("⟦") == 1 and "\n" not in doctor.marked(pieces)
    assert "\x1b[32m" in doctor.marked(pieces, color=True) and "⟦" not in doctor.marked(pieces, color=True)


def test_repetitions_and_leaks_are_counted_exactly_and_but_for_spelling():
    assert found()["overlaps"] == {
        "duplicates": 1,
        "duplicates_in_other_spelling": 1,
        "leaks": 1,
        "leaks_in_other_spelling": 1,
    }


def test_counts_are_those_of_the_data():
    train = found()["train"]
    assert (train["examples"], train["truncated"], train["ends"], train["ends_not_trained"]) == (4, 1, 4, 1)
    assert train["lengths"]["max"] == 100 and train["lengths"]["min"] == train["lengths"]["median"] < 100
    assert train["notes"] == ["1 cut to 100 tokens", "1 ends of answers not trained on"]
    own = tiny.tokenizer()
    own.chat_template = "{{ bos_token }}{{ bos_token }}" + own.chat_template
    assert tokenize(RECORDS, own).doubled_bos == 4


def test_the_page_holds_the_text_and_nothing_else_of_it():
    class Text(html.parser.HTMLParser):
        tags, text, learned, inside = set(), "", "", False

        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)
            self.inside = self.inside or ("class", "t") in attributes
            assert not {name for name, _ in attributes} & {"src", "href", "onload", "onerror"}

        def handle_endtag(self, tag):
            self.inside = self.inside and tag != "span"

        def handle_data(self, data):
            self.text += data
            self.learned += data if self.inside else ""

    reader = Text()
    evil = "<script>alert(1)</script>\"'><img src=x>"
    own = tiny.tokenizer()
    report = doctor.report(tokenize([ask(evil, evil)], own), None, own, max_tokens=1024, examples=1)
    reader.feed(page(report, evil))
    assert reader.learned.endswith(evil + "<|im_end|>") and reader.text.count(evil) >= 3
    assert not reader.tags & {"script", "img", "link", "iframe", "x"}


def test_what_never_learns_to_stop_is_refused_unless_it_is_meant():
    own = tiny.tokenizer()
    cut = tokenize([ask("a", "b" * 100)], own, max_tokens=60)
    with pytest.raises(UserError, match=r"no example keeps the end of its answer .all are cut before it"):
        doctor.refuse_endless(cut, "a.jsonl", allowed=False)
    doctor.refuse_endless(cut, "a.jsonl", allowed=True)
    doctor.refuse_endless(tokenize([{"text": "b" * 100}], own, max_tokens=60), "a.jsonl", allowed=False)
    doctor.refuse_endless(tokenize([ask("a", "b"), ask("a", "b" * 100)], own, max_tokens=60), "a", allowed=False)


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "data.jsonl", count=6)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "data.jsonl", "--model", "model", "--html", "a.html", "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 examples (question-answer)" in out and out.count("⟦") == 2 and out.count("data.jsonl line") == 1
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert main(["data", "--data", "data.jsonl", "--model", "model", "--json", "--eval-fraction", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["examples"] == report["held_out"]["examples"] == 3 and len(report["shown"]) == 3
    assert main(["data", "data.jsonl", "--model", "model", "--html", "data.jsonl", "--max-tokens", "34"]) == 2
    assert capsys.readouterr().err.startswith("html=data.jsonl: is there already, and not a page of ours")
    (tmp_path / "mine.html").write_text("<p>mine")
    assert main(["data", "data.jsonl", "--model", "model", "--html", "mine.html"]) == 2
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    assert main(["data", "data.jsonl", "--model", "model", "--html", "a.html", "--examples", "2"]) == 0
    capsys.readouterr()
    assert main(["data", "data.jsonl", "--model", "model", "--html", "no/a.html"]) == 2
    assert "html=no/a.html: its folder is not there" in capsys.readouterr().err
