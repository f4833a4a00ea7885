"""`qlora data`: what a finetune with the same options would learn, without its weights.

    config -> read_inputs -> doctor.report -> text, JSON, HTML

The alternative, a look at the file alone, does not know the model's template and tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from qlora.config.data_command import DataConfig
from qlora.data.doctor import as_text, on_terminal, report
from qlora.data.doctor_page import GENERATOR, page
from qlora.errors import UserError, guard, problem
from qlora.files import replace_file
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
            replace_file(Path(config.html), text.encode(errors="backslashreplace"))
    if config.json:
        return json.dumps(found, indent=2)
    return as_text(found, color=on_terminal())


def _check_page(path: Path) -> None:
    """See that a page may be written: the place is free, or holds a page.

    Raises:
        UserError: it holds something else.
    """
    try:
        with path.open("rb") as file:
            ours = GENERATOR.encode() in file.read(4096)
    except FileNotFoundError:
        if path.parent.is_dir():
            return
        raise UserError(problem("html", path, "its folder is not there", "Make the folder, or give another")) from None
    except OSError:
        ours = False
    if not ours:
        raise UserError(problem("html", path, "is there already, and not a page of ours", "Give another name"))
