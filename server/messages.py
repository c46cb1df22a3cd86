"""Messages between workers, coordinator and shards: the small parts, in msgpack; tensors stand in :mod:`.wire`.

A message is a map with a version and a kind. It is checked field by field before anything looks at its meaning; what a
push means (rank, step, lengths) is checked by the shard that receives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import msgpack

from ..sharding.buffers import StateSource
from ..sharding.coverage import Holdings, Part
from ..sharding.errors import (
    MessageError,
    TruncatedMessageError,
    UnknownVersionError,
)
from ..sharding.job import JobSpec
from ..sharding.layout import DTYPE_NAMES, ParamSpec, dtype_from_name, dtype_name
from ..sharding.pieces import HeldPieces, PieceValues
from ..sharding.push import PushHeader
from ..sharding.reports import ShardStatus
from ..sharding.segments import TOKEN_BYTES, Address, Placement, Span
from .wire import describe

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 2**28


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """What a worker is told when it registers.

    Attributes:
        spec: The job as the service runs it, packed.
        timeline, sequence, step, skipped_steps: Where the service stands.
        scalars: The rule's scalars.
        ranks: Whom the next step waits for, ascending.
        needs_parameters: Rank 0 is to send its parameters; the others wait for them.
    """

    spec: bytes
    timeline: int
    sequence: int
    step: int
    skipped_steps: int
    scalars: Mapping[str, float]
    ranks: tuple[int, ...]
    needs_parameters: bool

    @classmethod
    def of(cls, spec: JobSpec, status: ShardStatus, *, needs_parameters: bool) -> Registration:
        """What a worker is told of a job whose shards stand at ``status``."""
        return cls(
            spec=pack_job(spec),
            timeline=status.timeline,
            sequence=status.sequence,
            step=status.step,
            skipped_steps=status.skipped_steps,
            scalars=status.scalars,
            ranks=status.world.ranks,
            needs_parameters=needs_parameters,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class LoadHeader:
    """The small part of a state to load; see :class:`stepwell.sharding.StateSource`."""

    step_counts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sequence: int = 0
    step: int = 0
    skipped_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where a rank's parameters go.

    Attributes:
        part: Which of the rank's two coverages.
        dtypes: Per extent, the wire's dtype by name.
        placement: Memory of the worker's for them, per extent; None for the reply.
    """

    part: Part
    dtypes: tuple[str, ...]
    placement: Placement | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """A push and what its sender wants for it, but for the tensors that travel beside it.

    Attributes:
        push: The push's header, packed: it is the same for every shard.
        gradient: Memory of the worker's that the gradient lies in, per extent; None if it travels.
        target: Where the parameters go.
        timeout_s: How long the sender waits for the step to be decided.
        ahead: Which pieces of the gradient were sent before, in order, by their serial numbers; 0 for one that comes
            with this. Empty if the gradient is not in pieces.
    """

    push: bytes
    gradient: Placement | None
    target: Target
    timeout_s: float
    ahead: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PieceHeader:
    """What a piece of a gradient is that is sent ahead of its push.

    Attributes:
        rank, incarnation: Who sends it.
        piece: Which one it is of the sender's pieces for this shard.
        serial: Counts what the sender sends ahead, from 1: of two that are the same piece the later one counts.
    """

    rank: int
    incarnation: str
    piece: int
    serial: int


def pack_push(header: PushHeader) -> bytes:
    """A push's header as bytes."""
    fields = {field.name: getattr(header, field.name) for field in dataclasses.fields(header)}
    return _pack("push", fields)


def unpack_push(data: bytes) -> PushHeader:
    """The reverse of :func:`pack_push`.

    Raises:
        UnknownVersionError: If it is of another protocol version.
        TruncatedMessageError: If it ends early.
        MessageError: If it is anything else than a push, or a field is missing or of a wrong type.
    """
    fields = _unpack("push", data)
    return PushHeader(
        timeline=_field(fields, "timeline", _is_count),
        sequence=_field(fields, "sequence", _is_count),
        rank=_field(fields, "rank", _is_count),
        incarnation=_field(fields, "incarnation", lambda value: isinstance(value, str)),
        attempt=_field(fields, "attempt", _is_count),
        present=_field(fields, "present", lambda value: isinstance(value, bytes)),
        hyper=_field(fields, "hyper", lambda value: value is None or _is_map_of(value, _is_floats)),
        scalars=_field(fields, "scalars", lambda value: value is None or _is_map_of(value, _is_finite)),
        max_grad_norm=_field(fields, "max_grad_norm", lambda value: value is None or _is_positive(value)),
        max_grad_value=_field(fields, "max_grad_value", lambda value: value is None or _is_positive(value)),
        grad_scale=_field(fields, "grad_scale", lambda value: _is_positive(value) and _is_finite(value)),
        found_inf=_field(fields, "found_inf", lambda value: isinstance(value, bool)),
        max_abs=_field(fields, "max_abs", lambda value: value is None or (_is_finite(value) and value >= 0)),
        loss=_field(fields, "loss", lambda value: value is None or _is_float(value)),
    )


def pack_exchange(exchange: Exchange) -> bytes:
    """What goes to one shard as bytes."""
    gradient, target = _placement_fields(exchange.gradient), _target_fields(exchange.target)
    fields = {"push": exchange.push, "gradient": gradient, "target": target, "timeout_s": exchange.timeout_s}
    return _pack("exchange", {**fields, "ahead": exchange.ahead})


def unpack_exchange(data: bytes) -> Exchange:
    """The reverse of :func:`pack_exchange`; raises as :func:`unpack_push`."""
    fields = _unpack("exchange", data)
    return Exchange(
        push=_field(fields, "push", lambda value: isinstance(value, bytes)),
        gradient=_placement(fields, "gradient"),
        target=_target(_field(fields, "target", _is_fields)),
        timeout_s=_field(fields, "timeout_s", lambda value: _is_positive(value) and _is_finite(value)),
        ahead=tuple(_field(fields, "ahead", lambda value: isinstance(value, list) and all(map(_is_count, value)))),
    )


def pack_piece(header: PieceHeader) -> bytes:
    """The header of a piece as bytes."""
    return _pack("piece", {field.name: getattr(header, field.name) for field in dataclasses.fields(header)})


def unpack_piece(data: bytes) -> PieceHeader:
    """The reverse of :func:`pack_piece`; raises as :func:`unpack_push`."""
    fields = _unpack("piece", data)
    return PieceHeader(
        rank=_field(fields, "rank", _is_count),
        incarnation=_field(fields, "incarnation", lambda value: isinstance(value, str)),
        piece=_field(fields, "piece", _is_count),
        serial=_field(fields, "serial", lambda value: _is_count(value) and value > 0),
    )


def pack_target(target: Target) -> bytes:
    """A request for parameters as bytes."""
    return _pack("target", _target_fields(target))


def unpack_target(data: bytes) -> Target:
    """The reverse of :func:`pack_target`; raises as :func:`unpack_push`."""
    return _target(_unpack("target", data))


def pack_job(spec: JobSpec) -> bytes:
    """A job's description as bytes."""
    return _pack("job", spec.to_dict())


def unpack_job(data: bytes) -> JobSpec:
    """The reverse of :func:`pack_job`; raises as :func:`unpack_push`."""
    fields = _unpack("job", data)
    _field(fields, "rule", lambda value: isinstance(value, str))
    _field(fields, "rule_fields", lambda value: isinstance(value, dict))
    _field(fields, "params", lambda value: isinstance(value, list) and all(map(_is_param, value)))
    _field(fields, "num_groups", _is_count)
    _field(fields, "world_size", _is_count)
    _field(fields, "chunk_numel", lambda value: value is None or _is_count(value))
    _field(fields, "gradients", lambda value: isinstance(value, str))
    _field(fields, "kernel", lambda value: isinstance(value, str))
    _field(fields, "batches", lambda value: isinstance(value, list) and all(map(_is_count, value)))
    return JobSpec.from_dict(fields)


def pack_holdings(holdings: Holdings | None) -> bytes:
    """What a rank holds of a sharded model as bytes; None for a rank that has the whole model."""
    return _pack("holdings", {"ranges": None if holdings is None else holdings.to_lists()})


def unpack_holdings(data: bytes, params: Sequence[ParamSpec]) -> Holdings | None:
    """The reverse of :func:`pack_holdings`; raises as :func:`unpack_push`."""
    fields = _unpack("holdings", data)
    ranges = _field(fields, "ranges", lambda value: value is None or _is_map_of(value, _are_ranges))
    return None if ranges is None else Holdings.from_lists(ranges, params)


def source_of(header: LoadHeader, parts: Iterable[PieceValues]) -> StateSource:
    """The state that ranks hold in parts."""
    pieces = HeldPieces(parts)
    fields = {field.name: getattr(header, field.name) for field in dataclasses.fields(header)}
    return StateSource(read=pieces.read, available=pieces.available, **fields)


def _pack(kind: str, fields: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb({"version": PROTOCOL_VERSION, "kind": kind, **fields})
    return packed


def _unpack(kind: str, data: bytes) -> dict[str, Any]:
    if not isinstance(data, bytes) or len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"expected at most {MAX_MESSAGE_BYTES} bytes, got {describe(data)}")
    try:
        fields = msgpack.unpackb(data)
    except (msgpack.StackError, msgpack.ExtraData, msgpack.FormatError, UnicodeDecodeError) as error:
        raise MessageError(
            f"expected one {kind} message; the bytes are not msgpack ({type(error).__name__})"
        ) from error
    except (ValueError, msgpack.UnpackException) as error:
        raise TruncatedMessageError(
            f"expected a whole {kind} message, got {len(data)} bytes that end early ({error})"
        ) from error
    if not isinstance(fields, dict) or "version" not in fields:
        raise MessageError(f"expected a {kind} message, got something else in msgpack")
    if fields["version"] != PROTOCOL_VERSION:
        raise UnknownVersionError(
            f"expected protocol version {PROTOCOL_VERSION}, got {describe(fields['version'])}; "
            "run the same Stepwell release on workers and service"
        )
    if fields.get("kind") != kind:
        raise MessageError(f"expected a {kind} message, got kind {describe(fields.get('kind'))}")
    return fields


def _field(fields: Mapping[str, Any], name: str, is_valid: Callable[[Any], bool]) -> Any:
    if name not in fields:
        raise MessageError(f"the message has no field {name!r}")
    if not is_valid(fields[name]):
        raise MessageError(f"field {name!r}: got {describe(fields[name])}, which it cannot be")
    return fields[name]


def _target_fields(target: Target) -> dict[str, Any]:
    return {"part": target.part, "dtypes": target.dtypes, "placement": _placement_fields(target.placement)}


def _target(fields: Mapping[str, Any]) -> Target:
    return Target(
        part=_field(fields, "part", _is_part),
        dtypes=tuple(_field(fields, "dtypes", lambda value: isinstance(value, list) and all(map(_is_dtype, value)))),
        placement=_placement(fields, "placement"),
    )


def _placement_fields(placement: Placement | None) -> list[Any] | None:
    if placement is None:
        return None
    address = placement.address
    spans = [(span.offset, span.numel, dtype_name(span.dtype)) for span in placement.spans]
    return [address.pid, address.fd, address.size_bytes, address.token, spans]


def _placement(fields: Mapping[str, Any], name: str) -> Placement | None:
    packed = _field(fields, name, lambda value: value is None or _is_placement(value))
    if packed is None:
        return None
    *address, spans = packed
    return Placement(
        Address(*address), tuple(Span(offset, numel, dtype_from_name(dtype)) for offset, numel, dtype in spans)
    )


def _is_placement(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 5:
        return False
    pid, fd, size_bytes, token, spans = value
    is_address = all(map(_is_count, (pid, fd, size_bytes))) and isinstance(token, bytes) and len(token) == TOKEN_BYTES
    return is_address and isinstance(spans, list) and all(map(_is_span, spans))


def _is_span(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    offset, numel, dtype = value
    return _is_count(offset) and _is_count(numel) and _is_dtype(dtype)


def _is_dtype(value: object) -> bool:
    return value in DTYPE_NAMES


def _is_part(value: object) -> bool:
    return value in get_args(Part)


def _is_fields(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_float(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_floats(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(map(_is_float, value))


def _is_map_of(value: object, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_valid(item) for key, item in value.items())


def _is_param(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 5:
        return False
    name, shape, dtype, group, decays = value
    is_shape = isinstance(shape, list) and all(map(_is_count, shape))
    return (
        isinstance(name, str) and is_shape and isinstance(dtype, str) and _is_count(group) and isinstance(decays, bool)
    )


def _are_ranges(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and all(map(_is_count, each)) for each in value
    )
