"""Manifests: what is accepted, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stores import edit, make_store, read_records, without_table

from moetier.tiers.errors import StoreFormatError
from moetier.tiers.store.folder import GROUP, METADATA
from moetier.tiers.store.reader import ShardStore

MANIFEST = ("attributes", "moetier")


FIRST = (*MANIFEST, "layouts", "records", "projections", 0)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((*MANIFEST, "format"), 2, "format version 2; this version of moetier reads version 1"),
        ((*MANIFEST, "requires"), ["codebooks", "int5"], "requires codebooks, int5"),
        ((*FIRST, "bits"), 5, "bits is 5, not 16 or 8"),
        ((*FIRST, "rows"), 127, "another kernel layout"),
        ((*FIRST, "tile"), 32, "tile"),
        ((*MANIFEST, "layouts", "records", "sections", 1, "offset"), 64, "another kernel layout"),
        ((*MANIFEST, "layouts", "records", "record_bytes"), 4092, "another kernel layout"),
        ((*MANIFEST, "layouts"), {}, "no layout"),
        ((*MANIFEST, "blocks"), [], "blocks is empty"),
        ((*MANIFEST, "blocks", 1, "index"), 0, "do not have the indexes"),
        ((*MANIFEST, "blocks", 1, "path"), "model.layers.0.mlp.experts", "two blocks have the same path"),
        ((*MANIFEST, "record_checksums"), "AAAA", "record_checksums does not match digest"),
        ((*MANIFEST, "blocks", 1, "experts"), 5, "differ in their number of experts"),
        ((*MANIFEST, "blocks", 1, "top_k"), 5, r"blocks\[1\].top_k is 5, not a whole number from 1 to 4"),
        ((*MANIFEST, "blocks", 1, "array"), "../elsewhere", "no layout"),
        (MANIFEST, None, "no manifest"),
        (("attributes",), [], "has no attributes.moetier"),
    ],
)
def test_a_manifest_that_is_not_of_this_format(
    tmp_path: Path, keys: tuple[str | int, ...], value: Any, message: str
) -> None:
    make_store(tmp_path)
    edit(tmp_path / GROUP / METADATA, *keys, to=value)
    with pytest.raises(StoreFormatError, match=message):
        ShardStore.open(tmp_path)


def test_an_array_that_would_lie_outside_the_store_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path)
    path = tmp_path / GROUP / METADATA
    path.write_text(path.read_text().replace('"records"', '"../records"'))
    with pytest.raises(StoreFormatError, match="can't be the name of an array"):
        ShardStore.open(tmp_path)


def test_unknown_optional_keys_are_ignored(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    edit(tmp_path / GROUP / METADATA, *MANIFEST, "colour", to="blue")
    with ShardStore.open(tmp_path) as store:
        assert read_records(store) == records


def test_a_manifest_without_a_digest_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path)
    without_table(tmp_path)
    edit(tmp_path / GROUP / METADATA, *MANIFEST, "digest", to="")
    with pytest.raises(StoreFormatError, match="has no digest"):
        ShardStore.open(tmp_path)
