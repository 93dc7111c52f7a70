"""Files of a trunk that change under a loaded model: a small trunk is copied, a mapped one is watched."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from comparison import convert_tiny
from daemons import running_daemon
from gguf_files import mostly, tiny_weights, write_gguf
from safetensors import safe_open
from safetensors.torch import save_file
from threads import Task
from torch import nn

import moetier
from moetier.runtime.checkpoint import decoded_trunk
from moetier.runtime.checkpoint.decoded_trunk import trunk_with_records
from moetier.runtime.model import trunk_files
from moetier.runtime.model.trunk_files import TrunkFiles, mapped_bytes
from moetier.tiers.errors import StoreFormatError

IDS = torch.arange(8)[None]
TICK = 0.02  # seconds, more than the steps of a file's times


def store(folder: Path) -> tuple[Path, Path]:
    """A model, and the file of its trunk."""
    made = convert_tiny("mixtral", torch.bfloat16, folder, bits=8, trunk_bits=8)[1]
    (file,) = made.glob("trunk-*.safetensors")
    return made, file


def checkpoint(folder: Path) -> tuple[Path, Path]:
    tiny_model("mixtral", torch.bfloat16).save_pretrained(folder / "source")
    return folder / "source", folder / "source" / "model.safetensors"


def gguf_file(folder: Path) -> tuple[Path, Path]:
    path = write_gguf(folder / "model.gguf", tiny_weights("qwen3moe"), mostly("Q8_0"))
    return path, path


def split_gguf(folder: Path) -> tuple[Path, Path]:
    """The trunk is in all parts; the one that a test changes is the last."""
    (folder / "parts").mkdir()
    weights = tiny_weights("qwen3moe")
    path = write_gguf(folder / "parts" / "model.gguf", weights, mostly("Q8_0"), tensors_of_a_part=8)
    return path, max(path.parent.iterdir())


@pytest.fixture(scope="module", params=[store, checkpoint, gguf_file, split_gguf])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if "gguf" in request.param.__name__:
        pytest.importorskip("gguf")
    found: tuple[Path, Path] = request.param(tmp_path_factory.mktemp("original"))
    return found


@pytest.fixture
def places(original: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy that a test may damage: the model, and the file of its trunk."""
    model, file = original
    folder = shutil.copytree(file.parent, tmp_path / "model")
    time.sleep(TICK)
    return folder / model.name if model.is_file() else folder, folder / file.name


@contextmanager
def loaded(directory: Path, **options: Any) -> Iterator[Any]:
    model, _ = moetier.load(directory, daemon="none", **options)
    with model.tiers:
        yield model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def overwrite(file: Path, start: float = 0.5) -> None:
    """The rest of a file from a share ``start`` of it on, which begins behind the header, or at 0."""
    with file.open("r+b") as stream:
        stream.seek(int(start * file.stat().st_size))
        stream.write(bytes([1]) * (file.stat().st_size - stream.tell()))


def overwrite_all(file: Path) -> None:
    overwrite(file, 0)


def cut(file: Path) -> None:
    os.truncate(file, 4096)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_a_small_trunk_is_computed_from_memory_of_its_own(
    places: tuple[Path, Path], change: Callable[[Path], None]
) -> None:
    with loaded(places[0]) as model:
        assert mapped_bytes(model) == 0
        expected = logits(model)  # has loaded all experts that it needs
        change(places[1])
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_a_mapped_trunk_whose_file_changes_is_refused_by_name(
    places: tuple[Path, Path], change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", 0)
    with loaded(places[0]) as model:
        assert mapped_bytes(model) > 0
        logits(model)
        change(places[1])
        for compute in (logits, lambda model: model.generate(IDS, max_new_tokens=2)):
            with pytest.raises(StoreFormatError, match=f"{places[1]} was changed while it was in use") as caught:
                compute(model)
        assert f"moetier verify {places[0]}" in caught.value.fix


@pytest.mark.parametrize("original", [gguf_file, split_gguf], indirect=True)
@pytest.mark.parametrize("change", [overwrite, cut, overwrite_all])
@pytest.mark.parametrize("most", [0, trunk_files.COPIED_BYTES])
def test_a_file_that_changes_while_it_is_read_is_refused_by_name(
    places: tuple[Path, Path], change: Callable[[Path], None], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the trunk was read, and before transformers builds the model."""
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", most)

    def read_and_changed(*given: Any) -> Any:
        made = trunk_with_records(*given)
        change(places[1])
        return made

    monkeypatch.setattr(decoded_trunk, "trunk_with_records", read_and_changed)
    with pytest.raises(StoreFormatError, match=f"{places[1]} was changed while it was in use"), loaded(places[0]):
        pass
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(link.resolve()) == str(places[1])]


@pytest.mark.parametrize("most", [0, trunk_files.COPIED_BYTES])
def test_a_file_that_another_one_replaces_goes_on(
    places: tuple[Path, Path], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunk and experts are those of the old file: experts that were not in memory yet, too."""
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", most)
    with loaded(places[0]) as model:
        expected = logits(model)
    with loaded(places[0]) as model:
        other = places[1].with_name("other")
        shutil.copy(places[1], other)
        overwrite(other)
        other.replace(places[1])
        assert torch.equal(logits(model), expected)


def test_a_mapped_trunk_whose_file_is_moved_or_backed_up_goes_on(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk_files, "COPIED_BYTES", 0)
    with loaded(places[0]) as model:
        expected, found = logits(model), places[1].stat()
        os.utime(places[1], ns=(found.st_atime_ns, found.st_mtime_ns))
        assert torch.equal(logits(model), expected)
        time.sleep(TICK)
        moved = places[1].rename(places[1].with_name("moved"))
        assert torch.equal(logits(model), expected)
        time.sleep(TICK)
        overwrite(moved)
        os.utime(moved, ns=(found.st_atime_ns, found.st_mtime_ns))
        with pytest.raises(StoreFormatError, match=f"{places[1]} was changed while it was in use"):
            logits(model)


def test_clients_of_a_daemon_share_the_mapping(tmp_path: Path) -> None:
    directory, _ = store(tmp_path)
    with running_daemon(directory, folder=tmp_path / "daemon"):
        model, _ = moetier.load(directory, daemon=str(tmp_path / "daemon"))
        with model.tiers:
            assert mapped_bytes(model) > 0


def test_copies_of_one_matrix_and_its_transpose_are_what_they_were(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(16.0).reshape(4, 4)}, tmp_path / "file")
    files = TrunkFiles(tmp_path, [tmp_path / "file"])
    with safe_open(tmp_path / "file", "pt") as opened:
        weight = opened.get_tensor("weight")
    model = nn.Module()
    for name, tensor in {"one": weight, "tied": weight, "turned": weight.T}.items():
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    assert mapped_bytes(model) == 3 * weight.nbytes
    files.finish_load(model, is_shared=False)
    assert mapped_bytes(model) == 0
    assert torch.equal(model.one, weight)
    assert torch.equal(model.turned, weight.T)
    assert model.tied.data_ptr() == model.one.data_ptr()


def test_a_check_of_files_that_another_thread_closes_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor's number is another file's at once."""
    for name in ("file", "other"):
        (tmp_path / name).write_text(name)
    other, fstat = os.open(tmp_path / "other", os.O_RDONLY), os.fstat
    for reused in (False, True):
        files = TrunkFiles(tmp_path, [tmp_path / "file"])

        def closed_meanwhile(descriptor: int, files: TrunkFiles = files, reused: bool = reused) -> os.stat_result:
            monkeypatch.setattr(os, "fstat", fstat)
            Task(files.close).result()
            if reused:
                os.dup2(other, descriptor)
            try:
                return fstat(descriptor)
            finally:
                if reused:
                    os.close(descriptor)

        monkeypatch.setattr(os, "fstat", closed_meanwhile)
        files.check()
        files.check()
    os.close(other)
