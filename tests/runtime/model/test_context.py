"""How long a model's context is, and whether a text fits into it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import transformers
from transformers import MixtralConfig

import moetier
from moetier.runtime.model import context
from moetier.runtime.model.context import counted, first_ids, longest_context


@pytest.fixture(scope="module")
def tokenizer(tinymix: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tinymix)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        # some checkpoints leave max_position_embeddings at the original length, others state the stretched one
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096),
        # its stated length is the stretched one
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
            4096,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_rope_scaling_lengthens_the_context(rope: dict[str, Any], longest: int) -> None:
    config = MixtralConfig(max_position_embeddings=4096, rope_parameters=rope | {"rope_theta": 10000.0})
    assert longest_context(config) == longest


def test_a_sliding_window_does_not_limit_the_context() -> None:
    assert longest_context(MixtralConfig(max_position_embeddings=4096, sliding_window=128)) == 4096


def test_the_text_model_of_several_modalities_counts() -> None:
    config = transformers.Qwen3VLMoeConfig(text_config={"max_position_embeddings": 512})
    assert longest_context(config) == 512


def test_rope_parameters_by_layer_type() -> None:
    by_type = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma4TextConfig(max_position_embeddings=1024, rope_parameters=by_type)
    assert longest_context(config) == 8192


def test_a_config_without_a_maximum() -> None:
    assert longest_context(transformers.MambaConfig()) is None
    assert longest_context(MixtralConfig(max_position_embeddings=0)) is None


@pytest.mark.parametrize("text", ["La mattina seguente ", "\u00e9\u4e16 ", "a", " ", "\n"])
def test_the_length_is_beyond_the_limit_exactly_if_it_is_that_of_the_whole(
    tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blanks make so few tokens that a first prefix of them may decide nothing, and a longer one is needed."""
    monkeypatch.setattr(context, "_LEAST", 1000)
    for size in (100, 10_000, 30_000):
        whole = text * (size // len(text))
        ids: list[int] = tokenizer(whole, verbose=False)["input_ids"]
        assert size == 100 or len(first_ids(tokenizer, whole, len(ids) // 40)) < len(ids), "it is that of a prefix"
        for most in (len(ids) // 40 + 1, len(ids) - 1, len(ids)):
            found = first_ids(tokenizer, whole, most)
            assert (len(found) > most) == (len(ids) > most)
            assert found == ids or len(found) > 2 * most
            assert ids[: len(found) - 10] == found[:-10], "it is a beginning"
        assert first_ids(tokenizer, whole, None) == ids


def test_a_text_of_any_size_is_measured_in_the_time_of_its_beginning(tokenizer: Any) -> None:
    """30 MB, of which a tokenizer reads some MB a second."""
    text = "La mattina seguente, don Rodrigo " * 1_000_000
    began = time.process_time()
    assert len(first_ids(tokenizer, text, 2048)) > 2048
    assert time.process_time() - began < 2


def test_how_many_there_are_is_reported_as_far_as_they_were_counted() -> None:
    assert counted(3005, 2048) == "3,005"
    assert counted(16_000, 2048) == "more than 4,096"


def test_transformers_warns_of_a_text_that_is_too_long(
    tinymix_4bit: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python. tinymix's own tokenizer says nothing of a length, as most do."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, tokenizer = moetier.load(tinymix_4bit)
    with model.tiers:
        assert tokenizer is not None
        with caplog.at_level("WARNING", logger="transformers"):
            tokenizer("a b c " * 100)
            assert "longer than" not in caplog.text
            tokenizer("a b c " * 1000)
        assert "longer than the specified maximum" in caplog.text
        assert "(3001 > 2048)" in caplog.text


def test_transformers_warns_of_generating_beyond_the_context(
    tinymix_4bit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = tmp_path / "short"
    copytree(tinymix_4bit, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    model, tokenizer = moetier.load(folder, daemon=None)
    with model.tiers, caplog.at_level("WARNING", logger="transformers"):
        assert tokenizer is not None
        model.generate(**tokenizer("a b c", return_tensors="pt"), max_new_tokens=20, min_new_tokens=20)
    assert "exceeded the model's predefined maximum length (16)" in caplog.text
