# SPDX-License-Identifier: MIT
"""operator_db: the memory of an AgenC operator, in one file on the standard library.

An operator claims tasks on chain, works on them, proves the work and is paid; people talk to it by
voice. This module keeps what it must not forget in one SQLite file: a mirror of its tasks, the
state of its voice sessions, the proofs that win disputes, and its configuration.

    from operator_db import OperatorDb, TaskRecord, VerificationLog

    with OperatorDb("operator.db") as db:
        db.store_task(TaskRecord(task_id="t1", payload=b"{}", reward_lamports=5_000_000))
        db.complete_task("t1", VerificationLog(task_id="t1", outputs=b"the result"))
        assert db.get_task("t1").status == "completed"

A call that changes something returns after its change is committed; the docstring of `OperatorDb`
says what that survives, and what threads and processes may do. `python operator_db.py` shows the
main promises on a scratch database.

How the file is laid out. Data flows from a record through its codec into a namespace, a table of
records of one kind; the namespace reads and writes rows through the store, which decides who may
use which SQLite connection.

"Our" records are those of the kinds that this module defines; "custom" ones are of an operator's
own classes, in namespaces that its code adds. "The program" is AgenC's on Solana; the "reference
worker" is the one that its authors publish; the "prototype" is the Rust program that this module
replaces.

    errors                 the exception classes
    records and evidence   what users make and get back; hashes and dispute bundles
    codec                  dataclass <-> JSON, from the type hints
    files                  paths, modes, identity; writing a file as a whole; streams
    connection             one SQLite connection: settings, retries, errors
    schema                 what a file must look like; creation and migration
    store                  turns, transactions, checkpoints, closing, fork
    namespace              the rows of one table
    operator database      OperatorDb: tasks, sessions, proofs, configuration, upkeep
    metrics                latencies, statistics, Prometheus
    transfer               export, import, backup, restore, repair
    self-check             the promises, shown one after the other
    command line           argparse, tables, progress
"""

from __future__ import annotations

import builtins
import errno
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
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from contextvars import ContextVar, Token
from copy import copy as shallow_copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from functools import partial, wraps
from heapq import merge
from io import RawIOBase, TextIOBase
from itertools import accumulate, islice, takewhile
from operator import attrgetter
from typing import IO, Annotated, Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar, cast
from zlib import crc32

__version__ = "2.0.0"
__all__ = [
    "BusyError",
    "ClosedError",
    "ConflictError",
    "DamagedError",
    "DbStats",
    "FileReplacedError",
    "ForeignFileError",
    "Id",
    "InvalidRecordError",
    "Lamports",
    "Latency",
    "Namespace",
    "NewerSchemaError",
    "NotFoundError",
    "OperatorConfig",
    "OperatorDb",
    "OperatorDbError",
    "Progress",
    "PruneReport",
    "SessionState",
    "StatusChange",
    "StorageError",
    "TaskRecord",
    "TaskStatus",
    "TranscriptEntry",
    "UnixTime",
    "VerificationLog",
    "verify_dispute_bundle",
]

R = TypeVar("R")  # a record
_Path = str | os.PathLike[str]
_File = _Path | IO[Any]
_Json = dict[str, Any]  # a JSON object
_Row = tuple[Any, ...]  # a row of a table, or the values of a record's fields
Progress = Callable[[int, int], object]
"""What long work calls from time to time: how much is done, of how much (0 if not known)."""


# ==== Errors: each is an OperatorDbError, and the builtin kind of error that it is ================


class OperatorDbError(Exception):
    """Base of every error that this module raises on purpose."""


class InvalidRecordError(OperatorDbError, ValueError):
    """A record, id or argument has a wrong type, range or shape; nothing was stored."""


class NotFoundError(OperatorDbError, LookupError):
    """The record to be changed does not exist."""


class ConflictError(OperatorDbError, RuntimeError):
    """The change contradicts what is stored, or a transaction is misused.

    Raised for an `expected=` that is not met, for other evidence, for a stale session.
    """


class BusyError(OperatorDbError, TimeoutError):
    """Others used the database for longer than `timeout`; nothing was changed, try again."""


class ClosedError(OperatorDbError, RuntimeError):
    """The database object was closed, or inherited by a fork while it was in use."""


class ForeignFileError(OperatorDbError, ValueError):
    """The file is not SQLite, is another application's, or has tables or triggers not ours."""


class NewerSchemaError(OperatorDbError, ValueError):
    """A newer version of this module wrote the file."""


class DamagedError(OperatorDbError, ValueError):
    """What is stored is not what was written: a bad page, checksum, JSON document or record."""


class StorageError(OperatorDbError, OSError):
    """The file system refused: full, read-only, an I/O error."""


class FileReplacedError(StorageError):
    """The database file was replaced or removed while it was open.

    Every call raises it from then on, reads within a second; only `close()` does not.
    """


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def _truncated_repr(value: object) -> str:
    """Return the repr of a value for an error message, cut to some 60 characters."""
    try:
        return _REPR.repr(value[:100] if isinstance(value, (str, bytes)) else value)
    except Exception:  # its own __repr__ failed, or it is an int with too many digits to print
        return f"<{type(value).__name__}>"


# ==== Records and evidence: what users make and get back, and what a dispute is decided on ========


class _Constraint(NamedTuple):
    """What the values of a field must be, type included; stands in the `Annotated` of a hint."""

    description: str
    is_valid: Callable[[Any], bool]


class _CheckedRecord:
    """Base of our records: they are checked when they are made."""

    def __post_init__(self) -> None:
        """Check every field; raise InvalidRecordError, which names the field."""
        _codec(type(self)).validate(self)
        self._derive_fields()

    def _derive_fields(self) -> None:
        """Set what follows from other fields, when a record is made and when it is read."""


_ID = _Constraint(
    "a str of one or more printable characters",
    lambda v: type(v) is str and v.isprintable() and v != "",
)
Id = Annotated[str, _ID]
"""A key: any characters for which `str.isprintable` is true, `:` and `%` among them."""

_TIME = _Constraint(
    "Unix seconds, an int of the years 1 to 9999",
    lambda v: type(v) is int and -62_135_596_800 <= v <= 253_402_300_799,
)
UnixTime = Annotated[int, _TIME]
"""Whole seconds since 1970-01-01 UTC, of the years 1 to 9999, so that milliseconds are refused."""

Lamports = Annotated[
    int, _Constraint("an int from 0 to 2^64-1", lambda v: type(v) is int and 0 <= v < 2**64)
]
"""An amount in the smallest unit of a token, as the chain's `u64`."""

_Count = Annotated[
    int, _Constraint("an int from 0 to 2^63-1", lambda v: type(v) is int and 0 <= v < 2**63)
]
_HASH = _Constraint(
    "64 lower-case hex digits, not all zero",
    lambda v: type(v) is str and len(v) == 64 and {"0"} != set(v) <= set("0123456789abcdef"),
)
_Hash = Annotated[str, _HASH]
_ResultData = Annotated[
    bytes,
    _Constraint("64 bytes, not all zero", lambda v: type(v) is bytes and len(v) == 64 and any(v)),
]
_ABSENT = cast(Any, None)  # the default of a field that is filled in when the record is made


def _hint_at_milliseconds(value: object) -> str:
    """Return a hint for an error if a value is a time in milliseconds, and none in seconds."""
    is_hinted = type(value) is int and not _TIME.is_valid(value) and _TIME.is_valid(value // 1000)
    return ", which looks like milliseconds" if is_hinted else ""


def _now() -> int:
    """Return the time in whole Unix seconds."""
    return int(time.time())


def _sha256(value: bytes) -> str:
    """Return the SHA-256 of bytes as 64 lower-case hex digits."""
    # imported here, because loading OpenSSL takes as long as the rest of this module
    from hashlib import sha256

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
        if not isinstance(value, str):
            return None
        plain = value.replace("_", "").replace("-", "").lower()
        return next((status for status in cls if status.replace("_", "") == plain), None)


_OPEN_STATUSES = (TaskStatus.CLAIMED, TaskStatus.IN_PROGRESS)
_SETTLED_STATUSES = (TaskStatus.COMPLETED, TaskStatus.RESOLVED)


@dataclass(kw_only=True, frozen=True)
class StatusChange(_CheckedRecord):
    """One entry of a task's history.

    `status` is what the task moved to, `at` is when (Unix seconds), `signature` is that of the
    transaction on chain.
    """

    status: TaskStatus
    at: UnixTime = field(default_factory=_now)
    signature: str | None = None


@dataclass(kw_only=True)
class TaskRecord(_CheckedRecord):
    """The mirror of one task on chain.

    `payload` is the task's input, any bytes. Rewards are in lamports and in the smallest unit of
    SKR, 0 to 2^64-1, or None where unknown. `history` is the audit trail: when it is not given, it
    begins with the record's present status. A field of the wrong type or range raises
    InvalidRecordError, which names it.
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

    def _derive_fields(self) -> None:
        if not self.history:
            at = self.claimed_at if self.status in _OPEN_STATUSES else self.age_from
            signature = self.on_chain_signature
            self.history.append(StatusChange(status=self.status, at=at, signature=signature))

    @property
    def age_from(self) -> int:
        """The time that the age is counted from: completion, or else the claim."""
        return self.claimed_at if self.completed_at is None else self.completed_at


@dataclass(kw_only=True, frozen=True)
class TranscriptEntry(_CheckedRecord):
    """One utterance of a voice session; `role` is who spoke, `timestamp` is in Unix seconds."""

    role: str
    content: str
    timestamp: UnixTime = field(default_factory=_now)


@dataclass(kw_only=True)
class SessionState(_CheckedRecord):
    """A voice session: what was said, which commands were given, the tasks talked about."""

    session_id: Id
    transcript: list[TranscriptEntry] = field(default_factory=list)
    command_history: list[str] = field(default_factory=list)
    active_task_ids: list[Id] = field(default_factory=list)
    created_at: UnixTime = field(default_factory=_now)
    last_active: UnixTime = field(default_factory=_now)


@dataclass(kw_only=True, frozen=True)
class VerificationLog(_CheckedRecord):
    """The evidence that a task was done, as `submit_task_result` accepts it (IDL revision 5).

    `proof_hash` is 32 bytes as 64 lower-case hex digits, `result_data` is 64 bytes; the program
    rejects either when it is all zero, and so does this record. Left out, they are what the
    reference worker submits: SHA-256 of `outputs`, and the ASCII of its hex digits. `evidence_hash`
    is always computed: SHA-256 over the canonical JSON of the evidence fields, the same before and
    after submission and whatever the timestamp.

    The record cannot be changed; `dataclasses.replace` makes another. It keeps the hash and the
    result data, which may be those of a zero-knowledge proof. To have both computed anew for other
    outputs: `replace(log, outputs=new, proof_hash=None, result_data=None)`.
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
        # a placeholder: the fields that the hash covers are not checked yet
        object.__setattr__(self, "evidence_hash", "1" * 64)
        super().__post_init__()
        if self.submission_signature is not None and not self.submitted:
            raise InvalidRecordError(
                "VerificationLog.submission_signature is given: submitted must be True"
            )

    def _derive_fields(self) -> None:
        object.__setattr__(self, "evidence_hash", _sha256(_canonical_evidence(self)))

    def verify(self) -> list[str]:
        """Return how hash and result data differ from what the reference worker would submit.

        The list is empty if they do not. Both differences are legal: a zero-knowledge proof commits
        to something other than the output bytes.
        """
        outputs_hash = _sha256(self.outputs)
        found = []
        if self.proof_hash != outputs_hash:
            found.append(f"proof_hash is not the SHA-256 of outputs, {outputs_hash}")
        if self.result_data != outputs_hash.encode():
            found.append("result_data is not the hex digits of the SHA-256 of outputs")
        return found

    def submit_args(self) -> dict[str, bytes]:
        """Return the arguments of `submit_task_result` and `complete_task`.

        They are `proof_hash` (32 bytes) and `result_data` (64 bytes).
        """
        return {"proof_hash": bytes.fromhex(self.proof_hash), "result_data": self.result_data}

    def dispute_args(self) -> dict[str, bytes | str]:
        """Return the arguments of `initiate_dispute` that name the evidence.

        They are `evidence_hash` (32 bytes) and its URI, `evidence` (at most 256 bytes).
        """
        uri = f"agenc://evidence/sha256/{self.evidence_hash}"
        return {"evidence_hash": bytes.fromhex(self.evidence_hash), "evidence": uri}


@dataclass(kw_only=True)
class OperatorConfig(_CheckedRecord):
    """The operator's own configuration; there is one.

    `keypairs` maps a name to a secret key, or to the path of a file that holds it, which is safer:
    the database is not encrypted. `rpc_endpoints` are secret because RPC URLs carry API keys. Both
    are shown as `***`.
    """

    operator_id: ClassVar[str] = "operator"

    keypairs: dict[str, str] = field(default_factory=dict, metadata={"secret": True})
    rpc_endpoints: list[str] = field(default_factory=list, metadata={"secret": True})
    model_preferences: dict[str, Any] = field(default_factory=dict)
    capabilities: list[str] = field(default_factory=list)
    wallet_pubkey: str | None = None
    network: str | None = None


def _canonical_evidence(log: VerificationLog) -> bytes:
    """Return the JSON that the evidence hash is taken over: sorted keys, no spaces, UTF-8."""
    document = {
        "format": "agenc-evidence/1",
        "task_id": log.task_id,
        "proof_hash": log.proof_hash,
        **{name: _base64(getattr(log, name)) for name in ("inputs", "outputs", "proof")},
        "result_data": _base64(log.result_data),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _dispute_bundle(task: TaskRecord | None, log: VerificationLog) -> _Json:
    """Return a dispute bundle: one JSON object, with the arguments for the chain in hex."""
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
    """Return what is wrong with a dispute bundle, a line for each check that failed.

    The list is empty if the bundle is valid. Needs no database. `evidence_hash` is the hash that is
    recorded on chain, 64 hex digits: with it, any change to the evidence is found; without it, only
    contradictions within the bundle are. Never raises, whatever the bundle is.
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
            # a copy, because decoding changes the document
            task = _codec(TaskRecord).from_json(json.loads(json.dumps(bundle["task"])))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            found.append(f"task: {error}")
    if task is not None and task.task_id != log.task_id:
        ids = _truncated_repr(task.task_id), _truncated_repr(log.task_id)
        found.append(f"task: it is {ids[0]}, but the proof is for {ids[1]}")
    wanted = _dispute_bundle(task, log)
    found += [
        f"{name}: it differs from what the proof's evidence gives"
        for name in wanted
        if name != "task" and bundle.get(name) != wanted[name]
    ]
    found += [
        f"{_truncated_repr(name)}: it is no part of a dispute bundle"
        for name in bundle
        if name not in wanted
    ]
    if evidence_hash is not None and str(evidence_hash).lower() != log.evidence_hash:
        given_hash = _truncated_repr(evidence_hash)
        found.append(f"chain: the evidence hash there is {given_hash}, here {log.evidence_hash}")
    return found


# ==== Codec: any dataclass of these field types <-> one JSON document =============================

_REDACTED = "***"
_MAX_DEPTH = 100  # levels of nesting in a free-form field; json.loads gives up near 1,000


class _FieldType(NamedTuple):
    """How the values of one type hint are checked and converted.

    `encode` and `decode` are None where JSON has the type itself.
    """

    description: str
    is_valid: Callable[[Any], bool]  # asked of values whose type is none of `always_valid`
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None
    always_valid: frozenset[type] = frozenset()  # the types whose every value is valid
    copy: Callable[[Any], Any] | None = None  # None where the values cannot be changed
    load: Callable[[Any], Any] | None = None  # decodes what was checked before; None: as `decode`
    has_secrets: bool = False  # whether it is, or holds, a record with secret fields
    # copies into a new JSON value the names of the stored one that no field has; None: no records
    keep_unknown: Callable[[Any, Any], None] | None = None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_scan_json = cast(Any, json.JSONDecoder(parse_constant=_refuse_constant)).scan_once
# what is circular is also too deep, which is checked before
_encode_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


def _encode_part(value: Any) -> Any:
    """Return a part of a record that JSON has no form of as one that it has."""
    if type(value) is bytes:
        return _base64(value)
    return value._value_ if isinstance(value, Enum) else _codec(type(value)).document_of(value)


# JSONEncoder.encode makes its encoder in C anew at every call, which takes as long as it works.
# Its arguments: markers, default, encoder, indent, key separator, item separator, sort_keys,
# skipkeys, allow_nan.
_make_encoder: Any = json.encoder.c_make_encoder  # type: ignore[attr-defined]
_encode_in_c = _make_encoder and _make_encoder(
    None, _encode_part, json.encoder.encode_basestring, None, ":", ",", False, False, False
)
_encode_in_python = json.JSONEncoder(
    ensure_ascii=False,
    allow_nan=False,
    check_circular=False,
    separators=(",", ":"),
    default=_encode_part,
).encode


def _encode_document(document: _Json) -> str:
    """Return as JSON text what `document_of` gives: `_encode_part` converts what JSON lacks."""
    if _encode_in_c is None:  # only CPython has it
        return _encode_in_python(document)
    return "".join(_encode_in_c(document, 0))


def _parse_json_object(text: bytes) -> _Json:
    """Return the JSON object in a text; raise ValueError, which never quotes the text."""
    try:
        document = json.loads(text.decode(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is not JSON ({error.msg}: {place})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(document) is not dict:
        raise ValueError("it is not a JSON object")
    return document


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
    """Whether JSON gives the value back unchanged: no tuples, only str keys, no NaN, not deep."""
    kind = type(value)
    if kind is dict:
        return depth <= _MAX_DEPTH and all(
            _is_text(k) and _is_json(v, depth + 1) for k, v in value.items()
        )
    if kind is list:
        return depth <= _MAX_DEPTH and all(_is_json(v, depth + 1) for v in value)
    if kind is float:
        return bool(value - value == 0)  # neither NaN nor infinite
    return value is None or kind in (bool, int) or _is_text(value)


def _copy_json(value: Any, depth: int = 1) -> Any:
    """Return a copy of free-form JSON; what is too deep is not copied, since it is refused."""
    kind = type(value)
    if depth > _MAX_DEPTH or kind not in (dict, list):
        return value
    # copied in one call into C before it is walked: another thread may change it meanwhile
    if kind is dict:
        return {k: _copy_json(v, depth + 1) for k, v in dict(value).items()}
    return [_copy_json(v, depth + 1) for v in list(value)]


def _base64(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode("ascii")


_from_base64 = partial(a2b_base64, strict_mode=True)
_BASIC_TYPES: dict[Any, _FieldType] = {
    str: _FieldType("a str of valid Unicode", _is_text),
    int: _FieldType("an int", lambda v: type(v) is int, always_valid=frozenset({int})),
    bool: _FieldType("a bool", lambda v: type(v) is bool, always_valid=frozenset({bool})),
    float: _FieldType("a finite float", lambda v: type(v) in (float, int) and v - v == 0),
    bytes: _FieldType(
        "bytes", lambda v: type(v) is bytes, _base64, _from_base64, frozenset({bytes})
    ),
    Any: _FieldType(f"JSON, at most {_MAX_DEPTH} levels deep", _is_json, copy=_copy_json),
    dict: _FieldType(
        f"a JSON object, at most {_MAX_DEPTH} levels deep",
        lambda v: type(v) is dict and _is_json(v),
        copy=_copy_json,
    ),
    list: _FieldType(
        f"a JSON array, at most {_MAX_DEPTH} levels deep",
        lambda v: type(v) is list and _is_json(v),
        copy=_copy_json,
    ),
    type(None): _FieldType("None", lambda v: v is None),
}


def _field_type(hint: Any) -> _FieldType:
    """Return how a type hint is checked and converted; raise TypeError if it has no JSON form."""
    if hint in _BASIC_TYPES:
        return _BASIC_TYPES[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        field_type = _field_type(args[0])
        for constraint in args[1:]:
            if isinstance(constraint, _Constraint):
                return field_type._replace(**constraint._asdict(), always_valid=frozenset())
        return field_type
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return _optional(_field_type(args[0] if args[1] is type(None) else args[1]))
    if origin is list:
        return _list_of(_field_type(args[0]))
    if origin is dict and args[0] is str:
        return _BASIC_TYPES[dict] if args[1] is Any else _dict_of(_field_type(args[1]))
    if _is_enum(hint):
        return _enum_type(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        codec = _codec(hint)
        return _FieldType(
            f"a {hint.__name__}",
            codec.is_valid,
            codec.to_json,
            codec.from_json,
            always_valid=frozenset({hint} if codec.is_immutable else ()),
            copy=None if codec.is_immutable else codec.copy,
            load=codec.load,
            has_secrets=bool(codec.secrets),
            keep_unknown=codec.keep_unknown,
        )
    raise TypeError(f"{hint} has no JSON form here")


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _enum_type(enum: Any) -> _FieldType:
    members = {member.value: member for member in enum}
    if not all(_is_json(value) and value is not None for value in members):
        raise TypeError(f"{enum.__name__} has members whose values JSON cannot carry")
    return _FieldType(
        f"one of {', '.join(str(value) for value in members)}",
        lambda v: type(v) is enum,
        encode=attrgetter("_value_"),
        # called for a combination of flags, and for another spelling of a TaskStatus
        decode=lambda v: members[v] if v in members else enum(v),
        always_valid=frozenset({enum}),
    )


def _validator(field_type: _FieldType) -> Callable[[Any], bool]:
    """Return a predicate for values of any type, those always valid among them."""
    always_valid, is_valid = field_type.always_valid, field_type.is_valid
    return (lambda v: type(v) in always_valid or is_valid(v)) if always_valid else is_valid


def _optional(inner: _FieldType) -> _FieldType:
    encode, decode, copy = inner.encode, inner.decode, cast(Any, inner.copy)
    load = inner.load
    return inner._replace(
        description=f"{inner.description}, or None",
        encode=encode and (lambda v: None if v is None else encode(v)),
        decode=decode and (lambda v: None if v is None else decode(v)),
        copy=inner.copy and (lambda v: None if v is None else copy(v)),
        load=load and (lambda v: None if v is None else load(v)),
        always_valid=inner.always_valid | {type(None)},
    )


def _json_list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError("not a JSON array")
    return value


def _list_of(inner: _FieldType) -> _FieldType:
    encode, decode, copy, is_valid = inner.encode, inner.decode, inner.copy, _validator(inner)
    all_valid, load = inner.always_valid.issuperset, inner.load

    def copy_list(value: Any) -> Any:
        if type(value) is not list:
            return value
        items = list(value)
        return [*map(copy, items)] if copy else items

    return _FieldType(
        f"a list, each {inner.description}",
        lambda v: type(v) is list and (all_valid(map(type, v)) or all(map(is_valid, v))),
        encode and (lambda v: [*map(encode, v)]),
        decode and (lambda v: [*map(decode, _json_list(v))]),
        copy=copy_list,
        load=load and (lambda v: [*map(load, _json_list(v))]),
        has_secrets=inner.has_secrets,
        keep_unknown=inner.keep_unknown and partial(_keep_unknown_in_list, inner.keep_unknown),
    )


def _keep_unknown_in_list(keep: Callable[[Any, Any], None], stored: Any, new: Any) -> None:
    """Do as `_Codec.keep_unknown` for the records of two JSON arrays.

    A new record takes over from the stored one that is equal in all names that both arrays have, or
    else from the one in its place, unless that is another's.
    """
    if type(stored) is not list or type(new) is not list:
        return
    shared = _names_in(stored) & _names_in(new)

    def values(record: _Json) -> str:
        return _encode_json({name: record[name] for name in sorted(shared & record.keys())})

    places: dict[str, deque[int]] = defaultdict(deque)
    for place, record in enumerate(stored):
        if type(record) is dict:
            places[values(record)].append(place)
    unmatched, matched = [], set()
    for place, record in enumerate(new):
        if type(record) is dict and (same := places[values(record)]):
            matched.add(same[0])
            keep(stored[same.popleft()], record)
        else:
            unmatched.append(place)
    for place in unmatched:
        if place < len(stored) and place not in matched:
            keep(stored[place], new[place])


def _names_in(records: list[Any]) -> set[str]:
    """Return the names that any of these JSON objects has."""
    return {name for record in records if type(record) is dict for name in record}


def _dict_of(inner: _FieldType) -> _FieldType:
    encode, decode, copy, is_valid = inner.encode, inner.decode, inner.copy, _validator(inner)
    load = inner.load

    def copy_dict(value: Any) -> Any:
        if type(value) is not dict:
            return value
        items = dict(value)
        return {k: copy(v) for k, v in items.items()} if copy else items

    return _FieldType(
        f"a dict of str to {inner.description}",
        lambda v: type(v) is dict and all(_is_text(k) and is_valid(x) for k, x in v.items()),
        encode and (lambda v: {k: encode(x) for k, x in v.items()}),
        decode and (lambda v: {k: decode(x) for k, x in v.items()}),
        copy=copy_dict,
        load=load and (lambda v: {k: load(x) for k, x in v.items()}),
        has_secrets=inner.has_secrets,
        keep_unknown=inner.keep_unknown and partial(_keep_unknown_in_dict, inner.keep_unknown),
    )


def _keep_unknown_in_dict(keep: Callable[[Any, Any], None], stored: Any, new: Any) -> None:
    for name in new if type(stored) is dict and type(new) is dict else ():
        keep(stored.get(name), new[name])


class _Codec(Generic[R]):
    """Checks, encodes and decodes the records of one dataclass, by its type hints.

    Fields may be str, int, bool, float, bytes, enums, dataclasses, lists and str-keyed dicts of
    these, `X | None`, and free-form JSON (dict, list, Any). A field that the JSON lacks takes the
    dataclass's default; one that the dataclass lacks is ignored; one with `init=False` is written,
    and on reading must be what the record computes. A field with `metadata={"was": "name"}` is read
    under its former name where the present one is not there.
    """

    def __init__(self, record_type: type[R]) -> None:
        if not (isinstance(record_type, type) and is_dataclass(record_type)):
            raise InvalidRecordError(f"{_truncated_repr(record_type)} is not a dataclass")
        self.record_type = record_type
        self.name = record_type.__name__
        self.field_types: dict[str, _FieldType] = {}
        all_fields = fields(record_type)
        try:
            hints = typing.get_type_hints(record_type, include_extras=True)
            for each in all_fields:
                self.field_types[each.name] = _field_type(hints[each.name])
        except Exception as error:  # an unknown name, no JSON form, or a type that contains itself
            raise InvalidRecordError(f"{self.name}: {str(error)[:200]}") from None
        self.secrets = frozenset(
            each.name
            for each in all_fields
            if each.metadata.get("secret") or self.field_types[each.name].has_secrets
        )
        self._former_names = self._find_former_names(all_fields)
        self.secret_names = self.secrets | {
            former for name, former in self._former_names.items() if name in self.secrets
        }
        # `attrgetter` of one name gives no tuple, and of none is an error: two more are added
        self._get_values: Callable[[R], _Row] = attrgetter(
            *self.field_types, "__class__", "__class__"
        )
        self._names = tuple(self.field_types)
        self._enums = [(f.name, hints[f.name]) for f in all_fields if _is_enum(hints[f.name])]
        self._encoders = [(n, each.encode) for n, each in self.field_types.items() if each.encode]
        self._decoders = [(n, each.decode) for n, each in self.field_types.items() if each.decode]
        self._loaders = [
            (n, load) for n, each in self.field_types.items() if (load := each.load or each.decode)
        ]
        self._copiers = [(n, each.copy) for n, each in self.field_types.items() if each.copy]
        self._computed = [f.name for f in all_fields if not f.init]
        self._settable = frozenset(f.name for f in all_fields if f.init)
        self._required = [
            f.name for f in all_fields if f.init and f.default is f.default_factory is MISSING
        ]
        # By the types that the fields of a valid record have had: the checks that depend on the
        # values. A record with these very types needs no other checks.
        self._checks_by_types: dict[_Row, list[tuple[int, Callable[[Any], bool]]]] = {}
        self._is_ours = (
            issubclass(record_type, _CheckedRecord) and record_type.__module__ == __name__
        )
        dataclass_options = cast(Any, record_type).__dataclass_params__
        self.is_immutable = self._is_ours and dataclass_options.frozen
        # Our constructors only check and derive fields; those of custom classes may do anything.
        self._can_skip_constructor = self._is_ours and not self._computed
        self._derives_fields = (
            self._is_ours
            and cast(Any, record_type)._derive_fields is not _CheckedRecord._derive_fields
        )

    def _find_former_names(self, all_fields: tuple[Any, ...]) -> dict[str, str]:
        """Return the former name of each field that has one."""
        former_names = {f.name: f.metadata["was"] for f in all_fields if "was" in f.metadata}
        for name, former in former_names.items():
            is_clear = [*former_names.values()].count(former) == 1
            if not _is_text(former) or former in self.field_types or not is_clear:
                raise InvalidRecordError(
                    f"{self.name}.{name}: 'was' must be a str, and no other field's name now or"
                    f" then; got {_truncated_repr(former)}"
                )
        return former_names

    def is_former_name(self, former: str, name: str) -> bool:
        """Whether this is the name that the field is declared to have had."""
        return self._former_names.get(name) == former

    def copy(self, record: R) -> R:
        """Return a record that nobody else can change; what is not one is returned as it is.

        All fields are taken at one moment. Without it, a record that its owner changed while it was
        being stored in another thread was stored unreadable in 190 of 200 cases.
        """
        if type(record) is not self.record_type or self.is_immutable:
            return record
        if self._is_ours:  # shallow_copy would take longer than all the rest
            copied = object.__new__(self.record_type)
            vars(copied).update(vars(record))
        else:
            copied = shallow_copy(record)
        for name, copy_field in self._copiers:
            with suppress(AttributeError):  # missing: reported when it is validated
                object.__setattr__(copied, name, copy_field(getattr(copied, name)))
        return copied

    def take(self, record: R) -> R:
        """Return a checked copy that nobody else can change; raise InvalidRecordError."""
        taken = self.copy(record)
        self.validate(taken)
        return taken

    # ---- checking

    def validate(self, record: R) -> None:
        """Raise InvalidRecordError for the first field that is not valid; never shows a secret."""
        if type(record) is not self.record_type:
            raise InvalidRecordError(f"expected a {self.name}, got {type(record).__name__}")
        try:
            values = self._get_values(record)[:-2]
        except AttributeError as error:
            raise InvalidRecordError(f"{self.name}: {error}") from None
        if not self._passes_known_checks(values):
            self._validate_fields(self._with_enum_members(record))

    def is_valid(self, record: Any) -> bool:
        """Whether the value is of this type; raise InvalidRecordError if it is, but not valid."""
        if type(record) is not self.record_type:
            return False
        if not self.is_immutable:
            self.validate(record)
        return True

    def _with_enum_members(self, record: R) -> _Row:
        """Replace an enum's plain value by its member, in the record too; return the values."""
        for name, enum in self._enums:
            value = getattr(record, name)
            if type(value) is not enum and isinstance(value, str):
                with suppress(Exception):  # what is no value of the enum is refused later
                    object.__setattr__(record, name, enum(value))
        return self._get_values(record)[:-2]

    def _passes_known_checks(self, values: _Row) -> bool:
        """Whether values of types seen before are valid; False where the types are new."""
        try:
            for place, is_valid in self._checks_by_types[tuple(map(type, values))]:
                if not is_valid(values[place]):
                    return False
        except (KeyError, InvalidRecordError):  # the latter from a nested record
            return False
        return True

    def _validate_fields(self, values: _Row) -> None:
        """Check every value by itself, and remember which checks its types do not replace."""
        for (name, field_type), value in zip(self.field_types.items(), values, strict=True):
            try:
                valid = type(value) in field_type.always_valid or field_type.is_valid(value)
            except InvalidRecordError:  # from a nested record
                if name not in self.secrets:
                    raise
                valid = False
            if not valid:
                shown = _REDACTED if name in self.secrets else _truncated_repr(value)
                hint = _hint_at_milliseconds(value) if field_type.is_valid is _TIME.is_valid else ""
                raise InvalidRecordError(
                    f"{self.name}.{name} must be {field_type.description};"
                    f" got {type(value).__name__} {shown}{hint}"
                )
        self._checks_by_types[tuple(map(type, values))] = [
            (place, field_type.is_valid)
            for place, field_type in enumerate(self.field_types.values())
            if type(values[place]) not in field_type.always_valid
        ]

    # ---- to JSON and back

    def document_of(self, record: R) -> _Json:
        """Return the values of a record by their names, as `_encode_document` takes them.

        It may be the record's own `__dict__`: do not change it.
        """
        document: _Json | None = getattr(record, "__dict__", None)
        if document is None or tuple(document) != self._names:
            return dict(zip(self._names, self._get_values(record)[:-2], strict=True))
        return document

    def to_json(self, record: R) -> _Json:
        """Return a valid record as a JSON object."""
        document = dict(zip(self._names, self._get_values(record)[:-2], strict=True))
        for name, encode in self._encoders:
            document[name] = encode(document[name])
        return document

    def from_json(self, document: Any) -> R:
        """Return the record that a JSON object describes; raise ValueError or TypeError if none.

        The object is changed in place: pass a copy of one that is needed afterwards.
        """
        if type(document) is not dict:
            raise TypeError(f"a {self.name} is a JSON object")
        has_all_fields = tuple(document) == self._names
        for name, former in () if has_all_fields else self._former_names.items():
            if former in document and name not in document:
                document[name] = document.pop(former)
        for name in () if has_all_fields else self._required:
            if name not in document:
                raise ValueError(f"{self.name}.{name} is missing, and has no default")
        name = ""
        try:
            for name, decode in self._decoders:
                if has_all_fields or name in document:
                    document[name] = decode(document[name])
        except (ValueError, TypeError, KeyError, AttributeError):
            description = self.field_types[name].description
            raise ValueError(f"{self.name}.{name} is not {description}") from None
        if not (has_all_fields and self._can_skip_constructor):
            return self._construct(document)
        values = tuple(document.values())
        if not self._passes_known_checks(values):
            self._validate_fields(values)
        return self.from_checked(document)

    def load(self, document: Any) -> R:
        """Return the record that a JSON object describes, of which a valid record was made before.

        Unlike `from_json` it does not look at types and ranges again.
        """
        is_whole = type(document) is dict and tuple(document) == self._names
        if not (is_whole and self._is_ours):
            return self.from_json(document)
        for name, load in self._loaders:
            document[name] = load(document[name])
        computed = [document[name] for name in self._computed]
        record = self.from_checked(document)
        for name, value in zip(self._computed, computed, strict=True):
            self._raise_unless_computed(record, name, value)
        return record

    def _raise_unless_computed(self, record: R, name: str, value: Any) -> None:
        if value != getattr(record, name):
            raise ValueError(f"{self.name}.{name} does not follow from the other fields")

    def from_checked(self, values: _Json) -> R:
        """Return one of our records; its values, all of them and in order, were checked before.

        The record keeps `values`, which the caller must not use again.
        """
        record = object.__new__(self.record_type)
        object.__setattr__(record, "__dict__", values)  # also of a frozen dataclass
        if self._derives_fields:
            cast(_CheckedRecord, record)._derive_fields()
        return record

    def from_json_strictly(self, document: _Json) -> R:
        """Do as `from_json`; raise ValueError also for a name that is missing or not known.

        Names in nested records are looked at too.
        """
        record = self.from_json(dict(document))
        written = self.to_json(record)
        if unknown := _first_missing_part(document, written):
            raise ValueError(f"{self.name}{unknown} is not known")
        if missing := _first_missing_part(written, document):
            raise ValueError(f"{self.name}{missing} is missing")
        return record

    def _construct(self, document: _Json) -> R:
        """Make a record through its constructor."""
        settable = self._settable
        given = {name: value for name, value in document.items() if name in settable}
        try:
            record = self.record_type(**given)
        except InvalidRecordError:
            raise
        except Exception as error:
            why = "" if self.secrets else f": {error}"
            raise ValueError(
                f"{self.name} cannot be made of it ({type(error).__name__}{why})"
            ) from None
        if not self._is_ours:
            self.validate(record)
        for name in self._computed:
            if name in document:
                self._raise_unless_computed(record, name, document[name])
        return record

    def keep_unknown(self, stored: Any, new: Any) -> None:
        """Add to a record's new JSON object what the stored one has under names not known here.

        Another build of the operator may have written these. A former name is known.
        """
        if type(stored) is not dict or type(new) is not dict:
            return
        for name, value in stored.items():
            if name not in self.field_types and name not in self._former_names.values():
                new.setdefault(name, value)
        for name, field_type in self.field_types.items():
            if field_type.keep_unknown is not None:
                former = self._former_names.get(name, name)
                field_type.keep_unknown(stored.get(name, stored.get(former)), new[name])

    def defaults(self, names: list[str]) -> _Json:
        """Return as JSON the defaults of these fields, for those that have one."""
        document: _Json = {}
        for each in fields(cast(Any, self.record_type)):
            if each.name in names and each.name not in self._required:
                value = each.default if each.default_factory is MISSING else each.default_factory()
                encode = self.field_types[each.name].encode
                document[each.name] = encode(value) if encode else value
        return document

    def encode(self, record: R) -> str:
        """Return a valid record as one JSON document."""
        try:
            return self._encode_reversibly(record)
        except (ValueError, TypeError, RecursionError):  # an int of over 4,300 digits, for one
            try:
                self._encode_reversibly(record)
            except (ValueError, TypeError, RecursionError):
                raise InvalidRecordError(
                    f"{self.name} holds what would not be read back as it is"
                ) from None
            raise  # by a signal handler

    def _encode_reversibly(self, record: R) -> str:
        text = _encode_document(self.document_of(record))
        if self._is_ours or self._reads_back(text):
            return text
        # field by field, for an enum that is a str or an int, and has other values than these
        text = _encode_json(self.to_json(record))
        if not self._reads_back(text):
            raise ValueError("its constructor changes it")
        return text

    def _reads_back(self, text: str) -> bool:
        """Whether the record that is made of a document would be stored as this document."""
        try:
            return _encode_json(self.to_json(self.decode(text.encode()))) == text
        except (ValueError, TypeError):
            return False

    def decode(self, text: bytes, *, was_checked: bool = False) -> R:
        """Return the record in a stored document; raise ValueError or TypeError if it has none.

        `was_checked` says that it was written from a valid record: see `load`.
        """
        try:
            whole = text.decode()
            document, end = _scan_json(whole, 0)
            if end != len(whole):
                raise ValueError("not one JSON document")
        except (ValueError, StopIteration, RecursionError, AttributeError):
            # `from None`, because the parser's own error holds the whole text
            raise ValueError("not a JSON document") from None
        return self.load(document) if was_checked else self.from_json(document)


_CODECS: dict[type, _Codec[Any]] = {}


def _codec(record_type: type[R]) -> _Codec[R]:
    """Return the codec of a dataclass, made at its first use.

    From then on, the repr of a class with secrets does not show them.
    """
    codec = _CODECS.get(record_type) if isinstance(record_type, type) else None
    if codec is None:
        codec = _CODECS[record_type] = _Codec(record_type)
        if codec.secrets:
            record_type.__repr__ = _redacted_repr  # type: ignore[method-assign]
    return codec


def _redacted_repr(record: Any) -> str:
    """Return the repr that a dataclass would generate, with `***` for each secret field."""
    parts = (
        f"{f.name}={_REDACTED if f.metadata.get('secret') else repr(getattr(record, f.name))}"
        for f in fields(record)
        if f.repr
    )
    return f"{type(record).__qualname__}({', '.join(parts)})"


def _redact(document: _Json, secrets: frozenset[str]) -> _Json:
    """Return a JSON object with `***` for the fields that are secret."""
    return {name: _REDACTED if name in secrets else document[name] for name in document}


def _first_missing_part(given: Any, other: Any) -> str:
    """Return the path of the first part of a JSON document that another lacks; "" if none."""
    pairs: Iterable[tuple[str, Any, Any]] = ()
    if type(given) is dict and type(other) is dict:
        for name in given:
            if name not in other:
                return f".{name}"
        pairs = ((f".{name}", value, other[name]) for name, value in given.items())
    elif type(given) is list and type(other) is list:
        if len(given) > len(other):
            return f"[{len(other)}]"
        pairs = ((f"[{n}]", *pair) for n, pair in enumerate(zip(given, other, strict=False)))
    for path, value, other_value in pairs:
        if missing := _first_missing_part(value, other_value):
            return path + missing
    return ""


# ==== Files: paths, modes, identity, writing a file atomically, streams ===========================

_DATABASE_SUFFIXES = {"database": "", "wal": "-wal", "shm": "-shm"}  # the files of a database
_REDB_MAGIC = b"redb\x1a\n\xa9\r\n"
_MAX_LINE_BYTES = 2**31  # of an export; a record has at most 1,000,000,000 in the database
_LINE_START_BYTES = 2**16  # of the first line, which are looked at before the rest is read
# What a message about damage leads to: where the file can be opened, and where it cannot.
_REPAIR = "run repair()"
_MOVE_ASIDE = "move it aside with its -wal, and `restore` makes a new one of a backup"


@contextmanager
def _translate_os_errors(what: str) -> Iterator[None]:
    """Raise OSErrors with an errno in the block as StorageError; let other errors pass."""
    try:
        yield
    except OSError as error:
        # one without an errno comes from a signal handler: TimeoutError is an OSError
        if isinstance(error, OperatorDbError) or error.errno is None:
            raise
        raise StorageError(f"{what}: {error.strerror}") from None


# ---- paths


def _database_path(path: _Path | None) -> str:
    """Return the absolute path of the database.

    It is the argument, else AGENC_DB_PATH, else ~/.agenc/operator.db.
    """
    if path is None:
        path = os.environ.get("AGENC_DB_PATH") or os.path.join("~", ".agenc", "operator.db")
    return _absolute_path(path)


def _absolute_path(path: _Path) -> str:
    """Return an absolute path with `~` expanded and symbolic links resolved.

    SQLite keeps the WAL beside the file that a link leads to.
    """
    try:
        text = os.fsdecode(path)
        if not text or b"\0" in os.fsencode(text):
            raise ValueError("it is empty or holds a NUL")
        expanded = os.path.expanduser(text)
        if expanded.startswith(("~/", "~\\")):
            raise ValueError("there is no home directory: set HOME, or give a path")
        return os.path.realpath(expanded)
    except (TypeError, ValueError) as error:
        raise InvalidRecordError(f"{_truncated_repr(path)} is not a path: {error}") from None
    except OSError as error:  # a relative path, and the working directory is gone
        if error.errno is None:
            raise
        raise StorageError(f"{_truncated_repr(path)}: {error.strerror}") from None


def _is_memory(path: _Path | None) -> bool:
    """Whether a path, or else AGENC_DB_PATH, asks for a private database."""
    given = os.environ.get("AGENC_DB_PATH") if path is None else path
    return _is_path(given) and os.fsdecode(cast(Any, given)) == ":memory:"


def _file_size(path: str) -> int:
    """Return the size of a file in bytes, 0 where there is none."""
    with _translate_os_errors(path), suppress(FileNotFoundError):
        return os.stat(path).st_size
    return 0


def _require_space(path: str, size: int, purpose: str) -> None:
    """Raise StorageError unless the file system of a path has so many bytes free."""
    import shutil

    with _translate_os_errors(path):
        free = shutil.disk_usage(os.path.dirname(path)).free
    if free < size:
        raise StorageError(
            f"{purpose} takes {size:,} bytes of free space, and there are {free:,}: nothing was"
            " changed"
        )


def _file_exists(path: str) -> bool:
    """Whether there is a file; raise StorageError where one may not look."""
    with _translate_os_errors(path), suppress(FileNotFoundError):
        os.lstat(path)
        return True
    return False


def _file_identity(path: str) -> tuple[int, int]:
    """Return what tells one file from another at the same path: device and inode."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _leftover_names(path: str) -> list[str]:
    """Return the temporary names that a killed creation has left of the file at a path.

    A process that is killed after it has linked its temporary file to the path, and before it
    unlinks it, leaves both names.
    """
    folder, name = os.path.split(path)
    found = []
    with suppress(OSError):
        identity = _file_identity(path)
        for other in os.listdir(folder):
            if other.startswith(name + ".") and other.endswith(".new"):
                other_path = os.path.join(folder, other)
                with suppress(OSError):
                    found += [other_path] if _file_identity(other_path) == identity else []
    return found


def _has_second_name(path: str) -> bool:
    """Whether a hard link leads to the file, besides what a killed creation has left."""
    leftovers = len(_leftover_names(path))
    # looked at last, because a creation that is still going on removes its temporary name
    with _translate_os_errors(path):
        return os.stat(path).st_nlink > 1 + leftovers


def _has_hot_journal(path: str) -> bool:
    """Whether there is a rollback journal with pages that SQLite would put back into the file.

    Bytes 16 to 19 of its header are the size, in pages, that the database had: 0 in the journal of
    one that is being created, which holds nothing to put back
    (https://www.sqlite.org/fileformat2.html#the_rollback_journal).
    """
    with suppress(OSError), open(path + "-journal", "rb") as journal:
        header = journal.read(20)
        return header.startswith(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7") and any(header[16:])
    return False


def _identify_foreign_file(path: str) -> ForeignFileError | None:
    """Return an error that says what kind of file SQLite has refused; None for a damaged database.

    Only a file that SQLite has refused may be opened here: closing a plain descriptor of a live
    database drops every lock that this process's SQLite holds on it
    (https://www.sqlite.org/howtocorrupt.html, section 2.2).
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        return ForeignFileError(f"{path} cannot be read: {error.strerror}")
    if start.startswith(_REDB_MAGIC):
        return ForeignFileError(
            f"{path} is the prototype's redb database: export it with `agenc-db export --format"
            " json`, import that into a new operator_db file, and give this module a path of its"
            " own"
        )
    if start == b"SQLite format 3\0":
        return None
    return ForeignFileError(
        f"{path} is not an SQLite database; nothing was changed. If it was yours, its first page is"
        f" lost: {_MOVE_ASIDE}"
    )


# ---- modes


def _make_private_directory(path: str) -> None:
    """Create a directory and its missing parents, each accessible to its owner alone."""
    if path and not os.path.isdir(path):
        _make_private_directory(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)


def _restrict_permissions(path: str) -> None:
    """Take other users' permissions off the files of a database of ours, with a log line."""
    for name in (path + suffix for suffix in _DATABASE_SUFFIXES.values()):
        with suppress(OSError):
            status = os.stat(name)
            if os.name == "posix" and status.st_mode & 0o077 and status.st_uid == os.geteuid():
                os.chmod(name, 0o600)
                _warn(f"{name} could be read by others: its mode is now 0600")


def _warn(message: str) -> None:
    from logging import getLogger  # here, because it takes longer to import than this module

    getLogger("operator_db").warning("%s", message)


# ---- writing a file atomically


@contextmanager
def _temporary_file(path: str) -> Iterator[str]:
    """Yield the name of an empty private file beside `path`; remove what is left of it."""
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
        if os.getpid() == owner:
            for suffix in ("", "-wal", "-shm", "-journal"):
                with suppress(FileNotFoundError):
                    os.unlink(temporary + suffix)


@contextmanager
def _write_atomically(path: str, *, overwrite: bool, mode: int = 0o600) -> Iterator[str]:
    """Yield the name of an empty private file, which appears at `path` after the block.

    It appears complete, or, if the block raises, not at all. The block must sync it to the disk.
    """
    _check_can_overwrite(path, overwrite)
    with _translate_os_errors(f"cannot write {path}"), _temporary_file(path) as temporary:
        yield temporary
        os.chmod(temporary, mode)
        _check_can_overwrite(path, overwrite)  # again, for something may have come meanwhile
        if overwrite:
            os.replace(temporary, path)
        else:
            _publish(temporary, path)
        _sync_directory(path)


def _check_can_overwrite(path: str, overwrite: bool) -> None:
    """Raise an error where a new file would replace what it must not.

    That is a database in use, what is not a regular file, and any file unless `overwrite`.
    """
    _raise_if_open_here(path)
    for suffix in ("-wal", "-journal"):
        if os.path.lexists(path + suffix):
            raise StorageError(
                f"{path}{suffix} is there: that database is open or was not closed; choose another"
                " name"
            )
    if os.path.lexists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} is not a regular file, and is not replaced by one")
    if os.path.lexists(path) and not overwrite:
        raise StorageError(f"{path} is there already: choose another name, or overwrite it")


def _publish(temporary: str, path: str) -> None:
    """Give a file its final name, unless that is taken."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here (Android, FAT)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
            try:
                os.replace(temporary, path)
            except OSError:
                os.unlink(path)
                raise
    except FileExistsError:
        raise StorageError(
            f"{path} is there already: choose another name, or overwrite it"
        ) from None


def _sync_directory(path: str) -> None:
    """Make the name of a new file durable, where its directory may be read."""
    if hasattr(os, "O_DIRECTORY") and os.access(os.path.dirname(path), os.R_OK):
        descriptor = os.open(os.path.dirname(path), os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _unnamed_file() -> Iterator[IO[bytes]]:
    """Yield an empty temporary file, which is gone with its descriptor."""
    import tempfile

    with _translate_os_errors("cannot write a temporary file"):
        # tempfile does not say so when there are too many open files
        os.close(os.open(os.devnull, os.O_RDONLY))
        with tempfile.TemporaryFile() as file:
            yield file


# ---- streams


def _is_path(file: object) -> bool:
    return isinstance(file, (str, bytes, os.PathLike))


@contextmanager
def _open_output(file: _File, mode: int = 0o600) -> Iterator[Callable[[bytes], object]]:
    """Yield a function that writes bytes, which go to where `file` says.

    A regular file is replaced atomically. A stream or special file is written only after the block,
    so that a slow one holds nothing open.
    """
    if not _is_path(file):
        with _unnamed_file() as spool:
            yield spool.write
            spool.seek(0)
            _send(spool, file)
        return
    given = os.path.expanduser(os.fsdecode(cast(Any, file)))
    path = _absolute_path(given)
    # the log that standard output goes to is a regular file, and yet not to be replaced
    is_descriptor = re.fullmatch(r"/dev/(fd/\d+|std(in|out|err))|/proc/\w+/fd/\d+", given)
    if is_descriptor or (os.path.exists(given) and not os.path.isfile(given)):
        with (
            _translate_os_errors(f"cannot write {given}"),
            open(given, "ab") as special,
            _open_output(special) as write,
        ):
            yield write
        return
    with (
        _write_atomically(path, overwrite=True, mode=mode) as temporary,
        # unbuffered: a child that the block forks would write the buffer that it inherits
        open(temporary, "wb", buffering=0) as new,
    ):
        yield partial(_write_all, new)
        os.fsync(new.fileno())


def _send(spool: IO[bytes], stream: Any) -> None:
    """Write a file to a stream, text or binary, all of it."""
    binary = getattr(stream, "buffer", stream)  # below sys.stdout, whose encoding may be anything
    try:
        if binary is not stream:
            stream.flush()  # what was printed before
        if isinstance(binary, TextIOBase):
            binary.writelines(line.decode() for line in spool)
        else:
            for chunk in iter(partial(spool.read, 2**20), b""):
                _write_all(binary, chunk)
        if hasattr(stream, "flush"):
            stream.flush()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"the stream cannot be written: {error}") from error


def _write_all(stream: Any, chunk: bytes) -> None:
    """Write bytes to a binary stream; an unbuffered one may take less than it is given."""
    sent = 0
    while sent < len(chunk):
        taken = stream.write(chunk[sent:])
        if taken is None and isinstance(stream, RawIOBase):
            raise BlockingIOError("the stream takes no more, and does not block")
        sent += len(chunk) if taken is None else taken


def _read_lines(file: _File) -> Iterator[bytes]:
    """Read the lines of a path or of a stream, text or binary."""
    if _is_path(file):
        _raise_if_open_here(_absolute_path(cast(_Path, file)))
        given = os.path.expanduser(os.fsdecode(cast(Any, file)))
        with _translate_os_errors(f"cannot read {given}"), open(given, "rb") as stream:
            yield from _read_lines(stream)
        return
    source: Any = getattr(file, "buffer", file)

    def read_line(limit: int) -> bytes:
        try:
            line: str | bytes = source.readline(limit)
            # a lone surrogate passes here: as invalid UTF-8 it is refused where its line is known
            return line if isinstance(line, bytes) else line.encode(errors="surrogatepass")
        except TimeoutError:  # an alarm's, or the stream's own
            raise
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StorageError(f"the stream cannot be read: {error}") from None
        except MemoryError:
            raise InvalidRecordError("a line of the input is too long for the memory") from None

    line = read_line(_LINE_START_BYTES)
    if len(line) >= _LINE_START_BYTES and not line.endswith(b"\n"):
        # what has no lines, as /dev/zero, is not read to its end before it is looked at
        if not line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            raise InvalidRecordError("the input does not begin with a JSON object")
        line += read_line(_MAX_LINE_BYTES)
    while line:
        yield line
        line = read_line(_MAX_LINE_BYTES)


# ==== Connection: one SQLite connection, its settings, retries and errors =========================

_POLL_INTERVAL = 0.001  # seconds between two attempts to take a lock that others hold
_WAL_KEPT_BYTES = 16 * 2**20  # how long a write-ahead log may stay after a checkpoint

_BEGIN_READ = "BEGIN"  # takes no snapshot by itself: the first read does
_BEGIN_WRITE = "BEGIN IMMEDIATE"  # a deferred one that reads first can fail whatever the timeout
_COMMIT = "COMMIT"
_SAVEPOINT = "SAVEPOINT {}"
_RELEASE = "RELEASE {}"
_ROLLBACK_TO = "ROLLBACK TO {}"
_READ_ANYTHING = "SELECT 1 FROM sqlite_master LIMIT 1"
_VACUUM = "VACUUM"
_AUTO_VACUUM = "PRAGMA auto_vacuum"
_INCREMENTAL = 2  # the mode that gives unused pages back when asked
_SET_AUTO_VACUUM = f"{_AUTO_VACUUM}={_INCREMENTAL}"
_PAGE_SIZE = "PRAGMA page_size"
_USER_VERSION = "PRAGMA user_version"
_DATA_VERSION = "PRAGMA data_version"  # another one after each commit of another connection
_RELEASE_PAGES = "PRAGMA incremental_vacuum({})"


_Parameters = tuple[Any, ...] | dict[str, Any]  # of a statement, by place or by name


class _NotSqliteError(DamagedError):
    """SQLite has refused the file (SQLITE_NOTADB): only such a file may be opened raw."""


class _StatementError(StorageError):
    """SQLite will not execute a statement, as for a collation that only another program has."""


class _Connection(sqlite3.Connection):
    """A connection whose statements wait for locks by polling, and raise this module's errors.

    SQLite's own busy handler backs off to 100 ms, so that a steady writer starves others, and holds
    Ctrl-C back; here a statement that finds the database locked is tried again every millisecond
    until `timeout` seconds have passed.
    """

    path: str
    timeout: float
    mode: str
    holder: _Ticket  # of a read connection: the ticket that uses it, or did last
    last_error = ""  # the text of the last error: it may have ended a transaction
    _execute = sqlite3.Connection.execute

    def query(
        self,
        sql: str,
        parameters: _Parameters = (),
        *,
        byte_limit: int | None = None,
        deadline: float | None = None,
    ) -> list[_Row]:
        """Execute a statement and return its rows.

        With a limit of bytes, the last is the one that exceeds it, so that there is at least one.
        The deadline for locks begins with the first one that is met, unless it is given.
        """
        while True:
            try:
                # No frame holds the cursor: an interrupt's traceback would keep it, and an
                # unfinished cursor pins its snapshot, and with it the write-ahead log.
                if byte_limit is None:
                    return self._execute(sql, parameters).fetchall()
                return [*takewhile(_byte_limit(byte_limit), self._execute(sql, parameters))]
            except _SQLITE_ERRORS as error:
                deadline = self._wait_or_raise(error, deadline)

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Execute a statement and return its cursor, as `sqlite3` does."""
        deadline = None  # as `with_retries`, written out: every write passes here
        while True:
            try:
                return self._execute(sql, parameters)
            except _SQLITE_ERRORS as error:
                deadline = self._wait_or_raise(error, deadline)

    def with_retries(self, action: Callable[..., R], *arguments: Any) -> R:
        """Call a method of the connection, waiting for locks and raising this module's errors."""
        deadline = None
        while True:
            try:
                return action(*arguments)
            except _SQLITE_ERRORS as error:
                deadline = self._wait_or_raise(error, deadline)

    def _wait_or_raise(self, error: Exception, deadline: float | None) -> float:
        """Sleep a moment and return the deadline if others hold a lock; else raise our error."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            translated = _translate_error(error, self.path)
            self.last_error = str(translated)  # the error itself would keep its callers' frames
            raise translated from None
        deadline = deadline or time.monotonic() + self.timeout
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{self.path}: a lock was not free within the {self.timeout:g} s that this call may"
                " wait; try again"
            ) from None
        time.sleep(_POLL_INTERVAL)
        return deadline

    def pragma(self, name: str) -> Any:
        """Return the one value of a pragma, text as str; `name=value` sets it first."""
        value = self.query(f"PRAGMA {name}")[0][0]
        return value.decode() if isinstance(value, bytes) else value

    def checkpoint(self, mode: str, *, wait_for_readers_ms: int = 0) -> None:
        """Move the write-ahead log into the file, as far as readers allow it.

        `mode` is FULL or TRUNCATE (https://www.sqlite.org/pragma.html#pragma_wal_checkpoint), never
        PASSIVE: these two take the write lock, and before SQLite 3.51.3 a commit that begins the
        log anew while a checkpoint runs without it can be lost
        (https://www.sqlite.org/wal.html#walresetbug).
        """
        try:
            self.query(f"PRAGMA busy_timeout={wait_for_readers_ms}")
            self.query(f"PRAGMA wal_checkpoint({mode})")
        finally:
            self.query("PRAGMA busy_timeout=0")

    def release_pages(self, count: int) -> int:
        """Give unused pages back to the file system; return how many are unused then."""
        # through execute() this would release a single page, whatever its argument
        self.with_retries(self.executescript, _RELEASE_PAGES.format(count))
        return int(self.pragma("freelist_count"))


_SQLITE_ERRORS = (sqlite3.Error, OverflowError, UnicodeError)


def _byte_limit(limit: int) -> Callable[[_Row], bool]:
    """Return a predicate for `takewhile` that ends after the row which exceeds the limit."""

    def is_within(row: _Row) -> bool:
        nonlocal limit
        has_room = limit >= 0
        limit -= sum(len(column) for column in row if isinstance(column, bytes))
        return has_room

    return is_within


_DAMAGED = f"{{path}} is damaged ({{error}}): {_REPAIR}"
_UNREADABLE = f"{{path}} cannot be opened any more ({{error}}): {_MOVE_ASIDE}"
_TOO_LARGE = "the record is larger than SQLite can store: 1,000,000,000 bytes as JSON"
# By SQLite's primary result code (https://www.sqlite.org/rescode.html), or the exception's type.
_ERRORS: dict[int | type[Exception], tuple[type[OperatorDbError], str]] = {
    sqlite3.SQLITE_CORRUPT: (DamagedError, _DAMAGED),
    sqlite3.SQLITE_NOTADB: (_NotSqliteError, _UNREADABLE),
    sqlite3.SQLITE_ERROR: (_StatementError, "{path}: {error} ({name})"),
    sqlite3.SQLITE_CONSTRAINT: (_StatementError, "{path}: {error} ({name})"),
    sqlite3.SQLITE_FULL: (StorageError, "{path}: the disk is full; nothing was stored"),
    sqlite3.SQLITE_READONLY: (StorageError, "{path} cannot be written ({error})"),
    sqlite3.SQLITE_CANTOPEN: (StorageError, "{path} cannot be opened: {reason}"),
    sqlite3.SQLITE_TOOBIG: (InvalidRecordError, _TOO_LARGE),
    sqlite3.DataError: (InvalidRecordError, _TOO_LARGE),
    OverflowError: (InvalidRecordError, _TOO_LARGE),
    UnicodeEncodeError: (InvalidRecordError, "text must be valid Unicode, no lone surrogates"),
    UnicodeDecodeError: (DamagedError, f"{{path}} is damaged (its schema is not text): {_REPAIR}"),
    sqlite3.ProgrammingError: (ClosedError, "{path}: the connection is closed ({error})"),
}


def _translate_error(error: Exception, path: str) -> OperatorDbError:
    """Return this module's error for one that `sqlite3` has raised."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    kind, message = (
        _ERRORS.get(code) or _ERRORS.get(type(error)) or (StorageError, "{path}: {error} ({name})")
    )
    reason = _reason_not_opened(path) if code == sqlite3.SQLITE_CANTOPEN else ""
    return kind(message.format(path=path, error=error, name=name, reason=reason))


def _reason_not_opened(path: str) -> str:
    """Return why SQLite could not open a file or its log, which it does not say."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))  # fails when there are too many open files
        os.stat(path)
    except OSError as error:
        return str(error.strerror)
    if os.access(path, os.R_OK):
        return "its -wal needs a directory that may be written"
    return os.strerror(errno.EACCES)


def _connect(path: str, timeout: float, *, mode: str = "rw", durable: bool = True) -> _Connection:
    """Open a connection.

    `mode` is rw, ro or immutable (https://www.sqlite.org/uri.html), or query_only: rw that cannot
    write a record, but may take part in the write-ahead log.
    """
    uri = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    if os.name == "nt":
        uri = "/" + uri.replace("\\", "/")
    uri = f"file:{uri}?mode=" + {"immutable": "ro&immutable=1", "query_only": "rw"}.get(mode, mode)
    try:
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
    except sqlite3.Error as error:
        raise _translate_error(error, path) from None
    connection.path, connection.timeout = path, timeout
    connection.mode = mode
    # damaged text must reach the checksum, and not fail to decode on the way
    connection.text_factory = bytes
    settings = ["cell_size_check=ON", "trusted_schema=OFF"]
    if mode == "rw":
        settings += [
            f"synchronous={'FULL' if durable else 'NORMAL'}",
            "fullfsync=ON",
            "checkpoint_fullfsync=ON",
            "secure_delete=ON",
            f"journal_size_limit={_WAL_KEPT_BYTES}",
            "wal_autocheckpoint=0",  # SQLite's own is PASSIVE: see `checkpoint`
        ]
    else:
        settings.append("query_only=ON")
    try:
        for setting in settings:
            connection.query(f"PRAGMA {setting}")
    except BaseException:
        connection.close()
        raise
    return connection


def _reading_mode(path: str) -> str:
    """Return the mode that reads a database without changing a byte of it or of its WAL.

    Where there is no WAL, any connection creates one. A read-only connection would leave it behind,
    and fails in a directory that may not be written; a query_only one removes it when it closes.
    """
    if os.path.exists(path + "-wal"):
        return "ro"
    may_write = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
    return "query_only" if may_write else "immutable"


# ==== Schema: what a file must look like; inspection, creation, migration =========================

APPLICATION_ID = 0x41474E43  # "AGNC", https://www.sqlite.org/pragma.html#pragma_application_id
# Both texts stand in every file and are compared byte by byte, so changing one is a migration.
_CREATE_TABLE = (
    'CREATE TABLE "{0}"(key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL,'
    " status TEXT, at INTEGER, crc INTEGER NOT NULL)"
)
_CREATE_INDEX = 'CREATE INDEX "{0}_status_at" ON "{0}"(status, at)'
_OUR_TABLES = ("tasks", "sessions", "session_log", "proofs", "config", "_namespaces")
# What the columns hold:  status                     at
#   tasks                 the task's status          completion, or else the claim
#   sessions              NULL                       last activity
#   session_log           the name of the log        the entry's number in it
#   proofs                'true' once submitted      when it was made
#   config                NULL                       NULL
#   _namespaces           NULL                       NULL
_SELECT_DEFINITIONS = "SELECT type, name, tbl_name, sql FROM sqlite_master"
_SELECT_TABLES = "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"


def _row_checksum(key: bytes, value: bytes, status: bytes | None, at: int | None) -> int:
    """Return the checksum of a row: CRC-32 of its columns and then its value.

    No two rows give the same bytes: a key holds no NUL, the age is an int or None, and the length
    tells where the status ends (-1: there is none). "agenc/2" is the name of this form.
    """
    length = -1 if status is None else len(status)
    columns = b"agenc/2\0%b\0%a\0%d\0%b" % (key, at, length, status or b"")
    return crc32(value, crc32(columns))


# ---- the steps from each schema version to the next; frozen, since later versions run them too

_VERSION_1_TABLES = ("tasks", "sessions", "session_log", "proofs", "config")
_WRONG_CHECKSUM = -1  # CRC-32 is never negative
# What version 1 read from a record of these tables: its id, its status, and its age.
_VERSION_1_COLUMNS: dict[str, Callable[[_Json], tuple[str, str | None, int | None]]] = {
    "tasks": lambda task: (
        task["task_id"],
        task["status"],
        task["claimed_at"] if task["completed_at"] is None else task["completed_at"],
    ),
    "sessions": lambda session: (session["session_id"], None, session["last_active"]),
    "session_log": lambda entry: (f"{entry['log']}:{entry['seq']}", entry["log"], entry["seq"]),
    "proofs": lambda proof: (
        proof["task_id"],
        "true" if proof["submitted"] else "false",
        proof["timestamp"],
    ),
    "config": lambda _: ("operator", None, None),
}
_SELECT_ROWS_AFTER = (
    "SELECT rowid, key, value, status, at, crc, typeof(key), typeof(value), typeof(status)"
    ' FROM "{0}" WHERE rowid > ? ORDER BY rowid LIMIT 1000'
)
_SELECT_ROW = _SELECT_ROWS_AFTER.replace("> ? ORDER BY rowid LIMIT 1000", "= ?")
_SELECT_ROW_NUMBERS = 'SELECT rowid FROM "{0}" INDEXED BY "{1}"'
_SET_CHECKSUM = 'UPDATE "{0}" SET crc = ? WHERE rowid = ?'


def _create_version_1(connection: _Connection, _: _Connection, __: Progress | None) -> None:
    for table in _VERSION_1_TABLES:
        connection.query(_CREATE_TABLE.format(table))
        connection.query(_CREATE_INDEX.format(table))


def _migrate_to_version_2(
    connection: _Connection, reader: _Connection, progress: Progress | None
) -> None:
    """Let checksums cover whole rows; add the table of what the operator's namespaces declare."""
    tables = _tables_like_ours(reader.query)
    connection.query(_CREATE_TABLE.format("_namespaces"))
    connection.query(_CREATE_INDEX.format("_namespaces"))
    total = done = 0
    with suppress(DamagedError):
        for table in tables:
            total += reader.query(f'SELECT count(*) FROM "{table}"')[0][0]
    for table in tables:
        for count in _set_checksums(connection, reader, table):
            done += count
            if progress is not None:
                progress(done, total)


def _set_checksums(connection: _Connection, reader: _Connection, table: str) -> Iterator[int]:
    """Give each row of a table its checksum of version 2, and yield how many rows are done.

    Rows on a page that cannot be read keep what they have, which is none of version 2. They are
    looked for by the reader, because a transaction that has met a damaged page can write no more.
    """
    last = -(2**63)
    set_checksum = _SET_CHECKSUM.format(table)
    try:
        while rows := reader.query(
            _SELECT_ROWS_AFTER.format(table), (last,), byte_limit=_BATCH_BYTES
        ):
            for row_number, *row in rows:
                connection.execute(set_checksum, (_version_2_checksum(table, row), row_number))
            last = rows[-1][0]
            yield len(rows)
    except DamagedError:
        row_numbers = set[int]()
        for index in (f"{table}_status_at", f"sqlite_autoindex_{table}_1"):
            with suppress(DamagedError):
                found = reader.query(_SELECT_ROW_NUMBERS.format(table, index))
                row_numbers.update(number for (number,) in found if number > last)
        for row_number in row_numbers:
            with suppress(DamagedError):
                for _, *row in reader.query(_SELECT_ROW.format(table), (row_number,)):
                    connection.execute(set_checksum, (_version_2_checksum(table, row), row_number))
            yield 1


def _version_2_checksum(table: str, row: list[Any]) -> int:
    """Return the checksum of a row of version 1; a certainly wrong one if the row is damaged.

    The columns of our own tables are computed from the value. Where they are not those stored, the
    value is still found to be whole, and the row to be damaged.
    """
    key, value, status, at, crc, *kinds = row
    try:
        if crc32(value) != crc or kinds[:2] != [b"text", b"text"] or kinds[2] == b"blob":
            return _WRONG_CHECKSUM
        stored = _row_checksum(key, value, status, at)
        if table not in _VERSION_1_COLUMNS:
            return stored
        record_id, wanted_status, wanted_at = _VERSION_1_COLUMNS[table](json.loads(value))
        wanted = (
            f"{table}:{record_id}".encode(),
            value,
            None if wanted_status is None else wanted_status.encode(),
            wanted_at,
        )
        if wanted == (key, value, status, at):
            return stored
        computed = _row_checksum(*wanted)
        return _WRONG_CHECKSUM if computed == stored else computed
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return _WRONG_CHECKSUM


_MIGRATIONS: tuple[Callable[[_Connection, _Connection, Progress | None], None], ...] = (
    _create_version_1,
    _migrate_to_version_2,
)
"""The steps from each schema version to the next, the first from an empty file to version 1.

Their number is the version that this module writes. A step gets the connection that the migration's
transaction is open on, and one that reads the file as it was before.
"""


# ---- inspection: nothing here changes a byte of a file


def _validate_schema(connection: _Connection) -> int:
    """Return the schema version of an open file, 0 for an empty one.

    Raises ForeignFileError for a file that is not ours, or has tables, triggers or views that are
    not as this module makes them, and NewerSchemaError.
    """
    path = connection.path
    if connection.pragma("encoding") != "UTF-8":  # text that comes back as bytes would not be ours
        raise ForeignFileError(f"{path} is encoded in UTF-16, not UTF-8; nothing was changed")
    application_id = connection.pragma("application_id")
    version = int(connection.pragma("user_version"))
    if application_id == 0 and version == 0:
        if not connection.query(_READ_ANYTHING):
            return 0
        raise ForeignFileError(
            f"{path} is an SQLite database of another application; nothing was changed"
        )
    if application_id != APPLICATION_ID or version < 1:
        raise ForeignFileError(
            f"{path} is another application's (id {application_id:#x}); nothing was changed"
        )
    if version > len(_MIGRATIONS):
        raise NewerSchemaError(
            f"{path} has schema version {version}, this module knows {len(_MIGRATIONS)}:"
            " update operator_db.py; nothing was changed"
        )
    if version == len(_MIGRATIONS):
        definitions = _read_definitions(connection.query, path)
        for table in _OUR_TABLES:
            if not _validate_table(definitions, path, table):
                raise ForeignFileError(f"{path} has no table {table}; nothing was changed")
    return version


_Definition = tuple[bytes, bytes, bytes, bytes]  # type, name, table, sql


def _read_definitions(query: Callable[..., list[_Row]], path: str) -> list[_Definition]:
    """Return what the file defines; raise ForeignFileError for a row that SQLite never writes.

    SQLite goes by the sql of a row of sqlite_master alone. A row whose type ended in a NUL, or was
    in capitals, hid from others a trigger that deleted every proof.
    """
    definitions = []
    for kind, name, table, sql in query(_SELECT_DEFINITIONS):
        names = (name, table)
        is_plain = all(type(each) is bytes and b"\0" not in each for each in names)
        if kind not in (b"table", b"index", b"view", b"trigger") or not is_plain:
            what = _truncated_repr((kind, name, table))
            raise ForeignFileError(
                f"{path}: its schema has a row {what}, which SQLite never writes; nothing was"
                " changed"
            )
        if sql is not None:  # it is for the index of a primary key
            definitions.append((kind, name, table, sql))
    return definitions


def _validate_table(definitions: list[_Definition], path: str, table: str) -> bool:
    """Return whether the table exists; raise ForeignFileError unless it is as we create it.

    Whatever is attached to it is looked at too: a trigger or view that names our table changes what
    a write does, and one that somebody planted could delete every proof.
    """
    table_name, index_name = table.encode(), f"{table}_status_at".encode()
    wanted = {
        (b"table", table_name, _CREATE_TABLE.format(table).encode()),
        (b"index", index_name, _CREATE_INDEX.format(table).encode()),
    }
    found = {
        (kind, name, sql)
        for kind, name, attached_to, sql in definitions
        if table_name in (name.lower(), attached_to.lower())
        or name == index_name
        or (kind in (b"trigger", b"view") and table_name in _words(sql))
    }
    if found and found != wanted:
        kind, name, _ = min(wanted ^ found)
        what = _truncated_repr(f"{kind.decode(errors='replace')} {name.decode(errors='replace')}")
        raise ForeignFileError(
            f"{path}: {what} is not as operator_db makes it; nothing was changed"
        )
    return bool(found)


def _words(sql: bytes) -> set[bytes]:
    """Return the words of an SQL text, a name in quotes among them, in lower case."""
    return {*re.findall(rb"\w+", sql.lower())}


def _tables_like_ours(query: Callable[..., list[_Row]]) -> list[str]:
    """Return the names of the tables that are defined as this module defines its own, sorted."""
    template, found = _CREATE_TABLE.encode(), []
    for name, sql in query(_SELECT_TABLES):
        if sql == template.replace(b"{0}", name):
            with suppress(UnicodeDecodeError):
                found.append(name.decode())
    return found


def _inspect_file(path: str, timeout: float) -> int | None:
    """Return the schema version of the file at a path: 0 if empty, None where there is no file.

    Raises ForeignFileError, NewerSchemaError, DamagedError or StorageError for a file that is not
    to be opened.
    """
    try:
        before = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(before.st_mode):
        raise ForeignFileError(f"{path} is not a regular file")
    if before.st_nlink > 1 and _has_second_name(path):
        raise StorageError(
            f"{path} has a second name (a hard link). Each name would have a write-ahead log of its"
            " own, and what is written under one would be lost under the other: remove the other,"
            " or make a copy"
        )
    if before.st_size == 0 and (_file_size(path + "-wal") or _has_hot_journal(path)):
        # SQLite would take it for a new database, and delete the log
        raise DamagedError(
            f"{path} is empty, and the -wal or -journal beside it is all that is left of it;"
            " nothing was changed. Move both aside, and `restore` makes a new one of a backup"
        )
    # SQLite takes a file of one byte for an empty database, and would overwrite it
    if 0 < before.st_size < 512:
        raise ForeignFileError(
            f"{path} holds {before.st_size} bytes: not SQLite; nothing was changed"
        )
    try:
        return _inspect_with_sqlite(path, timeout)
    except DamagedError as error:
        with _translate_os_errors(path):
            after = os.stat(path)
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            return _inspect_file(path, timeout)  # a checkpoint went on beneath an immutable read
        if isinstance(error, _NotSqliteError):
            raise _identify_foreign_file(path) or DamagedError(str(error)) from None
        # repair() needs an open database
        raise DamagedError(str(error).replace(_REPAIR, _MOVE_ASIDE)) from None


def _inspect_with_sqlite(path: str, timeout: float) -> int:
    # Never read-write before the file is known to be ours: that would checkpoint and delete another
    # application's WAL. Immutable takes no lock, so it is for a file without a WAL only.
    mode = "ro" if _file_size(path + "-wal") else "immutable"
    with closing(_connect(path, timeout, mode=mode)) as connection:
        connection.query(_BEGIN_READ)  # one state of the file for all that is read
        version = _validate_schema(connection)
        whole = connection.pragma("page_count") * connection.pragma("page_size")
        if not _file_size(path + "-wal") and (size := _file_size(path)) < whole:
            raise DamagedError(f"{path} is cut short: {size} of {whole} bytes; {_MOVE_ASIDE}")
        return version


# ---- creation and migration


def _ensure_wal_mode(connection: _Connection) -> None:
    """Take a database into WAL mode, also one that another program has taken out of it."""
    if connection.pragma("journal_mode") == "wal":  # asked first: setting it takes locks
        return
    if connection.pragma("journal_mode=WAL") != "wal":
        raise StorageError(
            f"{connection.path}: this file system does not support SQLite's write-ahead log"
        )


def _raise_if_log_without_database(path: str) -> None:
    """Raise StorageError where a log of a lost database would be played into a new one."""
    for suffix in ("-wal", "-journal"):
        if _file_size(path + suffix) and not os.path.lexists(path):
            raise StorageError(
                f"{path}{suffix} is there without its database: put the database back, or move the"
                f" {suffix} away"
            )


def _create_database(
    path: str, timeout: float, fill: Callable[[str], object] | None = None
) -> bool:
    """Make a complete new database appear at a path; return False if another one is there first.

    It is built under a temporary name, where `fill` may put records into it, and closed before it
    gets its own: a file that was created where it stands would be opened by others while it is half
    made, and closing the descriptor of a file that another thread has open by then would drop that
    thread's locks.
    """
    _raise_if_log_without_database(path)
    with _translate_os_errors(f"cannot create {path}"):
        _make_private_directory(os.path.dirname(path))
        with _temporary_file(path) as temporary:
            _migrate(temporary, timeout, final_path=path)
            if fill is not None:
                fill(temporary)
            # SQLite keeps to itself that a checkpoint on closing has failed
            is_complete = not _file_size(temporary + "-wal")
            if not is_complete or _inspect_file(temporary, timeout) != len(_MIGRATIONS):
                raise StorageError(f"{path} could not be written completely: is the disk full?")
            _raise_if_log_without_database(path)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # no hard links here (Android, FAT)
                # Its descriptor is never closed, because of the locks named above. An empty file
                # is migrated from version 0; one with records replaces it.
                try:
                    os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                except FileExistsError:
                    return False
                if fill is not None:
                    os.replace(temporary, path)
        _sync_directory(path)
        return True


def _migrate(
    path: str,
    timeout: float,
    *,
    final_path: str,
    keep_snapshot: bool = True,
    progress: Progress | None = None,
) -> None:
    """Bring an empty or older file to the present schema, in one transaction.

    Of several processes, one migrates and the others find it done: the write lock is taken before
    the version is looked at. An older file is copied first, unless it is a copy itself; a step that
    fails leaves it as it was.
    """
    connection = _connect(path, timeout)
    connection.path = final_path  # in errors
    try:
        if not connection.query(_READ_ANYTHING):
            # before journal_mode, or it silently stays off
            connection.query(_SET_AUTO_VACUUM)
            if connection.pragma("page_count"):
                connection.query(_VACUUM)  # it takes effect in a file with pages by this alone
        _ensure_wal_mode(connection)
        connection.query(_BEGIN_WRITE)
        version = _validate_schema(connection)
        if 0 < version < len(_MIGRATIONS):
            # every page is written to the WAL, and the snapshot is as large as the file
            size = _file_size(path)
            _require_space(path, 2 * size if keep_snapshot else size, f"to migrate {final_path}")
            if keep_snapshot:
                _snapshot_before_migration(path, timeout, version)
        with closing(_connect(path, timeout, mode="query_only")) as reader:
            for step in _MIGRATIONS[version:]:
                step(connection, reader, progress)
        connection.query(f"PRAGMA application_id={APPLICATION_ID}")
        connection.query(f"PRAGMA user_version={len(_MIGRATIONS)}")
        _validate_schema(connection)  # nothing attached to an older file may live on in this one
        connection.query(_COMMIT)
        connection.checkpoint("TRUNCATE")  # close() would not report a full disk
    except DamagedError as error:  # repair() needs an open database
        raise DamagedError(str(error).replace(_REPAIR, _MOVE_ASIDE)) from None
    finally:
        connection.close()  # rolls back what was not committed


def _snapshot_before_migration(path: str, timeout: float, version: int) -> None:
    """Copy the file to `PATH.v{version}.bak` while the caller holds the write lock."""
    with (
        _write_atomically(f"{path}.v{version}.bak", overwrite=True) as temporary,
        closing(_connect(path, timeout, mode="query_only")) as source,
        closing(_connect(temporary, timeout)) as target,
    ):
        source.with_retries(lambda: source.backup(target))


# ==== Store: who may use which connection, and when ===============================================

# One file has one write connection and a pool of read connections. Writers stand in a queue, first
# come first served, and each uses the write connection for one transaction. Each reader checks a
# connection out of the pool, because a connection that two threads use at once returns another
# row's data, or crashes the interpreter (https://github.com/python/cpython/issues/118172). Tickets
# record who may use which connection. A fork or close() waits until no ticket that has its turn is
# in force, and then closes the connections.
#
# A user's transaction() stands in a context variable, so that the verbs within it join it. A verb's
# own transaction or snapshot does not: the verb hands it on, as a unit of work, to the namespace
# methods that it is made of. So code that interrupts a verb in its own thread (a signal handler, a
# finalizer) never gets into the middle of it. It may read, and sees what was committed last; a
# write is refused at once. Between two verbs of a block it is like a line of the block: what it
# writes becomes part of it. A function that a verb calls (`change`, `keep`, `progress`) may read,
# too, and sees what the transaction has done so far, if that is a user's.

_CHECKPOINT_BYTES = 4 * 2**20  # how much longer the WAL may have become since a checkpoint
_CHECKPOINT_WRITES = 1_000  # statements between two, for a WAL that starts over keeps its size
_PAGES_PER_STEP = 500  # how many are copied, or given back to the file system, at a time
_PAUSE_FOR_OTHERS = 0.002  # seconds; other processes look for the write lock every millisecond
_LONG_WRITE = 0.01  # seconds, after which a writer lets others in
_VERIFY_INTERVAL = 0.5  # seconds between the reads that look whether the file was replaced


class _Ticket:
    """A thread's request to use a connection, for one transaction or for its reads.

    It waits at first, and is granted when `has_turn` is set. CPython can raise KeyboardInterrupt at
    any call, so no code of ours can be relied on to give back what was granted. A ticket ends by
    itself:

    1. Its holder enters `with ticket.in_force:`, a lock that nobody else ever takes. An interrupt
       before that leaves a ticket that was never in force.
    2. A writer's ticket joins the queue; a reader's is noted on the connection that it uses. An
       interrupt after that leaves the ticket where others look.
    3. Others pass over tickets that are not in force, and drop them from the queue.
    4. The holder leaves the with statement, at its end or by an interrupt anywhere in it. Releasing
       a lock is one call into C, which an interrupt cannot split: the ticket is not in force any
       more, whether or not a line of ours was executed afterwards.

    If a second interrupt lands before the rollback that follows the first, SQLite's transaction
    stays open, and is rolled back by the next writer of this process (`_take_writer`).

    In 37,515 interrupts at random moments of stores, blocks, nested blocks and reads no lock stayed
    held and no acknowledged write was lost.
    """

    has_turn = False  # granted; it stays so, and counts only while the ticket is in force
    connection: _Connection | None = None
    tokens: deque[Token[_Ticket | None]] | None = None  # one, of the context that opened its block
    savepoints = 0  # how many its transaction has had

    # Two more locks of a user's transaction, which end by themselves as `in_force` does: locked
    # while a verb that has joined it is at work, and while that calls a function of the user's.
    in_verb: threading.Lock
    in_callback: threading.Lock

    def __init__(self, timeout: float, *, writes: bool) -> None:
        self.in_force = threading.Lock()
        # Released by the writer before it in the queue, to end its sleep early. No Event, because
        # that is Python code, which an interrupt can split. It is not locked at first, so a writer
        # looks twice before it sleeps.
        self.wake = threading.Lock()
        self.in_verb, self.in_callback = threading.Lock(), threading.Lock()
        self.thread = threading.get_ident()
        self.deadline = time.monotonic() + timeout
        self.writes = writes


class _InterruptSafeContext:
    """A context manager made of a generator, which is closed however its with statement is left.

    Only the with statement's own stack has a strong reference to the generator. So unwinding that
    stack closes the generator, even while somebody keeps the exception.

    `contextlib.contextmanager` does not do that. If KeyboardInterrupt lands in the code of
    contextlib, the exception's traceback refers to its frames, and they to the generator: the
    transaction stays open for as long as somebody handles or keeps the exception. In 21,313
    interrupts, 161 acknowledged writes that were made meanwhile were rolled back with it. Here:

    1. `with` looks up `__exit__` before it calls `__enter__`. The descriptor `_Exit` moves the
       strong reference from this object into the function that it returns, which the with
       statement keeps on its stack.
    2. `with` calls `__enter__`, which starts the generator. An interrupt there closes it.
    3. At the end of the statement, `with` calls that function, which resumes the generator.
    4. If an interrupt lands before any line of that function is executed, the stack of the with
       statement is unwound all the same. The reference goes with it, and Python closes the
       generator: its `except` clauses undo the transaction, however long somebody keeps the
       exception.

    24,672 interrupts lost none. This relies on CPython, which looks up `__exit__` before it calls
    `__enter__`, and counts references. A `contextlib.ExitStack` refers to this object itself, and
    so there the generator ends as contextlib's does.
    """

    def __init__(self, generator: Generator[Any, None, None]) -> None:
        self.strong: Generator[Any, None, None] | None = generator  # until step 1
        self.weak = weakref.ref(generator)
        self.was_entered = False

    def __enter__(self) -> Any:
        was_entered, self.was_entered = self.was_entered, True
        generator = self.weak()
        if was_entered or generator is None:
            raise ConflictError("this block has been used: call transaction() for each")
        try:
            return next(generator)
        except BaseException:
            generator.close()
            raise

    class _Exit:
        """`__exit__` as a descriptor: the function that it returns owns the generator."""

        def __get__(self, context: _InterruptSafeContext | None, owner: object) -> Any:
            if context is None:  # contextlib.ExitStack looks methods up on the class
                return lambda context, *error: _leave_generator(context.weak, *error)
            # a partial, because a function of Python's would leave its frame in the traceback
            leave: Any = partial(_leave_generator, context.weak)
            # never read: it keeps the generator for as long as the with statement keeps `leave`
            leave.generator, context.strong = context.strong, None
            return leave

    __exit__ = _Exit()


def _leave_generator(
    weak: Any, kind: object, error: BaseException | None, traceback: object
) -> bool:
    """Resume a generator to its end, throwing the error of the with statement into it."""
    # from this strong reference on, the generator is resumed with no call of ours in between
    generator = weak()
    if error is None:
        next(generator, None)
        return False
    try:
        generator.throw(error)
    except BaseException as raised:
        # a StopIteration that passes through a generator becomes a RuntimeError's cause (PEP 479)
        if raised is not error and raised.__cause__ is not error:
            raise
    finally:
        # ends the cycle of this frame, the error and its traceback, which refers to this frame
        del error, traceback
    return False


def _interrupt_safe_context(
    function: Callable[..., Generator[Any, None, None]],
) -> Callable[..., AbstractContextManager[Any]]:
    """Make a generator function return a context manager, as contextlib.contextmanager does."""

    @wraps(function)
    def make(*arguments: Any, **options: Any) -> Any:
        return _InterruptSafeContext(function(*arguments, **options))

    return make


_stores: weakref.WeakSet[_Store] = weakref.WeakSet()  # of this process
_stores_lock = threading.RLock()
# (device, inode) of each file that a connection inherited by this child is open to
_inherited_files: set[tuple[int, int]] = set()
# What the hooks at the end of this room leave for each other; each holds identifiers of threads.
_fork_lock = threading.RLock()  # owned by the thread whose fork is prepared
_forking_threads: set[int] = set()  # those that prepare a fork, or wait for their turn to
_forks_coming: set[int] = set()  # from now on no writer begins
_forks_stopping_readers: set[int] = set()  # from now on no reader begins
_forks_prepared: set[int] = set()  # nobody is at work any more
_forks_waited_for: set[int] = set()  # they are prepared, or others were at work for too long
_forks_interrupted: set[int] = set()  # KeyboardInterrupt is due when they are done
_unusable_reasons: list[str] = []  # why a child cannot use any database
_UNPREPARED = "cannot be used here: this process was forked while a database was in use"
_UNFINISHED = "cannot be used here: Ctrl-C has interrupted how this process was forked"


class _UnitOfWork:
    """The transaction or snapshot of one verb; namespaces read and write through it."""

    def __init__(self, store: _Store, ticket: _Ticket) -> None:
        self.store, self.ticket = store, ticket

    def read(
        self, sql: str, parameters: _Parameters = (), *, byte_limit: int | None = None
    ) -> list[_Row]:
        """Return rows as this unit sees them."""
        connection = self.store.require_active(self.ticket)
        return connection.query(sql, parameters, byte_limit=byte_limit)

    def write(self, sql: str, parameters: _Row = ()) -> int:
        """Execute a statement that changes rows, as a part of this unit; return how many."""
        self.store.writes += 1
        return self.store.require_active(self.ticket).execute(sql, parameters).rowcount

    def snapshot(self) -> AbstractContextManager[_UnitOfWork]:
        """Return this unit, for a verb that is a part of it."""
        return nullcontext(self)

    unit_of_work = snapshot

    def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """Call a function of the user's, which may read and not write."""
        is_nested = self.ticket.in_callback.locked()
        with nullcontext() if is_nested else self.ticket.in_callback:
            return function(*arguments)


class _OvertakenError(Exception):
    """Others have committed since the snapshot that is to replace everything."""


class _Store:
    """The connections of one database file, shared by threads, contexts and processes."""

    def __init__(
        self,
        path: str,
        *,
        create: bool,
        read_only: bool,
        durable: bool,
        timeout: float,
        allow_older: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.path, self.read_only, self.durable, self.timeout = path, read_only, durable, timeout
        self.latencies: dict[str, Latency] = {}  # of what this process has done, by operation
        # the ticket of the user's transaction that the present context is in
        self._current: ContextVar[_Ticket | None] = ContextVar("operator_db", default=None)
        self._identity: tuple[int, int] | None = None  # the file's, when it was opened
        self._closed_reason = ""  # why every call is refused
        self._replaced = ""  # how the file was found to be replaced; final, too
        self._reset_state()
        with _stores_lock:
            _stores.add(self)
        if _unusable_reasons:
            raise ConflictError(f"{path} {_unusable_reasons[0]}")
        ticket = _Ticket(timeout, writes=True)  # a writer's, so that a fork waits for the opening
        try:
            with ticket.in_force:
                self._wait_for_turn(ticket)
                self._open(create and not read_only, allow_older, progress)
        except BaseException:
            self._closed_reason = "could not be opened"  # its file is a plain one again
            self._close_connections()
            raise

    def _reset_state(self) -> None:
        """Begin with no connection and nobody waiting: at first, and in a forked child."""
        self._mutex = threading.RLock()  # reentrant for the sake of signal handlers
        self._queue: deque[_Ticket] = deque()  # of writers
        self._read_connections: list[_Connection] = []
        # Each thread's tickets: `reader`, of its single reads, by which it finds its connection
        # again; `outer`, of its outermost transaction or snapshot. While either is in force, the
        # thread is in a call already, and what asks has interrupted that.
        self._local = threading.local()
        self._write_connection: _Connection | None = None
        self._log_identities: dict[str, tuple[int, int]] = {}  # of the WAL and the -shm, by path
        self._verify_at = 0.0  # when a read looks at the files again
        self.writes = 0  # statements since the last checkpoint
        self._wal_size = 0  # bytes, after the last checkpoint
        self._closing: _Ticket | None = None  # in force while close() waits for work in flight

    # ---- opening

    def _open(self, create: bool, allow_older: bool, progress: Progress | None) -> None:
        _raise_if_inherited(self.path)
        for other in _all_stores():
            if other.path == self.path and other._is_split():
                other._verify_files()
        if self.read_only and _has_hot_journal(self.path):
            raise StorageError(
                f"{self.path}: another program has not ended its transaction (-journal): try"
                " again, or open it for writing once"
            )
        version = _inspect_file(self.path, self.timeout)
        if not version and not create:
            what = "there is no database" if version is None else "the file is empty"
            mode = "a read-only open" if self.read_only else "create=False"
            raise StorageError(f"{self.path}: {what}, and {mode} creates none")
        if self.read_only:
            if cast(int, version) < len(_MIGRATIONS) and not allow_older:
                raise StorageError(
                    f"{self.path} has schema version {version}: open it for writing once, as the"
                    " operator does, or `python operator_db.py compact`"
                )
        elif version is None:
            _create_database(self.path, self.timeout)
            version = _inspect_file(self.path, self.timeout)
        with _translate_os_errors(self.path):
            self._identity = _file_identity(self.path)
        if not self.read_only:
            if os.stat(self.path).st_nlink > 1:
                for name in _leftover_names(self.path):
                    with suppress(OSError):
                        os.unlink(name)
            _restrict_permissions(self.path)
            if version != len(_MIGRATIONS):
                _migrate(self.path, self.timeout, final_path=self.path, progress=progress)
            self._take_writer()

    def _take_writer(self) -> _Connection:
        """Return the write connection, in no transaction; to be called when it is one's turn."""
        if self.read_only:
            raise StorageError(f"{self.path} was opened read-only")
        if self._write_connection is not None:
            self._write_connection.rollback()  # what an interrupted holder left open
        else:
            connection = self._connect("rw")
            try:
                _ensure_wal_mode(connection)
                identities = self._identify_logs(connection)
            except BaseException:
                connection.close()
                raise
            # together: an interrupt between them would leave the identity of a WAL that is gone
            self._write_connection, self._log_identities = connection, identities
        return self._write_connection

    def _is_split(self) -> bool:
        """Whether some of the files, and not all, were replaced while this has them open.

        SQLite shares a -shm among the connections of a process, and would play an old WAL into a
        new database: nobody here may open the rest until this is closed.
        """
        lost = self._find_lost_files()[0] if self._connections() else []
        return 0 < len(lost) < 1 + len(self._log_identities)  # the one is the database itself

    def _identify_logs(self, connection: _Connection) -> dict[str, tuple[int, int]]:
        """Return the identities of the WAL and the -shm that a connection has open."""
        connection.query(_READ_ANYTHING)  # opens them, and makes them if needed
        identities = {}
        for name in (self.path + "-wal", self.path + "-shm"):
            with _translate_os_errors(name), suppress(FileNotFoundError):
                identities[name] = _file_identity(name)
        return identities

    def _connect(self, mode: str) -> _Connection:
        self._verify_files()
        _raise_if_inherited(self.path)
        return _connect(self.path, self.timeout, mode=mode, durable=self.durable)

    def _verify_files(self, consequence: str = "") -> int:
        """Raise FileReplacedError unless the files are those first opened; return the WAL's size.

        A WAL or -shm that was deleted or replaced splits those who have the file open in two, each
        of whom does not see what the other commits.
        """
        lost, wal_size = self._find_lost_files(consequence)
        if lost:
            self._replaced = f"{lost[0]} was replaced or removed"
            self._raise_replaced(consequence)
        return wal_size

    def _raise_replaced(self, consequence: str = "") -> NoReturn:
        raise FileReplacedError(
            f"{self._replaced}{consequence}: close each OperatorDb of it, and open it again"
        )

    def _find_lost_files(self, consequence: str = "") -> tuple[list[str], int]:
        """Return which files are not those first opened any more, and the WAL's size."""
        lost, size = [], 0
        for name, identity in ((self.path, self._identity), *self._log_identities.items()):
            try:
                status = os.stat(name)
                if (status.st_dev, status.st_ino) != identity:
                    lost.append(name)
                elif name.endswith("-wal"):
                    size = status.st_size
            except (FileNotFoundError, NotADirectoryError):
                lost.append(name)
            except OSError as error:  # a folder that may not be entered for a moment
                if error.errno is None:  # raised by a signal handler: TimeoutError is an OSError
                    raise
                raise StorageError(
                    f"{name} cannot be looked at{consequence}: {error.strerror}"
                ) from None
        return lost, size

    # ---- whose turn it is

    def _current_transaction(self) -> _Ticket | None:
        """Return the ticket of the user's transaction that this call stands in.

        It must have been opened by this thread, and in this very context.
        """
        ticket = self._current.get()
        if ticket is None or not ticket.tokens or ticket.thread != threading.get_ident():
            return None
        # A token can be reset only once, and in the context that made it. There is no other way to
        # ask whether this is that context, and not a copy for a task or worker begun in the block.
        try:
            self._current.reset(ticket.tokens[0])
            self._enter_context(ticket)
        except BaseException as error:
            if self._current.get() is not ticket:  # an interrupt, after the reset
                self._enter_context(ticket)
                raise
            # what a signal handler has raised has a frame of its own
            is_of_reset = error.__traceback__ is None or error.__traceback__.tb_next is None
            if is_of_reset and isinstance(error, (ValueError, RuntimeError)):
                return None  # another context; a token that was used already
            raise
        return ticket if ticket.in_force.locked() else None

    def _block_to_read(self) -> _Ticket | None:
        """Return the user's transaction that a read of this thread is a part of, if any.

        It is none while a verb is at work in it, unless that has called a function of the user's.
        """
        block = self._current_transaction()
        if block is None or (block.in_verb.locked() and not block.in_callback.locked()):
            return None
        return block

    def _block_to_join(self) -> _Ticket | None:
        """Return the user's transaction that a write of this thread is a part of, if any.

        Raises ConflictError while a verb is at work in it, for that would overwrite what is written
        now, or be overwritten by it.
        """
        block = self._current_transaction()
        if block is not None and block.in_verb.locked():
            raise ConflictError(
                "a write cannot interrupt another call of its thread: a signal handler, a finalizer"
                " and a function that is passed to a call may only read"
            )
        return block

    def require_active(self, ticket: _Ticket) -> _Connection:
        """Return the connection of a transaction; raise if that has ended."""
        connection = ticket.connection
        if connection is None:
            raise ClosedError(f"{self.path}: this transaction is that of the parent process")
        try:
            is_active = connection.in_transaction
        except sqlite3.ProgrammingError:  # it was closed
            is_active = False
        if not is_active:
            cause = connection.last_error or "it was rolled back"
            raise StorageError(
                f"an earlier error ended the transaction, nothing in it is stored: {cause}"
            )
        return connection

    def _raise_if_unusable(self) -> None:
        reason = _unusable_reasons[0] if _unusable_reasons else self._closed_reason
        if reason:
            raise ClosedError(f"{self.path} {reason}")
        if self._replaced:
            self._raise_replaced()

    def is_in_transaction(self) -> bool:
        """Whether this call stands in the thread's own transaction."""
        return self._current_transaction() is not None

    def raise_if_in_transaction(self, what: str) -> None:
        """Raise ConflictError inside the thread's own transaction."""
        if self.is_in_transaction():
            raise ConflictError(f"{what} inside a transaction: call it outside the block")

    def _has_interrupted_call(self, ticket: _Ticket | None = None) -> bool:
        """Whether this thread is in the middle of another call to this store than the ticket's."""
        outer_tickets = getattr(self._local, "reader", None), getattr(self._local, "outer", None)
        return any(
            outer is not None and outer is not ticket and outer.in_force.locked()
            for outer in outer_tickets
        )

    def _raise_if_would_deadlock(self) -> None:
        """Raise rather than wait for a call that cannot end while this thread waits for it."""
        inherited = self._current.get()
        if inherited is not None and inherited.in_force.locked():
            raise ConflictError(
                "a worker or task that was started inside a transaction can neither write nor"
                " close until that ends"
            )
        if self._has_interrupted_call():
            raise ConflictError(
                "this thread is at work on the database already: in a transaction that another"
                " coroutine has opened (a block must not await), or in a call that a signal handler"
                " or finalizer has interrupted, or that has called a function passed to it; these"
                " may only read"
            )

    def _must_pause(self, ticket: _Ticket) -> bool:
        """Whether new work has to wait for a fork or for close()."""
        if _forks_coming and (ticket.writes or _forks_stopping_readers):
            return True
        closer = self._closing
        return closer is not None and closer.in_force.locked()

    def is_mutex_mine(self) -> bool:
        """Whether this thread holds the mutex, so that it stops all others if it waits."""
        return bool(cast(Any, self._mutex)._is_owned())

    def _waits_for_itself(self) -> bool:
        """Whether it is this thread that forks or closes, interrupted by a signal handler."""
        closer, thread = self._closing, threading.get_ident()
        is_closing = closer is not None and closer.in_force.locked() and closer.thread == thread
        return is_closing or thread in _forks_coming

    def _wait_for_turn(self, ticket: _Ticket) -> None:
        """Wait until the ticket may use a connection; raise BusyError at its deadline.

        A writer waits until it is the first in the queue; a reader never queues. Both wait while a
        fork or close() is pending, unless their thread is at work already, which these wait for. A
        reader is given its connection here; a writer takes the write connection afterwards.
        """
        if ticket.writes:
            self._raise_if_unusable()
            self._raise_if_would_deadlock()
            self._local.outer = ticket
            with self._mutex:
                self._queue.append(ticket)
        may_ignore_pause = has_waited = False
        while True:
            with self._mutex:
                self._raise_if_unusable()
                ahead = self._drop_ended_and_count_ahead(ticket) if ticket.writes else 0
                if ahead == 0 and (may_ignore_pause or not self._must_pause(ticket)):
                    ticket.has_turn = True
                    if not ticket.writes:
                        # under the mutex, so that neither fork nor close() overlooks it
                        self._check_out_reader(ticket)
                    return
            # Asked while no mutex is held, because it takes that of every database. A call that was
            # interrupted may hold one, so that what interrupts it must not wait.
            if self._must_pause(ticket):
                may_ignore_pause = self._has_interrupted_call(ticket) or _is_at_work()
                if not may_ignore_pause and self._waits_for_itself():
                    raise ConflictError(f"{self.path}: this thread is forking, or closing it")
            if not has_waited and any(store.is_mutex_mine() for store in _all_stores()):
                raise ConflictError(
                    "what has interrupted a call to another database cannot wait for this one"
                )
            has_waited = True
            remaining = ticket.deadline - time.monotonic()
            if remaining <= 0:
                raise BusyError(
                    f"{self.path} was in use by other threads, a fork or close() for"
                    f" {self.timeout:g} s; try again"
                )
            # the further back, the longer: most are woken by the one before them
            ticket.wake.acquire(timeout=min(_POLL_INTERVAL * max(1, ahead), remaining))

    def _drop_ended_and_count_ahead(self, ticket: _Ticket) -> int:
        """Return how many writers, at most, stand before this one; the mutex is held."""
        while not self._queue[0].in_force.locked():
            self._queue.popleft()
        return 0 if self._queue[0] is ticket else self._queue.index(ticket)

    def _wake_next_writer(self) -> None:
        """Let the first writer that waits look at once whether its turn has come."""
        # usually the first is the one that has just left; whoever is woken in vain sleeps again
        if len(self._queue) > 1:
            with suppress(IndexError, RuntimeError):  # it has gone, or is awake
                self._queue[1].wake.release()

    def _check_out_reader(self, ticket: _Ticket) -> None:
        """Give the ticket a read connection that nobody uses, if possible the one it had before."""
        now = time.monotonic()
        if now >= self._verify_at:  # from time to time, or reads would miss that the file is gone
            self._verify_at = now + _VERIFY_INTERVAL
            self._verify_files()
        connection = ticket.connection
        if connection is None or connection.holder is not ticket or connection.mode == "immutable":
            connection = self._find_free_reader(ticket)
        ticket.connection, connection.holder = connection, ticket

    def _find_free_reader(self, ticket: _Ticket) -> _Connection:
        """Return a read connection that nobody uses, or a new one; the mutex is held."""
        for connection in self._read_connections:
            if connection.holder is ticket or not connection.holder.in_force.locked():
                if connection.mode == "immutable":  # it would not see what was written since
                    self._read_connections.remove(connection)
                    connection.close()
                    break
                if connection.in_transaction:  # an interrupted snapshot's
                    connection.rollback()
                return connection
        mode = "query_only"
        if self.read_only:
            # the mode of those that are open: a WAL that is there may have been made by one of them
            open_modes = (c.mode for c in self._read_connections if c.mode != "immutable")
            mode = next(open_modes, "") or _reading_mode(self.path)
        connection = self._connect(mode)
        try:
            if self.read_only and not self._log_identities and mode != "immutable":
                self._log_identities = self._identify_logs(connection)
            self._raise_if_unusable()  # closed by a signal handler, meanwhile
        except BaseException:
            connection.close()
            raise
        connection.holder = ticket
        self._read_connections.append(connection)
        return connection

    # ---- reading and writing

    def read(
        self, sql: str, parameters: _Parameters = (), *, byte_limit: int | None = None
    ) -> list[_Row]:
        """Return rows as this thread should see them: in its own block, else as last committed."""
        block = self._block_to_read()
        if block is not None:
            # locked, because a handler's write between two rows would move the rows
            with nullcontext() if block.in_verb.locked() else block.in_verb:
                return self.require_active(block).query(sql, parameters, byte_limit=byte_limit)
        ticket = getattr(self._local, "reader", None)
        if ticket is None:
            ticket = self._local.reader = _Ticket(self.timeout, writes=False)
        elif ticket.in_force.locked():  # by the read that a signal handler has interrupted
            ticket = _Ticket(self.timeout, writes=False)
        with ticket.in_force:
            ticket.has_turn, ticket.deadline = False, time.monotonic() + self.timeout
            self._wait_for_turn(ticket)
            connection = cast(_Connection, ticket.connection)
            return connection.query(sql, parameters, byte_limit=byte_limit)

    def write(self, sql: str, parameters: _Row = ()) -> int:
        """Execute a statement that changes rows; return how many it changed.

        Every write of a single statement passes here. Inside the user's transaction it becomes part
        of that. Outside, it is committed by the steps of a transaction, written out: the context
        manager would add a sixth to its time.
        """
        block = self._block_to_join()
        if block is not None:
            return _UnitOfWork(self, block).write(sql, parameters)
        ticket = _Ticket(self.timeout, writes=True)
        with ticket.in_force:
            self._wait_for_turn(ticket)
            connection = self._take_writer()
            try:
                began = self._begin(ticket, connection)
                changed = _UnitOfWork(self, ticket).write(sql, parameters)
                self.require_active(ticket).query(_COMMIT)
            except BaseException:
                if ticket.connection is not None:  # None in a forked child: it is the parent's
                    connection.rollback()
                raise
            self._finish_commit(connection, began)
        self._wake_next_writer()
        return changed

    @_interrupt_safe_context
    def transaction(self) -> Generator[None, None, None]:
        """Begin the user's transaction, and commit at the end; within another, a savepoint."""
        outer = self._block_to_join()
        if outer is not None:
            with self._savepoint(outer):
                yield
            return
        ticket = _Ticket(self.timeout, writes=True)
        with ticket.in_force:
            self._wait_for_turn(ticket)
            connection = self._take_writer()
            try:
                # inside the try: outside of it, 5.5 % of interrupts left SQLite's write lock held
                began = self._begin(ticket, connection)
                self._enter_context(ticket)
                yield
                # Without its token a ticket is no current transaction: a signal handler that reads
                # from here on sees the last commit.
                entered, ticket.tokens = ticket.tokens, None
                self._leave_context(entered)
                self.require_active(ticket).query(_COMMIT)
            except BaseException:
                entered, ticket.tokens = ticket.tokens, None
                # No call comes before the rollback, which is one into C: no interrupt prevents it.
                if ticket.connection is not None:
                    connection.rollback()
                self._leave_context(entered)
                raise
            self._finish_commit(connection, began)
        self._wake_next_writer()

    @_interrupt_safe_context
    def unit_of_work(self) -> Generator[_UnitOfWork, None, None]:
        """Begin a verb's transaction; within the user's, it is a savepoint of that.

        The steps are those of `transaction`, without a place in the context: nothing joins it.
        """
        outer = self._block_to_join()
        if outer is not None:
            with outer.in_verb, self._savepoint(outer):
                yield _UnitOfWork(self, outer)
            return
        ticket = _Ticket(self.timeout, writes=True)
        with ticket.in_force:
            self._wait_for_turn(ticket)
            connection = self._take_writer()
            try:
                began = self._begin(ticket, connection)
                yield _UnitOfWork(self, ticket)
                self.require_active(ticket).query(_COMMIT)
            except BaseException:
                if ticket.connection is not None:
                    connection.rollback()
                raise
            self._finish_commit(connection, began)
        self._wake_next_writer()

    @_interrupt_safe_context
    def snapshot(self) -> Generator[_UnitOfWork, None, None]:
        """Let all reads of a verb see one state of the database, that of the user's transaction."""
        outer = self._block_to_read()
        if outer is not None:
            # a function that a verb calls reads while that verb has the lock
            with nullcontext() if outer.in_verb.locked() else outer.in_verb:
                yield _UnitOfWork(self, outer)
            return
        ticket = _Ticket(self.timeout, writes=False)
        if not self._has_interrupted_call():
            self._local.outer = ticket
        with ticket.in_force:
            self._wait_for_turn(ticket)
            connection = cast(_Connection, ticket.connection)
            try:
                connection.query(_BEGIN_READ)
                yield _UnitOfWork(self, ticket)
            finally:
                if ticket.connection is not None:
                    connection.rollback()

    @_interrupt_safe_context
    def _writer_turn(self) -> Generator[_Connection, None, None]:
        """Wait for one's turn among this process's writers, and yield the write connection."""
        ticket = _Ticket(self.timeout, writes=True)
        with ticket.in_force:
            self._wait_for_turn(ticket)
            connection = self._take_writer()
            self._verify_files()  # a checkpoint by a -shm of our own deletes what others commit
            yield connection
        self._wake_next_writer()

    def _begin(self, ticket: _Ticket, connection: _Connection) -> float:
        """Begin a writer's transaction, and return when SQLite's write lock was taken.

        Raises NewerSchemaError if a newer version of this module has migrated the file meanwhile.
        """
        ticket.connection, connection.last_error = connection, ""
        connection.query(_BEGIN_WRITE, deadline=ticket.deadline)
        # a write by a -shm that others do not have would overwrite in the WAL what they commit
        self._verify_files()
        self._raise_if_migrated(connection)
        return time.monotonic()

    def _raise_if_migrated(self, connection: _Connection) -> None:
        if connection.query(_USER_VERSION) != [(len(_MIGRATIONS),)]:
            raise NewerSchemaError(
                f"{self.path} was migrated by a newer operator_db.py meanwhile: update"
            )

    def _finish_commit(self, connection: _Connection, began: float) -> None:
        """Make sure that the file is still at its path; checkpoint if due; let others in.

        A write transaction that took long is followed by a pause, in which the writers of other
        processes find the lock free.
        """
        wal_size = self._verify_files("; whether the last write is stored is uncertain")
        if self.writes > _CHECKPOINT_WRITES or wal_size > self._wal_size + _CHECKPOINT_BYTES:
            self.writes = 0
            with suppress(OperatorDbError):  # it is committed, even if the checkpoint fails
                if wal_size <= _WAL_KEPT_BYTES:
                    # leaves the file its length: a sync of a file that grows takes longer
                    connection.checkpoint("FULL")
                else:
                    # unless they are waited for, steady readers keep the log from starting over
                    connection.checkpoint("TRUNCATE", wait_for_readers_ms=100)
                self._wal_size = _file_size(self.path + "-wal")
        if time.monotonic() - began > _LONG_WRITE:
            time.sleep(_PAUSE_FOR_OTHERS)

    def _enter_context(self, ticket: _Ticket) -> None:
        """Make a user's transaction the current one of this context."""
        if ticket.tokens is None:
            ticket.tokens = deque(maxlen=1)
        # one call into C, for without its token a transaction could not be found again
        ticket.tokens.extend(map(self._current.set, (ticket,)))

    def _leave_context(self, tokens: deque[Token[_Ticket | None]] | None) -> None:
        """Take a user's transaction out of the context that opened it."""
        if tokens:
            with suppress(ValueError, RuntimeError):  # left in another context than it was opened
                self._current.reset(tokens[0])

    @_interrupt_safe_context
    def _savepoint(self, ticket: _Ticket) -> Generator[None, None, None]:
        """Undo what is done in the with statement if it raises, and let the transaction go on."""
        ticket.savepoints += 1
        # no name is used twice: RELEASE may have been executed already when an interrupt is seen
        name = f"block_{ticket.savepoints}"
        # not in the try: one that an interrupt leaves behind here is empty, and ends with COMMIT
        self.require_active(ticket).query(_SAVEPOINT.format(name))
        try:
            yield
            self.require_active(ticket).query(_RELEASE.format(name))
        except BaseException:
            connection = ticket.connection
            if connection is not None:
                try:
                    if connection.in_transaction:
                        connection.query(_ROLLBACK_TO.format(name))
                        connection.query(_RELEASE.format(name))
                except BaseException as failure:
                    # RELEASE may have been executed when the interrupt was seen: all was done then
                    if "no such savepoint" not in str(failure):
                        connection.rollback()  # what cannot be undone alone goes with the whole
                    if not isinstance(failure, OperatorDbError):
                        raise
            raise

    # ---- upkeep; these do nothing, or raise, inside one's own transaction

    def release_pages(self) -> None:
        """Give unused pages back to the file system, in batches.

        The file itself shrinks at the checkpoint, which a reader in another process can hold back
        until a later one.
        """
        if self.is_in_transaction():
            return
        while True:
            with self._writer_turn() as connection:
                began = time.monotonic()
                before = unused = connection.pragma("freelist_count")
                if unused and connection.query(_AUTO_VACUUM) == [(_INCREMENTAL,)]:
                    unused = connection.release_pages(_PAGES_PER_STEP)
                    self._finish_commit(connection, began)
            if before <= _PAGES_PER_STEP or unused >= before:
                break
            time.sleep(_PAUSE_FOR_OTHERS)
        self.checkpoint()

    def checkpoint(self) -> None:
        """Move the WAL into the file and cut it, as far as readers allow."""
        if not self.is_in_transaction():
            with self._writer_turn() as connection:
                connection.checkpoint("TRUNCATE")

    def vacuum(self) -> None:
        """Rebuild the file without gaps, as one transaction."""
        self.raise_if_in_transaction("compact() cannot run")
        with self._writer_turn() as connection:
            connection.query(_SET_AUTO_VACUUM)  # takes effect now, whoever made the file
            connection.query(_VACUUM)
            self._verify_files()
        with suppress(OperatorDbError):  # it is committed, even if the checkpoint fails
            self.checkpoint()

    def copy_to(self, path: str, progress: Progress | None) -> None:
        """Copy one state of the database into an empty file, while others read and write."""
        self.raise_if_in_transaction("backup() cannot run")
        with self.snapshot() as snapshot, closing(_connect(path, self.timeout)) as target:
            self._copy_snapshot(snapshot, target, progress)

    def copy_from(self, source: _Store, progress: Progress | None) -> None:
        """Replace everything by one state of another database, as one transaction.

        Through SQLite, never by moving files: replacing a database while its WAL exists corrupts
        it (https://www.sqlite.org/howtocorrupt.html, section 1.4).
        """
        self.raise_if_in_transaction("restore() cannot run")
        with source.snapshot() as snapshot:
            if snapshot.read(_PAGE_SIZE) != self.read(_PAGE_SIZE):
                raise StorageError(
                    f"{source.path} has pages of another size: export it, then import that"
                )
            with self._writer_turn() as connection:
                source._copy_snapshot(snapshot, connection, progress)
                self._verify_files("; whether what was restored is stored is uncertain")
        with suppress(OperatorDbError):  # it is committed, even if the checkpoint fails
            self.checkpoint()

    def rebuild(self, build: Callable[[_UnitOfWork], _Store], progress: Progress) -> bool:
        """Replace everything by what `build` makes of a snapshot, unless others write meanwhile.

        Others have the file open. Their commits must not be lost, and SQLite's backup takes the
        write lock by itself, with its first step, and not before. So:

        1. Writers of this object wait: each of their commits would make the attempt fail.
        2. A snapshot is taken, and the file's `data_version` as this snapshot has it.
        3. `build` makes another database of the snapshot.
        4. The backup's first step takes the write lock, and copies one page.
        5. Nobody can commit any more. If the `data_version` is another one now, somebody has: an
           error in the backup's callback undoes the step, and the result is False.
        6. The other pages follow; the last step commits.

        A process that dies before the end of step 6 has changed nothing.
        """
        with self._writer_turn() as target, self.snapshot() as snapshot:
            snapshot.read(_READ_ANYTHING)  # takes the snapshot
            reader = self.require_active(snapshot.ticket)
            self._raise_if_migrated(reader)
            version = reader.query(_DATA_VERSION)
            built = build(snapshot)
            reader.rollback()  # from here on it sees what others commit

            def watch(done: int, total: int) -> None:
                if done == 1:
                    self._verify_files()
                    if reader.query(_DATA_VERSION) != version:
                        raise _OvertakenError
                progress(done, total)

            try:
                with built.snapshot() as source:
                    built._copy_snapshot(source, target, watch, pages_per_step=1)
            except _OvertakenError:
                return False
            self._verify_files("; whether what was repaired is stored is uncertain")
        with suppress(OperatorDbError):  # it is committed, even if the checkpoint fails
            self.checkpoint()
        return True

    def _copy_snapshot(
        self,
        snapshot: _UnitOfWork,
        target: _Connection,
        progress: Progress | None,
        *,
        pages_per_step: int = _PAGES_PER_STEP,
    ) -> None:
        """Copy all pages of a snapshot, step by step.

        With a read transaction on the source, that took 28 steps beside a busy writer; without, the
        writer made it begin anew 1,753 times, and it never ended.
        """
        snapshot.read(_READ_ANYTHING)  # takes the snapshot
        source = self.require_active(snapshot.ticket)
        deadline = time.monotonic() + target.timeout

        def watch(code: int, remaining: int, pages: int) -> None:
            nonlocal deadline
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                deadline = time.monotonic() + target.timeout
            elif time.monotonic() >= deadline:  # Connection.backup would wait forever
                raise BusyError(
                    f"{target.path} was locked by others for {target.timeout:g} s; try again"
                )
            if progress is not None:
                progress(pages - remaining, pages)

        options: _Json = {"pages": pages_per_step, "progress": watch, "sleep": _POLL_INTERVAL}
        target.with_retries(partial(source.backup, target, **options))

    def size(self) -> int:
        """Return the bytes that the database and its WAL take."""
        return _file_size(self.path) + _file_size(self.path + "-wal")

    def is_open_at(self, path: str) -> bool:
        """Whether a path leads to a file of the database that is open here."""
        if self._closed_reason and self._identity not in _inherited_files:
            return False
        for suffix in _DATABASE_SUFFIXES.values():
            with suppress(OSError):
                if os.path.samefile(path, self.path + suffix):
                    return True
        return False

    # ---- closing

    def _tickets_in_force(self) -> list[_Ticket]:
        """Return the tickets in force, those that wait included; the mutex is held."""
        holders = [connection.holder for connection in self._read_connections]
        return [ticket for ticket in (*holders, *self._queue) if ticket.in_force.locked()]

    def _close_connections(self) -> None:
        """Close every connection; see to it that nobody's commits go with files that were replaced.

        The last connection that is closed moves the WAL into the file, and deletes it. Where others
        have another -wal or -shm, that would delete what these have committed since: then a
        read-only connection is closed last, with which SQLite does not do so. A WAL that is left
        behind a database that was replaced would be played into its successor: it is moved aside.
        """
        connections = self._connections()
        lost: list[str] = []
        with suppress(StorageError):
            lost = self._find_lost_files()[0] if connections else []
        wal, is_replaced = self.path + "-wal", self.path in lost
        if lost and not is_replaced and os.path.exists(wal):
            with suppress(OperatorDbError):
                keeper = _connect(self.path, self.timeout, mode="ro")
                keeper.query(_READ_ANYTHING)  # from now on it counts
                connections.append(keeper)
        is_orphan = is_replaced and wal in self._log_identities and wal not in lost
        for connection in self._read_connections:
            connection.holder.connection = None
        self._read_connections, self._write_connection, self._log_identities = [], None, {}
        for connection in connections:
            connection.close()
        if is_orphan and os.path.exists(self.path):
            self._move_log_aside()

    def _move_log_aside(self) -> None:
        """Rename the WAL of a database that was replaced by another file."""
        aside = f"{self.path}.{_now()}-{os.urandom(2).hex()}.replaced"
        with suppress(OSError):
            os.rename(self.path + "-wal", aside + "-wal")
            with suppress(FileNotFoundError):
                os.unlink(self.path + "-shm")
            _warn(
                f"{self.path} was replaced while it was open: what its write-ahead log holds is in"
                f" {aside}-wal, and is read from there when the old file is put at {aside}"
            )

    def _connections(self) -> list[_Connection]:
        """Return the open connections; the writer is last, whose closing removes the WAL."""
        writer = self._write_connection
        return [*self._read_connections, *([writer] if writer else [])]

    def close(self) -> None:
        """Close every connection once the work in flight is done; see OperatorDb.close."""
        if self._closed_reason:
            return
        if self._has_interrupted_call():
            raise ConflictError(
                "close() cannot be called inside a transaction, or by what has interrupted a call"
            )
        self._raise_if_would_deadlock()
        closer = self._closing = _Ticket(self.timeout, writes=False)
        with closer.in_force:
            while True:
                with self._mutex:
                    if self._closed_reason:
                        return
                    # tickets that wait for their turn will find the store closed
                    if not any(ticket.has_turn for ticket in self._tickets_in_force()):
                        self._closed_reason = "was closed: open it again with OperatorDb(path)"
                        self._close_connections()
                        return
                if time.monotonic() >= closer.deadline:
                    raise BusyError(
                        f"{self.path} is still in use after {self.timeout:g} s; it stays open"
                    )
                time.sleep(_POLL_INTERVAL)

    # ---- fork: see `_before_fork`

    def threads_at_work(self, *, writers_only: bool = False) -> set[int]:
        """Return the threads that use a connection of this store."""
        with self._mutex:
            granted = [ticket for ticket in self._tickets_in_force() if ticket.has_turn]
        return {ticket.thread for ticket in granted if ticket.writes or not writers_only}

    def has_no_writer_at_work(self) -> bool:
        """Whether no thread writes, but those that are forking themselves."""
        return self.threads_at_work(writers_only=True).issubset(_forking_threads)

    def close_before_fork(self) -> bool:
        """Close every connection if no thread is at work; return whether the fork may go on.

        A thread that is itself forking, in a block or in a signal handler, is not waited for, and
        its connections stay open.
        """
        with self._mutex:
            at_work = self.threads_at_work()
            if not at_work and not self._has_interrupted_call():
                self._close_connections()
            return at_work.issubset(_forking_threads)

    def after_fork_in_child(self) -> None:
        """Start over; or refuse every call, if the parent's connections could not be closed.

        In an order in which it can be interrupted, and done again.
        """
        inherited = self._connections()
        if inherited or self._has_interrupted_call():
            import ctypes

            # Never closed here, not even when the interpreter ends: that may delete the parent's
            # WAL (https://www.sqlite.org/howtocorrupt.html, section 2.6).
            for connection in inherited:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
            self._closed_reason = (
                "was in use when this process was forked: only the parent can go on with it"
            )
            _inherited_files.add(self._identity or (0, 0))
        for ticket in (*(each.holder for each in self._read_connections), *self._queue):
            ticket.connection = None  # so that leaving the parent's block here touches nothing
        self.latencies.clear()
        self._reset_state()


def _all_stores() -> list[_Store]:
    with _stores_lock:
        return list(_stores)


def _is_at_work() -> bool:
    """Whether this thread uses a connection of any database."""
    return any(threading.get_ident() in store.threads_at_work() for store in _all_stores())


def _raise_if_inherited(path: str) -> None:
    """Raise ConflictError in a child that has inherited an open connection to a file."""
    with suppress(OSError):
        if _file_identity(path) in _inherited_files:
            raise ConflictError(
                f"{path} was in use when this process was forked: start a new process"
            )


def _raise_if_open_here(path: str) -> None:
    """Keep the files of a database that is open in this process from being used as plain ones."""
    if any(store.is_open_at(path) for store in _all_stores()):
        raise InvalidRecordError(
            f"{path} belongs to a database that is open here: choose another file"
        )


def _before_fork(*, is_second_call: bool) -> None:
    """Close every connection of this process before it forks.

    SQLite's table of locks is inherited, the kernel's locks are not: a child that opens a file
    which its parent has open believes that it holds locks which it does not. Its acknowledged
    writes were lost. And SQLite's mutexes may be inherited locked: 4 of 400 children forked under
    load hung in `connect()`, and 5 of 282 on a database that was idle. So:

    1. The fork is announced. From now on no writer begins, in any store (`_must_pause`); threads
       that are at work already go on, and readers begin as before.
    2. The writers at work are waited for, each up to the `timeout` of its store.
    3. No reader begins any more, and the readers at work are waited for.
    4. Every store closes its connections, and the fork is noted as prepared.
    5. The process forks. In the parent all notes are cleared, and every store opens connections
       when it next needs one.
    6. In the child every store starts over. One that the forking thread itself has a transaction
       open in refuses every call. If the fork was not prepared, because others were at work for
       too long, every database of the child refuses.

    An exception in a hook is printed, and the fork goes on. So each hook is called twice: if
    KeyboardInterrupt ends the first call, the second does the work all the same, and the process
    gets the interrupt when it has forked; one that lands between the lines that see to this is only
    printed. What clears the notes, and what keeps a
    child from using anything until its hook has come to its end, are calls into C, which cannot be
    interrupted.
    """
    thread = threading.get_ident()
    if is_second_call:
        if thread not in _forks_waited_for:
            _prepare_fork(thread)
        return
    try:
        _prepare_fork(thread)
    except KeyboardInterrupt:
        _forks_interrupted.add(thread)


def _prepare_fork(thread: int) -> None:
    _forking_threads.add(thread)
    try:
        if not cast(Any, _fork_lock)._is_owned():  # it may be, by the first call of the hook
            _fork_lock.acquire()
        _forks_coming.add(thread)
        started = time.monotonic()
        _wait_for_stores(started, _Store.has_no_writer_at_work)
        _forks_stopping_readers.add(thread)
        if _wait_for_stores(started, _Store.close_before_fork):
            _forks_prepared.add(thread)
        _forks_waited_for.add(thread)
    finally:
        _forking_threads.discard(thread)


def _wait_for_stores(started: float, is_done: Callable[[_Store], bool]) -> bool:
    """Wait until `is_done` holds for every store; False once the time of the others is up."""
    while waiting := [store for store in _all_stores() if not is_done(store)]:
        if not any(time.monotonic() < started + store.timeout for store in waiting):
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def _repeat_interrupt() -> None:
    """Send SIGINT to this thread again, if one has ended a hook."""
    thread = threading.get_ident()
    if thread in _forks_interrupted:
        _forks_interrupted.discard(thread)
        import signal

        # later, for what is raised in a hook is only printed
        threading.Timer(0.01, signal.pthread_kill, (thread, signal.SIGINT)).start()


def _after_fork_in_child(*, is_second_call: bool) -> None:
    if _unusable_reasons[-1:] != [_UNFINISHED]:  # the first call was not interrupted
        return
    try:
        _start_over_in_child()
    except KeyboardInterrupt:
        _forks_interrupted.add(threading.get_ident())
        if is_second_call:
            raise


def _start_over_in_child() -> None:
    global _stores_lock  # noqa: PLW0603
    _stores_lock = threading.RLock()  # a thread that is not here may hold the parent's
    _forking_threads.clear()
    for store in _all_stores():
        store.after_fork_in_child()
    is_prepared = threading.get_ident() in _forks_prepared
    _unusable_reasons[-1:] = [] if is_prepared else [_UNPREPARED]


if hasattr(os, "register_at_fork"):
    # before a fork, hooks run in reverse order of registration; after it, in order
    os.register_at_fork(before=partial(_before_fork, is_second_call=True))
    os.register_at_fork(before=partial(_before_fork, is_second_call=False))
    os.register_at_fork(after_in_child=_forks_interrupted.clear)  # the parent's
    os.register_at_fork(after_in_child=partial(_unusable_reasons.append, _UNFINISHED))
    os.register_at_fork(after_in_child=partial(_after_fork_in_child, is_second_call=False))
    os.register_at_fork(after_in_child=partial(_after_fork_in_child, is_second_call=True))
    os.register_at_fork(after_in_parent=_repeat_interrupt, after_in_child=_repeat_interrupt)
    for _notes in (_forks_coming, _forks_stopping_readers, _forks_prepared, _forks_waited_for):
        os.register_at_fork(after_in_parent=_notes.clear, after_in_child=_notes.clear)
    os.register_at_fork(after_in_parent=_fork_lock.release, after_in_child=_fork_lock.release)


# ==== Namespace: the rows of one table, and the only code that reads and writes them ==============

_BATCH_BYTES = 2**20  # how much a walk reads, and a prune removes, at a time
_BATCH_SECONDS = 0.02  # how long a prune holds the write lock at a time

# `{0}` is the table. Text comes back as bytes, so that damaged text is still found by what it is:
# `CAST(? AS TEXT)` takes it again.
_SELECT_BY_KEY = 'SELECT key, value, status, at, crc FROM "{0}" WHERE key = CAST(? AS TEXT)'
_SELECT_BY_ROW_NUMBER = 'SELECT key, value, status, at, crc FROM "{0}" WHERE rowid = ?'
_INSERT = (
    'INSERT INTO "{0}"(key, value, status, at, crc) VALUES(?, ?, ?, ?, ?) ON CONFLICT(key) DO '
)
_INSERT_IF_ABSENT = _INSERT + "NOTHING"
_UPSERT = (
    _INSERT + "UPDATE SET value = excluded.value, status = excluded.status, at = excluded.at,"
    " crc = excluded.crc"
)
_DELETE_BY_KEY = 'DELETE FROM "{0}" WHERE key = ?'
_DELETE_BY_STATUS = 'DELETE FROM "{0}" WHERE status IS ?'
_DELETE_SINCE = 'DELETE FROM "{0}" WHERE status IS CAST(? AS TEXT) AND (at, rowid) >= (?, ?)'
_COUNT_ALL = 'SELECT count(*) FROM "{0}"'
_COUNT_BY_STATUS = 'SELECT count(*) FROM "{0}" WHERE status IS ?'
# In key order, each batch from where the last one ended: `+status` keeps SQLite from using the
# other index. Text sorts before any blob, and `x''` is the smallest blob.
_WALK = (
    " FROM \"{0}\" WHERE key > CAST(? AS TEXT) AND key < x'' AND (? IS NULL OR +status = ?)"
    " ORDER BY key LIMIT 1000"
)
_WALK_ROWS = "SELECT key, value, status, at, crc" + _WALK
# reads the key index alone, as long as no status is asked for: SQLite seeks a row when it needs it
_WALK_KEYS = "SELECT key, rowid" + _WALK
# A key that is not text was not written by us, though its bytes may look the same: it becomes NULL.
_LIST = (
    "SELECT CASE typeof(key) WHEN 'text' THEN key END, value, status, at, crc, rowid"
    ' FROM "{0}" WHERE status IS CAST(? AS TEXT) '
)
_LIST_OLDEST_FIRST = _LIST + "ORDER BY at, rowid LIMIT ?"
_LIST_NEWEST_FIRST = _LIST + "ORDER BY at DESC, rowid DESC LIMIT ?"
_LIST_EXPIRED = _LIST + "AND at < ? AND (at, rowid) > (?, ?) ORDER BY at, rowid LIMIT 500"
_DISTINCT_STATUSES = (  # by one look into the index for each
    'WITH RECURSIVE s(v) AS (SELECT min(status) FROM "{0}" UNION ALL'
    ' SELECT (SELECT min(status) FROM "{0}" WHERE status > s.v) FROM s WHERE s.v IS NOT NULL)'
    " SELECT v, typeof(v) FROM s"
)
_INVALID_ROWS = (  # which we never write, and which comparing with text and numbers would pass over
    "SELECT CAST(key AS TEXT) FROM \"{0}\" WHERE typeof(key) != 'text' OR key = ''"
    " OR typeof(value) != 'text' OR typeof(crc) != 'integer'"
    " OR typeof(status) NOT IN ('text', 'null') OR typeof(at) NOT IN ('integer', 'null')"
)
_ROW_NUMBERS = 'SELECT rowid FROM "{0}" INDEXED BY "{0}_status_at"'
# What repair reads: the table alone, whatever its indexes say. `{1}` is one of these two. A page
# of another table may be read as one of ours: a number there comes back as text.
_ALL_COLUMNS = "CAST(key AS TEXT), value, status, at, crc, rowid"
_KEY_ALONE = "CAST(key AS TEXT), NULL, NULL, NULL, NULL, rowid"
_SCAN = 'SELECT {1} FROM "{0}" NOT INDEXED WHERE rowid '
_SCAN_AFTER = _SCAN + "> ? ORDER BY rowid LIMIT ?"
_SCAN_AT = _SCAN + "= ?"
_IS_STORED = (
    'SELECT 1 FROM "{0}" WHERE rowid = ? UNION ALL SELECT 1 FROM "{0}" WHERE key = CAST(? AS TEXT)'
)
_INSERT_AT = (  # at the number that it had, for that is its place among those of the same age
    'INSERT INTO "{0}"(rowid, key, value, status, at, crc) SELECT'
    ' (SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM "{0}" WHERE rowid = ?1)),'
    " CAST(?2 AS TEXT), CAST(?3 AS TEXT), CAST(?4 AS TEXT), ?5, ?6"
    " WHERE TRUE ON CONFLICT(key) DO NOTHING"
)
_LET_SCHEMA_BE_WRITTEN = "PRAGMA writable_schema=ON"
_SET_ROOT = "UPDATE sqlite_master SET rootpage = ? WHERE type = 'table' AND name = 'tasks'"
_SELECT_ROOTS = "SELECT rootpage, tbl_name FROM sqlite_master WHERE rootpage > 0"
_READ_SCHEMA_ANEW = "PRAGMA writable_schema=RESET"
# Other programs' tables, from a file that is attached, so that no value goes through Python.
_ATTACH = "ATTACH ? AS damaged"
_SELECT_ATTACHED = "SELECT type, name, tbl_name, sql FROM damaged.sqlite_master"
_INSERT_DEFINITION = (
    "INSERT INTO sqlite_master(type, name, tbl_name, rootpage, sql) VALUES("
    "CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), 0, CAST(? AS TEXT))"
)
_ALL_ROWS = 2**40  # more than any table has
_COLUMNS = 'PRAGMA damaged.table_info("{0}")'  # those that are not computed
_HAS_ROW_NUMBERS = 'SELECT rowid FROM main."{0}" LIMIT 0'
_COPY_OTHER = (
    'INSERT OR IGNORE INTO main."{0}"({1}) SELECT {1} FROM damaged."{0}" {2} LIMIT ? OFFSET ?'
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _timed(method: _Method) -> _Method:
    """Count each call of a method under its name, with its latency and its errors."""
    name, clock = method.__name__, time.perf_counter

    @wraps(method)
    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        latencies, operation = self._store.latencies, self._operation_prefix + name
        latency = latencies.get(operation) or latencies.setdefault(operation, Latency())
        started = clock()
        try:
            return method(self, *arguments, **options)
        except OperatorDbError as error:
            latency.errors[type(error).__name__] += 1
            raise
        finally:
            latency.add(clock() - started)

    return cast(_Method, timed)


# ---- arguments


def _check_id(value: object, name: str = "an id") -> str:
    """Return an id, or a signature, if it is valid; raise InvalidRecordError otherwise."""
    if _ID.is_valid(value):
        return cast(str, value)
    raise InvalidRecordError(f"{name} must be {_ID.description}; got {_truncated_repr(value)}")


def _check_count(name: str, value: object) -> int:
    """Return the count, or -1 for None: SQLite's word for no limit."""
    if value is None:
        return -1
    if type(value) is int and 0 <= value < 2**63:
        return value
    raise InvalidRecordError(
        f"{name} must be an int of 0 or more, or None; got {_truncated_repr(value)}"
    )


def _check_days(days: object) -> None:
    """Raise InvalidRecordError for what is no number of days."""
    is_number = isinstance(days, (int, float)) and type(days) is not bool
    if not (is_number and 0 <= cast(float, days) < 10**9):
        raise InvalidRecordError(f"days must be a number of 0 or more; got {_truncated_repr(days)}")


def _check_time(name: str, at: object) -> None:
    """Raise InvalidRecordError for what is neither a time in Unix seconds nor None."""
    if at is not None and not _TIME.is_valid(at):
        hint = _hint_at_milliseconds(at)
        raise InvalidRecordError(
            f"{name} must be {_TIME.description}, or None; got {_truncated_repr(at)}{hint}"
        )


def _is_stored_time(at: object) -> bool:
    """Whether the age column may hold a value: earlier versions stored any int of 64 bits."""
    return at is None or (type(at) is int and -(2**63) <= at < 2**63)


def _status_text(status: Any) -> str | None:
    """Return the column text of a status: an enum by value, a bool as JSON writes it."""
    value = status._value_ if isinstance(status, Enum) else status
    if value is None or _is_text(value):
        return cast("str | None", value)
    if type(value) is bool:
        return "true" if value else "false"
    raise InvalidRecordError(
        f"a status is a str, an enum of str, a bool or None; got {type(value).__name__}"
    )


def _as_read(row: _Row) -> _Row:
    """Return a row as it comes back from the database: text as bytes."""
    return tuple(each.encode() if isinstance(each, str) else each for each in row)


def _age_order(row: _Row) -> tuple[bool, int, int]:
    """Return what SQLite sorts a row of `_LIST` by: its age, NULL first, then its row number."""
    return row[3] is not None, row[3] or 0, row[5]


class Namespace(Generic[R]):
    """The records of one kind. Made by `OperatorDb.namespace`.

    A record is found by its id, by its status through an index, and by its age. Every verb but
    `prune`, `problems` and the walks is one transaction, or part of the `transaction()` block that
    it stands in. For a record that is not what was written it raises DamagedError, which names the
    key; `delete` and `put` still work on such a record, unless SQLite cannot read its page.
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
        declarations: Namespace[_Declaration] | None = None,
    ) -> None:
        self.name, self.record_type = name, record_type
        self._declarations = declarations  # None for our own
        self._fields = key, status, at
        self._store, self._codec = store, _codec(record_type)
        self._via: _Store | _UnitOfWork = store  # what this reads and writes through
        for role, each in (("key", key), ("status", status), ("at", at)):
            known = each in self._codec.field_types or (
                type(each) is str and hasattr(record_type, each)
            )
            if not known and (role == "key" or each is not None):
                raise InvalidRecordError(
                    f"{role}={_truncated_repr(each)}: {record_type.__name__} has no such field"
                )
            if each in self._codec.secrets:
                raise InvalidRecordError(
                    f"{role}={each!r} is a secret field: keys and columns are shown"
                )
        self._key_prefix, self._operation_prefix = name + ":", name + "."
        self._key_prefix_bytes = self._key_prefix.encode()
        self._get_key = attrgetter(key)
        self._get_status = attrgetter(status) if status else None
        self._get_at = attrgetter(at) if at else None
        # formatted once, because these three are executed most
        self._select_by_key = _SELECT_BY_KEY.format(name)
        self._upsert = _UPSERT.format(name)
        self._insert_if_absent = _INSERT_IF_ABSENT.format(name)

    def within(self, unit: _UnitOfWork) -> Namespace[R]:
        """Return this namespace as a part of a verb's transaction or snapshot."""
        part: Namespace[R] = object.__new__(_UNTIMED.get(type(self), type(self)))
        vars(part).update(vars(self), _via=unit)
        return part

    def _stored_declaration(self) -> _Declaration | None:
        """Return what the file says of this namespace, None where it says nothing."""
        declarations, via = self._declarations, self._via
        if declarations is None:
            return None
        if isinstance(via, _UnitOfWork):
            declarations = declarations.within(via)
        return declarations.get(self.name)

    def _has_columns_of(self, stored: _Declaration) -> bool:
        """Whether the rows have the columns that this namespace would give them."""
        return stored.are_columns_current and (stored.status, stored.at) == self._fields[1:]

    def _raise_unless_columns_current(self) -> None:
        stored = self._stored_declaration()
        if stored is not None and not self._has_columns_of(stored):
            raise ConflictError(
                f"{self.name} has the columns of another declaration (status={stored.status!r},"
                f" at={stored.at!r}): call namespace() again, writable, and run one build only"
            )

    def _secret_names(self) -> frozenset[str] | None:
        """Return the names of the secret fields, former ones too; None where they are not known."""
        stored = self._stored_declaration()
        return self._codec.secret_names.union(stored.secrets if stored else ())

    # ---- one record

    def get(self, record_id: str) -> R | None:
        """Return the record, or None."""
        row = self._read_row(record_id)
        return None if row is None else self._decode_row(row)

    def _read_row(self, record_id: str) -> _Row | None:
        key = self._key_prefix + _check_id(record_id)
        try:
            rows = self._via.read(self._select_by_key, (key,))
        except DamagedError as error:
            raise DamagedError(f"{_truncated_repr(key)} cannot be read: {error}") from None
        return rows[0] if rows else None

    def put(self, record: R, *, if_absent: bool = False) -> bool:
        """Store the record over the one with its id; return whether it was stored.

        With `if_absent` it is stored only where there is none with its id.
        """
        return self._put(self._codec.take(record), if_absent=if_absent)

    def _put(self, record: R, *, if_absent: bool = False) -> bool:
        """Store a record that is valid, and that nobody else can change."""
        sql = self._insert_if_absent if if_absent else self._upsert
        return self._via.write(sql, self._encode_row(record)) > 0

    def update(self, record_id: str, change: Callable[[R], R]) -> R:
        """Read, call `change(record)`, and store what it returns, as one transaction.

        Returns what is stored now. Raises NotFoundError when there is no such record. `change` may
        raise, and then nothing is stored. It runs under the write lock: it must not keep others
        waiting, and it may read the database but not write to it. What is stored under names that
        the class does not know stays.
        """
        with self._via.unit_of_work() as unit:
            part = self.within(unit)
            row = part._read_row(record_id)
            if row is None:
                key = _truncated_repr(self._key_prefix + record_id)
                raise NotFoundError(f"there is no {key}")
            record = self._codec.take(unit.call(change, self._decode_row(row)))
            changed = self._encode_row(record, stored=row[1])
            if self._get_key(record) != record_id:
                keys = _truncated_repr(self._key_prefix + record_id), _truncated_repr(changed[0])
                raise InvalidRecordError(f"{keys[0]}: update gave another id, {keys[1]}")
            if _as_read(changed) != row:
                unit.write(self._upsert, changed)
            return record

    def delete(self, record_id: str) -> bool:
        """Remove the record; return whether there was one."""
        if not _is_text(record_id):
            raise InvalidRecordError(f"an id must be a str; got {_truncated_repr(record_id)}")
        key = self._key_prefix + record_id  # not checked: what another program wrote can go too
        return self._via.write(_DELETE_BY_KEY.format(self.name), (key,)) > 0

    def _get_ignoring_columns(self, record_id: str) -> R | None:
        """Return the record in the value alone; None if there is no row, or it is not readable."""
        key = self._key_prefix + _check_id(record_id)
        rows = self._via.read(self._select_by_key, (key,))
        return self._decode_ignoring_columns(rows[0]) if rows else None

    def _decode_ignoring_columns(self, row: _Row) -> R | None:
        """Return the record in a row whose columns may be damaged; None if its value is, too.

        The checksum must be that of the columns which the value gives.
        """
        with suppress(ValueError, TypeError, AttributeError):
            record = self._codec.decode(row[1])
            record_id, status, at = self._columns_of(record)
            whole = self._row_with_checksum(
                self._key_prefix + record_id, row[1].decode(), status, at
            )
            if whole[4] == row[4]:
                return record
        return None

    # ---- many records

    def list(
        self, status: Any = None, *, limit: int | None = None, newest_first: bool = False
    ) -> builtins.list[R]:
        """Return the records of a status (None: of any), oldest first, from one snapshot.

        The cost depends on the number of records returned alone. Records of equal age come in the
        order in which they were first stored.
        """
        count = _check_count("limit", limit)
        sql = (_LIST_NEWEST_FIRST if newest_first else _LIST_OLDEST_FIRST).format(self.name)
        try:
            if status is not None:
                rows = self._via.read(sql, (_status_text(status), count))
            else:
                with self._via.snapshot() as snapshot:
                    statuses = self.within(snapshot)._stored_statuses()
                    by_status = [snapshot.read(sql, (each, count)) for each in statuses]
                # each read walks the index, and merging them needs no sort of the whole table
                merged = merge(*by_status, key=_age_order, reverse=newest_first)
                rows = list(islice(merged, None if count < 0 else count))
            return [self._decode_row(row) for row in rows]
        except (DamagedError, TypeError) as error:  # the latter from ages that do not compare
            # a row in a list may lack its key: look for the first damaged record, to name that
            problem = next(self.problems(), "")
            if not problem and isinstance(error, TypeError):
                raise  # by a signal handler
            raise DamagedError(problem or f"{self.name}: {error}") from None

    def count(self, status: Any = None) -> int:
        """Return how many records there are, or how many with this status."""
        if status is None:
            return int(self._via.read(_COUNT_ALL.format(self.name))[0][0])
        sql, text = _COUNT_BY_STATUS.format(self.name), _status_text(status)
        return int(self._via.read(sql, (text,))[0][0])

    def keys(self, status: Any = None) -> Iterator[str]:
        """Walk the ids in key order, as `values` walks the records."""
        for row in self._walk(_WALK_KEYS, status):
            yield self._id_in(row[0])

    def values(self, status: Any = None) -> Iterator[R]:
        """Walk the records in key order, in short batches that block nobody.

        A record that is there throughout is seen exactly once; one that comes, goes or changes
        meanwhile, perhaps.
        """
        for row in self._walk(_WALK_ROWS, status):
            yield self._decode_row(row)

    def items(self, status: Any = None) -> Iterator[tuple[str, R]]:
        """Walk pairs of id and record, as `values` walks the records."""
        for row in self._walk(_WALK_ROWS, status):
            yield self._id_in(row[0]), self._decode_row(row)

    def _walk(self, sql: str, status: Any) -> Iterator[_Row]:
        """Walk rows that begin with their key, in key order, batch by batch."""
        only, last_key = _status_text(status), b""
        while True:
            try:
                rows = self._via.read(
                    sql.format(self.name), (last_key, only, only), byte_limit=_BATCH_BYTES
                )
            except DamagedError as error:
                place = _truncated_repr(last_key.decode(errors="replace"))
                raise DamagedError(f"{self.name}, after {place}: {error}") from None
            for row in rows:
                if row[0] <= last_key:  # a damaged key, which would lead round in circles
                    key = _truncated_repr(self._id_in(row[0]))
                    raise DamagedError(f"{self.name}: index out of order at {key}: {_REPAIR}")
                last_key = row[0]
                yield row
            if not rows:
                return

    def statuses(self) -> builtins.list[str]:
        """Return the distinct statuses that there are, sorted."""
        stored = self._stored_statuses()
        return [status.decode(errors="replace") for status in stored if status is not None]

    def _stored_statuses(self) -> builtins.list[bytes | None]:
        """Return the distinct statuses as they are stored, and None for records without one."""
        rows = self._via.read(_DISTINCT_STATUSES.format(self.name))
        if any(kind not in (b"text", b"null") for _, kind in rows):
            raise DamagedError(f"{self.name} holds a status that is not text: {_REPAIR}")
        return [*(status for status, _ in rows if status is not None), None]

    # ---- removing many

    def prune(
        self,
        days: float,
        *,
        status: Any = None,
        keep: Callable[[str], bool] | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Remove the records older than `days`, of one status if given; return how many.

        Those whose id `keep` returns True for stay; it may read the database, but not write to it.
        It works in batches, each a transaction of its own of some 20 ms. `dry_run` counts and
        removes nothing.
        """
        return self._prune(days, status, keep, dry_run, progress, self._delete_listed)

    def _prune(
        self,
        days: float,
        status: Any,
        keep: Callable[[str], bool] | None,
        dry_run: bool,
        progress: Progress | None,
        remove: Callable[[_UnitOfWork, str], bool],
    ) -> int:
        """Do as `prune`; `remove` removes a record or a part of it, and returns if it is gone."""
        _check_days(days)
        if self._get_at is None:
            raise InvalidRecordError(f"{self.name} has no age: it was made without at=")
        self._raise_unless_columns_current()
        before = _now() - int(days * 86400)
        statuses = self._stored_statuses() if status is None else [_status_text(status)]
        removed = 0
        for each in statuses:
            for count in self._prune_status(each, before, keep, dry_run, remove):
                removed += count
                if progress is not None:
                    progress(removed, 0)
        return removed

    def _prune_status(
        self,
        status: str | bytes | None,
        before: int,
        keep: Callable[[str], bool] | None,
        dry_run: bool,
        remove: Callable[[_UnitOfWork, str], bool],
    ) -> Iterator[int]:
        """Remove what is older, batch by batch, and yield how many each batch has removed."""
        sql, place = _LIST_EXPIRED.format(self.name), (-(2**63), 0)
        while True:
            removed = 0
            with self._via.snapshot() if dry_run else self._via.unit_of_work() as unit:
                rows = unit.read(sql, (status, before, *place), byte_limit=_BATCH_BYTES)
                deadline = time.monotonic() + _BATCH_SECONDS
                for row in rows:
                    # decoded, because an index with one bit flipped names the wrong record
                    record_id = self._get_key(self._decode_row(row))
                    if keep is None or not unit.call(keep, record_id):
                        if not dry_run and not remove(unit, record_id):
                            break  # the next batch goes on with it
                        removed += 1
                    place = (row[3], row[5])
                    if time.monotonic() > deadline:
                        break
            if not rows:
                return
            yield removed
            time.sleep(_PAUSE_FOR_OTHERS)

    def _delete_listed(self, unit: _UnitOfWork, record_id: str) -> bool:
        """Remove a record that was found by its status and age; True."""
        if not self.within(unit).delete(record_id):
            key = _truncated_repr(self._key_prefix + record_id)
            raise DamagedError(f"{key} is missing in an index of {self.name}: {_REPAIR}")
        return True

    def _delete_newest(self, status: Any, limit: int) -> int:
        """Remove the newest records of a status, within the limits of a batch; return how many."""
        sql, text = _LIST_NEWEST_FIRST.format(self.name), _status_text(status)
        rows = self._via.read(sql, (text, limit), byte_limit=_BATCH_BYTES)
        if not rows:
            return 0
        *_, at, _, row_number = rows[-1]
        return self._via.write(_DELETE_SINCE.format(self.name), (text, at, row_number))

    def clear(self, status: Any) -> int:
        """Remove every record of a status; return how many."""
        return self._via.write(_DELETE_BY_STATUS.format(self.name), (_status_text(status),))

    # ---- what is wrong

    def problems(
        self, progress: Progress | None = None, *, is_damage_only: bool = False
    ) -> Iterator[str]:
        """Find every record that cannot be read back, by its key; goes on to the end.

        With `is_damage_only`, not those that the class cannot take any more.
        """
        found, unread = list[str](), list[str]()
        try:
            for (key,) in self._via.read(_INVALID_ROWS.format(self.name)):
                shown = _truncated_repr((key or b"a row without a key").decode(errors="replace"))
                yield f"{shown} in {self.name} has a column of a wrong type: {_REPAIR}"
        except DamagedError as error:
            unread = [f"{self.name}: {error}"]  # last: `list` raises the first, which names a key
        try:
            for done, row in enumerate(self._walk(_WALK_ROWS, None), 1):
                if progress is not None:
                    progress(done, 0)
                try:
                    self._decode_row(row)
                except DamagedError as error:
                    found.append(str(error))
                except InvalidRecordError as error:
                    found += [] if is_damage_only else [str(error)]
        except DamagedError:
            found = [*self._problems_by_index()]  # which finds the same again, and more
        yield from (*found, *unread)

    def _problems_by_index(self) -> Iterator[str]:
        """Read each row that an index leads to by itself, past pages that cannot be read.

        Rows are found by their keys in the one index, and then, where that is damaged too, by their
        row numbers in the other.
        """
        seen: set[int] = set()
        try:
            for key, row_number in self._walk(_WALK_KEYS, None):
                seen.add(row_number)
                yield from self._problems_at(_SELECT_BY_KEY, key, self._id_in(key))
        except DamagedError as error:
            yield f"{self.name}: its keys cannot all be read ({error})"
        try:
            for (row_number,) in self._via.read(_ROW_NUMBERS.format(self.name)):
                if row_number not in seen:
                    yield from self._problems_at(
                        _SELECT_BY_ROW_NUMBER, row_number, f"row {row_number}"
                    )
        except DamagedError as error:
            yield f"{self.name}: its row numbers cannot all be read ({error})"

    def _problems_at(self, sql: str, place: Any, name: str) -> Iterator[str]:
        try:
            rows = self._via.read(sql.format(self.name), (place,))
        except DamagedError as error:
            yield f"{_truncated_repr(self._key_prefix + name)} cannot be read: {error}"
            return
        for row in rows:
            try:
                self._decode_row(row)
            except (DamagedError, InvalidRecordError) as error:
                yield str(error)

    # ---- rows

    def has_table(self) -> bool:
        """Whether the table exists; raise ForeignFileError for one that is not as we make it."""
        definitions = _read_definitions(self._via.read, self._store.path)
        return _validate_table(definitions, self._store.path, self.name)

    def create_table(self) -> None:
        """Create the table if there is none."""
        with self._via.unit_of_work() as unit:
            if not self.within(unit).has_table():
                unit.write(_CREATE_TABLE.format(self.name))
                unit.write(_CREATE_INDEX.format(self.name))

    def _encode_row(
        self, record: R, *, stored: bytes = b""
    ) -> tuple[str, str, str | None, int | None, int]:
        """Return the row that a valid record is stored as; check its key, status and age.

        It keeps what a stored value has under names that the class does not know.
        """
        value = self._codec.encode(record)
        if stored and self._declarations is not None:  # our own have no such names
            document = json.loads(value)
            self._codec.keep_unknown(json.loads(stored), document)
            value = _encode_json(document)
        try:
            key, status, at = self._columns_of(record)
        except InvalidRecordError:
            raise
        except Exception as error:
            try:
                self._columns_of(record)
            except Exception:
                raise InvalidRecordError(
                    f"{self.name}: {type(error).__name__} raised by a property"
                ) from None
            raise  # by a signal handler
        _check_id(key)
        # ours were checked as fields, by the version that stored them
        if self._declarations is not None:
            _check_time(f"{self.name}: at=", at)
        return self._row_with_checksum(self._key_prefix + key, value, status, at)

    @staticmethod
    def _row_with_checksum(
        key: str, value: str, status: str | None, at: int | None
    ) -> tuple[str, str, str | None, int | None, int]:
        """Return a row with its checksum."""
        status_bytes = None if status is None else status.encode()
        return key, value, status, at, _row_checksum(key.encode(), value.encode(), status_bytes, at)

    def _columns_of(self, record: R) -> tuple[str, str | None, int | None]:
        """Return the id, status and age that a record gives."""
        status = _status_text(self._get_status(record)) if self._get_status else None
        return self._get_key(record), status, self._get_at(record) if self._get_at else None

    def _decode_row(self, row: _Row, *, is_second_attempt: bool = False) -> R:
        """Return the record in a row; raise DamagedError, which names the key."""
        key, value, status, at, crc = row[:5]
        try:
            if _row_checksum(key, value, status, at) != crc:
                raise ValueError("its checksum does not match")
            if not key.startswith(self._key_prefix_bytes):
                raise ValueError(f"it is no record of {self.name}")
            # at first without a look at types and ranges, for which the checksum vouches
            return self._codec.decode(value, was_checked=not is_second_attempt)
        except Exception as error:  # the constructor of a custom class may raise anything
            if not is_second_attempt:
                with suppress(DamagedError, InvalidRecordError):
                    self._decode_row(row, is_second_attempt=True)
                    # The row is sound: a signal handler has raised something. The codec may have
                    # made a ValueError of it.
                    cause: BaseException = error
                    while cause.__suppress_context__ and cause.__context__:
                        cause = cause.__context__
                    raise cause from None
            if self._declarations is not None and self._has_valid_checksum(row):
                name = _truncated_repr(key.decode())
                raise InvalidRecordError(
                    f"{name} is no {self.record_type.__name__} as that is now: {error}"
                ) from None
            raise self._damage_error(row, str(error)) from None

    def _has_valid_checksum(self, row: _Row) -> bool:
        """Whether a row has its checksum, and its key is one of this table."""
        key, value, status, at, crc = row[:5]
        with suppress(TypeError, AttributeError):
            is_ours = key.startswith(self._key_prefix_bytes)
            return bool(is_ours and _row_checksum(key, value, status, at) == crc)
        return False

    def _damage_error(self, row: _Row, why: str) -> OperatorDbError:
        """Return the error for a row that is not what this module writes."""
        ((version,),) = self._via.read(_USER_VERSION)
        if version > len(_MIGRATIONS):  # migrated while it was open here
            return NewerSchemaError(
                f"{self._store.path} was migrated by a newer operator_db.py meanwhile: update"
            )
        key = row[0]
        name = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
        return DamagedError(f"{_truncated_repr(name)} is damaged: {why}; {_REPAIR}")

    def _id_in(self, key: bytes | None) -> str:
        """Return the id in a key as it is stored."""
        text = (key or b"a row without a key").decode(errors="replace")
        return text.removeprefix(self._key_prefix)

    def _update_columns(self, unit: _UnitOfWork) -> None:
        """Bring status and age of every row up to date with what the class gives now.

        Damaged rows stay as they are. Raises InvalidRecordError for a row that is none of the
        class's any more.
        """
        for row in self._walk(_WALK_ROWS, None):
            with suppress(DamagedError):
                record, key = self._decode_row(row), row[0].decode()
                with suppress(Exception):  # a property may raise anything: reported below
                    if _as_read(self._columns_of(record)[1:]) == row[2:4]:
                        continue  # even with an age that could not be stored any more
                try:
                    _, _, status, at, _ = self._encode_row(record)
                except InvalidRecordError as error:
                    names = " and ".join(filter(None, self._fields[1:]))
                    raise InvalidRecordError(
                        f"{_truncated_repr(key)}, whose status and age {names} give: {error}"
                    ) from None
                unit.write(self._upsert, self._row_with_checksum(key, row[1].decode(), status, at))

    # ---- rows, for transfer

    def _stored_document(self, record_id: str) -> _Json:
        """Return a record's JSON object as it is stored; {} if there is none."""
        row = self._read_row(record_id)
        if row is None:
            return {}
        self._decode_row(row)  # raises if it is damaged
        return cast(_Json, json.loads(row[1]))

    def _export_lines(self, secrets: frozenset[str]) -> Iterator[str]:
        """Walk the records as lines of an export, with `***` for the secret fields.

        Custom records stand beside their id, status and age, which only the operator's code could
        derive again.
        """
        for row in self._walk(_WALK_ROWS, None):
            self._decode_row(row)  # raises if it is damaged
            record = row[1].decode()
            if secrets:
                record = _encode_json(_redact(json.loads(record), secrets))
            columns = ""
            if self.name not in _OUR_TABLES:
                status = None if row[2] is None else row[2].decode()
                names = (("key", self._id_in(row[0])), ("status", status), ("at", row[3]))
                columns = "".join(f',"{name}":{_encode_json(value)}' for name, value in names)
            yield f'{{"namespace":"{self.name}"{columns},"record":{record}}}\n'

    def _row_of_document(
        self, record_id: Any, status: Any, at: Any, document: _Json
    ) -> tuple[str, str, str | None, int | None, int]:
        """Return the row of a JSON object, with columns as another process derived them."""
        if (
            not (_is_text(status) or status is None)
            or not _is_stored_time(at)
            or not _is_json(document)
        ):
            raise ValueError(
                "status must be text or null, at Unix seconds or null, the record plain JSON"
            )
        key = self._key_prefix + _check_id(record_id)
        return self._row_with_checksum(key, _encode_json(document), status, at)

    def _insert_row(self, row: Iterable[Any]) -> bool:
        """Store a row unless there is one with its key; return whether it was stored."""
        return self._via.write(self._insert_if_absent, tuple(row)) > 0

    def _upsert_row(self, row: _Row) -> str:
        """Store a row over one with its key; return `added`, `replaced` or `unchanged`."""
        if self._insert_row(row):
            return "added"
        with suppress(DamagedError):
            if self._via.read(self._select_by_key, (row[0],)) == [_as_read(row)]:
                return "unchanged"
        self._via.write(self._upsert, row)
        return "replaced"

    # ---- rows, for repair

    def _copy_intact_rows(self, target: _Store, progress: Progress | None) -> _Losses:
        """Copy every row that is whole, and that can be reached, to the same table elsewhere.

        The table is read up to a page that cannot be read. The index of the keys then tells what
        was missed, and leads to the rows behind that page. `_copy_intact_rows_by_page` finds those
        that nothing leads to.
        """
        losses = _Losses()
        try:
            for rows in _scan(self._via.read, self.name):
                self._copy_rows(rows, target, losses)
                if progress is not None:
                    progress(losses.rows_seen, 0)
        except DamagedError:
            losses.is_table_read = False
        try:
            for key, row_number in self._walk(_WALK_KEYS, None):
                if not self._is_stored(target, row_number, key):
                    if row_number not in losses.missing_keys:  # it was not seen in the table
                        self._copy_row_at(row_number, target, losses)
                    losses.missing_keys[row_number] = key
        except DamagedError:
            losses.are_keys_read = False
        return losses

    def _copy_row_at(self, row_number: int, target: _Store, losses: _Losses) -> None:
        """Copy the row of a number that an index tells of, if it can be read."""
        rows: builtins.list[_Row] = []
        with suppress(DamagedError):
            rows = self._via.read(_SCAN_AT.format(self.name, _ALL_COLUMNS), (row_number,))
        # an index names a row that the table does not give: look for it page by page
        losses.is_table_read &= bool(rows)
        self._copy_rows(rows, target, losses)

    def _copy_rows(self, rows: builtins.list[_Row], target: _Store, losses: _Losses) -> None:
        """Copy those of some rows that are whole, unless the target has a record of their key."""
        losses.rows_seen += len(rows)
        with target.unit_of_work() as unit:
            for row in rows:
                if whole := self._intact_row(row):
                    unit.write(_INSERT_AT.format(self.name), (row[5], *whole))
                else:
                    losses.missing_keys.setdefault(row[5], row[0])

    def _intact_row(self, row: _Row) -> _Row | None:
        """Return a row with the columns that its record gives; None if the record is damaged."""
        try:
            self._decode_row(row)
        except DamagedError:
            with suppress(InvalidRecordError):
                return self._row_by_value(row)
            return None
        except InvalidRecordError:  # it is whole, and its class has changed since
            pass
        return row[:5]

    def _row_by_value(self, row: _Row) -> _Row | None:
        """Return a row with the columns that its value gives, if only its columns are damaged."""
        record = self._decode_ignoring_columns(row)
        if record is None:
            return None
        record_id, status, at = self._columns_of(record)  # the value stays as it is
        return self._row_with_checksum(self._key_prefix + record_id, row[1].decode(), status, at)

    def _copy_row(self, row: _Row, row_number: int | None, target: _Store) -> bool:
        """Copy a row that is whole, unless there is one with its key; return whether it was."""
        return target.write(_INSERT_AT.format(self.name), (row_number, *row[:5])) > 0

    def _read_rows(self, ids: Iterable[str] | None) -> Iterator[_Row]:
        """Read the rows of these ids, as far as they exist; all rows if `ids` is None."""
        if ids is None:
            yield from self._walk(_WALK_ROWS, None)
            return
        for record_id in filter(_ID.is_valid, ids):
            if row := self._read_row(record_id):
                yield row

    def _is_stored(self, target: _Store, row_number: int, key: bytes | None) -> bool:
        """Whether a row was copied, by its number or by its key: an index may err in either."""
        return bool(target.read(_IS_STORED.format(self.name), (row_number, key)))

    def _ids_lost(self, losses: _Losses, target: _Store) -> dict[str, int]:
        """Return the ids of the rows that were not copied, or what is known of them; by number."""
        return {
            self._id_in(key) if key else f"row {row_number}": row_number
            for row_number, key in sorted(losses.missing_keys.items())
            # by the key, where it is known: another row may have been found under the number
            if not self._is_stored(target, -1 if key else row_number, key)
        }


class _Losses:
    """What repair has not found in a table."""

    def __init__(self) -> None:
        self.missing_keys: dict[
            int, bytes | None
        ] = {}  # by row number; some may have been found since
        self.is_table_read = True  # every page of the rows could be read
        self.are_keys_read = True  # every page of the index of the keys could be read
        self.rows_seen = 0


def _scan(read: Callable[..., list[_Row]], table: str) -> Iterator[list[_Row]]:
    """Read a table in the order of the row numbers; raise where a page of it cannot be read.

    Of a row whose own page is sound, and the rest of its value is not, the key alone is read.
    """
    place, limit, columns = -(2**63), 1000, _ALL_COLUMNS
    while True:
        try:
            sql = _SCAN_AFTER.format(table, columns)
            rows = read(sql, (place, limit), byte_limit=_BATCH_BYTES)
        except DamagedError:
            if columns == _KEY_ALONE:
                raise
            if limit == 1:
                columns = _KEY_ALONE
            limit = 1  # row by row, up to the very one
            continue
        if not rows:
            return
        yield rows
        if rows[-1][5] <= place:  # a damaged page, which would lead round in circles
            raise DamagedError(f"row {rows[-1][5]} is out of order")
        place = rows[-1][5]
        if columns == _KEY_ALONE:
            limit, columns = 1000, _ALL_COLUMNS


def _copy_intact_rows_by_page(
    path: str,
    namespaces: list[Namespace[Any]],
    losses: dict[str, _Losses],
    target: _Store,
    progress: Progress | None,
) -> None:
    """Copy the rows of these namespaces that stand on any page of a file, whatever leads to it.

    Key and checksum of each row vouch for it.
    """
    by_name = {each.name.encode(): each for each in namespaces}
    others = _pages_of_others(path, [each.name for each in namespaces])
    with closing(_connect(path, 0)) as copy:
        for rows in _rows_by_page(copy, others, progress):
            found: dict[bytes, list[_Row]] = defaultdict(list)
            for row in rows:
                found[(row[0] or b"").partition(b":")[0]].append(row)
            for name in found.keys() & by_name.keys():
                namespace = by_name[name]
                namespace._copy_rows(found[name], target, losses[namespace.name])


def _pages_of_others(path: str, names: list[str]) -> set[int]:
    """Return the pages of a file that are not in use, or belong to other tables and indexes.

    What looks like a row of ours there was deleted, or copied by another program. They are found by
    what leads to them (https://www.sqlite.org/fileformat2.html, sections 1.5 and 1.6).
    """
    with closing(_connect(path, 0)) as copy:
        roots = copy.query(_SELECT_ROOTS)
        page_size = copy.pragma("page_size")
    pages: set[int] = set()
    with open(path, "rb") as file:

        def number_at(place: int) -> int:
            return int.from_bytes(page[place : place + 4], "big")

        page = file.read(page_size)
        trunk = number_at(32)
        while trunk not in pages and trunk > 0:
            pages.add(trunk)
            file.seek((trunk - 1) * page_size)
            page = file.read(page_size)
            pages.update(number_at(8 + 4 * n) for n in range(min(number_at(4), page_size // 4 - 2)))
            trunk = number_at(0)
        below = [root for root, table in roots if table.decode(errors="replace") not in names]
        while below:
            number = below.pop()
            file.seek(max(0, number - 1) * page_size)
            page = file.read(page_size)
            if number in pages or not page:
                continue
            pages.add(number)
            if page[0] in (2, 5):  # it leads to others: one for each cell, and a last one
                cells = (page[place : place + 2] for place in range(12, page_size, 2))
                count = int.from_bytes(page[3:5], "big")
                places = [int.from_bytes(cell, "big") for cell in islice(cells, count)]
                below += [number_at(place) for place in (*places, 8)]
    return pages


def _rows_by_page(
    copy: _Connection, others: set[int], progress: Progress | None
) -> Iterator[list[_Row]]:
    """Read each page of a file as if it were a whole table.

    SQLite finds a page of rows by the pages that lead to it alone; where these are damaged, the
    schema is made to lead to it, in a transaction that is undone. A page that holds no rows is an
    error, and one that leads to others gives their rows once more.
    """
    count = copy.pragma("page_count")
    for page in range(2, count + 1):
        if page in others:
            continue
        try:
            copy.query(_BEGIN_WRITE)
            copy.query(_LET_SCHEMA_BE_WRITTEN)
            copy.query(_SET_ROOT, (page,))
            copy.query(_READ_SCHEMA_ANEW)
            yield from _scan(copy.query, "tasks")
        except (DamagedError, _StatementError):  # the latter where no schema may be written
            pass
        copy.rollback()
        copy.query(_READ_SCHEMA_ANEW)
        if progress is not None:
            progress(page, count)


def _copy_other_tables(source: str, path: str, names: list[str]) -> Iterator[str]:
    """Copy what other programs keep in a file to another; yield what could not be copied.

    Nothing that names one of our tables is copied: a trigger there would change what we write.
    """
    ours = [name.encode() for name in names]
    with closing(_connect(path, 0)) as target:
        target.query(_ATTACH, (source,))
        found = _read_definitions(lambda _: target.query(_SELECT_ATTACHED), source)
        made = {each[:3] for each in _read_definitions(target.query, path)}
        for kind, name, table, sql in sorted(found, key=lambda each: each[0] != b"table"):
            if (kind, name, table) in made or name.startswith(b"sqlite_"):
                continue
            try:
                problem = _copy_other(target, ours, kind, name, table, sql)
            except (DamagedError, _StatementError, UnicodeDecodeError) as error:
                problem = str(error).removeprefix(f"{path}: ")  # which is soon gone
            if problem:
                shown = f"{kind.decode()} {_truncated_repr(name.decode(errors='replace'))}"
                yield f"{shown} of another program is not copied whole: {problem}"


def _copy_other(
    target: _Connection, ours: list[bytes], kind: bytes, name: bytes, table: bytes, sql: bytes
) -> str:
    """Copy what another program has defined, a table with its rows; return what is in the way."""
    is_active = kind in (b"trigger", b"view")
    if table.lower() in ours or (is_active and _words(sql) & {*ours}):
        return "it names one of our tables"
    if is_active or sql.upper().startswith(b"CREATE VIRTUAL"):  # as VACUUM does, not executed
        target.query(_LET_SCHEMA_BE_WRITTEN)
        target.query(_INSERT_DEFINITION, (kind, name, table, sql))
        target.query(_READ_SCHEMA_ANEW)
        return ""
    target.query(sql.decode())
    is_whole = kind != b"table" or _copy_other_rows(target, name.decode())
    return "" if is_whole else "some of its rows cannot be read"


def _copy_other_rows(target: _Connection, table: str) -> bool:
    """Copy the rows of another program's table; return whether all of them could be read."""

    def quoted(name: str) -> str:
        return name.replace('"', '""')

    columns = [row[1].decode() for row in target.query(_COLUMNS.format(quoted(table)))]
    names = ", ".join(f'"{quoted(name)}"' for name in columns)
    orders = ["ORDER BY rowid", "ORDER BY rowid DESC"]
    try:
        target.query(_HAS_ROW_NUMBERS.format(quoted(table)))
        if "rowid" not in map(str.lower, columns):
            names = f"rowid, {names}"
    except _StatementError:  # WITHOUT ROWID
        orders = [""]
    for order in orders:
        statement = _COPY_OTHER.format(quoted(table), names, order)
        offset, step = 0, _ALL_ROWS
        while step:  # halved until it is known how many rows can be read from this end
            try:
                target.query(statement, (step, offset))
                if step == _ALL_ROWS:
                    return True
                offset += step
            except DamagedError:
                pass
            step //= 2
    return False


@dataclass(kw_only=True)
class _Declaration(_CheckedRecord):
    """What `OperatorDb.namespace` was told of a custom namespace; it stands in `_namespaces`.

    `key`, `status` and `at` are the names of fields, `secrets` those of the secret ones, now or
    ever. Rows that came from elsewhere may have the columns of another declaration: then
    `are_columns_current` is False until `namespace()` brings them up to date.
    """

    name: Id
    key: str
    status: str | None = None
    at: str | None = None
    secrets: list[str] = field(default_factory=list)
    are_columns_current: bool = True


class _TimedNamespace(Namespace[R]):
    """A custom namespace; ours are timed by the methods of OperatorDb."""

    def _declare(self) -> None:
        """Make the table, its columns and its declaration what this namespace needs."""
        stored = self._stored_declaration()
        if self.has_table() and self._wanted_declaration(stored) == stored:
            return
        if self.has_table() and self._store.read_only:
            self._raise_unless_columns_current()
            return
        self._store.raise_if_in_transaction("namespace() cannot make or change its table")
        with self._store.unit_of_work() as unit:
            part = self.within(unit)
            stored = part._stored_declaration()
            wanted = self._wanted_declaration(stored)
            if not part.has_table():
                part.create_table()
            elif stored is None or not self._has_columns_of(stored):
                part._update_columns(unit)
            cast("Namespace[_Declaration]", self._declarations).within(unit).put(wanted)

    def _wanted_declaration(self, stored: _Declaration | None) -> _Declaration:
        """Return what is to be stored: these fields, and every secret that there ever was."""
        key, status, at = self._fields
        if stored and key != stored.key and not self._codec.is_former_name(stored.key, key):
            raise ConflictError(
                f"{self.name} is stored by key={stored.key!r}: key={key!r} needs a new namespace"
            )
        secrets = sorted(self._codec.secret_names.union(stored.secrets if stored else ()))
        return _Declaration(name=self.name, key=key, status=status, at=at, secrets=secrets)

    get = _timed(Namespace.get)
    put = _timed(Namespace.put)
    update = _timed(Namespace.update)
    delete = _timed(Namespace.delete)
    list = _timed(Namespace.list)
    count = _timed(Namespace.count)
    prune = _timed(Namespace.prune)


class _JsonNamespace(Namespace[Any]):
    """A namespace whose dataclass this process does not know: its records are JSON objects."""

    def __init__(self, store: _Store, name: str, declarations: Namespace[_Declaration]) -> None:
        # the codec of any class without secrets will do: the methods below do not decode with it
        super().__init__(store, name, TranscriptEntry, key="role", declarations=declarations)

    def _secret_names(self) -> frozenset[str] | None:
        """Return the names of the secret fields; None if the namespace was never declared."""
        stored = self._stored_declaration()
        return None if stored is None else frozenset(stored.secrets)

    def _doubt_columns(self) -> None:
        """Let the next `namespace()` bring the columns up to date: rows came from elsewhere."""
        stored = self._stored_declaration()
        if stored is not None and self._declarations is not None:
            declarations = self._declarations.within(cast(_UnitOfWork, self._via))
            declarations.put(replace(stored, are_columns_current=False))

    def _visible_columns(self, record_id: str) -> _Json | None:
        """Return what can be shown of a record whose secret fields are not known, or None."""
        row = self._read_row(record_id)
        if row is None:
            return None
        self._decode_row(row)  # raises if it is damaged
        status = None if row[2] is None else row[2].decode()
        return {"key": row[0].decode(), "status": status, "at": row[3]}

    def _row_by_value(self, row: _Row) -> _Row | None:
        """Do as in other namespaces, as far as the declared fields stand in the JSON object."""
        stored = None
        with suppress(DamagedError):  # the declaration may be damaged too
            stored = self._stored_declaration()
        if stored is None:
            return None
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            document = json.loads(row[1])
            status = document[stored.status] if stored.status else None
            at = document[stored.at] if stored.at else None
            key = self._key_prefix + document[stored.key]
            whole = self._row_with_checksum(key, row[1].decode(), _status_text(status), at)
            return whole if whole[4] == row[4] else None
        return None

    def _decode_row(self, row: _Row, *, is_second_attempt: bool = False) -> Any:
        if not self._has_valid_checksum(row):
            raise self._damage_error(row, "its checksum does not match")
        try:
            return json.loads(row[1])
        except (ValueError, RecursionError):
            raise self._damage_error(row, "it is not JSON") from None


_UNTIMED: dict[type, type] = {_TimedNamespace: Namespace}  # a part of a timed call is not timed


def _is_namespace_name(name: object) -> bool:
    """Whether a custom namespace can have this name, which stands in SQL as it is."""
    matches = isinstance(name, str) and re.fullmatch("(?!sqlite_)[a-z][a-z0-9_]{0,47}", name)
    return bool(matches) and name not in _OUR_TABLES


def _custom_tables(via: _Store | _UnitOfWork) -> list[str]:
    """Return the names of the custom namespaces that the file holds."""
    return [name for name in _tables_like_ours(via.read) if _is_namespace_name(name)]


# ==== Operator database: tasks, sessions, proofs, configuration, and their rules ==================

_INTEGRITY_CHECK = "PRAGMA integrity_check(10000)"
_INTEGRITY_CHECK_OF_TABLE = "PRAGMA integrity_check('{}')"
_ENTRIES_PER_BATCH = 2_000  # of a session's log, that a prune removes at a time
_UNUSED_PAGES = "PRAGMA freelist_count"
_BYTES_BY_TABLE = (  # with their indexes
    "SELECT tbl_name, sum(pgsize) FROM dbstat JOIN sqlite_master USING (name)"
    " WHERE aggregate = TRUE GROUP BY tbl_name"
)


@dataclass(kw_only=True, frozen=True)
class PruneReport:
    """What `OperatorDb.prune` removed, and the size of the files in bytes before and after it.

    After a dry run: what it would remove.
    """

    tasks: int
    sessions: int
    proofs: int
    bytes_before: int
    bytes_after: int
    dry_run: bool


@dataclass(kw_only=True)
class _StoredSession(_CheckedRecord):
    """A session as it is stored, apart from its log.

    It holds how many entries each part of the log has, so that none can be missing unnoticed.
    """

    session_id: Id
    active_task_ids: list[Id]
    created_at: UnixTime
    last_active: UnixTime
    transcript_entries: _Count = 0
    commands: _Count = 0


@dataclass(kw_only=True)
class _LogEntry(_CheckedRecord):
    """One entry of a session's log as it is stored; `seq` counts from 0.

    `log` is `transcript:{session_id}` or `commands:{session_id}`.
    """

    log: Id
    seq: _Count
    content: str
    role: str | None = None
    timestamp: UnixTime = field(default_factory=_now)

    @property
    def entry_id(self) -> str:
        """The row's id; `seq` holds no colon, so that no two entries share one."""
        return f"{self.log}:{self.seq}"


def _log_names(session_id: str) -> tuple[str, str]:
    """Return the names of the two parts of a session's log, its transcript and its commands."""
    return f"transcript:{session_id}", f"commands:{session_id}"


# ---- rules of a task's history


def _parse_status(value: TaskStatus | str) -> TaskStatus:
    """Return a task status; raise InvalidRecordError for what is none."""
    try:
        return TaskStatus(value if isinstance(value, str) else "")
    except ValueError:
        raise InvalidRecordError(
            f"{_truncated_repr(value)} is not a task status: use {', '.join(TaskStatus)}"
        ) from None


def _parse_statuses(value: TaskStatus | str | Iterable[TaskStatus | str]) -> list[TaskStatus]:
    """Return one status, or several, as a list; raise InvalidRecordError if there is none."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [_parse_status(value)]
    statuses = [_parse_status(each) for each in value]
    if not statuses:
        raise InvalidRecordError("expected= must be a task status, or several; got none")
    return statuses


_DESCRIPTIVE_FIELDS = (
    "payload",
    "description",
    "reward_lamports",
    "reward_skr_tokens",
    "creator",
)


def _begins_with(history: list[StatusChange], start: list[StatusChange]) -> bool:
    """Whether a history is another, or goes on from it."""
    return history[: len(start)] == start


def _moves_back(task: TaskRecord, stored: TaskRecord) -> bool:
    """Whether a task's status is an earlier one than the stored: they are defined in order."""
    order = [*TaskStatus]
    return order.index(task.status) < order.index(stored.status)


def _is_newly_made(task: TaskRecord) -> bool:
    """Whether a task's history is the one entry that its constructor made.

    Its status and signature may have been set since.
    """
    first = task.history[0]
    made = replace(task, status=first.status, on_chain_signature=first.signature, history=[])
    return task.history == made.history


def _is_stale(task: TaskRecord, stored: TaskRecord) -> bool:
    """Whether a task was read, or made, without knowing how far the stored one has come."""
    if _begins_with(task.history, stored.history):
        return False
    if _begins_with(stored.history, task.history):
        return True
    is_later = task.status != stored.status and not _moves_back(task, stored)
    return _is_newly_made(task) and not is_later


def _adds_nothing(task: TaskRecord, stored: TaskRecord) -> bool:
    """Whether all that a stale task says is stored or a default; the first claim's time stands.

    An operator that was restarted does things over: it may claim a task that it has completed.
    """

    def signatures(of: TaskRecord) -> set[str | None]:
        return {None, of.on_chain_signature, *(change.signature for change in of.history)}

    default = TaskRecord(task_id=task.task_id)
    names = (*_DESCRIPTIVE_FIELDS, "completed_at")
    return (
        task.status in [change.status for change in stored.history]
        and signatures(task) <= signatures(stored)
        and all(
            getattr(task, name) in (getattr(default, name), getattr(stored, name)) for name in names
        )
    )


def _continue_history(task: TaskRecord, stored: TaskRecord) -> None:
    """Make a task's history begin with what is stored, and end with the task's status.

    A completion or signature that is stored stays where the task has none.
    """
    if not _begins_with(task.history, stored.history):
        later = [change for change in task.history if change not in stored.history]
        task.history[:] = stored.history + later
    if task.completed_at is None:
        task.completed_at = stored.completed_at
    if task.on_chain_signature is None:
        task.on_chain_signature = task.history[-1].signature or stored.on_chain_signature
    _append_present_status(task, stored)


def _append_present_status(task: TaskRecord, stored: TaskRecord | None = None) -> bool:
    """Make a task's history end with its status; return whether it grew.

    The new entry has the task's signature, unless that is the stored one, of an earlier move. A
    move to completed sets `completed_at`. So does storing a completed task whose history already
    shows the completion over a task that is still claimed or in progress.
    """
    signature, grows = task.on_chain_signature, True
    if task.history:
        last = task.history[-1]
        grows = last.status != task.status or (last.signature or signature) != signature
    if grows:
        is_new = stored is None or signature != stored.on_chain_signature
        change = StatusChange(status=task.status, signature=signature if is_new else None)
        task.history.append(change)
    moved = grows or (stored is not None and stored.status in _OPEN_STATUSES)
    if moved and task.status == TaskStatus.COMPLETED and task.completed_at is None:
        task.completed_at = task.history[-1].at
    return grows


def _move(task: TaskRecord, status: TaskStatus, signature: str | None, at: int | None) -> bool:
    """Move a task to a status; return False where its history shows that move already."""
    if status == task.status and signature in (None, task.on_chain_signature):
        return False
    if signature and any((c.status, c.signature) == (status, signature) for c in task.history):
        return False
    change = StatusChange(status=status, at=_now() if at is None else at, signature=signature)
    task.history.append(change)
    task.status = status
    task.on_chain_signature = signature or task.on_chain_signature
    if status == TaskStatus.COMPLETED and task.completed_at is None:
        task.completed_at = change.at
    return True


def _part_of(progress: Progress | None, offset: int, total: int) -> Progress | None:
    """Return what reports the progress of one part of long work as that of the whole."""
    return progress and (lambda done, _: progress(offset + done, total))


def _is_unsettled(task: TaskRecord | None) -> bool:
    """Whether there is a task that is neither completed nor resolved: its proof is needed."""
    return task is not None and task.status not in _SETTLED_STATUSES


def _remove_directory(path: str, owner: int) -> None:
    if os.getpid() == owner:  # and not in a forked child, which shares it
        import shutil

        shutil.rmtree(path, ignore_errors=True)


class OperatorDb:
    """The operator's database: tasks, sessions, proofs, configuration, and namespaces of its own.

    `path` is the file (default: the environment's AGENC_DB_PATH, then ~/.agenc/operator.db),
    created private to its owner when there is none; with `create=False`, StorageError is raised.
    ":memory:" is a private temporary file, removed at close. `read_only` changes no record and no
    byte of the file. `timeout` is how many seconds a call waits for other threads and processes
    before BusyError. `progress` is called while an older file is migrated.

    Durability. A call that changes something returns after its commit, and that survives the death
    of the process at any later moment. With `durable=True` it has also been synced to the disk: it
    survives loss of power, if the disk keeps its word. With `durable=False` the last commits may be
    lost with the power, never a part of one. A write-ahead log that something else cuts short loses
    its last commits without a sign.

    Threads. One object serves any number of threads: writers take turns, in the order in which they
    came; readers run beside them and see the last commit, or inside their own `transaction()` what
    it has done so far. An object belongs to no thread. In asyncio, call it through
    `asyncio.to_thread`.

    Processes. Any number may open one file on a local disk. After `fork()` parent and child may
    both go on with the object; connections are closed before and opened anew after. Only the child
    of a thread that forked within its own `transaction()`, or while another was at work for longer
    than `timeout`, gets an object that refuses every call.

    Records that are passed in are checked and copied as they are at that moment. All errors derive
    from OperatorDbError. Besides those that a method's docstring names, any may raise
    InvalidRecordError for its arguments, BusyError, ClosedError, DamagedError and StorageError, and
    one that writes also ConflictError (while another coroutine's transaction is open) and
    NewerSchemaError. A call that KeyboardInterrupt has ended may have been committed.
    """

    _operation_prefix = ""  # of the names of its operations

    def __init__(
        self,
        path: _Path | None = None,
        *,
        create: bool = True,
        read_only: bool = False,
        durable: bool = True,
        timeout: float = 30,
        progress: Progress | None = None,
    ) -> None:
        if not (type(timeout) in (int, float) and 0 <= timeout < threading.TIMEOUT_MAX):
            raise InvalidRecordError(
                f"timeout must be a number of seconds, 0 or more; got {_truncated_repr(timeout)}"
            )
        directory = ""
        if _is_memory(path):
            import tempfile

            directory = tempfile.mkdtemp(prefix="operator_db-")
            path = os.path.join(directory, "operator.db")
        try:
            store = _Store(
                _database_path(path),
                create=create,
                read_only=read_only,
                durable=durable,
                timeout=timeout,
                progress=progress,
            )
        except BaseException:
            if directory:
                _remove_directory(directory, os.getpid())
            raise
        # of the store, because namespaces and walks may outlive this object
        self._remove_temporary: Callable[[], object] | None = None
        if directory:
            self._remove_temporary = weakref.finalize(
                store, _remove_directory, directory, os.getpid()
            )
        self._store = store
        self._namespaces: dict[str, Namespace[Any]] = {}

        def ours(name: str, record_type: type[R], **columns: Any) -> Namespace[R]:
            namespace = Namespace(store, name, record_type, **columns)
            self._namespaces[name] = namespace
            return namespace

        self._tasks = ours("tasks", TaskRecord, key="task_id", status="status", at="age_from")
        self._sessions = ours("sessions", _StoredSession, key="session_id", at="last_active")
        # the status of an entry is its log: list, count and clear by status mean by log
        self._log = ours("session_log", _LogEntry, key="entry_id", status="log", at="seq")
        self._proofs = ours(
            "proofs", VerificationLog, key="task_id", status="submitted", at="timestamp"
        )
        self._config = ours("config", OperatorConfig, key="operator_id")
        self._declarations = ours("_namespaces", _Declaration, key="name")

    @classmethod
    def open(cls, path: _Path | None = None, **options: Any) -> OperatorDb:
        """Return OperatorDb(path, **options), under the prototype's name for it."""
        return cls(path, **options)

    def __enter__(self) -> OperatorDb:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OperatorDb({self.path!r})"

    @property
    def path(self) -> str:
        """The absolute path of the file, symbolic links resolved."""
        return self._store.path

    def close(self) -> None:
        """Close the database; closing it again does nothing, and later calls raise ClosedError.

        Waits up to `timeout` for the work of other threads, then raises BusyError and stays open.
        Raises ConflictError inside one's own `transaction()`.
        """
        self._store.close()
        if self._remove_temporary:
            self._remove_temporary()

    def transaction(self) -> AbstractContextManager[None]:
        """Make every change of the block one: all are committed at its end, or, if it raises, none.

        The write lock is taken at once, so what the block reads stays true until it ends. A block
        within a block can fail, and be caught, without the outer one. The block belongs to the
        thread and context that opened it: it must not await. When an error (disk full, I/O) has
        ended SQLite's transaction, every later call in the block raises StorageError, and so does
        leaving it.
        """
        return self._store.transaction()

    def namespace(
        self,
        name: str,
        record_type: type[R],
        *,
        key: str,
        status: str | None = None,
        at: str | None = None,
    ) -> Namespace[R]:
        """Return the namespace of a record type of the operator's own; make or update its table.

        `name` is 1 to 48 lower-case letters, digits and underscores, a letter first. `key`,
        `status` and `at` name fields or properties of the dataclass: the id (str), what status
        queries look for (str, an enum of str, or bool), and what the age is counted from (Unix
        seconds). If `status` or `at` is not what the file has declared, every row's columns are
        updated first. Raises InvalidRecordError for an unsuitable name or type, or a stored record
        that the class cannot take; ConflictError for another `key` than the declared one, and where
        the table would have to be made or changed inside a `transaction()`.
        """
        if not _is_namespace_name(name):
            raise InvalidRecordError(
                "a namespace is 1 to 48 of a-z, 0-9 and _, a letter first, and none of ours;"
                f" got {_truncated_repr(name)}"
            )
        namespace = _TimedNamespace(
            self._store,
            name,
            record_type,
            key=key,
            status=status,
            at=at,
            declarations=self._declarations,
        )
        namespace._declare()
        self._namespaces[name] = namespace
        return namespace

    # ---- tasks

    @_timed
    def store_task(self, task: TaskRecord) -> TaskRecord:
        """Store a task, in place of the one with its id; return it as it is stored.

        History only grows: what is stored (if that can be read) comes first, and the status comes
        last. A move to completed sets `completed_at`, and no None takes the place of that or of
        `on_chain_signature`. The given record is left as it is.

        A record that does not know the last moves of the stored task is stale: its history is only
        the beginning of the stored one, or it was made anew and its status is not a later one. If
        it says nothing new, nothing changes: an operator that was restarted may claim a task over.
        Otherwise ConflictError is raised, as for a record whose status is an earlier one than the
        stored: read the task again, or use `update_task`.
        """
        task = _codec(TaskRecord).take(task)
        given_length, given_completion = len(task.history), task.completed_at
        _append_present_status(task)
        if self._tasks._put(task, if_absent=True):  # most tasks are new: one statement is enough
            return task
        with self._store.unit_of_work() as unit:
            # undo the append, and redo it on top of the stored history
            del task.history[given_length:]
            task.completed_at = given_completion
            tasks = self._tasks.within(unit)
            stored = self._get_unless_damaged(tasks, task.task_id)
            if stored is not None:
                is_stale = _is_stale(task, stored)
                if is_stale and _adds_nothing(task, stored):
                    return stored
                if is_stale or _moves_back(task, stored):
                    why = "is stale" if is_stale else f"moves it back to {task.status}"
                    raise ConflictError(
                        f"tasks:{_truncated_repr(task.task_id)} is {stored.status} by now, and the"
                        f" record that was given {why}: read it again, or use update_task"
                    )
            self._store_over(tasks, task, stored)
            return task

    @staticmethod
    def _get_unless_damaged(tasks: Namespace[TaskRecord], task_id: str) -> TaskRecord | None:
        """Return the task that a new one has to go on from; a damaged one can be overwritten."""
        with suppress(DamagedError):
            return tasks.get(task_id)
        return None

    @staticmethod
    def _store_over(
        tasks: Namespace[TaskRecord], task: TaskRecord, stored: TaskRecord | None
    ) -> None:
        """Store a task in place of the one with its id, whose history it takes over."""
        if stored is None:
            _append_present_status(task)
        else:
            _continue_history(task, stored)
        tasks._put(task)

    @_timed
    def update_task(self, task_id: str, change: Callable[[TaskRecord], TaskRecord]) -> TaskRecord:
        """Read a task, call `change(task)`, and store what it returns, as one transaction.

        Returns the task as it is stored. What is stored of its history stays; a status that
        `change` sets is added to it, with the time and a signature that is new, and is a move like
        that of `update_task_status`, to an earlier one too. The first move to completed sets
        `completed_at`, and no None takes the place of that or of `on_chain_signature`. For
        `change`, see `Namespace.update`. Raises NotFoundError, and InvalidRecordError for a task of
        another id.
        """

        def change_and_go_on(stored: TaskRecord) -> TaskRecord:
            codec = _codec(TaskRecord)
            task = codec.take(change(codec.copy(stored)))
            _continue_history(task, stored)
            return task

        return self._tasks.update(task_id, change_and_go_on)

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
        with self._store.snapshot() as snapshot:
            tasks = self._tasks.within(snapshot)
            return {status: tasks.count(status) for status in TaskStatus}

    @_timed
    def list_tasks(
        self,
        status: TaskStatus | str | None = None,
        *,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[TaskRecord]:
        """Return the tasks of a status, or of any, by age, oldest first.

        Age is counted from completion, or else from the claim.
        """
        wanted = None if status is None else _parse_status(status)
        return self._tasks.list(wanted, limit=limit, newest_first=newest_first)

    @_timed
    def list_tasks_by_status(self, status: TaskStatus | str) -> list[TaskRecord]:
        """Return the tasks of a status, oldest first; only they are read."""
        return self._tasks.list(_parse_status(status))

    def iter_tasks(self, status: TaskStatus | str | None = None) -> Iterator[TaskRecord]:
        """Walk the tasks in the order of their ids; see `Namespace.values`."""
        return self._tasks.values(None if status is None else _parse_status(status))

    @_timed
    def update_task_status(
        self,
        task_id: str,
        status: TaskStatus | str,
        *,
        signature: str | None = None,
        at: int | None = None,
        expected: TaskStatus | str | Iterable[TaskStatus | str] | None = None,
    ) -> TaskRecord:
        """Move a task to a status, record the move in its history, and return the task.

        `at` is in Unix seconds (default: now), `signature` is the transaction's. With `expected`,
        one status or several, ConflictError is raised unless the task's status now is among them.
        Moving it to where it is changes nothing, nor does a move whose signature the history shows
        already. It may move back. The first move to completed sets `completed_at`. Raises
        NotFoundError.
        """
        wanted = _parse_status(status)
        must_be = None if expected is None else _parse_statuses(expected)
        if signature is not None:
            _check_id(signature, "signature")
        _check_time("at", at)

        with self._store.unit_of_work() as unit:
            tasks = self._tasks.within(unit)
            task = self._require_task(tasks, task_id)
            if must_be is not None and task.status not in must_be:
                key, names = f"tasks:{_truncated_repr(task_id)}", " or ".join(must_be)
                raise ConflictError(f"{key} is {task.status}, not {names}: read it again")
            if _move(task, wanted, signature, at):
                tasks._put(task)
            return task

    @_timed
    def complete_task(
        self, task_id: str, proof: VerificationLog, *, signature: str | None = None
    ) -> TaskRecord:
        """Store the proof of a task and move the task to completed, as one transaction.

        Returns the task. Done again with the same evidence it changes nothing. Raises NotFoundError
        when there is no such task, and ConflictError for a disputed or resolved task, for another
        task's proof, and where other evidence is stored.
        """
        if isinstance(proof, VerificationLog) and proof.task_id != task_id:
            ids = _truncated_repr(proof.task_id), _truncated_repr(task_id)
            raise ConflictError(f"the proof is for task {ids[0]}, not for {ids[1]}")

        with self._store.unit_of_work() as unit:
            tasks = self._tasks.within(unit)
            task = self._require_task(tasks, task_id)
            if task.status not in (*_OPEN_STATUSES, TaskStatus.COMPLETED):
                key = f"tasks:{_truncated_repr(task_id)}"
                raise ConflictError(f"{key} is {task.status}: it cannot be completed now")
            self._store_proof(unit, proof)
            if task.status != TaskStatus.COMPLETED:
                _move(task, TaskStatus.COMPLETED, signature, None)
                tasks._put(task)
            return task

    @staticmethod
    def _require_task(tasks: Namespace[TaskRecord], task_id: str) -> TaskRecord:
        task = tasks.get(task_id)
        if task is None:
            raise NotFoundError(f"there is no {_truncated_repr('tasks:' + task_id)}")
        return task

    # ---- sessions

    @_timed
    def store_session(self, session: SessionState) -> None:
        """Store a session: its fields replace those that are stored, its log extends the stored.

        Raises ConflictError unless the log that is given begins with the stored one, so that
        nobody's entry is overwritten unseen. To rewrite history, delete the session first.
        """
        session = _codec(SessionState).take(session)
        with self._store.unit_of_work() as unit:
            self._store_session(unit, session)

    def _store_session(self, unit: _UnitOfWork, session: SessionState) -> None:
        name, said, commands = session.session_id, session.transcript, session.command_history
        stored = self._get_session(unit, name) or SessionState(session_id=name)
        known, known_commands = len(stored.transcript), len(stored.command_history)
        if said[:known] != stored.transcript or (
            commands[:known_commands] != stored.command_history
        ):
            raise ConflictError(
                f"sessions:{_truncated_repr(name)} has entries that the given log lacks: read it"
                " again"
            )
        transcript_log, command_log = _log_names(name)
        new = ((entry.content, entry.role, entry.timestamp) for entry in said[known:])
        self._append_entries(unit, transcript_log, known, new)
        at = session.last_active
        new_commands = ((command, None, at) for command in commands[known_commands:])
        self._append_entries(unit, command_log, known_commands, new_commands)
        row = _StoredSession(
            session_id=name,
            active_task_ids=session.active_task_ids,
            created_at=session.created_at,
            last_active=session.last_active,
            transcript_entries=len(said),
            commands=len(commands),
        )
        self._sessions.within(unit)._put(row)

    @_timed
    def get_session(self, session_id: str) -> SessionState | None:
        """Return the session with its whole log, or None."""
        with self._store.snapshot() as snapshot:
            return self._get_session(snapshot, session_id)

    def _get_session(self, unit: _UnitOfWork, session_id: str) -> SessionState | None:
        row = self._sessions.within(unit).get(session_id)
        return self._with_log(unit, row) if row else None

    @_timed
    def list_sessions(self, *, limit: int | None = None) -> list[SessionState]:
        """Return the sessions with their logs, the least recently active first."""
        with self._store.snapshot() as snapshot:
            rows = self._sessions.within(snapshot).list(limit=limit)
            return [self._with_log(snapshot, row) for row in rows]

    @_timed
    def delete_session(self, session_id: str) -> bool:
        """Remove a session and its log; return whether there was one."""
        with self._store.unit_of_work() as unit:
            is_gone = self._sessions.within(unit).delete(session_id)
            for log in _log_names(session_id):
                self._log.within(unit).clear(log)
            return is_gone

    @_timed
    def append_transcript(
        self, session_id: str, role: str, content: str, *, timestamp: int | None = None
    ) -> None:
        """Add an utterance to a session, which is created if there is none.

        Costs the same however long the log is.
        """
        at = _now() if timestamp is None else timestamp
        TranscriptEntry(role=role, content=content, timestamp=at)  # checks them

        with self._active_session(session_id, at) as (unit, row):
            log, entry = _log_names(session_id)[0], (content, role, at)
            length = row.transcript_entries
            row.transcript_entries = self._append_entries(unit, log, length, [entry])

    @_timed
    def append_command(
        self, session_id: str, command: str, *, timestamp: int | None = None
    ) -> None:
        """Add a command to a session's history; the session is created if there is none."""
        _check_time("timestamp", timestamp)
        at = _now() if timestamp is None else timestamp
        SessionState(session_id=session_id, command_history=[command], last_active=at)  # checks

        with self._active_session(session_id, at) as (unit, row):
            log, entry = _log_names(session_id)[1], (command, None, at)
            row.commands = self._append_entries(unit, log, row.commands, [entry])

    @_timed
    def transcript(self, session_id: str, *, last: int | None = None) -> list[TranscriptEntry]:
        """Return a session's transcript in order, or its last entries; only these are read.

        The list is empty where there is no such session.
        """
        _check_count("last", last)
        with self._store.snapshot() as snapshot:
            row = self._sessions.within(snapshot).get(session_id)
            return self._read_transcript(snapshot, row, last) if row else []

    @_timed
    def link_task(self, session_id: str, task_id: str) -> None:
        """Add a task to those that a session is about; the session is created if there is none."""
        _check_id(task_id)

        with self._active_session(session_id, _now()) as (_, row):
            if task_id not in row.active_task_ids:
                row.active_task_ids.append(task_id)

    @_timed
    def unlink_task(self, session_id: str, task_id: str) -> bool:
        """Take a task off those that a session is about; return whether it was among them."""
        with self._store.unit_of_work() as unit:
            sessions = self._sessions.within(unit)
            session = sessions.get(session_id)
            if session is None or task_id not in session.active_task_ids:
                return False
            session.active_task_ids.remove(task_id)
            return sessions._put(session)

    @_interrupt_safe_context
    def _active_session(
        self, session_id: str, at: int
    ) -> Generator[tuple[_UnitOfWork, _StoredSession], None, None]:
        """Yield a session's row, made if absent, and store it as active at a time."""
        with self._store.unit_of_work() as unit:
            sessions = self._sessions.within(unit)
            row = sessions.get(session_id)
            if row is None:
                row = _StoredSession(
                    session_id=session_id, active_task_ids=[], created_at=at, last_active=at
                )
            yield unit, row
            row.last_active = max(row.last_active, at)
            sessions._put(row)

    def _append_entries(
        self, unit: _UnitOfWork, log: str, length: int, new: Iterable[tuple[str, str | None, int]]
    ) -> int:
        """Store entries at the end of a log of this length; return how long it is then."""
        entries = self._log.within(unit)
        for content, role, timestamp in new:
            entry = _LogEntry(log=log, seq=length, content=content, role=role, timestamp=timestamp)
            if not entries._put(entry, if_absent=True):
                raise DamagedError(
                    f"session_log:{_truncated_repr(log)} has more entries than its session expects:"
                    f" {_REPAIR}"
                )
            length += 1
        return length

    def _read_entries(
        self, unit: _UnitOfWork, log: str, length: int, last: int | None = None
    ) -> list[_LogEntry]:
        """Return a log's entries, or its last ones; raise DamagedError unless none is missing."""
        entries = self._log.within(unit).list(log, limit=last, newest_first=True)[::-1]
        first = 0 if last is None else max(0, length - last)
        if [entry.seq for entry in entries] != [*range(first, length)]:
            raise DamagedError(f"session_log:{_truncated_repr(log)} lacks entries: {_REPAIR}")
        return entries

    def _read_transcript(
        self, unit: _UnitOfWork, row: _StoredSession, last: int | None = None
    ) -> list[TranscriptEntry]:
        log, _ = _log_names(row.session_id)
        make = _codec(TranscriptEntry).from_checked
        return [
            make({"role": e.role or "", "content": e.content, "timestamp": e.timestamp})
            for e in self._read_entries(unit, log, row.transcript_entries, last)
        ]

    def _with_log(self, unit: _UnitOfWork, row: _StoredSession) -> SessionState:
        """Return a session with its log."""
        _, log = _log_names(row.session_id)
        commands = [entry.content for entry in self._read_entries(unit, log, row.commands)]
        transcript = self._read_transcript(unit, row)
        return _codec(SessionState).from_checked(
            {
                "session_id": row.session_id,
                "transcript": transcript,
                "command_history": commands,
                "active_task_ids": row.active_task_ids,
                "created_at": row.created_at,
                "last_active": row.last_active,
            }
        )

    def _shorten_or_delete_session(self, unit: _UnitOfWork, session_id: str) -> bool:
        """Remove a session, or, of a long one, only its last entries; return whether it is gone.

        A session of 100,000 entries takes 0.36 s, for which no writer should have to wait. What is
        left of it is a session whose log is as long as it expects.
        """
        sessions, entries = self._sessions.within(unit), self._log.within(unit)
        row, logs = sessions.get(session_id), _log_names(session_id)
        utterances = entries._delete_newest(logs[0], _ENTRIES_PER_BATCH)
        commands = entries._delete_newest(logs[1], _ENTRIES_PER_BATCH - utterances)
        if row is not None and utterances + commands > 0:
            row.transcript_entries = max(0, row.transcript_entries - utterances)
            row.commands = max(0, row.commands - commands)
            if row.transcript_entries or row.commands:
                sessions._put(row)
                return False
        for log in logs:
            entries.clear(log)
        return self._sessions._delete_listed(unit, session_id)

    # ---- proofs

    @_timed
    def store_proof(self, log: VerificationLog) -> bool:
        """Store the proof of a task, once; return whether it is new.

        The same evidence again changes nothing, not even the first timestamp or the submission.
        Raises ConflictError when the task has other evidence: a proof is never overwritten. Nor is
        one that cannot be read: DamagedError.
        """
        with self._store.unit_of_work() as unit:
            return self._store_proof(unit, log)

    def _store_proof(self, unit: _UnitOfWork, log: VerificationLog) -> bool:
        proofs = self._proofs.within(unit)
        if proofs.put(log, if_absent=True):
            return True
        try:
            stored = cast(VerificationLog, proofs.get(log.task_id))
        except DamagedError:
            whole = proofs._get_ignoring_columns(log.task_id)
            if whole is None:
                raise
            stored = whole
            proofs.put(stored)  # mends its columns
        if stored.evidence_hash != log.evidence_hash:
            raise ConflictError(
                f"proofs:{_truncated_repr(log.task_id)} is never overwritten:"
                f" {stored.evidence_hash} is stored, {log.evidence_hash} was given"
            )
        return False

    @_timed
    def get_proof(self, task_id: str) -> VerificationLog | None:
        """Return the proof of a task, its evidence hash verified, or None."""
        return self._proofs.get(task_id)

    @_timed
    def list_proofs(
        self, *, submitted: bool | None = None, limit: int | None = None
    ) -> list[VerificationLog]:
        """Return the proofs, or those that are or are not submitted, oldest first.

        `submitted=False` is the queue of what is to be submitted.
        """
        if submitted is not None and type(submitted) is not bool:
            raise InvalidRecordError(
                f"submitted must be a bool or None; got {_truncated_repr(submitted)}"
            )
        return self._proofs.list(submitted, limit=limit)

    @_timed
    def delete_proof(self, task_id: str) -> bool:
        """Remove the proof of a task; return whether there was one.

        Raises ConflictError while it is not submitted, or its task is there and neither completed
        nor resolved. One that cannot be read can always be deleted.
        """
        with self._store.unit_of_work() as unit:
            proofs, log = self._proofs.within(unit), None
            with suppress(DamagedError, InvalidRecordError):  # what is not read can be deleted
                log = proofs._get_ignoring_columns(task_id)
            if log is not None:
                task = self._tasks.within(unit).get(task_id)
                if not log.submitted or _is_unsettled(task):
                    key = f"proofs:{_truncated_repr(task_id)}"
                    raise ConflictError(f"{key} is not submitted, or its task is not settled")
            return proofs.delete(task_id)

    @_timed
    def mark_proof_submitted(self, task_id: str, signature: str) -> VerificationLog:
        """Record that a proof was submitted, and in which transaction; return the proof.

        The same signature again changes nothing. Raises NotFoundError, and ConflictError for
        another signature.
        """

        _check_id(signature, "signature")
        with self._store.unit_of_work() as unit:
            proofs = self._proofs.within(unit)
            log = proofs.get(task_id)
            key = _truncated_repr("proofs:" + task_id)
            if log is None:
                raise NotFoundError(f"there is no {key}")
            if log.submission_signature not in (None, signature):
                raise ConflictError(f"{key} was submitted by {log.submission_signature}")
            if log.submission_signature is None:
                # not `replace`, which would check again what an earlier version stored
                values = {**vars(log), "submitted": True, "submission_signature": signature}
                log = _codec(VerificationLog).from_checked(values)
                proofs._put(log)
            return log

    @_timed
    def dispute_bundle(self, task_id: str) -> _Json:
        """Return what a dispute over a task needs, as one JSON object.

        It is what `verify_dispute_bundle` takes. Raises NotFoundError if there is no proof.
        """
        with self._store.snapshot() as snapshot:
            log = self._proofs.within(snapshot).get(task_id)
            if log is None:
                raise NotFoundError(f"there is no {_truncated_repr('proofs:' + task_id)}")
            return _dispute_bundle(self._tasks.within(snapshot).get(task_id), log)

    # ---- configuration

    @_timed
    def store_config(self, config: OperatorConfig) -> None:
        """Store the operator's configuration, in place of the one that is there."""
        self._config.put(config)

    @_timed
    def update_config(self, change: Callable[[OperatorConfig], OperatorConfig]) -> OperatorConfig:
        """Read the configuration, call `change(config)`, and store what it returns.

        It is one transaction, and returns what is stored now. Where nothing is stored, `change` is
        given an empty configuration. For `change`, see `Namespace.update`.
        """
        with self._store.unit_of_work() as unit:
            configs = self._config.within(unit)
            config = configs.get(OperatorConfig.operator_id) or OperatorConfig()
            config = _codec(OperatorConfig).take(unit.call(change, config))
            configs._put(config)
            return config

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
        """Remove what is older than so many days and give the space back. None: leave it alone.

        Of tasks only completed ones go; of proofs only submitted ones whose task is gone, completed
        or resolved. It works in short batches, each of them final: interrupted, it has removed a
        part, and an error says how much. A long session goes from its end: when it is resumed
        meanwhile, what is left of it stays. `dry_run` counts the same and changes nothing. On a
        full disk it may fail with StorageError, because SQLite writes before it frees; some tens of
        MB are enough. It stops at a damaged record with DamagedError. Inside a `transaction()`
        block the file keeps its size.
        """
        for days in (task_days, session_days, proof_days):
            _check_days(0 if days is None else days)
        bytes_before = self._store.size()
        if not dry_run:
            self._store.checkpoint()  # what the WAL holds already would be needed twice
        removed = {"tasks": 0, "sessions": 0, "proofs": 0}
        kinds: list[tuple[Namespace[Any], float | None, tuple[Any, ...]]] = [
            (self._tasks, task_days, (TaskStatus.COMPLETED, None, self._tasks._delete_listed)),
            (self._sessions, session_days, (None, None, self._shorten_or_delete_session)),
            (
                self._proofs,
                proof_days,
                (True, self._has_unsettled_task, self._proofs._delete_listed),
            ),
        ]
        try:
            for namespace, days, (status, keep, remove) in kinds:
                offset, name = sum(removed.values()), namespace.name

                def count(done: int, _: int, name: str = name, offset: int = offset) -> None:
                    removed[name] = done
                    if progress is not None:
                        progress(offset + done, 0)

                if days is not None:
                    namespace._prune(days, status, keep, dry_run, count, remove)
            if not dry_run:
                self._store.release_pages()
        except OperatorDbError as error:
            with suppress(OperatorDbError):
                self._store.checkpoint()  # the WAL's space is the first to be given back
            if dry_run or self._store.is_in_transaction():
                raise
            done = ", ".join(f"{name}: {count}" for name, count in removed.items())
            raise type(error)(f"{error}; removed before that: {done}") from None
        return PruneReport(
            **removed, bytes_before=bytes_before, bytes_after=self._store.size(), dry_run=dry_run
        )

    def _has_unsettled_task(self, task_id: str) -> bool:
        return _is_unsettled(self._tasks.get(task_id))

    @_timed
    def check(self, *, progress: Progress | None = None) -> list[str]:
        """Return what is wrong with the file, a line for each damaged page, record and log.

        The list is empty if the file is sound. Reads everything, changes nothing, and goes on to
        the end whatever it finds. What it finds, `repair` mends, but for records that the
        operator's own class cannot take any more.
        """
        return self._find_problems(progress)

    def _find_problems(
        self, progress: Progress | None, *, is_damage_only: bool = False
    ) -> list[str]:
        custom: list[Namespace[Any]] = []
        with suppress(DamagedError):  # reported below
            custom = self._custom_namespaces()
        namespaces = [*(self._namespaces[name] for name in _OUR_TABLES), *custom]
        found = [*self._integrity_problems([each.name for each in namespaces])]
        total = done = 0
        with suppress(DamagedError):
            total = sum(each.count() for each in namespaces) if progress else 0
        found += self._schema_problems([each.name for each in namespaces])
        for each in namespaces:
            part = _part_of(progress, done, total)
            found += each.problems(part, is_damage_only=is_damage_only)
            with suppress(DamagedError):
                done += each.count() if progress else 0
        found += self._log_problems()
        return found

    def _integrity_problems(self, tables: list[str]) -> Iterator[str]:
        """Find what SQLite itself finds wrong with the pages of the file.

        Another program's table may need a collation that only that program has: where SQLite
        cannot check the whole file for that, it checks our tables.
        """
        try:
            yield from self._integrity_problems_found_by(_INTEGRITY_CHECK)
        except StorageError:
            for table in tables:
                yield from self._integrity_problems_found_by(
                    _INTEGRITY_CHECK_OF_TABLE.format(table)
                )

    def _integrity_problems_found_by(self, statement: str) -> Iterator[str]:
        try:
            for (line,) in self._store.read(statement):
                if line != b"ok":
                    yield line.decode(errors="replace")
        except DamagedError as error:
            yield str(error)

    def _schema_problems(self, tables: list[str]) -> Iterator[str]:
        """Find what is not as this module makes it, in or beside these tables."""
        try:
            definitions = _read_definitions(self._store.read, self.path)
            for table in tables:
                _validate_table(definitions, self.path, table)
        except (ForeignFileError, DamagedError) as error:
            yield str(error)

    def _log_problems(self) -> Iterator[str]:
        """Find sessions whose log is not as long as they know, and logs that have no session."""
        known: set[str] = set()
        try:
            for session_id in self._sessions.keys():  # noqa: SIM118  it is not iterable itself
                logs = _log_names(session_id)
                known.update(logs)
                # what is damaged was reported by its namespace
                with suppress(DamagedError, InvalidRecordError), self._store.snapshot() as snapshot:
                    row = self._sessions.within(snapshot).get(session_id)
                    lengths = (row.transcript_entries, row.commands) if row else ()
                    for log, length in zip(logs, lengths, strict=False):
                        if (count := self._log.within(snapshot).count(log)) != length:
                            yield (
                                f"session_log:{_truncated_repr(log)} has {count} entries, its"
                                f" session expects {length}"
                            )
            for log in self._log.statuses():
                if log not in known and self._has_no_session(log):
                    yield f"session_log:{_truncated_repr(log)} belongs to no session"
        except DamagedError as error:
            yield f"session_log: {error}"

    def _has_no_session(self, log: str) -> bool:
        """Whether a log is there and its session is not.

        Asked in one snapshot: either may have come or gone since they were listed.
        """
        with self._store.snapshot() as snapshot:
            try:
                session = self._sessions.within(snapshot).get(log.partition(":")[2])
            except DamagedError:  # reported by its namespace
                return False
            except InvalidRecordError:
                session = None
            return session is None and self._log.within(snapshot).count(log) > 0

    def _custom_namespaces(self, snapshot: _UnitOfWork | None = None) -> list[Namespace[Any]]:
        """Return every custom namespace that the file holds."""
        store, known = self._store, self._namespaces
        names = _custom_tables(snapshot or store)
        return [
            known.get(name) or _JsonNamespace(store, name, self._declarations) for name in names
        ]

    @_timed
    def stats(self) -> DbStats:
        """Return what the database holds, its size, and what this process has done with it.

        Reads the whole file.
        """
        with self._store.snapshot() as snapshot:
            bytes_by_table = self._bytes_by_table(snapshot)
            namespaces = [
                each.within(snapshot)
                for each in (
                    *(self._namespaces[name] for name in _OUR_TABLES if name[0] != "_"),
                    *self._custom_namespaces(snapshot),
                )
            ]
            tasks, proofs = self._tasks.within(snapshot), self._proofs.within(snapshot)
            unused = snapshot.read(_UNUSED_PAGES)[0][0] * snapshot.read(_PAGE_SIZE)[0][0]
            operations = self._store.latencies.copy()
            return DbStats(
                path=self.path,
                schema_version=len(_MIGRATIONS),
                files={
                    name: _file_size(self.path + suffix)
                    for name, suffix in _DATABASE_SUFFIXES.items()
                },
                free=unused,
                records={each.name: each.count() for each in namespaces},
                bytes={
                    each.name: bytes_by_table[each.name] for each in namespaces if bytes_by_table
                },
                tasks={status: tasks.count(status) for status in TaskStatus},
                unsubmitted_proofs=proofs.count(False),
                operations={name: each.copy() for name, each in operations.items() if each.count},
            )

    def _bytes_by_table(self, snapshot: _UnitOfWork) -> dict[str, int]:
        """Return the bytes of each table; empty where SQLite was built without dbstat."""
        try:
            rows = snapshot.read(_BYTES_BY_TABLE)
        except StorageError:  # no such table: dbstat
            return {}
        return {table.decode(errors="replace"): size for table, size in rows}

    def prometheus(self) -> str:
        """Return `stats` in Prometheus's text format.

        The names begin with `operator_db_`, and the label `database` is the path.
        """
        return _exposition(self.stats())

    def write_metrics(self, path: _Path) -> None:
        """Write `prometheus()` to a file, replaced atomically.

        It is meant for node_exporter's textfile collector, which wants a name in `.prom`. Others
        may read it (mode 0644), because node_exporter is another user.
        """
        with _open_output(path, mode=0o644) as write:
            write(self.prometheus().encode())

    # ---- transfer

    @_timed
    def export(
        self, file: _File, *, include_secrets: bool = False, progress: Progress | None = None
    ) -> None:
        """Write every record as JSON Lines, from one snapshot: a header, then a record a line.

        Takes constant memory. `file` is a path, whose file is private and is replaced atomically,
        or a stream, text or binary, which gets its first byte when the snapshot is done, so that a
        slow one holds nothing up. Secrets are written as `***` unless asked for. Raises
        DamagedError for a record that is not what was written, and ConflictError for a namespace of
        a file of version 1 that nobody has declared since, because its secrets are not known.
        """
        _export(self, file, include_secrets, progress)

    @_timed
    def import_(self, file: _File, *, progress: Progress | None = None) -> dict[str, Counter[str]]:
        """Store what `export`, or the prototype's `agenc-db export --format json`, wrote.

        All of it is stored, or nothing; every line is checked before the write lock is taken.
        Returns for each namespace how many records were `added`, `replaced` and `unchanged`, and,
        of the prototype's proofs, which it does not export, how many were `left_behind`. Where the
        database is ahead of the file, it wins: a task that has moved later or further, a longer
        log, a session's later activity and its links, a submission, a secret where the file holds
        `***` or nothing. Only empty fields of a stored configuration are filled: `kept_network`
        counts that the file has another one. Raises InvalidRecordError, which names line and field,
        NewerSchemaError, and ConflictError where a proof would overwrite other evidence or a
        session's log contradicts the one that is stored.
        """
        return _import(self, file, progress)

    @_timed
    def backup(
        self, path: _Path, *, overwrite: bool = False, progress: Progress | None = None
    ) -> None:
        """Write a copy of one state of the database, while others read and write.

        The copy is private, is checked as by `check()`, and then appears at `path` complete. It
        holds every secret that this database holds. Raises StorageError for a file that is there
        (unless `overwrite`) or has a WAL beside it, and DamagedError when this database is damaged.
        """
        _backup(self, path, overwrite, progress)

    @_timed
    def restore(self, path: _Path, *, progress: Progress | None = None) -> None:
        """Replace everything in this database by what a backup holds, as one transaction.

        The backup is checked first. Other threads and processes that have the database open go on
        with the new content; namespaces that are here and not in the backup are empty then. It
        takes room for a copy beside the database, where a backup of an older version is migrated.
        Raises StorageError when there is no such file, DamagedError when it is not sound, and what
        opening it raises.
        """
        _restore(self, path, progress)

    @_timed
    def repair(self, *, backup: _Path | None = None, progress: Progress | None = None) -> list[str]:
        """Make a damaged database sound; return a line for each record that this changed.

        A sound database is left as it is, and the list is empty. Otherwise a new one is built of
        every record that can be read, and put in place as one transaction, while others have the
        file open. The file as it was is kept beside it, private, as `PATH.<time>.damaged`; the
        first line names it, the others name what is lost or shortened. With a backup (what
        `restore` takes), records that are lost come from it, as they were then, never over one that
        could be read. What others commit meanwhile is not lost: repair starts again, and raises
        BusyError after three attempts. Writes through this very object wait until it is done, and
        get BusyError after `timeout`. It takes room for four copies of the database. Raises
        StorageError if that is not there or the database is read-only, ConflictError inside a
        `transaction()` block, and DamagedError when the backup is not sound.
        """
        return _repair(self, backup, progress)

    @_timed
    def compact(self) -> int:
        """Rebuild the file without gaps; return how many bytes smaller it and its WAL are.

        It takes as much free space again as the file has, holds writers up until it is done, and
        cannot be interrupted; `prune` gives back what it freed by itself, and does none of that.
        Raises ConflictError inside a `transaction()` block.
        """
        before = self._store.size()
        self._store.vacuum()
        return before - self._store.size()


# ==== Metrics: what this process has done, how long it took, what the database holds ==============


class Latency:
    """How long the calls of one operation took in this process, in fixed memory.

    `buckets[i]` counts the calls that took at most `Latency.bounds[i]` seconds and longer than the
    bound before; the last one counts those beyond every bound. `seconds` is their sum, `errors`
    counts those that raised, by the error's name.
    """

    bounds: ClassVar[tuple[float, ...]] = (
        *(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2.5, 5)),
        10.0,
    )
    __slots__ = ("buckets", "errors", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(self.bounds) + 1)
        self.seconds = 0.0
        self.errors: defaultdict[str, int] = defaultdict(int)

    def __repr__(self) -> str:
        return f"Latency(count={self.count}, seconds={self.seconds:.6f})"

    @property
    def count(self) -> int:
        """How many calls there were, those that raised among them."""
        return sum(self.buckets)

    def copy(self) -> Latency:
        """Return what has been counted so far."""
        made = Latency()
        made.buckets, made.seconds = self.buckets.copy(), self.seconds
        made.errors = self.errors.copy()
        return made

    def add(self, seconds: float) -> None:
        """Count a call.

        Takes no lock: under the GIL nothing can come between the halves of a `+=` that calls
        nothing.
        """
        bucket = bisect_left(self.bounds, seconds)
        self.buckets[bucket] += 1
        self.seconds += seconds


@dataclass(kw_only=True, frozen=True)
class DbStats:
    """What a database holds and what it takes, from one snapshot; sizes are in bytes.

    `files` are the sizes of "database", "wal" and "shm"; `free` is what the database file could
    give back. `records` and `bytes` (empty where SQLite was built without dbstat) are by namespace,
    `session_log` being the entries of all sessions. `operations` is what this process has done with
    this object, by name: "store_task", or "devices.put" in a custom namespace.
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


_Sample = tuple[str, dict[str, Any], float]  # what follows a metric's name, labels, value


def _exposition(stats: DbStats) -> str:
    """Return statistics in Prometheus's text format.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    lines: list[str] = []
    path = stats.path.encode(errors="replace").decode()
    for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ('"', '\\"')):
        path = path.replace(plain, escaped)

    def family(name: str, text: str, samples: Iterable[_Sample], kind: str = "gauge") -> None:
        lines.extend((f"# HELP operator_db_{name} {text}", f"# TYPE operator_db_{name} {kind}"))
        for suffix, labels, value in samples:
            others = "".join(f',{label}="{text}"' for label, text in labels.items())
            lines.append(f'operator_db_{name}{suffix}{{database="{path}"{others}}} {value}')

    def labelled(label: str, values: dict[Any, int]) -> list[_Sample]:
        return [("", {label: name}, value) for name, value in values.items()]

    def latencies() -> Iterator[_Sample]:
        for name, latency in stats.operations.items():
            counts = list(accumulate(latency.buckets))
            for bound, count in zip((*latency.bounds, "+Inf"), counts, strict=True):
                yield "_bucket", {"operation": name, "le": bound}, count
            yield "_sum", {"operation": name}, latency.seconds
            yield "_count", {"operation": name}, counts[-1]

    def errors() -> Iterator[_Sample]:
        for name, latency in stats.operations.items():
            for error, count in latency.errors.items():
                yield "", {"operation": name, "error": error}, count

    versions = {
        "version": __version__,
        "schema_version": stats.schema_version,
        "sqlite_version": sqlite3.sqlite_version,
    }
    unsubmitted: list[_Sample] = [("", {}, stats.unsubmitted_proofs)]
    family("info", "Versions of what runs; always 1.", [("", versions, 1)])
    family("file_bytes", "Size of each file of the database.", labelled("file", stats.files))
    family("free_bytes", "Bytes of the database file that are unused.", [("", {}, stats.free)])
    family("records", "Records in each namespace.", labelled("namespace", stats.records))
    family("namespace_bytes", "Bytes with the indexes.", labelled("namespace", stats.bytes))
    family("tasks", "Tasks of each status.", labelled("status", stats.tasks))
    family("unsubmitted_proofs", "Proofs not marked as submitted.", unsubmitted)
    if stats.operations:
        family("operation_duration_seconds", "Latency here.", latencies(), "histogram")
        family("operation_errors_total", "Calls that raised here.", errors(), "counter")
    return "\n".join(lines) + "\n"


# ==== Transfer: export, import, backup, restore, repair ===========================================

_EXPORT_FORMAT = "operator_db/1"
_EXPORTED_TABLES = ("config", "tasks", "sessions", "proofs")
_REPAIR_ATTEMPTS = 3
_PROTOTYPE_FIELDS = {"exported_at", "stats", "config", "tasks", "sessions"}
_PROTOTYPE_TASK_FIELDS = {f.name for f in fields(TaskRecord)} - {"history"}

# ---- backup and restore


def _in_this_process(progress: Progress | None) -> Progress | None:
    """Return a progress function that a child which it has forked does not return from.

    Were the child to go on, it would undo or finish, in files that are its parent's, what that is
    doing.
    """
    owner = os.getpid()

    def report(done: int, total: int) -> None:
        try:
            cast(Progress, progress)(done, total)
        finally:
            if os.getpid() != owner:
                os._exit(os.EX_SOFTWARE)

    return progress and report


def _backup(db: OperatorDb, path: _Path, overwrite: bool, progress: Progress | None) -> None:
    progress = _in_this_process(progress)
    with (
        _write_atomically(_absolute_path(path), overwrite=overwrite) as temporary,
        _name_in_errors(db.path, instead_of=temporary),
    ):
        db._store.copy_to(temporary, progress)
        with OperatorDb(temporary, read_only=True) as copied:
            _raise_if_damaged(copied, db.path, "no backup was made of", progress)


def _restore(db: OperatorDb, path: _Path, progress: Progress | None) -> None:
    progress = _in_this_process(progress)
    names = _custom_tables(db._store)
    with _copy_of_backup(db, path) as (copied, origin):
        # whoever has a namespace open that the backup lacks goes on with an empty one
        for name in {*names, *_custom_tables(copied._store)}:
            _JsonNamespace(copied._store, name, copied._declarations).create_table()
            with suppress(DamagedError):
                if declaration := db._declarations.get(name):
                    _add_secrets(copied, declaration)
        _raise_if_damaged(copied, origin, "nothing was restored from", progress)
        if copied._store.read(_AUTO_VACUUM) != [(_INCREMENTAL,)]:
            copied._store.vacuum()  # another program made it, and it would never shrink
        db._store.copy_from(copied._store, progress)


def _add_secrets(copied: OperatorDb, here: _Declaration) -> None:
    """Mask in a backup's copy what is secret here; its rows have the columns of its own time."""
    then = copied._declarations.get(here.name) or replace(here, are_columns_current=False)
    copied._declarations.put(replace(then, secrets=sorted({*then.secrets, *here.secrets})))


@contextmanager
def _copy_of_backup(db: OperatorDb, path: _Path) -> Iterator[tuple[OperatorDb, str]]:
    """Yield an opened copy of a backup, made beside a database, and the backup's path.

    So what is checked is what is used.
    """
    origin = _absolute_path(path)
    if db._store.is_open_at(origin):
        raise InvalidRecordError(f"{origin} is this database itself")
    if not _file_exists(origin):
        raise StorageError(f"{origin}: there is no such backup")
    with (
        _translate_os_errors(f"cannot copy {origin}"),
        _temporary_file(db.path) as temporary,
        _name_in_errors(origin, instead_of=temporary),
    ):
        source = _Store(
            origin,
            create=False,
            read_only=True,
            durable=True,
            timeout=db._store.timeout,
            allow_older=True,
        )
        with closing(source):
            source.copy_to(temporary, None)
        if _inspect_file(temporary, db._store.timeout) != len(_MIGRATIONS):
            _migrate(temporary, db._store.timeout, final_path=origin, keep_snapshot=False)
        with OperatorDb(temporary, durable=False) as copied:
            yield copied, origin


def _raise_if_damaged(
    copied: OperatorDb, path: str, outcome: str, progress: Progress | None
) -> None:
    """Raise DamagedError if a copy of the database at a path is not sound."""
    problems = copied.check(progress=progress)
    if problems:
        raise DamagedError(
            f"{outcome} {path} ({_REPAIR} on that): problems found: {len(problems)}, the first:"
            f" {problems[0]}"
        )


@contextmanager
def _name_in_errors(path: str, *, instead_of: str) -> Iterator[None]:
    """Name a file in errors of the block, and not the temporary copy of it."""
    try:
        yield
    except OperatorDbError as error:
        raise type(error)(str(error).replace(instead_of, path)) from None


# ---- repair


def _repair(db: OperatorDb, backup: _Path | None, progress: Progress | None) -> list[str]:
    db._store.raise_if_in_transaction("repair() cannot run")
    if db._store.read_only:
        raise StorageError(f"{db.path} was opened read-only")
    if backup is not None:
        backup = _absolute_path(backup)
        if not _file_exists(backup):  # told at once, and not when it is needed
            raise StorageError(f"{backup}: there is no such backup")
    progress = _in_this_process(progress)
    if not db._find_problems(progress, is_damage_only=True):
        return []
    no_backup = nullcontext(None)
    with no_backup if backup is None else _copy_of_backup(db, backup) as source:
        if source is not None:
            _raise_if_damaged(*source, "nothing was taken from", progress)
        size = _file_size(db.path) + _file_size(db.path + "-wal")
        _require_space(db.path, 4 * size, f"to repair {db.path}")
        for _ in range(_REPAIR_ATTEMPTS):
            lines = _repair_once(db, source, progress)
            if lines is not None:
                return lines
            if not db._find_problems(progress, is_damage_only=True):
                return []  # it was repaired by who wrote to it
    raise BusyError(f"{db.path}: others wrote to it each time that it was repaired; try again")


def _repair_once(
    db: OperatorDb, source: tuple[OperatorDb, str] | None, progress: Progress | None
) -> list[str] | None:
    """Repair a database, and return what was done; None if others wrote to it meanwhile."""
    kept = f"{db.path}.{_now()}-{os.urandom(2).hex()}.damaged"
    lines = [f"the file as it was is kept: {kept}"]
    may_be_in_place = False

    def report(done: int, total: int) -> None:
        nonlocal may_be_in_place
        may_be_in_place = 0 < total <= done + 1  # the next step commits
        if progress is not None:
            progress(done, total)

    with (
        _translate_os_errors(f"cannot repair {db.path}"),
        _temporary_file(db.path) as temporary,
        _name_in_errors(db.path, instead_of=temporary),
        ExitStack() as stack,
    ):

        def build(snapshot: _UnitOfWork) -> _Store:
            # a file of pages of another size could not be put in place
            with closing(_connect(temporary, 0)) as empty:
                empty.query(f"{_PAGE_SIZE}={snapshot.read(_PAGE_SIZE)[0][0]}")
                _ensure_wal_mode(empty)
            new = stack.enter_context(OperatorDb(temporary, durable=False))
            lines.extend(_build_repaired(db, snapshot, new, source, kept, progress))
            if problems := new.check(progress=progress):
                raise DamagedError(
                    f"{db.path} cannot be repaired, nothing was changed: {problems[0]}; `restore` a"
                    " backup"
                )
            return new._store

        try:
            is_in_place = db._store.rebuild(build, report)
        finally:
            if not may_be_in_place:  # if it may be, what is kept is all that is left of the old one
                with suppress(FileNotFoundError):
                    os.unlink(kept)
    return lines if is_in_place else None


def _build_repaired(
    db: OperatorDb,
    snapshot: _UnitOfWork,
    new: OperatorDb,
    source: tuple[OperatorDb, str] | None,
    kept: str,
    progress: Progress | None,
) -> Iterator[str]:
    """Fill a new database with what can be read of a damaged one, and keep a copy of that."""
    target = new._store
    namespaces: list[Namespace[Any]] = [
        *(db._namespaces[name] for name in _OUR_TABLES),
        *db._custom_namespaces(snapshot),
    ]
    losses: dict[str, _Losses] = {}
    for each in namespaces:
        _JsonNamespace(target, each.name, new._declarations).create_table()
        losses[each.name] = each.within(snapshot)._copy_intact_rows(target, progress)
    with (
        _write_atomically(kept, overwrite=False) as copy,
        _name_in_errors(kept, instead_of=copy),
    ):
        with closing(_connect(copy, 0)) as copied:
            db._store._copy_snapshot(snapshot, copied, progress)
        unread = [each for each in namespaces if not losses[each.name].is_table_read]
        if unread:
            _copy_intact_rows_by_page(copy, unread, losses, target, progress)
        yield from _copy_other_tables(copy, new.path, [each.name for each in namespaces])
    for each in namespaces:
        lost = each._ids_lost(losses[each.name], target)
        are_all_known = losses[each.name].is_table_read or losses[each.name].are_keys_read
        taken: set[str] = set()
        if source is not None and each.name in (*_OUR_TABLES, *_custom_tables(source[0]._store)):
            for record_id in _take_from_backup(each, source[0], new, lost, are_all_known):
                taken.add(record_id)
                key = _truncated_repr(f"{each.name}:{record_id}")
                yield f"{key} is taken from {source[1]}, as it was then"
        for record_id in lost:
            if record_id not in taken:
                yield f"{_truncated_repr(f'{each.name}:{record_id}')} is lost"
        if not are_all_known:
            yield f"{each.name}: records may be lost whose keys could not be read either"
    yield from _mend_sessions(new)


def _take_from_backup(
    namespace: Namespace[Any],
    source: OperatorDb,
    new: OperatorDb,
    lost: dict[str, int],
    are_all_known: bool,
) -> Iterator[str]:
    """Copy records that are lost from a backup to the places that they had; yield their ids.

    All that are not there are taken if nobody knows which are lost. An entry of a log is taken only
    where the session is the one that it was said in.
    """

    def is_of_this_session(entry_id: str) -> bool:
        session_id = entry_id.partition(":")[2].rpartition(":")[0]
        then, now = (each._sessions.get(session_id) for each in (source, new))
        return then is not None and now is not None and then.created_at == now.created_at

    is_log = namespace.name == new._log.name
    with source._store.snapshot() as snapshot:
        for row in namespace.within(snapshot)._read_rows(lost if are_all_known else None):
            record_id = namespace._id_in(row[0])
            if is_log and not is_of_this_session(record_id):
                continue
            if namespace._copy_row(row, lost.get(record_id), new._store):
                yield record_id
    if namespace.name not in _OUR_TABLES:
        here = new._declarations.get(namespace.name)
        then = source._declarations.get(namespace.name)
        if here or then:
            then = then or replace(cast(_Declaration, here), are_columns_current=False)
            _merge_declaration(new._declarations, then)


def _mend_sessions(db: OperatorDb) -> Iterator[str]:
    """Number the entries of each log anew, and make each session know how many it has.

    A session that is lost is made from its log.
    """
    named = {log.partition(":")[2] for log in db._log.statuses()}
    for session_id in sorted({*db._sessions.keys(), *named}):
        with db._store.unit_of_work() as unit:
            yield from _mend_session(db, unit, session_id)


def _mend_session(db: OperatorDb, unit: _UnitOfWork, session_id: str) -> Iterator[str]:
    sessions, log = db._sessions.within(unit), db._log.within(unit)
    logs = {name: log.list(name) for name in _log_names(session_id)}
    for entries in logs.values():
        for number, entry in enumerate(entries):
            if entry.seq != number:  # it is greater: what had this number is lost, or has moved
                log.delete(entry.entry_id)
                entry.seq = number
                log._put(entry)
    row = sessions.get(session_id)
    if row is None:
        times = [entry.timestamp for entries in logs.values() for entry in entries]
        row = _codec(_StoredSession).from_checked(
            {
                "session_id": session_id,
                "active_task_ids": [],
                "created_at": min(times),
                "last_active": max(times),
                "transcript_entries": 0,
                "commands": 0,
            }
        )
        yield f"sessions:{_truncated_repr(session_id)} is made from its log"
        expected = [*map(len, logs.values())]
    else:
        expected = [row.transcript_entries, row.commands]
    for (name, entries), length in zip(logs.items(), expected, strict=True):
        if len(entries) != length:
            yield f"session_log:{_truncated_repr(name)} has {len(entries)} entries, not {length}"
    row.transcript_entries, row.commands = map(len, logs.values())
    sessions._put(row)


# ---- export


def _export(db: OperatorDb, file: _File, include_secrets: bool, progress: Progress | None) -> None:
    with _open_output(file) as write, db._store.snapshot() as snapshot:
        namespaces: list[Namespace[Any]] = [
            *(db._namespaces[name] for name in _EXPORTED_TABLES),
            *db._custom_namespaces(snapshot),
        ]
        namespaces = [each.within(snapshot) for each in namespaces]
        counts = {each.name: each.count() for each in namespaces}
        secrets = (
            {} if include_secrets else {each.name: _known_secrets(each) for each in namespaces}
        )
        declarations = db._declarations.within(snapshot).values()
        header: _Json = {
            "format": _EXPORT_FORMAT,
            "schema_version": len(_MIGRATIONS),
            "exported_at": _now(),
            "withheld": {name: sorted(each) for name, each in secrets.items() if each},
            "namespaces": [*map(_codec(_Declaration).to_json, declarations)],
            "records": counts,
        }
        write(_encode_json(header).encode() + b"\n")
        done, total = 0, sum(counts.values())
        for namespace in namespaces:
            if namespace.name == "sessions":
                lines = _session_lines(db, snapshot)
            else:
                lines = namespace._export_lines(secrets.get(namespace.name, frozenset()))
            for line in lines:
                write(line.encode())
                done += 1
                if progress is not None:
                    snapshot.call(progress, done, total)


def _known_secrets(namespace: Namespace[Any]) -> frozenset[str]:
    """Return the names of the secret fields; raise ConflictError if they are not known."""
    secrets = namespace._secret_names()
    if secrets is None:
        raise ConflictError(
            f"which fields of {namespace.name} are secret is not known until namespace() was called"
            " for it: include secrets, or call that first"
        )
    return secrets


def _session_lines(db: OperatorDb, snapshot: _UnitOfWork) -> Iterator[str]:
    """Walk the sessions as lines of an export, each with its log."""
    for row in db._sessions.within(snapshot).values():
        text = _encode_json(_codec(SessionState).to_json(db._with_log(snapshot, row)))
        yield f'{{"namespace":"sessions","record":{text}}}\n'


# ---- import: reading


@contextmanager
def _locate_errors(where: str) -> Iterator[None]:
    """Begin every error in the block with the place in the input that it is about."""
    try:
        yield
    except OperatorDbError as error:
        raise type(error)(f"{where}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidRecordError(f"{where}: {error}") from None


def _read_export(file: _File, counts: dict[str, Counter[str]]) -> Iterator[tuple[str, _Json]]:
    """Read an export, ours or the prototype's: the place of each line, and the line as ours."""
    lines = _read_lines(file)
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    header: _Json = {}
    with suppress(ValueError):
        header = _parse_json_object(first)
    if "format" in header:
        yield from _read_our_export(header, lines)
        return
    with _locate_errors("the input"):
        if not first.lstrip().startswith(b"{"):
            raise ValueError("it is neither an export of operator_db nor one of the prototype's")
        document = _parse_json_object(first + b"".join(lines))
    yield from _read_prototype_export(document, counts)


def _read_our_export(header: _Json, lines: Iterator[bytes]) -> Iterator[tuple[str, _Json]]:
    with _locate_errors("line 1"):
        version, wanted = header.get("schema_version"), header.get("records")
        withheld = header.get("withheld")
        is_known = header["format"] == _EXPORT_FORMAT and type(version) is int
        if not is_known or cast(int, version) > len(_MIGRATIONS):
            raise NewerSchemaError(
                f"the format is {_truncated_repr(header['format'])}, the schema"
                f" {_truncated_repr(version)}; this module knows {_EXPORT_FORMAT!r} and"
                f" {len(_MIGRATIONS)}: update operator_db.py"
            )
        if type(wanted) is not dict or type(withheld) is not dict:
            raise ValueError(
                "the header does not say how many records there are, and what is withheld"
            )
        declarations = _json_list(header.get("namespaces", []))  # version 1 has none
    for declaration in declarations:
        yield "line 1", {"namespace": "_namespaces", "record": declaration, "withheld": []}
    found: Counter[Any] = Counter()
    for number, line in enumerate(lines, 2):
        if not line.isspace():
            with _locate_errors(f"line {number}"):
                entry = _parse_json_object(line)
                name = entry.get("namespace")
                found[name] += 1
                entry["withheld"] = withheld.get(name, [])
            yield f"line {number}", entry
    for name in sorted({*wanted, *found}, key=str):
        if wanted.get(name, 0) != found[name]:
            raise InvalidRecordError(
                f"the header says {_truncated_repr(wanted.get(name, 0))} records of"
                f" {_truncated_repr(name)}, the input holds {found[name]}: it is not complete"
            )


def _read_prototype_export(
    document: _Json, counts: dict[str, Counter[str]]
) -> Iterator[tuple[str, _Json]]:
    """Read what `agenc-db export --format json` writes.

    It has bytes as arrays of numbers, one `rpc_url`, and neither histories nor proofs.
    """
    with _locate_errors("the input"):
        unknown = sorted(document.keys() - _PROTOTYPE_FIELDS)
        if unknown or "tasks" not in document:
            named = f": {_truncated_repr(unknown[0])} is not known" if unknown else ""
            raise ValueError(
                f"it is neither an export of operator_db nor one of the prototype's{named}"
            )
        stats = document.get("stats") or {}
        tasks, sessions = document["tasks"], document.get("sessions") or []
        if type(tasks) is not list or type(sessions) is not list:
            raise ValueError("tasks and sessions must be JSON arrays")
        for name, found in (("total_tasks", tasks), ("total_sessions", sessions)):
            if stats.get(name, len(found)) != len(found):
                raise ValueError(
                    f"stats.{name} is {_truncated_repr(stats[name])}, it holds {len(found)}:"
                    " it is not complete"
                )
        if left_behind := _check_count("stats.total_proofs", stats.get("total_proofs") or 0):
            counts["proofs"]["left_behind"] = left_behind
    if document.get("config") is not None:
        with _locate_errors("config"):
            given = document["config"].items()
            config = {name: value for name, value in given if value is not None}
            if "rpc_url" in config:
                config["rpc_endpoints"] = [config.pop("rpc_url")]
        yield "config", {"namespace": "config", "record": config, "withheld": []}
    for n, task in enumerate(tasks):
        record = _read_prototype_task(f"tasks[{n}]", task)
        yield f"tasks[{n}]", {"namespace": "tasks", "record": record, "withheld": []}
    for n, session in enumerate(sessions):
        yield f"sessions[{n}]", {"namespace": "sessions", "record": session, "withheld": []}


def _read_prototype_task(where: str, task: Any) -> _Json:
    """Return a task of the prototype as a record of ours, which begins its history."""
    codec = _codec(TaskRecord)
    with _locate_errors(where):
        if missing := sorted(_PROTOTYPE_TASK_FIELDS - task.keys()):
            raise ValueError(f"{missing[0]} is missing")
    with _locate_errors(f"{where}.payload"):
        if not all(type(byte) is int for byte in _json_list(task["payload"])):
            raise ValueError("it is not an array of numbers")
        given = task | {"payload": _base64(bytes(task["payload"]))}
    with _locate_errors(where):
        history = codec.to_json(codec.from_json(dict(given)))["history"]
        return codec.to_json(codec.from_json_strictly(given | {"history": history}))


# ---- import: storing


def _import(db: OperatorDb, file: _File, progress: Progress | None) -> dict[str, Counter[str]]:
    """Check and stage every line in a temporary file; then store them all in one transaction.

    A staged line is the line itself, and the row to insert if its key is new.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    declared = set[str]()
    with _unnamed_file() as staged:
        total = 0
        for where, entry in _read_export(file, counts):
            with _locate_errors(where):
                line = json.dumps([where, entry])  # before the check, which uses the record up
                staged_line = f"[{line},{_encode_json(_row_for(db, entry))}]\n".encode()
            staged.write(staged_line)
            total += 1
            if progress is not None:
                progress(total, 0)
        staged.seek(0)
        with db._store.unit_of_work() as unit:
            for done, staged_line in enumerate(staged, 1):
                (where, entry), row = json.loads(staged_line)
                if entry["namespace"] == "_namespaces":
                    declared.add(entry["record"]["name"])
                with _locate_errors(where):
                    namespace = _namespace_for(db, entry).within(unit)
                    if namespace.name not in counts:
                        if not namespace.has_table():
                            db._store.raise_if_in_transaction("import_() cannot create a table")
                            namespace.create_table()
                        if isinstance(namespace, _JsonNamespace) and namespace.name not in declared:
                            namespace._doubt_columns()
                    counted = counts[namespace.name]
                    if row is not None and namespace._insert_row(row):
                        outcome = "added"
                    else:
                        outcome = _merge_entry(db, unit, namespace, entry, counted)
                    counted[outcome] += 1
                if progress is not None:
                    unit.call(progress, done, total)
    counts.pop("_namespaces", None)  # they are no records of the operator's
    return dict(counts)


def _namespace_for(db: OperatorDb, entry: _Json) -> Namespace[Any]:
    """Return the namespace of a line; raise ValueError for a line that is not shaped as ours."""
    name = entry.get("namespace")
    is_ours = name in (*_EXPORTED_TABLES, "_namespaces")
    if not isinstance(name, str) or not (is_ours or _is_namespace_name(name)):
        raise ValueError(f"there is no namespace {_truncated_repr(name)}")
    wanted = {"namespace", "record"}
    if not is_ours:
        wanted |= {"key", "status", "at"}
    if entry.keys() - {"withheld"} != wanted or type(entry["record"]) is not dict:
        raise ValueError(
            f"it must hold exactly {', '.join(sorted(wanted))}, the record being a JSON object"
        )
    return db._namespaces.get(name) or _JsonNamespace(db._store, name, db._declarations)


def _row_for(db: OperatorDb, entry: _Json) -> _Row | None:
    """Check a line and return the row to insert if its key is new.

    None where stored values are needed: for a session, and where secrets are withheld.
    """
    namespace = _namespace_for(db, entry)
    if namespace.name == "sessions":
        _codec(SessionState).from_json_strictly(entry["record"])
        return None
    if namespace.name == "_namespaces":
        declaration = namespace._codec.from_json_strictly(entry["record"])
        if not _is_namespace_name(declaration.name):
            raise ValueError(f"there is no namespace {_truncated_repr(declaration.name)}")
        return None
    redacted = _redacted_fields(namespace, entry)
    if not redacted:
        return _row_of_whole_entry(namespace, entry)
    filled = _fill_redacted(namespace, entry, redacted, {})
    if filled.keys() >= set(redacted):  # with defaults in place of secrets, to check the rest
        _row_of_whole_entry(namespace, entry | {"record": filled})
    return None


def _row_of_whole_entry(namespace: Namespace[Any], entry: _Json) -> _Row:
    """Return the row of a line that withholds nothing."""
    document = entry["record"]
    if namespace.name in _EXPORTED_TABLES:
        record = namespace._codec.from_json_strictly(document)
        if isinstance(record, TaskRecord) and _append_present_status(record):
            raise ValueError("its history does not end with its status and its signature")
        return namespace._encode_row(record)
    # stored as it was written: a custom class may have changed since
    row = namespace._row_of_document(entry["key"], entry["status"], entry["at"], document)
    if not isinstance(namespace, _JsonNamespace):
        # status and age as the class gives them now: it may have changed, or look at a clock
        key, _, status, at, _ = namespace._encode_row(namespace._codec.from_json(dict(document)))
        if key != row[0]:
            raise ValueError(f"its key is not that of its record, {_truncated_repr(key)}")
        row = namespace._row_with_checksum(key, row[1], status, at)
    return row


def _redacted_fields(namespace: Namespace[Any], entry: _Json) -> list[str]:
    """Return the fields that a line withholds.

    They are those written as `***`, and of the configuration also those that are absent.
    """
    document = entry["record"]
    secrets = sorted({*(namespace._secret_names() or ()), *entry["withheld"]})
    redacted = []
    for name in secrets:
        with _locate_errors(f"{namespace.name}.{name}"):
            redacted += [name] if _is_redacted(document.get(name)) else []
    if namespace.name == "config":
        redacted += [f.name for f in fields(OperatorConfig) if f.name not in document]
    return redacted


def _is_redacted(value: Any, *, within: bool = False) -> bool:
    """Whether a secret is withheld; raise ValueError for one that is withheld in part."""
    if value == _REDACTED:
        return True
    parts = value.values() if type(value) is dict else value if type(value) is list else ()
    if any(_is_redacted(part, within=True) for part in parts):
        if within:
            return True
        raise ValueError(
            f"it holds {_REDACTED} beside other values: leave it out, or give it whole"
        )
    return False


def _fill_redacted(
    namespace: Namespace[Any], entry: _Json, redacted: list[str], stored: _Json
) -> _Json:
    """Return a line's record with what is stored, or else its defaults, for what it withholds."""
    given = {name: value for name, value in entry["record"].items() if name not in redacted}
    is_class_known = not isinstance(namespace, _JsonNamespace)
    defaults = namespace._codec.defaults(redacted) if is_class_known else {}
    return given | defaults | {name: stored[name] for name in redacted if name in stored}


def _merge_entry(
    db: OperatorDb,
    unit: _UnitOfWork,
    namespace: Namespace[Any],
    entry: _Json,
    counts: Counter[str],
) -> str:
    """Store a checked line beside what is stored; return `added`, `replaced` or `unchanged`.

    What else there is to report goes into the counts of the namespace.
    """
    if namespace.name == "sessions":
        session = _codec(SessionState).from_json_strictly(entry["record"])
        return _merge_session(db, unit, session)
    if namespace.name == "_namespaces":
        return _merge_declaration(namespace, namespace._codec.from_json_strictly(entry["record"]))
    redacted = _redacted_fields(namespace, entry)
    if redacted:
        # a damaged record raises: what it holds is not given up for ***
        stored = namespace._stored_document(entry.get("key", OperatorConfig.operator_id))
        entry["record"] = _fill_redacted(namespace, entry, redacted, stored)
        if lacking := sorted(set(redacted) - entry["record"].keys()):
            raise ValueError(
                f"{namespace.name}.{lacking[0]} is {_REDACTED}, and nothing is stored to keep"
            )
    row = _row_of_whole_entry(namespace, entry)
    if namespace.name == "tasks":
        return _merge_task(db, namespace, row)
    if namespace.name == "proofs":
        return _merge_proof(db, unit, namespace, row)
    if namespace.name == "config":
        return _merge_config(namespace, row, counts)
    return namespace._upsert_row(row)


def _merge_task(db: OperatorDb, namespace: Namespace[Any], row: _Row) -> str:
    """Store a task unless the stored one has gone on, or has moved later or further.

    A history that goes on from the stored one is taken whatever its status: it shows the move.
    """
    task = namespace._codec.from_json(json.loads(row[1]))
    stored = db._get_unless_damaged(namespace, task.task_id)
    if stored is not None and task.history == stored.history:
        default = TaskRecord(task_id=task.task_id)
        for name in _DESCRIPTIVE_FIELDS:  # the file may be older than what fills them
            if getattr(task, name) == getattr(default, name):
                setattr(task, name, getattr(stored, name))
    if stored is not None and not _begins_with(task.history, stored.history):
        has_gone_on = _begins_with(stored.history, task.history)
        moved_later = stored.history[-1].at >= task.history[-1].at
        if has_gone_on or moved_later or _moves_back(task, stored):
            return "unchanged"
    db._store_over(namespace, task, stored)
    return "unchanged" if task == stored else "replaced"


def _merge_declaration(declarations: Namespace[_Declaration], given: _Declaration) -> str:
    """Store a declaration of rows that come from elsewhere; unite its secrets with those stored."""
    stored = declarations.get(given.name)
    if stored is None:
        declarations.put(given)
        return "added"
    if stored.key != given.key:
        raise ConflictError(
            f"{given.name} is stored by key={stored.key!r} here, and by {given.key!r} there"
        )
    fields_there = (given.status, given.at, given.are_columns_current)
    is_alike = fields_there == (stored.status, stored.at, True)
    merged = replace(
        stored,
        secrets=sorted({*stored.secrets, *given.secrets}),
        are_columns_current=stored.are_columns_current and is_alike,
    )
    declarations.put(merged)
    return "unchanged"


def _merge_session(db: OperatorDb, unit: _UnitOfWork, session: SessionState) -> str:
    """Store a session; of one that is stored keep the longer log, the later activity, every link.

    Each part of the log goes on where one begins with the other; ConflictError where none does.
    """
    stored = db._get_session(unit, session.session_id)
    if stored is not None:
        links = dict.fromkeys(stored.active_task_ids + session.active_task_ids)
        session.active_task_ids = [*links]
        session.created_at = min(stored.created_at, session.created_at)
        session.last_active = max(stored.last_active, session.last_active)
        if stored.transcript[: len(session.transcript)] == session.transcript:
            session.transcript = stored.transcript
        if stored.command_history[: len(session.command_history)] == session.command_history:
            session.command_history = stored.command_history
        if session == stored:
            return "unchanged"
    db._store_session(unit, session)
    return "replaced" if stored else "added"


def _merge_config(namespace: Namespace[Any], row: _Row, counts: Counter[str]) -> str:
    """Fill the empty fields of the stored configuration, and count as `kept_...` what differs."""
    given, stored = namespace._codec.from_json(json.loads(row[1])), None
    with suppress(DamagedError):
        stored = namespace.get(OperatorConfig.operator_id)
    if stored is None:
        return namespace._upsert_row(row)
    for name in namespace._codec.field_types:
        value, kept = getattr(given, name), getattr(stored, name)
        if kept:
            setattr(given, name, kept)
            if value and value != kept:
                counts[f"kept_{name}"] += 1
    return namespace._upsert_row(namespace._encode_row(given))


def _merge_proof(db: OperatorDb, unit: _UnitOfWork, namespace: Namespace[Any], row: _Row) -> str:
    """Store a proof, or only its submission where the same evidence is stored."""
    log = namespace._codec.from_json(json.loads(row[1]))
    db._store_proof(unit, log)
    stored = cast(VerificationLog, namespace.get(log.task_id))
    merged = replace(
        stored,
        submitted=stored.submitted or log.submitted,
        submission_signature=stored.submission_signature or log.submission_signature,
    )
    return "unchanged" if merged == stored else namespace._upsert_row(namespace._encode_row(merged))


# ==== Self-check: the promises of this module, kept before your eyes on a scratch database ========


def _expect(is_so: object, what: str) -> None:
    """Raise AssertionError with what was expected; unlike `assert`, under `python -O` too."""
    if not is_so:
        raise AssertionError(f"expected: {what}")


def _expect_error(error: type[OperatorDbError], word: str, action: Callable[[], object]) -> None:
    """Raise AssertionError unless an action raises an error with this word in its message."""
    try:
        action()
    except error as raised:
        _expect(word in str(raised), f"the {error.__name__} says {word!r}")
    else:
        raise AssertionError(f"expected: {error.__name__} is raised")


def _promises(folder: str) -> Iterator[str]:
    """Do an operator's work in a folder, and yield each promise once it has been kept."""
    path = os.path.join(folder, "operator.db")
    umask = os.umask(0)
    try:
        db = OperatorDb(path, durable=False)
    finally:
        os.umask(umask)
    with db:
        modes = {os.stat(name).st_mode & 0o777 for name in (path, path + "-wal")}
        _expect(modes == {0o600} or os.name == "nt", "the files are private")
        yield "files are private from their first byte"

        task = TaskRecord(task_id="50%:é", payload=bytes(range(256)), reward_lamports=2**64 - 1)
        db.store_task(task)
        _expect(db.get_task("50%:é") == task, "what is read is what was stored")
        make = partial(TaskRecord, task_id="t", reward_lamports=-1)
        _expect_error(InvalidRecordError, "reward_lamports", make)
        config = OperatorConfig(keypairs={"main": "5ecret"})
        db.store_config(config)
        _expect("5ecret" not in repr(config), "no secret is shown")
        yield "a record reads back as it was stored, a bad one is refused, no secret is shown"

        for number in range(6):
            db.store_task(TaskRecord(task_id=f"t{number}", claimed_at=number))
        move = partial(db.update_task_status, "t3", expected="claimed")
        move("InProgress", signature="sig")
        _expect_error(ConflictError, "tasks:'t3'", lambda: move("completed"))
        (moved,) = db.list_tasks_by_status("in_progress")
        _expect([each.signature for each in moved.history] == [None, "sig"], "both moves are kept")
        _expect(db.store_task(TaskRecord(task_id="t3")) == moved, "a claim done over is no change")
        back = replace(moved, status=TaskStatus.CLAIMED)
        _expect_error(ConflictError, "tasks:'t3'", lambda: db.store_task(back))
        yield "status queries, history, and a change that depends on the present status"

        def talk() -> None:
            for _ in range(25):
                db.append_transcript("voice", "user", "hello")

        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _expect(len(db.transcript("voice")) == 100, "every entry of every thread is there")
        stale = SessionState(session_id="voice")
        _expect_error(ConflictError, "sessions:'voice'", lambda: db.store_session(stale))
        yield "threads add to one session and lose nothing"

        with db.transaction():
            db.store_task(TaskRecord(task_id="kept"))
            with suppress(KeyError), db.transaction():
                db.store_task(TaskRecord(task_id="undone"))
                raise KeyError
        _expect(db.get_task("kept") and not db.get_task("undone"), "one is kept, one undone")
        yield "a block that fails leaves nothing behind"

        proof = VerificationLog(task_id="t0", outputs=b"the result", timestamp=0)
        for _ in range(2):
            _expect(db.complete_task("t0", proof).status == "completed", "twice is as once")
        other = VerificationLog(task_id="t0", outputs=b"another")
        _expect_error(ConflictError, "proofs:'t0'", lambda: db.store_proof(other))
        _expect_error(ConflictError, "proofs:'t0'", lambda: db.delete_proof("t0"))
        bundle = db.dispute_bundle("t0")
        verify = partial(verify_dispute_bundle, bundle, evidence_hash=proof.evidence_hash)
        _expect(verify() == [], "the dispute bundle is valid")
        bundle["proof"]["outputs"] = "AAAA"
        _expect(verify(), "a bundle that was changed is found out")
        yield "a proof is stored once, with its task, and wins its dispute"

        export, backup = (os.path.join(folder, name) for name in ("export.jsonl", "backup.db"))
        db.export(export)
        with open(export, encoding="utf-8") as file:
            _expect("5ecret" not in file.read(), "no secret is exported unasked")
        db.export(export, include_secrets=True)
        with OperatorDb(os.path.join(folder, "imported.db"), durable=False) as imported:
            imported.import_(export)
            for get in (OperatorDb.iter_tasks, OperatorDb.list_sessions, OperatorDb.list_proofs):
                _expect([*get(imported)] == [*get(db)], "what is imported is what was exported")
            _expect(imported.get_config() == config, "the configuration is imported, secrets too")
        db.backup(backup)
        db.delete_task("kept")
        db.restore(backup)
        _expect(db.get_task("kept"), "what was backed up is restored, into an open database")
        _expect('operation="restore",le="+Inf"} 1' in db.prometheus(), "every call is counted")
        yield "an export and a backup hold everything, and every call is counted"

        with db.transaction():
            for number in range(200):
                status = TaskStatus.COMPLETED if number else TaskStatus.DISPUTED
                old = partial(TaskRecord, payload=bytes(4096), claimed_at=0)
                db.store_task(old(task_id=f"old {number}", status=status))
        _expect(db.prune(dry_run=True).tasks == 199, "a dry run counts the same")
        report = db.prune()
        _expect(report.tasks == 199 and db.get_task("old 0"), "only what is completed goes")
        _expect(report.bytes_after < report.bytes_before / 3, "the file shrinks")
        yield "pruning takes what may go, and the file shrinks"

        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                with suppress(BaseException):
                    db.store_task(TaskRecord(task_id="child"))
                os._exit(0)
            db.store_task(TaskRecord(task_id="parent"))
            os.waitpid(child, 0)
            _expect(db.get_task("child") and db.get_task("parent"), "both wrote")
            yield "parent and child both go on after fork()"

    if hasattr(os, "fork"):
        _kill_a_writer(os.path.join(folder, "killed.db"))
        yield "a writer that is killed loses nothing it was told is stored"

    with open(path, "r+b") as damaged:  # it is closed; never do this to an open database
        damaged.seek(damaged.read().index(b'"task_id":"kept"'))
        damaged.write(b'"task_id":"KEPT"')
    with OperatorDb(path) as db:
        _expect_error(DamagedError, "tasks:kept", lambda: db.get_task("kept"))
        _expect(db.get_task("t1") and len(db.check()) == 1, "check() finds it, the rest is read")
    yield "damage is found, and named by its key"
    with OperatorDb(path, durable=False) as db:
        done = db.repair(backup=backup)
        _expect(len(done) == 2 and db.check() == [], "the file is sound")
        _expect(db.get_task("kept") and db.get_task("t1"), "all of its records can be read")
    yield "repair keeps what can be read, and takes what is lost from a backup"

    foreign = os.path.join(folder, "foreign.db")
    for word, content in (("redb", _REDB_MAGIC + bytes(999)), ("not an SQLite", b"text" * 200)):
        with open(foreign, "wb") as written:
            written.write(content)
        _expect_error(ForeignFileError, word, lambda: OperatorDb(foreign))
        with open(foreign, "rb") as found:
            _expect(found.read() == content, "the file is left as it was")
    yield "a file that is not ours is refused and left alone"


def _kill_a_writer(path: str) -> None:
    """Kill a child with SIGKILL that tells of each write, and look for all that it told of."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), OperatorDb(path) as db:
            for number in range(10**6):
                db.store_task(TaskRecord(task_id=str(number)))
                os.write(writer, b".")
        os._exit(1)
    os.close(writer)
    with open(reader, "rb", buffering=0) as acknowledged:
        count = sum(len(acknowledged.read(1)) for _ in range(20))
        os.kill(child, 9)
        os.waitpid(child, 0)
        count += len(acknowledged.read())
    with OperatorDb(path) as db:
        stored = [db.get_task(str(number)) for number in range(count)]
        _expect(count >= 20 and all(stored), "every acknowledged write is there")
        _expect(db.check() == [], "the file is sound")


def self_check(db_path: _Path | None = None, *, as_json: bool = False) -> bool:
    """Keep the promises on a scratch database, then look for problems in the operator's own.

    Prints both, and returns whether all is well. That there is no database is a problem only where
    one was asked for, by its path or in AGENC_DB_PATH.
    """
    import tempfile

    kept: list[str] = []
    broken = None
    with tempfile.TemporaryDirectory(prefix="operator_db-") as folder:
        try:
            for promise in _promises(folder):
                kept.append(promise)
                if not as_json:
                    print(f"ok    {promise}", flush=True)
        except Exception as error:
            broken = f"{type(error).__name__}: {error}"
            if not as_json:
                print(f"FAIL  {_terminal_safe(broken)}", flush=True)
    path, problems = _database_path(db_path), list[str]()
    found = "no database yet; the first OperatorDb() creates it"
    is_path_given = db_path is not None or os.environ.get("AGENC_DB_PATH")
    try:
        if _is_memory(db_path):
            found = "a private database, which nobody else can look at"
        elif _file_exists(path):
            found = "it cannot be opened"
            with OperatorDb(path, read_only=True) as db:
                problems = db.check()
                found = f"problems found: {len(problems)}{_hint(problems)}"
                found = f"{sum(db.stats().records.values()):,} records, {found}"
        elif is_path_given:
            found = "there is no database"
            problems.append("look for it elsewhere, or let the operator, import or restore make it")
    except OperatorDbError as error:
        problems.append(str(error))
    versions = f"operator_db {__version__}, SQLite {sqlite3.sqlite_version}"
    if as_json:
        facts = {"versions": versions, "promises": kept, "broken": broken}
        _print_json({**facts, "path": path, "found": found, "problems": problems})
    else:
        print(f"{len(kept)} promises kept{', one broken' if broken else ''} ({versions})")
        for line in (f"{path}: {found}", *(f"      {problem}" for problem in problems)):
            print(_terminal_safe(line))
    return not broken and not problems


# ==== Command line: argparse, tables, progress ====================================================

_ABOUT = """\
Look after the database of an AgenC operator. Without a command: show the promises of this module on
a scratch database, then look for problems in the operator's own.

Inspection works beside a running operator, changes nothing and creates nothing. PATH is the file of
--db-path, else of the environment's AGENC_DB_PATH, else ~/.agenc/operator.db. Secrets are shown as
***, those of an operator's own namespaces too, once it has declared them in this file. Exit status:
0 done, 1 failed or a problem found, 2 wrong usage."""

# ---- output


def _output_encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def _terminal_safe(value: object) -> str:
    """Return text without what steers a terminal, and without what the encoding lacks."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )
    return text.encode(_output_encoding(), "backslashreplace").decode(_output_encoding())


def _print_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON without what steers a terminal, in ASCII where the encoding asks for it."""
    ascii_only = "utf" not in _output_encoding().lower()
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
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
    """Return a task's reward: 10^9 lamports are one SOL, SKR is in its smallest unit."""
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


def _fit(text: str, width: int, *, align_right: bool) -> str:
    """Return a text padded to a width, or cut to it, with a sign that it was cut."""
    padding = width - _width(text)
    if padding < 0:
        sign = "…" if _terminal_safe("…") == "…" else "~"
        ends = accumulate(map(_width, text[:width]))
        text = "".join(c for c, end in zip(text, ends, strict=False) if end < width) + sign
        padding = width - _width(text)
    return " " * padding + text if align_right else text + " " * padding


def _print_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print aligned columns; on a terminal, the widest are cut until all of them fit."""
    import shutil

    table: list[list[object]] = [list(head), *map(list, rows)]
    texts = [
        [f"{cell:,}" if type(cell) is int else _terminal_safe(cell) for cell in row]
        for row in table
    ]
    widths = [max(map(_width, column)) for column in zip(*texts, strict=True)]
    if sys.stdout.isatty():
        room = max(shutil.get_terminal_size().columns - 2 * (len(widths) - 1), len(widths))
        widths = [min(width, room) for width in widths]
        while sum(widths) > room:
            widths[widths.index(max(widths))] -= 1
    for row, row_texts in zip(table, texts, strict=True):
        cells = zip(row, row_texts, widths, strict=True)
        fitted = (_fit(text, width, align_right=type(cell) is int) for cell, text, width in cells)
        print("  ".join(fitted).rstrip())


def _print_bars(title: str, numbers: dict[str, int], text: Callable[[int], str]) -> None:
    """Print numbers, each with a bar of its length, below an empty line."""
    print()
    largest = max(numbers.values(), default=0) or 1
    block = "█" if _terminal_safe("█") == "█" else "#"
    rows = (
        (name, text(number).rjust(10), block * -(-number * 24 // largest))
        for name, number in numbers.items()
    )
    _print_table((title, "", ""), rows)


def _print_records(options: Any, records: list[Any], **columns: Callable[[Any], object]) -> int:
    """Print records as a JSON array, or as a table with these columns."""
    if options.json:
        _print_json([_codec(type(record)).to_json(record) for record in records])
    else:
        head = (name.replace("_", " ") for name in columns)
        rows = ([cell(record) for cell in columns.values()] for record in records)
        _print_table(head, rows)
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
    """Yield what draws a progress bar on standard error, or None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    drawn_at = 0.0

    def draw(done: int, total: int) -> None:
        nonlocal drawn_at
        if time.monotonic() - drawn_at < 0.1:
            return
        drawn_at = time.monotonic()
        with suppress(OSError):  # the terminal may be gone, and the work goes on
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            room = max(0, min(30, columns - len(label) - 20))
            share = min(done / total, 1.0) if total else 0.0
            bar = f"[{'#' * int(share * room):{room}}] {share:4.0%}" if total else f"{done:,}"
            print(f"\r{label} {bar}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        try:
            print("\r\x1b[K" if drawn_at else "", end="", file=sys.stderr, flush=True)
        except OSError:
            _discard_output(2)


def _discard_output(descriptor: int) -> None:
    """Let standard output or error lead nowhere, so that the flush at exit does not fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


# ---- commands

# What runs a command returns the exit status, or what reports it: once all that it did is in place.
_Run = Callable[[Any, Any], int | Callable[[], int]]
_COMMANDS: dict[str, tuple[_Run, str, tuple[str, ...]]] = {}
"""By name: what runs it; whether it reads, writes, creates or needs no database; its arguments."""


def _command(opens: str, *arguments: str) -> Callable[[_Run], _Run]:
    """Make a function a command; its docstring is the help: in short, more, an example."""

    def register(run: _Run) -> _Run:
        _COMMANDS[run.__name__.strip("_").replace("_", "-")] = run, opens, arguments
        return run

    return register


@_command("read", "--prometheus", "-o")
def _stats(db: OperatorDb, options: Any) -> int:
    """what the database holds and takes

    Tasks by status, records and bytes by namespace, file sizes, and how many proofs wait to be
    submitted. Latencies are known to the running operator alone: OperatorDb.write_metrics().

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
    facts = (
        ("files", files),
        ("unused", _size_text(stats.free)),
        ("unsubmitted proofs", f"{stats.unsubmitted_proofs:,}"),
    )
    _print_table(("database", stats.path), facts)
    tasks = {str(status): count for status, count in stats.tasks.items()}
    _print_bars("tasks by status", tasks, "{:,}".format)
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


def _find_namespace(db: OperatorDb, name: str) -> Namespace[Any]:
    ours = (db._namespaces[each] for each in _EXPORTED_TABLES)
    namespaces = {each.name: each for each in (*ours, *db._custom_namespaces())}
    if name not in namespaces:
        raise NotFoundError(
            f"there is no namespace {_truncated_repr(name)}; there are {', '.join(namespaces)}"
        )
    return namespaces[name]


@_command("read", "KEY", "--include-secrets")
def _get(db: OperatorDb, options: Any) -> int:
    """one record, by its key

    A key is a namespace and an id: tasks:ID, sessions:ID, proofs:TASK_ID, config:operator. Bytes
    are shown in base64, secrets as *** unless asked for. Of an operator's namespace that was never
    declared in this file, whose secrets are not known, only key, status and age are shown.

    get tasks:t1
    """
    name, _, record_id = options.key.partition(":")
    namespace = _find_namespace(db, name)
    secrets = frozenset[str]() if options.include_secrets else namespace._secret_names()
    record: Any
    if secrets is None and isinstance(namespace, _JsonNamespace):
        record = namespace._visible_columns(record_id)
    elif name == "sessions":
        record = db.get_session(record_id)
    else:
        record = namespace.get(record_id)
    if record is None:
        raise NotFoundError(f"there is no {_truncated_repr(options.key)}")
    if not isinstance(record, dict):
        record = _codec(type(record)).to_json(record)
    _print_json(_redact(record, secrets or frozenset()), indent=None if options.json else 2)
    return 0


@_command("read", "NAMESPACE")
def _keys(db: OperatorDb, options: Any) -> int:
    """the keys of a namespace, in their order

    The namespaces are config, tasks, sessions, proofs, and the operator's own.

    keys sessions
    """
    ids = _find_namespace(db, options.namespace).keys()
    if options.json:
        _print_json([f"{options.namespace}:{each}" for each in ids])
        return 0
    for each in ids:
        print(f"{options.namespace}:{_terminal_safe(each)}")
    return 0


@_command("read", "-o", "--include-secrets")
def _export_(db: OperatorDb, options: Any) -> int:
    """every record as JSON Lines, from one snapshot

    A header, then one record a line. Secrets are written as *** unless asked for, those of an
    operator's own namespaces too.

    export -o operator.jsonl
    """
    file = sys.stdout if options.o in (None, "-") else options.o
    with _progress("export") as progress:
        shown = None if file is sys.stdout and sys.stdout.isatty() else progress
        db.export(file, include_secrets=options.include_secrets, progress=shown)
    return 0


@_command("create", "FILE")
def _import_(db: OperatorDb, options: Any) -> Callable[[], int]:
    """store what export wrote, all of it or nothing

    Takes that, or what the prototype's `agenc-db export --format json` writes. Keeps what the
    database knows more of; never puts *** over a secret, nor a proof over a different one. Creates
    the database where there is none.

    import operator.jsonl
    """
    with _progress("import") as progress:
        file = sys.stdin if options.file == "-" else options.file
        counts = db.import_(file, progress=progress)
    lines = []
    for name, counted in counts.items():
        outcomes = (
            f"{count:,} {what.replace('_', ' ')}"
            for what, count in counted.items()
            if not what.startswith("kept_")
        )
        lines.append(f"{name}: {', '.join(outcomes)}")
    kept = [what for what in counts.get("config", {}) if what.startswith("kept_")]
    if kept:
        names = ", ".join(what.removeprefix("kept_") for what in kept)
        lines.append(f"config: kept as it was, though the input has another: {names}")
    if "left_behind" in counts.get("proofs", {}):
        lines.append(
            "the prototype does not export proofs: keep its file for as long as one may be needed"
        )
    text = "\n".join(lines) or "nothing to import"
    return partial(_print_facts, options, dict(counts), text)


@_command("write", "--older-than", "--session-days", "--proof-days", "--dry-run")
def _prune(db: OperatorDb, options: Any) -> int:
    """remove what is old, and give the space back

    Completed tasks, idle sessions, and, when asked, proofs that are submitted and whose task is
    gone or settled. Disputed and resolved tasks stay. Works in short batches, beside a running
    operator.

    prune --older-than 30 --dry-run
    """
    days = (options.older_than, options.session_days, options.proof_days)
    with _progress("prune") as progress:
        report = db.prune(*days, dry_run=options.dry_run, progress=progress)
    verb = "would remove" if report.dry_run else "removed"
    removed = {"tasks": report.tasks, "sessions": report.sessions, "proofs": report.proofs}
    text = f"{verb} " + ", ".join(f"{name}: {count:,}" for name, count in removed.items())
    if not report.dry_run:
        sizes = _size_text(report.bytes_before), _size_text(report.bytes_after)
        text += f"; {sizes[0]} before, {sizes[1]} now"
    return _print_facts(options, vars(report), text)


def _hint(problems: list[str]) -> str:
    """Return what to do about problems in a database that can be opened."""
    return "; `repair` mends the file" if problems else ""


@_command("read")
def _check(db: OperatorDb, options: Any) -> int:
    """look for damage in every page and record

    Prints a line for each problem, and changes nothing. What it finds, `repair` mends.

    check
    """
    with _progress("check") as progress:
        problems = db.check(progress=progress)
    lines = [
        *map(_terminal_safe, problems),
        f"{_terminal_safe(db.path)}: problems found: {len(problems)}{_hint(problems)}",
    ]
    _print_facts(options, {"path": db.path, "problems": problems}, "\n".join(lines))
    return 1 if problems else 0


@_command("write", "--from")
def _repair_(db: OperatorDb, options: Any) -> Callable[[], int]:
    """make a damaged database sound

    Keeps every record that can be read, while the operator goes on, and prints a line for each that
    is lost. The file as it was is kept beside it. With a backup, what is lost comes from that. A
    sound database is left as it is.

    repair --from operator-2026-03-27.db
    """
    with _progress("repair") as progress:
        done = db.repair(backup=options.backup, progress=progress)
    what = "it is sound now" if done else "it is sound, and was left as it is"
    text = "\n".join(map(_terminal_safe, (*done, f"{db.path}: {what}")))
    return partial(_print_facts, options, {"path": db.path, "done": done}, text)


@_command("read", "DEST", "--overwrite")
def _backup_(db: OperatorDb, options: Any) -> int:
    """a checked copy, while the operator goes on

    The copy is private, is checked, and then appears at DEST whole. It holds the keys that the
    database holds.

    backup operator-2026-03-27.db
    """
    with _progress("backup") as progress:
        db.backup(options.dest, overwrite=options.overwrite, progress=progress)
    path = _absolute_path(options.dest)
    size = _size_text(_file_size(path))
    text = f"{_terminal_safe(path)}: {size}, checked; it holds the keys that the database holds"
    return _print_facts(options, {"path": path, "bytes": _file_size(path)}, text)


@_command("create", "SRC")
def _restore_(db: OperatorDb, options: Any) -> Callable[[], int]:
    """replace everything by what a backup holds

    The backup is checked first; then all is replaced at once, and a running operator goes on with
    it. What the database holds now is gone: make a backup of it before.

    restore operator-2026-03-27.db
    """
    with _progress("restore") as progress:
        db.restore(options.src, progress=progress)
    records = db.stats().records
    text = "restored " + ", ".join(f"{name}: {count:,}" for name, count in records.items())
    facts = {"path": _database_path(options.db_path), "records": records}
    return partial(_print_facts, options, facts, text)


@_command("write")
def _compact(db: OperatorDb, options: Any) -> int:
    """rebuild the file without gaps

    Needs as much free space again as the file has, and holds writers up until it is done.

    compact
    """
    freed, size = db.compact(), db._store.size()
    text = f"{_size_text(size)} now, {_size_text(max(0, freed))} given back"
    return _print_facts(options, {"path": db.path, "bytes_freed": freed, "bytes": size}, text)


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

    With the hash that stands on chain, any change to the evidence is found; without it,
    contradictions only.

    verify bundle.json
    """
    content = b"".join(_read_lines(sys.stdin if options.file == "-" else options.file))
    with _locate_errors(options.file):
        bundle = _parse_json_object(content)
    problems = verify_dispute_bundle(bundle, evidence_hash=options.evidence_hash)
    text = "\n".join(map(_terminal_safe, problems))
    if not problems:
        by = "the hash given" if options.evidence_hash else "itself; give the hash on chain too"
        text = f"the bundle is valid, checked against {by}"
    facts = {"problems": problems, "evidence_hash": options.evidence_hash}
    _print_facts(options, facts, text)
    return 1 if problems else 0


# ---- arguments


def _parse_arguments(argv: list[str] | None) -> Any:
    """Parse the command line; exits with status 2 when it is wrong."""
    import argparse
    import shutil
    from textwrap import fill

    def argument_type(
        parse: Callable[[str], Any], is_valid: Callable[[Any], bool], description: str
    ) -> Callable[[str], Any]:
        def convert(text: str) -> Any:
            with suppress(ValueError):
                if is_valid(parse(text)):
                    return parse(text)
            raise argparse.ArgumentTypeError(f"{_truncated_repr(text)} is not {description}")

        return convert

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(_terminal_safe(message))

    width = max(20, shutil.get_terminal_size().columns - 2)  # as argparse does

    def wrapped(text: str) -> str:
        return "\n\n".join(fill(" ".join(part.split()), width) for part in text.split("\n\n"))

    days = {
        "metavar": "DAYS",
        "type": argument_type(float, lambda v: 0 <= v < 10**9, "a number of days"),
    }
    status = argument_type(TaskStatus, bool, f"a status: {', '.join(TaskStatus)}")
    count = argument_type(int, lambda v: 0 <= v < 2**63, "a number of records")
    key = argument_type(str, lambda v: ":" in v, "a key: NAMESPACE:ID")
    digits = argument_type(
        lambda v: v.lower().removeprefix("0x"), _HASH.is_valid, "64 hex digits, not all zero"
    )
    flag = {"action": "store_true"}
    arguments: dict[str, _Json] = {
        "--prometheus": {**flag, "help": "print Prometheus's text format"},
        "-o": {
            "metavar": "FILE",
            "help": "write to FILE, replaced atomically, instead of standard output",
        },
        "--status": {
            "metavar": "S",
            "type": status,
            "help": f"only those: {', '.join(TaskStatus)}",
        },
        "--limit": {"metavar": "N", "type": count, "help": "the first N only"},
        "--newest-first": {**flag, "help": "the newest first"},
        "--unsubmitted": {**flag, "help": "only those that are not marked as submitted"},
        "--include-secrets": {**flag, "help": "write keypairs and RPC endpoints too"},
        "--older-than": {**days, "default": 30, "help": "tasks older than that (30)"},
        "--session-days": {**days, "default": 90, "help": "sessions idle for longer (90)"},
        "--proof-days": {**days, "help": "submitted proofs older than that (keep all)"},
        "--dry-run": {**flag, "help": "count, and change nothing"},
        "--overwrite": {**flag, "help": "replace DEST if it is there"},
        "--from": {
            "metavar": "BACKUP",
            "dest": "backup",
            "help": "take what is lost from a backup",
        },
        "--evidence-hash": {
            "metavar": "HEX",
            "type": digits,
            "help": "the hash on chain, 64 hex digits",
        },
        "KEY": {"type": key, "help": "NAMESPACE:ID"},
        "FILE": {"help": "a file, - for standard input"},
    }
    layout: _Json = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--db-path", metavar="PATH", help="the database file")
    common.add_argument("--json", action="store_true", help="print the same facts for programs")
    helps = {
        name: [part.strip() for part in (run.__doc__ or f"{name}\n\n\n\n").split("\n\n")]
        for name, (run, _, _) in _COMMANDS.items()
    }
    listed = "\n".join(
        fill(f"  {name:13}  {summary}", width, subsequent_indent=" " * 17)
        for name, (summary, _, _) in helps.items()
    )
    parser = Parser(
        prog="operator_db.py",
        usage="operator_db.py [OPTIONS] [COMMAND ...]",
        description=wrapped(_ABOUT),
        epilog=f"commands (COMMAND --help says more):\n{listed}",
        parents=[common],
        **layout,
    )
    versions = (
        f"operator_db {__version__}, schema {len(_MIGRATIONS)}, SQLite {sqlite3.sqlite_version}"
    )
    parser.add_argument("--version", action="version", version=versions, help="print versions")
    commands = parser.add_subparsers(prog="operator_db.py", dest="command", help=argparse.SUPPRESS)
    for name, (summary, more, example) in helps.items():
        command = commands.add_parser(
            name,
            parents=[common],
            description=wrapped(f"{summary[0].upper()}{summary[1:]}.\n\n{more}"),
            epilog=f"example:\n  python operator_db.py {example}",
            **layout,
        )
        for argument in _COMMANDS[name][2]:
            place: _Json = {"metavar": argument} if argument.isupper() else {}
            command.add_argument(argument.lower(), **place, **arguments.get(argument, {}))
    return parser.parse_args(argv, argparse.Namespace(db_path=None, json=False))


def _run(options: Any) -> int:
    """Do what the command line says, and return the exit status."""
    if options.command is None:
        return 0 if self_check(options.db_path, as_json=options.json) else 1
    run, opens, _ = _COMMANDS[options.command]
    result = run(None, options) if opens == "nothing" else _run_on_database(run, opens, options)
    return result() if callable(result) else result


def _run_on_database(run: _Run, opens: str, options: Any) -> int | Callable[[], int]:
    if _is_memory(options.db_path):
        raise StorageError("a database in :memory: can be used by the program alone that opens it")
    path = _database_path(options.db_path)
    if _file_exists(path):
        only_looks = opens == "read" or getattr(options, "dry_run", False)
        if not only_looks and not os.access(path, os.W_OK):
            # SQLite would leave files beside another user's
            raise StorageError(f"{path}: you have no permission to write it")
        with _progress("migrate") as progress:
            db = OperatorDb(path, read_only=only_looks, progress=progress)
        with db:
            return run(db, options)
    if opens != "create":
        raise StorageError(
            f"{path}: there is no database; the operator creates it, or `import`, or `restore`"
        )
    result: int | Callable[[], int] = 1

    def fill(temporary: str) -> None:
        nonlocal result
        with OperatorDb(temporary) as db:
            result = run(db, options)

    if not _create_database(path, 30, fill):
        raise StorageError(f"{path} was created by another program meanwhile; nothing was changed")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0: done, 1: failed or a problem found, 2: wrong usage."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure") and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = _run(_parse_arguments(argv))
        except SystemExit as left:  # help, versions, or wrong usage, printed by argparse
            status = int(left.code or 0)
        sys.stdout.flush()
        return status
    except (OperatorDbError, OSError) as error:  # the latter of standard output
        if not isinstance(error, OperatorDbError) or error.__cause__:
            _discard_output(1)  # it has failed: `_send` alone raises from a cause
        if not isinstance(error.__cause__ or error, BrokenPipeError):
            print(f"operator_db: {_terminal_safe(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("operator_db: interrupted", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    import signal

    def _stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)  # and so remove what is half done

    for _name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(getattr(signal, _name)) != signal.SIG_IGN:  # by nohup
            signal.signal(getattr(signal, _name), _stop)
    raise SystemExit(main())
