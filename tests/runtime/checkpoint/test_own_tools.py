"""Checkpoints that the quantisers themselves write: experts decode to what the tool dequantises, bit for bit.

ModelOpt, AutoAWQ and GPTQModel are installed into build/own-tools; they run without a GPU. llama.cpp takes minutes to
compile: its quantiser is used where the extra ``peers`` is installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from checkpoints import ordinary_model
from environments import environment, install
from own_tools import PINS, TOOLS
from stores import read_records

import moetier
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.stores.registry import open_store
from moetier.tiers.quant.codec import decode
from moetier.tiers.store.base import Store
from moetier.tools.convert.api import convert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tools() -> Path:
    """Python of an environment with the tools, which is made once."""
    folder = ROOT / "build" / "own-tools"
    folder.mkdir(parents=True, exist_ok=True)
    pins = " ".join(PINS.values())
    with (folder / "pins").open("a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if made.read() != pins:
            install(environment(folder), *pins.split(), network=True)
            made.truncate(0)
            made.write(pins)
    return folder / "bin" / "python"


def run(command: Sequence[str | Path], given: str = "") -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(moetier.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, input=given, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def same_experts(store: Store, model: torch.nn.Module) -> None:
    modules = experts_modules(model)
    for key, data in read_records(store).items():
        layout, path = store.manifest.layout(key.block), store.manifest.blocks[key.block].path
        record = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for p in layout.projections:
            expected = getattr(modules[path], p.name)[key.expert]
            assert torch.equal(decode(record, layout, p.name, torch.empty_like(expected)), expected), (key, p.name)


@pytest.mark.parametrize("tool", TOOLS)
def test_experts_of_a_tool_decode_as_it_dequantises_them(tool: str, tools: Path, tmp_path: Path) -> None:
    source, plain = tmp_path / "source", tmp_path / "plain"
    model = tiny_model("qwen3_moe", torch.bfloat16, moe_intermediate_size=96, intermediate_size=96)
    model.save_pretrained(source)
    run([tools, ROOT / "tests" / "helpers" / "own_tools.py", tool, source, plain])
    convert(source, tmp_path / "native", bits="native")
    convert(source, tmp_path / "decoded", bits=16)
    expected = ordinary_model(plain)
    assert (next(iter(experts_modules(expected).values())).down_proj != 0).any()
    for folder in ("native", "decoded"):
        with open_store(tmp_path / folder) as store:
            same_experts(store, expected)


KINDS = {  # of llama.cpp's file types: those of the experts' matrices
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q6_K": {"Q6_K"},
    "MXFP4_MOE": {"MXFP4"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_llama_cpp_decode_as_gguf_dequantises_them(kind: str, tmp_path: Path) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("the extra peers is not installed")
    import gguf
    from gguf_files import mostly, reference, tiny_weights, write_gguf

    model, path = tiny_weights("qwen3moe"), tmp_path / "model.gguf"
    plain = write_gguf(tmp_path / "plain.gguf", model, mostly("F16", trunk="F16"))
    job = {"gguf": str(plain), "target": str(path), "threads": 2, "kind": kind}
    run([sys.executable, ROOT / "tests" / "measurements" / "llama_peer.py"], json.dumps(job))
    tensors = gguf.GGUFReader(path).tensors
    assert {tensor.tensor_type.name for tensor in tensors if "_exps" in tensor.name} == KINDS[kind]
    with open_store(path) as store:
        same_experts(store, reference(path, model, torch.float32))
