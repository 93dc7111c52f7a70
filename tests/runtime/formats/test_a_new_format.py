"""A format is a module and a line in the registry (CONTRIBUTING.md): the invented toy8 and toy4 are added so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from checkpoints import edit_json, edit_tensors, ordinary_model, save_checkpoint, stored_experts, trunk_tensors
from quantised_checkpoints import quantised
from safetensors.torch import load_file
from torch import Tensor

import moetier
from moetier.runtime.formats import registry
from moetier.runtime.moe.experts import experts_modules
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tools.convert.convert import convert
from moetier.tools.main import main

IDS = torch.randint(2, 250, (1, 7), generator=torch.Generator().manual_seed(3))


def toy8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a weight [rows, columns], and the weights that they mean."""
    exponents = (weight.float().abs().amax(1).clamp_min(2**-100) / 127).log2().ceil()
    codes = (weight.float() / exponents.exp2()[:, None]).round()
    stored = {"int8": codes.to(torch.int8), "exponent": exponents.to(torch.int8)}
    return stored, (codes * exponents.exp2()[:, None]).to(weight.dtype)


def toy4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As ``toy8``."""
    groups = weight.float().unflatten(1, (-1, 16))
    steps = (groups.abs().amax(2).clamp_min(2**-100) / 7).bfloat16()
    codes = (groups / steps.float()[:, :, None]).round().clamp(-8, 7)
    words = (codes.flatten(1).long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    stored = {"words": words.sum(2).to(torch.int32), "steps": steps}
    return stored, (codes * steps.float()[:, :, None]).flatten(1).to(weight.dtype)


def save(folder: Path, quantise: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]) -> tuple[Path, Path]:
    """Save a checkpoint of an invented format, and one with the decoded weights."""
    plain = load_file(save_checkpoint(folder / "decoded", "qwen3_moe", shards=1) / "model.safetensors")
    weights = {name: quantise(plain[name]) for name in plain if quantised(name)}
    edit_tensors(
        folder / "decoded", lambda tensors: tensors.update({n: decoded for n, (_, decoded) in weights.items()})
    )
    copytree(folder / "decoded", folder / "toy")

    def pack(tensors: dict[str, Tensor]) -> None:
        for name, (stored, _) in weights.items():
            del tensors[name]
            tensors.update({f"{name}_{leaf}": tensor for leaf, tensor in stored.items()})

    edit_tensors(folder / "toy", pack)
    edit_json(folder / "toy" / "config.json", quantization_config={"quant_method": quantise.__name__, "bits": 8})
    return folder / "toy", folder / "decoded"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of toy8, and one with the decoded weights."""
    return save(tmp_path_factory.mktemp("toy8"), toy8)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "toy8", "toy8:Toy8")
    monkeypatch.setitem(registry.FORMATS, "toy4", "toy4:Toy4")


def logits(folder: Path) -> Tensor:
    model, _ = moetier.load(folder, exact=True)
    with model.tiers, torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


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
    assert torch.equal(logits(tmp_path / "dst"), ordinary(input_ids=IDS).logits)


@pytest.mark.usefixtures("registered")
def test_a_plan_knows_its_sizes(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(made[0]), "--bits", "4"]) == 0
    assert "4" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "use", [moetier.load, lambda folder: convert(folder, folder.with_name("native"), bits="native")]
)
def test_without_a_kernel_it_is_not_used_as_it_is(made: tuple[Path, Path], use: Callable[[Path], object]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"weight_int8 is stored in a way that no record can hold") as error:
        use(made[0])
    assert "convert" in error.value.fix or "--bits 16" in error.value.fix


@pytest.mark.usefixtures("registered")
def test_with_a_kernel_it_is_used_as_it_is(tmp_path: Path) -> None:
    toy, decoded = save(tmp_path, toy4)
    with torch.no_grad():
        expected = ordinary_model(decoded)(input_ids=IDS).logits
    assert torch.equal(logits(toy), expected)
    convert(toy, tmp_path / "native", bits="native")
    assert torch.equal(logits(tmp_path / "native"), expected)


@pytest.mark.usefixtures("registered")
def test_what_it_refuses_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    toy = copytree(made[0], tmp_path / "toy")
    edit_json(toy / "config.json", quantization_config={"quant_method": "toy8", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="has not 8 bits"):
        convert(toy, tmp_path / "dst")
    edit_json(toy / "config.json", quantization_config={"quant_method": "toy8", "bits": 8})
    edit_tensors(toy, lambda tensors: [tensors.pop(name) for name in [*tensors] if "q_proj.weight_exponent" in name])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_exponent is missing"):
        convert(toy, tmp_path / "dst")
