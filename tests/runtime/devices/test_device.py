"""The registry of devices: what the option ``device`` takes, and a device that one line adds."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from places import ROOT
from toy_device import Toy

import moetier
from moetier.runtime.config import TierConfig
from moetier.runtime.device_names import DEVICES, check_device
from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.devices.cuda import Cuda
from moetier.runtime.devices.device import (
    ComputeDevice,
    Diagnosis,
    MemoryDevice,
    chosen_device,
    device_at,
    device_class,
)
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.machine.memory import Available
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.errors import BudgetError, ConfigError
from moetier.tools.doctor import machine


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register Toy, as a line of DEVICES would."""
    monkeypatch.setitem(DEVICES, "toy", "toy_device:Toy")


@pytest.mark.parametrize("name", DEVICES)
def test_every_registered_class_keeps_the_contract(name: str) -> None:
    found = device_class(name)
    assert issubclass(found, ComputeDevice)
    assert found.title
    assert found.has_memory == issubclass(found, MemoryDevice)
    assert not inspect.isabstract(found)
    assert all(isinstance(each, Diagnosis) for each in found.diagnose())


def test_only_its_own_module_names_cuda() -> None:
    named = [
        str(path.relative_to(ROOT))
        for folder in ("tiers", "runtime", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "cuda" in path.read_text().lower()
    ]
    assert sorted(named) == ["runtime/device_names.py", "runtime/devices/cuda.py"]


@pytest.mark.parametrize("option", ["auto", "cpu", "cuda", "cuda:1"])
def test_names_of_devices_are_taken_as_they_are(option: str) -> None:
    assert check_device(option) == option


@pytest.mark.parametrize("option", ["", "gpu", "cpu:0", "auto:0", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:1:2"])
def test_other_names_are_refused(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_device(option)
    assert caught.value.fix == 'Give "auto", "cpu", "cuda" or "cuda:N".'


def test_a_trunk_is_computed_where_it_is() -> None:
    assert type(device_at(torch.device("cpu"))) is Cpu
    device = device_at(torch.device("cuda:1"), "cuda")
    assert type(device) is Cuda
    assert device.torch_device == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="The trunk is on meta"):
        device_at(torch.device("meta"))


@pytest.mark.usefixtures("toy")
def test_a_device_of_one_line_loads_a_model_and_generates_the_same_tokens(tinymix_4bit: Path) -> None:
    """Three quarters of the experts have no slot, so records are copied to the toy and evicted there."""
    texts = []
    for options in ({"device": "cpu"}, {"device": "toy", "device_memory": "4MiB"}):
        model, tokenizer = moetier.load(tinymix_4bit, daemon=None, exact=True, **options)
        with model.tiers:
            ids = tokenizer("Il vecchio", return_tensors="pt").input_ids
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False).tolist())
            assert isinstance(model.tiers.source, DeviceTier) == (options["device"] == "toy")
    assert texts[0] == texts[1]
    assert model.tiers.snapshot()["device"]["misses"] > 0


@pytest.mark.usefixtures("toy")
def test_a_tier_is_closed_if_its_model_cannot_be_loaded(tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = list[DeviceTier](), DeviceTier.close

    def fail(kernels: Kernels, shrink: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DeviceTier, "close", lambda tier: (closed.append(tier), close(tier)))
    monkeypatch.setattr(Kernels, "on_out_of_memory", fail)
    with pytest.raises(KeyboardInterrupt):
        moetier.load(tinymix_4bit, daemon=None, device="toy", device_memory="4MiB")
    assert closed


@pytest.mark.usefixtures("toy")
def test_a_device_of_one_line_is_chosen_checked_and_diagnosed(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(chosen_device(TierConfig.of(device="auto").device)) is Toy
    assert type(chosen_device("cpu")) is Cpu
    assert ("warn", "a toy", "Get a larger one.") in [(f.state, f.found, f.advice) for f in machine.gpus()]
    monkeypatch.setattr(Toy, "free_memory", lambda _: Available(16 << 20, "the toy"))
    with pytest.raises(BudgetError, match="the toy leaves"):
        moetier.load(tinymix_4bit, daemon=None, device="toy")
