"""`qlora data`: what a finetune with the same options would learn, without its weights.

    config -> read_inputs -> doctor.report -> text, JSON, HTML

The alternative, a look at the file alone, does not know the model's template and tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from qlora.config.data_command import DataConfig
from qlora.data.doctor import as_text, on_terminal, report
from qlora.data.doctor_page import page
from qlora.errors import UserError, guard, problem
from qlora.run.inputs import read_inputs


def data_command(config: DataConfig) -> str:
    """The report as it is to be printed; written to `config.html` too, if that is given.

    Raises:
        UserError: all that is wrong with model and data; nothing would be learned; the HTML file cannot be written, or
            is something else that is there already.
    """
    if config.html is not None:
        _check_page(Path(config.html))
    inputs = read_inputs(config, weights=False)
    found = {"data": config.data, "model": config.model}
    found |= report(
        inputs.dataset, inputs.held_dataset, inputs.tokenizer, max_tokens=config.max_tokens, examples=config.examples
    )
    if config.html is not None:
        with guard("html", config.html, "cannot be written", "Give a file in a folder that can be written to"):
            text = page(found, f"{config.data} as {config.model} sees it")
            Path(config.html).write_text(text, encoding="utf-8", errors="backslashreplace")
    if config.json:
        return json.dumps(found, indent=2)
    return as_text(found, color=on_terminal())


def _check_page(path: Path) -> None:
    """See that a page may be written: the place is free, or holds a page.

    Raises:
        UserError: it holds something else.
    """
    if path.is_dir() or (path.exists() and path.suffix.lower() not in (".html", ".htm")):
        raise UserError(problem("html", path, "is there already, and no HTML file", "Give a name that ends in .html"))
