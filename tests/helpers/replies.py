"""Replies of a daemon, as moetier top gets them."""

from __future__ import annotations

from moetier.proto import expert_store_pb2 as pb

SEVEN, EIGHT = (pb.DescribeReply(pid=pid, version="1") for pid in (7, 8))


def block(count: int, *ready: int, uses: dict[int, int] | None = None) -> pb.Block:
    return pb.Block(ready=ready, uses=[(uses or {}).get(expert, 0) for expert in range(count)])


def reply(uptime: float, host: pb.Tier, *blocks: pb.Block, clients: list[pb.Client] | None = None) -> pb.StatsReply:
    return pb.StatsReply(
        models=[pb.ModelStats(name="acme/one", digest="1", host=host)],
        details=[pb.Details(blocks=blocks, clients=clients or [])],
        uptime_s=uptime,
    )
