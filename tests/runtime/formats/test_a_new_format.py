"""A format is a module and a line in the registry (CONTRIBUTING.md): the invented ``toy8`` is added so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from checkpoints import edit_json, edit_tensors, ordinary_model, save_checkpoint, stored_experts, trunk_tensors
from quantised_checkpoints import quantised
from torch import Tensor

import moetier
from moetier.runtime.formats import registry
from moetier.runtime.moe.experts import experts_modules
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tools.convert.convert import convert
from moetier.tools.main import main

CONFIG = {"quant_method": "toy8", "bits": 8}
IDS = torch.randint(2, 250, (1, 7), generator=torch.Generator().manual_seed(3))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes, the exponents, and the weights that they mean."""
    exponents = (weight.float().abs().amax(1).clamp_min(2**-100) / 127).log2().ceil()
    codes = (weight.float() / exponents.exp2()[:, None]).round()
    return codes.to(torch.int8), exponents.to(torch.int8), (codes * exponents.exp2()[:, None]).to(weight.dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of toy8, and one with the decoded weights."""
    folder = tmp_path_factory.mktemp("toy8")
    decoded = save_checkpoint(folder / "decoded", "qwen3_moe", shards=1)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in filter(quantised, [*tensors]):
            *_, tensors[name] = quantise(tensors[name])

    edit_tensors(decoded, edit)
    toy = copytree(decoded, folder / "toy")

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in filter(quantised, [*tensors]):
            tensors[f"{name}_int8"], tensors[f"{name}_exponent"], _ = quantise(tensors.pop(name))

    edit_tensors(toy, pack)
    edit_json(toy / "config.json", quantization_config=CONFIG)
    return toy, decoded


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "toy8", "toy8:Toy8")


def test_without_the_line_it_is_refused_by_name(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantised with toy8, which moetier can't read"):
        convert(made[0], tmp_path / "dst")


@pytest.mark.usefixtures("registered")
def test_a_conversion_decodes_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    toy, decoded = made
    convert(toy, tmp_path / "dst", bits=16)
    ordinary = ordinary_model(decoded)
    modules = experts_modules(ordinary)
    for (path, expert), parameters in stored_experts(tmp_path / "dst").items():
        for name, tensor in parameters.items():
            assert torch.equal(tensor, getattr(modules[path], name)[expert]), (path, expert, name)
    weights = dict(ordinary.named_parameters())
    for name, tensor in trunk_tensors(tmp_path / "dst").items():
        assert torch.equal(tensor, weights[name]), name
    model, _ = moetier.load(tmp_path / "dst", exact=True)
    with model.tiers, torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, ordinary(input_ids=IDS).logits)


@pytest.mark.usefixtures("registered")
def test_a_plan_knows_its_sizes(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--bits", "4"]) == 0
    assert "4" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "use", [moetier.load, lambda folder: convert(folder, folder.with_name("native"), bits="native")]
)
def test_without_a_kernel_it_is_not_used_as_it_is(made: tuple[Path, Path], use: Callable[[Path], object]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"weight_int8 is stored in a form that no record can hold"
    ) as error:
        use(made[0])
    assert "convert" in error.value.fix or "--bits 16" in error.value.fix


@pytest.mark.usefixtures("registered")
def test_what_it_refuses_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    toy = copytree(made[0], tmp_path / "toy")
    edit_json(toy / "config.json", quantization_config=CONFIG | {"bits": 4})
    with pytest.raises(UnsupportedModelError, match="has not 8 bits"):
        convert(toy, tmp_path / "dst")
    edit_json(toy / "config.json", quantization_config=CONFIG)
    edit_tensors(toy, lambda tensors: [tensors.pop(name) for name in [*tensors] if "q_proj.weight_exponent" in name])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_exponent is missing"):
        convert(toy, tmp_path / "dst")
