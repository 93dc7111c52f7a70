"""Checkpoints of HQQ, AWQ and GPTQ become model directories without a change of their weights."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, ordinary_model, save_checkpoint, stored_experts, trunk_tensors
from zero_point_checkpoints import AWQ, GPTQ, HQQ, awq, gptq, hqq, quantise, quantise_as_mixtral_offloading

import moetier
from moetier.runtime.moe.experts import experts_modules
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.layout import ZERO_POINTS, ExpertKey
from moetier.tiers.quant.codec import decode
from moetier.tiers.store.reader import ShardStore
from moetier.tools.convert.api import convert
from moetier.tools.main import main

Make = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def always(made: Callable[..., Any], **how: Any) -> Make:
    return lambda name, weight: made(weight, **how)


def mixed(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Experts in 2 bits, one of them in 4; attention in 4."""
    return hqq(weight, 4 if "_proj" in name or "experts.3." in name else 2, 16)


FORMS: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "hqq mixed": ("mixtral", mixed, HQQ),
    "hqq 3 bits": ("qwen3_moe", always(hqq, nbits=3, group=16, dtype=torch.float16), HQQ),
    "awq": ("qwen3_moe", always(awq, group=-1), AWQ | {"group_size": -1}),
    "gptq 3 bits": (
        "mixtral",
        always(gptq, bits=3, group=32, form="gptq_v2"),
        GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"},
    ),
    "gptq 8 bits": (
        "qwen3_moe",
        always(gptq, bits=8, group=16, symmetric=True),
        GPTQ | {"bits": 8, "group_size": 16, "sym": True},
    ),
}

SLOW = ("hqq 3 bits", "gptq 8 bits")  # of each, another form is quick


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in FORMS]
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantised checkpoint, and one with the weights that it means. Tests must not change them."""
    folder = tmp_path_factory.mktemp("both")
    model_type, make, config = FORMS[request.param]
    source = save_checkpoint(folder / "src", model_type, shards=1)
    quantise(source, folder / "plain", make, config)
    return source, folder / "plain"


def same_as_plain(source: Path, plain: Path, tmp_path: Path) -> None:
    """In 16 bits, the two are the same."""
    convert(source, tmp_path / "exact", bits=16)
    convert(plain, tmp_path / "ordinary", bits=16)
    found, expected = stored_experts(tmp_path / "exact"), stored_experts(tmp_path / "ordinary")
    assert found.keys() == expected.keys()
    for key, tensors in expected.items():
        assert all(torch.equal(found[key][name], tensor) for name, tensor in tensors.items())
    found, expected = trunk_tensors(tmp_path / "exact"), trunk_tensors(tmp_path / "ordinary")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_in_16_bits(both: tuple[Path, Path], tmp_path: Path) -> None:
    same_as_plain(*both, tmp_path)


def test_mixtral_offloading(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    quantise_as_mixtral_offloading(source, tmp_path / "plain")
    same_as_plain(source, tmp_path / "plain", tmp_path)


def test_a_config_of_mixtral_offloading_without_a_size_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    quantise_as_mixtral_offloading(source, tmp_path / "plain")
    edit_json(source / "config.json", num_key_value_heads=None)
    with pytest.raises(CheckpointError, match="no such matrix"):
        convert(source, tmp_path / "dst")


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def test_without_bits_nothing_is_lost(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Experts decode to the weights that the checkpoint means, and logits are those of transformers with these."""
    source, plain = both
    convert(source, tmp_path / "dst")
    ordinary = ordinary_model(plain)
    modules = experts_modules(ordinary)
    with ShardStore.open(tmp_path / "dst") as store:
        assert {p.pairs for layout in store.manifest.layouts.values() for p in layout.projections} <= set(ZERO_POINTS)
        for block, entry in enumerate(store.manifest.blocks):
            layout = store.layout(block)
            for expert in range(entry.experts):
                buffer = mmap.mmap(-1, layout.slot_bytes)
                store.read_into(ExpertKey(block, expert), memoryview(buffer))
                record = torch.frombuffer(buffer, dtype=torch.uint8)
                for p in layout.projections:
                    expected = getattr(modules[entry.path], p.name)[expert]
                    assert torch.equal(decode(record, layout, p.name, torch.empty_like(expected)), expected)
    exact, _ = moetier.load(tmp_path / "dst", exact=True)
    assert torch.equal(logits(exact), logits(ordinary))
    quick, _ = moetier.load(tmp_path / "dst")
    ideal = logits(exact).float()
    assert float((logits(quick).float() - ideal).norm() / ideal.norm()) < 0.2  # a router may choose otherwise


def test_bits_quantise_anew(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    quantise(source, tmp_path / "plain", always(hqq, nbits=8, group=32), HQQ)
    for folder in (source, tmp_path / "plain"):
        convert(folder, folder.with_suffix(".dst"), bits=4)
    found, expected = stored_experts(source.with_suffix(".dst")), stored_experts(tmp_path / "plain.dst")
    for key, sections in expected.items():
        assert all(torch.equal(found[key][name], section) for name, section in sections.items())


def test_groups_that_no_record_has_need_bits(tmp_path: Path) -> None:
    """Groups across rows (axis 0), and those of columns from all over the matrix: with --bits they are read."""
    across, spread = (save_checkpoint(tmp_path / name, shards=1) for name in ("across", "spread"))
    quantise(across, tmp_path / "plain", always(hqq, nbits=4, group=32, axis=0), HQQ)

    def in_order(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return gptq(weight, order=torch.randperm(weight.shape[1]) // 32)

    quantise(spread, tmp_path / "other", in_order, GPTQ | {"desc_act": True})
    for source, said in (
        (across, r"\.weight has groups .* \(of 32 .* axis 0\)"),
        (spread, r"\.weight has groups .* \(desc_act\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=said) as caught:
            convert(source, tmp_path / "dst")
        assert "a record has a scale for neighbouring" in caught.value.cause
        assert "--bits 16 for the values as they are" in caught.value.fix
        assert not (tmp_path / "dst").exists()
        with pytest.raises(UnsupportedModelError, match="can't be used as they are"):
            moetier.load(source)
        convert(source, source.with_suffix(".dst"), bits=8)


@pytest.mark.usefixtures("short_probes")
def test_a_checkpoint_is_planned_and_not_used_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_checkpoint(tmp_path / "src", shards=1)
    quantise(source, tmp_path / "plain", always(awq, group=32), AWQ)
    assert main(["plan", str(source), "--disk", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [choice["bits"] for choice in found["choices"] if choice["native"] and choice["trunk_bits"] == 16] == [4]
    assert "--bits native" in found["recommended"]["convert"]
    with pytest.raises(UnsupportedModelError, match="its bytes are in another order than a record"):
        moetier.load(source)
