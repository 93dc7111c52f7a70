"""One conversion: planned in whole before anything is written, then done in steps that can be cut anywhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from moetier.runtime.config import format_bytes
from moetier.runtime.memory import available_memory
from moetier.tiers.durable import disk_errors
from moetier.tiers.errors import ConfigError
from moetier.tiers.keys import Bits, ExpertKey, RecordLayout
from moetier.tiers.manifest import Block, Manifest
from moetier.tiers.quantize import WeightError, layout_for
from moetier.tiers.writer import StoreWriter

from .blueprint import Blueprint, make_blueprint
from .checkpoint import Checkpoint
from .conversion_report import BlockReport, ConversionReport
from .dequantize import source_tensors
from .progress import Progress
from .records import INTERPRETER_BYTES, Encoder
from .skeleton import build_on_meta
from .target import Target, small_files
from .trunk import plan_trunk


@dataclass(frozen=True)
class Options:
    """How experts are stored, and with how many workers; None is the default of the width, or of the machine."""

    bits: Bits = 4
    group_size: int | None = None
    pairs: str | None = None
    fast: bool = False  # plain rounding in place of HQQ
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.bits == 16 and (self.group_size is not None or self.pairs is not None or self.fast):
            raise ConfigError(
                "With 16 bits nothing is rounded: groups, pairs and plain rounding say nothing.",
                "Leave out --group-size, --pairs and --fast, or choose fewer --bits.",
            )


@dataclass(frozen=True)
class Conversion:
    checkpoint: Checkpoint
    blueprint: Blueprint
    target: Target
    encoder: Encoder
    options: Options

    @classmethod
    def plan(cls, checkpoint: Checkpoint, folder: Path, options: Options) -> Conversion:
        """Reads nothing but the config and the shards' headers. Raises CheckpointError or ConfigError."""
        model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype)
        name = str(dtype).removeprefix("torch.")
        tensors = source_tensors(checkpoint.tensors, checkpoint.quantization, name)
        blueprint = make_blueprint(model, dtype, tensors)
        trunk = plan_trunk({name: tensors[name] for name in blueprint.trunk})
        target = Target(
            folder=folder,
            plan=_manifest(checkpoint, blueprint, options),
            trunk=trunk,
            small=small_files(checkpoint, options.bits, blueprint.dtype, trunk),
        )
        return cls(checkpoint, blueprint, target, _encoder(blueprint, target.plan, options), options)

    def announce(self) -> list[str]:
        """What is going to happen, in lines."""
        plan, trunk = self.target.plan, sum(file.size for file in self.target.trunk)
        bits = plan.stored_bytes * 8 / self._weights
        workers, memory = self.encoder.workers, INTERPRETER_BYTES + self.encoder.peak_bytes
        lines = [
            f"{plan.model}: {format_bytes(self.checkpoint.nbytes)}, {len(plan.blocks)} blocks, "
            f"{plan.record_count} experts of {self._weights // plan.record_count:,} weights",
            f"{self.target.folder}: {format_bytes(self.target.total_bytes)} (trunk {format_bytes(trunk)}, "
            f"experts {format_bytes(plan.stored_bytes)} at {bits:.2f} bits a weight)",
            f"{workers} worker{'s' * (workers > 1)}, about {format_bytes(memory)} of memory",
        ]
        if whole := [block.path for block in self.blueprint.blocks if not block.apart]:
            lines.append(f"read block by block, not expert by expert, as this checkpoint mixes them: {whole[0]}, ...")
        if any(dtype == "float32" for block in self.blueprint.blocks for _, dtype in block.parameters.values()):
            lines.append("experts are in float32: what stays in 16 bits is rounded to bfloat16")
        if self.blueprint.unused:
            size = sum(self.checkpoint.tensors[n].nbytes for n in self.blueprint.unused if n in self.checkpoint.tensors)
            lines.append(
                f"{len(self.blueprint.unused)} tensors ({format_bytes(size)}) are left out, as the model does not use "
                f"them: {self.blueprint.unused[0]}, ..."
            )
        return lines

    def run(self, say: Callable[[str], None], quiet: bool) -> ConversionReport:
        """Trunk, blocks, small files; the manifest last. Goes on where an earlier run was cut."""
        start = time.monotonic()
        self.target.check_disk()
        with StoreWriter.open(self.target.store, self.target.plan) as writer:
            finished = writer.finished_blocks
            errors = {b: error for b, error in self.target.read_journal().items() if b in finished}
            if finished:
                say(f"resumed: {len(finished)} of {len(self.target.plan.blocks)} blocks are there")
            with disk_errors(self.target.store, self.target.missing_bytes):
                self.target.write_journal(self.command, errors)
                with Progress("trunk", sum(file.size for file in self.target.trunk), quiet=quiet) as progress:
                    trunk = {f.name: f.make(self.target.folder, progress.advance) for f in self.target.trunk}
                self._write_blocks(writer, errors, say, quiet)
                self.target.write_small()
            writer.finish(trunk)
        self.target.tidy()
        return self.report(errors, seconds=time.monotonic() - start, resumed_blocks=len(finished))

    def _write_blocks(
        self, writer: StoreWriter, errors: dict[int, float], say: Callable[[str], None], quiet: bool
    ) -> None:
        plan = self.target.plan
        missing = [block for block in range(len(plan.blocks)) if block not in writer.finished_blocks]
        keys = [ExpertKey(block, expert) for block in missing for expert in range(plan.blocks[block].experts)]
        total = sum(plan.layout(key.block).slot_bytes for key in keys)
        with Progress("experts", total, quiet=quiet) as progress, closing(self.encoder.records(keys)) as records:
            for block in missing:
                entry, error = plan.blocks[block], WeightError()
                with writer.block(block) as shard:
                    for _ in range(entry.experts):
                        _, record, one = next(records)
                        shard.write(record)
                        error += one
                        progress.advance(plan.layout(block).slot_bytes)
                    errors[block] = error.relative
                    self.target.write_journal(self.command, errors)
                if not sys.stderr.isatty():
                    say(f"{entry.path}: {entry.experts} experts, relative error {error.relative:.4f}")

    @property
    def command(self) -> list[str]:
        """What resumes it, word by word."""
        options, words = self.options, ["moetier", "convert", self.checkpoint.source, str(self.target.folder.resolve())]
        words += ["--bits", str(options.bits)]
        if options.group_size is not None:
            words += ["--group-size", str(options.group_size)]
        if options.pairs is not None:
            words += ["--pairs", options.pairs]
        return words + ["--fast"] * options.fast + ["--ignore-code"] * self.checkpoint.ignored_code

    @property
    def _weights(self) -> int:
        plan = self.target.plan
        return sum(block.experts * plan.layout(index).weights for index, block in enumerate(plan.blocks))

    def report(
        self, errors: dict[int, float], *, seconds: float, resumed_blocks: int = 0, was_complete: bool = False
    ) -> ConversionReport:
        plan = self.target.plan
        return ConversionReport(
            model=plan.model,
            target=str(self.target.folder),
            bits=self.options.bits,
            source_bytes=self.checkpoint.nbytes,
            trunk_bytes=sum(file.size for file in self.target.trunk),
            blocks=tuple(
                BlockReport(b.path, b.experts, b.experts * plan.layout(i).slot_bytes, errors.get(i))
                for i, b in enumerate(plan.blocks)
            ),
            weights=self._weights,
            seconds=seconds,
            peak_bytes=_peak_bytes(),
            resumed_blocks=resumed_blocks,
            was_complete=was_complete,
        )


def _manifest(checkpoint: Checkpoint, blueprint: Blueprint, options: Options) -> Manifest:
    arrays: dict[tuple[RecordLayout, int], str] = {}
    sizes: dict[str, int] = {}
    blocks = []
    for block in blueprint.blocks:
        layout = layout_for(
            block.parameters,
            bits=options.bits,
            group=options.group_size,
            pairs=options.pairs,
            transposed=block.transposed,
        )
        name = f"records-{len(arrays) + 1}" if arrays else "records"
        array = arrays.setdefault((layout, block.experts), name)
        index = sizes.get(array, 0)
        sizes[array] = index + 1
        blocks.append(Block(block.path, array, index, block.experts, block.top_k))
    return Manifest(
        model=checkpoint.name,
        source_digest=checkpoint.digest,
        blocks=tuple(blocks),
        layouts={name: layout for (layout, _), name in arrays.items()},
        version=version("moetier"),
        method="rounding" if options.fast else "hqq",
    )


def _encoder(blueprint: Blueprint, plan: Manifest, options: Options) -> Encoder:
    """With as many workers as are asked for; else one for each CPU, fewer where memory is short."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"{options.workers} workers can't work.", "Give at least one.")
    workers = options.workers or len(os.sched_getaffinity(0))
    encoder = Encoder(blueprint, plan, workers=workers, fast=options.fast)
    most = min(available_memory().bytes, encoder.promised_bytes - INTERPRETER_BYTES)
    while options.workers is None and encoder.workers > 1 and encoder.peak_bytes > most:
        encoder = Encoder(blueprint, plan, workers=encoder.workers - 1, fast=options.fast)
    return encoder


def _peak_bytes() -> int:
    """The most that this process ever had resident; getrusage's number begins with the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
