"""What is kept of a GGUF file's header is what would be read from it, and is never that of another file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from ggufs import write_gguf
from transformers import AutoModelForCausalLM

from qlora import load_base, load_tokenizer
from qlora.models import gguf_cache
from qlora.models.gguf_config import read_config
from qlora.models.source import load_config, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/qlora/gguf"


def model_file(path: Path, **changes) -> Path:
    path.parent.mkdir(exist_ok=True)
    config = tiny.CONFIGS["llama"]()
    config.update({"vocab_size": 320, "max_position_embeddings": 64} | changes)
    return write_gguf(path, AutoModelForCausalLM.from_config(config))


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def times(cache: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}


def test_the_second_start_reads_what_was_kept_and_it_is_the_same(cache, tmp_path, monkeypatch):
    path = model_file(tmp_path / "m/model.gguf")
    first, config = load_tokenizer(str(path)), load_config(resolve(str(path)))
    written = times(cache)
    assert len(entries(cache)) == 2 and written
    fresh = read_config(path)
    forbidden = type("Forbidden", (), {"from_pretrained": None})
    monkeypatch.setattr("qlora.models.gguf_config.AutoConfig", forbidden)
    monkeypatch.setattr("qlora.models.source.AutoTokenizer", forbidden)  # neither is read from the file again
    second, again = load_tokenizer(str(path)), load_config(resolve(str(path)))
    assert times(cache) == written
    assert again.to_dict() == config.to_dict() == fresh.to_dict() and type(again) is type(fresh)
    assert again.name_or_path == fresh.name_or_path == second.name_or_path == str(path.parent)
    assert second.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    for one, two in ((first, tmp_path / "one"), (second, tmp_path / "two")):
        one.save_pretrained(two)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file


def test_a_replaced_file_of_the_same_name_size_and_time_is_another(cache, tmp_path):
    path = model_file(tmp_path / "m/model.gguf", max_position_embeddings=64)
    before = path.stat()
    assert load_config(resolve(str(path))).max_position_embeddings == 64
    other = model_file(tmp_path / "other/model.gguf", max_position_embeddings=32)
    with path.open("r+b") as file:  # the same file, its bytes replaced
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert load_config(resolve(str(path))).max_position_embeddings == 32
    assert load_config(resolve(str(other))).max_position_embeddings == 32 and len(entries(cache)) == 2


def test_a_template_that_appears_beside_the_file_counts(cache, tmp_path):
    """transformers reads one in additional_chat_templates, so a tokenizer without it is another."""
    path = model_file(tmp_path / "m/model.gguf")
    load_tokenizer(str(path))
    (path.parent / "additional_chat_templates").mkdir()
    (path.parent / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    load_tokenizer(str(path))
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped", "deleted", "manifest gone", "emptied"])
def test_a_damaged_entry_is_made_again_with_one_line(cache, tmp_path, harm, capsys):
    path = model_file(tmp_path / "m/model.gguf")
    expected = load_tokenizer(str(path)).backend_tokenizer.to_str()
    (entry,) = entries(cache)
    file = entry / ("manifest.json" if harm == "manifest gone" else "tokenizer.json")
    whole = file.read_bytes()
    if harm == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif harm == "flipped":
        file.write_bytes(whole.replace(b'"a"', b'"b"', 1) if b'"a"' in whole else whole[:-2] + b" \n")
    elif harm == "emptied":
        shutil.rmtree(entry)
        entry.mkdir()
    else:
        file.unlink()
    capsys.readouterr()
    assert load_tokenizer(str(path)).backend_tokenizer.to_str() == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"cache={entry}: is damaged (") and "model.gguf" in said[0]
    assert load_tokenizer(str(path)).backend_tokenizer.to_str() == expected and capsys.readouterr().err == ""


def test_without_a_place_to_write_nothing_is_kept_and_nothing_said(tmp_path, monkeypatch, capsys):
    path = model_file(tmp_path / "m/model.gguf")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_tokenizer(str(path))("1+1").input_ids and load_config(resolve(str(path))).vocab_size == 320
    assert capsys.readouterr().err == ""


def test_what_reads_back_as_another_is_not_kept(cache, tmp_path):
    """A tokenizer whose class would be rebuilt otherwise from its files."""
    path = model_file(tmp_path / "m/model.gguf")
    read = load_tokenizer(str(path))

    class Other(type(read)):
        pass

    read.__class__ = Other
    shutil.rmtree(cache)
    assert gguf_cache.cached_tokenizer(path, lambda: read) is read and entries(cache) == []


def test_the_oldest_entries_go(cache, tmp_path):
    for number in range(gguf_cache.MOST + 2):
        (cache / f"{number:032}-config").mkdir(parents=True)
        os.utime(cache / f"{number:032}-config", (number, number))
    load_config(resolve(str(model_file(tmp_path / "m/model.gguf"))))
    kept = [entry.name for entry in entries(cache)]
    assert len(kept) == gguf_cache.MOST and f"{2:032}-config" not in kept and f"{3:032}-config" in kept


def test_a_model_by_way_of_the_cache_is_the_model(cache, tmp_path):
    path, ids = model_file(tmp_path / "m/model.gguf"), torch.arange(2, 22).view(1, 20)
    first, second = (load_base(str(path), dtype="fp32")(input_ids=ids).logits for _ in range(2))
    assert entries(cache) and torch.equal(first, second)
