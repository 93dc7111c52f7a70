"""Reports of a run: its timing, and the counters of each tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moetier.tiers.stats import TierStats
from moetier.tiers.text import format_bytes

from .failure import plain

if TYPE_CHECKING:
    from moetier.proto.expert_store_pb2 import Tier
    from moetier.runtime.model.tiers import Tiers
    from moetier.runtime.speculation.speculation import SpeculationStats

    from .daemon_reads import DaemonReads


SLOW = 0.2  # share of the time that waiting for misses may take before the report says what would help


@dataclass(frozen=True, slots=True)
class Timing:
    """Token counts and times of one generation, or the sum of several."""

    prompt_tokens: int  # prompt tokens that were computed, not taken from a cache
    new_tokens: int
    first_token: float  # seconds from the start to the first new token
    total: float  # seconds from the start to the last new token
    generations: int = 1

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.first_token + other.first_token,
            self.total + other.total,
            self.generations + other.generations,
        )

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens divided by the seconds to the first new token."""
        return self.prompt_tokens / self.first_token if self.first_token else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first one; 0 if there are no further tokens."""
        more, seconds = self.new_tokens - self.generations, self.total - self.first_token
        return more / seconds if more > 0 and seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return counts, seconds and rates as JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token_s": self.first_token,
            "total_s": self.total,
            "prefill_tokens_per_s": self.prefill_rate,
            "decode_tokens_per_s": self.decode_rate,
        }


def tier_json(stats: TierStats, timing: Timing) -> dict[str, Any]:
    """Return a tier's counters as JSON, with the bytes loaded per token and the share of time spent waiting."""
    tokens = timing.prompt_tokens + timing.new_tokens
    return stats.to_json() | {
        "bytes_per_token": stats.bytes_in / tokens if tokens else 0.0,
        "wait_share": stats.wait_seconds / timing.total if timing.total else 0.0,
    }


def table(rows: list[list[str]]) -> str:
    """Return rows as lines of text with aligned columns: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def summary(timing: Timing, tiers: Tiers, reads: DaemonReads | None, *, load: float, peak_bytes: int) -> str:
    """Return the short report of one generation; docs/choosing.md explains its lines.

    ``load`` is the time of loading in seconds; ``peak_bytes`` is the largest memory use of the process.
    """
    lines = [line("load", f"{load:.2f} s"), *_rates(timing), _hits(timing, tiers)]
    if tiers.origin.daemon is None:
        tokens = timing.prompt_tokens + timing.new_tokens
        nbytes = tiers.stats()[0].bytes_in
        lines.append(line("read", f"{format_bytes(nbytes)}, {format_bytes(nbytes / max(tokens, 1))} a token"))
    lines += [line("memory", f"{format_bytes(peak_bytes)} at its peak"), *_sources(tiers, reads)]
    return "\n".join(lines)


def slow_line(timing: Timing, tiers: Tiers, ram: str | None) -> str | None:
    """Return a line that says what would help if waiting for misses took long; None if it did not, or nothing helps.

    ``ram`` is the option for memory for experts. Without evictions each expert is read once: memory would not help.
    """
    host = tiers.host.stats()
    share = tier_json(host, timing)["wait_share"]
    if tiers.origin.daemon is not None or share <= SLOW or not host.evictions:
        return None
    more = "free more memory" if ram is None else "give experts more memory with --ram, or leave it out"
    return line("slow", f"misses took {share:.0%} of the time: {more}; moetier plan says what that gives")


def run_report(timing: Timing, tiers: Tiers, reads: DaemonReads | None = None) -> str:
    """Return a report of several answers: their timing, and all counters of the tiers."""
    return "\n".join([*_rates(timing), _hits(timing, tiers), *_sources(tiers, reads), details(timing, tiers)])


def details(timing: Timing, tiers: Tiers) -> str:
    """Return the tiers' counters, which ``summary`` leaves out; docs/choosing.md explains them."""
    stats = tiers.stats()
    lines = [line("experts", f"of {tiers.where}"), tier_table(timing, stats)]
    if tiers.speculation is not None:
        lines += _predictions(tiers.speculation.stats())
    # a daemon's prefetches are left out: they are for all its clients together (``moetier stats`` shows them)
    lines += [line("prefetch", f"{t.name}: {prefetch_text(t)}") for t in stats if t.prefetched or t.dropped]
    host = stats[0]
    if host.warmed or tiers.origin.learner is not None:
        lines.append(line("preloaded", f"{host.warmed} experts, {host.recalled} of them used"))
    return "\n".join(lines)


def run_json(timing: Timing, tiers: Tiers, reads: DaemonReads | None = None) -> dict[str, Any]:
    """Return the content of ``summary`` and ``details`` as JSON."""
    return {
        "experts": tiers.where,
        "daemon": None if reads is None else asdict(reads),
        "shares": [asdict(share) for share in tiers.origin.shares()],
        **timing.to_json(),
        "tiers": {stats.name: tier_json(stats, timing) for stats in tiers.stats()},
        "speculation": tiers.speculation.stats().to_json() if tiers.speculation is not None else None,
    }


def line(label: str, text: str) -> str:
    """Return a line of a report: a label and a text, in printable characters."""
    return f"{label:<9} {plain(text)}"


def tier_table(timing: Timing, tiers: list[TierStats]) -> str:
    """Return the counters of tiers as a table, one row for each."""
    head = [
        *("tier", "slots", "hits", "misses", "hit ratio", "read", "a token", "evictions", "wait p50", "p99", "of time")
    ]
    rows = [head]
    for stats in tiers:
        more = tier_json(stats, timing)
        rows.append(
            [
                stats.name,
                f"{stats.ready}/{stats.slots}",
                str(stats.hits),
                str(stats.misses),
                f"{stats.hit_ratio:.1%}",
                format_bytes(stats.bytes_in),
                format_bytes(more["bytes_per_token"]),
                str(stats.evictions),
                f"{stats.wait_median * 1e3:.2f} ms",
                f"{stats.wait_p99 * 1e3:.2f} ms",
                f"{more['wait_share']:.1%}",
            ]
        )
    return table(rows)


def tokens_text(count: int) -> str:
    """Return a number of tokens as text: 1 -> "1 token"."""
    return f"{count} token" if count == 1 else f"{count} tokens"


def prefetch_text(tier: TierStats | Tier) -> str:
    """Return the outcomes of a tier's prefetch requests as text."""
    return (
        f"{tier.prefetched:,} read, {tier.useful:,} useful, {tier.late:,} late, {tier.wasted:,} wasted, "
        f"{tier.cancelled:,} cancelled; {tier.dropped:,} dropped; saved up to {tier.saved_seconds:.2f} s"
    )


def _rates(timing: Timing) -> list[str]:
    more = f", {timing.decode_rate:.1f} tokens/s" if timing.decode_rate else ""
    return [
        line(
            "prefill",
            f"{tokens_text(timing.prompt_tokens)}, {timing.prefill_rate:.1f} tokens/s, "
            f"first token after {timing.first_token:.2f} s",
        ),
        line("decode", f"{tokens_text(timing.new_tokens)}{more}"),
    ]


def _hits(timing: Timing, tiers: Tiers) -> str:
    stats = tiers.stats()
    hits = ", ".join(f"{tier.name} {tier.hit_ratio:.1%} of {tier.hits + tier.misses:,}" for tier in reversed(stats))
    waits = tier_json(stats[-1], timing)["wait_share"]
    return line("hits", f"{hits}; waiting for misses took {waits:.1%} of the time")


def _sources(tiers: Tiers, reads: DaemonReads | None) -> list[str]:
    """Return lines about the daemons that records came from, and about lost connections to them."""
    lines = [] if reads is None else [line("daemon", reads.text())]
    for share in tiers.origin.shares():
        text = f"{share.records} records, {format_bytes(share.bytes)}, from {share.place}"
        if share.away:
            text += f", which can't be reached: {share.away.removesuffix('.')}"
        elif share.lost:
            text += "; the connection was lost and restored" + (f" {share.lost} times" if share.lost > 1 else "")
        lines.append(line("fetched", text))
        if share.computed:
            sent = f"{share.computed:,} rows of experts, {format_bytes(share.computed_bytes)} sent, by {share.place}"
            lines.append(line("computed", sent))
    return lines


def _predictions(stats: SpeculationStats) -> list[str]:
    """Return lines about how often predictions were right, and their cost."""
    further = [f"{distance} layers ahead" for distance in range(2, len(stats.guesses))]
    names = ["at the layer itself", "one layer ahead", *further]
    rates = ", ".join(
        f"{right / count:.1%} right {name}"
        for right, count, name in zip(stats.right, stats.guesses, names, strict=True)
        if count
    )
    steps = f"{stats.steps_on} of {stats.steps_on + stats.steps_off} steps"
    state = "on" if stats.is_on else "off"
    return [
        line("predicted", f"in {steps}, now {state}" + (f"; {rates}" if rates else "")),
        line("", f"predicting costs {1e3 * stats.seconds / max(stats.steps_on, 1):.2f} ms a step"),
    ]


def with_processes(clients: object, processes: Sequence[int]) -> str:
    """Return a number of clients, with the ids of their ``processes`` or of three: "2 (processes 41, 42)"."""
    known = [str(process) for process in processes if process]  # 0: in a PID namespace that the daemon can't see
    more = ", ..." if len(known) > 3 else ""
    what = "process" if len(known) == 1 else "processes"
    return f"{clients} ({what} {', '.join(known[:3])}{more})" if known else str(clients)


def format_seconds(seconds: float) -> str:
    """Return seconds as text: 3725 -> "1 h 2 min"."""
    whole = max(int(seconds), 0)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
