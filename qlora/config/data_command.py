"""Options of `qlora data`: those of finetune, so that its config file serves, and how the report is shown.

The alternative, a list of the few that concern data, would have to be kept equal to what finetune reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.config.commands import FinetuneConfig
from qlora.config.options import MODEL, OUTPUT, option
from qlora.config.shared import Json


@dataclass(kw_only=True)
class DataConfig(Json, FinetuneConfig):
    """Options of `qlora data`."""

    output: str | None = option(  # type: ignore[assignment]  # nothing is trained
        None, group=MODEL, min_length=1, help="not written to"
    )
    examples: int = option(3, group=OUTPUT, ge=0, le=1000, help="examples to show")
    html: str | None = option(None, group=OUTPUT, min_length=1, help="an HTML file to write the report to")
