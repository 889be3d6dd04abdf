# SPDX-License-Identifier: MIT
"""operator_db: the memory of an AgenC operator, in one file on the standard library.

An operator claims tasks on chain, works on them, proves the work and is paid; people talk to it by voice. This module
keeps what it must not forget in one SQLite file: a mirror of its tasks, the state of its voice sessions, the proofs
that win disputes, and its configuration.

    from operator_db import OperatorDb, TaskRecord, VerificationLog

    with OperatorDb("operator.db") as db:
        db.store_task(TaskRecord(task_id="t1", payload=b"{}", reward_lamports=5_000_000))
        db.complete_task("t1", VerificationLog(task_id="t1", outputs=b"the result"))
        assert db.get_task("t1").status == "completed"

A call that changes something returns after its change is committed; the class docstring of `OperatorDb` says what that
survives, and what threads and processes may do. `python operator_db.py` tries the main promises on a scratch database.

Contents: errors, records, codec, schema and opening, connections, namespace, evidence, metrics, OperatorDb, transfer,
self-check, command line.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import reprlib
import sqlite3
import stat
import sys
import threading
import time
import types
import typing
import weakref
from binascii import a2b_base64, b2a_base64
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from functools import partial, wraps
from heapq import merge
from io import RawIOBase, TextIOBase
from itertools import accumulate, islice, takewhile
from operator import attrgetter
from typing import IO, Annotated, Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar, cast
from zlib import crc32

__version__ = "1.0.0"
__all__ = ["BusyError", "ClosedError", "ConflictError", "DamagedError", "DbStats", "ForeignFileError"]
__all__ += ["Id", "InvalidRecordError", "Lamports", "Latency", "Namespace", "NewerSchemaError"]
__all__ += ["NotFoundError", "OperatorConfig", "OperatorDb", "OperatorDbError", "Progress", "PruneReport"]
__all__ += ["SessionState", "StatusChange", "StorageError", "TaskRecord", "TaskStatus", "TranscriptEntry"]
__all__ += ["UnixTime", "VerificationLog", "verify_dispute_bundle"]

R = TypeVar("R")
_Path = str | os.PathLike[str]
_File = _Path | IO[Any]
_Json = dict[str, Any]
_Row = tuple[Any, ...]  # of a table, or the values of a record's fields
Progress = Callable[[int, int], object]
"""What long work calls now and then: with how much is done, and of how much, 0 where that is not known."""


# ==== Errors: each is an OperatorDbError and the builtin kind that it is ==============================================


class OperatorDbError(Exception):
    """Base of every error that this module raises on purpose."""


class InvalidRecordError(OperatorDbError, ValueError):
    """A record, id or argument has a wrong type, range or shape; nothing was stored."""


class NotFoundError(OperatorDbError, LookupError):
    """The record to be changed is not there."""


class ConflictError(OperatorDbError, RuntimeError):
    """The change contradicts what is stored (`expected=`, other evidence, a stale session), or a transaction is misused."""


class BusyError(OperatorDbError, TimeoutError):
    """Another thread or process held the database for longer than `timeout`; nothing was changed, try again."""


class ClosedError(OperatorDbError, RuntimeError):
    """The database object was closed, or inherited by a fork while it was in use."""


class ForeignFileError(OperatorDbError, ValueError):
    """The file is not SQLite, belongs to another application, or has tables or triggers that are not ours."""


class NewerSchemaError(OperatorDbError, ValueError):
    """A newer version of this module wrote the file."""


class DamagedError(OperatorDbError, ValueError):
    """What is stored is not what was written: a bad page, checksum, JSON document or record."""


class StorageError(OperatorDbError, OSError):
    """The file system refused: full, read-only, an I/O error, a file that was replaced or is gone."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def _short(value: object) -> str:
    """Show a value in an error message, cut to some 60 characters, whatever it is."""
    try:
        return _REPR.repr(value[:100] if isinstance(value, (str, bytes)) else value)
    except Exception:  # its own __repr__, or an int with too many digits to print
        return f"<{type(value).__name__}>"


# ==== Records: keyword-only dataclasses, checked when they are made ===================================================


class _Rule(NamedTuple):
    """What a field must be, its type included; put into `Annotated`, so that the type hint carries it."""

    says: str
    holds: Callable[[Any], bool]


class _Checked:
    """Base of our records: made means checked, and what is secret is not printed."""

    def __post_init__(self) -> None:
        """Check every field; raise InvalidRecordError, which names the field."""
        _codec(type(self)).check(self)


_ID = _Rule(
    "a str of one or more printable characters", lambda v: type(v) is str and v.isprintable() and v != ""
)
Id = Annotated[str, _ID]
"""A key: any characters for which `str.isprintable` is true, `:` and `%` among them; no control characters."""

UnixTime = Annotated[
    int, _Rule("Unix seconds, an int within 64 bits", lambda v: type(v) is int and -(2**63) <= v < 2**63)
]
"""Whole seconds since 1970-01-01 UTC, as Solana's `i64` unix_timestamp."""

Lamports = Annotated[int, _Rule("an int from 0 to 2^64-1", lambda v: type(v) is int and 0 <= v < 2**64)]
"""An amount in the smallest unit of a token, as the chain's `u64`."""

_Count = Annotated[int, _Rule("an int from 0 to 2^63-1", lambda v: type(v) is int and 0 <= v < 2**63)]
_HASH = _Rule(
    "64 lower-case hex digits, not all zero",
    lambda v: type(v) is str and len(v) == 64 and {"0"} != set(v) <= set("0123456789abcdef"),
)
_Hash = Annotated[str, _HASH]
_ResultData = Annotated[
    bytes, _Rule("64 bytes, not all zero", lambda v: type(v) is bytes and len(v) == 64 and any(v))
]
_ABSENT = cast(Any, None)  # the default of a field that is filled in when the record is made


def _now() -> int:
    """Return the time in whole Unix seconds."""
    return int(time.time())


def _sha256(value: bytes) -> str:
    """Return the SHA-256 of bytes as 64 lower-case hex digits."""
    from hashlib import sha256  # here: loading OpenSSL costs as much as this module's other imports

    return sha256(value).hexdigest()


class TaskStatus(StrEnum):
    """Where a task stands; also parses `InProgress` and `in-progress`."""

    CLAIMED = "claimed"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    DISPUTED = "disputed"
    RESOLVED = "resolved"

    @classmethod
    def _missing_(cls, value: object) -> TaskStatus | None:
        plain = value.replace("_", "").replace("-", "").lower() if isinstance(value, str) else None
        return next((status for status in cls if status.replace("_", "") == plain), None)


@dataclass(kw_only=True, frozen=True)
class StatusChange(_Checked):
    """One entry of a task's history: the status it moved to, when (Unix seconds), and the transaction that did it."""

    status: TaskStatus
    at: UnixTime = field(default_factory=_now)
    signature: str | None = None


@dataclass(kw_only=True)
class TaskRecord(_Checked):
    """The mirror of one task on chain.

    `payload` is the task's input, any bytes. Rewards are in lamports and in the smallest unit of SKR, 0 to 2^64-1, or
    None where unknown. `history` is the audit trail: when it is not given, it begins with the status that the record has
    now. A field of the wrong type or range raises InvalidRecordError, which names it.
    """

    task_id: Id
    payload: bytes = b""
    status: TaskStatus = TaskStatus.CLAIMED
    claimed_at: UnixTime = field(default_factory=_now)
    completed_at: UnixTime | None = None
    on_chain_signature: str | None = None
    description: str | None = None
    reward_lamports: Lamports | None = None
    reward_skr_tokens: Lamports | None = None
    creator: str | None = None
    history: list[StatusChange] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check every field, and begin the history."""
        super().__post_init__()
        if not self.history:
            at = self.claimed_at if self.status in _OPEN else self.age_from
            self.history.append(StatusChange(status=self.status, at=at, signature=self.on_chain_signature))

    @property
    def age_from(self) -> int:
        """When the task was completed, or, lacking that, claimed: what its age is counted from."""
        return self.claimed_at if self.completed_at is None else self.completed_at


_OPEN = (TaskStatus.CLAIMED, TaskStatus.IN_PROGRESS)
_SETTLED = (TaskStatus.COMPLETED, TaskStatus.RESOLVED)


@dataclass(kw_only=True, frozen=True)
class TranscriptEntry(_Checked):
    """One utterance of a voice session; `role` is who spoke, `timestamp` is in Unix seconds."""

    role: str
    content: str
    timestamp: UnixTime = field(default_factory=_now)


@dataclass(kw_only=True)
class SessionState(_Checked):
    """A voice session: what was said, which commands were given, the tasks being talked about."""

    session_id: Id
    transcript: list[TranscriptEntry] = field(default_factory=list)
    command_history: list[str] = field(default_factory=list)
    active_task_ids: list[Id] = field(default_factory=list)
    created_at: UnixTime = field(default_factory=_now)
    last_active: UnixTime = field(default_factory=_now)


@dataclass(kw_only=True, frozen=True)
class VerificationLog(_Checked):
    """The evidence that a task was done, in the shape that the program's `submit_task_result` accepts (IDL revision 5).

    `proof_hash` is 32 bytes as 64 lower-case hex digits, `result_data` is 64 bytes; the program rejects either when it is
    all zero, and so does this record. Left out, they are what the reference worker submits: SHA-256 of `outputs`, and the
    ASCII of its hex digits. `evidence_hash` is always computed: SHA-256 over the canonical JSON of the evidence fields,
    the same before and after submission and whatever the timestamp. The record cannot be changed; `dataclasses.replace`
    makes another.
    """

    task_id: Id
    outputs: bytes
    inputs: bytes = b""
    proof: bytes = b""
    proof_hash: _Hash = _ABSENT
    result_data: _ResultData = _ABSENT
    timestamp: UnixTime = field(default_factory=_now)
    submitted: bool = False
    submission_signature: str | None = None
    evidence_hash: _Hash = field(init=False)

    def __post_init__(self) -> None:
        """Fill in what follows from the outputs, and check every field."""
        outputs_hash = _sha256(self.outputs) if isinstance(self.outputs, bytes) else "?"
        if self.proof_hash is _ABSENT:
            object.__setattr__(self, "proof_hash", outputs_hash)
        if self.result_data is _ABSENT:
            object.__setattr__(self, "result_data", outputs_hash.encode())
        # a stand-in, until the fields that it covers are checked
        object.__setattr__(self, "evidence_hash", "1" * 64)
        super().__post_init__()
        object.__setattr__(self, "evidence_hash", _sha256(_evidence(self)))
        if self.submission_signature is not None and not self.submitted:
            raise InvalidRecordError("VerificationLog.submission_signature is given: submitted must be True")

    def verify(self) -> list[str]:
        """Return in what the hash and result data differ from what the reference worker would submit; empty if in nothing.

        Both differences are legal: a zero-knowledge proof commits to something other than the output bytes.
        """
        outputs_hash = _sha256(self.outputs)
        found = []
        if self.proof_hash != outputs_hash:
            found.append(f"proof_hash is not the SHA-256 of outputs, {outputs_hash}")
        if self.result_data != outputs_hash.encode():
            found.append("result_data is not the hex digits of the SHA-256 of outputs")
        return found

    def submit_args(self) -> dict[str, bytes]:
        """Return the arguments of `submit_task_result` and `complete_task`: proof_hash (32 bytes), result_data (64 bytes)."""
        return {"proof_hash": bytes.fromhex(self.proof_hash), "result_data": self.result_data}

    def dispute_args(self) -> dict[str, bytes | str]:
        """Return the arguments of `initiate_dispute` that name the evidence: its hash (32 bytes) and URI (at most 256 bytes)."""
        uri = f"agenc://evidence/sha256/{self.evidence_hash}"
        return {"evidence_hash": bytes.fromhex(self.evidence_hash), "evidence": uri}


@dataclass(kw_only=True)
class OperatorConfig(_Checked):
    """The operator's own configuration; there is one.

    `keypairs` maps a name to a secret key, or to the path of a file that holds it, which is safer: the database is not
    encrypted. `rpc_endpoints` are secret because RPC URLs carry API keys. Both are shown as `***`.
    """

    operator_id: ClassVar[str] = "operator"

    keypairs: dict[str, str] = field(default_factory=dict, metadata={"secret": True})
    rpc_endpoints: list[str] = field(default_factory=list, metadata={"secret": True})
    model_preferences: dict[str, Any] = field(default_factory=dict)
    capabilities: list[str] = field(default_factory=list)
    wallet_pubkey: str | None = None
    network: str | None = None

    def __repr__(self) -> str:
        """Show the configuration without its secrets."""
        return _redacted_repr(self)


@dataclass(kw_only=True)
class _SessionRow(_Checked):
    """What is stored of a session beside its log, and how many entries that log has, so that none can go unseen."""

    session_id: Id
    active_task_ids: list[Id]
    created_at: UnixTime
    last_active: UnixTime
    transcript_entries: _Count = 0
    commands: _Count = 0


@dataclass(kw_only=True)
class _LogEntry(_Checked):
    """One row of a session's log. `log` is `transcript:{session_id}` or `commands:{session_id}`; `seq` counts from 0."""

    log: Id
    seq: _Count
    content: str
    role: str | None = None
    timestamp: UnixTime = field(default_factory=_now)

    @property
    def entry_id(self) -> str:
        """The row's id; `seq` holds no colon, so that no two entries share one."""
        return f"{self.log}:{self.seq}"


@dataclass(kw_only=True, frozen=True)
class PruneReport:
    """What `OperatorDb.prune` removed (or, in a dry run, would remove), and the size of the files in bytes around it."""

    tasks: int
    sessions: int
    proofs: int
    bytes_before: int
    bytes_after: int
    dry_run: bool


class Latency:
    """How long one operation took in this process, in fixed memory: a histogram, the sum in seconds, the errors by name.

    `buckets[i]` counts the calls that took at most `Latency.bounds[i]` seconds and longer than the bound before; the last
    one counts those beyond every bound.
    """

    bounds: ClassVar[tuple[float, ...]] = (*(d * 10.0**p for p in range(-5, 1) for d in (1, 2.5, 5)), 10.0)
    __slots__ = ("buckets", "errors", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(self.bounds) + 1)
        self.seconds = 0.0
        self.errors: defaultdict[str, int] = defaultdict(int)

    def __repr__(self) -> str:
        """Show count and sum."""
        return f"Latency(count={self.count}, seconds={self.seconds:.6f})"

    @property
    def count(self) -> int:
        """How many calls there were, those that raised among them."""
        return sum(self.buckets)

    def copy(self) -> Latency:
        """Return what has been counted so far."""
        made = Latency()
        made.buckets, made.seconds, made.errors = self.buckets.copy(), self.seconds, self.errors.copy()
        return made

    def add(self, seconds: float) -> None:
        """Count a call. It takes no lock: nothing can come between the halves of a `+=` that calls nothing, under the GIL."""
        bucket = bisect_left(self.bounds, seconds)
        self.buckets[bucket] += 1
        self.seconds += seconds


@dataclass(kw_only=True, frozen=True)
class DbStats:
    """What a database holds and what it takes, from one snapshot; sizes are in bytes.

    `files` are the sizes of "database", "wal" and "shm"; `free` is what the database file could give back. `records` and
    `bytes` (empty where SQLite was built without dbstat) are by namespace, `session_log` being the entries of all sessions. `operations` is what this process has done
    with this object, by name: "store_task", or "devices.put" in a namespace of the operator's own.
    """

    path: str
    schema_version: int
    files: dict[str, int]
    free: int
    records: dict[str, int]
    bytes: dict[str, int]
    tasks: dict[TaskStatus, int]
    unsubmitted_proofs: int
    operations: dict[str, Latency]


# ==== Codec: any dataclass of these field types <-> one JSON document =================================================

_REDACTED = "***"
_DEEPEST = 100  # levels of nesting in a free-form field; json.loads gives up near 1,000


class _Shape(NamedTuple):
    """How one type hint is checked and carried; a converter that is None means that JSON has the type itself."""

    says: str
    holds: Callable[[Any], bool]  # whether a value holds that is of none of the sure types
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None
    sure: frozenset[type] = frozenset()  # types all of whose values hold
    secret: bool = False  # whether a record within has secret fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_scan_json = json.JSONDecoder(parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]
# what is circular is too deep, and refused before
_encode_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


def _is_text(value: Any) -> bool:
    """Whether the value is a str that UTF-8 can carry: one without lone surrogates."""
    if type(value) is not str or value.isascii():
        return type(value) is str
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(value: Any, depth: int = 1) -> bool:
    """Whether the value is what JSON can give back unchanged: no tuples, no keys but text, no NaN, not too deep."""
    kind = type(value)
    if kind is dict:
        return depth <= _DEEPEST and all(_is_text(k) and _is_json(v, depth + 1) for k, v in value.items())
    if kind is list:
        return depth <= _DEEPEST and all(_is_json(v, depth + 1) for v in value)
    return value is None or kind in (bool, int) or (kind is float and value - value == 0) or _is_text(value)


def _base64(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode("ascii")


_FROM_BASE64 = partial(a2b_base64, strict_mode=True)
_PLAIN: dict[Any, _Shape] = {
    str: _Shape("a str of valid Unicode", _is_text),
    int: _Shape("an int", lambda v: type(v) is int, sure=frozenset({int})),
    bool: _Shape("a bool", lambda v: type(v) is bool, sure=frozenset({bool})),
    float: _Shape("a finite float", lambda v: type(v) in (float, int) and v - v == 0),
    bytes: _Shape("bytes", lambda v: type(v) is bytes, _base64, _FROM_BASE64, frozenset({bytes})),
    Any: _Shape(f"JSON, at most {_DEEPEST} levels deep", _is_json),
    dict: _Shape(f"a JSON object, at most {_DEEPEST} levels deep", lambda v: type(v) is dict and _is_json(v)),
    list: _Shape(f"a JSON array, at most {_DEEPEST} levels deep", lambda v: type(v) is list and _is_json(v)),
    type(None): _Shape("None", lambda v: v is None),
}


def _shape(hint: Any) -> _Shape:
    """Return how a type hint is checked and carried; raise TypeError for one that has no JSON form."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = next((each for each in args[1:] if isinstance(each, _Rule)), None)
        return _shape(args[0])._replace(**rule._asdict(), sure=frozenset()) if rule else _shape(args[0])
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return _optional(_shape(args[0] if args[1] is type(None) else args[1]))
    if origin is list:
        return _list_of(_shape(args[0]))
    if origin is dict and args[0] is str:
        return _PLAIN[dict] if args[1] is Any else _dict_of(_shape(args[1]))
    if _is_enum(hint):
        members = {member.value: member for member in hint}
        says, encode = f"one of {', '.join(str(value) for value in members)}", attrgetter("_value_")
        if not all(_is_json(value) and value is not None for value in members):
            raise TypeError(f"{hint.__name__} has members whose values JSON cannot carry")
        decode = lambda v: members[v] if v in members else hint(v)  # noqa: E731  the latter for flags
        return _Shape(says, lambda v: type(v) is hint, encode, decode, frozenset({hint}))
    if isinstance(hint, type) and is_dataclass(hint):
        codec = _codec(hint)
        sure, secret = frozenset({hint} if codec.stays_checked else ()), bool(codec.secrets)
        return _Shape(f"a {hint.__name__}", codec.holds, codec.to_json, codec.from_json, sure, secret)
    raise TypeError(f"{hint} has no JSON form here")


def _held(shape: _Shape) -> Callable[[Any], bool]:
    """Return what says of any value whether it holds."""
    sure, holds = shape.sure, shape.holds
    return (lambda v: type(v) in sure or holds(v)) if sure else holds


def _optional(inner: _Shape) -> _Shape:
    encode, decode = inner.encode, inner.decode
    return inner._replace(
        says=f"{inner.says}, or None",
        encode=encode and (lambda v: None if v is None else encode(v)),
        decode=decode and (lambda v: None if v is None else decode(v)),
        sure=inner.sure | {type(None)},
    )


def _json_list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError("not a JSON array")
    return value


def _list_of(inner: _Shape) -> _Shape:
    encode, decode, sure, holds = inner.encode, inner.decode, inner.sure, _held(inner)
    return _Shape(
        f"a list, each {inner.says}",
        lambda v: type(v) is list and (sure.issuperset(map(type, v)) or all(map(holds, v))),
        encode and (lambda v: [*map(encode, v)]),
        decode and (lambda v: [*map(decode, _json_list(v))]),
        secret=inner.secret,
    )


def _dict_of(inner: _Shape) -> _Shape:
    encode, decode, holds = inner.encode, inner.decode, _held(inner)
    return _Shape(
        f"a dict of str to {inner.says}",
        lambda v: type(v) is dict and all(_is_text(k) and holds(each) for k, each in v.items()),
        encode and (lambda v: {k: encode(each) for k, each in v.items()}),
        decode and (lambda v: {k: decode(each) for k, each in v.items()}),
        secret=inner.secret,
    )


class _Codec(Generic[R]):
    """Checks, encodes and decodes one dataclass, from its type hints, which are looked at once.

    Fields may be str, int, bool, float, bytes, enums, dataclasses, lists and str-keyed dicts of these, `X | None`, and
    free-form JSON (dict, list, Any). A field that the JSON lacks takes the dataclass's default; one that the dataclass
    lacks is passed over; one with `init=False` is written, and on reading must be what the record computes.
    """

    def __init__(self, record_type: type[R]) -> None:
        if not (isinstance(record_type, type) and is_dataclass(record_type)):
            raise InvalidRecordError(f"{_short(record_type)} is not a dataclass")
        self.record_type = record_type
        self.name = record_type.__name__
        self.secrets = frozenset(f.name for f in fields(record_type) if f.metadata.get("secret"))
        self.shapes: dict[str, _Shape] = {}
        try:
            hints = typing.get_type_hints(record_type, include_extras=True)
            for each in fields(record_type):
                self.shapes[each.name] = _shape(hints[each.name])
        except Exception as error:  # a hint that names nothing, has no JSON form, or contains its own type
            raise InvalidRecordError(f"{self.name}: {str(error)[:200]}") from None
        self.secrets |= {name for name, shape in self.shapes.items() if shape.secret}
        # two names more, because attrgetter of one gives no tuple, and of none is an error
        self._values: Callable[[R], _Row] = attrgetter(*self.shapes, "__class__", "__class__")
        every = fields(record_type)
        self._names = tuple(self.shapes)
        self._enums = [(f.name, hints[f.name]) for f in every if _is_enum(hints[f.name])]
        self._encoders = [(name, shape.encode) for name, shape in self.shapes.items() if shape.encode]
        self._decoders = [(name, shape.decode) for name, shape in self.shapes.items() if shape.decode]
        self._computed = [f.name for f in every if not f.init]
        self._settable = frozenset(f.name for f in every if f.init)
        self._required = [f.name for f in every if f.init and f.default is f.default_factory is MISSING]
        # For each combination of types that fields have had and passed with: the checks that types do not decide.
        self._unsure: dict[tuple[type, ...], list[tuple[int, Callable[[Any], bool]]]] = {}
        ours = issubclass(record_type, _Checked) and record_type.__module__ == __name__
        self._ours = ours
        self.stays_checked = ours and cast(Any, record_type).__dataclass_params__.frozen
        # Of ours, making does nothing but check; an operator's constructor may do anything.
        self._plainly_made = ours and not self._computed
        if self.secrets:
            record_type.__repr__ = _redacted_repr  # type: ignore[method-assign]
        _CODECS[record_type] = self

    def check(self, record: R) -> _Row:
        """Return the fields' values; raise InvalidRecordError for the first that does not hold, never showing a secret."""
        if type(record) is not self.record_type:
            raise InvalidRecordError(f"expected a {self.name}, got {type(record).__name__}")
        try:
            values = self._values(record)[:-2]
        except AttributeError as error:
            raise InvalidRecordError(f"{self.name}: {error}") from None
        if not self._hold(values):
            values = self._with_members(record, values)
            self._check_each(values)
        return values

    def _with_members(self, record: R, values: _Row) -> _Row:
        """Return the values with an enum's value replaced, in the record too, by the member that it stands for."""
        for name, enum in self._enums:
            value = getattr(record, name)
            if type(value) is not enum and isinstance(value, str):
                with suppress(Exception):  # what is neither is refused by the check
                    object.__setattr__(record, name, enum(value))
        return self._values(record)[:-2]

    def _hold(self, values: _Row) -> bool:
        """Whether the values hold, of types that have been met together; False for those that have not."""
        try:
            for place, holds in self._unsure[tuple(map(type, values))]:
                if not holds(values[place]):
                    return False
        except (KeyError, InvalidRecordError):  # the latter of a record within
            return False
        return True

    def _check_each(self, values: _Row) -> None:
        """Check every value, say which does not hold, and remember what types alone decide."""
        for (name, shape), value in zip(self.shapes.items(), values, strict=True):
            try:
                held = type(value) in shape.sure or shape.holds(value)
            except InvalidRecordError:  # of a record within
                if name not in self.secrets:
                    raise
                held = False
            if not held:
                got = f"{type(value).__name__} {_REDACTED if name in self.secrets else _short(value)}"
                raise InvalidRecordError(f"{self.name}.{name} must be {shape.says}; got {got}")
        self._unsure[tuple(map(type, values))] = [
            (place, shape.holds)
            for place, shape in enumerate(self.shapes.values())
            if type(values[place]) not in shape.sure
        ]

    def holds(self, record: Any) -> bool:
        """Whether the value is a record of this type; raise InvalidRecordError for one that does not hold."""
        if type(record) is not self.record_type:
            return False
        if not self.stays_checked:
            self.check(record)
        return True

    def to_json(self, record: R, values: _Row = ()) -> _Json:
        """Return the record as a JSON object; it must have been checked, and `values` are what the check gave."""
        document = dict(zip(self._names, values or self._values(record)[:-2], strict=True))
        for name, encode in self._encoders:
            document[name] = encode(document[name])
        return document

    def from_json(self, document: Any) -> R:
        """Return the record that a JSON object, used up by it, holds; raise ValueError or TypeError when it holds none."""
        if type(document) is not dict:
            raise TypeError(f"a {self.name} is a JSON object")
        whole = tuple(document) == self._names
        for name in () if whole else self._required:
            if name not in document:
                raise ValueError(f"{self.name}.{name} is missing")
        name = ""
        try:
            for name, decode in self._decoders:
                if whole or name in document:
                    document[name] = decode(document[name])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{self.name}.{name} is not {self.shapes[name].says}") from None
        if not (whole and self._plainly_made):
            return self._constructed(document)
        values = tuple(document.values())
        if not self._hold(values):
            self._check_each(values)
        record = object.__new__(self.record_type)
        vars(record).update(document)
        return record

    def _constructed(self, document: _Json) -> R:
        settable = self._settable
        try:
            record = self.record_type(**{name: value for name, value in document.items() if name in settable})
        except InvalidRecordError:
            raise
        except Exception as error:
            why = "" if self.secrets else f": {error}"
            raise ValueError(f"{self.name} cannot be made of it ({type(error).__name__}{why})") from None
        if not self._ours:
            self.check(record)
        for name in self._computed:
            if name in document and document[name] != getattr(record, name):
                raise ValueError(f"{self.name}.{name} is not what the other fields give")
        return record

    def defaults(self, names: list[str]) -> _Json:
        """Return as JSON what a record has in these fields when they are not given, for those that need not be."""
        made: _Json = {}
        for each in fields(cast(Any, self.record_type)):
            if each.name in names and each.name not in self._required:
                value = each.default if each.default_factory is MISSING else each.default_factory()
                encode = self.shapes[each.name].encode
                made[each.name] = encode(value) if encode else value
        return made

    def redacted(self, document: _Json) -> _Json:
        """Return a JSON object of a record with `***` for its secrets."""
        known = (name for name in document if name in self.shapes)  # others may have been secrets once
        return {name: _REDACTED if name in self.secrets else document[name] for name in known}

    def encode(self, record: R) -> str:
        """Check the record and return it as one JSON document."""
        values = self.check(record)
        try:
            text = _encode_json(self.to_json(record, values))
            if not self._ours and _encode_json(self.to_json(self.decode(text.encode()))) != text:
                raise ValueError("its constructor changes it")
        except (ValueError, TypeError, RecursionError):  # an int of over 4,300 digits, for one
            raise InvalidRecordError(f"{self.name} holds what would not be read back as it is") from None
        return text

    def decode(self, text: bytes) -> R:
        """Return the record that a stored document holds; raise ValueError or TypeError when it holds none."""
        try:
            whole = text.decode()
            document, end = _scan_json(whole, 0)
            if end != len(whole):
                raise ValueError("not one JSON document")
        except (ValueError, StopIteration, RecursionError, AttributeError):
            raise ValueError("not a JSON document") from None  # the parser's own error holds the whole text
        return self.from_json(document)


_CODECS: dict[type, _Codec[Any]] = {}


def _codec(record_type: type[R]) -> _Codec[R]:
    """Return the codec of a dataclass, made at its first use."""
    return (_CODECS.get(record_type) if isinstance(record_type, type) else None) or _Codec(record_type)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _redacted_repr(record: Any) -> str:
    """Show a dataclass as its generated repr would, with `***` for every field whose metadata says secret."""
    parts = (
        f"{f.name}={_REDACTED if f.metadata.get('secret') else repr(getattr(record, f.name))}"
        for f in fields(record)
        if f.repr
    )
    return f"{type(record).__qualname__}({', '.join(parts)})"


# ==== Schema and opening: what the file looks like, and who may touch it ==============================================

APPLICATION_ID = 0x41474E43  # "AGNC", https://www.sqlite.org/pragma.html#pragma_application_id
# Both texts stand in every file, so changing one is a migration.
_CREATE_TABLE = (
    'CREATE TABLE "{0}"(key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL,'
    " status TEXT, at INTEGER, crc INTEGER NOT NULL)"
)
_CREATE_INDEX = 'CREATE INDEX "{0}_status_at" ON "{0}"(status, at)'
_FILES = {"database": "", "wal": "-wal", "shm": "-shm"}  # what a database consists of
_OUR_TABLES = ("tasks", "sessions", "session_log", "proofs", "config")
# SQLite's automatic checkpoint runs without the write lock, and before 3.51.3 a commit that begins the log anew meanwhile can
# be lost (https://www.sqlite.org/wal.html#walresetbug). Ours take the write lock where they can: FULL and TRUNCATE do.
_CHECKPOINT_EVERY = 4 * 2**20  # bytes that were written to the write-ahead log, about
_WAL_LIMIT = 16 * 2**20  # bytes of a write-ahead log that is cut
_PAGES_A_WRITE = 4  # of the table and its indexes
_BATCH_PAGES = 500  # given back to the file system at a time
_LET_IN = 0.002  # seconds between the batches of long work: others look for the lock every millisecond
_FIRST_READ = "SELECT 1 FROM sqlite_master LIMIT 1"  # BEGIN alone takes no snapshot
_REDB_MAGIC = b"redb\x1a\n\xa9\r\n"


class _NotSqliteError(DamagedError):
    """SQLite has refused the file (SQLITE_NOTADB): only such a file may be opened raw, to name it."""


class _Connection(sqlite3.Connection):
    """A connection whose statements wait for locks by polling and raise this module's errors. The choke point.

    SQLite's own busy handler backs off to 100 ms, so that a steady writer starves others, and holds Ctrl-C back; a
    statement that finds the database locked is tried again every millisecond until `timeout` seconds have passed.
    """

    path: str
    timeout: float
    holder: _Lease  # who uses it, or did
    last_error: OperatorDbError | None = None
    state: tuple[int, int, bool] | None = None  # of an immutable file when it was opened

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; False for a connection that a signal handler has closed meanwhile."""
        try:
            return super().in_transaction
        except sqlite3.ProgrammingError:
            return False

    def query(
        self, sql: str, parameters: _Row = (), *, most_bytes: int | None = None, deadline: float | None = None
    ) -> list[_Row]:
        """Execute one statement and return its rows, or its first ones until their values exceed `most_bytes`."""
        while True:
            try:
                # No frame holds a cursor: kept by an interrupt's traceback, it would pin its snapshot and the WAL.
                if most_bytes is None:
                    return self.execute(sql, parameters).fetchall()
                return [*takewhile(_within(most_bytes), self.execute(sql, parameters))]
            except _SQLITE_ERRORS as error:
                deadline = self._wait_or_raise(error, deadline)

    def change(self, sql: str, parameters: _Row = ()) -> int:
        """Execute one statement and return the number of rows that it changed."""
        return self.attempt(self.execute, sql, parameters).rowcount

    def attempt(self, action: Callable[..., R], *arguments: Any) -> R:
        """Do something with the connection, waiting for locks and raising this module's errors."""
        deadline = None
        while True:
            try:
                return action(*arguments)
            except _SQLITE_ERRORS as error:
                deadline = self._wait_or_raise(error, deadline)

    def _wait_or_raise(self, error: Exception, deadline: float | None) -> float:
        """Sleep a moment and return the deadline when another holds a lock; else raise this module's error."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            self.last_error = _typed(error, self.path)
            raise self.last_error from None
        deadline = deadline or time.monotonic() + self.timeout
        if time.monotonic() >= deadline:
            raise BusyError(f"{self.path} was locked by others for {self.timeout:g} s; try again") from None
        time.sleep(0.001)
        return deadline


_SQLITE_ERRORS = (sqlite3.Error, OverflowError, UnicodeError)


def _within(most_bytes: int) -> Callable[[_Row], bool]:
    """Return what says of one row after another whether those before it left room for more bytes."""

    def has_room(row: _Row) -> bool:
        nonlocal most_bytes
        room = most_bytes >= 0
        most_bytes -= sum(len(column) for column in row if isinstance(column, bytes))
        return room

    return has_room


def _typed(error: Exception, path: str) -> OperatorDbError:
    """Return this module's error for one of SQLite's result codes, https://www.sqlite.org/rescode.html."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, UnicodeEncodeError):
        return InvalidRecordError("text must be valid Unicode, without lone surrogates")
    if isinstance(error, UnicodeDecodeError):
        return DamagedError(f"{path} is damaged (its schema is not text): restore a backup")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        kind = DamagedError if code == sqlite3.SQLITE_CORRUPT else _NotSqliteError
        return kind(f"{path} is damaged ({error}): run check(), and restore a backup")
    if code == sqlite3.SQLITE_TOOBIG or isinstance(error, (OverflowError, sqlite3.DataError)):
        return InvalidRecordError("the record is larger than SQLite can store: 1,000,000,000 bytes as JSON")
    if code == sqlite3.SQLITE_FULL:
        return StorageError(f"{path}: the disk is full; nothing of this change was stored")
    if code == sqlite3.SQLITE_READONLY:
        return StorageError(f"{path} cannot be written ({error})")
    if code == sqlite3.SQLITE_CANTOPEN:
        readable = os.access(path, os.R_OK)
        why = "its -wal needs a directory that may be written" if readable else "permission denied"
        return StorageError(f"{path} cannot be opened: {why}")
    if isinstance(error, sqlite3.ProgrammingError):
        return ClosedError(f"{path}: the connection is closed ({error})")
    return StorageError(f"{path}: {error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})")


def _connect(path: str, timeout: float, *, mode: str = "rw", durable: bool = True) -> _Connection:
    """Open a connection: `mode` is rw, ro or immutable (https://www.sqlite.org/uri.html), or look: rw that cannot write."""
    uri = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    if os.name == "nt":
        uri = "/" + uri.replace("\\", "/")
    uri = f"file:{uri}?mode=" + {"immutable": "ro&immutable=1", "look": "rw"}.get(mode, mode)
    try:
        connection = sqlite3.connect(
            uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False, factory=_Connection
        )
    except sqlite3.Error as error:
        raise _typed(error, path) from None
    connection.path, connection.timeout = path, timeout
    connection.text_factory = bytes  # damaged text must reach the checksum, not fail to decode on the way
    settings = ["cell_size_check=ON", "trusted_schema=OFF"]
    if mode == "rw":
        settings += [f"synchronous={'FULL' if durable else 'NORMAL'}", f"journal_size_limit={_WAL_LIMIT}"]
        settings += ["fullfsync=ON", "checkpoint_fullfsync=ON", "secure_delete=ON", "wal_autocheckpoint=0"]
    else:
        settings.append("query_only=ON")
    try:
        for setting in settings:
            connection.query(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


def _pragma(connection: _Connection, name: str) -> Any:
    """Return the one value of a pragma, text as str."""
    value = connection.query(f"PRAGMA {name}")[0][0]
    return value.decode() if isinstance(value, bytes) else value


def _create_our_tables(connection: _Connection) -> None:
    for table in _OUR_TABLES:
        connection.query(_CREATE_TABLE.format(table))
        connection.query(_CREATE_INDEX.format(table))


_MIGRATIONS: tuple[Callable[[_Connection], None], ...] = (_create_our_tables,)
"""What takes a file from each schema version to the next, in order; the length is the version that this module writes."""


def _is_namespace_name(name: object) -> bool:
    """Whether a namespace of the operator's own can have this name: it stands in SQL, keys and labels as it is."""
    shaped = isinstance(name, str) and re.fullmatch("(?!sqlite_)[a-z][a-z0-9_]{0,47}", name)
    return bool(shaped) and name not in _OUR_TABLES


def _database_path(path: _Path | None) -> str:
    """Return the absolute path of the database: the argument, else AGENC_DB_PATH, else ~/.agenc/operator.db."""
    if path is None:
        path = os.environ.get("AGENC_DB_PATH") or os.path.join("~", ".agenc", "operator.db")
    return _real_path(path)


def _real_path(path: _Path) -> str:
    """Return an absolute path, symbolic links resolved: SQLite keeps the WAL beside the file that they lead to."""
    try:
        text = os.fsdecode(path)
        if not text or b"\0" in os.fsencode(text):
            raise ValueError("it is empty or holds a NUL")
        whole = os.path.expanduser(text)
        if whole.startswith(("~/", "~\\")):
            raise ValueError("there is no home directory: set HOME, or give a path")
        return os.path.realpath(whole)
    except (TypeError, ValueError) as error:
        raise InvalidRecordError(f"{_short(path)} is not a path: {error}") from None
    except OSError as error:  # a relative path, and the working directory is gone
        raise StorageError(f"{_short(path)}: {error.strerror}") from None


@contextmanager
def _file_errors(what: str) -> Iterator[None]:
    """Raise what the system raises in the block as StorageError; ours, and OSErrors without a number, pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OperatorDbError) or error.errno is None:
            raise
        raise StorageError(f"{what}: {error.strerror}") from None


def _size(path: str) -> int:
    """Return the size of a file in bytes, 0 where there is none."""
    with _file_errors(path), suppress(FileNotFoundError):
        return os.stat(path).st_size
    return 0


def _is_there(path: str) -> bool:
    """Whether there is a file; raise StorageError where one may not look."""
    with _file_errors(path), suppress(FileNotFoundError):
        os.lstat(path)
        return True
    return False


def _identity(path: str) -> tuple[int, int]:
    """Return what tells one file from another at the same path: device and inode."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _state(path: str) -> tuple[int, int, bool]:
    """Return what changes when somebody writes to a file that is open as immutable."""
    with _file_errors(path):
        status = os.stat(path)
    return status.st_mtime_ns, status.st_size, os.path.exists(path + "-wal")


def _read_mode(path: str) -> str:
    """Return the mode that reads a database without changing a byte of it or of its WAL.

    Read-only on a cleanly closed database would create a WAL, and fails in a directory that it may not write.
    """
    if os.path.exists(path + "-wal"):
        return "ro"
    return "look" if os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK) else "immutable"


def _inspect(path: str, timeout: float) -> int | None:
    """Return the schema version of the file at a path, changing nothing: 0 to be adopted, None where there is no file.

    Raises ForeignFileError, NewerSchemaError, DamagedError or StorageError for one that is not to be opened.
    """
    try:
        before = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(before.st_mode):
        raise ForeignFileError(f"{path} is not a regular file")
    # SQLite takes a file of one byte for an empty database, and would overwrite it
    if 0 < before.st_size < 512:
        raise ForeignFileError(f"{path} holds {before.st_size} bytes: not SQLite; nothing was changed")
    # never read-write before the file is known to be ours: that would checkpoint and delete another application's WAL
    try:
        connection = _connect(path, timeout, mode="ro" if _size(path + "-wal") else "immutable")
        try:
            connection.query("BEGIN")  # one state for all that is read
            version = _version(connection)
            whole = _pragma(connection, "page_count") * _pragma(connection, "page_size")
            if not _size(path + "-wal") and _size(path) < whole:
                raise DamagedError(
                    f"{path} is cut short: {_size(path)} of {whole} bytes; move it aside, and restore a backup"
                )
            return version
        finally:
            connection.close()
    except DamagedError as error:
        with _file_errors(path):
            after = os.stat(path)
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            return _inspect(path, timeout)  # immutable holds no lock: a checkpoint went on beneath it
        if isinstance(error, _NotSqliteError):
            raise _named(path) or error from None
        raise


def _named(path: str) -> ForeignFileError | None:
    """Name a file that SQLite has refused; None when it is a damaged database. Only such a file may be opened raw.

    Closing a plain descriptor of a live database drops every lock that this process's SQLite holds on it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        return ForeignFileError(f"{path} cannot be read: {error.strerror}")
    if start.startswith(_REDB_MAGIC):
        return ForeignFileError(
            f"{path} is the prototype's redb database: export it with `agenc-db export --format json`, "
            "import that into a new operator_db file, and give this module a path of its own"
        )
    if start == b"SQLite format 3\0":
        return None
    return ForeignFileError(f"{path} is not an SQLite database; nothing was changed")


def _version(connection: _Connection) -> int:
    """Return the schema version of an open file, 0 for an empty one; raise for one that is not ours or not whole."""
    path = connection.path
    application, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
    if application == 0 and version == 0:
        if not connection.query(_FIRST_READ):
            return 0
        raise ForeignFileError(f"{path} is an SQLite database of another application; nothing was changed")
    if application != APPLICATION_ID or version < 1:
        raise ForeignFileError(f"{path} is another application's (id {application:#x}); nothing was changed")
    if version > len(_MIGRATIONS):
        raise NewerSchemaError(
            f"{path} has schema version {version}, this module knows {len(_MIGRATIONS)}: update operator_db.py; nothing was changed"
        )
    if version == len(_MIGRATIONS):
        for table in _OUR_TABLES:
            _check_table(connection.query, path, table)
    return int(version)


def _check_table(query: Callable[..., list[_Row]], path: str, table: str) -> bool:
    """Whether the table is there; raise ForeignFileError when it, or anything attached to it, is not as we create it.

    A trigger or view that names our table could change what a write does: one that is planted deletes every proof.
    """
    wanted = {
        (b"table", table.encode(), _CREATE_TABLE.format(table).encode()),
        (b"index", f"{table}_status_at".encode(), _CREATE_INDEX.format(table).encode()),
    }
    found = query(
        "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND (lower(tbl_name) = ? OR lower(name) = ?"
        " OR name = ? OR (type IN ('trigger', 'view') AND instr(lower(sql), ?)))",
        (table, table, f"{table}_status_at", table),
    )
    if found and set(found) != wanted:
        what = b" ".join(sorted(wanted.symmetric_difference(found))[0][:2]).decode(errors="replace")
        raise ForeignFileError(f"{path}: {_short(what)} is not as operator_db makes it; nothing was changed")
    if not found and table in _OUR_TABLES:
        raise ForeignFileError(f"{path} has no table {table}; nothing was changed")
    return bool(found)


def _make_private_directory(path: str) -> None:
    """Create a directory and its missing parents, each readable by its owner alone."""
    if path and not os.path.isdir(path):
        _make_private_directory(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)


@contextmanager
def _new_file(path: str) -> Iterator[str]:
    """Give the name of an empty private file beside `path`, and remove what is left of it afterwards.

    What is written there appears at its final name whole, by link or rename, or not at all.
    """
    owner = os.getpid()  # and not a child that was forked in the block
    temporary = f"{path}.{owner}-{os.urandom(4).hex()}.new"
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, 0o600)  # whatever the umask
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        for suffix in ("", "-wal", "-shm", "-journal") if os.getpid() == owner else ():
            with suppress(FileNotFoundError):
                os.unlink(temporary + suffix)


def _create(path: str, timeout: float) -> None:
    """Make a complete new database appear at a path, unless another thread or process is first."""
    with _file_errors(f"cannot create {path}"):
        _make_private_directory(os.path.dirname(path))
        with _new_file(path) as temporary:
            _migrate(temporary, timeout, final_path=path)
            if _size(temporary + "-wal") or _inspect(temporary, timeout) != len(_MIGRATIONS):
                raise StorageError(f"{path} could not be written whole: is the disk full?")
            if _size(path + "-wal") and not os.path.lexists(path):
                raise StorageError(f"{path}-wal is there without its database: put that back, or move it off")
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
            except OSError:
                # No hard links here (Android, FAT). The descriptor stays open for good: closing it would drop the locks
                # of a thread that has opened the file by then.
                with suppress(FileExistsError):
                    os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        _sync_directory(path)


def _sync_directory(path: str) -> None:
    """Make the name of a new file durable, as far as its directory may be read."""
    if hasattr(os, "O_DIRECTORY") and os.access(os.path.dirname(path), os.R_OK):
        descriptor = os.open(os.path.dirname(path), os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _migrate(path: str, timeout: float, *, final_path: str) -> None:
    """Bring an empty or older file to the present schema, as one transaction, after a snapshot of an older one.

    The lock is taken before the version is looked at, so that of several processes one migrates and the others find it
    done. A step that fails leaves the file as it was.
    """
    connection = _connect(path, timeout)
    connection.path = final_path
    try:
        if not _pragma(connection, "page_count"):
            # before journal_mode, or it silently stays off
            connection.query("PRAGMA auto_vacuum=INCREMENTAL")
        if _pragma(connection, "journal_mode") != "wal":  # asked first: setting it takes locks
            _pragma(connection, "journal_mode=WAL")
        if _pragma(connection, "journal_mode") != "wal":
            raise StorageError(f"{final_path}: this file system does not support SQLite's write-ahead log")
        connection.query("BEGIN IMMEDIATE")
        version = _version(connection)
        if 0 < version < len(_MIGRATIONS):
            _snapshot_for_migration(path, timeout, version)
        for step in _MIGRATIONS[version:]:
            step(connection)
        connection.query(f"PRAGMA application_id={APPLICATION_ID}")
        connection.query(f"PRAGMA user_version={len(_MIGRATIONS)}")
        _version(connection)  # nothing attached to an older file may live on in this one
        connection.query("COMMIT")
        connection.query("PRAGMA wal_checkpoint(TRUNCATE)")  # close() would keep a full disk to itself
    finally:
        connection.close()  # rolls back what was not committed


def _snapshot_for_migration(path: str, timeout: float, version: int) -> None:
    """Copy the file to `PATH.v{version}.bak`, whole or not at all, while the caller holds the write lock."""
    final = f"{path}.v{version}.bak"
    with _file_errors(f"cannot write {final}"), closing(_connect(path, timeout, mode="look")) as source:
        with _new_file(final) as temporary:
            with closing(_connect(temporary, timeout)) as target:
                source.attempt(lambda: source.backup(target))
            os.replace(temporary, final)
        _sync_directory(final)


def _tighten(path: str) -> None:
    """Take other users' permissions off a database file of ours, with a log line."""
    for name in (path + suffix for suffix in _FILES.values()):
        with suppress(OSError):
            status = os.stat(name)
            if os.name == "posix" and status.st_mode & 0o077 and status.st_uid == os.geteuid():
                os.chmod(name, 0o600)
                from logging import getLogger  # here, because it costs more to import than this module

                getLogger("operator_db").warning("%s could be read by others: its mode is now 0600", name)


# ==== Connections: one writer, a pool of readers, transactions, fork ==================================================


class _Lease:
    """The right to use one connection, held by one thread for one piece of work.

    A lease is alive while its holder is inside `with lease.alive:`. Leaving that is a single call into C, which
    KeyboardInterrupt cannot split: a lease whose holder was interrupted anywhere ends by itself, and no lock is lost.
    """

    working = False  # its turn has come: it may be using a connection
    connection: _Connection | None = None
    token: Token[_Lease | None] | None = None  # of the context that opened the block
    blocks = 0  # savepoints so far

    def __init__(self, timeout: float, *, writes: bool) -> None:
        self.alive = threading.Lock()
        self.turn = threading.Lock()  # released by the one before it in the queue: a hint, no more
        self.thread = threading.get_ident()
        self.deadline = time.monotonic() + timeout
        self.writes = writes


class _Leave:
    """What a with statement calls at its end: it alone holds the block's generator, and drops it whatever happens."""

    def __get__(self, block: _Block | None, owner: object) -> Any:
        if block is None:  # contextlib.ExitStack looks methods up on the class
            return lambda block, *error: _leave_block(block.generator, *error)
        leave: Any = partial(_leave_block, block.generator)
        # the one strong reference: it goes when the statement is left, though the block be kept in a variable
        leave.generator, block.strong = block.strong, None
        return leave


class _Block:
    """A with block written as a generator, which ends when its with statement is left, however it is left.

    That of contextlib ends when the last reference to it goes: a KeyboardInterrupt that lands in its own code leaves it
    open for as long as somebody handles or keeps the exception, whose traceback holds those frames, and what is written
    meanwhile is lost. Here frames hold a weak reference.
    """

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self.strong: Generator[Any, None, None] | None = generator
        self.generator = weakref.ref(generator)

    def __enter__(self) -> Any:
        generator = self.generator()
        try:
            return next(generator or iter(()))
        except StopIteration:
            raise ConflictError("this block has been used: call transaction() for each") from None
        except BaseException:
            if generator is not None:
                generator.close()
            raise

    __exit__ = _Leave()


def _leave_block(block: Any, kind: object, error: BaseException | None, traceback: object) -> bool:
    # Nothing that an interrupt can split stands between this strong reference and the block's end.
    generator = block()
    if error is None:
        next(generator, None)
        return False
    try:
        generator.throw(error)
    except BaseException as raised:
        # a StopIteration that passes through a generator comes out as the cause of a RuntimeError
        if raised is not error and raised.__cause__ is not error:
            raise
    finally:
        del error, traceback  # which holds this frame: a cycle would keep what the block used for long
    return False


def _block(make: Callable[..., Generator[Any, None, None]]) -> Callable[..., AbstractContextManager[Any]]:
    """Turn a generator function into one that returns a block, as contextlib.contextmanager does."""

    @wraps(make)
    def begin(*arguments: Any, **options: Any) -> Any:
        return _Block(make(*arguments, **options))

    return begin


class _Store:
    """The connections of one database file, and the rules by which threads, contexts and processes share them.

    Writers stand in a queue, first come first served, and each holds the one writer connection for one transaction.
    Readers each check a connection out of a pool, because one connection used by two threads at once returns another
    row's data or crashes the interpreter (https://github.com/python/cpython/issues/118172).
    """

    def __init__(self, path: str, *, read_only: bool, durable: bool, timeout: float) -> None:
        self.path, self.read_only, self.durable, self.timeout = path, read_only, durable, timeout
        self._current: ContextVar[_Lease | None] = ContextVar("operator_db_lease", default=None)
        self._opened: tuple[int, int] | None = None  # the file's identity
        self._closed = ""  # why every call is refused
        self.latencies: dict[str, Latency] = {}  # of what this process has done, by name
        self._forget_connections()
        with _stores_lock:
            _stores.add(self)
        lease = _Lease(timeout, writes=True)
        with lease.alive:
            self._wait_for_turn(lease)
            self._open()

    def _forget_connections(self) -> None:
        self._mutex = threading.RLock()  # reentrant for the sake of signal handlers
        self._queue: deque[_Lease] = deque()
        self._readers: list[_Connection] = []
        self._local = threading.local()  # of each thread, the lease by which it finds its reader again
        self._writer: _Connection | None = None
        self._wal: tuple[int, int] | None = None
        self._logged = 0  # bytes since the last checkpoint, about
        self._uncut = 0  # the size of the log when readers were waited for in vain
        self._closing: _Lease | None = None  # while it is alive, work in flight ends and none begins

    # ---- opening

    def _open(self) -> None:
        version = _inspect(self.path, self.timeout)
        if self.read_only:
            if not version:
                what = "there is no database" if version is None else "the file is empty"
                raise StorageError(f"{self.path}: {what}, and a read-only open creates none")
            if version < len(_MIGRATIONS):
                raise StorageError(f"{self.path} has schema version {version}: open it for writing once")
        elif version is None:
            _create(self.path, self.timeout)
            version = _inspect(self.path, self.timeout)
        with _file_errors(self.path):
            self._opened = _identity(self.path)
        if self._opened in _inherited:
            raise ConflictError(f"{self.path} was in use when this process was forked: start a fresh process")
        if not self.read_only:
            _tighten(self.path)
            if version != len(_MIGRATIONS):
                _migrate(self.path, self.timeout, final_path=self.path)
            self._connect_writer()

    def _connect_writer(self) -> _Connection:
        """Return the writer connection, opened when needed; the file must still be the one that was opened first."""
        if self.read_only:
            raise StorageError(f"{self.path} was opened read-only")
        if self._writer is None:
            connection = self._connect("rw")
            try:
                if _pragma(connection, "journal_mode") != "wal":
                    raise ForeignFileError(f"{self.path} was taken out of WAL mode by another program")
                connection.query(_FIRST_READ)  # makes the WAL
                with _file_errors(self.path + "-wal"):
                    self._wal = _identity(self.path + "-wal")
            except BaseException:
                connection.close()
                raise
            self._writer = connection
        return self._writer

    def _connect(self, mode: str) -> _Connection:
        self._check_file()
        state = _state(self.path) if mode == "immutable" else None
        connection = _connect(self.path, self.timeout, mode=mode, durable=self.durable)
        connection.state = state
        return connection

    def _check_file(self, lost: str = "") -> int:
        """Return the size of the WAL; raise StorageError unless it and the path are the files that were opened."""
        size = 0
        try:
            same = _identity(self.path) == self._opened
            if self._wal is not None:
                status = os.stat(self.path + "-wal")
                same, size = same and (status.st_dev, status.st_ino) == self._wal, status.st_size
        except OSError:
            same = False
        if not same:
            raise StorageError(f"{self.path} or its WAL was replaced or removed{lost}: open it again")
        return size

    # ---- whose turn it is

    def _mine(self) -> _Lease | None:
        """Return the lease of the block that this very thread and context opened, if there is one."""
        lease = self._current.get()
        if lease is None or lease.token is None or lease.thread != threading.get_ident():
            return None
        # A token resets only in the context that made it: the one way to ask whether this is that context.
        try:
            self._current.reset(lease.token)
        except (ValueError, RuntimeError):  # another context's: that of a task or worker begun in the block
            return None
        except BaseException:  # KeyboardInterrupt, when it was reset
            lease.token = self._current.set(lease)
            raise
        lease.token = self._current.set(lease)
        return lease if lease.alive.locked() else None

    def _usable(self, lease: _Lease) -> _Connection:
        """Return the connection of a block that goes on; raise when an error ended its transaction underneath."""
        connection = lease.connection
        if connection is None:
            raise ClosedError(f"{self.path}: this block has ended")
        if not connection.in_transaction:
            cause = connection.last_error or "it was rolled back"
            raise StorageError(f"an earlier error ended the transaction, nothing in it is stored: {cause}")
        return connection

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.path} {self._closed}")

    def _refuse_other_block(self) -> None:
        """Raise rather than wait for a block that cannot end while this thread waits, or join one that is not ours."""
        inherited = self._current.get()
        if inherited is not None and inherited.writes and inherited.alive.locked():
            raise ConflictError("a worker or task begun inside a transaction cannot write until that ends")
        thread = threading.get_ident()
        with self._mutex:
            # a copy, in one call into C: a signal handler that writes would change the queue beneath a loop
            waiting = any(lease.thread == thread and lease.alive.locked() for lease in tuple(self._queue))
        if waiting:
            raise ConflictError(
                "this thread is in a transaction, of another coroutine (a block must not await) or of what a signal"
                " handler interrupted"
            )

    def _is_paused(self) -> bool:
        """Whether new work has to wait for a fork or for close()."""
        return _fork_is_coming.locked() or (self._closing is not None and self._closing.alive.locked())

    def _wait_for_turn(self, lease: _Lease) -> None:
        """Stand in the queue until the writer is free; raise BusyError after `timeout` seconds."""
        self._refuse_if_closed()
        self._refuse_other_block()
        with self._mutex:
            self._queue.append(lease)
        works = False
        while True:
            with self._mutex:
                self._refuse_if_closed()
                while not self._queue[0].alive.locked():
                    self._queue.popleft()
                if self._queue[0] is lease and (works or not self._is_paused()):
                    lease.working = True
                    return
                place = self._queue.index(lease)
            # asked while no mutex is held, for it takes that of every database
            works = self._is_paused() and _is_at_work()
            if time.monotonic() >= lease.deadline:
                raise BusyError(f"{self.path} was in use by other threads for {self.timeout:g} s; try again")
            left = lease.deadline - time.monotonic()
            lease.turn.acquire(timeout=max(0.0, min(0.001 * max(1, place), left)))

    def _call_next(self) -> None:
        """Let the first that waits look at once whether its turn has come."""
        if len(self._queue) > 1:  # the first in it is the one that has just left
            with suppress(IndexError, RuntimeError):  # it has gone, or is awake
                self._queue[1].turn.release()

    def _check_out(self, lease: _Lease) -> _Connection:
        """Give a reader connection of its own to a lease, which may be one that was used before."""
        lease.working, works = False, False
        lease.deadline = time.monotonic() + self.timeout
        while True:
            with self._mutex:
                self._refuse_if_closed()
                if works or not self._is_paused():
                    lease.working = True
                    return self._free_reader(lease)
            works = _is_at_work()  # such a thread goes on, or it and what waits for it never would
            if time.monotonic() >= lease.deadline:
                raise BusyError(f"{self.path}: a fork or close() took {self.timeout:g} s; try again")
            time.sleep(0.0005)

    def _free_reader(self, lease: _Lease) -> _Connection:
        """Return a reader that nobody uses, or a new one; the mutex is held, so that a fork or close() misses none."""
        connection = lease.connection
        if connection is None or connection.holder is not lease:  # nobody else has used it meanwhile
            for connection in self._readers:
                if not connection.holder.alive.locked():
                    if connection.in_transaction:  # an interrupted snapshot's
                        connection.rollback()
                    break
            else:
                connection = self._connect(_read_mode(self.path) if self.read_only else "look")
                self._refuse_if_closed()  # by a signal handler, meanwhile
                connection.holder = lease
                self._readers.append(connection)
        if connection.state is not None and connection.state != _state(self.path):
            self._readers.remove(connection)  # what was taken for immutable has been written to
            connection.close()
            lease.connection = None
            return self._free_reader(lease)
        lease.connection, connection.holder = connection, lease
        return connection

    # ---- reading and writing

    def read(self, sql: str, parameters: _Row = (), *, most_bytes: int | None = None) -> list[_Row]:
        """Return rows as this thread should see them: its own open block's, else of the last commit."""
        lease = self._mine()
        if lease is not None:
            return self._usable(lease).query(sql, parameters, most_bytes=most_bytes)
        lease = getattr(self._local, "lease", None)
        if lease is None or lease.alive.locked():  # the latter in a signal handler that interrupts a read
            lease = self._local.lease = _Lease(self.timeout, writes=False)
        with lease.alive:
            return self._check_out(lease).query(sql, parameters, most_bytes=most_bytes)

    def write(self, sql: str, parameters: _Row = ()) -> int:
        """Execute one statement that changes rows, committed unless a block is open, and return how many rows changed.

        Every single write of this module passes here. Outside of a block it is `transaction` in straight code, because a
        block's machinery is a sixth of what a write takes.
        """
        self._logged += _PAGES_A_WRITE * 4096 + (len(parameters[1]) if len(parameters) > 1 else 0)
        lease = self._mine()
        if lease is not None and lease.writes:
            return self._usable(lease).change(sql, parameters)
        lease = _Lease(self.timeout, writes=True)
        with lease.alive:
            self._wait_for_turn(lease)
            connection, began = self._connect_writer(), time.monotonic()
            try:
                self._begin(lease, connection)
                changed = self._usable(lease).change(sql, parameters)
                self._usable(lease).query("COMMIT")
            except BaseException:
                if lease.connection is not None:
                    connection.rollback()
                raise
            self._committed(connection, began)
        self._call_next()
        return changed

    @_block
    def snapshot(self) -> Generator[None, None, None]:
        """Let all reads of the block see one state of the database; a block of one's own is that already."""
        if self._mine() is not None:
            yield
            return
        lease = _Lease(self.timeout, writes=False)
        with lease.alive:
            connection = self._check_out(lease)
            try:
                connection.query("BEGIN")
                lease.token = self._current.set(lease)
                yield
            finally:
                if lease.connection is not None:
                    connection.rollback()  # a call into C: an interrupt cannot come before it is done
                self._leave(lease)

    @_block
    def transaction(self) -> Generator[_Lease, None, None]:
        """Take the write lock and commit at the end of the block; inside a block of one's own, a savepoint."""
        lease = self._mine()
        if lease is not None and lease.writes:
            with self._savepoint(lease):
                yield lease
            return
        lease = _Lease(self.timeout, writes=True)
        with lease.alive:
            self._wait_for_turn(lease)
            connection, began = self._connect_writer(), time.monotonic()
            try:
                self._begin(lease, connection)
                lease.token = self._current.set(lease)
                yield lease
                self._leave(lease)
                self._usable(lease).query("COMMIT")
            except BaseException:
                if lease.connection is not None:
                    connection.rollback()
                self._leave(lease)
                raise
            self._committed(connection, began)
        self._call_next()

    def _begin(self, lease: _Lease, connection: _Connection) -> None:
        connection.rollback()  # an interrupted holder's
        lease.connection, connection.last_error = connection, None
        # a deferred transaction that reads first and writes then can fail whatever the timeout
        connection.query("BEGIN IMMEDIATE", deadline=lease.deadline)
        if connection.query("PRAGMA user_version") != [(len(_MIGRATIONS),)]:
            raise NewerSchemaError(f"{self.path} was migrated by a newer operator_db.py meanwhile: update")

    def _committed(self, connection: _Connection, began: float) -> None:
        """Make sure of what was committed, cut a WAL that has grown too long, and let others in after a long block."""
        size = self._check_file(": the last write is lost")
        due = max(self._logged, size - max(_WAL_LIMIT, self._uncut)) > _CHECKPOINT_EVERY
        if size > _WAL_LIMIT or due:
            with suppress(OperatorDbError):  # the block is committed, whatever comes of this
                if size <= _WAL_LIMIT:  # cut every time, it would cost each sync more
                    connection.query("PRAGMA wal_checkpoint(FULL)")
                else:
                    # steady readers keep SQLite from beginning the log anew, unless they are waited for now and then
                    connection.query(f"PRAGMA busy_timeout={100 if due else 0}")
                    ((busy, *_),) = connection.query("PRAGMA wal_checkpoint(TRUNCATE)")
                    connection.query("PRAGMA busy_timeout=0")
                    self._uncut = (size if due else self._uncut) if busy else 0
            self._logged = 0
        if time.monotonic() - began > 0.01:
            time.sleep(_LET_IN)

    def _leave(self, lease: _Lease) -> None:
        """Make the context that opened a block stand outside of it again."""
        if lease.token is not None:
            token, lease.token = lease.token, None
            with suppress(ValueError, RuntimeError):  # left in another context than it was opened in
                self._current.reset(token)

    @_block
    def _savepoint(self, lease: _Lease) -> Generator[None, None, None]:
        lease.blocks += 1
        name = f"block_{lease.blocks}"  # never used again: RELEASE may have run when an interrupt is seen
        try:
            self._usable(lease).query(f"SAVEPOINT {name}")
            yield
            self._usable(lease).query(f"RELEASE {name}")
        except BaseException as error:
            connection = lease.connection
            if connection is not None and connection.in_transaction:
                with suppress(*() if isinstance(error, Exception) else (OperatorDbError,)):
                    connection.query(f"ROLLBACK TO {name}")
                    connection.query(f"RELEASE {name}")
            raise

    # ---- upkeep

    def give_back_pages(self) -> None:
        """Return free pages to the file system, a few at a time, so that a writer never waits long; not inside a block.

        The file itself shrinks at the checkpoint, which a reader in another process can hold back until a later one.
        """
        while self._mine() is None:
            lease = _Lease(self.timeout, writes=True)
            with lease.alive:
                self._wait_for_turn(lease)
                connection = self._connect_writer()
                free = _pragma(connection, "freelist_count")
                if free and _pragma(connection, "auto_vacuum") == 2:
                    # through execute() this would free a single page, whatever its argument
                    connection.attempt(connection.executescript, f"PRAGMA incremental_vacuum({_BATCH_PAGES})")
                if free <= _BATCH_PAGES or _pragma(connection, "freelist_count") >= free:
                    break
            time.sleep(_LET_IN)
        self.checkpoint()

    def checkpoint(self) -> None:
        """Move the WAL's content into the file and cut the WAL, as far as no reader holds it back; not inside a block."""
        if self._mine() is None:
            lease = _Lease(self.timeout, writes=True)
            with lease.alive:
                self._wait_for_turn(lease)
                self._connect_writer().query("PRAGMA wal_checkpoint(TRUNCATE)")

    def ensure_table(self, table: str) -> None:
        """Create a namespace's table where there is none; raise ForeignFileError for one that is not as we make it."""
        if not _check_table(self.read, self.path, table):
            with self.transaction():
                if not _check_table(self.read, self.path, table):
                    self.write(_CREATE_TABLE.format(table))
                    self.write(_CREATE_INDEX.format(table))

    def other_tables(self) -> list[str]:
        """Return the tables that operators' own namespaces made."""
        rows = self.read("SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name")
        made = _CREATE_TABLE.encode()
        names = [each.decode(errors="replace") for each, sql in rows if sql == made.replace(b"{0}", each)]
        return [name for name in names if _is_namespace_name(name)]

    def integrity_problems(self) -> Iterator[str]:
        """Find what SQLite itself finds wrong with the pages of the file."""
        try:
            for (line,) in self.read("PRAGMA integrity_check(10000)"):
                if line != b"ok":
                    yield line.decode(errors="replace")
        except DamagedError as error:
            yield str(error)

    def size(self) -> int:
        """Return the bytes that the database and its WAL take."""
        return _size(self.path) + _size(self.path + "-wal")

    def free_bytes(self) -> int:
        """Return the bytes of the pages that nothing uses."""
        return int(self.read("PRAGMA freelist_count")[0][0] * self.read("PRAGMA page_size")[0][0])

    def table_bytes(self) -> dict[str, int]:
        """Return the bytes that each table takes with its indexes; empty where SQLite was built without dbstat."""
        try:
            rows = self.read(
                "SELECT tbl_name, sum(pgsize) FROM dbstat JOIN sqlite_master USING (name)"
                " WHERE aggregate = TRUE GROUP BY tbl_name"
            )
        except StorageError:  # no such table
            return {}
        return {table.decode(errors="replace"): size for table, size in rows}

    def copy_to(self, path: str, progress: Progress | None) -> None:
        """Copy one state of the database into an empty file, while others read and write."""
        self._refuse_own_block("backup()")
        with self.snapshot(), closing(_connect(path, self.timeout)) as target:
            self.read(_FIRST_READ)
            self._copy(self, target, progress)

    def copy_from(self, source: _Store, progress: Progress | None) -> None:
        """Replace everything by one state of another database, as one transaction; on any error, nothing is changed.

        Through SQLite, never by moving files: replacing a database while its WAL exists corrupts it.
        """
        self._refuse_own_block("restore()")
        lease = _Lease(self.timeout, writes=True)
        with source.snapshot(), lease.alive:
            source.read(_FIRST_READ)
            if source.read("PRAGMA page_size") != self.read("PRAGMA page_size"):
                raise StorageError(f"{source.path} has pages of another size: export it, then import that")
            self._wait_for_turn(lease)
            self._copy(source, self._connect_writer(), progress)
            self._check_file(": what was restored is lost")
        with suppress(OperatorDbError):  # it is committed, whatever comes of this
            self.checkpoint()

    def _copy(self, source: _Store, target: _Connection, progress: Progress | None) -> None:
        """Copy all pages. A read transaction must be held on the source, else its writers make this begin anew for ever."""
        deadline = time.monotonic() + self.timeout

        def watch(code: int, remaining: int, pages: int) -> None:
            nonlocal deadline
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                deadline = time.monotonic() + self.timeout
            elif time.monotonic() >= deadline:  # SQLite itself would wait for ever
                raise BusyError(f"{target.path} was locked by others for {self.timeout:g} s; try again")
            if progress is not None:
                progress(pages - remaining, pages)

        reader = cast(_Connection, cast(_Lease, source._mine()).connection)
        target.attempt(partial(reader.backup, target, pages=_BATCH_PAGES, progress=watch, sleep=0.001))

    def vacuum(self) -> None:
        """Rebuild the file without gaps, as one transaction."""
        self._refuse_own_block("compact()")
        lease = _Lease(self.timeout, writes=True)
        with lease.alive:
            self._wait_for_turn(lease)
            self._connect_writer().query("VACUUM")
            self._check_file()
        with suppress(OperatorDbError):  # it is committed, whatever comes of this
            self.checkpoint()

    def _refuse_own_block(self, what: str) -> None:
        if self._mine() is not None:
            raise ConflictError(f"{what} inside a transaction: call it outside of the block")

    def has_open(self, path: str) -> bool:
        """Whether a path leads to the database that is open here, or to its WAL or shared memory."""
        if self._closed and self._opened not in _inherited:
            return False
        for suffix in _FILES.values():
            with suppress(OSError):
                if os.path.samefile(path, self.path + suffix):
                    return True
        return False

    # ---- closing and fork

    def _leases(self) -> list[_Lease]:
        """Return the leases that are alive, waiting ones included; the mutex must be held."""
        holders = [connection.holder for connection in self._readers]
        return [lease for lease in (*holders, *self._queue) if lease.alive.locked()]

    def _connections(self) -> list[_Connection]:
        return [*self._readers, *([self._writer] if self._writer else [])]

    def _close_connections(self) -> None:
        connections = self._connections()
        for connection in self._readers:
            connection.holder.connection = None
        self._readers, self._writer, self._wal = [], None, None
        for connection in connections:  # the writer last, so that the WAL is checkpointed and removed
            connection.close()

    def close(self) -> None:
        """Close every connection once the work in flight is done; see OperatorDb.close."""
        if self._closed:
            return
        with self._mutex:
            if any(lease.thread == threading.get_ident() for lease in self._leases()):
                raise ConflictError("close() in a transaction, or in a signal handler that interrupts a call")
        self._refuse_other_block()
        closing = self._closing = _Lease(self.timeout, writes=False)
        with closing.alive:
            while True:
                with self._mutex:
                    if self._closed:
                        return
                    if not any(lease.working for lease in self._leases()):  # those that wait are refused
                        self._closed = "was closed: open it again with OperatorDb(path)"
                        self._close_connections()
                        return
                if time.monotonic() >= closing.deadline:
                    raise BusyError(f"{self.path} is still in use after {self.timeout:g} s; it stays open")
                time.sleep(0.0005)

    def close_before_fork(self) -> bool:
        """Close every connection unless other threads are at work; return whether they were not.

        SQLite's table of locks is inherited, the kernel's locks are not: a child that opens a connection to a file which
        its parent has open believes that it holds locks which it does not.
        """
        with self._mutex:
            working = {lease.thread for lease in self._leases() if lease.working}
            if not working:
                self._close_connections()
            # the block of a thread that is itself forking stays open: see after_fork_in_child
            return working <= _forking

    def is_at_work(self, thread: int) -> bool:
        """Whether a thread is in the midst of a piece of work."""
        with self._mutex:
            return any(lease.working and lease.thread == thread for lease in self._leases())

    def after_fork_in_child(self) -> None:
        """Begin anew, or, where the parent's connections could not be closed, refuse every call from now on."""
        self.latencies.clear()
        inherited = self._connections()
        for lease in (*(connection.holder for connection in self._readers), *self._queue):
            lease.connection = None  # so that leaving the parent's block here touches nothing
        self._forget_connections()
        if inherited:
            self._closed = "was in use when this process was forked: only the parent can go on with it"
            _inherited.add(self._opened or (0, 0))
            import ctypes

            # never closed here, at interpreter exit neither: that may delete the parent's WAL
            # (https://www.sqlite.org/howtocorrupt.html, section 2.6)
            for connection in inherited:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


_stores: weakref.WeakSet[_Store] = weakref.WeakSet()
_stores_lock = threading.RLock()
_fork_is_coming = threading.Lock()
_forking: set[int] = set()  # the threads that are forking or wait for their turn to
_inherited: set[tuple[int, int]] = set()  # files that this process inherited an open connection to


def _all_stores() -> list[_Store]:
    with _stores_lock:
        return list(_stores)


def _is_at_work() -> bool:
    """Whether this thread is in the midst of work on any database."""
    return any(store.is_at_work(threading.get_ident()) for store in _all_stores())


def _before_fork() -> None:
    _forking.add(threading.get_ident())
    try:
        _fork_is_coming.acquire()
        started = time.monotonic()
        while True:
            busy = [store for store in _all_stores() if not store.close_before_fork()]
            if not any(time.monotonic() < started + store.timeout for store in busy):
                return
            time.sleep(0.0005)
    finally:
        _forking.discard(threading.get_ident())


def _after_fork_in_child() -> None:
    global _stores_lock  # noqa: PLW0603  the parent's may be held by a thread that is not here
    _stores_lock = threading.RLock()
    for store in _all_stores():
        store.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
    # calls into C, which no KeyboardInterrupt can keep from happening
    os.register_at_fork(after_in_parent=_fork_is_coming.release, after_in_child=_fork_is_coming.release)


# ==== Namespace: a table of records of one kind =======================================================================

_BATCH_BYTES = 2**20  # of values that a walk holds at a time
_BATCH_SECONDS = 0.02  # that a prune holds the write lock at a time

_GET = 'SELECT key, value, status, at, crc FROM "{0}" WHERE key = CAST(? AS TEXT)'
_PUT = 'INSERT INTO "{0}"(key, value, status, at, crc) VALUES(?, ?, ?, ?, ?) ON CONFLICT(key) DO '
_PUT_OVER = (
    _PUT + "UPDATE SET value = excluded.value, status = excluded.status, at = excluded.at, crc = excluded.crc"
)
_PUT_NEW = _PUT + "NOTHING"
_DELETE = 'DELETE FROM "{0}" WHERE key = ?'
_CLEAR = 'DELETE FROM "{0}" WHERE status = ?'
_COUNT = 'SELECT count(*) FROM "{0}"'
_COUNT_STATUS = 'SELECT count(*) FROM "{0}" WHERE status IS ?'
# `CAST(? AS TEXT)`, because text comes back as bytes: damaged text is then still found by what it is
# `+status`, so that the walk stays in key order and each batch takes up where the last one ended; text sorts before x''
_WALK_FROM = " FROM \"{0}\" WHERE key > CAST(? AS TEXT) AND key < x'' AND (? IS NULL OR +status = ?) ORDER BY key LIMIT 1000"
_WALK = "SELECT key, value, status, at, crc" + _WALK_FROM
_WALK_KEYS = "SELECT key" + _WALK_FROM
# a key that is no text is none of ours, though it may look the same as bytes
_LIST_FROM = "SELECT CASE typeof(key) WHEN 'text' THEN key END, value, status, at, crc, rowid FROM \"{0}\" WHERE status IS CAST(? AS TEXT) "
_LIST = _LIST_FROM + "ORDER BY at, rowid LIMIT ?"
_LIST_NEWEST = _LIST_FROM + "ORDER BY at DESC, rowid DESC LIMIT ?"
_STATUSES = (  # each distinct status, by one look into the index apiece
    'WITH RECURSIVE s(v) AS (SELECT min(status) FROM "{0}" UNION ALL'
    ' SELECT (SELECT min(status) FROM "{0}" WHERE status > s.v) FROM s WHERE s.v IS NOT NULL) SELECT v, typeof(v) FROM s'
)
_EXPIRED = _LIST_FROM + "AND at < ? AND (at, rowid) > (?, ?) ORDER BY at, rowid LIMIT 500"
_ODD_ROWS = (  # what no writer of ours stores, and what comparisons with text and numbers would pass over
    "SELECT CAST(key AS TEXT) FROM \"{0}\" WHERE typeof(key) != 'text' OR key = '' OR typeof(value) != 'text' OR typeof(crc) != 'integer'"
    " OR typeof(status) NOT IN ('text', 'null') OR typeof(at) NOT IN ('integer', 'null')"
)
_ROWS_FROM = (
    'SELECT rowid, key, value, status, at, crc FROM "{0}" NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT 1'
)


def _check_id(record_id: object) -> str:
    """Return the id when it is one; raise InvalidRecordError otherwise."""
    if _ID.holds(record_id):
        return cast(str, record_id)
    raise InvalidRecordError(f"an id must be {_ID.says}; got {_short(record_id)}")


def _is_age(at: object) -> bool:
    return at is None or (type(at) is int and -(2**63) <= at < 2**63)


def _check_count(name: str, value: object) -> int:
    """Return -1 for None, SQLite's word for no limit; raise InvalidRecordError for what is no count."""
    if value is None:
        return -1
    if type(value) is int and 0 <= value < 2**63:
        return value
    raise InvalidRecordError(f"{name} must be an int of 0 or more, or None; got {_short(value)}")


def _check_days(days: object) -> None:
    """Raise InvalidRecordError for what is no number of days."""
    if not (isinstance(days, (int, float)) and type(days) is not bool and 0 <= days < 10**9):
        raise InvalidRecordError(f"days must be a number of 0 or more; got {_short(days)}")


def _status_text(status: Any) -> str | None:
    """Return the column text of a status: an enum by value, a bool as JSON writes it."""
    value = status._value_ if isinstance(status, Enum) else status
    if value is None or _is_text(value):
        return cast("str | None", value)
    if type(value) is bool:
        return "true" if value else "false"
    raise InvalidRecordError(f"a status is a str, an enum of str, a bool or None; got {type(value).__name__}")


def _age(row: _Row) -> tuple[bool, int, int]:
    """Return what SQLite sorts a row of `_LIST` by: its age, NULL first, then its row number."""
    return row[3] is not None, row[3] or 0, row[5]


class Namespace(Generic[R]):
    """The records of one kind: a table that alone reads and writes its rows. Made by `OperatorDb.namespace`.

    A record is found by its id, by its status through an index, and by its age. Every verb but `prune`, `problems` and
    the walks is one transaction, or part of the `transaction()` block that it stands in. For a record that is not what was
    written it raises DamagedError, which names the key; `delete` and `put` still work on such a record.
    """

    def __init__(
        self,
        store: _Store,
        name: str,
        record_type: type[R],
        *,
        key: str,
        status: str | None = None,
        at: str | None = None,
    ) -> None:
        self.name, self.record_type = name, record_type
        self._store, self._codec = store, _codec(record_type)
        self.on_delete: Callable[[str], object] | None = None  # called with an id, in the same transaction
        for role, each in (("key", key), ("status", status), ("at", at)):
            known = each in self._codec.shapes or (type(each) is str and hasattr(record_type, each))
            if not known and (role == "key" or each is not None):
                raise InvalidRecordError(f"{role}={_short(each)}: {record_type.__name__} has no such field")
            if each in self._codec.secrets:
                raise InvalidRecordError(f"{role}={each!r} is a secret field: keys and columns are shown")
        self._prefix, self._label = name + ":", name + "."
        self._key = attrgetter(key)
        self._status = attrgetter(status) if status else None
        self._at = attrgetter(at) if at else None
        self._get, self._put_over, self._put_new = (sql.format(name) for sql in (_GET, _PUT_OVER, _PUT_NEW))

    # ---- one record

    def get(self, record_id: str) -> R | None:
        """Return the record, or None."""
        key = self._prefix + _check_id(record_id)
        try:
            rows = self._store.read(self._get, (key,))
        except DamagedError as error:
            raise DamagedError(f"{_short(key)} cannot be read: {error}") from None
        return self._record(rows[0]) if rows else None

    def put(self, record: R, *, if_absent: bool = False) -> bool:
        """Store the record over the one with its id; with `if_absent`, only where there is none. Return whether stored."""
        sql = self._put_new if if_absent else self._put_over
        return self._store.write(sql, self._row_of(record)) > 0

    def update(self, record_id: str, change: Callable[[R], R]) -> R:
        """Read, call `change(record)`, and store what it returns, as one transaction; return what is stored now.

        Raises NotFoundError when there is no such record. `change` may raise, and then nothing is stored; it must not
        keep others waiting, for it runs under the write lock.
        """
        with self._store.transaction():
            record = self.get(record_id)
            if record is None:
                raise NotFoundError(f"there is no {_short(self._prefix + record_id)}")
            before = self._row_of(record)
            record = change(record)
            after = self._row_of(record)
            if after[0] != before[0]:
                raise InvalidRecordError(f"{_short(before[0])}: update gave another id, {_short(after[0])}")
            if after != before:
                self._store.write(self._put_over, after)
            return record

    def delete(self, record_id: str) -> bool:
        """Remove the record; return whether there was one."""
        if not _is_text(record_id):
            raise InvalidRecordError(f"an id must be a str; got {_short(record_id)}")
        key = self._prefix + record_id  # no other check: what another program wrote can be deleted too
        if self.on_delete is None:
            return self._store.write(_DELETE.format(self.name), (key,)) > 0
        with self._store.transaction():
            self.on_delete(record_id)
            return self._store.write(_DELETE.format(self.name), (key,)) > 0

    def _salvage(self, record_id: str) -> R | None:
        """Return the record that the value alone holds, whatever the columns beside it say; None when it holds none."""
        for _, value, _, _, crc in self._store.read(self._get, (self._prefix + _check_id(record_id),)):
            with suppress(ValueError, TypeError):
                if crc32(value) == crc:
                    return self._codec.decode(value)
        return None

    # ---- many records

    def list(
        self, status: Any = None, *, limit: int | None = None, newest_first: bool = False
    ) -> builtins.list[R]:
        """Return the records of a status (None: of any), oldest first, from one snapshot.

        What it costs depends on the records returned alone. Records of equal age come in the order of their first storing.
        """
        most = _check_count("limit", limit)
        sql = (_LIST_NEWEST if newest_first else _LIST).format(self.name)
        try:
            if status is not None:
                rows = self._store.read(sql, (_status_text(status), most))
            else:
                with self._store.snapshot():
                    each = [self._store.read(sql, (each_status, most)) for each_status in self._statuses()]
                # a walk of the index for each status, merged: no sort of the whole table
                rows = list(islice(merge(*each, key=_age, reverse=newest_first), None if most < 0 else most))
            return [self._record(row) for row in rows]
        except (DamagedError, TypeError) as error:  # the latter from ages that cannot be compared
            raise DamagedError(next(self.problems(), f"{self.name}: {error}")) from None

    def count(self, status: Any = None) -> int:
        """Return how many records there are, or how many with this status."""
        if status is None:
            return int(self._store.read(_COUNT.format(self.name))[0][0])
        return int(self._store.read(_COUNT_STATUS.format(self.name), (_status_text(status),))[0][0])

    def keys(self, status: Any = None) -> Iterator[str]:
        """Walk the ids in key order, as `values` walks the records."""
        for row in self._walk(_WALK_KEYS, status):
            yield self._id(row[0])

    def values(self, status: Any = None) -> Iterator[R]:
        """Walk the records in key order, in short batches that block nobody.

        A record that is there throughout is seen exactly once; one that comes, goes or changes meanwhile, perhaps.
        """
        for row in self._walk(_WALK, status):
            yield self._record(row)

    def items(self, status: Any = None) -> Iterator[tuple[str, R]]:
        """Walk pairs of id and record, as `values` does."""
        for row in self._walk(_WALK, status):
            yield self._id(row[0]), self._record(row)

    def _export_lines(self, *, secrets: bool) -> Iterator[str]:
        """Walk the records as lines of an export: with id, status and age beside them where no upstream schema gives those."""
        for row in self._walk(_WALK, None):
            self._record(row)  # proves it whole
            record = row[1].decode() if secrets else self._redacted(row[1])
            columns = ""
            if self.name not in _OUR_TABLES:
                status = None if row[2] is None else row[2].decode()
                columns = f',"key":{_encode_json(self._id(row[0]))},"status":{_encode_json(status)},"at":{_encode_json(row[3])}'
            yield f'{{"namespace":"{self.name}"{columns},"record":{record}}}\n'

    def prune(
        self,
        days: float,
        *,
        status: Any = None,
        keep: Callable[[str], bool] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Remove the records older than `days`, of one status if given, but those whose id `keep` wants; return how many.

        It works in batches, each a transaction of its own of some 20 ms. `dry_run` counts and removes nothing.
        """
        _check_days(days)
        if self._at is None:
            raise InvalidRecordError(f"{self.name} has no age: it was made without at=")
        before = _now() - int(days * 86400)
        statuses = self._statuses() if status is None else [_status_text(status)]
        removed = 0
        for each in statuses:
            for batch in self._prune_status(each, before, keep or (lambda _: False), dry_run):
                removed += batch
                if progress is not None:
                    progress(removed, 0)
        return removed

    def _prune_status(
        self, status: str | bytes | None, before: int, keep: Callable[[str], bool], dry_run: bool
    ) -> Iterator[int]:
        sql, place = _EXPIRED.format(self.name), (-(2**63), 0)
        while True:
            removed = 0
            with self._store.snapshot() if dry_run else self._store.transaction():
                rows = self._store.read(sql, (status, before, *place), most_bytes=_BATCH_BYTES)
                deadline = time.monotonic() + _BATCH_SECONDS
                for row in rows:
                    # decoded, because an index with one bit flipped says of the wrong record that it may go
                    record_id, place = self._key(self._record(row)), (row[3], row[5])
                    if not keep(record_id):
                        removed += dry_run or self.delete(record_id)
                    if time.monotonic() > deadline:
                        break
            if not rows:
                return
            yield removed
            time.sleep(_LET_IN)

    def clear(self, status: Any) -> int:
        """Remove every record of a status; return how many."""
        return self._store.write(_CLEAR.format(self.name), (_status_text(status),))

    def statuses(self) -> builtins.list[str]:
        """Return the distinct statuses that there are, sorted."""
        return [status.decode(errors="replace") for status in self._statuses() if status is not None]

    def _statuses(self) -> builtins.list[bytes | None]:
        """Return the distinct statuses as they are stored, and None for the records without one."""
        rows = self._store.read(_STATUSES.format(self.name))
        if any(kind not in (b"text", b"null") for _, kind in rows):
            raise DamagedError(f"{self.name} holds a status that is no text: run check()")
        return [*(status for status, _ in rows if status is not None), None]

    def _redacted(self, value: bytes) -> str:
        """Return a stored document with `***` for its secrets."""
        if self.name in _OUR_TABLES and not self._codec.secrets:
            return value.decode()
        return _encode_json(self._codec.redacted(json.loads(value)))

    def _put_row(self, row: builtins.list[Any]) -> bool:
        """Store a row that `_row_of` made, unless there is one with its key; return whether it was stored."""
        return self._store.write(self._put_new, tuple(row)) > 0

    def _row_as_written(
        self, record_id: Any, status: Any, at: Any, document: _Json
    ) -> tuple[str, str, str | None, int | None, int]:
        """Return the row of a JSON object, with the columns that the operator's code took from it, once all are checked."""
        if not (_is_text(status) or status is None) or not _is_age(at) or not _is_json(document):
            raise ValueError("status must be text or null, at Unix seconds or null, the record plain JSON")
        text = _encode_json(document)
        return self._prefix + _check_id(record_id), text, status, at, crc32(text.encode())

    def _replace_row(self, row: _Row) -> str:
        """Store a row that `_row_of` made over one with its key; return `added`, `replaced` or `unchanged`."""
        if self._put_row([*row]):
            return "added"
        wanted = tuple(each.encode() if isinstance(each, str) else each for each in row)
        with suppress(DamagedError):
            if self._store.read(self._get, (row[0],)) == [wanted]:
                return "unchanged"
        self._store.write(self._put_over, row)
        return "replaced"

    # ---- what is wrong

    def problems(self, progress: Progress | None = None) -> Iterator[str]:
        """Find every record that cannot be read back, by its key; goes on to the end."""
        try:
            for row in self._store.read(_ODD_ROWS.format(self.name)):
                key = (row[0] or b"a row without a key").decode(errors="replace")
                yield f"{_short(key)} in {self.name} has a column of a wrong type: another program wrote it"
        except DamagedError as error:
            yield f"{self.name}: {error}"
        found = []
        try:
            for done, row in enumerate(self._walk(_WALK, None), 1):
                if progress is not None:
                    progress(done, 0)
                try:
                    self._record(row)
                except DamagedError as error:
                    found.append(str(error))
        except DamagedError:
            found = [*self._problems_by_key()]
        yield from found

    def _problems_by_key(self) -> Iterator[str]:
        """Find what is wrong where a page of records cannot be read: key after key, as the index has them."""
        try:
            for row in self._walk(_WALK_KEYS, None):
                try:
                    for found in self._store.read(self._get, (row[0],)):
                        self._record(found)
                except DamagedError as error:
                    yield f"{_short(row[0].decode(errors='replace'))}: {error}"
        except DamagedError as error:
            yield f"{self.name}: its keys cannot all be read ({error}); every row that can be reached follows"
            yield from self._problems_by_row()

    def _problems_by_row(self) -> Iterator[str]:
        """Find what is wrong without the help of the index: row after row, past those that cannot be reached."""
        place = -(2**63)
        while True:
            try:
                rows = self._store.read(_ROWS_FROM.format(self.name), (place,))
            except DamagedError:
                after = self._next_readable(place)
                yield f"{self.name}: rows {place + 1} to {after} cannot be read"
                place = after
                continue
            if not rows or rows[0][0] <= place:
                return
            place = rows[0][0]
            try:
                self._record(rows[0][1:])
            except DamagedError as error:
                yield str(error)

    def _next_readable(self, place: int) -> int:
        """Return the last row number of an unreadable stretch: search outwards, then back by halves."""
        step, low = 1, place
        while place + step < 2**63 - 1 and not self._reaches(place + step):
            low, step = place + step, step * 2
        high = min(place + step, 2**63 - 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._reaches(middle) else (middle, high)
        return high

    def _reaches(self, place: int) -> bool:
        try:
            self._store.read(_ROWS_FROM.format(self.name), (place,))
        except DamagedError:
            return False
        return True

    # ---- rows

    def _row_of(self, record: R) -> tuple[str, str, str | None, int | None, int]:
        """Check a record and return the row that it is stored as."""
        value = self._codec.encode(record)
        try:
            key, status, at = self._columns(record)
        except InvalidRecordError:
            raise
        except Exception as error:  # of an operator's own property
            raise InvalidRecordError(f"{self.name}: {type(error).__name__} raised by a property") from None
        _check_id(key)
        if not _is_age(at):
            raise InvalidRecordError(f"{self.name}: its age is counted from Unix seconds; got {_short(at)}")
        return self._prefix + key, value, status, at, crc32(value.encode())

    def _columns(self, record: R) -> tuple[str, str | None, int | None]:
        """Return the record's id, status and age as it gives them."""
        status = _status_text(self._status(record)) if self._status else None
        return self._key(record), status, self._at(record) if self._at else None

    def _record(self, row: _Row) -> R:
        key, value, status, at, crc = row[:5]
        try:
            if crc32(value) != crc:
                raise ValueError("its checksum does not match")
            record = self._codec.decode(value)
            record_id, *columns = self._columns(record)
            if key.decode() != self._prefix + record_id:
                raise ValueError("it holds the record of another key")
            if columns != [None if status is None else status.decode(), at]:
                raise ValueError("its status and age columns do not match the record")
        except Exception as error:  # whatever an operator's own properties raise, too
            name = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
            raise DamagedError(
                f"{_short(name)} is damaged: {error}; delete it, store it again, or restore a backup"
            ) from None
        return record

    def _id(self, key: bytes | None) -> str:
        return (key or b"a row without a key").decode(errors="replace").removeprefix(self._prefix)

    def _walk(self, sql: str, status: Any) -> Iterator[_Row]:
        only, last = _status_text(status), b""
        while True:
            try:
                rows = self._store.read(sql.format(self.name), (last, only, only), most_bytes=_BATCH_BYTES)
            except DamagedError as error:
                raise DamagedError(
                    f"{self.name}, after {_short(last.decode(errors='replace'))}: {error}"
                ) from None
            for row in rows:
                if row[0] <= last:  # a damaged key, which would lead the walk round in circles
                    raise DamagedError(f"{self.name}: index out of order at {_short(self._id(row[0]))}")
                last = row[0]
                yield row
            if not rows:
                return


class _PlainNamespace(Namespace[Any]):
    """A namespace whose dataclass is known to the operator's code alone: its records are read as plain JSON objects."""

    def __init__(self, store: _Store, name: str) -> None:
        super().__init__(store, name, _LogEntry, key="entry_id")  # any: walks meet _record alone

    def _redacted(self, value: bytes) -> str:
        return value.decode()

    def _record(self, row: _Row) -> Any:
        try:
            if crc32(row[1]) != row[4] or not _is_age(row[3]):
                raise ValueError("its checksum does not match")
            row[0].decode(), (row[2] or b"").decode()
            return json.loads(row[1])
        except (ValueError, TypeError, AttributeError, RecursionError):
            key = self._prefix + self._id(row[0])
            raise DamagedError(f"{_short(key)} is damaged: it is not what was written") from None


# ==== Evidence: what a dispute is decided on ==========================================================================


def _evidence(log: VerificationLog) -> bytes:
    """Return the canonical JSON (sorted keys, no spaces, UTF-8) that the evidence hash is taken over."""
    document = {name: _base64(getattr(log, name)) for name in ("inputs", "outputs", "proof", "result_data")}
    document |= {"format": "agenc-evidence/1", "task_id": log.task_id, "proof_hash": log.proof_hash}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _bundle(task: TaskRecord | None, log: VerificationLog) -> _Json:
    """Return a dispute bundle: one JSON object, byte strings in hex where they are arguments for the chain."""
    return {
        "format": "agenc-dispute/1",
        "task": task and _codec(TaskRecord).to_json(task),
        "proof": _codec(VerificationLog).to_json(log),
        "evidence_hash": log.evidence_hash,
        "submit_task_result": {name: value.hex() for name, value in log.submit_args().items()},
        "initiate_dispute": {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in log.dispute_args().items()
        },
    }


def verify_dispute_bundle(bundle: Any, *, evidence_hash: str | None = None) -> list[str]:
    """Return what is wrong with a dispute bundle, a line for each check that failed; empty when it holds.

    Needs no database. `evidence_hash` is the hash that stands on chain, 64 hex digits: with it, any change to the evidence
    is found; without it, only contradictions within the bundle are. Whatever the bundle is, it is answered, not raised on.
    """
    if type(bundle) is not dict or type(bundle.get("proof")) is not dict or "task" not in bundle:
        return ["bundle: it is not a JSON object that holds a task and a proof"]
    try:
        given = {name: value for name, value in bundle["proof"].items() if name != "evidence_hash"}
        log = _codec(VerificationLog).from_json(given)
    except (ValueError, TypeError, AttributeError) as error:
        return [f"proof: {error}"]
    found = []
    task = None
    if bundle.get("task") is not None:
        try:
            task = _codec(TaskRecord).from_json(json.loads(json.dumps(bundle["task"])))
            if task.task_id != log.task_id:
                found.append(f"task: it is {_short(task.task_id)}, the proof is for {_short(log.task_id)}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            found.append(f"task: {error}")
            task = None
    wanted = _bundle(task, log)
    odd = [name for name in wanted if name != "task" and bundle.get(name) != wanted[name]]
    found += [f"{name}: it is not what the proof's evidence gives" for name in odd]
    found += [f"{_short(name)}: it is no part of a dispute bundle" for name in bundle if name not in wanted]
    if evidence_hash is not None and str(evidence_hash).lower() != log.evidence_hash:
        found.append(f"chain: the evidence hash there is {_short(evidence_hash)}, here {log.evidence_hash}")
    return found


# ==== Metrics: what this process does, and how long it takes ==========================================================

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _timed(method: _Method) -> _Method:
    """Count each call of a method under its name, with its latency and the errors that it raised."""
    name, clock = method.__name__, time.perf_counter

    @wraps(method)
    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        latencies, label = self._store.latencies, self._label + name
        latency = latencies.get(label) or latencies.setdefault(label, Latency())
        started = clock()
        try:
            return method(self, *arguments, **options)
        except OperatorDbError as error:
            latency.errors[type(error).__name__] += 1
            raise
        finally:
            latency.add(clock() - started)

    return cast(_Method, timed)


class _TimedNamespace(Namespace[R]):
    """A namespace of the operator's own. Ours are timed by the methods of OperatorDb, which are more than one verb each."""

    get = _timed(Namespace.get)
    put = _timed(Namespace.put)
    update = _timed(Namespace.update)
    delete = _timed(Namespace.delete)
    list = _timed(Namespace.list)
    count = _timed(Namespace.count)
    prune = _timed(Namespace.prune)


_Sample = tuple[str, dict[str, Any], float]  # what follows a metric's name, labels, value


def _exposition(stats: DbStats) -> str:
    """Return statistics in the text format of https://prometheus.io/docs/instrumenting/exposition_formats/."""
    lines: list[str] = []
    path = stats.path.encode(errors="replace").decode()
    for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ('"', '\\"')):
        path = path.replace(plain, escaped)

    def family(name: str, says: str, samples: Iterable[_Sample], kind: str = "gauge") -> None:
        lines.extend((f"# HELP operator_db_{name} {says}", f"# TYPE operator_db_{name} {kind}"))
        for suffix, labels, value in samples:
            shown = "".join(f',{label}="{text}"' for label, text in labels.items())
            lines.append(f'operator_db_{name}{suffix}{{database="{path}"{shown}}} {value}')

    def by(label: str, values: dict[Any, int]) -> list[_Sample]:
        return [("", {label: name}, value) for name, value in values.items()]

    def latencies() -> Iterator[_Sample]:
        for name, latency in stats.operations.items():
            below = list(accumulate(latency.buckets))
            for bound, count in zip((*latency.bounds, "+Inf"), below, strict=True):
                yield "_bucket", {"operation": name, "le": bound}, count
            yield "_sum", {"operation": name}, latency.seconds
            yield "_count", {"operation": name}, below[-1]

    def errors() -> Iterator[_Sample]:
        for name, latency in stats.operations.items():
            for error, count in latency.errors.items():
                yield "", {"operation": name, "error": error}, count

    versions = {"version": __version__, "schema_version": stats.schema_version}
    versions |= {"sqlite_version": sqlite3.sqlite_version}
    family("info", "Versions of what runs; always 1.", [("", versions, 1)])
    family("file_bytes", "Size of each file of the database.", by("file", stats.files))
    family("free_bytes", "Bytes of the database file that nothing uses.", [("", {}, stats.free)])
    family("records", "Records in each namespace.", by("namespace", stats.records))
    family("namespace_bytes", "Bytes of each namespace and its indexes.", by("namespace", stats.bytes))
    family("tasks", "Tasks of each status.", by("status", stats.tasks))
    family("unsubmitted_proofs", "Proofs not marked as submitted.", [("", {}, stats.unsubmitted_proofs)])
    if stats.operations:
        family("operation_duration_seconds", "Latency of each operation here.", latencies(), "histogram")
        family("operation_errors_total", "Operations that raised here, by error.", errors(), "counter")
    return "\n".join(lines) + "\n"


# ==== OperatorDb ======================================================================================================


def _status(value: TaskStatus | str) -> TaskStatus:
    """Parse a task status; raise InvalidRecordError for what is none."""
    try:
        return TaskStatus(value if isinstance(value, str) else "")
    except ValueError:
        raise InvalidRecordError(f"{_short(value)} is no task status: use {', '.join(TaskStatus)}") from None


def _logs(session_id: str) -> tuple[str, str]:
    """Return the names of a session's two logs: of its transcript and of its commands."""
    return f"transcript:{session_id}", f"commands:{session_id}"


def _shared(session: SessionState | _SessionRow) -> _Json:
    """Return the fields that a session and its row have in common."""
    names = ("session_id", "active_task_ids", "created_at", "last_active")
    return {name: getattr(session, name) for name in names}


def _moved(task: TaskRecord, status: TaskStatus, signature: str | None, at: int | None) -> TaskRecord:
    """Move a task to a status and put that into its history; a move that the history shows already changes nothing."""
    again = status == task.status and signature in (None, task.on_chain_signature)
    if again or (signature and any((c.status, c.signature) == (status, signature) for c in task.history)):
        return task
    change = StatusChange(status=status, at=_now() if at is None else at, signature=signature)
    task.history.append(change)
    task.status = status
    task.on_chain_signature = signature or task.on_chain_signature
    if status == TaskStatus.COMPLETED and task.completed_at is None:
        task.completed_at = change.at
    return task


def _tell(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    """Report the progress of one part of long work as that of the whole."""
    progress(before + done, total)


class OperatorDb:
    """The operator's database: tasks, sessions, proofs, config, and namespaces of its own, in one SQLite file.

    `path` is the file (default: the environment's AGENC_DB_PATH, then ~/.agenc/operator.db), created private to its owner
    when it is not there; ":memory:" is a private temporary file, removed at close. `read_only` changes no record and no
    byte of the file. `timeout` is how many seconds a call waits for other threads and processes before BusyError.

    Durability. A call that changes something returns after its commit, and that survives the death of the process at any
    later moment. With `durable=True` it has also been synced to the disk: it survives loss of power, if the disk keeps its
    word. With `durable=False` the last commits may be lost with the power, never a part of one. A write-ahead log that
    something else cuts short loses its last commits without a sign.

    Threads. One object serves any number of threads: writers take turns, in the order in which they came; readers run
    beside them and see the last commit, or inside their own `transaction()` what it has done so far. An object belongs to
    no thread. In asyncio, call it through `asyncio.to_thread`.

    Processes. Any number may open one file on a local disk. After `fork()` parent and child may both go on with the
    object; connections are closed before and opened anew after. Only the child of a thread that forked within its own
    `transaction()`, or while another was at work for longer than `timeout`, gets an object that refuses every call.

    Records that are passed in are checked and copied as they are at that moment. All errors derive from OperatorDbError.
    Beside those that a verb names, any may raise InvalidRecordError for its arguments, BusyError, ClosedError, DamagedError
    and StorageError, and one that writes also ConflictError (another's block) and NewerSchemaError.
    """

    _label = ""  # before the names of its operations

    def __init__(
        self, path: _Path | None = None, *, read_only: bool = False, durable: bool = True, timeout: float = 30
    ) -> None:
        if not (type(timeout) in (int, float) and 0 <= timeout < threading.TIMEOUT_MAX):
            raise InvalidRecordError(f"timeout must be a number of seconds, 0 or more; got {_short(timeout)}")
        self._temporary: weakref.finalize[..., OperatorDb] | None = None
        if (path or os.environ.get("AGENC_DB_PATH")) == ":memory:":
            path = self._make_temporary()
        store = _Store(_database_path(path), read_only=read_only, durable=durable, timeout=timeout)
        self._store = store
        self._tasks = Namespace(store, "tasks", TaskRecord, key="task_id", status="status", at="age_from")
        log = self._log = Namespace(store, "session_log", _LogEntry, key="entry_id", status="log", at="seq")
        self._sessions = Namespace(store, "sessions", _SessionRow, key="session_id", at="last_active")
        self._sessions.on_delete = lambda session_id: [log.clear(each) for each in _logs(session_id)]
        self._proofs = Namespace(
            store, "proofs", VerificationLog, key="task_id", status="submitted", at="timestamp"
        )
        self._config = Namespace(store, "config", OperatorConfig, key="operator_id")
        ours: list[Namespace[Any]] = [self._tasks, self._sessions, self._log, self._proofs, self._config]
        self._namespaces = {each.name: each for each in ours}

    @classmethod
    def open(cls, path: _Path | None = None, **options: Any) -> OperatorDb:
        """Return OperatorDb(path, **options), under the prototype's name for it."""
        return cls(path, **options)

    def _make_temporary(self) -> str:
        import shutil
        import tempfile

        directory, owner = tempfile.mkdtemp(prefix="operator_db-"), os.getpid()

        def remove() -> None:
            if os.getpid() == owner:  # not in a forked child, which shares it
                shutil.rmtree(directory, ignore_errors=True)

        self._temporary = weakref.finalize(self, remove)
        return os.path.join(directory, "operator.db")

    def __enter__(self) -> OperatorDb:
        """Return the open database."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the database."""
        self.close()

    def __repr__(self) -> str:
        """Show the path."""
        return f"OperatorDb({self.path!r})"

    @property
    def path(self) -> str:
        """The absolute path of the file, symbolic links resolved."""
        return self._store.path

    def close(self) -> None:
        """Close the database; closing it again does nothing, and every later call raises ClosedError.

        Waits up to `timeout` for the work of other threads, then raises BusyError and stays open. Raises ConflictError
        inside one's own `transaction()`.
        """
        self._store.close()
        if self._temporary is not None:
            self._temporary()

    def transaction(self) -> AbstractContextManager[None]:
        """Make every change of the block one: all are committed at its end, or, if it raises, none.

        The write lock is taken at once, so what the block reads stays true until it ends. A block within a block can fail,
        and be caught, without the outer one. The block belongs to the thread and context that opened it: it must not await.
        When an error (disk full, I/O) has ended SQLite's transaction, every later call in the block raises StorageError,
        and so does leaving it.
        """
        return self._store.transaction()

    def namespace(
        self, name: str, record_type: type[R], *, key: str, status: str | None = None, at: str | None = None
    ) -> Namespace[R]:
        """Return the namespace of a record type of the operator's own, making its table when there is none.

        `name` is 1 to 48 lower-case letters, digits and underscores, a letter first. `key`, `status` and `at` name fields
        or properties of the dataclass: the id (str), what status queries look for (str, an enum of str, or bool), and what
        the age is counted from (Unix seconds). Raises InvalidRecordError for a name or type that will not do.
        """
        if not _is_namespace_name(name):
            raise InvalidRecordError(
                f"a namespace is 1 to 48 of a-z, 0-9 and _, a letter first, and none of ours; got {_short(name)}"
            )
        made = _TimedNamespace(self._store, name, record_type, key=key, status=status, at=at)
        self._store.ensure_table(name)
        self._namespaces[name] = made
        return made

    # ---- tasks

    @_timed
    def store_task(self, task: TaskRecord) -> None:
        """Store a task, in place of the one with its id.

        History only grows. The given task is brought up to date in place, even if a block is undone later: its history
        begins with what was stored (if that can be read) and ends with its status, and the first completion is stamped.
        """
        _codec(TaskRecord).check(task)
        given, completed_at = len(task.history), task.completed_at
        self._settle(task)
        if not self._tasks.put(task, if_absent=True):
            with self.transaction():
                del task.history[given:]
                task.completed_at = completed_at
                with suppress(DamagedError):  # a damaged record can be overwritten
                    self._settle(task, self._tasks.get(task.task_id))
                self._settle(task)
                self._tasks.put(task)

    @staticmethod
    def _settle(task: TaskRecord, stored: TaskRecord | None = None) -> bool:
        """Bring a task up to date with what is stored and with its own status; return whether its history grew at the end."""
        if stored is not None:
            if task.history[: len(stored.history)] != stored.history:
                later = [change for change in task.history if change not in stored.history]
                task.history[:] = stored.history + later
            if task.completed_at is None:
                task.completed_at = stored.completed_at
        last, signature = task.history[-1] if task.history else None, task.on_chain_signature
        grows = last is None or (last.status, last.signature or signature) != (task.status, signature)
        if grows:
            task.history.append(StatusChange(status=task.status, signature=signature))
        moved = grows or (stored is not None and stored.status in _OPEN)
        if moved and task.status == TaskStatus.COMPLETED and task.completed_at is None:
            task.completed_at = task.history[-1].at
        return grows

    @_timed
    def get_task(self, task_id: str) -> TaskRecord | None:
        """Return the task, or None."""
        return self._tasks.get(task_id)

    @_timed
    def delete_task(self, task_id: str) -> bool:
        """Remove a task, whatever its status, and leave its proof; return whether there was one."""
        return self._tasks.delete(task_id)

    @_timed
    def count_tasks(self) -> dict[TaskStatus, int]:
        """Return how many tasks have each status, zeros included."""
        with self._store.snapshot():
            return {status: self._tasks.count(status) for status in TaskStatus}

    @_timed
    def list_tasks(
        self, status: TaskStatus | str | None = None, *, limit: int | None = None, newest_first: bool = False
    ) -> list[TaskRecord]:
        """Return the tasks of a status, or of any, by age (completion, or, lacking it, claim), oldest first."""
        wanted = None if status is None else _status(status)
        return self._tasks.list(wanted, limit=limit, newest_first=newest_first)

    @_timed
    def list_tasks_by_status(self, status: TaskStatus | str) -> list[TaskRecord]:
        """Return the tasks of a status, oldest first; only they are read."""
        return self._tasks.list(_status(status))

    def iter_tasks(self, status: TaskStatus | str | None = None) -> Iterator[TaskRecord]:
        """Walk the tasks in the order of their ids, in batches that block nobody; see `Namespace.values`."""
        return self._tasks.values(None if status is None else _status(status))

    @_timed
    def update_task_status(
        self,
        task_id: str,
        status: TaskStatus | str,
        *,
        signature: str | None = None,
        at: int | None = None,
        expected: TaskStatus | str | None = None,
    ) -> TaskRecord:
        """Move a task to a status, put the move into its history, and return the task.

        `at` is in Unix seconds (default: now), `signature` is the transaction's. With `expected`, ConflictError is raised
        unless that is the task's status now. Moving it to where it is changes nothing, nor does a move whose signature the
        history shows already. The first move to completed stamps `completed_at`. Raises NotFoundError.
        """
        wanted, must_be = _status(status), None if expected is None else _status(expected)
        if signature is not None:
            _check_id(signature)

        def change(task: TaskRecord) -> TaskRecord:
            if must_be not in (None, task.status):
                raise ConflictError(f"tasks:{_short(task_id)} is {task.status}, not {must_be}: read it again")
            return _moved(task, wanted, signature, at)

        return self._tasks.update(task_id, change)

    @_timed
    def complete_task(
        self, task_id: str, proof: VerificationLog, *, signature: str | None = None
    ) -> TaskRecord:
        """Store the proof of a task and move the task to completed, as one transaction; return the task.

        Done again with the same evidence it changes nothing. Raises NotFoundError when there is no such task, and
        ConflictError for a disputed or resolved task, for another task's proof, and where other evidence is stored.
        """

        def change(task: TaskRecord) -> TaskRecord:
            if task.status not in (*_OPEN, TaskStatus.COMPLETED):
                raise ConflictError(f"tasks:{_short(task_id)} is {task.status}: it cannot be completed now")
            self.store_proof(proof)
            done = task.status == TaskStatus.COMPLETED
            return task if done else _moved(task, TaskStatus.COMPLETED, signature, None)

        if isinstance(proof, VerificationLog) and proof.task_id != task_id:
            raise ConflictError(f"the proof is for task {_short(proof.task_id)}, not for {_short(task_id)}")
        return self._tasks.update(task_id, change)

    # ---- sessions

    @_timed
    def store_session(self, session: SessionState) -> None:
        """Store a session: its fields replace those that are stored, its log extends the log that is stored.

        Raises ConflictError unless the log that is given begins with the stored one, so that nobody's entry is
        overwritten unseen. To rewrite history, delete the session first.
        """
        _codec(SessionState).check(session)
        name, said, commands = session.session_id, session.transcript, session.command_history
        (spoken, ordered), at = _logs(name), session.last_active
        with self.transaction():
            row = self._sessions.get(name)
            stored = self._with_log(row) if row else SessionState(session_id=name)
            known, given = len(stored.transcript), len(stored.command_history)
            if said[:known] != stored.transcript or commands[:given] != stored.command_history:
                raise ConflictError(f"sessions:{_short(name)} has entries the given log lacks: read it again")
            self._append(spoken, known, [(e.content, e.role, e.timestamp) for e in said[known:]])
            self._append(ordered, given, [(command, None, at) for command in commands[given:]])
            row = _SessionRow(**_shared(session), transcript_entries=len(said), commands=len(commands))
            self._sessions.put(row)

    @_timed
    def get_session(self, session_id: str) -> SessionState | None:
        """Return the session with its whole log, or None."""
        with self._store.snapshot():
            row = self._sessions.get(session_id)
            return self._with_log(row) if row else None

    @_timed
    def list_sessions(self, *, limit: int | None = None) -> list[SessionState]:
        """Return the sessions with their logs, the least recently active first."""
        with self._store.snapshot():
            return [self._with_log(row) for row in self._sessions.list(limit=limit)]

    @_timed
    def delete_session(self, session_id: str) -> bool:
        """Remove a session and its log; return whether there was one."""
        return self._sessions.delete(session_id)

    @_timed
    def append_transcript(
        self, session_id: str, role: str, content: str, *, timestamp: int | None = None
    ) -> None:
        """Add an utterance to a session, which is created when there is none; costs the same however long the log is."""
        at = _now() if timestamp is None else timestamp
        TranscriptEntry(role=role, content=content, timestamp=at)  # checks them

        def add(row: _SessionRow) -> None:
            log, words = _logs(session_id)[0], (content, role, at)
            row.transcript_entries = self._append(log, row.transcript_entries, [words])

        self._touch(session_id, at, add)

    @_timed
    def append_command(self, session_id: str, command: str, *, timestamp: int | None = None) -> None:
        """Add a command to a session's command history; the session is created when there is none."""
        at = _now() if timestamp is None else timestamp

        def add(row: _SessionRow) -> None:
            row.commands = self._append(_logs(session_id)[1], row.commands, [(command, None, at)])

        self._touch(session_id, at, add)

    @_timed
    def transcript(self, session_id: str, *, last: int | None = None) -> list[TranscriptEntry]:
        """Return a session's transcript in order, or its last entries; only these are read. Empty for no such session."""
        _check_count("last", last)
        with self._store.snapshot():
            row = self._sessions.get(session_id)
            return self._transcript(row, last) if row else []

    @_timed
    def link_task(self, session_id: str, task_id: str) -> None:
        """Add a task to those that a session is about, once; the session is created when there is none."""
        _check_id(task_id)

        def link(row: _SessionRow) -> None:
            if task_id not in row.active_task_ids:
                row.active_task_ids.append(task_id)

        self._touch(session_id, _now(), link)

    @_timed
    def unlink_task(self, session_id: str, task_id: str) -> bool:
        """Take a task off those that a session is about; return whether it was among them."""
        with self.transaction():
            session = self._sessions.get(session_id)
            if session is None or task_id not in session.active_task_ids:
                return False
            session.active_task_ids.remove(task_id)
            return self._sessions.put(session)

    def _touch(self, session_id: str, at: int, change: Callable[[_SessionRow], None]) -> None:
        """Change a session's row, created when absent, and store it as active at a time, in one transaction."""
        with self.transaction():
            row = self._sessions.get(session_id)
            if row is None:
                row = _SessionRow(session_id=session_id, active_task_ids=[], created_at=at, last_active=at)
            change(row)
            row.last_active = max(row.last_active, at)
            self._sessions.put(row)

    def _append(self, log: str, seq: int, entries: list[tuple[str, str | None, int]]) -> int:
        """Store entries from a place in a log on; return how many the log then has."""
        for place, (content, role, timestamp) in enumerate(entries, seq):
            entry = _LogEntry(log=log, seq=place, content=content, role=role, timestamp=timestamp)
            if not self._log.put(entry, if_absent=True):
                raise DamagedError(f"session_log:{_short(log)} is longer than its session knows: run check()")
        return seq + len(entries)

    def _entries(self, log: str, count: int, last: int | None = None) -> list[_LogEntry]:
        """Return a log's entries, or its last ones; raise DamagedError unless they are as many as its session knows."""
        entries = self._log.list(log, limit=last, newest_first=True)[::-1]
        first = 0 if last is None else max(0, count - last)
        if [entry.seq for entry in entries] != [*range(first, count)]:
            raise DamagedError(f"session_log:{_short(log)} is short: delete the session, or restore a backup")
        return entries

    def _transcript(self, row: _SessionRow, last: int | None = None) -> list[TranscriptEntry]:
        said = self._entries(_logs(row.session_id)[0], row.transcript_entries, last)
        return [TranscriptEntry(role=e.role or "", content=e.content, timestamp=e.timestamp) for e in said]

    def _with_log(self, row: _SessionRow) -> SessionState:
        commands = [entry.content for entry in self._entries(_logs(row.session_id)[1], row.commands)]
        return SessionState(**_shared(row), transcript=self._transcript(row), command_history=commands)

    # ---- proofs

    @_timed
    def store_proof(self, log: VerificationLog) -> bool:
        """Store the proof of a task, once; return whether it is new.

        The same evidence again changes nothing, not even the first timestamp or the submission. Raises ConflictError when
        the task has other evidence: a proof is never overwritten, unless what is stored cannot be read.
        """
        with self.transaction():
            if self._proofs.put(log, if_absent=True):
                return True
            try:
                stored = self._proofs.get(log.task_id)
            except DamagedError:
                stored = self._proofs._salvage(log.task_id)
                self._proofs.put(stored or log)  # what cannot be read is no evidence
            if stored is not None and stored.evidence_hash != log.evidence_hash:
                hashes = f"{stored.evidence_hash} is stored, {log.evidence_hash} was given"
                raise ConflictError(f"proofs:{_short(log.task_id)} is never overwritten: {hashes}")
            return stored is None

    @_timed
    def get_proof(self, task_id: str) -> VerificationLog | None:
        """Return the proof of a task, its evidence hash verified, or None."""
        return self._proofs.get(task_id)

    @_timed
    def list_proofs(
        self, *, submitted: bool | None = None, limit: int | None = None
    ) -> list[VerificationLog]:
        """Return the proofs, or those that are or are not submitted, oldest first; `submitted=False` is the queue for retries."""
        if submitted is not None and type(submitted) is not bool:
            raise InvalidRecordError(f"submitted must be a bool or None; got {_short(submitted)}")
        return self._proofs.list(submitted, limit=limit)

    @_timed
    def delete_proof(self, task_id: str) -> bool:
        """Remove the proof of a task; return whether there was one.

        Raises ConflictError while it is not submitted, or its task is there and neither completed nor resolved. One that
        cannot be read can always be deleted.
        """
        with self.transaction():
            log = None
            with suppress(DamagedError, InvalidRecordError):  # what cannot be read can only be deleted
                log = self._proofs._salvage(task_id)
            if log is not None and (not log.submitted or self._task_is_unsettled(task_id)):
                raise ConflictError(f"proofs:{_short(task_id)} is not submitted, or its task is not settled")
            return self._proofs.delete(task_id)

    def _task_is_unsettled(self, task_id: str) -> bool:
        task = self._tasks.get(task_id)
        return task is not None and task.status not in _SETTLED

    @_timed
    def mark_proof_submitted(self, task_id: str, signature: str) -> VerificationLog:
        """Record that a proof was submitted, and in which transaction; return the proof.

        The same signature again changes nothing. Raises NotFoundError, and ConflictError for another signature.
        """

        def change(log: VerificationLog) -> VerificationLog:
            if log.submission_signature not in (None, signature):
                raise ConflictError(f"proofs:{_short(task_id)} was submitted by {log.submission_signature}")
            return replace(log, submitted=True, submission_signature=_check_id(signature))

        return self._proofs.update(task_id, change)

    @_timed
    def dispute_bundle(self, task_id: str) -> _Json:
        """Return what a dispute over a task needs, as one JSON object, for `verify_dispute_bundle`; raises NotFoundError."""
        with self._store.snapshot():
            log = self._proofs.get(task_id)
            if log is None:
                raise NotFoundError(f"there is no {_short('proofs:' + task_id)}")
            return _bundle(self._tasks.get(task_id), log)

    # ---- config

    @_timed
    def store_config(self, config: OperatorConfig) -> None:
        """Store the operator's configuration, in place of the one that is there."""
        self._config.put(config)

    @_timed
    def get_config(self) -> OperatorConfig | None:
        """Return the operator's configuration, or None."""
        return self._config.get(OperatorConfig.operator_id)

    # ---- upkeep

    @_timed
    def prune(
        self,
        task_days: float | None = 30,
        session_days: float | None = 90,
        proof_days: float | None = None,
        *,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> PruneReport:
        """Remove what is older than so many days, give the space back to the file system, and report it. None: leave alone.

        Of tasks only completed ones go; of proofs only submitted ones whose task is gone, completed or resolved. It works in
        short batches, each of them final: interrupted, it has removed a part. `dry_run` counts the same and changes nothing.
        On a full disk it may fail with StorageError, for SQLite writes before it frees; some tens of MB are enough. Inside
        a `transaction()` block the file keeps its size.
        """
        for days in (task_days, session_days, proof_days):
            _check_days(0 if days is None else days)
        before = self._store.size()
        if not dry_run:
            self._store.checkpoint()  # what the WAL holds already would be needed twice
        removed: list[int] = []
        for kind, days, options in (
            (self._tasks, task_days, {"status": TaskStatus.COMPLETED}),
            (self._sessions, session_days, {}),
            (self._proofs, proof_days, {"status": True, "keep": self._task_is_unsettled}),
        ):
            told = progress and partial(_tell, progress, sum(removed), 0)
            prune: Callable[..., int] = cast(Namespace[Any], kind).prune
            removed.append(0 if days is None else prune(days, dry_run=dry_run, progress=told, **options))
        if not dry_run:
            self._store.give_back_pages()
        sizes = {"bytes_before": before, "bytes_after": self._store.size()}
        tasks, sessions, proofs = removed
        return PruneReport(tasks=tasks, sessions=sessions, proofs=proofs, dry_run=dry_run, **sizes)

    @_timed
    def check(self, *, progress: Progress | None = None) -> list[str]:
        """Return what is wrong with the file, a line for each damaged page, record and log; empty when it is sound.

        Reads everything, changes nothing, repairs nothing, and goes on to the end whatever it finds.
        """
        found = list(self._store.integrity_problems())
        others: list[Namespace[Any]] = []
        with suppress(DamagedError):  # already reported
            others = self._others()
        kinds: list[Namespace[Any]] = [*(self._namespaces[name] for name in _OUR_TABLES), *others]
        total = done = 0
        with suppress(DamagedError):
            total = sum(kind.count() for kind in kinds) if progress else 0
        for kind in kinds:
            found += kind.problems(progress and partial(_tell, progress, done, total))
            with suppress(DamagedError):
                done += kind.count() if progress else 0
        found += self._log_problems()
        return found

    def _others(self) -> list[Namespace[Any]]:
        """Return every namespace of the operator's own that the file holds, as plain JSON where its dataclass is not known."""
        store = self._store
        return [self._namespaces.get(name) or _PlainNamespace(store, name) for name in store.other_tables()]

    @_timed
    def stats(self) -> DbStats:
        """Return what the database holds, what it takes, and what this process has done with it; reads the whole file."""
        with self._store.snapshot():
            tables = self._store.table_bytes()
            kept = [*(self._namespaces[name] for name in _OUR_TABLES), *self._others()]
            operations = self._store.latencies.copy()
            return DbStats(
                path=self.path,
                schema_version=len(_MIGRATIONS),
                files={name: _size(self.path + end) for name, end in _FILES.items()},
                free=self._store.free_bytes(),
                records={namespace.name: namespace.count() for namespace in kept},
                bytes={namespace.name: tables[namespace.name] for namespace in kept if tables},
                tasks={status: self._tasks.count(status) for status in TaskStatus},
                unsubmitted_proofs=self._proofs.count(False),
                operations={name: each.copy() for name, each in operations.items() if each.count},
            )

    def prometheus(self) -> str:
        """Return `stats` in Prometheus's text format: names begin with `operator_db_`, the label `database` is the path."""
        return _exposition(self.stats())

    def write_metrics(self, path: _Path) -> None:
        """Write `prometheus()` to a file, replaced as a whole, for node_exporter's textfile collector (a name in `.prom`).

        Others may read it (mode 0644), for node_exporter is another user.
        """
        with _output(path, mode=0o644) as file:
            file.write(self.prometheus().encode())

    # ---- transfer

    @_timed
    def export(self, file: _File, *, include_secrets: bool = False, progress: Progress | None = None) -> None:
        """Write every record as JSON Lines, from one snapshot, in constant memory: a header, then one record a line.

        `file` is a path, whose file is private and is replaced as a whole at the end or not at all, or a stream, text or
        binary, which gets its first byte when the snapshot is done, so that a slow one holds nothing up. Secrets are written
        as `***` unless asked for; those in a namespace of the operator's own are known when `namespace()` was called for it
        on this object. Raises DamagedError for a record that is not what was written.
        """
        _export(self, file, include_secrets, progress)

    @_timed
    def import_(self, file: _File, *, progress: Progress | None = None) -> dict[str, Counter[str]]:
        """Store what `export`, or the prototype's `agenc-db export --format json`, wrote: all of it, or nothing.

        Returns for each namespace how many records were `added`, `replaced` and `unchanged`, and, of the prototype's proofs,
        which it does not export, how many were `left_behind`. Every line is checked before the write lock is taken.
        What the database knows more of is kept: a task that has moved later, a session whose log goes on, a submission, a
        secret where the file holds `***` or nothing. Raises InvalidRecordError, which names line and field, NewerSchemaError,
        and ConflictError where a proof would overwrite other evidence or a session's log contradicts the one that is stored.
        """
        return _import(self, file, progress)

    @_timed
    def backup(self, path: _Path, *, overwrite: bool = False, progress: Progress | None = None) -> None:
        """Write a copy of one state of the database, while others read and write; it holds every secret that this one does.

        The copy is private, is checked as by `check()`, and then appears at `path` whole. Raises StorageError for a file that
        is there (unless `overwrite`) or has a WAL beside it, and DamagedError when this database is damaged.
        """
        target = _real_path(path)
        _refuse_over(target, overwrite)
        with _file_errors(f"cannot write {target}"), _new_file(target) as temporary:
            self._store.copy_to(temporary, progress)
            with OperatorDb(temporary, read_only=True) as copied:
                _refuse_damaged(copied, f"no backup was made of {self.path}", progress)
            _refuse_over(target, overwrite)
            if overwrite:
                os.replace(temporary, target)
            else:
                _appear(temporary, target)
            _sync_directory(target)

    @_timed
    def restore(self, path: _Path, *, progress: Progress | None = None) -> None:
        """Replace everything in this database by what a backup holds, as one transaction, once the backup has been checked.

        Other threads and processes that have the database open go on with the new content; namespaces that are here and not
        in the backup are empty then. It takes room for a copy beside the database. Raises StorageError when there is no such
        file, or it is of an older schema, DamagedError when it is not sound, and what opening it raises.
        """
        origin = _real_path(path)
        if self._store.has_open(origin):
            raise InvalidRecordError(f"{origin} is this database itself")
        if not _is_there(origin):
            raise StorageError(f"{origin}: there is no such backup")
        names = self._store.other_tables()
        with _file_errors(f"cannot copy {origin}"), _new_file(self.path) as temporary:
            with OperatorDb(origin, read_only=True, timeout=self._store.timeout) as source:
                source._store.copy_to(temporary, None)
            # what is checked is what is restored, and whoever has a namespace open goes on with it
            with OperatorDb(temporary, durable=False) as copied:
                try:
                    for name in {*names, *copied._store.other_tables()}:
                        copied._store.ensure_table(name)
                except ForeignFileError as error:
                    raise ForeignFileError(str(error).replace(temporary, origin)) from None
                _refuse_damaged(copied, f"nothing was restored from {origin}", progress)
                self._store.copy_from(copied._store, progress)

    @_timed
    def compact(self) -> int:
        """Rebuild the file without gaps, and return how many bytes smaller it and its WAL are.

        It takes as much free space again as the file has, holds writers up until it is done, and cannot be interrupted; `prune`
        gives back what it freed by itself, and does none of that. Raises ConflictError inside a `transaction()` block.
        """
        before = self._store.size()
        self._store.vacuum()
        return before - self._store.size()

    def _has_no_session(self, log: str) -> bool:
        """Whether a log is there and its session is not: both may have come or gone since they were listed."""
        with self._store.snapshot():
            try:
                session = self._sessions.get(log.partition(":")[2])
            except DamagedError:  # reported by its namespace
                return False
            except InvalidRecordError:
                session = None
            return session is None and self._log.count(log) > 0

    def _log_problems(self) -> Iterator[str]:
        """Find sessions whose log is not as long as they know, and logs that belong to no session."""
        known: set[str] = set()
        try:
            for session_id in self._sessions.keys():  # noqa: SIM118  a namespace is not iterable itself
                logs = _logs(session_id)
                known.update(logs)
                # what is damaged was reported by its namespace
                with suppress(DamagedError, InvalidRecordError), self._store.snapshot():
                    row = self._sessions.get(session_id)
                    counts = (row.transcript_entries, row.commands) if row else ()
                    for log, count in zip(logs, counts, strict=False):
                        if (found := self._log.count(log)) != count:
                            yield f"session_log:{_short(log)} has {found} entries, its session knows {count}"
            for log in self._log.statuses():
                if log not in known and self._has_no_session(log):
                    yield f"session_log:{_short(log)} belongs to no session"
        except DamagedError as error:
            yield f"session_log: {error}"


# ==== Transfer: export, import, backup ================================================================================

_EXPORT_FORMAT = "operator_db/1"
_EXPORTED = ("config", "tasks", "sessions", "proofs")
_LONGEST_LINE = 2**31  # bytes; a record is at most 1,000,000,000 in the database
_PROTOTYPE_FIELDS = {"exported_at", "stats", "config", "tasks", "sessions"}
_PROTOTYPE_TASK = {f.name for f in fields(TaskRecord)} - {"history"}


def _refuse_damaged(db: OperatorDb, outcome: str, progress: Progress | None) -> None:
    problems = db.check(progress=progress)
    if problems:
        raise DamagedError(f"{outcome}: {len(problems)} problems, {problems[0]}")


def _refuse_open(path: str) -> None:
    """Keep the files of a database that is open in this process from being opened or replaced as plain ones."""
    if any(store.has_open(path) for store in _all_stores()):
        raise InvalidRecordError(f"{path} belongs to a database that is open here: choose another file")


def _refuse_over(path: str, overwrite: bool) -> None:
    """Raise an error where a new file would replace what is no plain file, a live database, or anything unasked."""
    _refuse_open(path)
    if os.path.lexists(path + "-wal"):
        raise StorageError(f"{path}-wal is there: the database is open or was not closed; choose another")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} is no regular file, and is not replaced by one")
    if os.path.lexists(path) and not overwrite:
        raise StorageError(f"{path} is there already: choose another name, or overwrite it")


def _appear(temporary: str, path: str) -> None:
    """Give a file its final name, unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise StorageError(f"{path} is there already: choose another name, or overwrite it") from None
    except OSError:  # no hard links here (Android, FAT)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(temporary, path)


@contextmanager
def _output(file: _File, mode: int = 0o600) -> Iterator[IO[bytes]]:
    """Give a file to write. At the end a path gets it whole; a stream, or no plain file, is sent it, slow as it may be."""
    import tempfile

    if not isinstance(file, (str, bytes, os.PathLike)):
        with _file_errors("cannot write a temporary file"), tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            _send(spool, file)
        return
    path, given = _real_path(file), os.path.expanduser(os.fsdecode(file))
    if given.startswith(("/dev/", "/proc/")) or (os.path.exists(given) and not os.path.isfile(given)):
        with _file_errors(f"cannot write {given}"), open(given, "ab") as special, _output(special) as spool:
            yield spool
        return
    _refuse_over(path, overwrite=True)
    with _file_errors(f"cannot write {path}"), _new_file(path) as temporary:
        with open(temporary, "wb") as new:
            yield new
            new.flush()
            os.fsync(new.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync_directory(path)


def _send(spool: IO[bytes], stream: Any) -> None:
    """Write a file to a stream, all of it: an unbuffered one may take less than it is given."""
    binary = getattr(stream, "buffer", stream)  # that of sys.stdout, whose encoding may be anything
    try:
        if binary is not stream:
            stream.flush()  # what was printed before
        if isinstance(binary, TextIOBase):
            binary.writelines(line.decode() for line in spool)
        else:
            for chunk in iter(partial(spool.read, 2**20), b""):
                sent = 0
                while sent < len(chunk):
                    taken = binary.write(chunk[sent:])
                    if taken is None and isinstance(binary, RawIOBase):
                        raise BlockingIOError("the stream takes no more, and does not block")
                    sent += len(chunk) if taken is None else taken
        if hasattr(stream, "flush"):
            stream.flush()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"the stream cannot be written: {error}") from error


def _export(db: OperatorDb, file: _File, include_secrets: bool, progress: Progress | None) -> None:
    with _output(file) as out, db._store.snapshot():
        kinds: list[Namespace[Any]] = [*(db._namespaces[name] for name in _EXPORTED), *db._others()]
        counts = {kind.name: kind.count() for kind in kinds}
        withheld = {kind.name: sorted(kind._codec.secrets) for kind in kinds if kind._codec.secrets}
        header: _Json = {"format": _EXPORT_FORMAT, "schema_version": len(_MIGRATIONS), "exported_at": _now()}
        header |= {"withheld": {} if include_secrets else withheld, "records": counts}
        out.write(_encode_json(header).encode() + b"\n")
        done, total = 0, sum(counts.values())
        for kind in kinds:
            lines = (
                _session_lines(db) if kind.name == "sessions" else kind._export_lines(secrets=include_secrets)
            )
            for line in lines:
                out.write(line.encode())
                done += 1
                if progress is not None:
                    progress(done, total)


def _session_lines(db: OperatorDb) -> Iterator[str]:
    """Walk the sessions as lines of an export, each with its log."""
    for row in db._sessions.values():
        text = _encode_json(_codec(SessionState).to_json(db._with_log(row)))
        yield f'{{"namespace":"sessions","record":{text}}}\n'


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say in every error where in the input it arose."""
    try:
        yield
    except OperatorDbError as error:
        raise type(error)(f"{where}: {error}") from None
    except Exception as error:  # an operator's own dataclass may raise anything
        raise InvalidRecordError(f"{where}: {error}") from None


def _json_object(text: bytes) -> _Json:
    """Return the JSON object that a text holds; raise ValueError, which does not show the text, where there is none."""
    try:
        document = json.loads(text.decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}: line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(document) is not dict:
        raise ValueError("it is not a JSON object")
    return document


def _lines(file: _File) -> Iterator[bytes]:
    """Read the lines of a path or of a stream, text or binary."""
    if isinstance(file, (str, bytes, os.PathLike)):
        _refuse_open(_real_path(file))
        given = os.path.expanduser(os.fsdecode(file))
        with _file_errors(f"cannot read {given}"), open(given, "rb") as stream:
            yield from _lines(stream)
        return
    try:
        source: Any = getattr(file, "buffer", file)
        while line := source.readline(_LONGEST_LINE):
            # a lone surrogate is found to be no UTF-8 where the place of the line is known
            yield line if isinstance(line, bytes) else line.encode(errors="surrogatepass")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"the stream cannot be read: {error}") from None


def _entries(file: _File, counts: dict[str, Counter[str]]) -> Iterator[tuple[str, _Json]]:
    """Read an export, ours or the prototype's, as pairs of a place in the input and a line as we write it."""
    lines = _lines(file)
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
    header: _Json = {}
    with suppress(ValueError):
        header = _json_object(first)
    if "format" in header:
        yield from _our_entries(header, lines)
        return
    with _naming("the input"):
        if not first.lstrip().startswith(b"{"):
            raise ValueError("it is neither an export of operator_db nor one of the prototype's")
        document = _json_object(first + b"".join(lines))
    yield from _prototype_entries(document, counts)


def _our_entries(header: _Json, lines: Iterator[bytes]) -> Iterator[tuple[str, _Json]]:
    with _naming("line 1"):
        version, wanted, withheld = (header.get(name) for name in ("schema_version", "records", "withheld"))
        if header["format"] != _EXPORT_FORMAT or type(version) is not int or version > len(_MIGRATIONS):
            raise NewerSchemaError(
                f"the format is {_short(header['format'])}, the schema {_short(version)}; this module knows"
                f" {_EXPORT_FORMAT!r} and {len(_MIGRATIONS)}: update operator_db.py"
            )
        if type(wanted) is not dict or type(withheld) is not dict:
            raise ValueError("the header does not say how many records there are, and what is withheld")
    found: Counter[Any] = Counter()
    for number, line in enumerate(lines, 2):
        if not line.isspace():
            with _naming(f"line {number}"):
                entry = _json_object(line)
                name = entry.get("namespace")
                found[name] += 1
                entry["withheld"] = withheld.get(name, [])
            yield f"line {number}", entry
    for name in sorted({*wanted, *found}, key=str):
        if wanted.get(name, 0) != found[name]:
            raise InvalidRecordError(
                f"the header says {_short(wanted.get(name, 0))} records of {_short(name)}, the input holds"
                f" {found[name]}: it is not whole"
            )


def _prototype_entries(document: _Json, counts: dict[str, Counter[str]]) -> Iterator[tuple[str, _Json]]:
    """Read what `agenc-db export --format json` writes: bytes as arrays of numbers, `rpc_url`, no history, no proofs."""
    with _naming("the input"):
        unknown = sorted(document.keys() - _PROTOTYPE_FIELDS)
        if unknown or "tasks" not in document:
            named = f": {_short(unknown[0])} is not known" if unknown else ""
            raise ValueError("it is neither an export of operator_db nor one of the prototype's" + named)
        stats = document.get("stats") or {}
        tasks, sessions = document["tasks"], document.get("sessions") or []
        if type(tasks) is not list or type(sessions) is not list:
            raise ValueError("tasks and sessions must be JSON arrays")
        for name, found in (("total_tasks", tasks), ("total_sessions", sessions)):
            if stats.get(name, len(found)) != len(found):
                raise ValueError(f"stats.{name} is {_short(stats[name])}, it holds {len(found)}: not whole")
        if left_behind := _check_count("stats.total_proofs", stats.get("total_proofs", 0)):
            counts["proofs"]["left_behind"] = left_behind
    if document.get("config") is not None:
        with _naming("config"):
            config = {name: value for name, value in document["config"].items() if value is not None}
            if "rpc_url" in config:
                config["rpc_endpoints"] = [config.pop("rpc_url")]
        yield "config", {"namespace": "config", "record": config, "withheld": []}
    codec = _codec(TaskRecord)
    for place, task in enumerate(tasks):
        with _naming(f"tasks[{place}]"):
            if missing := sorted(_PROTOTYPE_TASK - task.keys()):
                raise ValueError(f"{missing[0]} is missing")
        with _naming(f"tasks[{place}].payload"):
            if not all(type(byte) is int for byte in _json_list(task["payload"])):
                raise ValueError("it is not an array of numbers")
            given = task | {"payload": _base64(bytes(task["payload"]))}
        with _naming(f"tasks[{place}]"):  # made as any task is, which begins its history
            record = codec.to_json(codec.from_json(dict(given)))
            _refuse_unlike("tasks", given | {"history": record["history"]}, record)
        yield f"tasks[{place}]", {"namespace": "tasks", "record": record, "withheld": []}
    for place, session in enumerate(sessions):
        yield f"sessions[{place}]", {"namespace": "sessions", "record": session, "withheld": []}


def _import(db: OperatorDb, file: _File, progress: Progress | None) -> dict[str, Counter[str]]:
    import tempfile

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with _file_errors("cannot write a temporary file"), tempfile.TemporaryFile() as staged:
        total = 0
        for where, entry in _entries(file, counts):
            with _naming(where):
                line = json.dumps([where, entry])  # before the check, which uses the record up
                staged_line = f"[{line},{_encode_json(_row_of_entry(db, entry))}]\n".encode()
            staged.write(staged_line)
            total += 1
            if progress is not None:
                progress(total, 0)
        staged.seek(0)
        with db.transaction():
            for done, staged_line in enumerate(staged, 1):
                (where, entry), row = json.loads(staged_line)
                with _naming(where):
                    kind = _kind_of(db, entry)
                    if kind.name not in counts:
                        db._store.ensure_table(kind.name)
                    added = row is not None and kind._put_row(row)
                    counts[kind.name]["added" if added else _take(db, kind, entry)] += 1
                if progress is not None:
                    progress(done, total)
    return dict(counts)


def _kind_of(db: OperatorDb, entry: _Json) -> Namespace[Any]:
    """Return the namespace of a line; raise ValueError for a line that is not shaped as ours are."""
    name = entry.get("namespace")
    if not isinstance(name, str) or not (name in _EXPORTED or _is_namespace_name(name)):
        raise ValueError(f"there is no namespace {_short(name)}")
    wanted = {"namespace", "record", *(() if name in _EXPORTED else ("key", "status", "at"))}
    if entry.keys() - {"withheld"} != wanted or type(entry["record"]) is not dict:
        raise ValueError(f"it must hold exactly {', '.join(sorted(wanted))}, the record being a JSON object")
    return db._namespaces.get(name) or _PlainNamespace(db._store, name)


def _row_of_entry(db: OperatorDb, entry: _Json) -> _Row | None:
    """Check a line, and return the row that it is where nothing is stored yet; None where that has to be looked at."""
    kind = _kind_of(db, entry)
    if kind.name == "sessions":
        _session_of(entry)
        return None
    withheld = _withheld(kind, entry)
    if not withheld:
        return _full_row(kind, entry)
    filled = _filled(kind, entry, withheld, {})
    if not set(withheld) - filled.keys():
        _full_row(kind, entry | {"record": filled})
    return None


def _filled(kind: Namespace[Any], entry: _Json, withheld: list[str], held: _Json) -> _Json:
    """Return a line's record with what is held, or else its defaults, for what it withholds."""
    given = {name: value for name, value in entry["record"].items() if name not in withheld}
    kept = {name: held[name] for name in withheld if name in held}
    known = not isinstance(kind, _PlainNamespace)  # the record's class, and so its defaults
    return given | (kind._codec.defaults(withheld) if known else {}) | kept


def _full_row(kind: Namespace[Any], entry: _Json) -> _Row:
    """Return the row of a line that withholds nothing; one of the operator's own namespaces is stored as it was written."""
    document = entry["record"]
    if kind.name in _EXPORTED:
        record = kind._codec.from_json(dict(document))
        _refuse_unlike(kind.name, document, kind._codec.to_json(record))
        if isinstance(record, TaskRecord) and OperatorDb._settle(record):
            raise ValueError("its history does not end with its status and its signature")
        return kind._row_of(record)
    row = kind._row_as_written(entry["key"], entry["status"], entry["at"], document)
    if not isinstance(kind, _PlainNamespace):
        of_record = kind._row_of(kind._codec.from_json(dict(document)))
        if (of_record[0], *of_record[2:4]) != (row[0], *row[2:4]):
            raise ValueError(f"its key, status and age are not those of its record: {_short(of_record[0])}")
    return row


def _session_of(entry: _Json) -> SessionState:
    document, codec = entry["record"], _codec(SessionState)
    session = codec.from_json(dict(document))
    _refuse_unlike("sessions", document, codec.to_json(session))
    return session


def _refuse_unlike(name: str, document: _Json, made: _Json) -> None:
    """Raise ValueError when a JSON object has a field that the record made of it lacks, or lacks one that this has."""
    if unknown := _first_lost(document, made):
        raise ValueError(f"{name}{unknown} is not known")
    if missing := _first_lost(made, document):
        raise ValueError(f"{name}{missing} is missing")


def _first_lost(given: Any, kept: Any) -> str:
    """Return the first field within a JSON document that another lacks; empty if there is none."""
    if type(given) is dict and type(kept) is dict:
        missing = next((f".{name}" for name in given if name not in kept), "")
        deeper = ((f".{name}", value, kept.get(name)) for name, value in given.items())
    elif type(given) is list and type(kept) is list:
        missing = ""
        deeper = ((f"[{n}]", *pair) for n, pair in enumerate(zip(given, kept, strict=False)))
    else:
        return ""
    return missing or next((place + lost for place, *pair in deeper if (lost := _first_lost(*pair))), "")


def _withheld(kind: Namespace[Any], entry: _Json) -> list[str]:
    """Return the fields that a line does not say: those written as `***`, and of the configuration also absent ones."""
    document, known = entry["record"], kind._codec.secrets or entry["withheld"]
    withheld = []
    for name in known:
        with _naming(f"{kind.name}.{name}"):
            withheld += [name] if _is_redacted(document.get(name)) else []
    if kind.name == "config":
        withheld += [f.name for f in fields(OperatorConfig) if f.name not in document]
    return withheld


def _is_redacted(value: Any, *, within: bool = False) -> bool:
    """Whether a secret is not said; raise ValueError for one that is said in part."""
    if value == _REDACTED:
        return True
    parts = value.values() if type(value) is dict else value if type(value) is list else ()
    if any(_is_redacted(part, within=True) for part in parts):
        if within:
            return True
        raise ValueError(f"it holds {_REDACTED} beside other values: leave it out, or give it whole")
    return False


def _take(db: OperatorDb, kind: Namespace[Any], entry: _Json) -> str:
    """Store a checked line where something may be stored already; return `added`, `replaced` or `unchanged`."""
    if kind.name == "sessions":
        return _take_session(db, _session_of(entry))
    withheld = _withheld(kind, entry)
    if withheld:
        # a damaged record raises: what it holds is not given up for ***
        stored = kind.get(entry.get("key", OperatorConfig.operator_id))
        held = stored if stored is None or type(stored) is dict else kind._codec.to_json(stored)
        entry["record"] = _filled(kind, entry, withheld, held or {})
        if lacking := sorted(set(withheld) - entry["record"].keys()):
            raise ValueError(f"{kind.name}.{lacking[0]} is {_REDACTED}, and nothing is stored to keep")
    row = _full_row(kind, entry)
    if kind.name == "tasks":
        return _take_task(db, kind, row)
    if kind.name == "proofs":
        return _take_proof(db, kind, row)
    return kind._replace_row(row)


def _take_task(db: OperatorDb, kind: Namespace[Any], row: _Row) -> str:
    task, stored = kind._codec.from_json(json.loads(row[1])), None
    with suppress(DamagedError):
        stored = kind.get(task.task_id)
    if stored is not None:
        known = len(task.history)
        goes_on = stored.history[:known] == task.history and len(stored.history) > known
        diverged = task.history[: len(stored.history)] != stored.history
        later = diverged and stored.history[-1].at >= task.history[-1].at
        if goes_on or later or kind._row_of(stored) == row:
            return "unchanged"
    db.store_task(task)
    return "replaced"


def _take_session(db: OperatorDb, session: SessionState) -> str:
    stored = db.get_session(session.session_id)
    if stored is not None:
        said, commands = len(session.transcript), len(session.command_history)
        begins = (stored.transcript[:said], stored.command_history[:commands])
        goes_on = (len(stored.transcript), len(stored.command_history)) != (said, commands)
        if stored == session or (begins == (session.transcript, session.command_history) and goes_on):
            return "unchanged"
    db.store_session(session)
    return "replaced" if stored else "added"


def _take_proof(db: OperatorDb, kind: Namespace[Any], row: _Row) -> str:
    log = kind._codec.from_json(json.loads(row[1]))
    if db.store_proof(log):
        return "replaced"  # one that could not be read
    stored = cast(VerificationLog, kind.get(log.task_id))
    signature = stored.submission_signature or log.submission_signature
    merged = replace(stored, submitted=stored.submitted or log.submitted, submission_signature=signature)
    return "unchanged" if merged == stored else kind._replace_row(kind._row_of(merged))


# ==== Self-check: the promises of this module, kept before your eyes on a scratch database ============================


def _expect(holds: object, what: str) -> None:
    """Raise AssertionError with what was expected; unlike `assert`, under `python -O` too."""
    if not holds:
        raise AssertionError(what)


def _refused(error: type[OperatorDbError], action: Callable[[], object]) -> str:
    """Return the message of the error that an action must raise."""
    try:
        action()
    except error as refusal:
        return str(refusal)
    raise AssertionError(f"no {error.__name__} was raised")


def _promise_records(path: str) -> None:
    task = TaskRecord(task_id="50%:é", payload=bytes(range(256)), reward_lamports=2**64 - 1)
    with OperatorDb(path) as db:
        db.store_task(task)
        _expect(db.get_task("50%:é") == task, "the task that is read is the task that was stored")
    said = _refused(InvalidRecordError, lambda: TaskRecord(task_id="t", reward_lamports=-1))
    _expect("reward_lamports" in said and "-1" in said, "the error names the field and shows the value")
    said = _refused(InvalidRecordError, lambda: OperatorConfig(keypairs={"main": cast(str, b"5ecret")}))
    _expect("5ecret" not in said + repr(OperatorConfig(keypairs={"main": "5ecret"})), "no secret is shown")


def _promise_status(path: str) -> None:
    with OperatorDb(path, durable=False) as db:
        for number in range(6):
            db.store_task(TaskRecord(task_id=str(number), claimed_at=number))
        db.update_task_status("3", "InProgress", signature="sig-1", expected="claimed")
        _refused(ConflictError, lambda: db.update_task_status("3", "completed", expected="claimed"))
        (moved,) = db.list_tasks_by_status("in_progress")
        _expect([change.signature for change in moved.history] == [None, "sig-1"], "history holds both moves")
        latest = [task.task_id for task in db.list_tasks(limit=2, newest_first=True)]
        _expect(latest == ["5", "4"], "the newest come first")


def _promise_sessions(path: str) -> None:
    with OperatorDb(path, durable=False) as db:

        def talk() -> None:
            with suppress(ClosedError):  # after Ctrl-C
                for _ in range(25):
                    db.append_transcript("s", "user", "hello")

        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _expect(len(db.transcript("s")) == 100, "every append of every thread is there")
        _refused(ConflictError, lambda: db.store_session(SessionState(session_id="s")))


def _promise_transactions(path: str) -> None:
    with OperatorDb(path) as db, db.transaction():
        db.store_task(TaskRecord(task_id="kept"))
        with suppress(KeyError), db.transaction():
            db.store_task(TaskRecord(task_id="undone"))
            raise KeyError
        _expect([task.task_id for task in db.iter_tasks()] == ["kept"], "what failed left nothing behind")


def _promise_proofs(path: str) -> None:
    proof = VerificationLog(task_id="t", outputs=b"the result", timestamp=0)
    with OperatorDb(path) as db:
        db.store_task(TaskRecord(task_id="t"))
        for _ in range(2):
            _expect(db.complete_task("t", proof).status == TaskStatus.COMPLETED, "twice is as once")
        _refused(ConflictError, lambda: db.store_proof(VerificationLog(task_id="t", outputs=b"another")))
        _refused(ConflictError, lambda: db.delete_proof("t"))
        bundle = db.dispute_bundle("t")
    verify = partial(verify_dispute_bundle, bundle, evidence_hash=proof.evidence_hash)
    _expect(verify() == [], "the dispute bundle holds")
    bundle["proof"]["outputs"] = "AAAA"
    _expect(verify(), "a bundle that was changed is found out")


def _promise_prune(path: str) -> None:
    with OperatorDb(path, durable=False) as db:
        with db.transaction():
            for number in range(200):
                status = "completed" if number else "disputed"
                task = TaskRecord(
                    task_id=str(number), payload=bytes(4096), status=TaskStatus(status), claimed_at=0
                )
                db.store_task(task)
        _expect(db.prune(dry_run=True).tasks == 199, "a dry run counts the same")
        report = db.prune()
        _expect((report.tasks, db.stats().records["tasks"]) == (199, 1), "only what is completed goes")
        _expect(report.bytes_after < report.bytes_before / 4, "the file shrinks")


def _promise_transfer(path: str) -> None:
    with OperatorDb(path, durable=False) as db, OperatorDb(path + "2", durable=False) as other:
        db.store_config(OperatorConfig(keypairs={"main": "5ecret"}))
        db.store_task(TaskRecord(task_id="t"))
        db.append_transcript("s", "user", "how is t going?")
        db.export(path + ".jsonl")
        with open(path + ".jsonl", encoding="utf-8") as file:
            _expect("5ecret" not in file.read(), "no secret is exported unasked")
        db.export(path + ".jsonl", include_secrets=True)
        other.import_(path + ".jsonl")
        held = [(each.get_task("t"), each.get_session("s"), each.get_config()) for each in (db, other)]
        _expect(held[0] == held[1], "what is imported is what was exported")
        other.backup(path + ".bak")
        db.delete_task("t")
        db.restore(path + ".bak")
        _expect(db.get_task("t"), "what was backed up is restored, into an open database")
        _expect('operation="restore",le="+Inf"} 1' in db.prometheus(), "every call is counted")


def _promise_damage(path: str) -> None:
    with OperatorDb(path) as db:
        db.store_task(TaskRecord(task_id="hurt", description="before"))
        db.store_task(TaskRecord(task_id="whole"))
    with open(path, "r+b") as file:  # closed by now; never do this to an open database
        file.seek(file.read().index(b"before"))
        file.write(b"forged")
    with OperatorDb(path) as db:
        said = _refused(DamagedError, lambda: db.get_task("hurt"))
        _expect("tasks:hurt" in said, "the error names the key")
        _expect(db.get_task("whole") and len(db.check()) == 1, "the rest is read, check() finds the damage")


def _promise_foreign_files(path: str) -> None:
    foreign = {"redb": _REDB_MAGIC + bytes(1000), "not an SQLite": b"text" * 200, "1 bytes": b"x"}
    for word, content in foreign.items():
        with open(path, "wb") as file:
            file.write(content)
        _expect(word in _refused(ForeignFileError, lambda: OperatorDb(path)), f"the error says {word}")
        with open(path, "rb") as file:
            _expect(file.read() == content, "the file is left as it was")


def _promise_killed_writer(path: str) -> None:
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), OperatorDb(path) as db:
            for number in range(10**6):
                db.store_task(TaskRecord(task_id=str(number)))
                os.write(telling, b".")
        os._exit(1)
    os.close(telling)
    with open(told, "rb", buffering=0) as acknowledged:
        count = sum(len(acknowledged.read(1)) for _ in range(20))
        os.kill(child, 9)
        os.waitpid(child, 0)
        count += len(acknowledged.read())
    with OperatorDb(path) as db:
        _expect(count >= 20, "the writer wrote")
        _expect(all(db.get_task(str(number)) for number in range(count)), "every acknowledged write is there")
        _expect(db.check() == [], "the file is sound")


def _promise_fork(path: str) -> None:
    before = os.umask(0)
    try:
        db = OperatorDb(path)
    finally:
        os.umask(before)
    with db:
        modes = {os.stat(name).st_mode & 0o777 for name in (path, path + "-wal")}
        _expect(modes == {0o600}, "the files are private")
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                db.store_task(TaskRecord(task_id="child"))
            os._exit(0)
        db.store_task(TaskRecord(task_id="parent"))
        os.waitpid(child, 0)
        _expect([task.task_id for task in db.iter_tasks()] == ["child", "parent"], "both wrote")


_PROMISES: dict[str, Callable[[str], None]] = {
    "a record reads back as it was stored; a bad one is refused; no secret is shown": _promise_records,
    "status queries, history and compare-and-set": _promise_status,
    "threads append to one session and lose nothing": _promise_sessions,
    "a block that fails leaves nothing behind": _promise_transactions,
    "a proof is stored once, with its task, and wins its dispute": _promise_proofs,
    "pruning takes what may go, and the file shrinks": _promise_prune,
    "an export and a backup hold everything, and every call is counted": _promise_transfer,
    "damage is found, and named by key": _promise_damage,
    "a file that is not ours is refused and left alone": _promise_foreign_files,
}
if hasattr(os, "fork"):
    _PROMISES["a writer that is killed loses nothing it was told is stored"] = _promise_killed_writer
    _PROMISES["files are private from their first byte, and fork() is safe"] = _promise_fork


def self_check(db_path: _Path | None = None, *, as_json: bool = False) -> bool:
    """Try the promises, then look for problems in the operator's own database; print both, return whether all is well."""
    import tempfile

    broken: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="operator_db-") as directory:
        for number, (sentence, promise) in enumerate(_PROMISES.items()):
            outcome = f"ok    {sentence}"
            try:
                promise(os.path.join(directory, f"{number}.db"))
            except Exception as error:
                broken[sentence] = f"{type(error).__name__}: {error}"
                outcome = f"FAIL  {sentence}\n      {_shown(broken[sentence])}"
            if not as_json:
                print(outcome, flush=True)
    path, found, problems = _database_path(db_path), "no database yet; the first OperatorDb() creates it", []
    try:
        if _is_there(path):
            found = "it cannot be opened"
            with OperatorDb(path, read_only=True) as db:
                problems = db.check()
                found = f"{sum(db.stats().records.values()):,} records, problems found: {len(problems)}"
    except OperatorDbError as error:
        problems = [str(error)]
    versions = f"operator_db {__version__}, SQLite {sqlite3.sqlite_version}"
    if as_json:
        promises = {sentence: broken.get(sentence) for sentence in _PROMISES}
        told = {"versions": versions, "promises": promises, "path": path, "found": found}
        _print_json({**told, "problems": problems})
    else:
        print(f"{len(_PROMISES) - len(broken)} of {len(_PROMISES)} promises held ({versions})")
        for line in (f"{path}: {found}", *(f"      {problem}" for problem in problems)):
            print(_shown(line))
    return not broken and not problems


# ==== Command line ====================================================================================================

_ABOUT = """\
Look after the database of an AgenC operator. Without a command: try the promises of this module on a scratch database, then
look for problems in the operator's own.

Looking works beside a running operator, changes nothing and creates nothing. PATH is the file of --db-path, else of the
environment's AGENC_DB_PATH, else ~/.agenc/operator.db. Secrets are shown as ***; those of an operator's own namespaces are
known to its code alone, and shown as they are. Exit status: 0 done, 1 failed or a problem found, 2 wrong usage."""


def _shown(value: object) -> str:
    """Return text as it can be printed here: nothing that steers a terminal, nothing that its encoding lacks."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON: in ASCII where the encoding asks for it, and without characters that steer a terminal."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    text = json.dumps(value, ensure_ascii="utf" not in encoding.lower(), indent=indent)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _size_text(size: int) -> str:
    """Return a size in bytes as people read it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.1f} {unit}"
    return f"{size} B"


def _time_text(at: int) -> str:
    """Return Unix seconds as people read them: the time in UTC, and how long ago that is."""
    try:
        text = time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
    except (ValueError, OverflowError, OSError):
        return str(at)
    past = _now() - at
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(past) >= seconds:
            count = abs(past) // seconds
            return f"{text} ({count} {unit} ago)" if past > 0 else f"{text} (in {count} {unit})"
    return f"{text} (now)"


def _reward_text(task: TaskRecord) -> str:
    """Return a task's reward: lamports as SOL, of which one is 10^9 lamports, SKR in its smallest unit."""
    parts = []
    if task.reward_lamports is not None:
        whole, rest = divmod(task.reward_lamports, 10**9)
        parts.append(f"{whole}.{rest:09}".rstrip("0").rstrip(".") + " SOL")
    if task.reward_skr_tokens is not None:
        parts.append(f"{task.reward_skr_tokens} SKR units")
    return " + ".join(parts)


def _width(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    import unicodedata

    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def _fitted(text: str, width: int, flush: bool) -> str:
    """Return a text padded to a width, on the left when it is to end flush, or cut to it, with a sign that it was."""
    room = width - _width(text)
    if room < 0:
        sign = "…" if _shown("…") == "…" else "~"
        ends = accumulate(map(_width, text[:width]))
        text = "".join(c for c, end in zip(text, ends, strict=False) if end < width) + sign
        room = width - _width(text)
    return " " * room + text if flush else text + " " * room


def _print_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print aligned columns, numbers to the right; on a terminal, the widest are cut until all of them fit."""
    import shutil

    table: list[list[object]] = [list(head), *map(list, rows)]
    texts = [[f"{cell:,}" if type(cell) is int else _shown(cell) for cell in row] for row in table]
    widths = [max(map(_width, column)) for column in zip(*texts, strict=True)]
    if sys.stdout.isatty():
        room = max(shutil.get_terminal_size().columns - 2 * (len(widths) - 1), len(widths))
        widths = [min(width, room) for width in widths]
        while sum(widths) > room:
            widths[widths.index(max(widths))] -= 1
    for row, line in zip(table, texts, strict=True):
        cells = zip(row, line, widths, strict=True)
        print("  ".join(_fitted(text, width, type(cell) is int) for cell, text, width in cells).rstrip())


def _print_bars(title: str, numbers: dict[str, int], text: Callable[[int], str]) -> None:
    """Print numbers, each with a bar of its length, below an empty line."""
    print()
    most = max(numbers.values(), default=0) or 1
    block = "█" if _shown("█") == "█" else "#"
    bars = ((name, text(n).rjust(10), block * -(-n * 24 // most)) for name, n in numbers.items())
    _print_table((title, "", ""), bars)


def _print_records(options: Any, records: list[Any], **columns: Callable[[Any], object]) -> int:
    """Print records as a JSON array, or as a table with these columns."""
    if options.json:
        _print_json([_codec(type(record)).to_json(record) for record in records])
    else:
        head = (name.replace("_", " ") for name in columns)
        _print_table(head, ([cell(record) for cell in columns.values()] for record in records))
    return 0


def _print_facts(options: Any, facts: _Json, text: str) -> int:
    """Print facts as JSON, or in words."""
    if options.json:
        _print_json(facts)
    else:
        print(text)
    return 0


@contextmanager
def _progress(label: str) -> Iterator[Progress | None]:
    """Give what draws a progress bar on standard error; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    drawn = 0.0

    def draw(done: int, total: int) -> None:
        nonlocal drawn
        if time.monotonic() - drawn < 0.1:
            return
        drawn = time.monotonic()
        room = max(0, min(30, os.get_terminal_size(sys.stderr.fileno()).columns - len(label) - 20))
        share = min(done / total, 1.0) if total else 0.0
        bar = f"[{'#' * int(share * room):{room}}] {share:4.0%}" if total else f"{done:,}"
        print(f"\r{label} {bar}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


_Run = Callable[[Any, Any], int]
_COMMANDS: dict[str, tuple[_Run, str, tuple[str, ...]]] = {}
"""By name: what runs it, whether it reads, writes, creates or needs no database, and the names of its arguments."""


def _command(opens: str, *arguments: str) -> Callable[[_Run], _Run]:
    """Make a function a command of its name; its docstring is the help: what it does, more of that, and an example."""

    def register(run: _Run) -> _Run:
        _COMMANDS[run.__name__.strip("_").replace("_", "-")] = run, opens, arguments
        return run

    return register


@_command("read", "--prometheus", "-o")
def _stats(db: OperatorDb, options: Any) -> int:
    """what the database holds and takes

    Tasks by status, records and bytes by namespace, file sizes, and how many proofs wait to be submitted. Latencies are
    known to the running operator alone: OperatorDb.write_metrics().

    stats --prometheus -o /var/lib/node_exporter/operator_db.prom
    """
    if options.o is not None and not options.prometheus:
        print("operator_db: -o goes with --prometheus", file=sys.stderr)
        return 2
    if options.prometheus:
        if options.o in (None, "-"):
            print(db.prometheus(), end="")
        else:
            db.write_metrics(options.o)
        return 0
    stats = db.stats()
    if options.json:
        _print_json({name: value for name, value in vars(stats).items() if name != "operations"})
        return 0
    files = ", ".join(f"{name} {_size_text(stats.files[name])}" for name in ("database", "wal"))
    waiting = f"{stats.unsubmitted_proofs:,}"
    facts = (("files", files), ("unused", _size_text(stats.free)), ("unsubmitted proofs", waiting))
    _print_table(("database", stats.path), facts)
    _print_bars("tasks by status", {str(name): count for name, count in stats.tasks.items()}, "{:,}".format)
    _print_bars("records by namespace", stats.records, "{:,}".format)
    _print_bars("bytes by namespace", stats.bytes, _size_text)
    return 0


@_command("read", "--status", "--limit", "--newest-first")
def _list_tasks(db: OperatorDb, options: Any) -> int:
    """the tasks, or those of a status

    Oldest first, counted from completion, or, lacking it, from the claim.

    list-tasks --status completed --limit 10 --newest-first
    """
    return _print_records(
        options,
        db.list_tasks(options.status, limit=options.limit, newest_first=options.newest_first),
        task=lambda task: task.task_id,
        status=lambda task: task.status,
        since=lambda task: _time_text(task.history[-1].at),
        reward=_reward_text,
        description=lambda task: task.description or "",
    )


@_command("read", "--unsubmitted", "--limit")
def _list_proofs(db: OperatorDb, options: Any) -> int:
    """the proofs, or the queue of those to be submitted

    Oldest first, each with its evidence hash.

    list-proofs --unsubmitted
    """
    return _print_records(
        options,
        db.list_proofs(submitted=False if options.unsubmitted else None, limit=options.limit),
        task=lambda log: log.task_id,
        stored=lambda log: _time_text(log.timestamp),
        outputs=lambda log: _size_text(len(log.outputs)),
        submitted=lambda log: (log.submission_signature or "yes") if log.submitted else "no",
        evidence_hash=lambda log: log.evidence_hash,
    )


@_command("read", "--limit")
def _list_sessions(db: OperatorDb, options: Any) -> int:
    """the voice sessions

    The least recently active first.

    list-sessions --json
    """
    return _print_records(
        options,
        db.list_sessions(limit=options.limit),
        session=lambda session: session.session_id,
        last_active=lambda session: _time_text(session.last_active),
        entries=lambda session: len(session.transcript),
        commands=lambda session: len(session.command_history),
        tasks=lambda session: ", ".join(session.active_task_ids),
        last_words=lambda session: session.transcript[-1].content if session.transcript else "",
    )


def _namespace_named(db: OperatorDb, name: str) -> Namespace[Any]:
    kinds = {kind.name: kind for kind in (*(db._namespaces[each] for each in _EXPORTED), *db._others())}
    if name not in kinds:
        raise NotFoundError(f"there is no namespace {_short(name)}; there are {', '.join(kinds)}")
    return kinds[name]


@_command("read", "KEY")
def _get(db: OperatorDb, options: Any) -> int:
    """one record, by its key

    A key is a namespace and an id: tasks:ID, sessions:ID, proofs:TASK_ID, config:operator. Bytes are shown in base64.

    get tasks:t1
    """
    name, _, record_id = options.key.partition(":")
    namespace = _namespace_named(db, name)
    record = db.get_session(record_id) if name == "sessions" else namespace.get(record_id)
    if record is None:
        raise NotFoundError(f"there is no {_short(options.key)}")
    if not isinstance(record, dict):
        codec: _Codec[Any] = _codec(type(record))
        record = codec.redacted(codec.to_json(record))
    _print_json(record, indent=None if options.json else 2)
    return 0


@_command("read", "NAMESPACE")
def _keys(db: OperatorDb, options: Any) -> int:
    """the keys of a namespace, in their order

    The namespaces are config, tasks, sessions, proofs, and the operator's own.

    keys sessions
    """
    ids = _namespace_named(db, options.namespace).keys()
    if options.json:
        _print_json([f"{options.namespace}:{each}" for each in ids])
        return 0
    for each in ids:
        print(f"{options.namespace}:{_shown(each)}")
    return 0


@_command("read", "-o", "--include-secrets")
def _export_(db: OperatorDb, options: Any) -> int:
    """every record as JSON Lines, from one snapshot

    A header, then one record a line. Secrets are written as *** unless asked for. Those of an operator's own namespaces are
    known to its code alone, and written: use OperatorDb.export() there.

    export -o operator.jsonl
    """
    file = sys.stdout if options.o in (None, "-") else options.o
    with _progress("export") as progress:
        shown = None if file is sys.stdout and sys.stdout.isatty() else progress
        db.export(file, include_secrets=options.include_secrets, progress=shown)
    return 0


@_command("create", "FILE")
def _import_(db: OperatorDb, options: Any) -> int:
    """store what export wrote, all of it or nothing

    Takes that, or what the prototype's `agenc-db export --format json` writes. Keeps what the database knows more of; never
    puts *** over a secret, nor a proof over a different one. Creates the database where there is none.

    import operator.jsonl
    """
    with _progress("import") as progress:
        counts = db.import_(sys.stdin if options.file == "-" else options.file, progress=progress)
    lines = [
        f"{name}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counted.items())
        for name, counted in counts.items()
    ]
    if "left_behind" in counts.get("proofs", {}):
        lines.append("the prototype does not export proofs: keep its file for as long as one may be needed")
    return _print_facts(options, dict(counts), "\n".join(lines) or "nothing to import")


@_command("write", "--older-than", "--session-days", "--proof-days", "--dry-run")
def _prune(db: OperatorDb, options: Any) -> int:
    """remove what is old, and give the space back

    Completed tasks, idle sessions, and, when asked, proofs that are submitted and whose task is gone or settled. Disputed and
    resolved tasks stay. Works in short batches, beside a running operator.

    prune --older-than 30 --dry-run
    """
    days = (options.older_than, options.session_days, options.proof_days)
    with _progress("prune") as progress:
        report = db.prune(*days, dry_run=options.dry_run, progress=progress)
    verb = "would remove" if report.dry_run else "removed"
    told = f"{verb} tasks: {report.tasks:,}, sessions: {report.sessions:,}, proofs: {report.proofs:,}"
    if not report.dry_run:
        told += f"; {_size_text(report.bytes_before)} before, {_size_text(report.bytes_after)} now"
    return _print_facts(options, vars(report), told)


@_command("read")
def _check(db: OperatorDb, options: Any) -> int:
    """look for damage in every page and record

    Prints a line for each problem. Changes and repairs nothing: a damaged record can be deleted or stored again, or the
    database restored from a backup.

    check
    """
    with _progress("check") as progress:
        problems = db.check(progress=progress)
    told = [*map(_shown, problems), f"{_shown(db.path)}: problems found: {len(problems)}"]
    _print_facts(options, {"path": db.path, "problems": problems}, "\n".join(told))
    return 1 if problems else 0


@_command("read", "DEST", "--overwrite")
def _backup(db: OperatorDb, options: Any) -> int:
    """a checked copy, while the operator goes on

    The copy is private, is checked, and then appears at DEST whole. It holds the keys that the database holds.

    backup operator-2026-03-27.db
    """
    with _progress("backup") as progress:
        db.backup(options.dest, overwrite=options.overwrite, progress=progress)
    path = _real_path(options.dest)
    told = f"{_shown(path)}: {_size_text(_size(path))}, checked; it holds the keys that the database holds"
    return _print_facts(options, {"path": path, "bytes": _size(path)}, told)


@_command("create", "SRC")
def _restore(db: OperatorDb, options: Any) -> int:
    """replace everything by what a backup holds

    The backup is checked first; then all is replaced at once, and a running operator goes on with it. What the database holds
    now is gone: make a backup of it before.

    restore operator-2026-03-27.db
    """
    with _progress("restore") as progress:
        db.restore(options.src, progress=progress)
    records = db.stats().records
    told = "restored " + ", ".join(f"{name}: {count:,}" for name, count in records.items())
    return _print_facts(options, {"path": _database_path(options.db_path), "records": records}, told)


@_command("write")
def _compact(db: OperatorDb, options: Any) -> int:
    """rebuild the file without gaps

    Needs as much free space again as the file has, and holds writers up until it is done.

    compact
    """
    freed, size = db.compact(), db._store.size()
    told = f"{_size_text(size)} now, {_size_text(max(0, freed))} given back"
    return _print_facts(options, {"path": db.path, "bytes_freed": freed, "bytes": size}, told)


@_command("read", "TASK_ID")
def _dispute(db: OperatorDb, options: Any) -> int:
    """the bundle that a dispute over a task needs

    One JSON object: task, proof, evidence hash, and the arguments for the chain.

    dispute t1 > bundle.json
    """
    _print_json(db.dispute_bundle(options.task_id))
    return 0


@_command("nothing", "FILE", "--evidence-hash")
def _verify(_: None, options: Any) -> int:
    """check a dispute bundle, without a database

    With the hash that stands on chain, any change to the evidence is found; without it, contradictions only.

    verify bundle.json --evidence-hash 33b3287ebcf5c40d42c31f90c9b10edac79a0dd65592e7c16631e62a67566446
    """
    text = b"".join(_lines(sys.stdin if options.file == "-" else options.file))
    with _naming(options.file):
        bundle = _json_object(text)
    problems = verify_dispute_bundle(bundle, evidence_hash=options.evidence_hash)
    against = "the hash given" if options.evidence_hash else "itself: give the hash on chain to be sure"
    told = "\n".join(map(_shown, problems)) or f"the bundle holds, checked against {against}"
    _print_facts(options, {"problems": problems, "evidence_hash": options.evidence_hash}, told)
    return 1 if problems else 0


def _options(argv: list[str] | None) -> Any:
    """Parse the command line; exits with status 2 when it is wrong."""
    import argparse
    import shutil
    from textwrap import fill

    def kind(parse: Callable[[str], Any], holds: Callable[[Any], bool], says: str) -> Callable[[str], Any]:
        def convert(text: str) -> Any:
            with suppress(ValueError):
                if holds(parse(text)):
                    return parse(text)
            raise argparse.ArgumentTypeError(f"{_short(text)} is not {says}")

        return convert

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(_shown(message))

    width = max(20, shutil.get_terminal_size().columns - 2)  # as argparse does

    def wrapped(text: str) -> str:
        return "\n\n".join(fill(" ".join(part.split()), width) for part in text.split("\n\n"))

    days = {"metavar": "DAYS", "type": kind(float, lambda v: 0 <= v < 10**9, "a number of days")}
    status = kind(TaskStatus, bool, f"a status: {', '.join(TaskStatus)}")
    count = kind(int, lambda v: 0 <= v < 2**63, "a number of records")
    key = kind(str, lambda v: ":" in v, "a key: NAMESPACE:ID")
    digits = kind(lambda v: v.lower().removeprefix("0x"), _HASH.holds, "64 hex digits, not all zero")
    flag = {"action": "store_true"}
    arguments: dict[str, _Json] = {
        "--prometheus": {**flag, "help": "print Prometheus's text format"},
        "-o": {"metavar": "FILE", "help": "write to FILE, replaced as a whole, instead of standard output"},
        "--status": {"metavar": "S", "type": status, "help": f"only those: {', '.join(TaskStatus)}"},
        "--limit": {"metavar": "N", "type": count, "help": "the first N only"},
        "--newest-first": {**flag, "help": "the newest first"},
        "--unsubmitted": {**flag, "help": "only those that are not marked as submitted"},
        "--include-secrets": {**flag, "help": "write keypairs and RPC endpoints too"},
        "--older-than": {**days, "default": 30, "help": "tasks older than that (30)"},
        "--session-days": {**days, "default": 90, "help": "sessions idle for longer (90)"},
        "--proof-days": {**days, "help": "submitted proofs older than that (keep all)"},
        "--dry-run": {**flag, "help": "count, and change nothing"},
        "--overwrite": {**flag, "help": "replace DEST if it is there"},
        "--evidence-hash": {"metavar": "HEX", "type": digits, "help": "the hash on chain, 64 hex digits"},
        "KEY": {"type": key, "help": "NAMESPACE:ID"},
        "FILE": {"help": "a file, - for standard input"},
    }
    shape: _Json = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--db-path", metavar="PATH", help="the database file")
    common.add_argument("--json", action="store_true", help="print the same facts for programs")
    helps = {
        name: [part.strip() for part in (run.__doc__ or f"{name}\n\n\n\n").split("\n\n")]
        for name, (run, _, _) in _COMMANDS.items()
    }
    listed = "\n".join(
        fill(f"  {name:13}  {says}", width, subsequent_indent=" " * 17)
        for name, (says, _, _) in helps.items()
    )
    parser = Parser(
        prog="operator_db.py",
        usage="operator_db.py [OPTIONS] [COMMAND ...]",
        description=wrapped(_ABOUT),
        epilog=f"commands (COMMAND --help says more):\n{listed}",
        parents=[common],
        **shape,
    )
    versions = f"operator_db {__version__}, schema {len(_MIGRATIONS)}, SQLite {sqlite3.sqlite_version}"
    parser.add_argument("--version", action="version", version=versions, help="print versions")
    commands = parser.add_subparsers(prog="operator_db.py", dest="command", help=argparse.SUPPRESS)
    for name, (says, more, example) in helps.items():
        one = commands.add_parser(
            name,
            parents=[common],
            description=wrapped(f"{says[0].upper()}{says[1:]}.\n\n{more}"),
            epilog=f"example:\n  python operator_db.py {example}",
            **shape,
        )
        for argument in _COMMANDS[name][2]:
            place: _Json = {"metavar": argument} if argument.isupper() else {}
            one.add_argument(argument.lower(), **place, **arguments.get(argument, {}))
    return parser.parse_args(argv, argparse.Namespace(db_path=None, json=False))


def _run(options: Any) -> int:
    """Do what the command line says, and return the exit status."""
    if options.command is None:
        return 0 if self_check(options.db_path, as_json=options.json) else 1
    run, opens, _ = _COMMANDS[options.command]
    if opens == "nothing":
        return run(None, options)
    path = _database_path(options.db_path)
    if _is_there(path):
        looks = opens == "read" or getattr(options, "dry_run", False)
        if not looks and not os.access(path, os.W_OK):  # SQLite would leave files beside another's
            raise StorageError(f"{path} may not be written by you")
        with OperatorDb(path, read_only=looks) as db:
            return run(db, options)
    if opens != "create":
        raise StorageError(f"{path}: there is no database; the operator makes it, or import, or restore")
    with _file_errors(f"cannot create {path}"):
        _make_private_directory(os.path.dirname(path))
        with _new_file(path) as temporary:  # what fails leaves no database behind
            with OperatorDb(temporary) as db:
                status = run(db, options)
            _appear(temporary, path)
        _sync_directory(path)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit status: 0 done, 1 failed or a problem found, 2 wrong usage."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure") and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = _run(_options(argv))
        except SystemExit as left:  # help, versions, or wrong usage, printed by argparse
            status = int(left.code or 0)
        sys.stdout.flush()
        return status
    except (OperatorDbError, OSError) as error:  # the latter of standard output
        if not isinstance(error, OperatorDbError) or error.__cause__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter tries again when it ends
        if not isinstance(error.__cause__ or error, BrokenPipeError):
            print(f"operator_db: {_shown(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("operator_db: interrupted", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    import signal

    def _stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)  # and so remove what is half done

    for _name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, _name), _stop)
    raise SystemExit(main())
