"""A model that a daemon serves, apart from its clients: when it computes for other hosts, and when it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from threads import wait_until

from moetier.runtime.daemon.hosted_model import HostedModel
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.errors import ConfigError, ExhaustedError, StoreError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.store.reader import ShardStore


@pytest.fixture
def host(tinymix_4bit: Path) -> Iterator[HostTier]:
    with (
        ShardStore.open(tinymix_4bit) as store,
        HostTier(store, slots=slots_for(store.manifest, store.manifest.stored_bytes)) as tier,
    ):
        yield tier


def test_a_compiler_that_cannot_be_imported_is_reported(
    host: HostTier, tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moetier.runtime.daemon.compute", None)
    model = HostedModel(host.manifest, host, tinymix_4bit, timeout=1.0)
    try:

        def is_said() -> bool:
            try:
                return not model.open_compute_calls()
            except ConfigError as error:
                return "can't compute experts" in error.cause
            except ExhaustedError:
                return False

        wait_until(is_said)
    finally:
        model.close()


def test_a_condemned_model_says_so(host: HostTier, tinymix_4bit: Path) -> None:
    model = HostedModel(host.manifest, host, tinymix_4bit, timeout=1.0)
    try:
        host.condemn(StoreError("The shards are of two conversions.", "Convert the model again."))

        def is_said() -> bool:
            try:
                return not model.open_compute_calls()
            except StoreError as error:
                return error.cause == "The shards are of two conversions."
            except ExhaustedError:
                return False

        wait_until(is_said)
    finally:
        model.close()
