"""Trace of routing: which experts a model used for each token in each block. Files are specified in docs/traces.md."""

from __future__ import annotations

import io
import itertools
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetier.tiers.errors import ConfigError, TargetError
from moetier.tiers.store.atomic import write_durably

NO_EXPERT = -1  # stands for "no expert"
NONE_BYTE = 255  # the same in an array of bytes, which is used only if no block has an expert with this number
MAX_EXPERTS = 2**15 - 1

Ints = npt.NDArray[np.int16]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of T tokens, of one or several sequences, in B blocks, with K experts per token and block.

    Arrays are read-only. The constructor raises ValueError if fields contradict each other.
    """

    experts: Ints  # [T, B, K], NO_EXPERT if a token has fewer than K; without ``weights`` their order has no meaning
    offsets: tuple[int, ...]  # sequence i is the tokens offsets[i]:offsets[i + 1]
    num_experts: tuple[int, ...]  # number of experts of each block
    n_prefill: tuple[int, ...] = ()  # for each sequence, the number of tokens of its prompt; () if unknown
    weights: Halves | None = None  # [T, B, K], factors of the experts' outputs
    probabilities: Halves | None = None  # [T, B, E], the gates' scores of all experts; E is the largest of num_experts
    token_ids: npt.NDArray[np.int32] | None = None  # [T]
    pieces: tuple[str, ...] = ()  # for each token, its text
    lookaheads: tuple[int, ...] = ()  # [A], how many blocks ahead predictions were made
    predictions: Ints | None = None  # [A, T, B, P], P experts predicted for block b at block b - lookahead, best first
    prediction_probabilities: Halves | None = None  # [A, T, B, P]
    model: str = ""  # hub id or folder name
    digest: str = ""  # digest of the store
    blocks: tuple[str, ...] = ()  # for each block, the path of its Experts module

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            if (value := getattr(self, name)) is not None:
                value = np.asarray(value)
                _require(value.dtype.kind in ("iu" if np.dtype(dtype).kind == "i" else "f"), f"{name} has a wrong type")
                if np.dtype(dtype).kind == "i" and value.size:
                    limits = np.iinfo(dtype)
                    _require(value.min() >= limits.min and value.max() <= limits.max, f"{name} is out of range")
                value = value.astype(dtype)  # a copy, as the caller may change the original
                value.flags.writeable = False
                object.__setattr__(self, name, value)
        self._check()

    @property
    def tokens(self) -> int:
        """T: the number of tokens of all sequences."""
        return int(self.experts.shape[0])

    @property
    def block_count(self) -> int:
        """Number of blocks, B."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K: the largest number of experts of a token in one block."""
        return int(self.experts.shape[2])

    @property
    def sequences(self) -> tuple[range, ...]:
        """Token indices of each sequence."""
        return tuple(itertools.starmap(range, itertools.pairwise(self.offsets)))

    def _check(self) -> None:
        experts, offsets, counts = self.experts, self.offsets, self.num_experts
        _require(experts.ndim == 3 and min(experts.shape) > 0, "experts is not [tokens, blocks, top_k]")
        tokens, blocks, _ = experts.shape
        ascend = all(a < b for a, b in itertools.pairwise(offsets))
        _require(ascend and offsets[:1] == (0,) and offsets[-1] == tokens, "offsets do not divide the tokens")
        _require(len(counts) == blocks, "num_experts does not have one number for each block")
        _require(min(counts) > 0 and max(counts) <= MAX_EXPERTS, "num_experts is out of range")
        self._check_ids("experts", experts)
        self._check_shape("weights", experts.shape)
        self._check_shape("probabilities", (tokens, blocks, max(counts)))
        self._check_shape("token_ids", (tokens,))
        _require(len(self.pieces) in (0, tokens), "pieces does not have one text for each token")
        _require(len(self.blocks) in (0, blocks), "blocks does not have one path for each block")
        _require(len(self.n_prefill) in (0, len(offsets) - 1), "n_prefill does not have one number for each sequence")
        inside = all(0 <= n <= len(span) for n, span in zip(self.n_prefill, self.sequences, strict=False))
        _require(inside, "n_prefill is more than the tokens of a sequence")
        ahead = self.lookaheads
        _require(
            len(set(ahead)) == len(ahead) and min(ahead, default=0) >= 0,
            "lookaheads has a negative number or one twice",
        )
        _require((self.predictions is None) == (not ahead), "only one of predictions and lookaheads is given")
        if self.predictions is not None:
            shape = self.predictions.shape
            _require(len(shape) == 4 and shape[3] > 0, "predictions is not [lookaheads, tokens, blocks, guesses]")
            self._check_shape("predictions", (len(ahead), tokens, blocks, shape[3]))
            self._check_ids("predictions", self.predictions)
            self._check_shape("prediction_probabilities", shape)
        _require(ahead != () or self.prediction_probabilities is None, "prediction_probabilities without predictions")

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        value = getattr(self, name)
        _require(value is None or value.shape == shape, f"{name} does not have the shape {list(shape)}")
        _require(value is None or bool(np.isfinite(value).all()), f"{name} has numbers that are not finite")

    def _check_ids(self, name: str, ids: Ints) -> None:
        most = np.asarray(self.num_experts)[:, None]
        _require(bool(((ids >= NO_EXPERT) & (ids < most)).all()), f"{name} names experts that the model does not have")
        ordered = np.sort(ids, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NO_EXPERT)
        _require(not twice.any(), f"{name} names an expert twice for one token")

    def save(self, path: Path) -> None:
        """Write the trace to a file, atomically. Raises TargetError if that fails."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self._to_arrays())
        try:
            write_durably(path, buffer.getvalue())
        except OSError as error:
            raise TargetError(
                f"{path}: can't be written ({error.strerror}).",
                "Give a path in a folder that exists, on a disk with free space.",
            ) from error

    def _to_arrays(self) -> dict[str, Any]:
        counts: Any = self.num_experts if len(set(self.num_experts)) > 1 else self.num_experts[0]
        arrays: dict[str, Any] = {
            "experts": _narrow(self.experts, max(self.num_experts)),
            "offsets": np.asarray(self.offsets, np.int64),
            "num_experts": np.asarray(counts, np.int64),
            "top_k": np.asarray(self.top_k, np.int64),
        }
        if self.n_prefill:
            arrays["n_prefill"] = np.asarray(self.n_prefill, np.int64)
        if self.lookaheads:
            arrays["lookaheads"] = np.asarray(self.lookaheads, np.int64)
        if self.predictions is not None:
            arrays["predictions"] = _narrow(self.predictions, max(self.num_experts))
        for name in ("weights", "probabilities", "token_ids", "prediction_probabilities"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        for name in ("pieces", "blocks", "model", "digest"):
            if getattr(self, name):
                arrays[name] = np.asarray(getattr(self, name), np.str_)
        return arrays

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace from a file, and ignore unknown keys. Raises ConfigError if the file is not a readable trace."""
        try:
            with path.open("rb") as stream:
                _require(zipfile.is_zipfile(stream), "it is not an npz archive")
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as arrays:
                    stored = {name: arrays[name] for name in arrays.files if name in _KEYS}
            strange = [name for name, value in stored.items() if not isinstance(value, np.ndarray)]
            _require(not strange, f"{', '.join(strange)}: not a numpy array")
            return cls._of(stored)
        except _NO_TRACE as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            if "allow_pickle" in cause:  # don't show numpy's advice, which would run code from the file
                cause = "it holds Python objects, which are not loaded"
            raise ConfigError(f"{path}: not a trace ({cause}).", "Record one with moetier trace.") from error
        except OSError as error:
            raise ConfigError(
                f"{path}: can't be read ({error.strerror or error}).", "Give a trace, which is an npz file."
            ) from error

    @classmethod
    def _of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Trace:
        missing = [name for name in ("experts", "offsets", "num_experts", "top_k") if name not in arrays]
        _require(not missing, f"it lacks {', '.join(missing)}")
        experts, offsets = arrays["experts"], _ints("offsets", arrays["offsets"])
        _require(experts.ndim == 3, "experts is not [tokens, blocks, top_k]")
        _require(_ints("top_k", arrays["top_k"]) == (experts.shape[2],), "top_k is not the last dimension of experts")
        counts = _ints("num_experts", arrays["num_experts"])
        prefill = _ints("n_prefill", arrays["n_prefill"]) if "n_prefill" in arrays else ()
        if prefill and arrays["n_prefill"].ndim == 0:
            prefill *= len(offsets) - 1
        most = max(counts, default=0)
        return cls(
            experts=_widen(experts, most),
            weights=arrays.get("weights"),
            probabilities=arrays.get("probabilities"),
            token_ids=arrays.get("token_ids"),
            predictions=_widen(arrays["predictions"], most) if "predictions" in arrays else None,
            prediction_probabilities=arrays.get("prediction_probabilities"),
            offsets=offsets,
            num_experts=counts * experts.shape[1] if arrays["num_experts"].ndim == 0 else counts,
            n_prefill=prefill,
            lookaheads=_ints("lookaheads", arrays["lookaheads"]) if "lookaheads" in arrays else (),
            pieces=_texts("pieces", arrays["pieces"]) if "pieces" in arrays else (),
            blocks=_texts("blocks", arrays["blocks"]) if "blocks" in arrays else (),
            model="".join(_texts("model", arrays["model"])) if "model" in arrays else "",
            digest="".join(_texts("digest", arrays["digest"])) if "digest" in arrays else "",
        )


_ARRAYS: Mapping[str, Any] = {
    "experts": np.int16,
    "weights": np.float16,
    "probabilities": np.float16,
    "token_ids": np.int32,
    "predictions": np.int16,
    "prediction_probabilities": np.float16,
}
_NO_TRACE = (  # errors of numpy and zipfile; RuntimeError: the file is encrypted or has an unknown compression
    *(ValueError, TypeError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
_KEYS = {
    *_ARRAYS,
    *("offsets", "num_experts", "top_k", "n_prefill", "lookaheads", "pieces", "blocks", "model", "digest"),
}


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _narrow(ids: Ints, experts: int) -> npt.NDArray[Any]:
    """Return ids as bytes if they fit, else unchanged."""
    return np.where(ids == NO_EXPERT, NONE_BYTE, ids).astype(np.uint8) if experts <= NONE_BYTE else ids


def _widen(ids: npt.NDArray[Any], experts: int) -> npt.NDArray[Any]:
    if ids.dtype != np.uint8 or experts > NONE_BYTE:
        return ids
    return np.where(ids == NONE_BYTE, NO_EXPERT, ids.astype(np.int16))


def _ints(name: str, value: npt.NDArray[Any]) -> tuple[int, ...]:
    _require(value.dtype.kind in "iu" and value.ndim < 2, f"{name} does not consist of whole numbers")
    return tuple(int(number) for number in value.reshape(-1))


def _texts(name: str, value: npt.NDArray[Any]) -> tuple[str, ...]:
    _require(value.dtype.kind == "U" and value.ndim < 2, f"{name} is not text")
    return tuple(str(text) for text in value.reshape(-1))
