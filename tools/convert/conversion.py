"""One conversion: planned in whole before anything is written, then done in steps that can be cut anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.blueprint import Blueprint
from moetier.runtime.checkpoint.dequantize import source_tensors
from moetier.runtime.checkpoint.files import Checkpoint
from moetier.runtime.checkpoint.skeleton import build_on_meta
from moetier.runtime.config import format_bytes
from moetier.runtime.memory import available_memory, peak_bytes
from moetier.runtime.threads import usable_cpus
from moetier.tiers.errors import ConfigError, DiskSpaceError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.quant.codec import WeightError
from moetier.tiers.store.atomic import disk_errors
from moetier.tiers.store.writer import StoreWriter
from moetier.tools.cli.progress import Progress
from moetier.tools.convert.files import free_bytes, nearest_folder

from .draft import Draft, Options
from .encoder import INTERPRETER_BYTES, Encoder
from .matrices import Matrices, MatrixRecord
from .report import BlockReport, ConversionReport
from .stages import Stage, stages
from .streaming import Download
from .target import Target, small_files


@dataclass(frozen=True)
class Conversion:
    """Planned conversion of one checkpoint into one model directory."""

    checkpoint: Checkpoint
    blueprint: Blueprint
    target: Target
    encoder: Encoder
    options: Options
    matrices: Matrices  # of the trunk that are quantised
    records: Mapping[str, MatrixRecord]  # what becomes of them, by module path
    resuming: tuple[str, ...] = ()  # the words of the command that resumes it, but for the options
    download: Download | None = None  # of a hub checkpoint, whose files are here one after the other

    @classmethod
    def plan(
        cls,
        checkpoint: Checkpoint,
        folder: Path,
        options: Options,
        *,
        download: Download | None = None,
        resuming: Sequence[str] | None = None,
    ) -> Conversion:
        """Plan a conversion into ``folder`` without writing anything.

        Reads the config, the headers of the files and, without a ``download``, samples of them. Raises CheckpointError
        or ConfigError.
        """
        model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype)
        tensors = source_tensors(checkpoint.tensors, checkpoint.quantization, str(dtype).removeprefix("torch."))
        draft = Draft.of(model, dtype, tensors, options.trunk_bits)
        digest = checkpoint.digest if download is None else download.revision
        plan = draft.manifest(options, model=checkpoint.name, digest=digest)
        encoder = _encoder(draft.blueprint, plan, options)
        records = draft.records(workers=encoder.workers, fast=options.fast)
        trunk = draft.trunk(records)
        if download is not None:
            download.keep_tensors(
                [part.name for file in trunk for tensor in file.tensors.values() for part in tensor.parts]
            )
        target = Target(
            folder=folder,
            plan=plan,
            trunk=trunk,
            small=small_files(checkpoint, options.bits, options.trunk_bits, draft.blueprint.dtype, trunk),
            passing=download is not None,
        )
        words = resuming or ("convert", checkpoint.source, str(folder.resolve()))
        return cls(
            checkpoint, draft.blueprint, target, encoder, options, draft.matrices, records, tuple(words), download
        )

    def announce(self) -> list[str]:
        """Describe what is going to happen, in lines."""
        plan, trunk = self.target.plan, sum(file.size for file in self.target.trunk)
        bits = plan.stored_bytes * 8 / self._weights
        peaks = [self.encoder.peak_bytes, *(record.peak_bytes for record in self.records.values())]
        workers, memory = self.encoder.workers, INTERPRETER_BYTES + max(peaks)
        lines = [
            f"{plan.model}: {format_bytes(self.checkpoint.nbytes)}, {len(plan.blocks)} blocks, "
            f"{plan.record_count} experts of {self._weights // plan.record_count:,} weights",
            f"{self.target.folder}: {format_bytes(self.target.total_bytes)} (trunk {format_bytes(trunk)}, "
            f"experts {format_bytes(plan.stored_bytes)} at {bits:.2f} bits a weight)",
            f"{workers} worker{'s' * (workers > 1)}, about {format_bytes(memory)} of memory",
        ]
        if self.download is not None:
            lines.append(self.download.announce(self._route()))
        if self.options.trunk_bits != 16:
            weights = sum(record.layout.weights for record in self.records.values())
            size = sum(record.layout.payload_bytes for record in self.records.values())
            lines.append(
                f"{len(self.records)} matrices of the trunk, {weights:,} weights, are quantised: {format_bytes(size)}, "
                f"{size * 8 / max(weights, 1):.2f} bits a weight"
            )
            lines += [f"as they are stay {reason}" for reason in self.matrices.reasons()]
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
        """Write trunk, blocks and small files, and the manifest last; resume where an earlier run was cut.

        The trunk of a hub checkpoint comes after the blocks: it lies in all of the files.
        """
        start = time.monotonic()
        self.check_disks()
        with StoreWriter.open(self.target.store, self.target.plan) as writer:
            finished = writer.finished_blocks
            errors = {b: error for b, error in self.target.read_journal().items() if b in finished}
            if finished:
                say(f"resumed: {len(finished)} of {len(self.target.plan.blocks)} blocks are there")
            with disk_errors(self.target.store, self.target.missing_bytes):
                self.target.write_journal(self.command, errors)
                if self.download is None:
                    trunk, digest = self._write_trunk(quiet), None
                    self._write_blocks(writer, errors, say, quiet)
                else:
                    self._write_blocks(writer, errors, say, quiet)
                    trunk, digest = self._write_trunk(quiet), self.checkpoint.digest
                self.target.write_small()
            writer.finish(trunk, digest)
        self.target.tidy()
        return self.report(errors, seconds=time.monotonic() - start, resumed_blocks=len(finished))

    def check_disks(self, *, replacing: bool = False) -> None:
        """Check that what is missing fits; with ``replacing``, once what is there is removed. Raises DiskSpaceError."""
        if self.download is None:
            self.target.check_disk(replacing=replacing)
            return
        here, cached = self.download.disk_bytes(self._route(() if replacing else None))
        cache = hub.cache_folder()
        if nearest_folder(cache).stat().st_dev == nearest_folder(self.target.folder).stat().st_dev:
            here, cached = here + cached, 0
        self.target.check_disk(here, replacing=replacing)
        if cached > (free := free_bytes(cache)):
            raise DiskSpaceError(
                f"{cache} is to keep {cached:,} bytes of the checkpoint; {free:,} are free.",
                "Free some space, leave out --keep-source, or name another place with HF_HUB_CACHE.",
            )

    def _route(self, finished: Collection[int] | None = None) -> list[Stage]:
        """Order the missing blocks as they are written."""
        done = self.target.finished_blocks if finished is None else finished
        missing = [block for block in range(len(self.target.plan.blocks)) if block not in done]
        if self.download is None:
            return [Stage(tuple(missing))]
        return stages({block: self.blueprint.blocks[block].files for block in missing})

    def _write_trunk(self, quiet: bool) -> dict[str, FileSum]:
        with Progress("trunk", sum(file.size for file in self.target.trunk), quiet=quiet) as progress:
            return {file.name: file.make(self.target.folder, progress.advance) for file in self.target.trunk}

    def _write_blocks(
        self, writer: StoreWriter, errors: dict[int, float], say: Callable[[str], None], quiet: bool
    ) -> None:
        plan, route = self.target.plan, self._route(writer.finished_blocks)
        blocks = [block for stage in route for block in stage.blocks]
        total = sum(plan.blocks[block].experts * plan.layout(block).slot_bytes for block in blocks)
        here = (stage for stage in route) if self.download is None else self.download.stream(route, quiet)
        with Progress("experts", total, quiet=quiet) as progress, closing(here):
            for stage in here:
                self._write_stage(stage.blocks, writer, errors, say, progress)

    def _write_stage(
        self,
        blocks: Sequence[int],
        writer: StoreWriter,
        errors: dict[int, float],
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        plan = self.target.plan
        keys = [ExpertKey(block, expert) for block in blocks for expert in range(plan.blocks[block].experts)]
        with closing(self.encoder.records(keys)) as records:
            for block in blocks:
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
        """The command that resumes it, word by word."""
        options, words = self.options, ["moetier", *self.resuming, "--bits", str(self.options.bits)]
        if options.trunk_bits != 16:
            words += ["--trunk-bits", str(options.trunk_bits)]
        if options.group_size is not None:
            words += ["--group-size", str(options.group_size)]
        if options.pairs is not None:
            words += ["--pairs", options.pairs]
        words += ["--fast"] * options.fast + ["--ignore-code"] * self.checkpoint.ignored_code
        return words + ["--keep-source"] * (self.download is not None and self.download.keep)

    @property
    def _trunk_error(self) -> WeightError:
        return sum((record.error for record in self.records.values()), WeightError())

    @property
    def _weights(self) -> int:
        plan = self.target.plan
        return sum(block.experts * plan.layout(index).weights for index, block in enumerate(plan.blocks))

    def report(
        self, errors: dict[int, float], *, seconds: float, resumed_blocks: int = 0, was_complete: bool = False
    ) -> ConversionReport:
        """Return the report of the conversion; ``errors`` are the relative errors of blocks, by number."""
        plan = self.target.plan
        return ConversionReport(
            model=plan.model,
            target=str(self.target.folder),
            bits=self.options.bits,
            trunk_bits=self.options.trunk_bits,
            source_bytes=self.checkpoint.nbytes,
            trunk_bytes=sum(file.size for file in self.target.trunk),
            trunk_matrices=len(self.records),
            trunk_error=None if was_complete or not self.records else self._trunk_error.relative,
            blocks=tuple(
                BlockReport(b.path, b.experts, b.experts * plan.layout(i).slot_bytes, errors.get(i))
                for i, b in enumerate(plan.blocks)
            ),
            weights=self._weights,
            seconds=seconds,
            peak_bytes=peak_bytes(),
            resumed_blocks=resumed_blocks,
            was_complete=was_complete,
        )


def _encoder(blueprint: Blueprint, plan: Manifest, options: Options) -> Encoder:
    """Make an encoder with as many workers as are asked for, else one per thread or CPU, fewer if memory is short."""
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"{options.workers} workers can't work.", "Give at least one.")
    workers = options.workers or options.threads or usable_cpus()
    encoder = Encoder(blueprint, plan, workers=workers, fast=options.fast)
    most = min(available_memory().bytes, encoder.promised_bytes - INTERPRETER_BYTES)
    while options.workers is None and encoder.workers > 1 and encoder.peak_bytes > most:
        encoder = Encoder(blueprint, plan, workers=encoder.workers - 1, fast=options.fast)
    return encoder
