"""The names of the checks of `training`, apart from it: the table is made without loading all that trains."""

from __future__ import annotations

TRAINING = (
    "a fresh adapter is its base",
    "merged is adapted",
    "a LoRA step is PEFT's definition",
    "a DoRA step is PEFT's definition",
    "optimizer spilled is resident",
    "resumed is undisturbed",
)
