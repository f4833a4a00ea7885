"""Fixtures of the optimizer's tests."""

from __future__ import annotations

import pytest

from qlora.optim import pages


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 2048 elements, computed 512 at a time: the parameters above lie in many pages, some in several."""
    monkeypatch.setattr(pages, "PAGE", 2048)
    monkeypatch.setattr(pages, "CHUNK", 512)
