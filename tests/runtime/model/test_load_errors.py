"""Errors and reports of transformers while it loads a model: which of them a user sees, and in what words."""

from __future__ import annotations

import logging
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from comparison import convert_tiny
from safetensors.torch import load_file, save_file
from threads import Task

import moetier
from moetier.runtime.checkpoint.safetensors_folder import WEIGHTS
from moetier.runtime.model.load import model_of
from moetier.tiers.errors import StoreFormatError


@pytest.mark.parametrize("as_it_is", [True, False])
def test_sizes_that_do_not_fit_the_weights(
    as_it_is: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the weight and both shapes, and stands alone."""
    directory = convert_tiny("mixtral", torch.bfloat16, tmp_path)[1]
    directory = tmp_path / "source" if as_it_is else directory
    edit_json(directory / "config.json", num_key_value_heads=4)
    shapes = r"k_proj\.weight has shape \[32, 64\], and by config\.json \[64, 64\], and 5 more do not fit\.\n"
    with pytest.raises(StoreFormatError, match=shapes) as caught:
        moetier.load(directory, daemon="none")
    assert "config.json" in caught.value.fix
    assert "LOAD REPORT" not in caplog.text + capsys.readouterr().err


def test_a_report_of_another_thread_is_logged_even_if_this_load_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "transformers")  # commands in other tests may have raised it
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # transformers 5.23 turns it off
    convert_tiny("mixtral", torch.bfloat16, tmp_path / "model")
    good, bad = tmp_path / "model" / "source", copytree(tmp_path / "model" / "source", tmp_path / "bad")
    save_file(load_file(good / WEIGHTS) | {"unknown": torch.ones(1)}, good / WEIGHTS, {"format": "pt"})
    edit_json(bad / "config.json", num_key_value_heads=4)

    def load_both(folder: Path, *given: Any, **named: Any) -> Any:
        if folder == bad:
            Task(lambda: moetier.load(good, daemon="none")[0].tiers.close()).result()
        return model_of(folder, *given, **named)

    monkeypatch.setattr("moetier.runtime.model.load.model_of", load_both)
    with pytest.raises(StoreFormatError, match="k_proj"):
        moetier.load(bad, daemon="none")
    (report,) = {message for message in caplog.messages if "LOAD REPORT" in message}  # caplog may hear it twice
    assert "unknown" in report
