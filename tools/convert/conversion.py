"""One conversion of a checkpoint, which is planned before anything is written and can be resumed, and its report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.blueprint import build_on_meta
from moetier.runtime.checkpoint.containers import Checkpoint
from moetier.runtime.machine.memory import peak_bytes
from moetier.tiers.errors import DiskSpaceError
from moetier.tiers.layout import Projection
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.options import command_words
from moetier.tiers.quant.codec import WeightDeviation
from moetier.tiers.small_names import VOCABULARY
from moetier.tiers.store.atomic import disk_errors
from moetier.tiers.store.folder import command, read_manifest
from moetier.tiers.store.writer import StoreWriter
from moetier.tiers.text import format_bytes
from moetier.tools.cli.progress import ByteProgress
from moetier.tools.cli.report import table

from .conversion_plan import ConversionPlan, Stage, stages
from .encoder import INTERPRETER_BYTES, EncodedRecord, Encoder
from .model_card import CARD, write_card
from .model_files import free_bytes, nearest_folder
from .options import CONVERT_OPTIONS, NATIVE, Options
from .streaming import Download
from .target import Target, small_files
from .trunk_writer import MatrixRecord

USUAL_ERRORS = {8: 0.005, 4: 0.09, 3: 0.19, 2: 0.39}  # relative errors by bits, of normally distributed weights
MAX_OF_USUAL = 1.3  # an error is usual up to this many times the figure


@dataclass(frozen=True)
class BlockReport:
    """Result for one block.

    ``error`` is the relative error of its stored weights. It is None if an earlier run made the block and its error was
    not kept.
    """

    path: str
    experts: int
    stored_bytes: int
    error: float | None


@dataclass(frozen=True)
class ConversionReport:
    """Result and cost of a conversion."""

    model: str
    target: str
    bits: int
    trunk_bits: int
    source_bytes: int
    trunk_bytes: int
    trunk_matrices: int  # number of quantised matrices
    trunk_error: float | None  # relative error of their weights; None if this run quantised none
    blocks: tuple[BlockReport, ...]
    weights: int  # number of weights of all experts
    seconds: float
    peak_bytes: int  # peak memory of this process since its start
    resumed_blocks: int  # number of blocks that an earlier run finished
    was_complete: bool  # whether the model directory was complete, so that nothing was written

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of all experts."""
        return sum(block.stored_bytes for block in self.blocks)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per expert weight, including scales, padding and checksums."""
        return self.expert_bytes * 8 / self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the properties as JSON."""
        return asdict(self) | {"expert_bytes": self.expert_bytes, "bits_per_weight": self.bits_per_weight}

    def table(self) -> str:
        """Return the report as text."""
        if self.was_complete:
            trunk = f" and a trunk of {self.trunk_bits}" if self.trunk_bits != 16 else ""
            return (
                f"{self.target} is complete: it has all files of {self.model} with experts of {self.bits} bits{trunk} "
                "already.\n"
                f"Their contents are checked by: {command('verify', self.target)}"
            )
        errors = [block.error for block in self.blocks if block.error is not None]
        error = "" if self.trunk_error is None else f"{self.trunk_error:.4f}"
        totals = [
            ["source", format_bytes(self.source_bytes)],
            ["trunk", format_bytes(self.trunk_bytes)],
            *([[f"its {self.trunk_matrices} matrices of {self.trunk_bits} bits", "error " + error]] if error else []),
            ["experts", format_bytes(self.expert_bytes)],
            *([["relative error", _error_text(errors, self.bits)]] if errors else []),
            ["bits per expert weight", f"{self.bits_per_weight:.3f}"],
            ["time", f"{self.seconds:.1f} s"],
            ["peak memory", format_bytes(self.peak_bytes)],
        ]
        return table(totals)


def _error_text(errors: list[float], bits: int) -> str:
    """Return the least and the greatest relative error of blocks, and whether that is usual with so many bits."""
    if not any(errors):
        return "0: the weights are those of the checkpoint"
    text, usual = f"{min(errors):.4f} to {max(errors):.4f}", USUAL_ERRORS.get(bits)
    if usual is None:
        return text
    if max(errors) <= MAX_OF_USUAL * usual:
        return f"{text}: usual at {bits} bits"
    return f"{text}: the usual at {bits} bits is {usual}; moetier quality measures what it costs"


@dataclass(frozen=True)
class Conversion:
    """Planned conversion of one checkpoint into one model directory."""

    checkpoint: Checkpoint
    planned: ConversionPlan
    target: Target
    encoder: Encoder
    options: Options
    matrices: tuple[MatrixRecord, ...]  # the trunk's quantised matrices
    command: tuple[str, ...]  # words of the command line that resumes the conversion
    download: Download | None  # of a hub checkpoint; None if the checkpoint is a folder
    quiet: bool  # print nothing on standard error

    @classmethod
    def plan(
        cls,
        checkpoint: Checkpoint,
        folder: Path,
        options: Options,
        *,
        command: Sequence[str] = (),
        download: Download | None = None,
        quiet: bool = True,
    ) -> Conversion:
        """Plan a conversion into ``folder`` without writing anything.

        No weights are read, except samples for the digest if the checkpoint is a folder. ``command``, ``download`` and
        ``quiet`` are as in ``convert_checkpoint``. Raises CheckpointError or ConfigError.
        """
        model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype)
        tensors = checkpoint.sources(model, str(dtype).removeprefix("torch."))
        planned = ConversionPlan.of(model, dtype, tensors, options.trunk_bits)
        options = planned.with_bits(options)
        digest = checkpoint.digest if download is None else download.revision
        manifest = planned.manifest(options, model=checkpoint.name, digest=digest)
        encoder = Encoder.of(planned.blueprint, manifest, options)
        matrices = planned.matrices(workers=encoder.workers, fast=options.fast)
        trunk = planned.trunk(matrices)
        if download is not None:
            download.keep_tensors(
                [part.name for file in trunk for tensor in file.tensors.values() for part in tensor.parts]
            )
        small = small_files(checkpoint, manifest.bits, options.trunk_bits, planned.blueprint.dtype, trunk)
        target = Target(folder, manifest, trunk, small, is_streamed=download is not None)
        words = ["moetier", *(command or ("convert", checkpoint.source, str(folder.resolve())))]
        given = ((name, option, getattr(options, name)) for name, option in CONVERT_OPTIONS.items() if option.resumes)
        words += command_words((name, value) for name, option, value in given if value != option.default)
        quantised = tuple(matrices.values())
        return cls(checkpoint, planned, target, encoder, options, quantised, tuple(words), download, quiet)

    def say(self, line: str) -> None:
        """Print a line on standard error, unless ``quiet``."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def announce(self) -> list[str]:
        """Return lines that describe what the conversion will do."""
        manifest, blueprint = self.target.manifest, self.planned.blueprint
        trunk = sum(file.size for file in self.target.trunk)
        bits = manifest.stored_bytes * 8 / self._weights
        peaks = [self.encoder.peak_bytes, *(matrix.peak_bytes for matrix in self.matrices)]
        workers, memory = self.encoder.workers, INTERPRETER_BYTES + max(peaks)
        lines = [
            f"{manifest.model}: {format_bytes(self.checkpoint.nbytes)}, {len(manifest.blocks)} blocks, "
            f"{manifest.record_count} experts of {self._weights // manifest.record_count:,} weights",
            f"{self.target.folder}: {format_bytes(self.target.missing_bytes(replacing=True))} "
            f"(trunk {format_bytes(trunk)}, experts {format_bytes(manifest.stored_bytes)} at {bits:.2f} bits a weight)",
            f"{workers} worker{'s' * (workers > 1)}, about {format_bytes(memory)} of memory",
        ]
        if self.options.bits == NATIVE:
            stored = {_description(p) for layout in manifest.layouts.values() for p in layout.projections}
            lines.append(f"experts stay as the checkpoint has them: {' and '.join(sorted(stored))}")
        elif manifest.bits < 16 and (self.planned.kept or self.planned.has_only_values):
            keeps = "native keeps them as they are" if self.planned.kept else "16 keeps their values"
            lines.append(
                f"experts are quantised already, with {self.checkpoint.quantised_with}, and lose quality when they are "
                f"quantised again, to {manifest.bits} bits: --bits {keeps}"
            )
        if self.download is not None:
            lines.append(self.download.announce(self._stages()))
        if self.options.trunk_bits != 16:
            weights = sum(matrix.layout.weights for matrix in self.matrices)
            size = sum(matrix.layout.payload_bytes for matrix in self.matrices)
            lines.append(
                f"{len(self.matrices)} matrices of the trunk, {weights:,} weights, are quantised: "
                f"{format_bytes(size)}, {size * 8 / max(weights, 1):.2f} bits a weight"
            )
        if whole := [block.path for block in blueprint.blocks if not block.is_separable]:
            lines.append(f"read as whole blocks, as the checkpoint does not store their experts apart: {whole[0]}, ...")
        if any(dtype == "float32" for block in blueprint.blocks for _, dtype in block.parameters.values()):
            lines.append("experts are in float32: weights that stay in 16 bits are rounded to bfloat16")
        if not any(VOCABULARY.fullmatch(name) for name in self.target.small):
            lines.append(
                "the checkpoint has no tokenizer, without which generate, chat and serve can't use the model: copy its "
                "tokenizer.json or tokenizer.model, and tokenizer_config.json, into the model directory"
            )
        if blueprint.unused:
            size = sum(self.checkpoint.tensors[n].nbytes for n in blueprint.unused if n in self.checkpoint.tensors)
            lines.append(
                f"{len(blueprint.unused)} tensors ({format_bytes(size)}) are left out, as the model does not use "
                f"them: {blueprint.unused[0]}, ..."
            )
        return lines

    def run(self) -> ConversionReport:
        """Make the model directory, and remove what only its conversion needs. Raises as ``make``."""
        report = self.make()
        self.target.tidy()
        return report

    def make(self) -> ConversionReport:
        """Say what will be done. Write the trunk, the blocks, the small files and, last, the manifest.

        Resumes where an earlier run stopped. The trunk of a hub checkpoint is written after the blocks, because its
        tensors are spread over all files. Raises CheckpointError if the source can't be read, or TargetError if the
        target can't be written.
        """
        start = time.monotonic()
        for line in self.announce():
            self.say(line)
        self.check_disks()
        with StoreWriter.open(self.target.store, self.target.manifest) as writer:
            finished = writer.finished_blocks
            errors = {b: error for b, error in self.target.read_journal().items() if b in finished}
            if finished:
                self.say(f"resumed: {len(finished)} of {len(self.target.manifest.blocks)} blocks are complete")
            with disk_errors(self.target.store, self.target.missing_bytes):
                self.target.write_journal(self.command, errors)
                # a download brings the files of the trunk last
                trunk = None if self.download else self._write_trunk()
                self._write_blocks(writer, errors)
                sums, deviation = trunk or self._write_trunk()
                self.target.write_small()
            manifest = writer.finish(sums, self.checkpoint.digest if self.download else None, self.target.copied)
        self._write_card(manifest)
        seconds = time.monotonic() - start
        return self.report(errors, deviation, seconds=seconds, resumed_blocks=len(finished))

    def complete_card(self) -> None:
        """Write the model card of a complete model that has none."""
        if not os.path.lexists(self.target.folder / CARD):
            self._write_card(read_manifest(self.target.store))

    def _write_card(self, manifest: Manifest) -> None:
        """Write the model card. If it can't be written, the model is complete nevertheless."""
        try:
            write_card(self.target.folder, manifest)
        except OSError as error:
            self.say(f"{self.target.folder / CARD}: the model card can't be written ({error.strerror})")

    def check_disks(self, *, replacing: bool = False) -> None:
        """Raise DiskSpaceError unless the disks have room for what is still to be written and downloaded.

        With ``replacing``, the present content of the target folder counts as removed.
        """
        if self.download is None:
            self.target.check_disk(replacing=replacing)
            return
        on_target, cached = self.download.disk_bytes(self._stages(() if replacing else None))
        cache = hub.cache_folder()
        if nearest_folder(cache).stat().st_dev == nearest_folder(self.target.folder).stat().st_dev:
            on_target, cached = on_target + cached, 0
        self.target.check_disk(on_target, replacing=replacing)
        if cached > (free := free_bytes(cache)):
            raise DiskSpaceError(
                f"{cache} needs {cached:,} bytes more for the checkpoint; {free:,} are free.",
                "Free some space, leave out --keep-source, or name another place with HF_HUB_CACHE.",
            )

    def _stages(self, finished: Collection[int] | None = None) -> list[Stage]:
        """Return the blocks that are not written yet, in stages, in the order in which to write them.

        ``finished``: numbers of the blocks that are written already; by default, those whose shards are complete.
        """
        done = self.target.finished_blocks if finished is None else finished
        missing = [block for block in range(len(self.target.manifest.blocks)) if block not in done]
        if self.download is None:
            return [Stage(tuple(missing))]
        return stages({block: self.planned.blueprint.blocks[block].files for block in missing})

    def _write_trunk(self) -> tuple[dict[str, FileSum], WeightDeviation]:
        """Write the files of the trunk. Return their sums by name, and the deviation of all its quantised matrices."""
        sums, total = {}, WeightDeviation()
        with ByteProgress("trunk", sum(file.size for file in self.target.trunk), quiet=self.quiet) as progress:
            for file in self.target.trunk:
                sums[file.name], deviation = file.make(self.target.folder, progress.advance)
                total += deviation
        return sums, total

    def _write_blocks(self, writer: StoreWriter, errors: dict[int, float]) -> None:
        """Write the shards that are missing, each with the records of a block. Add the blocks' errors to ``errors``."""
        manifest, order = self.target.manifest, self._stages(writer.finished_blocks)
        missing = [block for stage in order for block in stage.blocks]
        total = sum(manifest.blocks[block].experts * manifest.layout(block).slot_bytes for block in missing)
        readable = (stage for stage in order) if self.download is None else self.download.stream(order, self.quiet)
        with ByteProgress("experts", total, quiet=self.quiet) as progress, closing(readable):
            for stage in readable:
                with closing(self.encoder.records(stage.blocks)) as records:
                    for block in stage.blocks:
                        self._write_block(writer, block, records, errors, progress)

    def _write_block(
        self,
        writer: StoreWriter,
        number: int,
        records: Iterator[EncodedRecord],
        errors: dict[int, float],
        progress: ByteProgress,
    ) -> None:
        """Write the shard of a block, with the next of ``records``. Set the block's error in ``errors``."""
        manifest = self.target.manifest
        block, deviation = manifest.blocks[number], WeightDeviation()
        with writer.block(number) as shard:
            for record, of_record in islice(records, block.experts):
                shard.write(record)
                deviation += of_record
                progress.advance(manifest.layout(number).slot_bytes)
            errors[number] = deviation.relative
            self.target.write_journal(self.command, errors)  # before the shard is complete
        if not sys.stderr.isatty():
            self.say(f"{block.path}: {block.experts} experts, relative error {deviation.relative:.4f}")

    @property
    def _weights(self) -> int:
        manifest = self.target.manifest
        return sum(block.experts * manifest.layout(index).weights for index, block in enumerate(manifest.blocks))

    def report(
        self,
        errors: dict[int, float],
        trunk: WeightDeviation | None = None,
        *,
        seconds: float = 0.0,
        resumed_blocks: int = 0,
        was_complete: bool = False,
    ) -> ConversionReport:
        """Return the report of the conversion.

        Args:
            errors: relative errors of blocks, by number.
            trunk: deviation of the trunk's quantised matrices; None if this run wrote no trunk.
            seconds: how long it took.
            resumed_blocks: number of blocks that an earlier run finished.
            was_complete: whether this run had nothing to do.
        """
        manifest = self.target.manifest
        return ConversionReport(
            model=manifest.model,
            target=str(self.target.folder),
            bits=manifest.bits,
            trunk_bits=self.options.trunk_bits,
            source_bytes=self.checkpoint.nbytes,
            trunk_bytes=sum(file.size for file in self.target.trunk),
            trunk_matrices=len(self.matrices),
            trunk_error=trunk.relative if trunk is not None and self.matrices else None,
            blocks=tuple(
                BlockReport(b.path, b.experts, b.experts * manifest.layout(i).slot_bytes, errors.get(i))
                for i, b in enumerate(manifest.blocks)
            ),
            weights=self._weights,
            seconds=seconds,
            peak_bytes=peak_bytes(),
            resumed_blocks=resumed_blocks,
            was_complete=was_complete,
        )


def _description(projection: Projection) -> str:
    if projection.coding:
        name = {"e2m1": "FP4", "int4": "INT4", "e4m3": "FP8"}.get(projection.coding, projection.coding.upper())
        return f"{name} in groups of {projection.group}"
    return f"{projection.bits} bits" + (f" in groups of {projection.group}" if projection.group else "")
