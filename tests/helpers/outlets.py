"""Small servers of Fetch in the test's own process: an honest one on a real host tier, and any hostile one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
from integrity import check_integrity

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer
from moetier.runtime.daemon.fetch import FetchCalls
from moetier.runtime.daemon.rpc import add_service
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import MoetierError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.reader import ShardStore

PLAIN = Credentials(insecure=True)

Behaviour = Callable[[pb.FetchRequest, grpc.ServicerContext], Iterator[bytes]]


class Outlet(ExpertStoreServicer):
    """Says that it serves ``manifest``, and answers Fetch as ``behaviour`` does."""

    def __init__(self, manifest: Manifest, behaviour: Behaviour) -> None:
        self._manifest = manifest
        self._behaviour = behaviour
        self.requests: list[pb.FetchRequest] = []

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        model = pb.Model(name=self._manifest.model, digest=self._manifest.digest)
        return pb.DescribeReply(version="0", pid=os.getpid(), models=[model])

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]  # serialised pieces: add_service
        self.requests.append(request)
        try:
            yield from self._behaviour(request, context)
        except MoetierError as error:
            abort(context, error)


@contextlib.contextmanager
def serving(
    outlet: Outlet, *, address: str = "127.0.0.1:0", tls: grpc.ServerCredentials | None = None, calls: int | None = None
) -> Iterator[Address]:
    """``calls`` are served at a time; more are refused."""
    server = grpc.server(
        futures.ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=calls
    )
    add_service(outlet, server)
    port = server.add_secure_port(address, tls) if tls is not None else server.add_insecure_port(address)
    server.start()
    try:
        yield Address(target=f"{address.rpartition(':')[0]}:{port}")
    finally:
        server.stop(0).wait()


def outlet_of(fetches: FetchCalls, manifest: Manifest) -> Outlet:
    return Outlet(manifest, fetches.serve)


@contextlib.contextmanager
def served(host: HostTier) -> Iterator[Address]:
    """Serve fetches of a tier's records, and yield the address."""
    fetches = FetchCalls(host, host.manifest, host.layout.slots_by_array)
    try:
        with serving(outlet_of(fetches, host.manifest)) as address:
            yield address
    finally:
        fetches.close()


@contextlib.contextmanager
def served_folder(folder: Path, slots: int = 3, **bounds: float) -> Iterator[tuple[Address, HostTier, FetchCalls]]:
    """A host tier of ``slots`` slots, and where its records are fetched."""
    counts = {"records": slots}
    with ShardStore.open(folder) as store, HostTier(store, slots=counts) as host:
        fetches = FetchCalls(host, store.manifest, counts, **bounds)
        try:
            with serving(outlet_of(fetches, store.manifest)) as address:
                yield address, host, fetches
        finally:
            fetches.close()
        check_integrity(host)


# gRPC opens what its event loop polls when it is first used, and closes it with the last of its objects: in between
# tests, and not in one that looks for descriptors left behind. One channel lives as long as the process does.
_KEPT = grpc.insecure_channel("127.0.0.1:1")
