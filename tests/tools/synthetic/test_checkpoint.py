"""Routing of synthetic models, on narrow ones with the experts, gates and tokens of the large."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stores  # noqa: F401  # starts zarr's thread outside the tests
import torch
import transformers

from moetier.runtime.trace.recall import compare
from moetier.tools.main import main
from moetier.tools.synthetic.checkpoint import (
    GEOMETRIES,
    ROUTINGS,
    TOPICS,
    TRACED,
    lru_curve,
    read_tokens,
    token_ids,
)
from moetier.tools.synthetic.store import convert_synthetic, routing_of
from moetier.tools.synthetic.tensors import make_synthetic

NARROW: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
INNER = {"mixtral-4L": {"intermediate_size": 1024}}
WITHIN = {"mixtral-4L": 0.05, "qwen3-8L": 0.08}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GEOMETRIES:
        inner = INNER.get(name, {"moe_intermediate_size": 64, "head_dim": 64})
        monkeypatch.setitem(GEOMETRIES, name, GEOMETRIES[name] | NARROW | inner)


@pytest.mark.parametrize("geometry", ["mixtral-4L", pytest.param("qwen3-8L", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("narrow")
def test_routing_is_like_a_trained_models(geometry: str, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "src", geometry=geometry)
    convert_synthetic(tmp_path / "src", tmp_path / "dst")
    trace = routing_of(tmp_path / "dst")
    assert trace.tokens == TRACED
    wanted = ROUTINGS[geometry].curve
    found = lru_curve(trace, list(wanted))
    assert all(abs(found[slots] - ratio) <= WITHIN[geometry] for slots, ratio in wanted.items()), found
    (ahead,) = compare(trace)
    assert ahead.gates is not None
    assert 0.6 < ahead.gates < 0.95  # as of trained models: layers change the stream, and not much


@pytest.mark.usefixtures("narrow")
def test_the_stream_keeps_its_size(tmp_path: Path) -> None:
    """It begins with deviation 1; each layer adds a part of that."""
    make_synthetic(tmp_path / "src", blocks=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    ids = torch.tensor([read_tokens(tmp_path / "src")[:64]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    sizes = [float(state.float().std()) for state in states[:-1]]  # the last is normed
    assert abs(sizes[0] - 1) < 0.05
    assert all(1.05 < after / before < 1.5 for before, after in itertools.pairwise(sizes)), sizes


@pytest.mark.parametrize("geometry", sorted(GEOMETRIES))
def test_tokens_keep_to_a_topic(geometry: str) -> None:
    ids = token_ids(geometry, 4096)
    assert min(ids) >= TOPICS
    assert max(ids) < 4096
    kept = sum(a % TOPICS == b % TOPICS for a, b in itertools.pairwise(ids)) / len(ids)
    assert abs(kept - ROUTINGS[geometry].stay) < 0.02
    assert len(Counter(token % TOPICS for token in ids)) > 0.9 * TOPICS
    assert ids[:100] == token_ids(geometry, 4096, count=100)
    assert ids != token_ids(geometry, 4096, seed=1)


@pytest.mark.usefixtures("narrow")
def test_the_command_converts_and_says_the_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthetic", str(tmp_path / "src"), "--blocks", "1", "--store", str(tmp_path / "dst")]) == 0
    said = capsys.readouterr().out
    assert "Mixtral-8x7B-Instruct  0.166  0.327" in said
    assert "mixtral-4L  " in said
    assert read_tokens(tmp_path / "src") == read_tokens(tmp_path / "dst")
    assert main(["verify", str(tmp_path / "dst")]) == 0


@pytest.mark.usefixtures("narrow")
def test_the_command_says_it_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synthetic", str(tmp_path / "src"), "--blocks", "1", "--store", str(tmp_path / "dst"), "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "src").glob("*.safetensors"))
    assert said["store"] == str(tmp_path / "dst")
    assert list(said["hit_ratio"]) == [str(slots) for slots in range(1, 9)]
