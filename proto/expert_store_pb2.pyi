from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("version", "pid", "started_unix_ms", "models")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    started_unix_ms: int
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., started_unix_ms: _Optional[int] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "digest", "budget_bytes", "slots", "directory", "computes", "checks")
    class SlotsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    COMPUTES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    budget_bytes: int
    slots: _containers.ScalarMap[str, int]
    directory: str
    computes: bool
    checks: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., slots: _Optional[_Mapping[str, int]] = ..., directory: _Optional[str] = ..., computes: bool = ..., checks: bool = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("acquire", "release", "uses", "prefetch")
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    acquire: Acquire
    release: Release
    uses: Uses
    prefetch: Prefetch
    def __init__(self, acquire: _Optional[_Union[Acquire, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., uses: _Optional[_Union[Uses, _Mapping]] = ..., prefetch: _Optional[_Union[Prefetch, _Mapping]] = ...) -> None: ...

class Acquire(_message.Message):
    __slots__ = ("request", "block", "experts", "timeout_ms", "of_total")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    OF_TOTAL_FIELD_NUMBER: _ClassVar[int]
    request: int
    block: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    timeout_ms: int
    of_total: int
    def __init__(self, request: _Optional[int] = ..., block: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., timeout_ms: _Optional[int] = ..., of_total: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("request", "experts")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    request: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class Uses(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[Experts]
    def __init__(self, blocks: _Optional[_Iterable[_Union[Experts, _Mapping]]] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("requested",)
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    requested: Experts
    def __init__(self, requested: _Optional[_Union[Experts, _Mapping]] = ...) -> None: ...

class Experts(_message.Message):
    __slots__ = ("block", "experts")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    block: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("granted", "failed")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    granted: Granted
    failed: Failed
    def __init__(self, granted: _Optional[_Union[Granted, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("request", "expert", "slot", "generation")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    request: int
    expert: int
    slot: int
    generation: int
    def __init__(self, request: _Optional[int] = ..., expert: _Optional[int] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("request", "error")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request: int
    error: Error
    def __init__(self, request: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "block", "expert", "offset", "length", "crc32c")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    digest: str
    block: int
    expert: int
    offset: int
    length: int
    crc32c: int
    def __init__(self, digest: _Optional[str] = ..., block: _Optional[int] = ..., expert: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data", "crc32c")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    crc32c: int
    def __init__(self, data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("digest", "block", "experts", "hidden_states", "dtype", "counts", "picked", "activation", "crc32c")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    PICKED_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    digest: str
    block: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    hidden_states: bytes
    dtype: str
    counts: _containers.RepeatedScalarFieldContainer[int]
    picked: _containers.RepeatedScalarFieldContainer[int]
    activation: Activation
    crc32c: int
    def __init__(self, digest: _Optional[str] = ..., block: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., hidden_states: _Optional[bytes] = ..., dtype: _Optional[str] = ..., counts: _Optional[_Iterable[int]] = ..., picked: _Optional[_Iterable[int]] = ..., activation: _Optional[_Union[Activation, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class Activation(_message.Message):
    __slots__ = ("function", "interleaved", "alpha", "limit", "shift", "gated")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INTERLEAVED_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    GATED_FIELD_NUMBER: _ClassVar[int]
    function: str
    interleaved: bool
    alpha: float
    limit: float
    shift: float
    gated: bool
    def __init__(self, function: _Optional[str] = ..., interleaved: bool = ..., alpha: _Optional[float] = ..., limit: _Optional[float] = ..., shift: _Optional[float] = ..., gated: bool = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("details",)
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    details: bool
    def __init__(self, details: bool = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("models", "uptime_s", "details")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelStats]
    uptime_s: float
    details: _containers.RepeatedCompositeFieldContainer[Details]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelStats, _Mapping]]] = ..., uptime_s: _Optional[float] = ..., details: _Optional[_Iterable[_Union[Details, _Mapping]]] = ...) -> None: ...

class ModelStats(_message.Message):
    __slots__ = ("name", "digest", "host", "clients", "sessions", "leases", "requests", "reported_hits", "fetches", "fetched_bytes", "computed", "session_bytes_in", "session_bytes_out", "recovered", "fault")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPORTED_HITS_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    SESSION_BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    SESSION_BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    host: Tier
    clients: int
    sessions: int
    leases: int
    requests: int
    reported_hits: int
    fetches: int
    fetched_bytes: int
    computed: int
    session_bytes_in: int
    session_bytes_out: int
    recovered: int
    fault: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., host: _Optional[_Union[Tier, _Mapping]] = ..., clients: _Optional[int] = ..., sessions: _Optional[int] = ..., leases: _Optional[int] = ..., requests: _Optional[int] = ..., reported_hits: _Optional[int] = ..., fetches: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., computed: _Optional[int] = ..., session_bytes_in: _Optional[int] = ..., session_bytes_out: _Optional[int] = ..., recovered: _Optional[int] = ..., fault: _Optional[str] = ...) -> None: ...

class Details(_message.Message):
    __slots__ = ("clients", "blocks")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    def __init__(self, clients: _Optional[_Iterable[_Union[Client, _Mapping]]] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("number", "pid", "connected_s", "leases", "reported_hits", "requested")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REPORTED_HITS_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    number: int
    pid: int
    connected_s: float
    leases: int
    reported_hits: int
    requested: int
    def __init__(self, number: _Optional[int] = ..., pid: _Optional[int] = ..., connected_s: _Optional[float] = ..., leases: _Optional[int] = ..., reported_hits: _Optional[int] = ..., requested: _Optional[int] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("ready", "uses")
    READY_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    ready: _containers.RepeatedScalarFieldContainer[int]
    uses: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ready: _Optional[_Iterable[int]] = ..., uses: _Optional[_Iterable[int]] = ...) -> None: ...

class Tier(_message.Message):
    __slots__ = ("name", "slots", "ready", "leased", "memory_bytes", "hits", "misses", "joined", "prefetched", "useful", "late", "wasted", "cancelled", "dropped", "saved_seconds", "warmed", "recalled", "evictions", "failures", "bytes_in", "load_bounds", "loads", "load_seconds", "waits", "wait_seconds", "wait_median", "wait_p99", "discarded")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_FIELD_NUMBER: _ClassVar[int]
    USEFUL_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    WASTED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    SAVED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARMED_FIELD_NUMBER: _ClassVar[int]
    RECALLED_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    LOAD_BOUNDS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MEDIAN_FIELD_NUMBER: _ClassVar[int]
    WAIT_P99_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    name: str
    slots: int
    ready: int
    leased: int
    memory_bytes: int
    hits: int
    misses: int
    joined: int
    prefetched: int
    useful: int
    late: int
    wasted: int
    cancelled: int
    dropped: int
    saved_seconds: float
    warmed: int
    recalled: int
    evictions: int
    failures: int
    bytes_in: int
    load_bounds: _containers.RepeatedScalarFieldContainer[float]
    loads: _containers.RepeatedScalarFieldContainer[int]
    load_seconds: float
    waits: int
    wait_seconds: float
    wait_median: float
    wait_p99: float
    discarded: int
    def __init__(self, name: _Optional[str] = ..., slots: _Optional[int] = ..., ready: _Optional[int] = ..., leased: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., joined: _Optional[int] = ..., prefetched: _Optional[int] = ..., useful: _Optional[int] = ..., late: _Optional[int] = ..., wasted: _Optional[int] = ..., cancelled: _Optional[int] = ..., dropped: _Optional[int] = ..., saved_seconds: _Optional[float] = ..., warmed: _Optional[int] = ..., recalled: _Optional[int] = ..., evictions: _Optional[int] = ..., failures: _Optional[int] = ..., bytes_in: _Optional[int] = ..., load_bounds: _Optional[_Iterable[float]] = ..., loads: _Optional[_Iterable[int]] = ..., load_seconds: _Optional[float] = ..., waits: _Optional[int] = ..., wait_seconds: _Optional[float] = ..., wait_median: _Optional[float] = ..., wait_p99: _Optional[float] = ..., discarded: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("type", "cause", "fix")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    type: str
    cause: str
    fix: str
    def __init__(self, type: _Optional[str] = ..., cause: _Optional[str] = ..., fix: _Optional[str] = ...) -> None: ...
