from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("major", "minor", "role", "name", "address", "description", "former")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    FORMER_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    role: str
    name: str
    address: str
    description: str
    former: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., role: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., description: _Optional[str] = ..., former: _Optional[int] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("major", "minor", "member", "lease_seconds", "description", "routes", "shard")
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    major: int
    minor: int
    member: int
    lease_seconds: float
    description: str
    routes: Routes
    shard: int
    def __init__(self, major: _Optional[int] = ..., minor: _Optional[int] = ..., member: _Optional[int] = ..., lease_seconds: _Optional[float] = ..., description: _Optional[str] = ..., routes: _Optional[_Union[Routes, _Mapping]] = ..., shard: _Optional[int] = ...) -> None: ...

class Routes(_message.Message):
    __slots__ = ("epoch", "owners", "addresses")
    class AddressesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    owners: bytes
    addresses: _containers.ScalarMap[int, str]
    def __init__(self, epoch: _Optional[int] = ..., owners: _Optional[bytes] = ..., addresses: _Optional[_Mapping[int, str]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("member", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    member: int
    facts: _containers.ScalarMap[str, float]
    def __init__(self, member: _Optional[int] = ..., facts: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("known", "route_epoch", "may_end")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAY_END_FIELD_NUMBER: _ClassVar[int]
    known: bool
    route_epoch: int
    may_end: bool
    def __init__(self, known: _Optional[bool] = ..., route_epoch: _Optional[int] = ..., may_end: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("member", "clocks")
    class ClocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    member: int
    clocks: _containers.ScalarMap[int, int]
    def __init__(self, member: _Optional[int] = ..., clocks: _Optional[_Mapping[int, int]] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("wait_seconds",)
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    wait_seconds: float
    def __init__(self, wait_seconds: _Optional[float] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class RoutesRequest(_message.Message):
    __slots__ = ("newer_than", "wait_seconds")
    NEWER_THAN_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    newer_than: int
    wait_seconds: float
    def __init__(self, newer_than: _Optional[int] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class NextChunkRequest(_message.Message):
    __slots__ = ("member", "holding")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    member: int
    holding: Indices
    def __init__(self, member: _Optional[int] = ..., holding: _Optional[_Union[Indices, _Mapping]] = ...) -> None: ...

class Indices(_message.Message):
    __slots__ = ("indices",)
    INDICES_FIELD_NUMBER: _ClassVar[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indices: _Optional[_Iterable[int]] = ...) -> None: ...

class NextChunkReply(_message.Message):
    __slots__ = ("chunk", "wait_seconds", "finished")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    chunk: Chunk
    wait_seconds: float
    finished: Done
    def __init__(self, chunk: _Optional[_Union[Chunk, _Mapping]] = ..., wait_seconds: _Optional[float] = ..., finished: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("index", "lane", "lease", "first_clock", "first_sample", "num_samples", "batch_size")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_CLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    index: int
    lane: int
    lease: int
    first_clock: int
    first_sample: int
    num_samples: int
    batch_size: int
    def __init__(self, index: _Optional[int] = ..., lane: _Optional[int] = ..., lease: _Optional[int] = ..., first_clock: _Optional[int] = ..., first_sample: _Optional[int] = ..., num_samples: _Optional[int] = ..., batch_size: _Optional[int] = ...) -> None: ...

class CompleteChunkRequest(_message.Message):
    __slots__ = ("member", "lane", "lease", "index")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    member: int
    lane: int
    lease: int
    index: int
    def __init__(self, member: _Optional[int] = ..., lane: _Optional[int] = ..., lease: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class MemberRequest(_message.Message):
    __slots__ = ("member",)
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    member: int
    def __init__(self, member: _Optional[int] = ...) -> None: ...

class ClientLane(_message.Message):
    __slots__ = ("lane", "lease", "next_clock")
    LANE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NEXT_CLOCK_FIELD_NUMBER: _ClassVar[int]
    lane: int
    lease: int
    next_clock: int
    def __init__(self, lane: _Optional[int] = ..., lease: _Optional[int] = ..., next_clock: _Optional[int] = ...) -> None: ...

class GateRequest(_message.Message):
    __slots__ = ("member", "clock", "wait_seconds")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    member: int
    clock: int
    wait_seconds: float
    def __init__(self, member: _Optional[int] = ..., clock: _Optional[int] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class GateReply(_message.Message):
    __slots__ = ("open",)
    OPEN_FIELD_NUMBER: _ClassVar[int]
    open: bool
    def __init__(self, open: _Optional[bool] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("name", "time", "completed_chunks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    time: float
    completed_chunks: int
    def __init__(self, name: _Optional[str] = ..., time: _Optional[float] = ..., completed_chunks: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    shard: int
    def __init__(self, shard: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("run_id", "route_epoch", "members", "chunks", "chunks_completed", "chunks_out", "samples", "samples_completed", "rows", "row_bytes", "lost_pushes", "snapshots", "snapshot_age_seconds", "moves_done", "moving_buckets", "longest_freeze_seconds", "notes", "expired_leases", "has_begun")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_OUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOST_PUSHES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOVES_DONE_FIELD_NUMBER: _ClassVar[int]
    MOVING_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FREEZE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_LEASES_FIELD_NUMBER: _ClassVar[int]
    HAS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    run_id: int
    route_epoch: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    chunks: int
    chunks_completed: int
    chunks_out: int
    samples: int
    samples_completed: int
    rows: int
    row_bytes: int
    lost_pushes: int
    snapshots: _containers.RepeatedScalarFieldContainer[str]
    snapshot_age_seconds: float
    moves_done: int
    moving_buckets: int
    longest_freeze_seconds: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    expired_leases: int
    has_begun: bool
    def __init__(self, run_id: _Optional[int] = ..., route_epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., chunks: _Optional[int] = ..., chunks_completed: _Optional[int] = ..., chunks_out: _Optional[int] = ..., samples: _Optional[int] = ..., samples_completed: _Optional[int] = ..., rows: _Optional[int] = ..., row_bytes: _Optional[int] = ..., lost_pushes: _Optional[int] = ..., snapshots: _Optional[_Iterable[str]] = ..., snapshot_age_seconds: _Optional[float] = ..., moves_done: _Optional[int] = ..., moving_buckets: _Optional[int] = ..., longest_freeze_seconds: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., expired_leases: _Optional[int] = ..., has_begun: _Optional[bool] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("member", "role", "name", "address", "alive", "seconds_since_heard", "shard", "shard_state", "buckets", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_HEARD_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARD_STATE_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    member: int
    role: str
    name: str
    address: str
    alive: bool
    seconds_since_heard: float
    shard: int
    shard_state: str
    buckets: int
    facts: _containers.ScalarMap[str, float]
    def __init__(self, member: _Optional[int] = ..., role: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., alive: _Optional[bool] = ..., seconds_since_heard: _Optional[float] = ..., shard: _Optional[int] = ..., shard_state: _Optional[str] = ..., buckets: _Optional[int] = ..., facts: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ("order", "routes")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    order: int
    routes: Routes
    def __init__(self, order: _Optional[int] = ..., routes: _Optional[_Union[Routes, _Mapping]] = ...) -> None: ...

class FreezeRequest(_message.Message):
    __slots__ = ("order", "buckets", "seconds")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    order: int
    buckets: bytes
    seconds: float
    def __init__(self, order: _Optional[int] = ..., buckets: _Optional[bytes] = ..., seconds: _Optional[float] = ...) -> None: ...

class FreezeName(_message.Message):
    __slots__ = ("order",)
    ORDER_FIELD_NUMBER: _ClassVar[int]
    order: int
    def __init__(self, order: _Optional[int] = ...) -> None: ...

class CopyBucketsRequest(_message.Message):
    __slots__ = ("order", "address", "buckets", "since", "is_last")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    order: int
    address: str
    buckets: bytes
    since: _containers.RepeatedScalarFieldContainer[int]
    is_last: bool
    def __init__(self, order: _Optional[int] = ..., address: _Optional[str] = ..., buckets: _Optional[bytes] = ..., since: _Optional[_Iterable[int]] = ..., is_last: _Optional[bool] = ...) -> None: ...

class CopyBucketsReply(_message.Message):
    __slots__ = ("versions", "bytes")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    def __init__(self, versions: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ...) -> None: ...

class TakeBucketsRequest(_message.Message):
    __slots__ = ("buckets", "since")
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    buckets: bytes
    since: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, buckets: _Optional[bytes] = ..., since: _Optional[_Iterable[int]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("versions", "chunk")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    versions: Indices
    chunk: bytes
    def __init__(self, versions: _Optional[_Union[Indices, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
