"""A matrix of the trunk that is stored as a record: the same products, where it lies, and nothing else in its place."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from comparison import convert_tiny, read_back
from faults import flip_bit
from int4 import cuda_operators
from stores import without_sums
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moetier
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.devices.cuda import CudaInt4
from moetier.runtime.kernels.int4 import FusedKernels
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import mapped_files
from moetier.runtime.model import trunk_files
from moetier.runtime.model.budgets import scratch_elements
from moetier.runtime.model.trunk_files import mapped_bytes
from moetier.runtime.moe.linear import WEIGHT, QuantizedLinear, matrix_layout, quantized_linears, replace_linears
from moetier.tiers.errors import ChecksumError, ConfigError, StoreFormatError
from moetier.tiers.layout import Bits
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import decode, encode
from moetier.tiers.store.folder import read_manifest, store_folder

IDS = torch.tensor([[5, 17, 200, 31, 99, 4, 4, 120]])
TRUNK_RECORDS = TrunkRecords(4, 64, "bfloat16")


def quantised(bits: Bits, dtype: torch.dtype, *, bias: bool, rows: int = 80) -> tuple[nn.Linear, QuantizedLinear]:
    """An ordinary linear module with the decoded weights, and the one that has them in a record."""
    torch.manual_seed(bits)
    linear = nn.Linear(96, rows, bias=bias, dtype=dtype)
    layout = matrix_layout(rows, 96, TrunkRecords(bits, 64, "bfloat16"))
    out = np.empty(layout.record_bytes, np.uint8)
    encode({WEIGHT: linear.weight}, layout, out)
    module = QuantizedLinear(linear, layout)
    module.record = torch.from_numpy(out)[: layout.payload_bytes]
    module.kernels = Kernels()
    with torch.no_grad():
        decode(module.record, layout, WEIGHT, linear.weight)
    return linear, module


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_whatever_the_shape(bits: Bits, bias: bool, dtype: torch.dtype) -> None:
    linear, module = quantised(bits, dtype, bias=bias)
    random = torch.randn(4, 6, 3, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for x in (random[0, 0], random[0], random, random[0].transpose(0, 1), random[0, 0, :1]):
        y = module(x)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], 80), dtype)
        assert torch.equal(y, linear(x)), x.shape


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_where_it_is_multiplied_as_it_lies(bits: Bits, dtype: torch.dtype, fused: bool) -> None:
    """By the quickest kernels of this machine, and by those of a GPU; the bias is added all the same."""
    linear, module = quantised(bits, dtype, bias=True)
    cpu = torch.device("cpu")
    with cuda_operators():
        module.compute_with(FusedKernels(cpu, CudaInt4()) if fused else Cpu().kernels())
        _is_near(linear, module, dtype)


def _is_near(linear: nn.Linear, module: QuantizedLinear, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = linear(x).float()
        assert torch.linalg.vector_norm(module(x).float() - expected) < 0.03 * torch.linalg.vector_norm(expected)


def test_a_gradient_is_refused_and_not_missing() -> None:
    _, module = quantised(4, torch.float32, bias=False)
    x = torch.randn(2, 96, requires_grad=True)
    with pytest.raises(ConfigError, match="a quantised matrix of the trunk"):
        module(x).sum().backward()


def test_it_has_no_attribute_weight() -> None:
    _, module = quantised(4, torch.float32, bias=True)
    assert not hasattr(module, "weight")
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert module.to(torch.bfloat16).record.dtype == torch.uint8
    assert "96, 80, bias=True, bits=4, group=32" in repr(module)


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(64)
        self.all_tied_weights_keys = {"first.weight": "other.weight"}


def test_what_is_named_is_replaced_and_tied_no_longer() -> None:
    with torch.device("meta"):
        model = TwoLinears()
    replace_linears(model, {"first": 128 * 64 // 2 + 128 * 4}, TRUNK_RECORDS)
    (module,) = quantized_linears(model)
    assert model.first is module  # type: ignore[comparison-overlap]
    assert set(model.state_dict()) == {"first.record", "first.bias", "norm.weight", "norm.bias"}
    assert module.record.is_meta
    assert model.all_tied_weights_keys == {}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"first": 128 * 64}, r"8,192 bytes for first, which in TwoLinears is 128 x 64 there"),
        ({"second": 4608}, "second, which in TwoLinears is not there"),
        ({"norm": 4608}, "norm, which in TwoLinears is not there"),
        ({"": 4608}, "is not there"),
    ],
)
def test_a_record_that_does_not_fit_the_model(records: dict[str, int], words: str) -> None:
    with pytest.raises(StoreFormatError, match=words):
        replace_linears(TwoLinears(), records, TRUNK_RECORDS)


# -- of a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An ordinary mixtral in bf16, and its model directory with a trunk of 4 bits. Tests must change neither."""
    return convert_tiny("mixtral", torch.bfloat16, tmp_path_factory.mktemp("mixtral"), trunk_bits=4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_plain_from_pretrained_takes_the_records_where_they_are_mapped(
    tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", 0)
    moetier.register()
    model, found = AutoModelForCausalLM.from_pretrained(tiny[1], output_loading_info=True)
    with model.tiers:
        assert not any(found.values()), found  # no missing, unexpected or mismatched key
        linears = quantized_linears(model)
        assert len(linears) == 3 * 4 + 1
        maps = [addresses for addresses, _ in mapped_files()]
        for linear in linears:
            assert any(linear.record.data_ptr() in addresses for addresses in maps)
            assert linear.record.data_ptr() % 64 == 0
            assert linear.kernels is model.tiers.kernels
        assert mapped_bytes(model) == sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("tied", [False, True])
def test_the_head(tmp_path: Path, tied: bool) -> None:
    """It is quantised either way; the embedding that it was tied to stays as it was."""
    ordinary, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path, trunk_bits=8, tie_word_embeddings=tied)
    before = ordinary.model.embed_tokens.weight.detach().clone()
    model, _ = moetier.load(directory, exact=True)
    with model.tiers:
        assert model.config.tie_word_embeddings is tied
        assert isinstance(model.lm_head, QuantizedLinear)
        assert torch.equal(model.model.embed_tokens.weight, before)
        unlike = logits(ordinary)
        assert "lm_head" in read_back(ordinary, model)
        assert torch.equal(logits(model), logits(ordinary))
        assert not torch.equal(logits(model), unlike)
        model.tie_weights()  # as whoever changes a vocabulary does
        assert torch.equal(logits(model), logits(ordinary))


def test_budgets_leave_room_for_the_largest_matrix(tiny: tuple[Any, Path]) -> None:
    """The head may be larger than any projection of an expert."""
    manifest, head = read_manifest(store_folder(tiny[1])), matrix_layout(4000, 2560, TRUNK_RECORDS)
    projections = max(p.rows * p.columns for p in manifest.layout(0).projections)
    assert scratch_elements(manifest, (), Kernels()) == projections
    assert scratch_elements(manifest, [head], Kernels()) == 4000 * 2560


def test_records_that_the_manifest_does_not_know(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    directory = Path(copytree(tiny[1], tmp_path / "copy"))
    path = directory / "experts.zarr" / "zarr.json"
    group = json.loads(path.read_text())
    manifest = group["attributes"]["moetier"]
    del manifest["trunk_records"]
    path.write_text(json.dumps(group))
    with pytest.raises(StoreFormatError, match="trunk_records is None"):  # it still requires them
        moetier.load(directory)
    manifest["requires"] = []
    path.write_text(json.dumps(group))
    with pytest.raises(StoreFormatError, match="but the manifest says that the trunk has none"):
        moetier.load(directory)
    manifest |= {"requires": ["trunk-records"], "trunk_records": {"bits": 8, "group": 64, "pairs": "bfloat16"}}
    path.write_text(json.dumps(group))
    with pytest.raises(StoreFormatError, match="The trunk has a record of"):
        moetier.load(directory)


def test_a_flipped_bit_changes_a_weight(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    """So that the tests above compare what is really multiplied with."""
    directory = Path(copytree(tiny[1], tmp_path / "copy"))
    first, _ = moetier.load(tiny[1])
    trunk = directory / "trunk-00001-of-00001.safetensors"
    data = trunk.read_bytes()
    flip_bit(trunk, data.index(bytes(first.lm_head.record[:64].numpy())), 3)
    with pytest.raises(ChecksumError, match="checksum mismatch"):
        moetier.load(directory)
    without_sums(directory)
    second, _ = moetier.load(directory)
    with first.tiers, second.tiers:
        assert not torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("exact", [True, False])
def test_a_model_that_was_moved_says_so(tmp_path: Path, exact: bool) -> None:
    """Its records are not where it is computed: no address of elsewhere is read from."""
    _, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path, trunk_bits=4)
    model, _ = moetier.load(directory, exact=exact)
    with model.tiers:
        model.to("meta")
        with pytest.raises(ConfigError, match="was moved to meta"):
            logits(model)
