"""A model finds its own pages again, bit for bit, and no model finds those of another."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from readers import PATIENCE

import moetier
from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.pages import page_binding
from moetier.runtime.engine.pages.page_binding import binding_of
from moetier.runtime.engine.pages.page_folder import PageOptions, entries
from moetier.runtime.engine.sequence import Request, Sampled

IDS = tuple(at * 37 % 900 + 5 for at in range(300))


def binding(directory: Path, **options: Any) -> bytes:
    model, _ = moetier.load(directory, daemon=None, **options)
    with model.tiers:
        return binding_of(model, model.tiers.manifest)


def test_a_binding_is_that_of_the_weights_the_positions_and_the_code(
    tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = moetier.load(tinymix_4bit, daemon=None)
    with model.tiers:
        manifest = model.tiers.manifest
        own = binding_of(model, manifest)
        others = {
            binding_of(model, replace(manifest, digest="0" * 64)),
            binding_of(model, replace(manifest, trunk={})),
        }
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
        others.add(binding_of(model, manifest))
    assert binding(tinymix_4bit, ram="50%", context=300, threads=1) == own, "these change no bit"
    others |= {binding(tinymix_4bit, exact=True), binding(tinymix_4bit, dtype="float32")}
    others.add(binding(tinymix_4bit, same_bits=True))
    monkeypatch.setattr(page_binding, "digest_of_code", lambda: "of another release")
    others.add(binding(tinymix_4bit))
    assert len(others - {own}) == 7


def answered(directory: Path, disk: PageOptions | None, tokens: int = len(IDS)) -> tuple[list[Sampled], int]:
    """The tokens after the first of IDS with their log probabilities, and how many tokens of the prompt were there."""
    model, _ = moetier.load(directory, daemon=None, context=1000)
    sampled, ended = list[Sampled](), threading.Event()
    with model.tiers, Engine.of(model, disk=disk) as engine:
        request = Request(IDS[:tokens], 30, {"do_sample": False, "min_new_tokens": 30}, logprobs=5)
        sequence = engine.submit(request, lambda _, token: sampled.append(token), lambda _: ended.set())
        assert ended.wait(PATIENCE)
    return sampled, sequence.cached


def test_answers_have_the_same_bits_with_pages_from_the_disk(tinymix_4bit: Path, tmp_path: Path) -> None:
    disk = PageOptions(tmp_path, 1 << 30, 1000.0)
    alone, cached = answered(tinymix_4bit, None)
    assert not cached
    assert answered(tinymix_4bit, disk, 280)[1] == 0
    assert [*entries(tmp_path)]
    again, cached = answered(tinymix_4bit, disk)
    assert cached == 256
    assert again == alone
