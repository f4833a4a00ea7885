"""`qlora verify-resume`: it kills, it compares, and a difference of a bit is one."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from runs import metrics

from qlora.cli import main
from qlora.config.commands import VerifyConfig
from qlora.config.options import to_yaml
from qlora.errors import UserError
from qlora.run.recipe import finetune
from qlora.run.verify import differences, verify_resume


@pytest.fixture(scope="module")
def verified(place, tmp_path_factory):
    """A folder after the command, with its exit code."""
    folder = tmp_path_factory.mktemp("verified")
    options = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "output": str(folder / "out")}
    config = VerifyConfig(**options, batch_size=2, rank=2, device="cpu", dtype="fp32", dropout=0.1, kills=1)
    config = dataclasses.replace(config, trial_steps=3, steps=500, epochs=None)
    (folder / "run.yaml").write_text(to_yaml(config))
    return folder, main(["verify-resume", "--config", str(folder / "run.yaml")])


def test_it_kills_and_compares(verified):
    folder, code = verified
    assert code == 0 and [line["step"] for line in metrics(folder / "out/undisturbed")] == [0, 1, 2, 3]
    killed = [path for path in (folder / "out").iterdir() if path.is_dir() and path.name.startswith("killed")]
    assert killed and [line["step"] for line in metrics(killed[-1])] == [0, 1, 2, 3]


def test_a_folder_in_use_is_refused(verified):
    folder, _ = verified
    with pytest.raises(UserError, match="is not an empty folder"):
        verify_resume(VerifyConfig(model="m", data="d", output=str(folder / "out")))


def test_what_differs_is_named(config, tmp_path):
    finetune(config())
    assert shutil.copytree(tmp_path / "run", tmp_path / "same") and not differences(tmp_path / "run", tmp_path / "same")
    finetune(config("other", seed=1))
    found = " ".join(differences(tmp_path / "run", tmp_path / "other"))
    for part in (
        "adapter/adapter_model",
        "step-000004/adapter_model",
        "optimizer.safetensors",
        "state.json",
        "metrics",
    ):
        assert part in found
    lines = metrics(tmp_path / "same")
    lines[2]["loss"] += 1e-9
    (tmp_path / "same/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = differences(tmp_path / "run", tmp_path / "same")
    assert found.startswith("the numbers of")
