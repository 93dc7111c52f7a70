"""``FormatTests``: what every format of checkpoints must do, as tests.

For a format that is in the registry, ``quantization`` and ``quantise`` are enough:

    from moetier.testing import FormatTests

    class TestMyFormat(FormatTests):
        quantization: ClassVar = {"quant_method": "mine"}

        def quantise(self, weight):
            ...  # return the tensors of a weight, and the weight that they mean
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import moetier
from moetier.runtime.checkpoint.safetensors_folder import INDEX, WEIGHTS, open_safetensors
from moetier.runtime.stores.registry import open_store
from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.quant.codec import sections
from moetier.tools.convert.api import convert
from moetier.tools.convert.conversion import Conversion
from moetier.tools.convert.options import Options
from moetier.tools.plan.choices import open_choices

# transformers renames the tensors of Mixtral when it loads a checkpoint, and keeps the names of Qwen3-MoE
CONFIGS: dict[str, dict[str, int]] = {
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8},
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8},
}
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
Q_PROJ = "model.layers.0.self_attn.q_proj"
IDS = torch.randint(2, 250, (1, 7), generator=torch.Generator().manual_seed(3))


class Checkpoints(NamedTuple):
    """A checkpoint of a format, and one of 16 bits with the same weights."""

    quantised: Path
    decoded: Path
    modules: Mapping[str, tuple[str, ...]]  # of the quantised weights: the names of their tensors, by their paths

    @property
    def expert(self) -> str:
        """Path of a quantised matrix of an expert in the middle of its block."""
        return next(path for path in self.modules if "layers.1." in path and ".experts.3." in path)

    @property
    def logits(self) -> Tensor:
        """Logits of IDS, [1, tokens, vocabulary], as transformers computes them with the decoded weights."""
        load = transformers.AutoModelForCausalLM.from_pretrained
        return logits_of(load(self.decoded, experts_implementation="eager"))


class FormatTests:
    """The contract of ``Format`` (``moetier.runtime.formats.registry``), as tests, with models of two types."""

    quantization: ClassVar[Mapping[str, Any]]
    """The quantization_config in config.json."""

    is_used_as_it_is: ClassVar[bool] = False
    """Whether ``moetier.load`` and ``--bits native`` take experts as the checkpoint stores them."""

    is_native: ClassVar[bool] = False
    """Whether ``--bits native`` keeps their codes, scales and zero points, though ``moetier.load`` refuses them."""

    needed: ClassVar[Collection[str] | None] = None
    """Names of the tensors without which a module is refused; None: all that ``quantise`` returns."""

    def quantise(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Quantise a weight in bfloat16, [rows, columns], whose columns are a multiple of 64.

        Returns its tensors, by their names after the path of the module, such as "codes" for
        "model.layers.0.self_attn.q_proj.codes", and the weight that they mean, in bfloat16. The first is one that only
        quantised modules have.
        """
        raise NotImplementedError

    def is_quantised(self, name: str) -> bool:
        """Return whether the weight ``name`` is quantised. By default, those of experts and of attention are."""
        return ".experts." in name or re.search(r"[qkvo]_proj\.weight$", name) is not None

    @pytest.fixture(scope="class", params=sorted(CONFIGS))
    @classmethod
    def checkpoints(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
        """The checkpoints of one type of models."""
        folder = tmp_path_factory.mktemp(request.param)
        decoded, quantised = folder / "decoded", folder / "quantised"
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(request.param, **SIZES, **CONFIGS[request.param])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(decoded)
        copytree(decoded, quantised)
        suite, modules = cls(), dict[str, tuple[str, ...]]()
        plain = load_file(decoded / WEIGHTS)
        stored: dict[str, Tensor] = {}
        for name, weight in plain.items():
            if suite.is_quantised(name):
                path = name.removesuffix(".weight")
                tensors, plain[name] = suite.quantise(weight)
                modules[path] = tuple(tensors)
                stored |= {f"{path}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}
            else:
                stored[name] = weight
        save_file(plain, decoded / WEIGHTS, {"format": "pt"})
        save_file(stored, quantised / WEIGHTS, {"format": "pt"})
        told = json.loads((quantised / "config.json").read_text()) | {"quantization_config": dict(cls.quantization)}
        (quantised / "config.json").write_text(json.dumps(told))
        return Checkpoints(quantised, decoded, modules)

    def test_a_conversion_to_16_bits_keeps_every_value(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        for source in checkpoints[:2]:
            convert(source, tmp_path / source.name, bits=16)
        for tensors_in in (trunk_in, experts_in):
            made, wanted = (tensors_in(tmp_path / source.name) for source in checkpoints[:2])
            assert made.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(made[name], tensor), name
        assert torch.equal(logits_in(tmp_path / "quantised"), checkpoints.logits)

    def test_a_plan_has_the_sizes_of_the_decoded_checkpoint(self, checkpoints: Checkpoints) -> None:
        made, wanted = (
            {
                (choice.bits, choice.trunk_bits): (choice.disk_bytes, choice.trunk_bytes)
                for choice in open_choices(folder).choices
                if not choice.native
            }
            for folder in checkpoints[:2]
        )
        assert made == wanted

    def test_experts_are_used_as_they_are_or_refused(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        if self.is_used_as_it_is:
            assert torch.equal(logits_in(checkpoints.quantised), checkpoints.logits)
        else:
            with pytest.raises(UnsupportedModelError) as error:
                moetier.load(checkpoints.quantised, daemon="none")
            assert "moetier convert" in error.value.fix
        if self.is_used_as_it_is or self.is_native:
            convert(checkpoints.quantised, tmp_path / "native", bits="native")
            assert torch.equal(logits_in(tmp_path / "native"), checkpoints.logits)
            return
        with pytest.raises(UnsupportedModelError) as error:
            convert(checkpoints.quantised, tmp_path / "native", bits="native")
        assert "--bits 16" in error.value.fix

    def test_a_conversion_says_that_it_quantises_anew(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        """And which option does not."""
        opened, is_native = open_safetensors(checkpoints.quantised), self.is_used_as_it_is or self.is_native
        keeps = "--bits native keeps them as they are" if is_native else "--bits 16 keeps their values"
        for bits in (8, 4, 3, 2, 16):
            lines = " ".join(Conversion.plan(opened, tmp_path / "dst", Options(bits=bits)).announce())
            assert (f"quantised already, with {opened.quantised_with}, and lose quality" in lines) == (bits < 16)
            assert (keeps in lines) == (bits < 16)

    def test_a_module_without_one_of_its_tensors_is_named(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        """The first tensor of a module leaves the others behind."""
        for path in (Q_PROJ, checkpoints.expert):
            for leaf in self.needed or checkpoints.modules[path]:
                folder = edited(checkpoints, tmp_path / "src", {f"{path}.{leaf}": None})
                with pytest.raises(CheckpointError, match=re.escape(f"{path}.")):
                    convert(folder, tmp_path / "dst", bits=16)

    def test_a_weight_that_is_there_twice_is_refused(self, checkpoints: Checkpoints, tmp_path: Path) -> None:
        for path in (Q_PROJ, checkpoints.expert):
            if "weight" in checkpoints.modules[path]:
                pytest.skip("the weight is one of the format's own tensors")
            plain = load_file(checkpoints.decoded / WEIGHTS)[f"{path}.weight"]
            folder = edited(checkpoints, tmp_path / "src", {f"{path}.weight": plain})
            with pytest.raises(CheckpointError, match=re.escape(f"{path}.weight")):
                convert(folder, tmp_path / "dst", bits=16)

    def test_rows_are_read_apart(self, checkpoints: Checkpoints) -> None:
        weights, sources = load_file(checkpoints.decoded / WEIGHTS), open_safetensors(checkpoints.quantised).format
        tensors = sources.sources("bfloat16")
        for path in (Q_PROJ, checkpoints.expert):
            tensor, whole = tensors[f"{path}.weight"], weights[f"{path}.weight"]
            rows = whole.shape[0]
            assert (tensor.shape, tensor.dtype) == (tuple(whole.shape), "bfloat16")
            assert torch.equal(tensor.read(), whole)
            assert torch.equal(tensor.read(5), whole[5:])
            for first, count in ((0, 1), (3, 2), (rows - 1, 1), (0, 0), (rows, 0), (0, rows)):
                assert torch.equal(tensor.read(first, count), whole[first : first + count])


def edited(checkpoints: Checkpoints, folder: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """Copy the quantised checkpoint to ``folder`` with some tensors changed; None removes one. Return the folder."""
    copytree(checkpoints.quantised, folder, dirs_exist_ok=True)
    tensors = {**load_file(checkpoints.quantised / WEIGHTS), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    return folder


def trunk_in(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a model directory's trunk."""
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def experts_in(folder: Path) -> dict[str, Tensor]:
    """Read the parameters of a model directory's experts of 16 bits."""
    found: dict[str, Tensor] = {}
    with open_store(folder) as store:
        for block, entry in enumerate(store.manifest.blocks):
            layout = store.manifest.layout(block)
            for key in (ExpertKey(block, expert) for expert in range(entry.experts)):
                slot = mmap.mmap(-1, layout.slot_bytes)
                store.read_into(key, memoryview(slot))
                parameters = sections(torch.frombuffer(slot, dtype=torch.uint8), layout)
                found |= {f"{key} {name}": tensor for name, tensor in parameters.items()}
    return found


def logits_in(folder: Path) -> Tensor:
    """Load a folder over the tiers, and return the logits of IDS, [1, tokens, vocabulary]."""
    model, _ = moetier.load(folder, exact=True, daemon="none")
    with model.tiers:
        return logits_of(model)


def logits_of(model: Any) -> Tensor:
    """Return a model's logits of IDS, [1, tokens, vocabulary]."""
    with torch.no_grad():
        made: Tensor = model(input_ids=IDS).logits
    return made
