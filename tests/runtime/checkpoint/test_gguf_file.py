"""GGUF files as models: experts by reference, everything else by transformers' own tables."""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("gguf")

import gguf
from gguf_files import MODELS, Kind, mostly, reference, tiny_weights, write_gguf
from prepared import Prepared

from moetier.runtime.checkpoint.blueprint import build_on_meta
from moetier.runtime.checkpoint.containers import SAMPLE_BYTES
from moetier.runtime.checkpoint.gguf_file import open_gguf, tokenizer_of
from moetier.runtime.model.load import load
from moetier.runtime.stores.checkpoint_store import check_shards, table_of
from moetier.runtime.stores.registry import open_store
from moetier.tiers.errors import CheckpointError, MoetierError, UnsupportedModelError
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.headers.gguf import read_gguf
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store import pieces
from moetier.tools.main import main

has_mapping = find_spec("transformers.integrations.gguf.gguf_config_mapping") is not None  # from 5.24 on
IDS = torch.tensor([[5, 17, 200, 3, 99, 250, 42]])
KINDS: dict[str, Kind] = {
    "BF16": mostly("BF16"),
    "F16": mostly("F16"),
    "Q4_0": mostly("Q4_0"),
    "Q8_0": mostly("Q8_0"),
    "MXFP4": mostly("MXFP4"),
    "Q4_K": mostly("Q4_K", trunk="Q4_K"),
    "Q5_K": mostly("Q5_K"),
    "Q6_K": mostly("Q6_K", trunk="Q6_K"),
    "Q4_K_M": mostly("Q4_K", "Q6_K", "Q4_K"),
}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def exact_logits(path: Path, dtype: torch.dtype, attention: str = "sdpa") -> torch.Tensor:
    model, _ = load(path, exact=True, ram="1MiB", dtype=dtype, attn_implementation=attention)
    with model.tiers:
        return logits(model)


# each coding with one of the types: the other is slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=[pytest.mark.slow] * ((number + is_half) % 2))
        for number, kind in enumerate(KINDS)
        for is_half, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_logits_are_those_of_the_decoded_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_weights("qwen3moe")
    path = write_gguf(tmp_path / "model.gguf", model, KINDS[kind])
    before = hashlib.sha256(path.read_bytes()).digest()
    found = exact_logits(path, dtype)
    assert torch.equal(found, logits(reference(path, model, dtype)))
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("architecture", MODELS)
def test_architectures_that_transformers_reads(architecture: str, tmp_path: Path) -> None:
    """And Mixtral, whose rows of queries and keys llama.cpp has in another order."""
    if architecture == "qwen35moe":
        pytest.importorskip("transformers.integrations.gguf.gguf_config_mapping")  # of 5.24
    model = tiny_weights(architecture)
    path = write_gguf(tmp_path / "model.gguf", model, mostly("Q8_0", "Q4_0"))
    attention = "eager" if architecture == "gpt-oss" else "sdpa"
    dtype = torch.bfloat16
    ordinary = reference(path, model, dtype)
    ordinary.set_attn_implementation(attention)
    assert torch.equal(exact_logits(path, dtype, attention), logits(ordinary))


def test_rows_that_alternate_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of gpt-oss, and their biases, which are fp32 in the file. Parts may have any size."""
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("gpt-oss"), mostly("MXFP4", trunk="Q8_0"))
    assert main(["link", str(path)]) == 0
    assert main(["verify", str(path)]) == 0
    key = ExpertKey(1, 2)
    with open_store(path) as store:
        assert isinstance(store, ExtentStore)
        layout = store.layout(1)
        record = bytearray(layout.slot_bytes)
        store.read_into(key, memoryview(record))
        for size in random.Random(0).sample(range(50, layout.payload_bytes), 50):
            monkeypatch.setattr(pieces, "READ_PIECE_BYTES", size)
            again = bytearray(b"?" * layout.slot_bytes)
            store.read_into(key, memoryview(again))
            assert again == record, size
    exact, quick = (
        load(path, exact=exact, ram="1MiB", attn_implementation="eager", dtype=torch.float32)[0]
        for exact in (True, False)
    )
    with exact.tiers, quick.tiers:
        wanted, found = logits(exact), logits(quick)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_same_file_to_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_K", "Q6_K"))
    config = transformers.Qwen3MoeConfig(**open_gguf(path).config)
    ordinary = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=config, dtype=dtype, experts_implementation="eager"
    )
    assert torch.equal(exact_logits(path, dtype), logits(ordinary))


def test_several_parts_are_one_model(tmp_path: Path) -> None:
    model = tiny_weights("qwen3moe")
    whole = write_gguf(tmp_path / "whole.gguf", model, mostly("Q4_0"))
    first = write_gguf(tmp_path / "parts.gguf", model, mostly("Q4_0"), tensors_of_a_part=7)
    names = sorted(path.name for path in tmp_path.glob("parts-*"))
    assert first.name == names[0]
    assert len(names) > 2
    assert torch.equal(exact_logits(first, torch.float32), exact_logits(whole, torch.float32))
    with pytest.raises(CheckpointError, match=f"part 2 of {len(names)}") as caught:
        load(tmp_path / names[1])
    assert str(first) in caught.value.fix
    (tmp_path / names[1]).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{names[1]} can't be read"):
        load(first)
    (tmp_path / names[2]).rename(tmp_path / names[1])
    (tmp_path / "away").rename(tmp_path / names[2])
    with pytest.raises(CheckpointError, match=f"{names[1]} says that it is part 2"):
        load(first)


def test_tokenizer_and_chat_template_are_in_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    model, tokenizer = load(path, ram="1MiB")
    with model.tiers:
        assert tokenizer is not None
        ids = tokenizer("he said")["input_ids"]
        assert tokenizer.decode(ids) == "he said"
        assert len(ids) == len("he said") - 1
        ordinary = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        assert type(tokenizer) is type(ordinary)
        assert tokenizer.backend_tokenizer.to_str() == ordinary.backend_tokenizer.to_str()
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
        assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    path = write_gguf(tmp_path / "without.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"), vocabulary=False)
    model, tokenizer = load(path, ram="1MiB")
    model.tiers.close()
    assert tokenizer is None


def test_the_end_of_a_turn_is_an_end_of_the_text_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    end = open_gguf(path).config["eos_token_id"]
    name = b"tokenizer.ggml.%s_token_id"
    before, turn = ((name % key) + struct.pack("<2I", 4, number) for key, number in ((b"bos", end), (b"eot", end + 1)))
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, turn))
    assert open_gguf(path).config["eos_token_id"] == [end, end + 1]


def test_a_tokenizer_that_cannot_be_made_is_an_error_and_none_makes_no_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    assert "tokenizer.json" in open_gguf(path).generated_files()
    data = path.read_bytes()
    (tmp_path / "merge.gguf").write_bytes(data.replace(b"h e", b"h Z"))
    with pytest.raises(CheckpointError, match=r"merge\.gguf can't be made: .*Token `hZ` out of vocabulary") as caught:
        tokenizer_of(tmp_path / "merge.gguf")
    assert "safetensors" in caught.value.fix
    (tmp_path / "none.gguf").write_bytes(data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.others"))
    assert open_gguf(tmp_path / "none.gguf").generated_files() == {}


def described(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config, and the shapes of the model's tensors."""
    checkpoint = open_gguf(path)
    model, _ = build_on_meta(checkpoint.config, None)
    return dict(checkpoint.config), {name: part.shape for name, part in checkpoint.sources(model, "float32").items()}


def test_an_older_transformers_reads_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not the functions that describe some architectures."""
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    config, found = described(path)
    for name in ("gguf_config_mapping", "utils"):
        monkeypatch.setitem(sys.modules, f"transformers.integrations.gguf.{name}", None)
    other = write_gguf(tmp_path / "other.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    assert described(other) == (config, found)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "parts.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"), tensors_of_a_part=7)
    data = first.read_bytes()
    at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    (count,) = struct.unpack_from("<i", data, at)
    first.write_bytes(data[:at] + struct.pack("<i", count + 1) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=rf"its parts have {count} tensors, not {count + 1}"):
        open_gguf(first)
    first.write_bytes(data)
    doubled = next(name for name in read_gguf(first).tensors if name.startswith("blk.0.")).encode()
    other = doubled.replace(b"blk.0.", b"blk.1.")
    holder = next(part for part in tmp_path.glob("parts-*") if other in part.read_bytes() and part != first)
    holder.write_bytes(holder.read_bytes().replace(other, doubled))
    with pytest.raises(CheckpointError, match=rf"{holder.name} repeats '{doubled.decode()}' of another part"):
        open_gguf(first)
    holder.unlink()
    holder.mkdir()
    with pytest.raises(CheckpointError, match=f"{holder.name} can't be read: Is a directory"):
        open_gguf(first)


def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header is read from the first byte on. Otherwise at most a sample is."""
    pread, begun = os.pread, []

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        if offset == 0 and count > SAMPLE_BYTES:
            begun.append(descriptor)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    assert path.stat().st_size > SAMPLE_BYTES
    model, _ = load(path, ram="1MiB")
    with model.tiers:
        assert len(begun) == 1


def test_the_table_depends_on_the_bytes(tmp_path: Path) -> None:
    one = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_K", "Q6_K"))
    table = table_of(one)
    (tmp_path / "other").mkdir()
    other = write_gguf(
        tmp_path / "other" / "model.gguf", tiny_weights("qwen3moe", seed=1), mostly("Q4_K", "Q6_K"), seed=1
    )
    assert table_of(other).manifest.digest != table.manifest.digest
    assert table_of(one).manifest.digest == table.manifest.digest
    check_shards(one)
    with open_store(one) as store:
        assert store.is_direct in (True, False)


def test_what_can_t_be_used_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_weights("qwen3moe")
    path = write_gguf(tmp_path / "model.gguf", model, mostly("Q4_0"))
    data = path.read_bytes()
    cases: list[tuple[bytes, type[MoetierError], str]] = [
        (b"GGML" + data[4:], CheckpointError, "is not a complete GGUF file: it begins with"),
        (data[:-5000], CheckpointError, "but the file has"),
        (data[:200], CheckpointError, "truncated"),
        (data.replace(b"general.architecture", b"general.architectura"), CheckpointError, "not name its architecture"),
        (data.replace(b"qwen3moe", b"deepseek"), UnsupportedModelError, "architecture 'deepseek'"),
        (data.replace(b"blk.1.ffn_up_exps", b"blk.1.ffn_xx_exps"), CheckpointError, "no pair of gate and up"),
        (data.replace(b"blk.1.attn_q.", b"blk.1.attn_x."), CheckpointError, "no tensor for model.layers.1.self_attn"),
        (data.replace(b"token_embd", b"token_xxxx"), CheckpointError, "has no token_embd.weight"),
    ]
    for number, (damaged, error, words) in enumerate(cases):
        bad = tmp_path / f"bad-{number}.gguf"
        bad.write_bytes(damaged)
        with pytest.raises(error, match=words) as caught:
            load(bad)
        assert bad.name in caught.value.cause or "pair" in words
        assert caught.value.fix
    if has_mapping:
        described = write_gguf(tmp_path / "described.gguf", tiny_weights("qwen35moe"), mostly("Q4_0"))
        described.write_bytes(described.read_bytes().replace(b"qwen35moe.block_count", b"qwen35moe.block_coumt"))
        with pytest.raises(CheckpointError, match="lacks a key of the architecture qwen35moe, or has it with another"):
            load(described)
    dense = write_gguf(tmp_path / "q2.gguf", model, mostly("Q5_1"))
    with pytest.raises(UnsupportedModelError, match="stored in Q5_1") as caught:
        load(dense)
    assert "moetier convert" in caught.value.fix


Shapes = Callable[[tuple[int, ...]], tuple[int, ...]]
OTHERS: list[tuple[str, Shapes]] = [
    ("blk.0.attn_norm.weight", lambda shape: (shape[0] // 2,)),
    ("blk.0.attn_q.weight", lambda shape: (shape[1],)),
    ("blk.0.attn_q.weight", lambda shape: (1, *shape)),
    ("blk.0.ffn_gate_inp.weight", lambda shape: (shape[0] - 1, shape[1])),
    ("blk.1.ffn_down_exps.weight", lambda shape: (shape[2],)),
    ("blk.1.ffn_down_exps.weight", lambda shape: shape[1:]),
]


@pytest.mark.parametrize(("name", "shaped"), OTHERS)
def test_a_tensor_of_another_shape_is_refused_by_name(name: str, shaped: Shapes, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q8_0", "Q4_0"))
    data, written = path.read_bytes(), struct.pack("<Q", len(name)) + name.encode()
    end = read_gguf(path).nbytes
    at = data.index(written) + len(written)
    (count,) = struct.unpack_from("<I", data, at)
    other = shaped(struct.unpack_from(f"<{count}Q", data, at + 4)[::-1])
    header = data[:at] + struct.pack(f"<I{len(other)}Q", len(other), *other[::-1]) + data[at + 4 + 8 * count : end]
    path.write_bytes(header + bytes(-len(header) % 32) + data[end + -end % 32 :])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(path)


def test_without_the_package_it_says_how_to_install_it(scripts: Prepared, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_weights("qwen3moe"), mostly("Q4_0"))
    code = f"""
import sys
sys.modules["gguf"] = None
from moetier.tools.main import main
sys.exit(main(["generate", {str(path)!r}, "he"]))
"""
    ended = scripts.run(code)
    assert ended.returncode == 1
    assert "need the package gguf" in ended.stderr
    assert 'pip install ".[gguf]"' in ended.stderr


def test_the_types_are_those_of_gguf() -> None:
    from moetier.tiers.headers.gguf import GGML_TYPES

    for number, (name, weights, size) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (weights, size))
