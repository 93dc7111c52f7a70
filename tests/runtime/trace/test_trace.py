from __future__ import annotations

import io
import itertools
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS

from moetier.runtime.trace.trace import NO_EXPERT, Trace
from moetier.tiers.errors import ConfigError, TargetError

TRACES = ASSETS / "traces"


def small(**changes: Any) -> Trace:
    """Three tokens in two sequences, two blocks of three and four experts, top 2."""
    parts: dict[str, Any] = {
        "experts": np.array([[[0, 1], [3, 0]], [[2, NO_EXPERT], [1, 2]], [[1, 2], [NO_EXPERT, NO_EXPERT]]]),
        "offsets": (0, 2, 3),
        "num_experts": (3, 4),
        "n_prefill": (1, 1),
        "lookaheads": (1,),
        "predictions": np.array([[[[NO_EXPERT], [1]], [[NO_EXPERT], [2]], [[NO_EXPERT], [0]]]]),
    }
    return Trace(**parts | changes)


def same(one: Trace, other: Trace) -> bool:
    return all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b
        for field in fields(Trace)
        for a, b in [(getattr(one, field.name), getattr(other, field.name))]
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Of any shape, with any of its parts left out."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, blocks, k = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    counts = draw(st.lists(st.sampled_from([3, 8, 254, 255, 256, 300]), min_size=blocks, max_size=blocks))

    def ids(*shape: int) -> Any:
        # [*shape, B, k]
        found = np.stack([random.random((*shape, count)).argsort(-1)[..., :k] for count in counts], axis=-2)
        found[random.random(found.shape) < 0.1] = NO_EXPERT
        return found

    def halves(*shape: int) -> Any:
        return random.normal(size=shape).astype(np.float16)

    def maybe(value: Any, nothing: Any = None) -> Any:
        return value if draw(st.booleans()) else nothing

    cuts = draw(st.sets(st.integers(1, tokens - 1))) if tokens > 1 else set()
    offsets = (0, *sorted(cuts), tokens)
    lookaheads = tuple(draw(st.permutations(range(4)))[: draw(st.integers(0, 2))])
    ahead = len(lookaheads)
    return Trace(
        experts=ids(tokens),
        offsets=offsets,
        num_experts=tuple(counts),
        n_prefill=maybe(tuple(b - a for a, b in itertools.pairwise(offsets)), ()),
        weights=maybe(halves(tokens, blocks, k)),
        probabilities=maybe(halves(tokens, blocks, max(counts))),
        token_ids=maybe(random.integers(0, 2**31 - 1, tokens)),
        pieces=maybe(tuple(draw(st.sampled_from(["", " a", "è", "\n", "🦉"])) for _ in range(tokens)), ()),
        lookaheads=lookaheads,
        predictions=ids(ahead, tokens) if ahead else None,
        prediction_probabilities=maybe(halves(ahead, tokens, blocks, k)) if ahead else None,
        model=draw(st.sampled_from(["", "who/what"])),
        digest=draw(st.sampled_from(["", "ab" * 32])),
        blocks=maybe(tuple(f"layers.{block}" for block in range(blocks)), ()),
    )


@settings(max_examples=100, deadline=None)
@given(trace=traces())
def test_it_is_read_as_it_was_written(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("trace")
    trace.save(folder / "T.npz")
    assert same(Trace.load(folder / "T.npz"), trace)
    Trace.load(folder / "T.npz").save(folder / "again.npz")
    assert (folder / "again.npz").read_bytes() == (folder / "T.npz").read_bytes()


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.npz")), ids=lambda path: path.stem)
def test_traces_of_real_models(path: Path, tmp_path: Path) -> None:
    trace = Trace.load(path)
    with np.load(path) as raw:
        ids = raw["experts"].astype(int)  # none has 255 experts: 255 is none
        assert np.array_equal(trace.experts, np.where(ids == 255, NO_EXPERT, ids))
        assert trace.top_k == raw["top_k"]
        assert set(trace.num_experts) == {int(raw["num_experts"])}
        assert trace.offsets == tuple(raw["offsets"])
        assert [len(tokens) for tokens in trace.sequences] == np.diff(raw["offsets"]).tolist()
        if "weights" in raw.files:
            assert np.array_equal(trace.weights, raw["weights"])
    trace.save(tmp_path / "T.npz")
    assert same(Trace.load(tmp_path / "T.npz"), trace)


def test_nothing_in_it_changes() -> None:
    mine = np.zeros((1, 1, 1), np.int16)
    trace = Trace(experts=mine, offsets=(0, 1), num_experts=(2,))
    mine[:] = 1
    assert trace.experts.tolist() == [[[0]]]
    with pytest.raises(ValueError, match="read-only"):
        trace.experts[0] = 1


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="can't be written"):
        small().save(tmp_path / "nowhere" / "T.npz")
    (tmp_path / "T.npz").write_text("mine")
    small().save(tmp_path / "T.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["T.npz"]
    assert same(Trace.load(tmp_path / "T.npz"), small())


FAULTS: dict[str, dict[str, Any]] = {
    "experts is not": {"experts": np.zeros((3, 2), int)},
    "experts has a wrong type": {"experts": np.zeros((3, 2, 1))},
    "experts is out of range": {"experts": np.full((3, 2, 1), 1 << 15)},
    "experts names experts that the model does not have": {"experts": np.full((3, 2, 1), 3)},
    "experts names an expert twice": {"experts": np.zeros((3, 2, 2), int)},
    "offsets do not divide": {"offsets": (0, 2)},
    "num_experts does not have one number for each": {"num_experts": (4,)},
    "num_experts is out of range": {"num_experts": (0, 4)},
    "weights does not have the shape": {"weights": np.zeros((3, 2, 1), np.float16)},
    "weights has numbers that are not finite": {"weights": np.full((3, 2, 2), np.inf)},
    "probabilities does not have the shape": {"probabilities": np.zeros((3, 2, 3))},
    "token_ids does not have the shape": {"token_ids": np.zeros(2, int)},
    "pieces does not have one": {"pieces": ("a",)},
    "blocks does not have one path": {"blocks": ("a",)},
    "n_prefill does not have one": {"n_prefill": (1,)},
    "n_prefill is more": {"n_prefill": (1, 2)},
    "lookaheads has a negative number or one twice": {"lookaheads": (1, 1)},
    "only one of predictions and lookaheads": {"lookaheads": ()},
    "predictions does not have the shape": {"lookaheads": (1, 2)},
    "predictions names experts": {"predictions": np.full((1, 3, 2, 1), 3)},
    "prediction_probabilities does not have the shape": {"prediction_probabilities": np.zeros((1, 3, 2, 2))},
    "prediction_probabilities without": {
        "lookaheads": (),
        "predictions": None,
        "prediction_probabilities": np.zeros((1, 3, 2, 1)),
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_contradict_each_other_are_refused(fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        small(**FAULTS[fault])
    assert small().tokens == 3


def write(path: Path, **changes: Any) -> Path:
    """A file whose arrays are those of a trace, but for ``changes``; None leaves one out."""
    small().save(path)
    with np.load(path) as raw:
        arrays = {name: raw[name] for name in raw.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"experts": None}, "lacks experts"),
        ({"top_k": np.int64(3)}, "top_k is not the last dimension of experts"),
        ({"offsets": np.array([0.0, 3.0])}, "offsets does not consist of whole numbers"),
        ({"offsets": np.array([[0, 3]])}, "offsets does not consist of whole numbers"),
        ({"blocks": np.array([1, 2])}, "blocks is not text"),
        ({"n_prefill": np.array([1])}, "n_prefill does not have one number for each"),
        ({"n_prefill": np.int64(2)}, "n_prefill is more than the tokens of a sequence"),
        ({"n_prefill": np.int64(1), "offsets": np.zeros(0, np.int64)}, "offsets do not divide"),
        ({"experts": np.zeros((3, 2, 2), np.uint8)}, "twice"),
        ({"experts": np.full((3, 2, 2), 254, np.uint8)}, "that the model does not have"),
        ({"weights": np.array([{}], object)}, "not a trace"),  # pickled
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_contradicts_its_format_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        Trace.load(write(tmp_path / "T.npz", **changes))
    assert str(tmp_path / "T.npz") in caught.value.cause
    assert "\n" not in caught.value.cause


def test_one_number_of_prompt_tokens_is_every_sequence_s(tmp_path: Path) -> None:
    assert same(Trace.load(write(tmp_path / "T.npz", n_prefill=np.int64(1))), small(n_prefill=(1, 1)))
    assert same(Trace.load(write(tmp_path / "T.npz", n_prefill=np.int64(0))), small(n_prefill=(0, 0)))


@pytest.mark.parametrize("name", ["experts", "top_k", "weights", "blocks", "n_prefill"])
@pytest.mark.parametrize("suffix", [".npy", ""])
def test_a_part_that_is_no_array_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    """numpy gives the bytes of what does not begin as its arrays do."""
    path = write(tmp_path / "T.npz", **{name: None})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name + suffix, b"\x93NUMPX plain bytes")
    with pytest.raises(ConfigError, match=f"not a trace .{name}: not a numpy array"):
        Trace.load(path)


def test_what_a_reader_does_not_know_it_leaves_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "T.npz", later=np.array([{}], object))
    assert same(Trace.load(path), small())


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, experts=np.zeros((100, 2, 1), np.uint8))
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme", "no arrays")
    for name, data in {
        "empty.npz": b"",
        "text.npz": b"a text",
        "cut.npz": whole.getvalue()[:-30],
        "array.npz": single.getvalue(),
    }.items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "objects.npz", experts=np.asarray([{}], object))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ConfigError, match="not a trace") as caught:
            Trace.load(path)
        assert "pickle" not in caught.value.cause
    with pytest.raises(ConfigError, match="can't be read"):
        Trace.load(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        Trace.load(tmp_path / "nothing.npz")


def test_a_damaged_file_is_refused_or_read_right(tmp_path: Path) -> None:
    """Every third byte. Some say nothing that is read, and an array that may be missing can lose its name."""
    path, refused = tmp_path / "T.npz", 0
    lost = (small(n_prefill=()), small(lookaheads=(), predictions=None))
    small().save(path)
    whole = path.read_bytes()
    places = range(0, len(whole), 3)
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            found = Trace.load(path)
            assert any(same(found, expected) for expected in (small(), *lost)), place
        except ConfigError:
            refused += 1
    assert refused > len(places) / 2


@pytest.mark.parametrize("counts", [(255, 255), (256, 256), (3, 300)])
def test_ids_that_a_byte_cannot_say_are_wider(tmp_path: Path, counts: tuple[int, int]) -> None:
    """With 256 experts, 255 is one of them, and not none."""
    last = np.array(counts)[:, None] - 1  # [B, 1]
    experts = np.stack([last, np.full((2, 1), NO_EXPERT)])
    trace = Trace(experts=experts, offsets=(0, 2), num_experts=counts)
    trace.save(tmp_path / "T.npz")
    with np.load(tmp_path / "T.npz") as raw:
        assert raw["experts"].dtype == (np.uint8 if max(counts) < 256 else np.int16)
        assert raw["num_experts"].ndim == (1 if len(set(counts)) > 1 else 0)
    assert np.array_equal(Trace.load(tmp_path / "T.npz").experts, experts)
