"""An open checkpoint: what its config says of quantisation, and the digest by which a conversion knows it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetier.runtime.checkpoint.containers import SAMPLE_BYTES, SAMPLE_STRIDE, Checkpoint, container_of, samples
from moetier.runtime.checkpoint.gguf_file import GgufFile
from moetier.runtime.checkpoint.safetensors_folder import SafetensorsFolder
from moetier.runtime.formats.tensors import StoredTensor
from moetier.tiers.errors import CheckpointError


def checkpoint_of(folder: Path, config: Mapping[str, Any], *tensors: StoredTensor) -> Checkpoint:
    named = {tensor.name: tensor for tensor in tensors}
    return Checkpoint("a model", folder, str(folder), ignored_code=False, config=config, tensors=named, copied=())


def test_a_file_and_a_folder_have_containers_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    assert type(container_of(tmp_path / "model.gguf")) is GgufFile
    assert type(container_of(tmp_path / "folder.gguf")) is SafetensorsFolder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None, "text_config": None}, None),
        ({"quantization_config": {"bits": 4}}, {"bits": 4}),
        ({"text_config": {"quantization_config": {"bits": 8}}}, {"bits": 8}),
        ({"quantization_config": {"bits": 4}, "text_config": {"quantization_config": {"bits": 8}}}, {"bits": 4}),
    ],
)
def test_quantisation_may_be_said_in_the_config_of_the_text(
    config: Mapping[str, Any], expected: object, tmp_path: Path
) -> None:
    assert checkpoint_of(tmp_path, config).quantization == expected


def test_a_quantisation_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The quantization_config of a model is not a JSON object"):
        _ = checkpoint_of(tmp_path, {"quantization_config": "int4"}).quantization


@pytest.mark.parametrize("nbytes", [0, 1, SAMPLE_BYTES, SAMPLE_BYTES + 1, SAMPLE_STRIDE, 2 * SAMPLE_STRIDE + 100])
def test_samples_are_in_the_tensor_and_have_both_ends(nbytes: int) -> None:
    found = samples(StoredTensor("a", "U8", (nbytes,), Path("file"), 1000))
    assert found[0][0] == 1000
    assert sum(found[-1]) == 1000 + nbytes
    assert all(size == min(nbytes, SAMPLE_BYTES) for _, size in found)
    assert len(found) == 1 + max(0, nbytes - SAMPLE_BYTES + SAMPLE_STRIDE - 1) // SAMPLE_STRIDE


def test_the_digest_tells_checkpoints_apart_but_not_by_their_folders(tmp_path: Path) -> None:
    content, tensors = os.urandom(3000), []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(content)
        tensors.append(StoredTensor("a", "U8", (2000,), tmp_path / folder / "model.safetensors", 500))
    one, two = tensors
    config = {"layers": 2}
    digest = checkpoint_of(tmp_path, config, one).digest
    assert checkpoint_of(tmp_path, config, two).digest == digest
    others = [
        replace(one, name="b"),
        replace(one, spelling="I8"),
        replace(one, shape=(20, 100)),
        replace(one, offset=501),
    ]
    assert digest not in [checkpoint_of(tmp_path, config, other).digest for other in others]
    assert checkpoint_of(tmp_path, {"layers": 3}, one).digest != digest
    two.file.write_bytes(content[:2499] + bytes([content[2499] ^ 1]) + content[2500:])
    assert checkpoint_of(tmp_path, config, two).digest != digest, "the last byte of the tensor is another"
