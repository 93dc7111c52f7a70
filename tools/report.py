"""The tier report: what a run cost, tier by tier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes
from moetier.tiers.stats import TierStats

from .plain import plain

if TYPE_CHECKING:
    from moetier.proto.expert_store_pb2 import Tier
    from moetier.runtime.share import Share
    from moetier.runtime.speculation import SpeculationStats
    from moetier.runtime.tiers import Tiers


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one generation, or of several together: token counts, and seconds from the start."""

    prompt_tokens: int  # that were computed
    new_tokens: int
    first_token: float  # seconds to the first new token
    total: float  # seconds to the last
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
        """Prompt tokens a second, up to the first new token."""
        return self.prompt_tokens / self.first_token if self.first_token else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second behind the first; 0 where there is only one."""
        more, seconds = self.new_tokens - self.generations, self.total - self.first_token
        return more / seconds if more > 0 and seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token_s": self.first_token,
            "total_s": self.total,
            "prefill_tokens_per_s": self.prefill_rate,
            "decode_tokens_per_s": self.decode_rate,
        }


def tier_json(stats: TierStats, timing: Timing) -> dict[str, Any]:
    """A tier's counters with what follows from them for this run."""
    tokens = timing.prompt_tokens + timing.new_tokens
    return stats.to_json() | {
        "bytes_per_token": stats.bytes_in / tokens if tokens else 0.0,
        "wait_share": stats.wait_seconds / timing.total if timing.total else 0.0,
    }


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def tier_report(timing: Timing, tiers: list[TierStats]) -> str:
    """For people."""
    head = [
        "tier",
        "slots",
        "hits",
        "misses",
        "hit ratio",
        "read",
        "a token",
        "evictions",
        "wait p50",
        "p99",
        "of time",
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
    return (
        f"prefill  {timing.prompt_tokens} tokens, {timing.prefill_rate:.1f} tokens/s, "
        f"first token after {timing.first_token:.2f} s\n"
        f"decode   {timing.new_tokens} tokens, {timing.decode_rate:.1f} tokens/s\n{table(rows)}"
    )


def run_report(timing: Timing, tiers: Tiers) -> str:
    """All that there is to say of the tiers of one model; for people."""
    stats, shares = tiers.stats(), tiers.shares()
    parts = [tier_report(timing, stats)]
    if shares:
        parts.append(shares_report(shares))
    if tiers.speculation is not None:
        parts.append(speculation_report(tiers.speculation.stats(), stats))
    if tiers.learns:
        parts.append(learning_report(stats[0]))
    return "\n".join(parts)


def run_json(timing: Timing, tiers: Tiers) -> dict[str, Any]:
    """The same, for programs."""
    return {
        "experts": tiers.where,
        "shares": [asdict(share) for share in tiers.shares()],
        **timing.to_json(),
        "tiers": {stats.name: tier_json(stats, timing) for stats in tiers.stats()},
        "speculation": tiers.speculation.stats().to_json() if tiers.speculation is not None else None,
    }


def speculation_report(stats: SpeculationStats, tiers: list[TierStats]) -> str:
    """What was guessed, how well, what asking cost, and what became of the wishes; for people."""
    names = ["at the layer", *(f"{distance} ahead" for distance in range(1, len(stats.guesses)))]
    rates = [
        f"{right / count:.1%} right {name}"
        for right, count, name in zip(stats.right, stats.guesses, names, strict=True)
        if count
    ]
    # whose experts are a daemon's has no counts: there they are of all clients together, in ``moetier stats``
    wishes = [f"wishes   {tier.name}: {wishes_text(tier)}" for tier in tiers if tier.prefetched or tier.cancelled]
    return "\n".join(
        [
            f"guesses  in {stats.steps_on} of {stats.steps_on + stats.steps_off} steps ({stats.mode}, "
            f"{'on' if stats.is_on else 'off'} at the end): {', '.join(rates) or 'none'}",
            f"asking   {1e3 * stats.seconds / max(stats.steps_on, 1):.2f} ms a step",
            *wishes,
        ]
    )


def wishes_text(tier: TierStats | Tier) -> str:
    """What became of a tier's wishes; for people."""
    return (
        f"{tier.prefetched:,} read, {tier.useful:,} useful, {tier.late:,} late, {tier.wasted:,} wasted; "
        f"{tier.cancelled:,} cancelled; up to {tier.saved_seconds:.2f} s of waiting saved"
    )


def shares_report(shares: list[Share]) -> str:
    """From where the host tier's records came; for people."""
    return "\n".join(
        f"fetched  {share.records} records, {format_bytes(share.bytes)}, from {share.place}"
        + (f", which is away: {plain(share.away)}" if share.away else "")
        for share in shares
    )


def learning_report(host: TierStats) -> str:
    """What the host tier began with; for people."""
    return (
        f"learned  {host.warmed} experts that earlier runs used were read beforehand, {host.recalled} of them were used"
    )
