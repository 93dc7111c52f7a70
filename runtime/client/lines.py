"""Lines: the channels to one daemon, for records."""

from __future__ import annotations

import itertools
from typing import Any

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS, Address, Credentials
from moetier.runtime.wire.channel import SERVICE, open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import closed_channel, error_of
from moetier.tiers.errors import UnknownModelError
from moetier.tiers.manifest import Manifest

_NAMES = 200  # characters of what a stranger says that it serves


class Lines:
    """Used in turn; over a Unix socket with the connection that their credential hangs on."""

    def __init__(self, address: Address, credentials: Credentials, channels: int) -> None:
        self._address = address
        self._side = ControlConnection.open(address.folder, None) if address.folder is not None else None
        self._channels: list[grpc.Channel] = []
        self._turn = itertools.count()
        try:
            bearer = self._side.session_id if self._side is not None else None
            for _ in range(channels):
                self._channels.append(open_channel(address, credentials, bearer=bearer))
        except BaseException:
            self.close()
            raise
        # no deserialiser: decode_piece does without a copy
        self.fetches: list[Any] = [
            channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString) for channel in self._channels
        ]

    def next(self) -> Any:
        """A multi-callable of Fetch."""
        return self.fetches[next(self._turn) % len(self.fetches)]

    def check(self, manifest: Manifest, patience: float) -> None:
        """Asks whether the daemon serves this store. Raises UnknownModelError, and what a call may fail with."""
        describe = self._channels[0].unary_unary(
            f"/{SERVICE}/Describe", pb.DescribeRequest.SerializeToString, pb.DescribeReply.FromString
        )
        try:
            reply = describe(pb.DescribeRequest(), timeout=patience)
        except grpc.RpcError as error:
            raise error_of(error, self._address.target) from None
        except ValueError:
            raise closed_channel() from None
        if manifest.digest not in {model.digest for model in reply.models}:
            served = (" ".join(f"{model.name} ({model.digest[:DIGEST_CHARS]})".split()) for model in reply.models)
            names = ", ".join(served)[:_NAMES] or "nothing"
            raise UnknownModelError(
                f"The daemon does not serve the store of {manifest.model} that is here "
                f"({manifest.digest[:DIGEST_CHARS]}); it serves {names}.",
                "Start it on a copy of this model directory; start it again if that was converted again meanwhile.",
            )

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        if self._side is not None:
            self._side.close()
