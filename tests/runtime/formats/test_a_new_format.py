"""A format is a module and a line in the registry (CONTRIBUTING.md): the invented toy8 and toy4 are added so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import ClassVar

import pytest
import torch
from checkpoints import edit_json
from torch import Tensor

from moetier.runtime.formats import registry
from moetier.testing import FormatTests
from moetier.testing.formats import Checkpoints
from moetier.tiers.errors import UnsupportedModelError
from moetier.tools.commands.plan import text
from moetier.tools.convert.api import convert
from moetier.tools.plan import speeds
from moetier.tools.plan.choices import open_choices
from moetier.tools.plan.forecast import plan


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The lines that the registry would have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FORMATS, "toy8", "toy8:Toy8")
        patch.setitem(registry.FORMATS, "toy4", "toy4:Toy4")
        yield


class TestToy8(FormatTests):
    quantization: ClassVar = {"quant_method": "toy8", "bits": 8}

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        exponents = (weight.float().abs().amax(1).clamp_min(2**-100) / 127).log2().ceil()
        codes = (weight.float() / exponents.exp2()[:, None]).round()
        stored = {"weight_int8": codes.to(torch.int8), "weight_exponent": exponents.to(torch.int8)}
        return stored, (codes * exponents.exp2()[:, None]).to(weight.dtype)

    def test_other_bits_are_refused(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        source = copytree(checkpoints.quantised, tmp_path / "src")
        edit_json(source / "config.json", quantization_config={"quant_method": "toy8", "bits": 4})
        with pytest.raises(UnsupportedModelError, match="has not 8 bits"):
            convert(source, tmp_path / "dst")

    def test_a_plan_says_that_experts_are_quantised_again(
        self, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("KERNEL_SECONDS", 0.0), ("UNCACHED_BYTES", 1 << 20), ("QUANTISED_WEIGHTS", 1 << 16)):
            monkeypatch.setattr(speeds, name, value)
        said = text(plan(checkpoints.quantised, bits=[8], trunk_bits=[16], disk=1.0))
        assert "quantised already, with toy8, and lose quality" in said
        assert open_choices(checkpoints.decoded).quantised_with is None

    def test_without_the_line_it_is_refused_by_name(
        self, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(registry.FORMATS, "toy8")
        with pytest.raises(UnsupportedModelError, match="quantised with toy8, which moetier can't read"):
            convert(checkpoints.quantised, tmp_path / "dst")


class TestToy4(FormatTests):
    """Its bytes lie as those of a coding that kernels multiply with."""

    quantization: ClassVar = {"quant_method": "toy4"}
    is_used_as_it_is = True

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.float().unflatten(1, (-1, 16))
        steps = (groups.abs().amax(2).clamp_min(2**-100) / 7).bfloat16()
        codes = (groups / steps.float()[:, :, None]).round().clamp(-8, 7)
        words = (codes.flatten(1).long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
        stored = {"weight_words": words.sum(2).to(torch.int32), "weight_steps": steps}
        return stored, (codes * steps.float()[:, :, None]).flatten(1).to(weight.dtype)
