"""Whose experts a model computes with; and that its outputs don't depend on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import convert_tiny, smallest_ram
from daemons import DaemonProcess, running_daemon
from prepared import Prepared
from readers import PATIENCE
from threads import Task, wait_until
from transformers import AutoModelForCausalLM

import moetier
from moetier.runtime.client import spread
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.tier import DaemonTier
from moetier.runtime.config import TierConfig
from moetier.runtime.daemon.control_server import ControlServer, Welcome
from moetier.runtime.wire.address import DEFAULT_NAME, Credentials, DaemonCard, ServedModel, make_folder
from moetier.tiers.errors import ArenaError, BudgetError, ClosedError, ConfigError, UnavailableError, UnknownModelError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest, store_folder

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_tiny("mixtral", torch.bfloat16, tmp_path_factory.mktemp("mixtral"))[1]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of another model."""
    return convert_tiny("gpt_oss", torch.bfloat16, tmp_path_factory.mktemp("gpt_oss"))[1]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where daemons are looked for."""
    folder = tmp_path / "runtime" / "moetier"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder.parent))
    return folder


@pytest.fixture
def daemon(directory: Path, runtime: Path) -> Iterator[DaemonProcess]:
    """At the smallest budget: nearly everything is missed, and what is found may be replaced at any time."""
    with running_daemon(directory, ram=smallest_ram(directory), folder=runtime / DEFAULT_NAME) as running:
        yield running


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    """Logits of a prefill, and the tokens and logits of some decode steps."""
    found = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [model(IDS).logits, found.sequences, *found.logits]


@pytest.fixture
def expected(directory: Path) -> list[torch.Tensor]:
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers:
        assert isinstance(model.tiers.host, HostTier)
        assert model.tiers.where == "this process"
        return outputs(model)


def test_a_running_daemon_of_this_very_store_is_found(
    directory: Path, daemon: DaemonProcess, expected: list[torch.Tensor]
) -> None:
    model, _ = moetier.load(directory)
    with model.tiers:
        assert isinstance(model.tiers.host, DaemonTier)
        assert model.tiers.where == f"the daemon {daemon.folder}"
        assert all(map(torch.equal, outputs(model), expected))
        assert daemon.stats().requests > 0
        assert model.tiers.host.stats().bytes_in == 0, "nothing was read here"


def test_what_has_no_effect_where_a_daemon_is_found_is_reported_once(
    scripts: Prepared, directory: Path, daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has configured no logging sees it too."""
    code = "import moetier, sys; moetier.load(sys.argv[1], ram='50%', policy='lru', learn=True)[0].tiers.close()"
    result = scripts.run(code, directory)
    said = [line for line in result.stderr.splitlines() if "effect" in line]
    assert said == [
        f"Without effect: `ram` and `policy` and `learn`, because the experts are those of the daemon {daemon.folder}. "
        'Give these options to the daemon, or set `daemon` to "none".'
    ]
    for options, expected in (({"learn": True}, ["`learn`"]), ({"policy": "lrfu"}, []), ({"device_memory": None}, [])):
        caplog.clear()
        with caplog.at_level("WARNING"):
            moetier.load(directory, **options)[0].tiers.close()
        assert [record.getMessage().split()[2].rstrip(",") for record in caplog.records] == expected
    daemon.kill()
    with caplog.at_level("WARNING"):
        moetier.load(directory, policy="lru")[0].tiers.close()
    assert caplog.records == [], "it has an effect"


def test_plain_from_pretrained_finds_it_too(
    directory: Path, daemon: DaemonProcess, expected: list[torch.Tensor]
) -> None:
    moetier.register()
    model = AutoModelForCausalLM.from_pretrained(directory)
    with model.tiers:
        assert isinstance(model.tiers.host, DaemonTier)
        assert all(map(torch.equal, outputs(model), expected))


def test_without_a_daemon_of_this_store_the_experts_are_this_process_s(
    directory: Path, other: Path, runtime: Path
) -> None:
    with running_daemon(other, folder=runtime / "another") as running:
        for keep in (True, False):
            if not keep:
                running.kill()  # its files stay behind
            model, _ = moetier.load(directory)
            with model.tiers:
                assert isinstance(model.tiers.host, HostTier)


def test_where_all_experts_fit_the_last_half_is_read_without_being_asked_for(directory: Path) -> None:
    model, _ = moetier.load(directory, daemon=None)
    with model.tiers as tiers:
        asked = 0
        for number, block in enumerate(tiers.manifest.blocks):
            keys = [ExpertKey(number, expert) for expert in range(-(-block.experts // 2))]
            asked += len(list(tiers.host.acquire(keys)))
        wait_until(lambda: tiers.host.stats().ready == tiers.manifest.record_count)
        found = tiers.host.stats()
        assert (found.misses, found.warmed) == (asked, tiers.manifest.record_count - asked)
        assert found.bytes_in == tiers.manifest.stored_bytes


def test_a_killed_daemon_s_files_lead_nowhere(directory: Path, daemon: DaemonProcess) -> None:
    daemon.kill()
    model, _ = moetier.load(directory)
    with model.tiers:
        assert isinstance(model.tiers.host, HostTier)
    with pytest.raises(UnavailableError, match="No daemon runs in"):
        moetier.load(directory, daemon=str(daemon.folder))


def test_one_that_is_full_is_reported_and_one_that_is_gone_not(
    scripts: Prepared, directory: Path, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has configured no logging sees it too."""
    with running_daemon(directory, folder=runtime / DEFAULT_NAME, extra=["--max-clients", "1"]) as daemon:
        first, _ = moetier.load(directory)
        with first.tiers:
            code = "import moetier, sys; print(moetier.load(sys.argv[1])[0].tiers.where)"
            second = scripts.run(code, directory)
            assert second.stdout == "this process\n"
            assert second.stderr.splitlines()[-1] == (
                f"The daemon {daemon.folder} serves this store, but is not used: "
                "The daemon has 1 client, the most that it accepts. Restart it with a higher --max-clients."
            )
            with running_daemon(directory, folder=runtime / "other") as other:  # another one does
                third = scripts.run(code, directory)
                assert third.stdout == f"the daemon {other.folder}\n"
                assert "not used" not in third.stderr
        daemon.kill()
        with caplog.at_level("WARNING"):
            moetier.load(directory)[0].tiers.close()
        assert caplog.records == []


def test_one_whose_arena_this_version_does_not_know_is_not_used(directory: Path, runtime: Path) -> None:
    manifest = read_manifest(store_folder(directory))
    folder = runtime / DEFAULT_NAME
    make_folder(folder)
    model = ServedModel(manifest.model, manifest.digest, str(directory), 0)
    DaemonCard(os.getpid(), "99", 0.0, (model,)).write(folder)

    def register(session: str, digest: str | None, pid: int) -> Welcome:
        return Welcome(manifest.model, dict.fromkeys(manifest.layouts, 3), os.memfd_create("other"))

    server = ControlServer(folder, register=register, unregister=lambda session: None, max_clients=2, version="99")
    try:
        found, _ = moetier.load(directory)
        with found.tiers:
            assert isinstance(found.tiers.host, HostTier)
        with pytest.raises(ArenaError):
            moetier.load(directory, daemon=DEFAULT_NAME)
    finally:
        server.close()


def test_closing_does_not_wait_for_daemons_that_stand_still(
    directory: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it waits for the reads that have begun: these end."""
    monkeypatch.setattr(spread, "RemoteStore", partial(RemoteStore, timeout=3 * PATIENCE))
    bare = tmp_path / "bare"
    shutil.copytree(directory, bare, ignore=shutil.ignore_patterns("c"))
    with running_daemon(directory, folder=runtime / "a") as a, running_daemon(directory, folder=runtime / "b") as b:
        model, _ = moetier.load(bare, daemon="a,b", ram=smallest_ram(directory))
        for running in (a, b):
            os.kill(running.pid, signal.SIGSTOP)
        model.tiers.host.prefetch(0, [ExpertKey(0, 0)])
        task = Task(lambda: list(model.tiers.host.acquire([ExpertKey(1, 0)])))
        wait_until(lambda: model.tiers.host.stats().misses == 1)
        began = time.monotonic()
        model.tiers.close()
        assert time.monotonic() - began < PATIENCE, "a read would wait for three times as long"
        with pytest.raises((ClosedError, UnavailableError)):
            task.result()


def test_one_that_is_named_must_serve_it(directory: Path, other: Path, daemon: DaemonProcess) -> None:
    model, _ = moetier.load(directory, daemon=DEFAULT_NAME)
    with model.tiers:
        assert isinstance(model.tiers.host, DaemonTier)
    with pytest.raises(UnknownModelError, match="does not serve the store"):
        moetier.load(other, daemon=DEFAULT_NAME)


def test_a_mapped_daemon_needs_no_budget_here(
    directory: Path, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="holds the experts in its own memory"):
        moetier.load(directory, ram="1MiB", daemon=DEFAULT_NAME)

    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("Nothing is free.", "Free some.")

    monkeypatch.setattr("moetier.runtime.model.budgets.budget_for", refuse)
    model, _ = moetier.load(directory)
    model.tiers.close()
    with pytest.raises(BudgetError):
        moetier.load(directory, daemon=None)


def test_several_daemons_hold_a_share_each(
    directory: Path, runtime: Path, expected: list[torch.Tensor], tmp_path: Path
) -> None:
    """Also with a directory that has no records of its own; one is killed in the middle."""
    trunk_only = tmp_path / "trunk only"
    shutil.copytree(directory, trunk_only, ignore=lambda folder, names: ["c"] if "c" in names else [])
    assert (trunk_only / GROUP / METADATA).exists()
    with running_daemon(directory, folder=runtime / "a") as a, running_daemon(directory, folder=runtime / "b") as b:
        model, _ = moetier.load(trunk_only, daemon="a,b", ram=smallest_ram(directory))
        with model.tiers:
            assert isinstance(model.tiers.host, HostTier)
            assert str(a.folder) in model.tiers.where
            assert all(map(torch.equal, outputs(model), expected))
            shares = [running.stats().fetches for running in (a, b)]
            assert min(shares) > 0
            b.kill()
            assert all(map(torch.equal, outputs(model), expected))
            assert a.stats().fetches > shares[0]


def test_a_config_can_name_no_daemon(directory: Path, tmp_path: Path) -> None:
    """It may come from anywhere: it must not make a process connect to some other host."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_bytes())
    config["quantization_config"]["daemon"] = "elsewhere:7070"
    (copy / "config.json").write_text(json.dumps(config))
    moetier.register()
    with pytest.raises(ConfigError, match="does not know: 'daemon'"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("daemon", "cause"),
    [
        ("a:b:c", "not the address"),
        ("", "not the address"),
        ("a,a", "twice"),
        ("a,", "comma without a daemon"),
        ("h:99999", "not the address"),
    ],
)
def test_what_is_no_daemon(daemon: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        TierConfig.of(daemon=daemon)


@pytest.mark.parametrize("daemon", [False, 7070, Path("/run/moetier"), ["a", "b"]])
def test_what_is_no_text(daemon: Any) -> None:
    with pytest.raises(ConfigError, match="`daemon` is"):
        TierConfig.of(daemon=daemon)


@pytest.mark.parametrize("daemon", [None, "none", "auto", "default", "a,b"])
def test_credentials_without_a_daemon(daemon: str | None, tmp_path: Path) -> None:
    """A token that is given and shown to nobody is a mistake."""
    for credentials in (Credentials(token_file=tmp_path), Credentials(insecure=True)):
        with pytest.raises(ConfigError, match="`daemon` names none"):
            TierConfig.of(daemon=daemon, credentials=credentials)
        assert TierConfig.of(daemon="a,host:1", credentials=credentials).credentials == credentials


def test_credentials_that_can_t_be_used(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        moetier.load(directory, daemon="localhost:1", credentials=Credentials(token_file=tmp_path / "none"))


def test_a_process_without_a_daemon_imports_no_grpc(scripts: Prepared, directory: Path) -> None:
    code = "import moetier, sys; moetier.load(sys.argv[1])[0].tiers.close(); print('grpc' in sys.modules)"
    assert scripts.run(code, directory).stdout == "False\n"
