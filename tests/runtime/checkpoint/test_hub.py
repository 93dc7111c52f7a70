"""Checkpoints on a hub: what is downloaded, and what is said of a hub that refuses or is not reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import save_checkpoint, tree
from hubs import READ_SETTINGS, REVISION, Hub, cache_of, serve_hub
from prepared import MAIN, Prepared

from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.tools.convert.api import convert


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("original") / "tiny-moe")


OPEN = """
import sys
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
checkpoint = open_safetensors(sys.argv[1])
print(checkpoint.name, len(checkpoint.tensors), *checkpoint.copied)
"""


@pytest.fixture(scope="module")
def scripts(scripts: Prepared) -> Prepared:
    return scripts.extended(READ_SETTINGS)


def test_a_hub_id_is_found_in_the_cache_without_a_network(scripts: Prepared, original: Path, tmp_path: Path) -> None:
    cache_of(original, tmp_path / "hub")
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = scripts.run(OPEN, "acme/tiny-moe", environment=offline)
    assert result.stdout.split()[:2] == ["acme/tiny-moe", str(len(open_safetensors(original).tensors))], result.stderr
    result = scripts.run(OPEN, "acme/nothing", environment=offline)
    assert "CheckpointError: The hub could not be reached for a model with the id acme/nothing" in result.stderr


@pytest.mark.parametrize(
    ("name", "fix"), [("nowhere", "Check the name of the folder"), ("acme/x", "Check the name and ")]
)
def test_a_hub_that_is_not_reached(scripts: Prepared, tmp_path: Path, name: str, fix: str) -> None:
    """If the hub can't be reached, the advice depends on whether the source looks like an id or like a folder."""
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = scripts.run(MAIN, "convert", name, tmp_path / "dst", environment=unreachable)
    cause, advice = result.stderr.splitlines()[-2:]
    reached = (
        f"The hub could not be reached for a model with the id {name}, and there is no such folder: ConnectError: "
    )
    assert reached in cause
    assert advice.strip().startswith(fix)
    assert "a folder with the model's config.json and model.safetensors.index.json is enough" in advice


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Its downloads stay in one cache: each test offers a repository of its own."""
    with serve_hub({}, tmp_path_factory.mktemp("hub")) as served:
        yield served


def offer(hub: Hub, name: str, original: Path) -> dict[str, bytes]:
    """A repository with more than is wanted."""
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    files |= {"modeling_x.py": b"raise SystemExit", "tokenizer.py": b"raise SystemExit"}
    files |= {"README.md": b"card", "consolidated.safetensors": b"again", "original/model.safetensors": b"again"}
    files |= {"tokenizer.json": b"{}", "LICENSE": b"free", "pytorch_model.bin": b"pickle"}
    hub.repositories[name] = files
    return files


def test_a_hub_id_is_downloaded_but_for_code_and_pickle(hub: Hub, scripts: Prepared, original: Path) -> None:
    offer(hub, "acme/tiny-moe", original)
    result = scripts.run(OPEN, "acme/tiny-moe", environment=hub.settings)
    tensors = str(len(open_safetensors(original).tensors))
    assert result.stdout.split() == ["acme/tiny-moe", tensors, "LICENSE", "generation_config.json", "tokenizer.json"]
    wanted = {path.name for path in original.iterdir()} | {"tokenizer.json", "LICENSE"}
    assert hub.downloaded() == wanted
    assert (
        "CheckpointError: The hub did not give a model with the id acme/nothing, and"
        in scripts.run(OPEN, "acme/nothing", environment=hub.settings).stderr
    )


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("acme/code", {"auto_map": {"AutoConfig": "modeling_x.X"}}, "auto_map"),
        ("acme/dense", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "is dense"),
        ("acme/outside", {"transformers_weights": "../../x.safetensors"}, "outside itself"),
    ],
)
def test_a_hub_id_that_is_refused_costs_no_download_of_weights(
    hub: Hub, scripts: Prepared, original: Path, tmp_path: Path, name: str, changes: dict[str, object], error: str
) -> None:
    files = offer(hub, name, original)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | changes).encode()
    result = scripts.run(MAIN, "convert", name, tmp_path / "dst", environment=hub.settings)
    assert result.returncode == 1
    assert error in result.stderr
    downloaded = hub.downloaded(name)
    assert "config.json" in downloaded
    assert not [file for file in downloaded if file.endswith((".safetensors", ".py", ".bin"))]
    assert not (tmp_path / "dst").exists()


def test_a_hub_id_is_converted(hub: Hub, scripts: Prepared, original: Path, tmp_path: Path) -> None:
    offer(hub, "acme/converted", original)
    result = scripts.run(MAIN, "convert", "acme/converted", tmp_path / "dst", "--fast", environment=hub.settings)
    assert result.returncode == 0, result.stderr
    convert(original, tmp_path / "local", fast=True)
    made, local = tree(tmp_path / "dst"), tree(tmp_path / "local")
    assert b'base_model: "acme/converted"' in made.pop("README.md")
    del local["README.md"]
    assert (made.pop("LICENSE"), made.pop("tokenizer.json")) == (b"free", b"{}")
    assert json.loads(made.pop("origin.json")) == {"id": "acme/converted", "revision": REVISION}
    manifest = made.pop("experts.zarr/zarr.json")
    assert json.loads(manifest)["attributes"]["moetier"]["model"] == "acme/converted"
    assert made == {name: data for name, data in local.items() if name != "experts.zarr/zarr.json"}


@pytest.mark.parametrize(("start", "refusal"), [("/api", (403, "GatedRepo")), ("/api", (404, ""))])
def test_secrets_in_the_hubs_endpoint_are_not_printed(
    scripts: Prepared, tmp_path: Path, start: str, refusal: tuple[int, str]
) -> None:
    with serve_hub({}, tmp_path / "cache") as hub:
        hub.refused[start] = refusal
        secret = hub.settings | {"HF_ENDPOINT": hub.settings["HF_ENDPOINT"].replace("://", "://user:SECRET@")}
        result = scripts.run(MAIN, "plan", "acme/x", environment=secret)
        assert hub.asked
    assert "acme/x" in result.stderr
    assert "SECRET" not in result.stdout + result.stderr
