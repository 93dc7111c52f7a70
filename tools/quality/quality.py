"""Quality of stored weights: the loss of a language model on a text, with its weights stored in several ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from moetier.runtime.checkpoint.containers import Checkpoint, container_of
from moetier.runtime.checkpoint.safetensors_folder import open_safetensors
from moetier.runtime.engine.model_runner import cache_of
from moetier.runtime.engine.packed_runner import check_bits
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.quantise.encode import encode
from moetier.runtime.model.context import first_ids, longest_context
from moetier.runtime.model.load import load
from moetier.runtime.model.vocabulary import check_ids, check_tokenizer
from moetier.runtime.moe.experts import EXPERT_PARAMETERS, experts_modules
from moetier.runtime.moe.linear import WEIGHT
from moetier.tiers.errors import BudgetError, ConfigError, UnsupportedModelError
from moetier.tiers.layout import BITS, Bits, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import WeightDeviation, decode, group_and_pairs, layout_for, sections
from moetier.tiers.store.folder import read_manifest
from moetier.tools.convert.conversion_plan import choose_matrices, trunk_records_of


class RoundTrip:
    """A checkpoint that transformers loads as a whole. Its weights are stored and read back in several ways.

    ``model`` computes in fp32 with transformers' eager experts, so only the weights differ between the ways.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load the model in fp32, and keep its experts in the checkpoint's type too.

        Raises UnsupportedModelError if the checkpoint is quantised, or is not a Mixture-of-Experts model that moetier
        knows.
        """
        if "quantization_config" in checkpoint.config:
            raise UnsupportedModelError(
                f"{checkpoint.name} is quantised already.",
                "Convert it to 16 bits: its model directory can be measured as it is.",
            )
        name = str(next(iter(checkpoint.config.get("architectures") or []), None))
        if not hasattr(transformers, name):
            raise UnsupportedModelError(
                f"This transformers ({transformers.__version__}) has no architecture {name}.",
                "Give a model that moetier can convert.",
            )
        self.model: Any = getattr(transformers, name).from_pretrained(
            checkpoint.folder, dtype=torch.float32, experts_implementation="eager"
        )
        self._modules = list(experts_modules(self.model).values())
        if not self._modules:
            raise UnsupportedModelError(
                f"{name} has no experts that moetier knows.", "Give a Mixture-of-Experts model."
            )
        # conversion to fp32 and back is exact, so these are the checkpoint's own weights
        own = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", "float32")))
        self._dtype: torch.dtype = getattr(torch, own)
        self._trunk: dict[str, Tensor] = {}  # original weights of the trunk's replaced matrices, by module path
        self._originals: list[dict[str, Tensor]] = [
            {name: p.detach().to(self._dtype) for name, p in module.named_parameters() if name in EXPERT_PARAMETERS}
            for module in self._modules
        ]

    @torch.no_grad()
    def store(
        self, bits: Bits, group: int | None, pairs: str | None, *, fast: bool
    ) -> tuple[list[tuple[RecordLayout, int]], WeightDeviation]:
        """Encode every expert as a record, and replace its weights by those that are read back from the record.

        ``group`` and ``pairs`` are as in ``Options``. With ``fast``, weights are rounded to the nearest value instead
        of using HQQ. Returns the layout and the number of experts of each block, and the error over all weights.
        """
        blocks, total = [], WeightDeviation()
        for module, originals in zip(self._modules, self._originals, strict=True):
            parameters = {n: (tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for n, t in originals.items()}
            layout = layout_for(parameters, bits=bits, group=group, pairs=pairs, transposed=module.is_transposed)
            blocks.append((layout, module.num_experts))
            record = np.empty(layout.record_bytes, np.uint8)
            for expert in range(module.num_experts):
                errors = encode({n: t[expert] for n, t in originals.items()}, layout, record, fast=fast)
                total = sum((errors[p.name] for p in layout.projections), total)
                _read_back(module, expert, torch.from_numpy(record), layout)
        return blocks, total

    @torch.no_grad()
    def store_trunk(self, trunk_records: TrunkRecords | None, *, fast: bool) -> None:
        """Replace each trunk matrix that a conversion would quantise by its values after encoding and decoding.

        If ``trunk_records`` is None, restore all matrices. With ``fast``, weights are rounded to the nearest
        value instead of using HQQ.
        """
        chosen = choose_matrices(self.model, torch.float32, trunk_records) if trunk_records else {}
        for path in {**self._trunk, **chosen}:
            linear = self.model.get_submodule(path)
            original = self._trunk.setdefault(path, linear.weight.detach().to(self._dtype))
            weights = original.float()
            if path in chosen:
                record = np.empty(chosen[path].record_bytes, np.uint8)
                encode({WEIGHT: original}, chosen[path], record, fast=fast)
                decode(torch.from_numpy(record), chosen[path], WEIGHT, weights)
            linear.weight = torch.nn.Parameter(weights, requires_grad=False)  # no longer tied to an embedding


def _read_back(module: Any, expert: int, record: Tensor, layout: RecordLayout) -> None:
    for p in layout.projections:
        decode(record, layout, p.name, getattr(module, p.name)[expert])
    for bias in layout.biases:
        getattr(module, bias.name)[expert].copy_(sections(record, layout)[bias.name])


WINDOW = 512  # tokens of a window; a model reads each window without the text before it
MIN_WINDOWS = 8  # least number of windows for ranks; with fewer windows, standard errors are too uncertain


@dataclass(frozen=True, slots=True)
class Loss:
    """Sum of the cross entropy over ``tokens`` predicted tokens, in ``nats``. Losses of several texts can be added."""

    tokens: int = 0
    nats: float = 0.0
    windows: tuple[tuple[int, float], ...] = ()  # tokens and nats of each window

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.tokens + other.tokens, self.nats + other.nats, self.windows + other.windows)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss of a token."""
        return math.exp(self.nats / self.tokens)


@dataclass(frozen=True, slots=True)
class PerplexityChange:
    """Change of the logarithm of a perplexity, and its standard error, which is None if only one window was read."""

    log: float
    log_error: float | None

    @classmethod
    def of(cls, loss: Loss, base: Loss) -> PerplexityChange:
        """Return the change from ``base`` to ``loss``, which were measured on the same windows.

        Windows are compared in pairs, so that a window that is hard to predict for both does not add to the error.
        """
        pairs = list(zip(loss.windows, base.windows, strict=True))
        assert all(mine[0] == theirs[0] for mine, theirs in pairs), "other windows"
        log = (loss.nats - base.nats) / base.tokens
        if len(pairs) < 2:
            return cls(log, None)
        squares = sum((mine[1] - theirs[1] - log * mine[0]) ** 2 for mine, theirs in pairs)
        return cls(log, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / base.tokens)

    @property
    def relative(self) -> float:
        """Relative change of the perplexity: 0.01 is 1 % more."""
        return math.expm1(self.log)

    @property
    def relative_error(self) -> float | None:
        """Standard error of ``relative``; None if only one window was read."""
        return None if self.log_error is None else math.exp(self.log) * self.log_error

    @property
    def is_clear(self) -> bool:
        """Whether the change is more than two standard errors."""
        return self.log_error is not None and abs(self.log) > 2 * self.log_error


def ranks(losses: Sequence[Loss]) -> list[tuple[int, int]] | None:
    """Return the best and the worst rank that each of ``losses`` may have. Rank 1 has the lowest perplexity.

    Losses whose difference is not clear share ranks. Return None if there are fewer than two losses, or fewer than
    MIN_WINDOWS windows.
    """
    if len(losses) < 2 or len(losses[0].windows) < MIN_WINDOWS:
        return None
    clear = [[change.log if (change := PerplexityChange.of(a, b)).is_clear else 0.0 for b in losses] for a in losses]
    return [(1 + sum(log > 0 for log in changes), len(losses) - sum(log < 0 for log in changes)) for changes in clear]


def read_texts(paths: Iterable[Path]) -> dict[str, str]:
    """Read text files. Return their contents, by file name without suffix.

    For a folder in ``paths``, all of its .txt files are read. Raises ConfigError if a path is neither a file nor a
    folder with .txt files, or if two files have the same name without suffix.
    """
    files: list[Path] = []
    for path in paths:
        named = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not named or not all(file.is_file() for file in named):
            raise ConfigError(
                f"{path} is neither a file nor a folder with .txt files.",
                "Give --text a text file, or a folder with .txt files.",
            )
        files += named
    texts = {file.stem: file.read_text("utf-8", errors="replace") for file in files}
    if len(texts) != len(files):
        raise ConfigError("Two texts have the same name.", "Rename one of them: names are columns of the table.")
    return texts


def tokenize(tokenizer: Any, texts: Mapping[str, str], tokens: int) -> dict[str, Tensor]:
    """Return the first ``tokens`` token ids of each text, int64 [tokens or fewer], without special tokens.

    Raises ConfigError if a text has fewer than two tokens.
    """
    ids_by_text = {}
    for name, text in texts.items():
        ids = torch.tensor(first_ids(tokenizer, text, tokens, add_special_tokens=False)[:tokens], dtype=torch.int64)
        if len(ids) < 2:
            raise ConfigError(f"The text {name} has fewer than two tokens.", "Give --text a longer text.")
        ids_by_text[name] = ids
    return ids_by_text


@torch.inference_mode()
def loss(model: Any, ids: Tensor, chunk: int = WINDOW) -> Loss:
    """Return the loss of a causal language model on one text. ``ids``: the token ids [tokens].

    The text is read in windows of WINDOW tokens, or of the model's maximum context if that is less. The last window may
    be shorter. At most ``chunk`` tokens of a window are computed together.
    """
    total, size = Loss(), min(WINDOW, longest_context(model.config) or WINDOW)
    for start in range(0, len(ids) - 1, size):
        window = ids[start : start + size].to(model.device)
        if len(window) > 1:
            nats = sum(_nats(model, window, chunk))
            total += Loss(len(window) - 1, nats, ((len(window) - 1, nats),))
    return total


def _nats(model: Any, window: Tensor, chunk: int) -> Iterator[float]:
    """Yield the loss in nats of each chunk of a window [tokens], whose first token is not predicted."""
    bits = _bits_of(model)
    cache: Any = None if bits == 16 else cache_of(model, len(window), bits=bits)
    for part, targets in zip(torch.split(window, chunk), torch.split(window[1:], chunk), strict=False):
        output = model(part[None], **{CACHE: cache}, use_cache=cache is not None or chunk < len(window))
        cache = output.get(CACHE, None)
        yield float(F.cross_entropy(output.logits[0, : len(targets)].float(), targets, reduction="sum"))


def _bits_of(model: Any) -> int:
    """Return the bits of a model's keys and values."""
    tiers = getattr(model, "tiers", None)
    return 16 if tiers is None else tiers.kv.bits


Way = tuple[Bits, int | None, str | None, Bits, str]  # bits, group size, pairs, bits of the trunk, method


@dataclass(frozen=True)
class Row:
    """Size and quality of one way to store experts and trunk."""

    bits: int | None  # None: the checkpoint as it is
    group: str  # "64", or "32, 64" if projections differ; "" if nothing is quantised
    pairs: str
    method: str  # "hqq" or "rounding"; "" if nothing is quantised
    stored_bytes: int | None
    bits_per_weight: float | None  # as stored: pairs, padding and checksums included
    error: float | None  # relative error over all weights of experts
    trunk_bits: int
    losses: Mapping[str, Loss]  # by text

    @property
    def loss(self) -> Loss:
        """Loss over all texts together."""
        return sum(self.losses.values(), Loss())

    @property
    def perplexity(self) -> float:
        """Perplexity over all texts together."""
        return self.loss.perplexity

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the perplexities as JSON."""
        by_text = {name: loss.perplexity for name, loss in self.losses.items()}
        return asdict(self) | {"perplexity": self.perplexity, "perplexity_by_text": by_text}


def measure_directory(folder: Path, texts: Mapping[str, str], tokens: int, resources: Mapping[str, Any]) -> Row:
    """Measure the quality of a model directory as it runs, in its own type.

    ``tokens``: most tokens of each text; ``resources``: keyword arguments of ``load``. Raises ConfigError or
    StoreError.
    """
    manifest = read_manifest(folder / "experts.zarr")
    _check_tokenizer(folder)
    options = {"context": WINDOW, **resources} | {"prefill_chunk": WINDOW, "all_logits": True}
    model, tokenizer = load(folder, **options)
    with model.tiers:
        check_bits(model, model.tiers.kv.bits)
        ids = tokenize(tokenizer, texts, tokens)
        _check_ids(model, tokenizer, ids)
        chunk, longest = model.tiers.prefill_chunk, max(map(len, ids.values()), default=0)
        if not model.tiers.prefill.resumes and chunk < (together := min(WINDOW, longest)):
            raise BudgetError(
                f"Memory has no room to compute {together:,} tokens together, and this model can't divide them.",
                "Free some memory, give --ram less, or measure fewer tokens with --tokens.",
            )
        losses = {name: loss(model, ids[name], chunk) for name in ids}
    blocks = [(manifest.layout(number), block.experts) for number, block in enumerate(manifest.blocks)]
    return _row(blocks, manifest.trunk_bits, manifest.method, None, losses)


def ways_of(
    bits: Sequence[Bits] | None,
    group_sizes: Sequence[int] | None,
    pairs: Sequence[str] | None,
    trunk_bits: Sequence[Bits] | None,
    methods: Sequence[str],
) -> list[Way]:
    """Return the combinations of options to measure; None stands for all bits, and for a trunk of 16 bits.

    At 16 bits all methods give the same, so only the first is kept. Raises ConfigError if weights can't be stored in
    one of the ways.
    """
    options = bits or BITS, group_sizes or (None,), pairs or (None,), trunk_bits or (16,), methods
    ways = [way for way in itertools.product(*options) if not way[0] == way[3] == 16 or way[4] == methods[0]]
    for width, group, pair_type, trunk, _ in ways:
        group_and_pairs(width, group, pair_type)
        trunk_records_of(trunk)
    return ways


def measure_checkpoint(source: str, texts: Mapping[str, str], tokens: int, ways: Iterable[Way]) -> Iterator[Row]:
    """Measure a checkpoint as it is, and then with its weights stored in each of the ``ways``. Yield the rows.

    ``tokens``: most tokens of each text. Raises ConfigError or CheckpointError.
    """
    checkpoint = open_safetensors(source)
    _check_tokenizer(checkpoint.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    ids = tokenize(tokenizer, texts, tokens)
    round_trip = RoundTrip(checkpoint)
    check_tokenizer(round_trip.model, tokenizer, checkpoint.folder)
    _check_ids(round_trip.model, tokenizer, ids)
    losses = {name: loss(round_trip.model, ids[name]) for name in ids}
    yield Row(None, "", "", "", None, None, None, 16, losses)
    for bits, group, pairs, trunk_bits, method in ways:
        blocks, error = round_trip.store(bits, group, pairs, fast=method == "rounding")
        round_trip.store_trunk(trunk_records_of(trunk_bits), fast=method == "rounding")
        losses = {name: loss(round_trip.model, ids[name]) for name in ids}
        yield _row(blocks, trunk_bits, method, error.relative, losses)


def _check_ids(model: Any, tokenizer: Any, ids: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if the model has no embedding for a token of a text. ``ids`` are the texts' ids by name."""
    for name, text in ids.items():
        check_ids(model, tokenizer, text.tolist(), f"The text {name}")


def _check_tokenizer(folder: Path) -> None:
    """Raise ConfigError if ``folder`` has no tokenizer. Call this before loading a model, which takes long."""
    if not container_of(folder).has_vocabulary(folder):
        raise ConfigError(f"{folder} has no tokenizer.", "Copy the tokenizer files of the model into it.")


def _row(
    blocks: Sequence[tuple[RecordLayout, int]],
    trunk_bits: int,
    method: str,
    error: float | None,
    losses: Mapping[str, Loss],
) -> Row:
    """Return the table's row for one way to store the weights.

    ``blocks`` has the layout and the number of experts of each block.
    """
    projections = [p for layout, _ in blocks for p in layout.projections]
    quantised = [p for p in projections if p.bits != 16]
    stored_bytes = sum(layout.slot_bytes * experts for layout, experts in blocks)
    return Row(
        bits=min(p.bits for p in projections),
        group=", ".join(map(str, sorted({p.group for p in quantised}))),
        pairs=", ".join(sorted({p.pairs for p in quantised})),
        method=method if quantised or trunk_bits != 16 else "",
        stored_bytes=stored_bytes,
        bits_per_weight=8 * stored_bytes / sum(layout.weights * experts for layout, experts in blocks),
        error=error,
        trunk_bits=trunk_bits,
        losses=losses,
    )
