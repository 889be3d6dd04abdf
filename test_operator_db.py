"""The promises of operator_db, as sentences that fail when they are broken. Standard library only.

`python3 test_operator_db.py` runs them all; its last line reads `N passed, N failed`.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import errno
import fcntl
import gc
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import tracemalloc
import unicodedata
import unittest
import zlib
from array import array
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from enum import Enum, Flag
from functools import partial
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock
from zlib import crc32

import operator_db
from operator_db import (
    BusyError,
    ClosedError,
    ConflictError,
    DamagedError,
    ForeignFileError,
    InvalidRecordError,
    NewerSchemaError,
    NotFoundError,
    OperatorConfig,
    OperatorDb,
    OperatorDbError,
    SessionState,
    StatusChange,
    StorageError,
    TaskRecord,
    TaskStatus,
    TranscriptEntry,
    VerificationLog,
    verify_dispute_bundle,
)

HERE = Path(__file__).resolve().parent
DAY = 86_400

# A real task on Solana devnet, 2026-03-27, recorded by the AgenC protocol's own readiness run: bid, claim, dispute,
# resolution. Program GN69CoBM1XUt8MJtA6Kwd7WRwLzTNtVqLwf5o3fwWDV3.
DEVNET_TASK = "2aotSaHBBZvWyUDt8qztEGesVGiVqg54xiPvBxZvAqFt"
DEVNET_CREATOR = "AYwAQmXxTLB3ukpRPHV2LC6qA4DCo2hsuSTneNn9xnQN"
DEVNET_WORKER = "4YRpGXNp5gfPE8XqcUAL3FV6xHMJaQkxVccPTSy8hutg"
DEVNET_CLAIM = "4CtqyVXQuSC3ogSXU5ia9TYrUpGWwLSg2kZySbCmr2qC2X6vEpzqRzF9oYDViPGmrFvLeVDXeAS2SULjddBfv2EB"
DEVNET_DISPUTE = "37WpEBkP5eWGkDs98BHyvTA6CMMbt61Hco7qn9khxy4iZJF4iY8y9RghrTdErYD1QDRhXPBZ2uLvAy9R8qRRA4ra"
DEVNET_RESOLVE = "411bqVLrReRLerQ9ycCGhD6u4yQ4UPoE3GsDPVm9NE2Yod17uhD4UHYL9vSQxeduF5rrvHkzpzbe3QfWPQMHXQyg"


class Scratch(unittest.TestCase):
    """A directory of its own for each test, and an empty home and environment."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="operator_db-test-")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name).resolve()
        self.path = str(self.directory / "operator.db")
        environment = {**os.environ, "HOME": str(self.directory), "PYTHONPATH": str(HERE)}
        environment.pop("AGENC_DB_PATH", None)
        patched = mock.patch.dict(os.environ, environment, clear=True)
        patched.start()
        self.addCleanup(patched.stop)

    def open(self, path: str | None = None, **options: Any) -> OperatorDb:
        db = OperatorDb(path or self.path, **{"durable": False, **options})
        self.addCleanup(db.close)
        return db

    def raw(self, path: str | None = None) -> Any:
        """The file as the standard library's sqlite3 sees it."""
        return closing(sqlite3.connect(path or self.path, isolation_level=None))

    def python(self, program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )


def in_threads(*actions: Any) -> None:
    """Run the actions at the same time; raise the first error of any."""
    errors: list[BaseException] = []

    def run(action: Any) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


# ---- records


class Colour(Enum):
    RED = 1
    BLUE = "blue"


class Rights(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Inner:
    name: str
    raw: bytes = b""


@dataclass(kw_only=True)
class PairedDevice:
    device_id: str
    last_seen: int = 0
    status: str = "paired"
    token: str = field(default="", metadata={"secret": True})
    colour: Colour = Colour.RED
    inner: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    by_name: dict[str, bytes] = field(default_factory=dict)
    ratio: float = 0.5
    trusted: bool = False
    anything: Any = None


class ARecordIsCheckedWhenItIsMade(Scratch):
    def refused(self, record_type: type, word: str, **values: Any) -> str:
        with self.assertRaises(InvalidRecordError) as caught:
            record_type(**values)
        self.assertIsInstance(caught.exception, ValueError)
        self.assertIn(word, str(caught.exception))
        self.assertLess(len(str(caught.exception)), 400)
        return str(caught.exception)

    def test_a_wrong_type_range_or_text_is_refused_with_the_fields_name(self) -> None:
        cases = {
            "task_id": ["", "a\nb", "a\0b", "\x7f", "\ud800", 7, None, b"x", " \t"],
            "payload": ["text", None, bytearray(b"x"), [1]],
            "status": ["nonsense", 3, None, b"claimed"],
            "claimed_at": [True, 1.5, "1", None, 2**63, -(2**63) - 1],
            "completed_at": [False, 2**63, "x"],
            "on_chain_signature": [1, "\udfff", b"x"],
            "description": [1, "\ud83d", b"x"],
            "reward_lamports": [-1, 2**64, True, 1.0, "1"],
            "reward_skr_tokens": [-1, 2**64, False],
            "creator": [[], "\ud800"],
            "history": [None, (), [1], ["claimed"], [None]],
        }
        self.assertEqual(set(cases), {f.name for f in dataclasses.fields(TaskRecord)})
        for name, values in cases.items():
            for value in values:
                with self.subTest(field=name, value=value):
                    message = self.refused(TaskRecord, f"TaskRecord.{name}", **{"task_id": "t", name: value})
                    self.assertIn(type(value).__name__, message)

    def test_the_other_records_are_checked_too(self) -> None:
        self.refused(StatusChange, "StatusChange.at", status=TaskStatus.CLAIMED, at=True)
        self.refused(TranscriptEntry, "TranscriptEntry.content", role="user", content=None)
        self.refused(TranscriptEntry, "TranscriptEntry.timestamp", role="user", content="", timestamp=2**63)
        self.refused(SessionState, "SessionState.active_task_ids", session_id="s", active_task_ids=["a\n"])
        self.refused(SessionState, "SessionState.command_history", session_id="s", command_history=[b""])
        self.refused(OperatorConfig, "OperatorConfig.model_preferences", model_preferences={"a": (1, 2)})
        self.refused(OperatorConfig, "OperatorConfig.model_preferences", model_preferences={1: "a"})
        self.refused(
            OperatorConfig, "OperatorConfig.model_preferences", model_preferences={"a": float("nan")}
        )
        self.refused(VerificationLog, "VerificationLog.outputs", task_id="t", outputs="text")
        self.refused(VerificationLog, "submitted", task_id="t", outputs=b"", submission_signature="s")

    def test_a_large_value_is_shown_short_and_a_secret_not_at_all(self) -> None:
        self.refused(TaskRecord, "...", task_id="t", payload="x" * 10**6)
        for values in (
            {"keypairs": {"a": b"5ecret"}},
            {"keypairs": ["5ecret"]},
            {"rpc_endpoints": "https://5ecret"},
        ):
            self.assertNotIn("5ecret", self.refused(OperatorConfig, "***", **values))

    def test_statuses_are_parsed_as_the_prototype_and_the_command_line_write_them(self) -> None:
        for text in ("in_progress", "InProgress", "in-progress", "IN_PROGRESS"):
            self.assertIs(TaskStatus(text), TaskStatus.IN_PROGRESS)
            self.assertIs(TaskRecord(task_id="t", status=text).status, TaskStatus.IN_PROGRESS)  # type: ignore[arg-type]

    def test_only_ids_a_transcripts_words_and_a_proofs_outputs_are_required(self) -> None:
        before = int(time.time())
        task = TaskRecord(task_id="t")
        self.assertTrue(before <= task.claimed_at <= time.time())
        self.assertEqual((task.status, task.reward_lamports, task.completed_at), ("claimed", None, None))
        for made in (
            SessionState(session_id="s"),
            OperatorConfig(),
            TranscriptEntry(role="user", content=""),
        ):
            self.assertTrue(made)
        for record_type in (TaskRecord, SessionState, VerificationLog, TranscriptEntry, StatusChange):
            with self.assertRaises(TypeError):
                record_type()

    def test_what_was_changed_after_it_was_made_is_checked_again_before_it_is_stored(self) -> None:
        db = self.open()
        task = TaskRecord(task_id="t")
        task.reward_lamports = -1
        session = SessionState(session_id="s")
        session.transcript.append("not an entry")  # type: ignore[arg-type]
        config = OperatorConfig()
        config.keypairs["a"] = 5  # type: ignore[assignment]
        stores: list[tuple[Any, Any]] = [
            (db.store_task, task),
            (db.store_session, session),
            (db.store_config, config),
        ]
        for store, record in stores:
            with self.assertRaises(InvalidRecordError):
                store(record)
            with self.assertRaises(InvalidRecordError):
                store(None)
        with self.assertRaises(InvalidRecordError):
            db.store_proof(None)  # type: ignore[arg-type]
        self.assertEqual((list(db.iter_tasks()), db.list_sessions(), db.get_config()), ([], [], None))


class ARecordReadBackIsTheRecordStored(Scratch):
    def test_every_field_of_every_record(self) -> None:
        text = '\0\x1f"\\/ é 漢字 \U0001f600 \u202e \ufeff \u2028'
        history = [StatusChange(status=s, at=i - 3, signature=text) for i, s in enumerate(TaskStatus)]
        task = TaskRecord(
            task_id="tasks:%00'\"; DROP TABLE tasks; --",
            payload=bytes(range(256)),
            status=TaskStatus.RESOLVED,
            claimed_at=-(2**63),
            completed_at=2**63 - 1,
            on_chain_signature=text,
            description=text,
            reward_lamports=2**64 - 1,
            reward_skr_tokens=0,
            creator=text,
            history=history,
        )
        session = SessionState(
            session_id="s:1",
            transcript=[
                TranscriptEntry(role=text, content=text, timestamp=-5),
                TranscriptEntry(role="", content=""),
            ],
            command_history=[text, ""],
            active_task_ids=["a", "é:%"],
            created_at=1,
            last_active=2,
        )
        log = VerificationLog(
            task_id="t", inputs=b"\0", outputs=b"\xff", proof=b"p", proof_hash="ab" * 32, result_data=b"r" * 64,
            timestamp=7, submitted=True, submission_signature="sig",
        )  # fmt: skip
        config = OperatorConfig(
            keypairs={"main": text}, rpc_endpoints=["https://x/?key=1"], model_preferences={"a": [1, 2.5, None, {"b": text}]},
            capabilities=["voice"], wallet_pubkey=DEVNET_WORKER, network="devnet",
        )  # fmt: skip
        with OperatorDb(self.path) as db:
            db.store_task(task)
            db.store_session(session)
            db.store_proof(log)
            db.store_config(config)
        db = self.open()
        self.assertEqual(db.get_task(task.task_id), task)
        self.assertEqual(db.get_session("s:1"), session)
        self.assertEqual(db.get_proof("t"), log)
        self.assertEqual(db.get_config(), config)
        self.assertEqual(
            (list(db.iter_tasks()), db.list_tasks(), db.list_sessions()), ([task], [task], [session])
        )
        self.assertEqual(db.check(), [])

    def test_payloads_from_nothing_to_64_mib(self) -> None:
        db = self.open()
        for size in (0, 1, 2, 3, 4096, 64 * 2**20):
            task = TaskRecord(task_id=str(size), payload=os.urandom(size))
            db.store_task(task)
            self.assertEqual(db.get_task(str(size)), task)

    def test_ids_of_any_printable_characters_never_collide(self) -> None:
        db = self.open()
        ids = [
            "a",
            "a:",
            "a:0",
            "a%3A0",
            "%",
            ":",
            "A",
            "á",
            "a\u0301",
            "漢",
            "\U0001f600",
            "'",
            '"',
            "a b",
            "x" * 2**20,
        ]
        for number, each in enumerate(ids):
            db.store_task(TaskRecord(task_id=each, claimed_at=number))
            db.append_transcript(each, "user", f"{number}")
            db.append_command(each, f"{number}")
        for number, each in enumerate(ids):
            task = db.get_task(each)
            self.assertEqual(task and (task.task_id, task.claimed_at), (each, number))
            session = db.get_session(each)
            assert session is not None
            self.assertEqual(
                ([e.content for e in session.transcript], session.command_history),
                ([f"{number}"], [f"{number}"]),
            )
        self.assertEqual(len(list(db.iter_tasks())), len(ids))

    def test_the_standard_librarys_sqlite3_reads_a_row_as_json(self) -> None:
        self.open().store_task(
            TaskRecord(task_id="t", payload=b"\xff\xfe", status=TaskStatus.IN_PROGRESS, claimed_at=9)
        )
        with self.raw() as raw:
            key, value, status, at, crc = raw.execute("SELECT * FROM tasks").fetchone()
        document = json.loads(value)
        self.assertEqual((key, status, at, crc), ("tasks:t", "in_progress", 9, zlib.crc32(value.encode())))
        self.assertEqual(
            (document["payload"], document["status"], document["creator"]), ("//4=", "in_progress", None)
        )
        self.assertNotIn(" ", value)


# ---- namespaces


class ANamespaceOfTheOperatorsOwn(Scratch):
    def devices(self, db: OperatorDb) -> operator_db.Namespace[PairedDevice]:
        return db.namespace("devices", PairedDevice, key="device_id", status="status", at="last_seen")

    def test_has_every_verb_of_ours(self) -> None:
        devices = self.devices(self.open())
        full = PairedDevice(
            device_id="d1", token="5ecret", colour=Colour.BLUE, inner=Inner("é", b"\xff"), many=[Inner("a"), Inner("b")],
            by_name={"k": b"\0"}, ratio=-0.0, trusted=True, anything={"deep": [1, None, "x"]}, last_seen=5,
        )  # fmt: skip
        self.assertTrue(devices.put(full))
        self.assertFalse(devices.put(PairedDevice(device_id="d1"), if_absent=True))
        self.assertTrue(devices.put(PairedDevice(device_id="d2", status="lost", last_seen=1), if_absent=True))
        self.assertEqual((devices.get("d1"), devices.get("d3")), (full, None))
        self.assertEqual([d.device_id for d in devices.list()], ["d2", "d1"])
        self.assertEqual([d.device_id for d in devices.list(newest_first=True, limit=1)], ["d1"])
        self.assertEqual([d.device_id for d in devices.list("lost")], ["d2"])
        self.assertEqual((devices.count(), devices.count("lost"), devices.count("x")), (2, 1, 0))
        self.assertEqual((list(devices.keys()), devices.statuses()), (["d1", "d2"], ["lost", "paired"]))
        self.assertEqual([(i, d.device_id) for i, d in devices.items("lost")], [("d2", "d2")])
        changed = devices.update("d2", lambda d: dataclasses.replace(d, status="paired"))
        self.assertEqual((changed.status, devices.count("paired")), ("paired", 2))
        self.assertEqual((devices.prune(0, dry_run=True), devices.prune(0), devices.count()), (2, 2, 0))
        self.assertEqual((devices.delete("d1"), list(devices.problems())), (False, []))

    def test_hides_its_secret_fields_in_repr_and_errors(self) -> None:
        devices = self.devices(self.open())
        device = PairedDevice(device_id="d", token="5ecret")
        self.assertNotIn("5ecret", repr(device))
        device.token = b"5ecret"  # type: ignore[assignment]
        with self.assertRaises(InvalidRecordError) as caught:
            devices.put(device)
        self.assertIn("PairedDevice.token", str(caught.exception))
        self.assertNotIn("5ecret", "".join(traceback.format_exception(caught.exception)))
        with self.assertRaises(InvalidRecordError):
            self.open().namespace("by_token", PairedDevice, key="token")

    def test_evolves_by_the_defaults_of_its_dataclass(self) -> None:
        @dataclass
        class Old:
            name: str

        @dataclass
        class New:
            name: str
            size: int = 3

        db = self.open()
        db.namespace("things", Old, key="name").put(Old("a"))
        self.assertEqual(db.namespace("things", New, key="name").get("a"), New("a", 3))

    def test_runs_the_dataclasss_own_post_init(self) -> None:
        made: list[str] = []

        @dataclass
        class Counted:
            name: str

            def __post_init__(self) -> None:
                made.append(self.name)

        @dataclass(slots=True, frozen=True)
        class Slotted:
            name: str

        db = self.open()
        counted = db.namespace("counted", Counted, key="name")
        counted.put(Counted("a"))
        made.clear()
        counted.get("a")
        self.assertEqual(made, ["a"])
        slotted = db.namespace("slotted", Slotted, key="name")
        slotted.put(Slotted("a"))
        self.assertEqual(slotted.get("a"), Slotted("a"))

    def test_takes_no_bool_for_an_int_and_no_int_for_a_bool(self) -> None:
        Sized = dataclasses.make_dataclass("Sized", [("name", str), ("size", int), ("full", bool)])
        sized: Any = self.open().namespace("sized", Sized, key="name")
        for size, full in ((True, False), (1, 1), (1, 0), (1.0, True)):
            with self.assertRaises(InvalidRecordError):
                sized.put(Sized("a", size, full))

    def test_is_refused_when_its_name_or_type_will_not_do(self) -> None:
        db = self.open()
        names = [
            "",
            "Tasks",
            "a-b",
            "a b",
            "1a",
            "_a",
            "sqlite_x",
            "tasks",
            "session_log",
            "x" * 49,
            'a"; DROP TABLE tasks',
            "é",
        ]
        for name in [*names, None, 5]:
            with self.subTest(name=name), self.assertRaises(InvalidRecordError):
                db.namespace(name, Inner, key="name")  # type: ignore[arg-type]

        @dataclass
        class Odd:
            name: str
            when: set[int]

        for record_type, key in ((Odd, "name"), (Inner, "missing"), (dict, "name"), (Inner("x"), "name")):
            with self.assertRaises(InvalidRecordError):
                db.namespace("odd", record_type, key=key)  # type: ignore[arg-type]
        with self.raw() as raw:
            tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        self.assertEqual(tables, {"tasks", "sessions", "session_log", "proofs", "config"})

    def test_what_cannot_be_stored_is_refused_and_names_the_field(self) -> None:
        devices = self.devices(self.open())
        deep: Any = []
        for _ in range(101):
            deep = [deep]
        loop: list[Any] = []
        loop.append(loop)
        bad = {
            "device_id": ["", "a\n", 3], "last_seen": [True, 2**63], "status": [3], "colour": [2, "red"], "inner": ["x"],
            "many": [[None], (Inner("x"),)], "by_name": [{1: b""}, {"a": "text"}], "ratio": [float("nan"), float("inf"), "1"],
            "anything": [deep, loop, {1: 2}, b"x", {"a"}, float("inf"), "\ud800", 10**5000],
        }  # fmt: skip
        for name, values in bad.items():
            for value in values:
                with self.subTest(field=name, value=type(value)), self.assertRaises(InvalidRecordError):
                    devices.put(dataclasses.replace(PairedDevice(device_id="d"), **{name: value}))
        self.assertEqual(devices.count(), 0)


class WhatWouldNotBeReadBackIsNotStored(Scratch):
    def test_a_record_that_its_own_constructor_changes_is_refused_at_put(self) -> None:
        @dataclass
        class Doubling:
            name: str
            size: int = 1

            def __post_init__(self) -> None:
                self.size *= 2

        @dataclass
        class Counting:
            name: str
            seen: int = field(init=False, default=0)

        class Failing(Exception):
            pass

        @dataclass
        class Private:
            name: str
            pin: str = field(default="", metadata={"secret": True})

            def __post_init__(self) -> None:
                if len(self.pin) < 4:
                    raise Failing(f"pin {self.pin} is short")

        db = self.open()
        changed = Counting("a")
        changed.seen = 5
        short = Private("a", "5ecret")
        short.pin = "5ec"
        for name, record in (("doubling", Doubling("a")), ("counting", changed), ("private", short)):
            namespace: Any = db.namespace(name, type(record), key="name")
            with self.assertRaises(InvalidRecordError) as caught:
                namespace.put(record)
            self.assertNotIn("5ec", str(caught.exception))
            self.assertEqual(namespace.count(), 0)
        self.assertTrue(db.namespace("counting", Counting, key="name").put(Counting("a")))

    def test_enums_whose_values_json_cannot_carry_are_refused_and_flags_are_kept(self) -> None:
        class Pair(Enum):
            ONE = (1, 2)

        class Empty(Enum):
            NOTHING = None

        @dataclass
        class Shared:
            name: str
            rights: Rights

        db = self.open()
        for enum in (Pair, Empty):
            record_type = dataclasses.make_dataclass("Odd", [("name", str), ("value", enum)])
            with self.assertRaises(InvalidRecordError):
                db.namespace("odd", record_type, key="name")
        shared = db.namespace("shared", Shared, key="name")
        shared.put(Shared("a", Rights.READ | Rights.WRITE))
        self.assertEqual(shared.get("a"), Shared("a", Rights.READ | Rights.WRITE))

    def test_a_secret_within_a_secret_field_is_not_shown(self) -> None:
        @dataclass
        class Token:
            value: str

        Device = dataclasses.make_dataclass(
            "Device",
            [
                ("name", str),
                ("token", Token, field(metadata={"secret": True})),
                ("more", list[Token], field(metadata={"secret": True})),
            ],
        )
        devices: Any = self.open().namespace("devices", Device, key="name")
        for record in (Device("a", Token(["5ecret"]), []), Device("a", Token("x"), [Token(b"5ecret")])):  # type: ignore[arg-type]
            with self.assertRaises(InvalidRecordError) as caught:
                devices.put(record)
            self.assertNotIn("5ecret", str(caught.exception))

    def test_a_secret_of_a_record_within_is_not_shown_either(self) -> None:
        Token = dataclasses.make_dataclass("Token", [("value", str, field(metadata={"secret": True}))])
        Device = dataclasses.make_dataclass(
            "Device", [("name", str), ("token", Token), ("more", list[Token])]
        )  # type: ignore[valid-type]
        devices: Any = self.open().namespace("devices", Device, key="name")
        for record in (Device("a", {"value": "5ecret"}, []), Device("a", Token("x"), ["5ecret"])):
            with self.assertRaises(InvalidRecordError) as caught:
                devices.put(record)
            self.assertNotIn("5ecret", str(caught.exception))

    def test_an_empty_status_and_reserved_words_as_names_are_fine(self) -> None:
        db = self.open()
        for name in ("order", "index", "values", "table", "transaction"):
            namespace = db.namespace(name, PairedDevice, key="device_id", status="status", at="last_seen")
            namespace.put(PairedDevice(device_id="a", status=""))
            self.assertEqual(
                (namespace.get("a"), namespace.count("")), (PairedDevice(device_id="a", status=""), 1)
            )
        self.assertEqual(db.check(), [])

    def test_arguments_that_are_nonsense_raise_typed_errors(self) -> None:
        db = self.open()
        devices = db.namespace("devices", PairedDevice, key="device_id", status="status")
        deep: Any = []
        for _ in range(5000):
            deep = [deep]
        calls: list[Any] = [
            lambda: devices.list("\ud800"), lambda: list(devices.keys("\ud800")), lambda: devices.count(deep),
            lambda: devices.get("\ud800"), lambda: devices.delete("\ud800"), lambda: devices.delete(None),  # type: ignore[arg-type]
            lambda: db.list_tasks(deep), lambda: db.list_tasks(""), lambda: db.list_tasks(False), lambda: db.get_task(deep),  # type: ignore[arg-type]
            lambda: db.list_proofs(submitted="yes"), lambda: db.update_task_status("t", "claimed", signature=""),  # type: ignore[arg-type]
            lambda: devices.prune(1), lambda: TaskRecord(task_id="t", reward_lamports=10**5000), lambda: db.store_task(deep),
            lambda: db.namespace("a", PairedDevice, key=5), lambda: db.namespace("a", PairedDevice, key=None),  # type: ignore[arg-type]
        ]  # fmt: skip
        for number, call in enumerate(calls):
            with self.subTest(number=number), self.assertRaises(InvalidRecordError):
                call()


class RowsOfAnotherProgram(Scratch):
    """Whatever stands in the file, a verb answers with what was stored or with a typed error."""

    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()
        for name in ("a", "z"):
            self.db.store_task(TaskRecord(task_id=name, status=TaskStatus.COMPLETED, claimed_at=5))

    def sql(self, statement: str, *values: Any) -> None:
        with self.raw() as raw:
            raw.execute(statement, values)

    def test_each_is_an_error_that_names_the_key_and_check_goes_on_to_the_end(self) -> None:
        good = json.dumps({"task_id": "a"}).encode()
        crc = "CAST(? AS TEXT), crc = "
        plants: list[tuple[str, tuple[Any, ...]]] = [
            ("value = 'not json'", ()), ("value = x'00'", ()), ("value = 5", ()), ("crc = crc + 1", ()), ("crc = 'x'", ()),
            ("status = 'claimed'", ()), ("status = NULL", ()), ("status = x'ff'", ()), ("at = 6", ()), ("at = NULL", ()),
            ("at = 'x'", ()), ("at = x'05'", ()), (f"value = {crc}{zlib.crc32(good)}", (good.replace(b'"a"', b'"b"'),)),
            (f"value = {crc}{zlib.crc32(b'[]')}", (b"[]",)), (f"value = {crc}{zlib.crc32(b'{}')}", (b"{}",)),
            (f"value = {crc}{zlib.crc32(b'1e999')}", (b"1e999",)), (f"value = {crc}{zlib.crc32(bytes([255]))}", (b"\xff",)),
            (f"value = {crc}{zlib.crc32(b'[' * 10**5)}", (b"[" * 10**5,)),
        ]  # fmt: skip
        for plant, values in plants:
            with self.subTest(plant=plant):
                self.sql(f"UPDATE tasks SET {plant} WHERE key = 'tasks:a'", *values)
                for verb in (
                    lambda: self.db.get_task("a"),
                    lambda: list(self.db.iter_tasks()),
                    self.db.list_tasks,
                ):
                    with self.assertRaises(DamagedError) as caught:
                        verb()
                    self.assertIn("tasks:a", str(caught.exception))
                self.sql("UPDATE tasks SET crc = crc + 1 WHERE key = 'tasks:z'")
                found = " ".join(self.db.check())
                self.assertIn("tasks:a", found)
                self.assertIn("tasks:z", found)
                self.assertIsNotNone(
                    self.db.store_task(TaskRecord(task_id="z", status=TaskStatus.COMPLETED, claimed_at=5))
                    or 1
                )
                self.db.store_task(TaskRecord(task_id="a", status=TaskStatus.COMPLETED, claimed_at=5))
                self.assertEqual(self.db.check(), [])
                self.sql(f"UPDATE tasks SET {plant} WHERE key = 'tasks:a'", *values)
                self.assertTrue(self.db.delete_task("a"))
                self.db.store_task(TaskRecord(task_id="a", status=TaskStatus.COMPLETED, claimed_at=5))

    def test_keys_that_no_writer_of_ours_stores_are_reported_and_never_returned(self) -> None:
        for key in (b"tasks:a", "", "tasks:", "tasks:a\n", "a"):
            self.sql("UPDATE tasks SET key = ? WHERE key = 'tasks:a'", key)
            self.assertIsNone(self.db.get_task("a"))
            with self.assertRaises(DamagedError):
                self.db.list_tasks()
            self.assertEqual(len(self.db.check()), 1, key)
            self.sql("UPDATE tasks SET key = 'tasks:a' WHERE key = ?", key)
        self.assertEqual(self.db.check(), [])

    def test_prune_takes_nothing_on_the_word_of_a_column(self) -> None:
        self.db.store_task(TaskRecord(task_id="disputed", status=TaskStatus.DISPUTED))
        self.db.store_proof(VerificationLog(task_id="unsubmitted", outputs=b"x"))
        self.sql("UPDATE tasks SET status = 'completed', at = 1 WHERE key = 'tasks:disputed'")
        self.sql("UPDATE proofs SET status = 'true', at = 1")
        for dry_run in (True, False):
            with self.assertRaises(DamagedError):
                self.db.prune(30, None, None, dry_run=dry_run)
            with self.assertRaises(DamagedError):
                self.db.prune(None, None, 30, dry_run=dry_run)
        with self.raw() as raw:
            self.assertEqual(
                raw.execute("SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM proofs)").fetchone(),
                (3, 1),
            )

    def test_an_append_never_overwrites_an_entry_that_cannot_be_seen(self) -> None:
        for number in range(5):
            self.db.append_transcript("s", "user", f"{number}")
        self.sql("UPDATE session_log SET status = NULL WHERE key = 'session_log:transcript:s:4'")
        with self.assertRaises(DamagedError):
            self.db.get_session("s")
        self.db.append_transcript("s", "user", "next")
        self.sql("UPDATE session_log SET status = 'transcript:s' WHERE key = 'session_log:transcript:s:4'")
        self.assertEqual([e.content for e in self.db.transcript("s")], ["0", "1", "2", "3", "4", "next"])
        self.sql("DELETE FROM session_log WHERE key = 'session_log:transcript:s:5'")
        for verb in (
            lambda: self.db.get_session("s"),
            lambda: self.db.transcript("s", last=1),
            self.db.list_sessions,
        ):
            with self.assertRaises(DamagedError):
                verb()
        self.assertIn("transcript:s", " ".join(self.db.check()))
        self.sql("UPDATE sessions SET key = 'sessions:other' WHERE key = 'sessions:s'")
        self.assertIn("belongs to no session", " ".join(self.db.check()))

    def test_a_damaged_proof_can_be_deleted_or_stored_again(self) -> None:
        proof = VerificationLog(task_id="p", outputs=b"x")
        self.db.store_proof(proof)
        for _ in range(2):
            self.sql("UPDATE proofs SET crc = crc + 1")
            with self.assertRaises(DamagedError):
                self.db.get_proof("p")
            self.assertTrue(self.db.store_proof(proof))
            self.assertEqual(self.db.get_proof("p"), proof)
        self.sql("UPDATE proofs SET crc = crc + 1")
        self.assertTrue(self.db.delete_proof("p"))
        self.assertEqual(self.db.check(), [])

    def test_a_proof_that_is_whole_beside_damaged_columns_is_still_a_proof(self) -> None:
        proof = VerificationLog(task_id="p", outputs=b"x")
        self.db.store_proof(proof)
        self.sql("UPDATE proofs SET at = at + 1")
        with self.assertRaises(ConflictError):
            self.db.delete_proof("p")
        with self.assertRaises(ConflictError):
            self.db.store_proof(VerificationLog(task_id="p", outputs=b"other"))
        with self.assertRaises(DamagedError):
            self.db.get_proof("p")
        self.assertFalse(self.db.store_proof(dataclasses.replace(proof, timestamp=9)))
        self.assertEqual(self.db.get_proof("p"), proof)

    def test_a_changed_proof_with_a_right_checksum_does_not_match_its_evidence_hash(self) -> None:
        self.db.store_proof(VerificationLog(task_id="p", outputs=b"x"))
        with self.raw() as raw:
            value = (
                raw.execute("SELECT value FROM proofs")
                .fetchone()[0]
                .replace('"outputs":"eA=="', '"outputs":"eQ=="')
            )
            raw.execute("UPDATE proofs SET value = ?, crc = ?", (value, zlib.crc32(value.encode())))
        with self.assertRaises(DamagedError) as caught:
            self.db.get_proof("p")
        self.assertIn("evidence_hash", str(caught.exception))

    def test_a_namespace_that_this_process_does_not_know_is_checked_as_plain_json(self) -> None:
        self.db.namespace("devices", PairedDevice, key="device_id").put(PairedDevice(device_id="d"))
        other = self.open()
        self.assertEqual(other.check(), [])
        self.sql("UPDATE devices SET value = replace(value, 'paired', 'forged')")
        self.assertIn("devices:d", " ".join(self.open().check()))


class ADamagedIndex(Scratch):
    def flip(self, table: str, needle: bytes, offset: int, bit: int) -> None:
        """Change one bit of what an index says, in the closed file."""
        with self.raw() as raw:
            (root,) = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        image = bytearray(Path(self.path).read_bytes())
        image[image.index(needle, (root - 1) * 4096) + offset] ^= bit
        Path(self.path).write_bytes(image)

    def test_never_lets_a_proof_be_pruned_that_may_be_needed(self) -> None:
        with OperatorDb(self.path) as db:
            for number in range(1, 9):
                db.store_proof(
                    VerificationLog(task_id=f"p{number}", outputs=b"x", timestamp=1000, submitted=number == 7)
                )
        self.flip("proofs_status_at", b"true", 6, 2)
        db = self.open()
        with self.assertRaises(DamagedError):
            db.prune(None, None, 30)
        self.assertEqual(sum(db.get_proof(f"p{number}") is not None for number in range(1, 9)), 8)

    def test_never_leads_a_walk_round_in_circles(self) -> None:
        with OperatorDb(self.path) as db:
            for number in range(20):
                db.store_task(TaskRecord(task_id=f"t{number:02}"))
        self.flip("sqlite_autoindex_tasks_1", b"tasks:t19", 6, 0x40)
        db = self.open()
        self.assertTrue(db.check())
        with self.assertRaises(DamagedError):
            list(db.iter_tasks())

    def test_never_makes_a_session_shorter(self) -> None:
        with OperatorDb(self.path) as db:
            db.append_transcript("s", "user", "x")
            db.append_command("s", "go")
        self.flip("session_log_status_at", b"commands:s", 0, 2)
        with self.assertRaises(DamagedError):
            self.open().get_session("s")


class AStatusQuery(Scratch):
    def fill(self, db: OperatorDb) -> None:
        with db.transaction():
            for number in range(100):
                status = list(TaskStatus)[number % 5]
                db.store_task(TaskRecord(task_id=f"{number:03}", status=status, claimed_at=1000 - number))

    def test_finds_what_has_the_status_oldest_first(self) -> None:
        db = self.open()
        self.fill(db)
        found = db.list_tasks_by_status("disputed")
        self.assertEqual([t.task_id for t in found], [f"{n:03}" for n in range(98, 0, -5)])
        self.assertEqual(found, db.list_tasks(TaskStatus.DISPUTED))
        self.assertEqual(
            [t.task_id for t in db.list_tasks("disputed", limit=2, newest_first=True)], ["003", "008"]
        )
        self.assertEqual(db.count_tasks(), dict.fromkeys(TaskStatus, 20))
        self.assertEqual([t.task_id for t in db.list_tasks(limit=3)], ["099", "098", "097"])
        self.assertEqual(
            [t.task_id for t in db.list_tasks(limit=3, newest_first=True)], ["000", "001", "002"]
        )
        self.assertEqual([t.task_id for t in db.list_tasks()], [f"{n:03}" for n in range(99, -1, -1)])
        self.assertEqual([t.task_id for t in db.iter_tasks("claimed")], [f"{n:03}" for n in range(0, 100, 5)])
        for wrong in ("nonsense", 5):
            with self.assertRaises(InvalidRecordError):
                db.list_tasks(wrong)  # type: ignore[arg-type]
        for limit in (-1, True, 1.5, "1"):
            with self.assertRaises(InvalidRecordError):
                db.list_tasks(limit=limit)  # type: ignore[arg-type]
        self.assertEqual(db.list_tasks(limit=0), [])

    def test_is_answered_by_the_index_without_a_sort(self) -> None:
        self.fill(self.open())
        with self.raw() as raw:
            for sql, values in ((operator_db._LIST, ("x", 5)), (operator_db._LIST_NEWEST, ("x", 5)),
                                (operator_db._EXPIRED, ("x", 5, 0, 0)), (operator_db._LIST, (None, 5))):  # fmt: skip
                plan = " ".join(
                    row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + sql.format("tasks"), values)
                )
                self.assertIn("USING INDEX tasks_status_at (status=?", plan)
                self.assertNotIn("TEMP B-TREE", plan)
            plan = " ".join(
                r[3]
                for r in raw.execute(
                    "EXPLAIN QUERY PLAN " + operator_db._WALK.format("tasks"), ("", None, None)
                )
            )
            self.assertIn("(key>? AND key<?)", plan)

    def test_decodes_only_its_matches(self) -> None:
        db = self.open()
        self.fill(db)
        with self.raw() as raw:
            raw.execute("UPDATE tasks SET value = 'not json' WHERE status != 'resolved'")
        self.assertEqual(len(db.list_tasks_by_status("resolved")), 20)


class AWalk(Scratch):
    def test_sees_every_record_that_is_there_throughout_exactly_once(self) -> None:
        db = self.open()
        with db.transaction():
            for number in range(3000):
                db.store_task(TaskRecord(task_id=f"{number:04}", claimed_at=0))
        seen = []
        for number, task in enumerate(db.iter_tasks()):
            seen.append(task.task_id)
            if number % 100 == 0:
                db.delete_task(f"{2999 - number // 100:04}")
                db.store_task(TaskRecord(task_id=f"{number:04}x"))
                db.update_task_status(f"{number:04}", "completed")
        stayed = [f"{number:04}" for number in range(2970)]
        self.assertEqual([each for each in seen if len(each) == 4 and int(each) < 2970], stayed)
        self.assertEqual(len(seen), len(set(seen)))

    def test_holds_no_connection_between_batches_so_the_wal_can_be_cut(self) -> None:
        db = self.open()
        with db.transaction():
            for number in range(1500):
                db.store_task(TaskRecord(task_id=f"{number:04}"))
        walk = db.iter_tasks()
        next(walk)
        with self.raw() as raw:
            self.assertEqual(raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone(), (0, 0, 0))
        db.close()
        with self.assertRaises(ClosedError):
            list(walk)

    def test_takes_memory_for_a_batch_and_not_for_the_whole(self) -> None:
        db = self.open()
        for number in range(40):
            db.store_task(TaskRecord(task_id=f"{number:02}", payload=bytes(2**20)))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(sum(len(task.payload) for task in db.iter_tasks()), 40 * 2**20)
        self.assertLess(tracemalloc.get_traced_memory()[1], 15 * 2**20)


# ---- the operator's rules


class ATask(Scratch):
    def test_keeps_every_status_with_its_time_and_signature(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", claimed_at=10, on_chain_signature="s0"))
        db.update_task_status("t", "in_progress", at=20)
        db.update_task_status("t", "completed", at=30, signature="s1")
        db.update_task_status("t", "disputed", at=40, signature="s2")
        task = db.update_task_status("t", "completed", at=50, signature="s3")
        self.assertEqual(
            [(c.status, c.at, c.signature) for c in task.history],
            [("claimed", 10, "s0"), ("in_progress", 20, None), ("completed", 30, "s1"), ("disputed", 40, "s2"),
             ("completed", 50, "s3")],
        )  # fmt: skip
        self.assertEqual((task.completed_at, task.on_chain_signature), (30, "s3"))
        self.assertEqual(db.get_task("t"), task)

    def test_moves_by_compare_and_set_when_asked(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t"))
        won: list[int] = []

        def attempt(number: int) -> None:
            with suppress(ConflictError):
                db.update_task_status("t", "in_progress", signature=str(number), expected="claimed")
                won.append(number)

        in_threads(*(lambda n=n: attempt(n) for n in range(8)))
        self.assertEqual(len(won), 1)
        with self.assertRaises(NotFoundError) as caught:
            db.update_task_status("missing", "completed")
        self.assertIsInstance(caught.exception, LookupError)
        self.assertIn("tasks:missing", str(caught.exception))

    def test_is_not_moved_twice_by_one_transaction_of_the_chain(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", on_chain_signature="s0"))
        for _ in range(2):
            db.update_task_status("t", "disputed", signature="s1")
            db.update_task_status("t", "resolved", signature="s2")
            db.update_task_status("t", "resolved")
        task = db.get_task("t")
        assert task is not None
        self.assertEqual([c.signature for c in task.history], ["s0", "s1", "s2"])
        self.assertEqual((task.status, task.on_chain_signature), ("resolved", "s2"))

    def test_stored_again_replaces_its_fields_and_only_adds_to_its_history(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", claimed_at=1, on_chain_signature="s0", description="old"))
        db.update_task_status("t", "disputed", at=2, signature="s1")
        fresh = TaskRecord(
            task_id="t", claimed_at=1, status=TaskStatus.RESOLVED, on_chain_signature="s2", description="new"
        )
        db.store_task(fresh)
        stored = db.get_task("t")
        assert stored is not None
        self.assertEqual((stored, stored.description, stored.status), (fresh, "new", "resolved"))
        self.assertEqual([c.signature for c in stored.history], ["s0", "s1", "s2"])
        db.update_task_status("t", "disputed", at=8)
        moved = dataclasses.replace(stored, status=TaskStatus.DISPUTED, history=list(stored.history))
        db.store_task(moved)
        self.assertEqual(
            [(c.status, c.at) for c in moved.history][3:], [("disputed", 8)], "a move that was made once"
        )
        stored = moved
        stored.status = TaskStatus.RESOLVED
        db.store_task(stored)
        self.assertEqual(
            [c.status for c in stored.history], ["claimed", "disputed", "resolved", "disputed", "resolved"]
        )
        for _ in range(3):
            db.store_task(stored)
        self.assertEqual(db.get_task("t"), stored)

    def test_stored_as_completed_over_an_open_one_is_stamped(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", claimed_at=1))
        db.store_task(TaskRecord(task_id="t", claimed_at=9, status=TaskStatus.COMPLETED))
        task = db.get_task("t")
        assert task is not None
        self.assertEqual((task.completed_at, task.history[-1].at), (9, 9))

    def test_is_completed_with_its_proof_or_not_at_all(self) -> None:
        db = self.open()
        proof = VerificationLog(task_id="t", outputs=b"out")
        with self.assertRaises(NotFoundError):
            db.complete_task("t", proof)
        self.assertIsNone(db.get_proof("t"))
        db.store_task(TaskRecord(task_id="t"))
        done = db.complete_task("t", proof, signature="s1")
        self.assertEqual(
            (done.status, done.completed_at is not None, db.get_proof("t")), ("completed", True, proof)
        )
        self.assertEqual(db.complete_task("t", dataclasses.replace(proof, timestamp=5), signature="s1"), done)
        with self.assertRaises(ConflictError):
            db.complete_task("t", VerificationLog(task_id="t", outputs=b"other"))
        with self.assertRaises(ConflictError):
            db.complete_task("t", VerificationLog(task_id="u", outputs=b"out"))
        self.assertEqual((db.get_task("t"), db.get_proof("t")), (done, proof))
        self.assertEqual(db.complete_task("t", proof, signature="s2"), done)
        for status in ("disputed", "resolved"):
            db.update_task_status("t", status)
            with self.assertRaises(ConflictError):
                db.complete_task("t", proof)
        db.store_task(TaskRecord(task_id="v", status=TaskStatus.DISPUTED))
        with self.assertRaises(ConflictError):
            db.complete_task("v", VerificationLog(task_id="v", outputs=b"late"))
        self.assertIsNone(db.get_proof("v"))

    def test_stored_as_completed_is_as_old_as_its_completion(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", claimed_at=int(time.time()) - 40 * DAY))
        task = db.get_task("t")
        assert task is not None
        task.status = TaskStatus.COMPLETED
        db.store_task(task)
        self.assertEqual((db.get_task("t"), db.prune(30).tasks), (task, 0))
        db.store_task(TaskRecord(task_id="t", claimed_at=task.claimed_at, status=TaskStatus.DISPUTED))
        stored = db.get_task("t")
        self.assertEqual(stored and stored.completed_at, task.completed_at)

    def test_is_deleted_without_its_proof(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t"))
        db.complete_task("t", VerificationLog(task_id="t", outputs=b"x"))
        self.assertEqual((db.delete_task("t"), db.delete_task("t"), db.get_task("t")), (True, False, None))
        self.assertIsNotNone(db.get_proof("t"))

    def test_is_changed_by_many_at_once_and_every_change_counts(self) -> None:
        db = self.open()
        db.namespace("counters", PairedDevice, key="device_id").put(PairedDevice(device_id="n"))
        counters = db.namespace("counters", PairedDevice, key="device_id")

        def count() -> None:
            for _ in range(25):
                counters.update("n", lambda d: dataclasses.replace(d, last_seen=d.last_seen + 1))

        in_threads(*[count] * 8)
        self.assertEqual(counters.get("n"), PairedDevice(device_id="n", last_seen=200))

    def test_an_update_that_fails_or_returns_nonsense_changes_nothing(self) -> None:
        db = self.open()
        things = db.namespace("things", Inner, key="name")
        things.put(Inner("a", b"1"))

        def fail(record: Inner) -> Inner:
            record.raw = b"2"
            raise KeyError("mine")

        changes: list[tuple[Any, Any]] = [(fail, KeyError), (lambda r: None, InvalidRecordError),
                                          (lambda r: Inner("b"), InvalidRecordError)]  # fmt: skip
        for change, error in changes:
            with self.assertRaises(error):
                things.update("a", change)
        self.assertEqual(list(things.values()), [Inner("a", b"1")])


class ASession(Scratch):
    def test_is_created_by_its_first_entry_or_link(self) -> None:
        db = self.open()
        db.append_transcript("a", "user", "hello", timestamp=5)
        db.append_command("b", "ClaimTask", timestamp=6)
        db.link_task("c", "t")
        a, b, c = (db.get_session(each) for each in "abc")
        assert a and b and c
        self.assertEqual((a.created_at, a.last_active, a.transcript[0].content), (5, 5, "hello"))
        self.assertEqual((b.command_history, b.last_active), (["ClaimTask"], 6))
        self.assertEqual(c.active_task_ids, ["t"])
        self.assertEqual([s.session_id for s in db.list_sessions(limit=2)], ["a", "b"])
        self.assertIsNone(db.get_session("d"))

    def test_gives_its_last_entries(self) -> None:
        db = self.open()
        for number in range(20):
            db.append_transcript("s", "user", str(number), timestamp=number)
            db.append_command("s", "c")
        self.assertEqual([e.content for e in db.transcript("s", last=3)], ["17", "18", "19"])
        self.assertEqual([e.content for e in db.transcript("s")], [str(n) for n in range(20)])
        self.assertEqual((db.transcript("s", last=0), db.transcript("none")), ([], []))
        with self.assertRaises(InvalidRecordError):
            db.transcript("s", last=-1)

    def test_links_and_unlinks_tasks_once(self) -> None:
        db = self.open()
        db.link_task("s", "t")
        db.link_task("s", "t")
        db.link_task("s", "u")
        self.assertEqual(
            (db.unlink_task("s", "t"), db.unlink_task("s", "t"), db.unlink_task("x", "t")),
            (True, False, False),
        )
        session = db.get_session("s")
        self.assertEqual(session and session.active_task_ids, ["u"])

    def test_stored_again_extends_its_log_and_never_overwrites_an_entry(self) -> None:
        db = self.open()
        db.append_transcript("s", "user", "one")
        mine = db.get_session("s")
        assert mine is not None
        db.append_transcript("s", "user", "two of another")
        mine.transcript.append(TranscriptEntry(role="user", content="two of mine"))
        with self.assertRaises(ConflictError):
            db.store_session(mine)
        self.assertEqual([e.content for e in db.transcript("s")], ["one", "two of another"])
        mine = db.get_session("s")
        assert mine is not None
        mine.transcript.append(TranscriptEntry(role="user", content="three"))
        mine.command_history.append("go")
        mine.active_task_ids = ["t"]
        db.store_session(mine)
        self.assertEqual(db.get_session("s"), mine)
        with self.assertRaises(ConflictError):
            db.store_session(dataclasses.replace(mine, command_history=[]))
        self.assertTrue(db.delete_session("s"))
        self.assertEqual((db.get_session("s"), db.transcript("s"), db.delete_session("s")), (None, [], False))
        db.store_session(dataclasses.replace(mine, transcript=[], command_history=["again"]))
        session = db.get_session("s")
        self.assertEqual(session and session.command_history, ["again"])

    def test_an_append_writes_the_same_at_entry_10_000_as_at_entry_10(self) -> None:
        db = self.open()
        entries = [TranscriptEntry(role="user", content=str(n), timestamp=n) for n in range(10_000)]
        db.store_session(SessionState(session_id="long", transcript=entries))
        db.store_session(SessionState(session_id="short", transcript=entries[:10]))
        statements: dict[str, int] = {}
        for name in ("short", "long"):
            writer = db._store._connect_writer()
            steps = [0]
            writer.set_progress_handler(lambda steps=steps: steps.__setitem__(0, steps[0] + 1), 1)
            db.append_transcript(name, "user", "next")
            writer.set_progress_handler(None, 1)
            statements[name] = steps[0]
        self.assertLess(statements["long"], statements["short"] * 1.5)


class AProof(Scratch):
    def test_is_written_once(self) -> None:
        db = self.open()
        first = VerificationLog(task_id="t", outputs=b"out", timestamp=5)
        self.assertTrue(db.store_proof(first))
        db.mark_proof_submitted("t", "sig")
        self.assertFalse(db.store_proof(dataclasses.replace(first, timestamp=9)))
        stored = db.get_proof("t")
        self.assertEqual(
            stored and (stored.timestamp, stored.submitted, stored.submission_signature), (5, True, "sig")
        )
        for name, value in {
            "outputs": b"x",
            "inputs": b"x",
            "proof": b"x",
            "proof_hash": "1" * 64,
            "result_data": b"x" * 64,
        }.items():
            with self.assertRaises(ConflictError):
                db.store_proof(dataclasses.replace(first, **{name: value}))
        self.assertEqual(db.get_proof("t"), stored)

    def test_waits_in_a_queue_until_it_is_submitted(self) -> None:
        db = self.open()
        for number in range(5):
            db.store_proof(VerificationLog(task_id=str(number), outputs=b"x", timestamp=100 - number))
        marked = db.mark_proof_submitted("2", "sig")
        self.assertEqual(db.mark_proof_submitted("2", "sig"), marked)
        with self.assertRaises(ConflictError):
            db.mark_proof_submitted("2", "another")
        with self.assertRaises(NotFoundError):
            db.mark_proof_submitted("9", "sig")
        with self.assertRaises(InvalidRecordError):
            db.mark_proof_submitted("3", "")
        self.assertEqual([p.task_id for p in db.list_proofs(submitted=False)], ["4", "3", "1", "0"])
        self.assertEqual([p.task_id for p in db.list_proofs(submitted=False, limit=1)], ["4"])
        self.assertEqual(
            ([p.task_id for p in db.list_proofs(submitted=True)], len(db.list_proofs())), (["2"], 5)
        )

    def test_can_be_neither_deleted_nor_pruned_while_it_may_be_needed(self) -> None:
        db = self.open()
        cases = {
            "unsubmitted": None,
            "claimed": "claimed",
            "disputed": "disputed",
            "done": "completed",
            "gone": None,
        }
        for name, status in cases.items():
            db.store_proof(VerificationLog(task_id=name, outputs=b"x", timestamp=0))
            if status:
                db.store_task(TaskRecord(task_id=name, status=TaskStatus(status)))
            if name != "unsubmitted":
                db.mark_proof_submitted(name, "sig")
        for name in ("unsubmitted", "claimed", "disputed"):
            with self.assertRaises(ConflictError):
                db.delete_proof(name)
        self.assertEqual(db.prune(None, None, 1, dry_run=True).proofs, 2)
        self.assertEqual(db.prune(None, None, 1).proofs, 2)
        self.assertEqual({p.task_id for p in db.list_proofs()}, {"unsubmitted", "claimed", "disputed"})
        db.update_task_status("disputed", "resolved")
        self.assertEqual((db.delete_proof("disputed"), db.delete_proof("disputed")), (True, False))


class Pruning(Scratch):
    def test_takes_completed_tasks_strictly_older_and_idle_sessions(self) -> None:
        db = self.open()
        now = int(time.time())
        with mock.patch("operator_db._now", lambda: now):
            for status in TaskStatus:
                for name, age in (("old", 30 * DAY + 1), ("edge", 30 * DAY), ("new", 0)):
                    db.store_task(TaskRecord(task_id=f"{status}-{name}", status=status, claimed_at=now - age))
            db.store_task(
                TaskRecord(task_id="late", status=TaskStatus.COMPLETED, claimed_at=0, completed_at=now)
            )
            db.append_transcript("old", "user", "x", timestamp=now - 91 * DAY)
            db.append_transcript("new", "user", "x")
            before = db.prune(dry_run=True)
            self.assertEqual((before.tasks, before.sessions, before.proofs, before.dry_run), (1, 1, 0, True))
            self.assertEqual(len(list(db.iter_tasks())), 16)
            report = db.prune()
            self.assertEqual((report.tasks, report.sessions, report.proofs), (1, 1, 0))
            self.assertIsNone(db.get_task("completed-old"))
            self.assertEqual((db.get_session("old"), db.transcript("old")), (None, []))
            self.assertEqual(db.prune(None, None), dataclasses.replace(db.prune(None, None)))
        self.assertEqual(db.check(), [])
        for days in (-1, True, "1", float("nan"), float("inf")):
            with self.assertRaises(InvalidRecordError):
                db.prune(days)  # type: ignore[arg-type]

    def test_gives_the_space_back_to_the_file_system(self) -> None:
        db = self.open()
        with db.transaction():
            for number in range(500):
                db.store_task(
                    TaskRecord(
                        task_id=str(number), payload=bytes(8192), status=TaskStatus.COMPLETED, claimed_at=0
                    )
                )
        size = os.path.getsize(self.path) + os.path.getsize(self.path + "-wal")
        report = db.prune()
        self.assertEqual((report.tasks, report.bytes_before), (500, size))
        self.assertEqual(report.bytes_after, os.path.getsize(self.path) + os.path.getsize(self.path + "-wal"))
        self.assertLess(report.bytes_after, 200_000)

    def test_lets_a_writer_in_between_its_batches(self) -> None:
        db, other = self.open(), self.open()
        with db.transaction():
            for number in range(3000):
                db.store_task(
                    TaskRecord(
                        task_id=str(number), payload=bytes(500), status=TaskStatus.COMPLETED, claimed_at=0
                    )
                )
        done, seen = threading.Event(), []

        def write() -> None:
            while not done.is_set():
                other.append_command("s", "x")
                seen.append(db.count_tasks()[TaskStatus.COMPLETED])

        def prune() -> None:
            try:
                db.prune()
            finally:
                done.set()

        in_threads(write, prune)
        self.assertTrue(any(0 < count < 3000 for count in seen), "no write came in between")

    def test_inside_a_block_is_undone_with_it(self) -> None:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", status=TaskStatus.COMPLETED, claimed_at=0))
        with suppress(KeyError), db.transaction():
            self.assertEqual(db.prune().tasks, 1)
            raise KeyError
        self.assertIsNotNone(db.get_task("t"))


# ---- evidence


class Evidence(Scratch):
    def test_fits_the_programs_interface_and_is_what_the_reference_worker_submits(self) -> None:
        log = VerificationLog(task_id="t", outputs=b"hello")
        digest = hashlib.sha256(b"hello").hexdigest()
        self.assertEqual((log.proof_hash, log.result_data, log.verify()), (digest, digest.encode(), []))
        self.assertEqual(
            log.submit_args(), {"proof_hash": bytes.fromhex(digest), "result_data": digest.encode()}
        )
        arguments = log.dispute_args()
        self.assertEqual(
            (len(log.submit_args()["proof_hash"]), len(log.submit_args()["result_data"])), (32, 64)
        )
        self.assertEqual((type(arguments["evidence_hash"]), len(arguments["evidence_hash"])), (bytes, 32))
        self.assertEqual(arguments["evidence"], f"agenc://evidence/sha256/{log.evidence_hash}")
        self.assertLessEqual(len(arguments["evidence"]), 256)
        zk = VerificationLog(task_id="t", outputs=b"hello", proof_hash="ab" * 32, result_data=b"z" * 64)
        self.assertEqual(len(zk.verify()), 2)

    def test_what_the_chain_rejects_is_refused_here_first(self) -> None:
        hashes: list[Any] = [
            "0" * 64,
            "AB" * 32,
            "ab" * 31,
            "ab" * 33,
            "",
            "zz" * 32,
            "0x" + "ab" * 31,
            b"a" * 64,
            5,
        ]
        results: list[Any] = [bytes(64), b"", b"x" * 63, b"x" * 65, "x" * 64, 5]
        for name, values in (("proof_hash", hashes), ("result_data", results)):
            for value in values:
                with self.subTest(field=name, value=value), self.assertRaises(InvalidRecordError) as caught:
                    VerificationLog(task_id="t", outputs=b"", **{name: value})
                self.assertIn(name, str(caught.exception))
        with self.assertRaises(TypeError):
            VerificationLog(task_id="t", outputs=b"", evidence_hash="1" * 64)  # type: ignore[call-arg]

    def test_has_a_hash_that_is_the_same_everywhere(self) -> None:
        vectors = [
            (
                VerificationLog(task_id="t1", outputs=b"hello"),
                "33b3287ebcf5c40d42c31f90c9b10edac79a0dd65592e7c16631e62a67566446",
            ),
            (
                VerificationLog(task_id="é\U0001f600:%", outputs=b"", inputs=b"\xff", proof=b"p"),
                "a99fbcda7bc14701ebcb02a00f2f7f7263cffc59f062a5abe6ba2ad43c595679",
            ),
            (
                VerificationLog(
                    task_id=DEVNET_TASK,
                    outputs=bytes(range(256)),
                    proof_hash="ab" * 32,
                    result_data=b"r" * 64,
                ),
                "04311a00278693c95af6ebae1f118a21ff4539c30b5594f5c9ac395462a8a48b",
            ),
        ]
        for log, vector in vectors:
            self.assertEqual(log.evidence_hash, vector)
            other = dataclasses.replace(log, timestamp=0, submitted=True, submission_signature="sig")
            self.assertEqual(other.evidence_hash, vector)

    def bundle(self) -> tuple[dict[str, Any], str]:
        db = self.open()
        db.store_task(TaskRecord(task_id="t", description="é"))
        proof = VerificationLog(task_id="t", inputs=b"in", outputs=b"out", proof=b"p")
        db.complete_task("t", proof)
        return json.loads(json.dumps(db.dispute_bundle("t"))), proof.evidence_hash

    def test_a_bundle_holds_on_a_machine_without_a_database(self) -> None:
        bundle, evidence_hash = self.bundle()
        self.assertEqual(verify_dispute_bundle(bundle, evidence_hash=evidence_hash), [])
        self.assertEqual(verify_dispute_bundle(bundle), [])
        db = self.open()
        db.delete_task("t")
        pruned = db.dispute_bundle("t")
        self.assertEqual(
            (pruned["task"], verify_dispute_bundle(pruned, evidence_hash=evidence_hash)), (None, [])
        )
        with self.assertRaises(NotFoundError):
            db.dispute_bundle("missing")

    def test_every_change_to_the_evidence_is_found(self) -> None:
        bundle, evidence_hash = self.bundle()
        for bit in range(len(b"out") * 8):
            outputs = bytearray(b"out")
            outputs[bit // 8] ^= 1 << bit % 8
            forged = VerificationLog(task_id="t", inputs=b"in", outputs=bytes(outputs), proof=b"p")
            self.assertNotEqual(
                verify_dispute_bundle(operator_db._bundle(None, forged), evidence_hash=evidence_hash), []
            )
        for name, value in {
            "task_id": "u", "inputs": "AAAA", "outputs": "AAAA", "proof": "AAAA", "proof_hash": "1" * 64,
            "result_data": "MTEx" * 21 + "MQ==", "evidence_hash": "1" * 64, "extra": 1,
        }.items():  # fmt: skip
            changed = json.loads(json.dumps(bundle))
            changed["proof"][name] = value
            self.assertNotEqual(verify_dispute_bundle(changed, evidence_hash=evidence_hash), [], name)
        for name in bundle:
            missing = {key: value for key, value in bundle.items() if key != name}
            if name != "task":
                self.assertNotEqual(verify_dispute_bundle(missing, evidence_hash=evidence_hash), [], name)
        self.assertIn("chain", " ".join(verify_dispute_bundle(bundle, evidence_hash="1" * 64)))

    def test_a_malformed_bundle_is_answered_and_not_crashed_on(self) -> None:
        bundle, _ = self.bundle()
        deep: Any = {}
        for _ in range(5000):
            deep = {"task": deep}
        wrong: list[Any] = [
            None,
            5,
            "text",
            b"",
            [],
            {},
            {"proof": None},
            {"proof": []},
            {"proof": {}},
            deep,
            {1: 2},
        ]
        for value in [None, 5, [], {}, "x", deep, [deep], 1e400, "\ud800"]:
            for name in bundle:
                wrong += [{**bundle, name: value}] if name != "task" or value is not None else []
            wrong += [
                {**bundle, "proof": {**bundle["proof"], name: value}}
                for name in bundle["proof"]
                if value != bundle["proof"][name] and (name, value) != ("timestamp", 5)
            ]
            wrong += [
                {**bundle, "task": {**bundle["task"], "status": value}},
                {**bundle, value if isinstance(value, str) else 7: 1},
            ]
        for each in wrong:
            found = verify_dispute_bundle(each)
            self.assertTrue(found and all(isinstance(line, str) and len(line) < 500 for line in found))


# ---- transactions, opening, closing


class ATransaction(Scratch):
    def test_commits_whole_or_not_at_all_and_is_seen_by_others_when_it_is_done(self) -> None:
        db = self.open()
        with db.transaction():
            db.store_task(TaskRecord(task_id="a"))
            self.assertIsNotNone(db.get_task("a"))
            self.assertEqual(len(list(db.iter_tasks())), 1)
            in_threads(lambda: self.assertIsNone(db.get_task("a")))
        in_threads(lambda: self.assertIsNotNone(db.get_task("a")))
        with self.assertRaises(KeyError), db.transaction():
            db.delete_task("a")
            db.append_transcript("s", "user", "x")
            raise KeyError
        self.assertEqual((len(list(db.iter_tasks())), db.get_session("s")), (1, None))

    def test_nested_is_a_savepoint(self) -> None:
        db = self.open()
        with db.transaction():
            db.store_task(TaskRecord(task_id="outer"))
            for depth in range(3):
                with suppress(KeyError), db.transaction():
                    db.store_task(TaskRecord(task_id=f"inner{depth}"))
                    with db.transaction():
                        db.store_task(TaskRecord(task_id=f"innermost{depth}"))
                    if depth != 1:
                        raise KeyError
        self.assertEqual([t.task_id for t in db.iter_tasks()], ["inner1", "innermost1", "outer"])

    def test_a_call_that_fails_inside_a_block_leaves_nothing_of_itself(self) -> None:
        db = self.open()
        with db.transaction():
            db.store_task(TaskRecord(task_id="t", status=TaskStatus.CLAIMED))
            db.store_proof(VerificationLog(task_id="t", outputs=b"x"))
            with self.assertRaises(ConflictError):
                db.complete_task("t", VerificationLog(task_id="t", outputs=b"y"))
            with self.assertRaises(ConflictError):
                db.store_session(self.stale_session(db))
        self.assertEqual(db.count_tasks()[TaskStatus.CLAIMED], 1)
        self.assertEqual([e.content for e in db.transcript("s")], ["kept"])

    def stale_session(self, db: OperatorDb) -> SessionState:
        db.append_transcript("s", "user", "kept")
        return SessionState(session_id="s", transcript=[TranscriptEntry(role="user", content="other")])

    def test_cannot_be_left_open_by_close(self) -> None:
        db = self.open()
        with db.transaction():
            with self.assertRaises(ConflictError):
                db.close()
            db.store_task(TaskRecord(task_id="t"))
        self.assertIsNotNone(db.get_task("t"))

    def test_excludes_writers_of_other_handles_until_their_timeout(self) -> None:
        db, other = self.open(), self.open(timeout=0.2)
        with db.transaction():
            started = time.monotonic()
            with self.assertRaises(BusyError) as caught:
                other.store_task(TaskRecord(task_id="t"))
            self.assertTrue(0.2 <= time.monotonic() - started < 5)
            self.assertIsInstance(caught.exception, TimeoutError)
        other.store_task(TaskRecord(task_id="t"))

    def test_writers_of_one_handle_wait_for_each_other_until_their_timeout(self) -> None:
        db = self.open(timeout=0.2)

        def write() -> None:
            with self.assertRaises(BusyError):
                db.store_task(TaskRecord(task_id="t"))

        with db.transaction():
            in_threads(write)
        in_threads(lambda: db.store_task(TaskRecord(task_id="t")))

    def test_begun_and_read_first_never_fails_for_being_late(self) -> None:
        db, other = self.open(), self.open()

        def move(handle: OperatorDb) -> None:
            for _ in range(50):
                with handle.transaction():
                    task = handle.get_task("n")
                    handle.store_task(
                        TaskRecord(
                            task_id="n", reward_lamports=(task.reward_lamports or 0) + 1 if task else 1
                        )
                    )

        in_threads(lambda: move(db), lambda: move(other))
        task = db.get_task("n")
        self.assertEqual(task and task.reward_lamports, 100)


class Opening(Scratch):
    def test_takes_the_argument_then_the_environment_then_the_home_directory(self) -> None:
        home = str(self.directory / ".agenc" / "operator.db")
        with OperatorDb() as db:
            self.assertEqual(db.path, home)
        if os.name == "posix":
            self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(home)).st_mode), 0o700)
        with mock.patch.dict(os.environ, AGENC_DB_PATH="~/env.db"):
            with OperatorDb.open() as db:
                self.assertEqual(db.path, str(self.directory / "env.db"))
            with OperatorDb(Path("~/deep/er/arg.db"), timeout=1) as db:
                self.assertEqual(db.path, str(self.directory / "deep" / "er" / "arg.db"))
        wrong: Any
        for wrong in ("", "a\0b", "\ud800", 5, 3.5, [], True):
            with self.assertRaises(InvalidRecordError):
                OperatorDb(wrong)
        for timeout in (-1, True, float("nan"), float("inf"), "1"):
            with self.assertRaises(InvalidRecordError):
                OperatorDb(self.path, timeout=timeout)  # type: ignore[arg-type]

    def test_paths_with_the_characters_of_a_uri_are_paths(self) -> None:
        for name in ("a?mode=memory.db", "b#c.db", "d%41.db", "é \U0001f600.db", "e&f=g.db"):
            self.open(str(self.directory / name)).store_task(TaskRecord(task_id="t"))
            self.assertTrue((self.directory / name).exists())

    def test_a_symbolic_link_opens_the_file_that_it_leads_to(self) -> None:
        with OperatorDb(self.path) as db:
            db.store_task(TaskRecord(task_id="t"))
        link = self.directory / "link.db"
        link.symlink_to(self.path)
        self.assertIsNotNone(self.open(str(link)).get_task("t"))

    def test_memory_is_a_private_file_that_is_gone_after_close(self) -> None:
        first, second = OperatorDb(":memory:"), OperatorDb(":memory:")
        first.store_task(TaskRecord(task_id="t"))
        in_threads(lambda: self.assertIsNotNone(first.get_task("t")))
        self.assertIsNone(second.get_task("t"))
        directories = [os.path.dirname(db.path) for db in (first, second)]
        first.close()
        del second
        self.assertEqual([os.path.exists(each) for each in directories], [False, False])

    def test_many_threads_and_processes_create_one_file_and_all_succeed(self) -> None:
        program = "import sys, operator_db as o; sys.stdin.read(); o.OperatorDb(sys.argv[1]).append_command('s', 'x')"
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program, self.path], stdin=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for _ in range(4)
        ]
        for child in children:
            assert child.stdin
            child.stdin.close()
        handles: list[OperatorDb] = []
        in_threads(*[lambda: handles.append(self.open())] * 12)
        in_threads(*(lambda h=handle: h.append_command("s", "x") for handle in handles))
        for child in children:
            assert child.stderr
            self.assertEqual((child.stderr.read(), child.wait(30)), (b"", 0))
            child.stderr.close()
        session = handles[0].get_session("s")
        self.assertEqual(session and len(session.command_history), 16)
        for handle in handles:
            handle.close()
        self.assertEqual(os.listdir(self.directory), ["operator.db"])

    def test_a_write_ahead_log_without_its_database_is_kept_and_named(self) -> None:
        Path(self.path + "-wal").write_bytes(b"the only copy of the last commits")
        with self.assertRaises(StorageError) as caught:
            OperatorDb(self.path)
        self.assertIn(self.path + "-wal", str(caught.exception))
        self.assertEqual(os.listdir(self.directory), ["operator.db-wal"])
        self.assertEqual(Path(self.path + "-wal").read_bytes(), b"the only copy of the last commits")

    def test_an_empty_file_is_adopted(self) -> None:
        Path(self.path).touch(0o600)
        self.open().store_task(TaskRecord(task_id="t"))
        with self.raw() as raw:
            header = [
                raw.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version", "auto_vacuum")
            ]
        self.assertEqual(header, [0x41474E43, 1, 2])

    def refused(self, error: type[OperatorDbError], word: str, **options: Any) -> None:
        names = {each: each.read_bytes() for each in self.directory.iterdir() if each.is_file()}
        with self.assertRaises(error) as caught:
            OperatorDb(self.path, **options).close()
        self.assertIn(word, str(caught.exception))
        self.assertIn(self.path, str(caught.exception))
        self.assertIsNone(caught.exception.__cause__)
        for each, content in names.items():
            if not each.name.endswith("-shm"):
                self.assertEqual(each.read_bytes(), content, f"{each} was changed")

    def test_what_is_not_ours_is_refused_and_not_a_byte_of_it_changed(self) -> None:
        for content, word in (
            (b"redb\x1a\n\xa9\r\n" + bytes(5000), "redb"), (b"SQLite format 2\0" + bytes(5000), "not an SQLite"),
            (b"x" * 511, "511 bytes"), (b"\0", "1 bytes"), (b"plain text " * 500, "not an SQLite"),
        ):  # fmt: skip
            Path(self.path).write_bytes(content)
            self.refused(ForeignFileError, word)
            self.refused(ForeignFileError, word, read_only=True)
        os.unlink(self.path)
        os.mkdir(self.path)
        self.refused(ForeignFileError, "not a regular file")

    def test_another_applications_database_keeps_even_its_wal(self) -> None:
        for statement in ("PRAGMA application_id=7", "PRAGMA user_version=3", "CREATE TABLE notes(x)"):
            with self.raw() as raw:
                raw.execute("PRAGMA journal_mode=WAL")
                raw.execute(statement)
                self.refused(ForeignFileError, "another application")
                self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
            self.refused(ForeignFileError, "another application")
            os.unlink(self.path)

    def test_a_newer_schema_is_refused(self) -> None:
        self.open().close()
        with self.raw() as raw:
            raw.execute("PRAGMA user_version=2")
        self.refused(NewerSchemaError, "schema version 2")

    def test_a_shape_that_is_not_ours_is_refused(self) -> None:
        plants = [
            "CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END",
            "CREATE VIEW planted AS SELECT value FROM CONFIG",
            "CREATE UNIQUE INDEX planted ON tasks(at)",
            "ALTER TABLE tasks ADD COLUMN extra",
            "DROP TABLE proofs",
            "DROP INDEX tasks_status_at",
            "DROP TABLE proofs; CREATE VIEW proofs AS SELECT 1",
            "DROP TABLE config; CREATE TABLE config(key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL)",
            "CREATE TABLE elsewhere(x); CREATE TRIGGER p AFTER INSERT ON elsewhere BEGIN DELETE FROM Proofs; END",
        ]
        for plant in plants:
            with self.subTest(plant=plant):
                self.open().close()
                with self.raw() as raw:
                    raw.executescript(plant)
                self.refused(ForeignFileError, "nothing was changed")
                os.unlink(self.path)

    def test_tables_that_are_not_ours_are_left_alone(self) -> None:
        with OperatorDb(self.path) as db:
            db.store_task(TaskRecord(task_id="t"))
        with self.raw() as raw:
            raw.executescript(
                "CREATE TABLE _litestream_seq(id INTEGER PRIMARY KEY, seq INTEGER); INSERT INTO _litestream_seq VALUES(1, 5)"
            )
        db = self.open()
        self.assertEqual((db.check(), db.prune(0, 0, 0).tasks), ([], 0))
        with self.assertRaises(ForeignFileError):
            db.namespace("elsewhere", Inner, key="name") if self.plant("CREATE TABLE elsewhere(x)") else None
        with self.raw() as raw:
            self.assertEqual(raw.execute("SELECT seq FROM _litestream_seq").fetchone(), (5,))

    def plant(self, sql: str) -> bool:
        with self.raw() as raw:
            raw.execute(sql)
        return True

    def test_a_file_cut_short_is_refused(self) -> None:
        with OperatorDb(self.path) as db:
            db.store_task(TaskRecord(task_id="t", payload=bytes(100_000)))
        whole = Path(self.path).read_bytes()
        for length in (len(whole) - 1, len(whole) - 4096, 4096, 512):
            Path(self.path).write_bytes(whole[:length])
            self.refused(DamagedError, "")

    def test_the_file_is_private_and_one_that_others_can_read_is_tightened(self) -> None:
        for umask in (0, 0o077, 0o777):
            before = os.umask(umask)
            try:
                db = OperatorDb(self.path)
                db.store_task(TaskRecord(task_id="t"))
                modes = {stat.S_IMODE(os.stat(self.path + suffix).st_mode) for suffix in ("", "-wal", "-shm")}
                db.close()
            finally:
                os.umask(before)
            self.assertEqual(modes, {0o600}, oct(umask))
            os.chmod(self.path, 0o644)
            with self.assertLogs("operator_db", "WARNING") as logs:
                OperatorDb(self.path).close()
            self.assertIn(self.path, logs.output[0])
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
            os.unlink(self.path)


class ReadOnly(Scratch):
    def test_reads_and_refuses_to_write_and_changes_no_byte(self) -> None:
        with OperatorDb(self.path) as db:
            db.store_task(TaskRecord(task_id="t"))
        before = Path(self.path).read_bytes()
        with OperatorDb(self.path, read_only=True) as db:
            self.assertIsNotNone(db.get_task("t"))
            self.assertEqual((db.check(), db.prune(dry_run=True).tasks), ([], 0))
            for write in (lambda: db.store_task(TaskRecord(task_id="u")), lambda: db.delete_task("t"), db.prune,
                          lambda: db.namespace("devices", PairedDevice, key="device_id"),
                          lambda: db.transaction().__enter__()):  # fmt: skip
                with self.assertRaises(StorageError):
                    write()
        self.assertEqual(
            (os.listdir(self.directory), Path(self.path).read_bytes()), (["operator.db"], before)
        )

    def test_cannot_prune_and_does_not_touch_the_file_in_trying(self) -> None:
        writer = self.open()
        for number in range(20):
            writer.store_task(TaskRecord(task_id=str(number), status=TaskStatus.COMPLETED, claimed_at=0))
        reader = self.open(read_only=True)
        before = [Path(self.path + suffix).read_bytes() for suffix in ("", "-wal")]
        with self.assertRaises(StorageError):
            reader.prune()
        self.assertEqual([Path(self.path + suffix).read_bytes() for suffix in ("", "-wal")], before)

    def test_never_creates_a_database(self) -> None:
        with self.assertRaises(StorageError) as caught:
            OperatorDb(self.path, read_only=True)
        self.assertIn("no database", str(caught.exception))
        self.assertEqual(os.listdir(self.directory), [])
        Path(self.path).touch()
        with self.assertRaises(StorageError):
            OperatorDb(self.path, read_only=True)
        self.assertEqual(os.path.getsize(self.path), 0)

    def test_sees_what_a_running_operator_commits(self) -> None:
        writer, reader = self.open(), self.open(read_only=True)
        for number in range(3):
            writer.store_task(TaskRecord(task_id=str(number)))
            self.assertEqual(len(list(reader.iter_tasks())), number + 1)
        reader.close()
        writer.store_task(TaskRecord(task_id="after"))
        self.assertEqual(writer.check(), [])

    def test_of_a_file_that_seemed_immutable_sees_what_is_written_to_it(self) -> None:
        with OperatorDb(self.path) as db:
            for number in range(50):
                db.store_task(TaskRecord(task_id=f"old{number}", payload=bytes(5000)))
        with mock.patch("operator_db._read_mode", lambda path: "immutable"):
            reader = self.open(read_only=True)
            self.assertEqual(len(reader.list_tasks()), 50)
            with OperatorDb(self.path) as db:
                for number in range(50):
                    db.delete_task(f"old{number}")
                    db.store_task(TaskRecord(task_id=f"new{number}", payload=bytes(9000)))
            self.assertEqual({t.task_id[:3] for t in reader.list_tasks()}, {"new"})
            self.assertEqual(reader.check(), [])


class Migration(Scratch):
    def setUp(self) -> None:
        super().setUp()
        with OperatorDb(self.path) as db:
            db.store_task(TaskRecord(task_id="t"))
        self.snapshot = self.path + ".v1.bak"

    def steps(self, *more: Any) -> Any:
        return mock.patch("operator_db._MIGRATIONS", operator_db._MIGRATIONS + more)

    @staticmethod
    def add_table(connection: Any) -> None:
        connection.query("CREATE TABLE added(x)")
        connection.query("INSERT INTO added VALUES(1)")

    def version(self, path: str) -> int:
        with self.raw(path) as raw:
            return int(raw.execute("PRAGMA user_version").fetchone()[0])

    def test_runs_the_missing_steps_after_a_private_snapshot(self) -> None:
        with self.steps(self.add_table), OperatorDb(self.path) as db:
            self.assertIsNotNone(db.get_task("t"))
        self.assertEqual((self.version(self.path), self.version(self.snapshot)), (2, 1))
        self.assertEqual(stat.S_IMODE(os.stat(self.snapshot).st_mode), 0o600)
        with self.raw() as raw:
            self.assertEqual(raw.execute("SELECT * FROM added").fetchall(), [(1,)])
        with self.raw(self.snapshot) as raw:
            self.assertEqual(raw.execute("SELECT key FROM tasks").fetchall(), [("tasks:t",)])
        os.unlink(self.snapshot)
        with self.steps(self.add_table):
            OperatorDb(self.path).close()
        self.assertFalse(os.path.exists(self.snapshot), "there was nothing to migrate")
        with self.assertRaises(NewerSchemaError):
            OperatorDb(self.path)

    def test_a_step_that_fails_leaves_the_old_file_as_it_was(self) -> None:
        def fail(connection: Any) -> None:
            self.add_table(connection)
            connection.query("DELETE FROM tasks")
            raise KeyError("half-way")

        with self.steps(fail), self.assertRaises(KeyError):
            OperatorDb(self.path)
        self.assertEqual(self.version(self.path), 1)
        self.assertEqual(len(list(self.open().iter_tasks())), 1)

    def test_of_two_processes_one_migrates_and_both_go_on(self) -> None:
        program = (
            "import sys, time, operator_db as o\n"
            "def step(c): time.sleep(0.1); c.query('CREATE TABLE added(x)'); c.query('INSERT INTO added VALUES(1)')\n"
            "o._MIGRATIONS += (step,)\n"
            "print(o.OperatorDb(sys.argv[1]).get_task('t').task_id)"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program, self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for _ in range(2)
        ]
        self.assertEqual([child.communicate(timeout=30) for child in children], [(b"t\n", b"")] * 2)
        with self.raw() as raw:
            self.assertEqual(raw.execute("SELECT count(*) FROM added").fetchone(), (1,))

    def test_stops_a_module_that_had_the_file_open_before_from_writing(self) -> None:
        db = self.open()
        program = (
            "import sys, operator_db as o\n"
            "o._MIGRATIONS += (lambda c: None,)\n"
            "o.OperatorDb(sys.argv[1]).close()"
        )
        subprocess.run([sys.executable, "-c", program, self.path], check=True, timeout=30)
        with self.assertRaises(NewerSchemaError):
            db.store_task(TaskRecord(task_id="t", description="half understood"))

    def test_lets_no_planted_trigger_through(self) -> None:
        with self.raw() as raw:
            raw.execute("CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END")
        with self.steps(self.add_table), self.assertRaises(ForeignFileError):
            OperatorDb(self.path)
        self.assertEqual(self.version(self.path), 1)

    def test_is_not_for_a_read_only_open(self) -> None:
        before = Path(self.path).read_bytes()
        with self.steps(self.add_table), self.assertRaises(StorageError):
            OperatorDb(self.path, read_only=True)
        self.assertEqual(Path(self.path).read_bytes(), before)


class Closing(Scratch):
    def test_is_done_once_and_later_calls_say_so(self) -> None:
        db = self.open()
        db.close()
        db.close()
        for call in (lambda: db.get_task("t"), lambda: db.store_task(TaskRecord(task_id="t")), lambda: list(db.iter_tasks()),
                     db.check, db.prune, lambda: db.transaction().__enter__(), db.count_tasks):  # fmt: skip
            with self.assertRaises(ClosedError) as caught:
                call()
            self.assertIsInstance(caught.exception, RuntimeError)

    def test_waits_for_work_in_flight_and_gives_up_at_its_timeout(self) -> None:
        db = self.open(timeout=0.2)
        inside, leave = threading.Event(), threading.Event()

        def work() -> None:
            with db.transaction():
                db.store_task(TaskRecord(task_id="t"))
                inside.set()
                leave.wait(10)

        worker = threading.Thread(target=work)
        worker.start()
        inside.wait(10)
        with self.assertRaises(BusyError):
            db.close()
        leave.set()
        worker.join()
        self.assertIsNotNone(db.get_task("t"))
        db.close()

    def test_refuses_the_writers_that_wait_and_is_not_held_up_by_them(self) -> None:
        db = self.open(timeout=10)
        inside, leave, refused = threading.Event(), threading.Event(), []

        def hold() -> None:
            with db.transaction():
                inside.set()
                leave.wait(10)

        def wait() -> None:
            try:
                db.store_task(TaskRecord(task_id="t"))
            except ClosedError as error:
                refused.append(error)

        threads = [threading.Thread(target=hold), threading.Thread(target=wait)]
        threads[0].start()
        inside.wait(10)
        threads[1].start()
        while len(db._store._queue) < 2:
            time.sleep(0.001)
        started = time.monotonic()
        threading.Timer(0.1, leave.set).start()
        db.close()
        for thread in threads:
            thread.join()
        self.assertLess(time.monotonic() - started, 5)
        self.assertEqual(len(refused), 1)

    def test_leaves_the_database_alone_in_its_directory(self) -> None:
        with OperatorDb(self.path) as db:
            in_threads(*[lambda: db.store_task(TaskRecord(task_id="t"))] * 3)
        self.assertEqual(os.listdir(self.directory), ["operator.db"])


class AnInterrupt(Scratch):
    """KeyboardInterrupt may land between any two instructions of this module."""

    @contextmanager
    def landing_in(self, function: str) -> Any:
        """Raise KeyboardInterrupt at the first instruction of the next call of a function, as a signal would."""
        before = sys.gettrace()

        def trace(frame: Any, event: str, argument: object) -> Any:
            if frame.f_code.co_name == function and frame.f_code.co_filename == operator_db.__file__:
                sys.settrace(before)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def test_at_the_end_of_a_block_undoes_it_at_once_even_while_somebody_keeps_the_exception(self) -> None:
        db, other = self.open(), self.open(timeout=0.5)
        kept: list[BaseException] = []
        for nested in (False, True):
            try:
                with self.landing_in("_leave_block"), db.transaction():
                    db.append_transcript("s", "user", "undone") if nested else None
            except KeyboardInterrupt as error:
                kept.append(error)
                db.store_proof(VerificationLog(task_id=f"p{nested}", outputs=b"evidence"))
                self.assertIsNotNone(other.get_proof(f"p{nested}"), "an acknowledged write is not committed")
            other.store_task(TaskRecord(task_id="t"))
        self.assertEqual((len(kept), db.transcript("s")), (2, []))

    def test_of_a_block_that_is_kept_in_a_variable_undoes_it_too(self) -> None:
        db, other = self.open(), self.open(timeout=0.5)
        block = db.transaction()
        kept: list[BaseException] = []
        try:
            with self.landing_in("_leave_block"), block:
                put(db, "undone")
        except KeyboardInterrupt as error:
            kept.append(error)
        put(db, "kept")
        put(other, "of another")
        self.assertEqual((len(kept), ids(other)), (1, ["kept", "of another"]))
        with self.assertRaises(ConflictError), block:
            pass

    def test_in_the_midst_of_a_walk_or_a_prune_leaves_no_old_snapshot_behind(self) -> None:
        db, other, kept = self.open(), self.open(), []
        for number in range(3):
            put(db, str(number), status=TaskStatus.COMPLETED, claimed_at=0)
        for work in (lambda: list(db.iter_tasks()), db.prune):
            with mock.patch("operator_db._within", lambda _: mock.Mock(side_effect=KeyboardInterrupt)):
                try:
                    work()
                except KeyboardInterrupt as error:
                    kept.append(error)
            name = f"written later {len(kept)}"
            put(other, name)
            self.assertIsNotNone(db.get_task(name))
            put(db, name, description="and again")
        self.assertEqual(len(kept), 2)

    def test_wherever_it_lands_loses_nothing_and_leaves_no_lock_held(self) -> None:
        for function in (
            "_begin",
            "_wait_for_turn",
            "_check_file",
            "_leave",
            "_usable",
            "_savepoint",
            "change",
            "_connect_writer",
        ):
            with self.subTest(function=function):
                db, other = self.open(), self.open(timeout=0.5)
                kept = None
                try:
                    with self.landing_in(function), db.transaction():
                        db.store_task(TaskRecord(task_id="a"))
                        with db.transaction():
                            db.store_task(TaskRecord(task_id="b"))
                except KeyboardInterrupt as error:
                    kept = error
                self.assertIsNotNone(kept)
                other.store_task(TaskRecord(task_id="other"))
                db.store_task(TaskRecord(task_id="mine"))
                self.assertIsNotNone(other.get_task("mine"))
                self.assertEqual(other.get_task("a") is None, other.get_task("b") is None)
                db.close()

    def test_of_a_single_write_stores_all_of_it_or_nothing_and_leaves_no_lock_held(self) -> None:
        for function in ("_wait_for_turn", "_connect_writer", "_begin", "_usable", "change", "_committed"):
            with self.subTest(function=function):
                db, other = self.open(), self.open(timeout=0.5)
                other.store_task(TaskRecord(task_id=function))
                with self.assertRaises(KeyboardInterrupt), self.landing_in(function):
                    db.delete_task(function)
                self.assertEqual(other.get_task(function) is None, function == "_committed")
                other.store_task(TaskRecord(task_id="other"))
                db.store_task(TaskRecord(task_id="mine"))
                self.assertIsNotNone(other.get_task("mine"))
                db.close()

    def test_of_a_snapshot_leaves_no_reader_in_its_transaction(self) -> None:
        db = self.open()
        db.append_transcript("s", "user", "x")
        for function in ("_leave_block", "_with_log", "_record", "_leave"):
            with self.assertRaises(KeyboardInterrupt), self.landing_in(function):
                db.get_session("s")
            db.append_transcript("s", "user", "y")
            self.assertEqual([c.in_transaction for c in db._store._readers], [False])
            self.assertEqual(db.get_session("s"), self.open().get_session("s"))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_a_fork_leaves_the_parent_able_to_work(self) -> None:
        program = (
            "import os, sys, operator_db as o\n"
            "db = o.OperatorDb(sys.argv[1], timeout=2)\n"
            "def interrupted(*a): raise KeyboardInterrupt\n"
            "real, o._Store.close_before_fork = o._Store.close_before_fork, interrupted\n"
            "child = os.fork()\n"
            "if child == 0: os._exit(0)\n"
            "o._Store.close_before_fork = real\n"
            "db.store_task(o.TaskRecord(task_id='t')); o.OperatorDb(sys.argv[1] + '2'); print('ok')"
        )
        done = self.python(program, self.path)
        self.assertEqual(done.stdout, "ok\n")

    def test_by_a_signal_handler_that_uses_the_database_never_deadlocks(self) -> None:
        program = (
            "import random, signal, sys, time, operator_db as o\n"
            "db = o.OperatorDb(sys.argv[1], timeout=5); seen = []\n"
            "signal.signal(signal.SIGALRM, lambda *a: seen.append(db.get_task('a')))\n"
            "end = time.monotonic() + 0.7\n"
            "while time.monotonic() < end:\n"
            "    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 6e-4))\n"
            "    for _ in range(20): db.get_task('a')\n"
            "signal.setitimer(signal.ITIMER_REAL, 0); db.close(); print(len(seen) > 10)"
        )
        done = self.python(program, self.path)
        self.assertEqual((done.stdout, done.stderr), ("True\n", ""))


class Blocks(Scratch):
    def test_work_in_an_exit_stack_and_suppress_nothing(self) -> None:
        db = self.open()
        with ExitStack() as stack:
            stack.enter_context(db.transaction())
            db.store_task(TaskRecord(task_id="kept"))
        with self.assertRaises(KeyError), ExitStack() as stack:
            stack.enter_context(db.transaction())
            db.store_task(TaskRecord(task_id="undone"))
            raise KeyError
        self.assertEqual([t.task_id for t in db.iter_tasks()], ["kept"])

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_one_database_may_use_another_while_a_third_thread_forks(self) -> None:
        first, second = self.open(timeout=10), self.open(self.path + "2", timeout=10)
        inside, forking = threading.Event(), threading.Event()

        def work() -> None:
            with first.transaction():
                inside.set()
                forking.wait(10)
                deadline = time.monotonic() + 5
                while not operator_db._fork_is_coming.locked() and time.monotonic() < deadline:
                    time.sleep(0.001)
                second.store_task(TaskRecord(task_id="t"))

        worker = threading.Thread(target=work)
        worker.start()
        inside.wait(10)
        started = time.monotonic()
        forking.set()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os._exit(0 if first.get_task("x") is None and second.get_task("t") else 1)
            os._exit(2)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        worker.join()
        self.assertLess(time.monotonic() - started, 5)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_that_wait_for_nobody_survive_a_fork_too(self) -> None:
        db = self.open(timeout=0)
        db.store_task(TaskRecord(task_id="t"))
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                os._exit(0 if db.get_task("t") else 1)
            os._exit(2)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_many_threads_on_two_databases_never_deadlock_with_forks(self) -> None:
        program = (
            "import faulthandler, os, sys, threading, time, operator_db as o\n"
            "dbs = [o.OperatorDb(sys.argv[1] + n, timeout=10) for n in 'ab']; stop = threading.Event()\n"
            "def read(db):\n"
            "    while not stop.is_set(): db.get_task('t')\n"
            "threads = [threading.Thread(target=read, args=(db,)) for db in dbs for _ in range(4)]\n"
            "for t in threads: t.start()\n"
            "end = time.monotonic() + 1\n"
            "while time.monotonic() < end:\n"
            "    pid = os.fork()\n"
            "    if pid == 0: os._exit(0 if dbs[0].get_task('t') is None else 1)\n"
            "    assert os.waitpid(pid, 0)[1] == 0\n"
            "stop.set()\n"
            "for t in threads: t.join()\n"
            "print('ok')"
        )
        done = self.python(program, self.path)
        self.assertEqual((done.stdout, done.stderr), ("ok\n", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_two_threads_that_fork_at_once_wait_for_nobody(self) -> None:
        db = self.open(timeout=10)
        inside, started = threading.Event(), time.monotonic()

        def child_ends() -> None:
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

        def work() -> None:
            with db.transaction():
                inside.set()
                deadline = time.monotonic() + 5
                while not operator_db._fork_is_coming.locked() and time.monotonic() < deadline:
                    time.sleep(0.001)
                child_ends()
                db.store_task(TaskRecord(task_id="t"))

        worker = threading.Thread(target=work)
        worker.start()
        inside.wait(10)
        child_ends()
        worker.join()
        self.assertIsNotNone(db.get_task("t"))
        self.assertLess(time.monotonic() - started, 5)

    def test_checkpoint_only_in_the_ways_that_take_the_write_lock(self) -> None:
        db, query, asked, longest = self.open(), operator_db._Connection.query, [], 0

        def listen(connection: Any, sql: str, *rest: Any, **options: Any) -> Any:
            if "wal_checkpoint" in sql:
                asked.append(sql)
            return query(connection, sql, *rest, **options)

        with mock.patch("operator_db._Connection.query", listen):
            for number in range(60):
                put(db, str(number % 3), payload=bytes(500_000))
                longest = max(longest, os.stat(self.path + "-wal").st_size)
        self.assertEqual(set(asked), {"PRAGMA wal_checkpoint(FULL)"})
        self.assertLess(longest, 16 * 2**20)
        writer = db._store._writer
        assert writer is not None
        self.assertEqual(writer.query("PRAGMA wal_autocheckpoint"), [(0,)])

    def test_beside_steady_readers_keep_the_log_short(self) -> None:
        db, longest = self.open(), 0
        program = (
            "import sys, threading; from operator_db import OperatorDb\n"
            "db = OperatorDb(sys.argv[1], read_only=True); print('reads', flush=True)\n"
            "def read():\n    while reading: db.list_tasks()\n"
            "reading = [1]; threads = [threading.Thread(target=read) for _ in range(3)]\n"
            "for each in threads: each.start()\n"
            "sys.stdin.read(); reading.clear()"
        )
        command = [sys.executable, "-c", program, self.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            self.assertEqual(reader.stdout.readline(), b"reads\n")
            for number in range(25):
                put(db, str(number), payload=bytes(3_000_000))
                db.delete_task(str(number))
                longest = max(longest, os.stat(self.path + "-wal").st_size)
        self.assertLess(longest, 40 * 2**20)

    def test_are_their_threads_own_even_when_its_context_is_shared(self) -> None:
        db = self.open()
        context, block = contextvars.copy_context(), db.transaction()
        context.run(block.__enter__)

        def write() -> None:
            with self.assertRaises(ConflictError):
                context.run(put, db, "b")

        in_threads(write)
        context.run(block.__exit__, None, None, None)
        self.assertEqual(db.list_tasks(), [])

    def test_that_wait_in_a_long_queue_give_up_at_their_timeout(self) -> None:
        db = self.open(timeout=0.1)
        waiting = [operator_db._Lease(60, writes=True) for _ in range(20_000)]
        for lease in waiting:
            lease.alive.acquire()
            lease.thread = 0
        db._store._queue.extend(waiting)
        began = time.monotonic()
        with self.assertRaises(BusyError):
            put(db, "t")
        self.assertLess(time.monotonic() - began, 10)  # a place in the queue is not a time to wait
        db._store._queue.clear()

    def test_let_a_stop_iteration_through_and_are_used_once(self) -> None:
        db = self.open()
        with self.assertRaises(StopIteration), db.transaction(), db.transaction():
            next(iter([]))
        block = db.transaction()
        with block:
            db.store_task(TaskRecord(task_id="t"))
        with self.assertRaises(ConflictError), block:
            pass

    def test_committed_are_not_denied_for_a_checkpoint_that_fails(self) -> None:
        db, query, tried = self.open(), operator_db._Connection.query, []

        def full(connection: Any, sql: str, *rest: Any, **options: Any) -> Any:
            if "checkpoint" in sql:
                tried.append(sql)
                raise StorageError("full")
            return query(connection, sql, *rest, **options)

        with mock.patch("operator_db._WAL_LIMIT", -1), mock.patch("operator_db._Connection.query", full):
            db.store_task(TaskRecord(task_id="t"))
            with db.transaction():
                db.store_task(TaskRecord(task_id="u"))
        self.assertEqual((len(tried), db.count_tasks()[TaskStatus.CLAIMED]), (2, 2))

    def test_of_many_writers_take_turns_without_sleeping_for_each_other(self) -> None:
        db = self.open()
        slept: list[float] = []
        with (
            mock.patch("operator_db._LET_IN", 0.02),
            mock.patch.object(
                operator_db.time,
                "sleep",
                lambda seconds, sleep=time.sleep: (slept.append(seconds), sleep(seconds)),
            ),
        ):
            in_threads(*[lambda: [db.append_command("s", "x") for _ in range(10)]] * 8)
        self.assertLess(slept.count(0.02), 20)


class Errors(unittest.TestCase):
    def test_each_is_an_operator_db_error_and_the_builtin_kind_that_it_is(self) -> None:
        kinds = {
            "InvalidRecordError": ValueError, "NotFoundError": LookupError, "ConflictError": RuntimeError,
            "BusyError": TimeoutError, "ClosedError": RuntimeError, "ForeignFileError": ValueError,
            "NewerSchemaError": ValueError, "DamagedError": ValueError, "StorageError": OSError,
        }  # fmt: skip
        for name, kind in kinds.items():
            self.assertTrue(
                issubclass(getattr(operator_db, name), (kind, OperatorDbError))
                and issubclass(getattr(operator_db, name), kind)
            )
        self.assertEqual({n for n in operator_db.__all__ if n.endswith("Error")}, {*kinds, "OperatorDbError"})


# ---- the whole of it


DEVNET_OPERATOR = f"""
import sys
from operator_db import *
TASK, CLAIM, DISPUTE, RESOLVE = {DEVNET_TASK!r}, {DEVNET_CLAIM!r}, {DEVNET_DISPUTE!r}, {DEVNET_RESOLVE!r}

def step(name):
    print(name, flush=True)
    sys.stdin.readline()

with OperatorDb(sys.argv[1]) as db:
    step("open")
    if db.get_config() is None:
        db.store_config(OperatorConfig(wallet_pubkey={DEVNET_WORKER!r}, network="devnet",
                                       rpc_endpoints=["https://api.devnet.solana.com"]))
    step("config")
    task = db.get_task(TASK)
    if task is None:
        task = TaskRecord(task_id=TASK, creator={DEVNET_CREATOR!r}, claimed_at=1774627200, on_chain_signature=CLAIM)
        db.store_task(task)
    step("claimed")
    if not db.transcript("voice"):
        db.append_transcript("voice", "user", "what is it worth?", timestamp=1774627300)
    db.link_task("voice", TASK)
    step("talked")
    if task.status in ("claimed", "in_progress"):
        task = db.complete_task(TASK, VerificationLog(task_id=TASK, outputs=b"the report", timestamp=1774627900))
    step("completed")
    if task.status == "completed":
        db.mark_proof_submitted(TASK, "submission")
    step("submitted")
    if task.status == "completed":
        task = db.update_task_status(TASK, "disputed", signature=DISPUTE, expected="completed")
    step("disputed")
    db.update_task_status(TASK, "resolved", signature=RESOLVE)
    step("resolved")
print("done")
"""


class AnOperatorsLife(Scratch):
    STEPS = ("open", "config", "claimed", "talked", "completed", "submitted", "disputed", "resolved")

    def live(self, kill_after: str | None) -> None:
        """Run the operator; kill it just after it has said that a step is done, or while it does the next one."""
        with subprocess.Popen(
            [sys.executable, "-c", DEVNET_OPERATOR, self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as operator:
            assert operator.stdin and operator.stdout
            for line in operator.stdout:
                if line.strip() == kill_after:
                    if random.random() < 0.5:
                        with suppress(BrokenPipeError):
                            operator.stdin.write("\n")
                            operator.stdin.flush()
                            time.sleep(random.random() * 0.003)
                    operator.kill()
                    return
                if line.strip() != "done":
                    operator.stdin.write("\n")
                    operator.stdin.flush()
        self.assertEqual((operator.returncode, kill_after), (0, None))

    def test_on_devnet_with_kills_at_every_step_leaves_every_fact_there_once(self) -> None:
        for step in self.STEPS:
            self.live(step)
        self.live(None)
        db = self.open()
        self.assertEqual((db.prune(0, None).tasks, db.prune(0, None).proofs), (0, 0))
        task, proof, session, config = (
            db.get_task(DEVNET_TASK),
            db.get_proof(DEVNET_TASK),
            db.get_session("voice"),
            db.get_config(),
        )
        assert task and config and proof and session
        self.assertEqual([c.status for c in task.history], ["claimed", "completed", "disputed", "resolved"])
        self.assertEqual(
            [c.signature for c in task.history], [DEVNET_CLAIM, None, DEVNET_DISPUTE, DEVNET_RESOLVE]
        )
        self.assertEqual(
            (task.status, task.on_chain_signature, task.creator), ("resolved", DEVNET_RESOLVE, DEVNET_CREATOR)
        )
        self.assertEqual((config.wallet_pubkey, config.network), (DEVNET_WORKER, "devnet"))
        self.assertEqual(
            ([e.content for e in session.transcript], session.active_task_ids),
            (["what is it worth?"], [DEVNET_TASK]),
        )
        self.assertEqual((db.check(), len(list(db.iter_tasks())), len(db.list_proofs())), ([], 1, 1))
        with self.raw() as raw:
            value = raw.execute(
                "SELECT value FROM tasks WHERE key = ?", (f"tasks:{DEVNET_TASK}",)
            ).fetchone()[0]
        self.assertEqual(json.loads(value)["history"][-1]["signature"], DEVNET_RESOLVE)

    def test_keeps_its_proof_when_only_tasks_and_sessions_are_pruned(self) -> None:
        self.live(None)
        db = self.open()
        with mock.patch("operator_db._now", lambda: int(time.time()) + DAY):
            report = db.prune(0, 0)
        self.assertEqual((report.tasks, report.sessions, report.proofs), (0, 1, 0))
        self.assertIsNotNone(db.get_task(DEVNET_TASK))
        self.assertIsNotNone(db.get_proof(DEVNET_TASK))


class TheFile(Scratch):
    def test_run_directly_keeps_its_promises_and_leaves_nothing_behind(self) -> None:
        done = subprocess.run(
            [sys.executable, str(HERE / "operator_db.py")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertNotIn("FAIL", done.stdout)
        held = len(operator_db._PROMISES)
        self.assertIn(f"{held} of {held} promises held", done.stdout)
        self.assertIn("no database yet", done.stdout)
        self.assertEqual(os.listdir(self.directory), [])

    def test_run_directly_inspects_the_operators_own_database(self) -> None:
        with OperatorDb() as db:
            db.store_task(TaskRecord(task_id="t", description="original"))
        path = self.directory / ".agenc" / "operator.db"
        with redirect_stdout(StringIO()) as printed, mock.patch("operator_db._PROMISES", {}):
            self.assertTrue(operator_db.self_check())
        self.assertIn(f"{path}: 1 records, problems found: 0", printed.getvalue())
        path.write_bytes(path.read_bytes().replace(b"original", b"0riginal"))
        done = self.python("import operator_db, sys; sys.exit(operator_db.main([]))")
        self.assertEqual(done.returncode, 1)
        self.assertIn("tasks:t", done.stdout)

    def test_keeps_its_promises_when_it_is_imported_too(self) -> None:
        with redirect_stdout(StringIO()) as printed:
            self.assertTrue(operator_db.self_check(), printed)

    def test_a_promise_that_is_broken_is_reported(self) -> None:
        def broken(path: str) -> None:
            operator_db._expect(1 == 2, "one is two")

        done: list[str] = []
        promises = {"arithmetic": broken, "nothing": lambda path: None}
        with (
            mock.patch("operator_db._PROMISES", promises),
            mock.patch("builtins.print", lambda *a, **k: done.append(a[0])),
        ):
            self.assertFalse(operator_db.self_check())
        self.assertIn("FAIL  arithmetic", done[0])
        self.assertIn("1 of 2 promises held", done[-2])

    def test_imports_nothing_outside_the_standard_library_and_little_of_that(self) -> None:
        program = "import sys, operator_db; print([m for m in ('argparse', 'logging', 'ctypes', 'asyncio') if m in sys.modules])"
        self.assertEqual(self.python(program).stdout, "[]\n")


class TheReadme(Scratch):
    def test_its_examples_run_as_printed(self) -> None:
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        programs = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
        self.assertGreaterEqual(len(programs), 4)
        for number, program in enumerate(programs):
            with self.subTest(program=program):
                directory = self.directory / str(number)
                directory.mkdir()
                done = self.python(program, cwd=directory)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                printed = re.findall(r"# prints: (.*)", program)
                self.assertEqual(done.stdout.splitlines(), printed)

    def test_its_shell_vector_of_the_evidence_hash_is_the_modules(self) -> None:
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        command = re.search(r"^\$ (printf .* \| sha256sum)\n([0-9a-f]{64})  -$", readme, re.MULTILINE)
        assert command
        self.assertEqual(command[2], VerificationLog(task_id="t1", outputs=b"hello").evidence_hash)
        done = subprocess.run(["sh", "-c", command[1]], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.split()[0], command[2])


# ---- faults, for real

NOBODY = 65534


class Forked:
    """A forked child that runs `action(say)`; `say(line)` reaches the parent as one line, the result when it ends.

    Every child is bounded: an alarm ends one that hangs, and `alive` knows those that their test left behind.
    """

    alive: ClassVar[set[int]] = set()

    def __init__(self, action: Callable[[Callable[[object], None]], Any], *, seconds: float = 20.0) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            self.alive.clear()
            sys.settrace(None)  # a measurement of coverage slows the child down and is not collected from it
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(seconds))

            def say(line: object) -> None:
                os.write(writer, f"{line}\n".encode())

            status = 1
            try:
                say("=" + pickle.dumps(action(say)).hex())
                status = 0
            except BaseException:
                say("!" + json.dumps(traceback.format_exc()))
            finally:
                os._exit(status)
        os.close(writer)
        self.alive.add(self.pid)
        self.lines = os.fdopen(reader, "r")

    def reap(self) -> None:
        """Wait for the child's end."""
        self.lines.close()
        os.waitpid(self.pid, 0)
        self.alive.discard(self.pid)

    def line(self) -> str:
        """Return the next line that the child says; fail when it has ended."""
        line = self.lines.readline().strip()
        if not line or line[0] == "!":
            self.reap()
            raise AssertionError(f"the child failed: {json.loads(line[1:]) if line else 'it died or hung'}")
        return line

    def kill(self, after: float = 0.0) -> list[str]:
        """Kill the child, at most so many seconds from now, and return what it had said."""
        select.select([], [], [], after)
        os.kill(self.pid, signal.SIGKILL)
        said = self.lines.read().split("\n")[:-1]  # a line cut short was not said
        self.reap()
        failed = [json.loads(line[1:]) for line in said if line.startswith("!")]
        if failed:
            raise AssertionError(f"the child failed: {failed[0]}")
        return said

    def result(self) -> Any:
        """Wait for the child's end and return what its action returned."""
        while not (line := self.line()).startswith("="):
            pass
        self.reap()
        return pickle.loads(bytes.fromhex(line[1:]))


def forked(action: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """Run an action in a forked child and return its result; what it raises fails here, with its traceback."""
    return Forked(lambda _: action(), seconds=seconds).result()


def as_nobody(folder: str, action: Callable[[], Any]) -> Any:
    """Run an action as a user whom file modes hold back, in a folder of its own."""

    def drop() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return action()

    if os.geteuid() == 0:
        for name in (folder, *(os.path.join(folder, each) for each in os.listdir(folder))):
            os.chown(name, NOBODY, NOBODY)
    return forked(drop)


def run(program: str, *arguments: str, wrap: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program text in a fresh interpreter that finds the module."""
    text = f"import sys; sys.path.insert(0, {str(HERE)!r}); from operator_db import *\n{program}"
    command = [*wrap, sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: writes fail with EFBIG, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_files(folder: str) -> int:
    """Count the descriptors of this process that lead into a folder."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith(folder)
    return found


def contents(path: str) -> bytes:
    """Return the bytes of a file that nobody has open."""
    with open(path, "rb") as file:
        return file.read()


def put_contents(path: str, content: bytes) -> None:
    """Write a file that nobody has open."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def ids(db: OperatorDb) -> list[str]:
    """Return the ids of all tasks, sorted."""
    return [task.task_id for task in db.iter_tasks()]


def put(db: OperatorDb, *names: str, **more: Any) -> None:
    """Store a task of each name."""
    for name in names:
        db.store_task(TaskRecord(task_id=name, **more))


def holding(path: str) -> Forked:
    """Return a child that stores a task in a transaction which it ends at SIGUSR1; it holds the lock by now."""

    def hold(say: Callable[[object], None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        with OperatorDb(path) as db, db.transaction():
            put(db, "held")
            say("holding")
            signal.sigwait({signal.SIGUSR1})

    child = Forked(hold)
    child.line()
    return child


def crowd(number: int, work: Callable[[int], object]) -> Callable[[], list[str]]:
    """Start threads; what is returned waits for them all and returns the tracebacks of those that failed."""
    failures: list[str] = []

    def guarded(worker: int) -> None:
        try:
            work(worker)
        except Exception:
            failures.append(traceback.format_exc())

    def wait() -> list[str]:
        for thread in threads:
            thread.join(10)
        return failures + [f"{thread.name} hangs" for thread in threads if thread.is_alive()]

    threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(number)]
    for thread in threads:
        thread.start()
    return wait


def proof(task_id: str, outputs: bytes = b"result", **more: Any) -> VerificationLog:
    """Return a proof of a task."""
    return VerificationLog(task_id=task_id, outputs=outputs, timestamp=7, **more)


@dataclass(kw_only=True)
class Tally:
    """A record of an operator's own."""

    name: str
    count: int = 0
    pin: str = field(default="", metadata={"secret": True})


class FaultCase(unittest.TestCase):
    """A scratch folder, a time limit, and a look at what is left behind."""

    seconds = 20

    def setUp(self) -> None:
        """Make the folder and set the alarm."""

        def too_long(*_: object) -> None:
            raise AssertionError(f"the test took longer than {self.seconds} s")

        self.folder = os.path.realpath(
            self.enterContext(tempfile.TemporaryDirectory(prefix="operator-faults-"))
        )
        self.path = os.path.join(self.folder, "operator.db")
        before = signal.signal(signal.SIGALRM, too_long)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        self.addCleanup(lambda: [os.kill(pid, signal.SIGKILL) for pid in Forked.alive])
        self.addCleanup(signal.alarm, 0)
        signal.alarm(self.seconds)

    def check_sound(self, path: str | None = None) -> None:
        """Fail unless a fresh look at the file finds nothing wrong."""
        with OperatorDb(path or self.path) as db:
            self.assertEqual(db.check(), [])

    def fill(self, path: str | None = None, tasks: int = 40) -> dict[tuple[str, str], Any]:
        """Make a database with some of everything and return each record by namespace and id."""
        with OperatorDb(path or self.path, durable=False) as db, db.transaction():
            for n in range(tasks):
                status = list(TaskStatus)[n % 5]
                payload = random.Random(n).randbytes(n * 97 % 3000)
                db.store_task(TaskRecord(task_id=f"t{n}", payload=payload, status=status, claimed_at=n))
                if n % 2:
                    db.store_proof(proof(f"t{n}", b"out%d" % n, submitted=n % 4 == 1))
            for n in range(30):
                db.append_transcript(f"s{n % 3}", "user", f"utterance {n} " * 9, timestamp=n)
            db.append_command("s0", "status", timestamp=5)
            db.store_config(OperatorConfig(keypairs={"main": "k" * 40}, capabilities=["voice"]))
            tallies = db.namespace("tallies", Tally, key="name")
            tallies.put(Tally(name="one", count=1))
        with OperatorDb(path or self.path) as db:
            return dict(self.everything(db))

    def everything(self, db: OperatorDb) -> Iterator[tuple[tuple[str, str], Any]]:
        """Walk every record of a database made by `fill`."""
        for task in db.iter_tasks():
            yield ("tasks", task.task_id), task
        for log in db.list_proofs():
            yield ("proofs", log.task_id), log
        for session in db.list_sessions():
            yield ("sessions", session.session_id), session
        yield ("config", "operator"), db.get_config()
        for tally in db.namespace("tallies", Tally, key="name").values():
            yield ("tallies", tally.name), tally


class Killed(FaultCase):
    """SIGKILL at any moment: what was acknowledged is there, nothing is there by halves."""

    def writer(self, name: str, seed: int) -> Callable[[Callable[[object], None]], None]:
        """Return a program that writes without end and says the number of each write that was acknowledged."""

        def write(say: Callable[[object], None]) -> None:
            rng = random.Random(seed)
            with OperatorDb(self.path, durable=seed % 2 == 0) as db:
                for n in itertools.count():
                    if n % 5 == 0:
                        db.store_task(TaskRecord(task_id=f"{name}-{n}", payload=bytes(rng.randrange(9000))))
                    elif n % 5 == 1:
                        with db.transaction():
                            for part in range(4):
                                db.store_task(TaskRecord(task_id=f"{name}-{n}-{part}", payload=bytes(2000)))
                    elif n % 5 == 2:
                        db.append_transcript(name, "user", str(n))
                    elif n % 5 == 3:
                        db.complete_task(f"{name}-{n - 3}", proof(f"{name}-{n - 3}"))
                    else:
                        old = TaskRecord(task_id=f"{name}-{n}", status=TaskStatus.COMPLETED, completed_at=n)
                        db.store_task(old)
                        db.prune()
                    say(n)

        return write

    def verify(self, db: OperatorDb, name: str, acknowledged: int) -> None:
        """Fail unless the first so many writes are there, the next one wholly or not at all, and nothing more."""
        tasks = set(ids(db))
        for n in range(acknowledged + 2):
            whole = n < acknowledged
            mine = f"{name}-{n}"
            if n % 5 == 0:
                self.assertTrue(mine in tasks or not whole, mine)
            elif n % 5 == 1:
                parts = sum(f"{mine}-{part}" in tasks for part in range(4))
                self.assertIn(parts, (4,) if whole else (0, 4), mine)
            elif n % 5 == 3:
                task, log = db.get_task(f"{name}-{n - 3}"), db.get_proof(f"{name}-{n - 3}")
                done = task is not None and task.status == TaskStatus.COMPLETED
                self.assertEqual(done, log is not None, "a task is completed exactly when its proof is there")
                self.assertTrue(done or not whole, mine)
            elif n % 5 == 4 and whole:
                self.assertNotIn(mine, tasks, "what was pruned came back")
        said = [int(entry.content) for entry in db.transcript(name)]
        least = [n for n in range(acknowledged) if n % 5 == 2]
        self.assertIn(said, (least, [*least, acknowledged]))

    def test_every_acknowledged_write_survives_sigkill(self) -> None:
        rng = random.Random(3)
        kills = 0
        for number in range(10):
            names = [f"w{number}a", f"w{number}b"]
            children = [Forked(self.writer(name, number)) for name in names]
            for name, child in zip(names, children, strict=True):
                acknowledged = [int(child.line()) for _ in range(rng.randrange(25))]
                acknowledged += map(int, child.kill(after=rng.uniform(0, 0.008)))
                kills += 1
                self.assertEqual(acknowledged, [*range(len(acknowledged))])
                with OperatorDb(self.path) as db:
                    self.verify(db, name, len(acknowledged))
            self.check_sound()
        self.assertEqual(kills, 20)

    def test_a_creator_that_is_killed_leaves_a_path_that_can_be_opened(self) -> None:
        rng = random.Random(4)
        for number in range(25):
            path = os.path.join(self.folder, str(number), "operator.db")

            def create(say: Callable[[object], None], path: str = path) -> None:
                say("go")
                OperatorDb(path).store_task(TaskRecord(task_id="first"))
                say("stored")

            child = Forked(create)
            child.line()
            said = child.kill(after=rng.uniform(0, 0.015))
            with OperatorDb(path) as db:
                self.assertTrue(db.get_task("first") or "stored" not in said)
                self.assertEqual(db.check(), [])

    def test_an_empty_database_that_a_killed_process_left_is_adopted(self) -> None:
        with closing(sqlite3.connect(self.path)) as raw:
            raw.execute("PRAGMA journal_mode=WAL")
        with OperatorDb(self.path) as db:
            put(db, "t")
        self.check_sound()


def to_version_2(connection: Any) -> None:
    """A schema step for tests: it writes a lot."""
    connection.query("CREATE TABLE step_two(a)")
    connection.query("INSERT INTO step_two SELECT randomblob(600000)")


def migrated(path: str) -> int:
    """Open a file with a module that knows one more schema version; return how many tasks it holds."""
    operator_db._MIGRATIONS = (operator_db._MIGRATIONS[0], to_version_2)
    with OperatorDb(path) as db:
        if db.check():
            raise AssertionError(db.check())
        return sum(db.count_tasks().values())


class Migrated(FaultCase):
    """A schema change that is killed, or finds no room, leaves the old file as it was."""

    def version(self) -> int:
        """Return the file's schema version; nobody has it open."""
        with closing(sqlite3.connect(self.path)) as raw:
            return int(raw.execute("PRAGMA user_version").fetchone()[0])

    def test_a_migration_that_is_killed_is_done_or_not_begun(self) -> None:
        rng = random.Random(5)
        self.fill()
        old = contents(self.path)
        seen = set()
        for _ in range(15):
            for name in os.listdir(self.folder):
                os.unlink(os.path.join(self.folder, name))
            put_contents(self.path, old)

            def migrate(say: Callable[[object], None]) -> None:
                say("go")
                migrated(self.path)

            child = Forked(migrate)
            child.line()
            child.kill(after=rng.uniform(0, 0.03))
            seen.add(self.version())
            self.assertEqual(forked(lambda: migrated(self.path)), 40)
            self.assertEqual(self.version(), 2)
        self.assertIn(1, seen)

    def test_a_migration_without_room_leaves_the_old_version(self) -> None:
        before = self.fill()
        for limit in (os.stat(self.path).st_size // 2, os.stat(self.path).st_size + 200_000):

            def migrate(limit: int = limit) -> str:
                try:
                    with file_limit(limit):
                        migrated(self.path)
                except StorageError as error:
                    return str(error)
                return ""

            self.assertIn(self.path, forked(migrate))
            with OperatorDb(self.path) as db:
                self.assertEqual(dict(self.everything(db)), before)
        self.assertFalse([name for name in os.listdir(self.folder) if name.endswith((".new", "-journal"))])
        self.assertEqual(forked(lambda: migrated(self.path)), 40)

    def test_the_snapshot_before_a_migration_holds_the_old_records_and_is_private(self) -> None:
        before = self.fill()

        def migrate() -> None:
            os.umask(0)
            migrated(self.path)

        forked(migrate)
        snapshot = self.path + ".v1.bak"
        self.assertEqual(os.stat(snapshot).st_mode & 0o777, 0o600)
        with OperatorDb(snapshot) as db:
            self.assertEqual(dict(self.everything(db)), before)

    def test_processes_that_migrate_at_once_all_end_up_with_the_new_schema(self) -> None:
        self.fill()
        children = [Forked(lambda _: migrated(self.path)) for _ in range(6)]
        self.assertEqual([child.result() for child in children], [40] * 6)


class DiskFull(FaultCase):
    """No room: a typed error, the operation undone as a whole, the same object usable when there is room again."""

    def within(self, size: int, act: Callable[[OperatorDb], None], **options: Any) -> None:
        """Run `act` on an open database under a file-size limit, then see that the same object still writes."""

        def in_child() -> None:
            with OperatorDb(self.path, **options) as db:
                with file_limit(size):
                    act(db)
                db.store_task(TaskRecord(task_id="room again", payload=bytes(2 * 10**6)))
                if db.check():
                    raise AssertionError(db.check())

        forked(in_child)
        with OperatorDb(self.path) as db:
            self.assertEqual(db.check(), [])
            self.assertEqual(len(db.get_task("room again").payload), 2 * 10**6)

    def test_a_write_without_room_is_refused_and_those_before_it_are_there(self) -> None:
        acknowledged = []

        def act(db: OperatorDb) -> None:
            with self.assertRaises(StorageError) as caught:
                for n in range(1000):
                    db.store_task(TaskRecord(task_id=f"t{n}", payload=bytes(20_000)))
                    acknowledged.append(f"t{n}")
            self.assertIn(self.path, str(caught.exception))
            self.assertGreater(len(acknowledged), 3)
            for _ in range(3):
                with self.assertRaises(StorageError):
                    db.append_transcript("s", "user", "x" * 200_000)
            self.assertEqual(sorted(task.task_id for task in db.iter_tasks()), sorted(acknowledged))
            self.assertIsNone(db.get_session("s"))

        self.within(400_000, act)

    def test_a_batch_without_room_is_undone_as_a_whole(self) -> None:
        def act(db: OperatorDb) -> None:
            for payload in (5_000, 200_000):
                with self.assertRaises(StorageError), db.transaction():
                    for n in range(100):
                        db.store_task(TaskRecord(task_id=f"t{n}", payload=bytes(payload)))
                self.assertEqual(list(db.iter_tasks()), [])

        self.within(300_000, act)

    def test_a_full_disk_that_was_caught_inside_a_block_dooms_the_whole_block(self) -> None:
        def act(db: OperatorDb) -> None:
            reached = False
            with self.assertRaises(StorageError), db.transaction():
                put(db, "before")
                with self.assertRaises(StorageError), db.transaction():
                    for n in range(100):
                        db.store_task(TaskRecord(task_id=f"t{n}", payload=bytes(400_000)))
                for call in (
                    lambda: db.store_task(TaskRecord(task_id="after")),
                    lambda: db.get_task("before"),
                    lambda: db.append_command("s", "after"),
                ):
                    with self.assertRaises(StorageError):
                        call()
                reached = True
            self.assertTrue(reached)
            self.assertEqual(list(db.iter_tasks()), [])

        self.within(300_000, act)

    def test_completing_a_task_without_room_leaves_neither_status_nor_proof(self) -> None:
        def act(db: OperatorDb) -> None:
            put(db, "t")
            with self.assertRaises(StorageError):
                db.complete_task("t", proof("t", bytes(900_000)))
            self.assertEqual((db.get_task("t").status, db.get_proof("t")), (TaskStatus.CLAIMED, None))

        self.within(300_000, act)

    def test_a_prune_without_room_takes_whole_batches_and_can_be_done_again(self) -> None:
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            for n in range(400):
                db.store_task(
                    TaskRecord(task_id=f"t{n}", payload=bytes(3000), claimed_at=n, status="completed")
                )

        def act(db: OperatorDb) -> None:
            with self.assertRaises(StorageError):
                db.prune()
            left = sum(db.count_tasks().values())
            with suppress(StorageError):
                db.prune()
            self.assertLessEqual(sum(db.count_tasks().values()), left)
            self.assertEqual(db.check(), [])

        self.within(33_000, act)
        with OperatorDb(self.path) as db:
            db.prune()
            self.assertEqual(ids(db), ["room again"])

    def test_a_database_that_cannot_be_created_leaves_nothing(self) -> None:
        def create() -> None:
            for limit in (0, 4096, 20_000, 40_000):
                with file_limit(limit), self.assertRaises(StorageError):
                    OperatorDb(self.path)
                self.assertEqual(os.listdir(self.folder), [])

        forked(create)

    def test_a_file_system_that_is_full_refuses_and_goes_on_when_there_is_room(self) -> None:
        program = """
import os
folder = sys.argv[1]
with open(folder + "/ballast", "wb") as file: file.write(bytes(600_000))
db, acknowledged = OperatorDb(folder + "/operator.db"), 0
for _ in range(3):
    try:
        while True:
            db.store_task(TaskRecord(task_id=str(acknowledged), payload=bytes(30_000)))
            acknowledged += 1
    except StorageError as error:
        assert folder in str(error), error
    try:
        with db.transaction():
            db.store_task(TaskRecord(task_id="half")); db.store_task(TaskRecord(task_id="h", payload=bytes(10**7)))
    except StorageError: pass
    else: raise AssertionError("ten megabytes went into one")
assert acknowledged > 5
os.unlink(folder + "/ballast")
db.store_task(TaskRecord(task_id="room", payload=bytes(20_000)))
names = {task.task_id for task in db.iter_tasks()}
assert names == {"room", *map(str, range(acknowledged))}, names
assert db.check() == [], db.check()
db.close()
with OperatorDb(folder + "/operator.db") as db: assert db.get_task("room")
"""
        mount = 'mount -t tmpfs -o size=2m none "$1" && shift && exec "$@"'
        wrap = ("unshare", "--mount", "sh", "-c", mount, "sh", self.folder)
        if os.geteuid() or subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode:
            self.skipTest("needs the right to mount a file system")
        done = run(program, self.folder, wrap=wrap)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class Gone(FaultCase):
    """The file read-only, its directory read-only, the file deleted or replaced: never a silent loss."""

    def test_a_file_that_may_not_be_written_is_read_and_its_writes_are_refused(self) -> None:
        before = self.fill()
        os.chmod(self.path, 0o400)

        def look() -> None:
            with OperatorDb(self.path, read_only=True) as db:
                self.assertEqual(set(ids(db)), {f"t{n}" for n in range(40)})
                self.assertEqual(db.check(), [])
                self.assertRaises(StorageError, db.store_task, TaskRecord(task_id="new"))
            with self.assertRaises(StorageError), OperatorDb(self.path) as db:
                put(db, "new")

        as_nobody(self.folder, look)
        os.chmod(self.path, 0o600)
        with OperatorDb(self.path) as db:
            self.assertEqual(dict(self.everything(db)), before)

    def test_a_directory_that_may_not_be_written_is_read_and_its_writes_are_refused(self) -> None:
        self.fill()
        old = contents(self.path)

        def look() -> list[str]:
            os.chmod(self.folder, 0o500)
            with OperatorDb(self.path, read_only=True) as db:
                self.assertEqual(len(db.list_tasks()), 40)
            with self.assertRaises(StorageError), OperatorDb(self.path) as db:
                put(db, "new")
            self.assertRaises(StorageError, OperatorDb, os.path.join(self.folder, "other.db"))
            return os.listdir(self.folder)

        self.assertEqual(as_nobody(self.folder, look), ["operator.db"])
        os.chmod(self.folder, 0o700)
        self.assertEqual(contents(self.path), old)

    def test_modes_taken_away_under_an_open_database_lose_nothing_that_was_acknowledged(self) -> None:
        def work() -> list[str]:
            stored = ["first"]
            with OperatorDb(self.path) as db:
                put(db, "first")
                for name, mode in ((self.path, 0o400), (self.folder, 0o500)):
                    os.chmod(name, mode)
                    with suppress(StorageError):
                        put(db, f"mode {mode:o}")
                        stored.append(f"mode {mode:o}")
            return stored

        stored = as_nobody(self.folder, work)
        os.chmod(self.folder, 0o700)
        os.chmod(self.path, 0o600)
        with OperatorDb(self.path) as db:
            self.assertEqual(set(ids(db)), set(stored))

    def lose(self, *names: str, instead: str = "") -> None:
        """Take files away under an open database; fail unless each write is refused until it is opened again."""
        with OperatorDb(self.path) as db:
            put(db, "before")
            for name in names:
                os.unlink(name)
            if instead:
                os.rename(instead, self.path)
            for _ in range(2):
                with self.assertRaises(StorageError) as caught:
                    put(db, "after")
                self.assertIn("open it again", str(caught.exception))
            with self.assertRaises(StorageError), db.transaction():
                db.append_transcript("s", "user", "after")

    def test_writes_to_a_file_that_was_deleted_are_refused(self) -> None:
        self.lose(self.path)
        with suppress(FileNotFoundError):
            os.unlink(self.path + "-wal")
        self.check_sound()

    def test_writes_beside_a_log_that_was_deleted_are_refused(self) -> None:
        self.lose(self.path + "-wal")

    def test_writes_to_a_file_that_was_replaced_are_refused_and_the_new_one_is_untouched(self) -> None:
        other = os.path.join(self.folder, "other.db")
        before = self.fill(other)
        old = contents(other)
        self.lose(self.path + "-wal", self.path + "-shm", instead=other)
        self.assertEqual(contents(self.path), old)
        with OperatorDb(self.path) as db:
            self.assertEqual(dict(self.everything(db)), before)

    def test_closing_a_replaced_database_takes_nothing_from_the_one_in_its_place(self) -> None:
        db = OperatorDb(self.path)
        put(db, "old")
        for suffix in ("", "-wal", "-shm"):
            os.rename(self.path + suffix, self.path + ".moved" + suffix)

        def successor(say: Callable[[object], None]) -> None:
            with OperatorDb(self.path) as new:
                new.store_task(TaskRecord(task_id="one"))
                say("stored")
                signal.sigwait({signal.SIGUSR1})
                new.store_task(TaskRecord(task_id="two"))
                say("stored")
                signal.sigwait({signal.SIGUSR1})

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self.addCleanup(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGUSR1})
        child = Forked(successor)
        child.line()
        self.assertRaises(StorageError, db.store_task, TaskRecord(task_id="lost"))
        db.close()
        os.kill(child.pid, signal.SIGUSR1)
        child.line()
        child.kill()
        with OperatorDb(self.path) as new:
            self.assertEqual(ids(new), ["one", "two"])


class Damaged(FaultCase):
    """Damage: what can be read is right, what cannot is a typed error, and check() says so and changes nothing."""

    def read_all(self, db: OperatorDb, stored: dict[tuple[str, str], Any]) -> tuple[int, int]:
        """Read every record in every way; return how many came back and how many were refused. None may differ."""
        read = refused = 0
        get = {"tasks": db.get_task, "proofs": db.get_proof, "sessions": db.get_session}
        get["config"] = lambda _: db.get_config()
        for (name, record_id), record in stored.items():
            if name in get:
                try:
                    found = get[name](record_id)
                except DamagedError:
                    refused += 1
                else:
                    # a damaged index can hide a key from SQLite; a record that comes back is whole
                    self.assertIn(found, (record, None))
                    read += found is not None
                    refused += found is None
        with suppress(DamagedError):
            for key, record in self.everything(db):
                self.assertEqual(record, stored[key])
        for status in TaskStatus:
            with suppress(DamagedError):
                for task in db.list_tasks_by_status(status):
                    self.assertEqual(task, stored["tasks", task.task_id])
        return read, refused

    def test_no_bit_flip_in_any_page_ever_changes_a_record_that_is_returned(self) -> None:
        stored = self.fill()
        whole = contents(self.path)
        hurt = os.path.join(self.folder, "hurt.db")
        rng = random.Random(6)
        found = refusals = opened = 0
        for _ in range(100):
            image = bytearray(whole)
            image[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
            put_contents(hurt, image)
            try:
                with OperatorDb(hurt, durable=False, timeout=2) as db:
                    opened += 1
                    problems = db.check()
                    _, refused = self.read_all(db, stored)
                    refusals += refused
                    found += bool(problems)
                    self.assertTrue(problems or not refused, "a record is lost and check() is silent")
            except OperatorDbError as error:
                self.assertIn(hurt, str(error))
        self.assertGreater(opened, 30)
        self.assertGreater(found, 12)
        self.assertGreater(refusals, 6)

    def test_reading_and_checking_a_damaged_file_changes_no_byte_of_it(self) -> None:
        stored = self.fill()
        image = bytearray(contents(self.path))
        for place in range(9000, len(image), 9000):
            image[place] ^= 0x10
        put_contents(self.path, image)
        with suppress(OperatorDbError), OperatorDb(self.path) as db:
            self.read_all(db, stored)
            self.assertTrue(db.check())
        self.assertEqual(contents(self.path), image)

    def test_a_file_that_is_cut_short_is_refused_or_read_without_a_wrong_record(self) -> None:
        stored = self.fill()
        whole = contents(self.path)
        for size in (*range(0, 600, 100), *range(600, len(whole), len(whole) // 25 + 1), len(whole) - 1):
            put_contents(self.path, whole[:size])
            with self.subTest(size=size):
                if size == 0:
                    continue  # an empty file is a database that has not begun
                with self.assertRaises((DamagedError, ForeignFileError)):
                    OperatorDb(self.path).close()
                self.assertEqual(contents(self.path), whole[:size])
        self.assertTrue(stored)

    def test_garbage_at_the_end_of_the_log_or_flips_in_it_never_make_a_wrong_record(self) -> None:
        def write(say: Callable[[object], None]) -> None:
            db = OperatorDb(self.path)
            for n in range(30):
                db.store_task(TaskRecord(task_id=f"t{n % 10}", payload=b"%d" % n * 500))
            say("written")
            signal.pause()

        child = Forked(write)
        child.line()
        child.kill()
        image, wal = contents(self.path), contents(self.path + "-wal")
        copy = os.path.join(self.folder, "copy.db")
        rng = random.Random(7)
        whole = range(30)
        for n in range(40):
            bad = bytearray(wal) + rng.randbytes(rng.randrange(1, 9000)) if n < 10 else bytearray(wal)
            if n >= 10:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            put_contents(copy, image)
            put_contents(copy + "-wal", bad)
            with suppress(FileNotFoundError):
                os.unlink(copy + "-shm")
            with suppress(DamagedError, StorageError, ForeignFileError), OperatorDb(copy) as hurt:
                payloads = {task.task_id: task.payload for task in hurt.iter_tasks()}
                for task_id, payload in payloads.items():
                    self.assertIn(payload, [b"%d" % v * 500 for v in whole if f"t{v % 10}" == task_id])
                self.assertTrue(n >= 10 or len(payloads) == 10)

    def test_rows_of_another_program_are_refused_by_key_and_can_be_deleted_or_overwritten(self) -> None:
        stored = self.fill()
        value, crc = (
            "UPDATE tasks SET value = CAST(:value AS TEXT), crc = :crc WHERE key = :key",
            "UPDATE tasks SET crc = :crc WHERE key = :key",
        )
        rows = {
            "t0": (value, "not JSON"),
            "t1": (value, "[]"),
            "t2": (value, '{"task_id":"t2","reward_lamports":-1}'),
            "t3": (value, '{"task_id":"other"}'),
            "t4": (value, "[" * 100_000),
            "t5": ("UPDATE tasks SET status = 'completed', value = '' WHERE 0", ""),
            "t6": (value, b'{"task_id":"t6"}\xff'),
            "t7": (value, '{"task_id":"t7","payload":"***"}'),
            "t8": (value, '{"task_id":"t8","claimed_at":NaN}'),
            "t9": (crc, b""),
            "t10": (value, '{"task_id":"t10"}'),
            "t11": (value, b'{"task_id":"t11","description":"\xed\xa0\x80"}'),
        }
        with closing(sqlite3.connect(self.path)) as raw, raw:
            for key, (sql, text) in rows.items():
                blob = text if isinstance(text, bytes) else text.encode()
                raw.execute(sql, {"value": blob, "crc": crc32(blob), "key": "tasks:" + key})
            raw.execute("UPDATE tasks SET status = 'resolved' WHERE key = 'tasks:t5'")
            raw.execute("UPDATE tasks SET at = 12345 WHERE key = 'tasks:t12'")
            raw.execute("UPDATE tasks SET status = x'00' WHERE key = 'tasks:t13'")
            raw.execute("UPDATE tasks SET value = CAST(value AS BLOB) WHERE key = 'tasks:t14'")
        damaged = [*rows, "t12", "t13"]
        with OperatorDb(self.path) as db:
            for record_id in damaged:
                with self.subTest(record_id), self.assertRaisesRegex(DamagedError, f"tasks:{record_id}\\b"):
                    db.get_task(record_id)
            report = "\n".join(db.check())
            for record_id in [*damaged, "t14"]:
                self.assertRegex(report, f"\\b{record_id}\\b", "check() goes on to the end")
            self.assertRaises(DamagedError, db.list_tasks)
            self.assertRaises(DamagedError, lambda: list(db.iter_tasks()))
            for record_id in damaged[::2]:
                self.assertTrue(db.delete_task(record_id))
            for record_id in damaged[1::2]:
                db.store_task(stored["tasks", record_id])
                self.assertEqual(db.get_task(record_id), stored["tasks", record_id])
            db.store_task(stored["tasks", "t14"])
            self.assertEqual(db.check(), [])
            self.assertEqual(len(db.list_tasks()), 40 - len(damaged[::2]))


class TwoHandles(FaultCase):
    """A second handle of a live file, and its closing, never drop the locks of the first."""

    def test_a_write_after_another_handle_closed_is_seen_by_every_process(self) -> None:
        first = OperatorDb(self.path)
        program = "with OperatorDb(sys.argv[1]) as db: db.store_task(TaskRecord(task_id=sys.argv[2]))"
        for number, meddle in enumerate(
            (
                lambda: OperatorDb(self.path).close(),
                lambda: OperatorDb(self.path, read_only=True).close(),
                first.check,
                first.prune,
            )
        ):
            first.store_task(TaskRecord(task_id=f"before {number}"))
            meddle()
            self.assertEqual(run(program, self.path, f"second {number}").stderr, "")
            first.store_task(TaskRecord(task_id=f"after {number}"))
        seen = run(
            "with OperatorDb(sys.argv[1]) as db: print(*(t.task_id for t in db.iter_tasks()), sep='\\n')",
            self.path,
        )
        wanted = [f"{word} {n}" for word in ("after", "before", "second") for n in range(4)]
        self.assertEqual(seen.stdout.splitlines(), wanted)
        first.close()
        self.check_sound()

    def test_no_live_file_is_ever_opened_raw(self) -> None:
        program = """
import os
path, live, raw = sys.argv[1], set(), []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        for name in (path, path + "-wal", path + "-shm"):
            if live and os.path.exists(name) and os.path.exists(arguments[0]) and os.path.samefile(name, arguments[0]):
                raw.append(arguments)
sys.addaudithook(watch)
db = OperatorDb(path)
live.add(path)
db.store_task(TaskRecord(task_id="t", payload=bytes(50_000)))
for options in ({}, {"read_only": True}):
    other = OperatorDb(path, **options); other.list_tasks(); other.check(); other.close()
db.complete_task("t", VerificationLog(task_id="t", outputs=b"o"))
db.check(); db.prune(0, 0, 0); db.count_tasks(); list(db.iter_tasks()); db.dispute_bundle("t")
for verb, arguments in (("stats", ()), ("prometheus", ()), ("compact", ()), ("backup", (path + ".copy",)),
                        ("restore", (path + ".copy",)), ("write_metrics", (path + ".prom",))):
    if hasattr(db, verb): getattr(db, verb)(*arguments)
if os.fork() == 0: OperatorDb(path).close(); os._exit(9 if raw else 0)
assert os.wait()[1] == 0
db.store_task(TaskRecord(task_id="u")); db.close()
assert not raw, raw
"""
        self.assertEqual(run(program, self.path).stderr, "")


class Crowded(FaultCase):
    """Threads and processes at once: right records, no lost increment, no deadlock; a writer that is stuck."""

    def work(self, db: OperatorDb, worker: int, rounds: int) -> None:
        """Read, increment in both ways, and append, many times."""
        tallies = db.namespace("tallies", Tally, key="name")
        for n in range(rounds):
            found = db.get_task(f"t{n * 7 % 40}")
            self.assertEqual((found.task_id, found.payload), (f"t{n * 7 % 40}", found.task_id.encode() * 99))
            if worker % 4 == 0:
                tallies.update("a", lambda tally: replace(tally, count=tally.count + 1))
            elif worker % 4 == 1:
                with db.transaction():
                    tally = tallies.get("b")
                    tallies.put(replace(tally, count=tally.count + 1))
            elif worker % 4 == 2:
                db.append_transcript("shared", "user", f"{worker} {n}")
            else:
                self.assertEqual(sum(1 for _ in db.iter_tasks()), 40)

    def test_threads_that_read_in_turn_share_a_reader_and_those_that_read_at_once_never_do(self) -> None:
        query, meet, used = operator_db._Connection.query, threading.Barrier(2), list[object]()

        def together(connection: Any, *arguments: Any, **options: Any) -> Any:
            used.append(connection)
            meet.wait(10)
            return query(connection, *arguments, **options)

        with OperatorDb(self.path, durable=False) as db, ThreadPoolExecutor(1) as other:
            for _ in range(5):
                other.submit(db.get_task, "t").result()
                db.get_task("t")
            store = db._store
            self.assertEqual(len(store._readers), 1)
            store._readers.append(store._connect("look"))  # beforehand, because connecting queries too
            store._readers[1].holder = operator_db._Lease(1, writes=False)
            with mock.patch("operator_db._Connection.query", together):
                for _ in range(5):
                    reading = other.submit(db.get_task, "t")
                    db.get_task("t")
                    reading.result()
            self.assertEqual([len({*map(id, used[at : at + 2])}) for at in range(0, 10, 2)], [2] * 5)

    def test_sixteen_threads_and_four_processes_read_right_and_lose_no_increment(self) -> None:
        rounds = 12
        with OperatorDb(self.path, durable=False) as db:
            for n in range(40):
                db.store_task(TaskRecord(task_id=f"t{n}", payload=f"t{n}".encode() * 99))
            tallies = db.namespace("tallies", Tally, key="name")
            tallies.put(Tally(name="a"))
            tallies.put(Tally(name="b"))

            def in_process(worker: int) -> None:
                with OperatorDb(self.path, durable=False) as mine:
                    self.work(mine, worker, rounds)

            children = [Forked(lambda _, worker=worker: in_process(worker)) for worker in range(16, 20)]
            wait = crowd(16, lambda worker: self.work(db, worker, rounds))
            for child in children:
                child.result()
            self.assertEqual(wait(), [])
            self.assertEqual((tallies.get("a").count, tallies.get("b").count), (5 * rounds, 5 * rounds))
            said = [entry.content for entry in db.transcript("shared")]
            self.assertEqual(sorted(said), sorted(f"{w} {n}" for w in range(2, 20, 4) for n in range(rounds)))
        self.check_sound()

    def test_close_amid_sixteen_busy_threads_ends_and_every_thread_is_told(self) -> None:
        db = OperatorDb(self.path, durable=False)
        started, told = threading.Barrier(17), []

        def work(worker: int) -> None:
            started.wait()
            try:
                while True:
                    put(db, str(worker))
                    db.get_task(str(worker))
            except ClosedError:
                told.append(worker)

        wait = crowd(16, work)
        started.wait()
        db.close()
        self.assertEqual(wait(), [])
        self.assertEqual(sorted(told), [*range(16)])
        self.assertEqual(open_files(self.folder), 0)

    def test_close_waits_for_a_block_of_another_thread_and_gives_up_after_the_timeout(self) -> None:
        with OperatorDb(self.path, timeout=0.2) as db:
            opened, end = threading.Event(), threading.Event()

            def work(_: int) -> None:
                with db.transaction():
                    put(db, "inside")
                    opened.set()
                    end.wait()
                    put(db, "inside still")

            wait = crowd(1, work)
            opened.wait()
            self.assertRaises(BusyError, db.close)
            self.assertRaises(BusyError, put, db, "mine")
            end.set()
            self.assertEqual(wait(), [])
            self.assertEqual(ids(db), ["inside", "inside still"])

    def test_a_writer_stuck_in_another_process_gives_busy_and_the_next_try_works(self) -> None:
        OperatorDb(self.path).close()
        child = holding(self.path)
        with OperatorDb(self.path, timeout=0.15) as db:
            began = time.monotonic()
            with self.assertRaisesRegex(BusyError, "try again"):
                put(db, "mine")
            self.assertTrue(0.1 < time.monotonic() - began < 2)
            self.assertIsNone(db.get_task("held"), "readers are not held up, and see the last commit")
            os.kill(child.pid, signal.SIGUSR1)
            child.result()
            put(db, "mine")
            self.assertEqual(ids(db), ["held", "mine"])


def spawned(path: str, name: str) -> None:
    """Write one task; what multiprocessing runs."""
    with OperatorDb(path) as db:
        db.store_task(TaskRecord(task_id=name))


class ForkedStates(FaultCase):
    """Fork in every state: what either side was told is stored is stored."""

    def names(self) -> list[str]:
        """Return the tasks' names as a fresh handle sees them, after a check."""
        with OperatorDb(self.path) as db:
            self.assertEqual(db.check(), [])
            return ids(db)

    def test_an_idle_database_is_forked_again_and_again(self) -> None:
        with OperatorDb(self.path) as db:
            for n in range(10):
                put(db, f"parent {n}")
                child = Forked(lambda _, n=n: put(db, f"child {n}"))
                put(db, f"while {n}")
                child.result()
        self.assertEqual(len(self.names()), 30)

    def test_children_forked_while_threads_work_all_write_and_end(self) -> None:
        stop, counts = threading.Event(), Counter()
        with OperatorDb(self.path, durable=False) as db:

            def work(worker: int) -> None:
                while not stop.is_set():
                    put(db, f"thread {worker} {counts[worker]}")
                    counts[worker] += 1
                    sum(1 for _ in itertools.islice(db.iter_tasks(), 20))

            wait = crowd(6, work)
            try:
                for n in range(20):
                    forked(lambda n=n: put(db, f"child {n}"))
            finally:
                stop.set()
            self.assertEqual(wait(), [])
        self.assertEqual(len(self.names()), 20 + sum(counts.values()))

    def test_an_iteration_goes_on_in_parent_and_child(self) -> None:
        with OperatorDb(self.path, durable=False) as db:
            with db.transaction():
                for n in range(2500):
                    put(db, f"{n:04}")
            walk = (task.task_id for task in db.iter_tasks())
            next(walk)

            def rest(_: object = None) -> list[str]:
                put(db, f"x{os.getpid()}")
                return [name for name in walk if name[0] != "x"]

            child = Forked(rest)
            self.assertEqual(rest(), [f"{n:04}" for n in range(1, 2500)])
            self.assertEqual(child.result(), [f"{n:04}" for n in range(1, 2500)])

    def test_the_child_of_a_transaction_is_refused_and_the_parent_commits(self) -> None:
        with OperatorDb(self.path) as db:
            with db.transaction():
                put(db, "inside")

                def try_all() -> None:
                    for call in (lambda: put(db, "child"), lambda: db.get_task("inside"), db.check):
                        self.assertRaises(ClosedError, call)
                    self.assertRaises(ConflictError, OperatorDb, self.path)
                    db.close()

                forked(try_all)
                put(db, "still inside")
            put(db, "after")
            run("OperatorDb(sys.argv[1]).close()", self.path)
            put(db, "last")
        self.assertEqual(self.names(), ["after", "inside", "last", "still inside"])

    def test_a_child_that_leaves_its_parents_block_commits_nothing(self) -> None:
        with OperatorDb(self.path) as db:
            try:
                with db.transaction():
                    put(db, "undone")
                    pid = os.fork()
                    if pid:
                        os.waitpid(pid, 0)
                        raise KeyError
            except (KeyError, OperatorDbError):
                if pid == 0:
                    os._exit(0)
            if pid == 0:
                os._exit(1)
            put(db, "kept")
        self.assertEqual(self.names(), ["kept"])

    def test_either_side_may_die_first(self) -> None:
        def parent(say: Callable[[object], None]) -> None:
            db = OperatorDb(self.path)
            put(db, "parent")
            reader, writer = os.pipe()
            if os.fork():
                put(db, "parent again")
                say("written")
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(writer)
            os.getppid()
            put(db, "orphan")
            os.read(reader, 1)  # ends when the parent is dead
            put(db, "orphan again")
            say("orphan done")
            os._exit(0)

        child = Forked(parent)
        self.assertEqual(sorted((child.line(), child.line())), ["orphan done", "written"])
        child.reap()
        self.assertEqual(self.names(), ["orphan", "orphan again", "parent", "parent again"])
        with OperatorDb(self.path) as db:

            def stream(say: Callable[[object], None]) -> None:
                for n in itertools.count():
                    put(db, f"z{n:05}")
                    say(n)

            child = Forked(stream)
            for _ in range(5):
                put(db, f"beside {child.line()}")
            said = child.kill()
            put(db, "survivor")
        least = {f"z{n:05}" for n in range(5 + len(said))} | {f"beside {n}" for n in range(5)} | {"survivor"}
        self.assertLessEqual(least, set(self.names()))

    def test_multiprocessing_by_fork_and_by_spawn(self) -> None:
        with OperatorDb(self.path) as db:
            for method in ("fork", "spawn"):
                worker = multiprocessing.get_context(method).Process(target=spawned, args=(self.path, method))
                worker.start()
                put(db, f"beside {method}")
                worker.join()
                self.assertEqual(worker.exitcode, 0)
        self.assertEqual(self.names(), ["beside fork", "beside spawn", "fork", "spawn"])


class Interrupted(FaultCase):
    """KeyboardInterrupt anywhere, a database that nobody closed, an exit with threads alive: nothing is left held."""

    def interrupt(self, act: Callable[[], object], longest: float, times: int) -> int:
        """Interrupt an action after random times, as Ctrl-C would; return how often that struck."""
        rng, struck, armed = random.Random(8), 0, False

        def ring(*_: object) -> None:
            if armed:
                raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, ring)
        for _ in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00002, longest))
                armed = True
                act()
                armed = False
            except KeyboardInterrupt:
                armed = False
                struck += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
        return struck

    def test_an_interrupted_transaction_is_whole_or_undone_and_holds_no_lock(self) -> None:
        def work() -> int:
            count = itertools.count()
            with OperatorDb(self.path, durable=False, timeout=5) as db:

                def act() -> None:
                    n = next(count)
                    with db.transaction():
                        put(db, f"{n}-a")
                        with db.transaction():
                            db.append_command("s", f"{n}-b")
                    db.update_task_status(f"{n}-a", "in_progress")

                struck = self.interrupt(act, 0.0015, 400)
                put(db, "last-a")
                db.append_command("s", "last-b")
                tasks = {task.task_id[:-2] for task in db.iter_tasks()}
                said = {command[:-2] for command in db.get_session("s").command_history}
                self.assertEqual(tasks, said)
                self.assertEqual(db.check(), [])
            self.assertEqual(open_files(self.folder), 0)
            return struck

        self.assertGreater(forked(work), 50)

    def test_an_interrupt_at_any_call_inside_a_nested_block_leaves_all_of_it_or_nothing(self) -> None:
        def attempt(db: OperatorDb, n: int) -> bool:
            left = n

            def strike(frame: Any, event: str, _: object) -> None:
                nonlocal left
                if event in ("call", "c_return") and frame.f_code.co_filename == operator_db.__file__:
                    left -= 1
                    if left == 0:
                        sys.setprofile(None)
                        raise KeyboardInterrupt

            inner_ended = False
            with suppress(ConflictError), db.transaction():
                put(db, f"{n} before")
                with suppress(KeyboardInterrupt):
                    sys.setprofile(strike)
                    with db.transaction():
                        put(db, f"{n} inner", f"{n} inner too")
                    inner_ended = True
                sys.setprofile(None)
                put(db, f"{n} after")
            found = set(ids(db)) & {f"{n} {part}" for part in ("before", "inner", "inner too", "after")}
            self.assertIn(len(found), (4,) if inner_ended else (0, 2, 4), f"at call {n}: {found}")
            self.assertEqual(f"{n} inner" in found, f"{n} inner too" in found, f"at call {n}")
            return left > 0

        def work() -> int:
            with OperatorDb(self.path, durable=False, timeout=5) as db:
                last = next(n for n in range(1, 1000) if attempt(db, n))
                self.assertEqual(db.check(), [])
            return last

        self.assertGreater(forked(work), 50)

    def test_interrupted_reads_and_walks_leave_every_connection_free(self) -> None:
        before = self.fill()

        def work() -> int:
            with OperatorDb(self.path, timeout=5) as db:
                list(db.list_sessions())
                held = open_files(self.folder)
                struck = self.interrupt(lambda: dict(self.everything(db)), 0.006, 150)
                self.assertEqual(dict(self.everything(db)), before)
                gc.collect()
                self.assertLessEqual(open_files(self.folder), held + 2)
            self.assertEqual(open_files(self.folder), 0)
            return struck

        self.assertGreater(forked(work), 30)

    def test_an_interrupted_opening_or_closing_leaves_no_descriptor(self) -> None:
        self.fill()

        def work() -> int:
            def act() -> None:
                with OperatorDb(self.path, timeout=5) as db:
                    db.get_task("t1")

            struck = self.interrupt(act, 0.003, 150)
            gc.collect()
            self.assertEqual(open_files(self.folder), 0)
            return struck

        self.assertGreater(forked(work), 30)

    def test_a_wait_for_another_process_is_interrupted_at_once(self) -> None:
        OperatorDb(self.path).close()
        child = holding(self.path)

        def wait() -> float:
            with OperatorDb(self.path, timeout=15) as db:
                began = time.monotonic()
                struck = self.interrupt(lambda: db.store_task(TaskRecord(task_id="t")), 0.05, 3)
                self.assertEqual(struck, 3)
                return time.monotonic() - began

        self.assertLess(forked(wait), 1)
        child.kill()
        with OperatorDb(self.path) as db:
            put(db, "t")

    def test_a_walk_or_a_block_that_is_abandoned_holds_nothing(self) -> None:
        self.fill()
        with OperatorDb(self.path, timeout=2) as db:
            walk = db.iter_tasks()
            next(walk)
            block = db.transaction()
            block.__enter__()
            del block
            gc.collect()
            put(db, "t")
            del walk
        self.assertEqual(open_files(self.folder), 0)

    def test_a_database_that_nobody_closed_gives_its_descriptors_back(self) -> None:
        for _ in range(20):
            OperatorDb(self.path).store_task(TaskRecord(task_id="t"))
        gc.collect()
        self.assertEqual(open_files(self.folder), 0)

    def test_an_exit_with_threads_alive_is_silent_and_loses_nothing(self) -> None:
        program = """
import itertools, os, threading
db, seen = OperatorDb(sys.argv[1]), threading.Semaphore(0)
def work(name):
    for n in itertools.count():
        db.store_task(TaskRecord(task_id=f"{name} {n}"))
        os.write(1, f"{name} {n}\\n".encode())
        seen.release()
for name in range(4): threading.Thread(target=work, args=(name,), daemon=True).start()
for _ in range(40): seen.acquire()
"""
        done = run(program, self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with OperatorDb(self.path) as db:
            self.assertLessEqual(set(done.stdout.splitlines()), set(ids(db)))
            self.assertEqual(db.check(), [])


class Coroutines(FaultCase):
    """A transaction belongs to the thread and context that opened it, whoever else runs meanwhile."""

    def test_a_coroutine_that_writes_while_anothers_block_is_open_is_refused_at_once(self) -> None:
        async def main(db: OperatorDb) -> None:
            opened, tried = asyncio.Event(), asyncio.Event()

            async def first() -> None:
                with db.transaction():
                    put(db, "first")
                    opened.set()
                    await tried.wait()
                    put(db, "first again")

            async def second() -> None:
                await opened.wait()
                for write in (
                    lambda: db.store_task(TaskRecord(task_id="second")),
                    lambda: db.transaction().__enter__(),
                    db.close,
                ):
                    self.assertRaises(ConflictError, write)
                self.assertIsNone(db.get_task("first"), "what is not committed is seen by nobody else")
                tried.set()

            await asyncio.gather(first(), second())

        with OperatorDb(self.path) as db:
            asyncio.run(main(db))
            self.assertEqual(ids(db), ["first", "first again"])

    def test_a_worker_or_task_that_is_started_inside_a_block_gets_no_place_in_it(self) -> None:
        with OperatorDb(self.path) as db:

            def refused() -> None:
                self.assertRaises(ConflictError, db.store_task, TaskRecord(task_id="worker"))
                self.assertIsNone(db.get_task("inside"))

            async def main() -> None:
                with db.transaction():
                    put(db, "inside")
                    await asyncio.to_thread(refused)
                    await asyncio.create_task(in_task())
                    worker = threading.Thread(target=contextvars.copy_context().run, args=(refused,))
                    worker.start()
                    await asyncio.get_running_loop().run_in_executor(None, worker.join)

            async def in_task() -> None:
                refused()

            asyncio.run(main())
            self.assertEqual(ids(db), ["inside"])
            asyncio.run(asyncio.to_thread(db.store_task, TaskRecord(task_id="later")))
            self.assertIsNotNone(db.get_task("later"))


SECRET = "5ecretSecret5"


@dataclass(kw_only=True)
class Wallet:
    """A record that holds records with secrets."""

    owner: str
    tallies: list[Tally] = field(default_factory=list)


class Secrets(FaultCase):
    """Files are private from their first byte; what is secret is shown nowhere."""

    def test_every_file_is_private_at_every_moment_whatever_the_umask(self) -> None:
        def watch(umask: int) -> dict[str, int]:
            os.umask(umask)
            worst: dict[str, int] = {}
            path = os.path.join(self.folder, f"new {umask}", "below", "operator.db")

            def look(*_: object) -> None:
                for folder, _folders, names in os.walk(os.path.dirname(os.path.dirname(path))):
                    for name in [folder, *(os.path.join(folder, each) for each in names)]:
                        with suppress(FileNotFoundError):
                            worst[name] = worst.get(name, 0) | os.stat(name).st_mode & 0o077

            sys.setprofile(look)
            with OperatorDb(path) as db:
                put(db, "t")
                if hasattr(db, "backup"):
                    db.backup(path + ".copy")
                look()
            sys.setprofile(None)
            return worst

        for umask in (0o000, 0o077):
            worst = forked(lambda umask=umask: watch(umask))
            self.assertGreaterEqual(len(worst), 5, worst)
            self.assertTrue({name[-4:] for name in worst} >= {"r.db", "-wal", "-shm", ".new"}, worst)
            self.assertEqual({name: mode for name, mode in worst.items() if mode}, {})

    def test_a_file_that_others_could_read_is_tightened_with_a_log_line(self) -> None:
        self.fill()
        os.chmod(self.path, 0o644)
        with self.assertLogs("operator_db", logging.WARNING) as logs, OperatorDb(self.path):
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        self.assertIn(self.path, logs.output[0])

    def test_a_rotated_keypair_is_nowhere_in_the_file_after_close(self) -> None:
        with OperatorDb(self.path) as db:
            for round_, secret in enumerate((SECRET, "another-5ecret")):
                db.store_config(OperatorConfig(keypairs={"main": secret, "big": secret * 3000}))
                put(db, f"t{round_}")
        left = {name: contents(os.path.join(self.folder, name)) for name in os.listdir(self.folder)}
        self.assertEqual([name for name, content in left.items() if SECRET.encode() in content], [])
        self.assertIn(b"another-5ecret", left["operator.db"])

    def test_no_secret_is_in_a_repr_an_error_a_log_or_a_traceback(self) -> None:
        shown = io.StringIO()
        handler = logging.StreamHandler(shown)
        logging.getLogger("operator_db").addHandler(handler)
        self.addCleanup(logging.getLogger("operator_db").removeHandler, handler)

        def show(act: Callable[[], object]) -> None:
            try:
                print(repr(act()), file=shown)
            except OperatorDbError as error:
                shown.write(f"{error!r} {error} {error.args} {traceback.format_exc()}")

        config = OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=[f"https://rpc?key={SECRET}"])
        with OperatorDb(self.path) as db:
            show(lambda: config)
            for wrong in ({"main": [SECRET]}, {"main": SECRET.encode()}, [SECRET], SECRET, {SECRET: 1}):
                show(lambda wrong=wrong: OperatorConfig(keypairs=wrong))
                show(lambda wrong=wrong: OperatorConfig(rpc_endpoints=wrong))
                config.keypairs = wrong
                show(lambda: db.store_config(config))
                show(
                    lambda wrong=wrong: db.namespace("tallies", Tally, key="name").put(
                        Tally(name="n", pin=wrong)
                    )
                )
            wallets = db.namespace("wallets", Wallet, key="owner")
            tally = Tally(name="n", pin=SECRET)
            show(lambda: tally)
            show(lambda: Wallet(owner="o", tallies=[tally]))
            show(lambda: wallets.put(Wallet(owner="o", tallies=[tally, 1])))
            show(lambda: wallets.put(Wallet(owner="o", tallies=[Tally(name=1, pin=SECRET)])))
            show(lambda: wallets.put(Wallet(owner="", tallies=[tally])))
            show(lambda: wallets.put(Wallet(owner=[tally], tallies=[])))
            db.store_config(OperatorConfig(keypairs={"main": SECRET}))
        for value in (f'{{"keypairs":{{"main":"{SECRET}"}}', f'{{"keypairs":["{SECRET}"]}}', f'["{SECRET}"]'):
            with closing(sqlite3.connect(self.path)) as raw, raw:
                raw.execute("UPDATE config SET value = ?, crc = ?", (value, crc32(value.encode())))
            with OperatorDb(self.path) as db:
                show(db.get_config)
                show(db.check)
        self.assertIn("***", shown.getvalue())
        self.assertIn("Error", shown.getvalue())
        self.assertNotIn(SECRET, shown.getvalue())


class Hostile(FaultCase):
    """Files, names and documents that somebody made to do harm."""

    def test_a_crafted_schema_is_refused_and_no_byte_of_it_changed(self) -> None:
        self.fill()
        whole = contents(self.path)
        columns = operator_db._CREATE_TABLE[operator_db._CREATE_TABLE.index("(") :]
        for crafted in (
            "CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END",
            "CREATE TRIGGER planted AFTER INSERT ON tallies BEGIN DELETE FROM proofs; END",
            "CREATE TEMP TRIGGER IF NOT EXISTS a AFTER INSERT ON tasks BEGIN SELECT 1; END; CREATE VIEW v AS SELECT * FROM proofs",
            "DROP TABLE proofs; CREATE VIEW proofs AS SELECT * FROM tasks",
            f"DROP TABLE tasks; CREATE TABLE tasks{columns.replace(')', ', more)')}",
            f"DROP TABLE tasks; CREATE TABLE Tasks{columns}",
            "DROP INDEX tasks_status_at; CREATE INDEX tasks_status_at ON proofs(at)",
            "CREATE UNIQUE INDEX more ON tasks(key, status)",
            "DROP TABLE config",
            "PRAGMA application_id = 7",
            "PRAGMA user_version = 99",
        ):
            put_contents(self.path, whole)
            with closing(sqlite3.connect(self.path)) as raw:
                raw.executescript(crafted)
            image = contents(self.path)
            with self.subTest(crafted):
                with self.assertRaises((ForeignFileError, operator_db.NewerSchemaError)):
                    OperatorDb(self.path).close()
                self.assertEqual(contents(self.path), image)
                self.assertEqual(os.listdir(self.folder), ["operator.db"])

    def test_a_schema_of_many_tables_opens_and_answers_in_time(self) -> None:
        self.fill()
        many = (
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 8000) INSERT INTO sqlite_schema"
            " SELECT 'view', 'other_' || n, 'other_' || n, 0, 'CREATE VIEW other_' || n || ' AS SELECT 1' FROM c"
        )
        with closing(sqlite3.connect(self.path)) as raw, raw:
            raw.execute("PRAGMA writable_schema=ON")
            raw.execute(many)
        began = time.monotonic()
        with OperatorDb(self.path) as db:
            self.assertEqual(len(db.list_tasks()), 40)
        self.assertLess(
            time.monotonic() - began, 5, "SQLite parses the schema anew for each connection, no more"
        )

    def test_documents_too_deep_or_too_large_are_refused(self) -> None:
        deep: Any = []
        for _ in range(5000):
            deep = [deep]
        loop: dict[str, Any] = {}
        loop["again"] = loop
        with OperatorDb(self.path) as db:
            for odd in (deep, loop, 10**5000, float("nan"), "\ud800", {1: 2}, (1,), object()):
                with self.assertRaises(InvalidRecordError):
                    db.store_config(OperatorConfig(model_preferences={"odd": odd}))
            self.assertIsNone(db.get_config())
            self.assertEqual(db.check(), [])

    def test_a_namespace_name_that_tries_to_be_sql_is_refused(self) -> None:
        with OperatorDb(self.path) as db:
            db.store_proof(proof("t"))
            bad = ["a; DROP TABLE proofs", "a b", "", "a\0b", "a\n", "x" * 49, None, 7, b"a"]
            for name in [
                *bad,
                "a(key)--",
                'a"b',
                "a'b",
                "1a",
                "_a",
                "A",
                "ä",
                "а",
                "sqlite_a",
                "tasks",
                "proofs",
                "session_log",
                "config",
            ]:
                with self.subTest(name), self.assertRaises(InvalidRecordError):
                    db.namespace(name, Tally, key="name")
            for name in ("select", "table", "a_1", "order", "x" * 48, "tasks_status_at"):
                with self.subTest(name), suppress(InvalidRecordError, ForeignFileError):
                    tallies = db.namespace(name, Tally, key="name")
                    tallies.put(Tally(name="one", count=1))
                    self.assertEqual(
                        [tallies.get("one").count, tallies.count(), tallies.delete("one")], [1, 1, True]
                    )
            self.assertIsNotNone(db.get_proof("t"))
            self.assertEqual(db.check(), [])

    def test_every_printable_id_is_kept_apart_and_every_other_is_refused(self) -> None:
        good = [
            "'",
            '"',
            "';",
            "a:b",
            "a%3Ab",
            "a%b",
            "%",
            ":",
            "tasks:a",
            "a:",
            ":a",
            "*",
            "?1",
            "é",
            "é",
            "אב",
            "A",
            "a",
            "../../x",
        ]
        good += ["'; DROP TABLE tasks; --", "\\", "\U0001f600", "x" * 2**20, "x" * (2**20 - 1)]
        bad = [*"\n\0\u202e\ud800\x1b\ufeff", "", "a\nb", "a\0", "a\0b", "a\u202eb", None, 7, b"a", ["a"]]
        with OperatorDb(self.path, durable=False) as db:
            for n, name in enumerate(good):
                db.store_task(TaskRecord(task_id=name, claimed_at=n))
                db.store_proof(proof(name))
                db.append_transcript(name, "user", str(n))
            for n, name in enumerate(good):
                self.assertEqual(db.get_task(name).claimed_at, n)
                self.assertEqual(db.get_proof(name).task_id, name)
                self.assertEqual([entry.content for entry in db.transcript(name)], [str(n)])
            self.assertEqual(set(ids(db)), set(good))
            calls = [db.get_task, db.get_proof, db.get_session, db.transcript, db.dispute_bundle]
            calls += [
                lambda name: put(db, name),
                lambda name: db.link_task(name, "t"),
                proof,
            ]
            for name, call in itertools.product(bad, [*calls, lambda name: db.append_command(name, "c")]):
                with self.assertRaises(InvalidRecordError) as caught:
                    call(name)
                self.assertTrue(str(caught.exception).isprintable(), "a message carries no control character")
            self.assertEqual(db.count_tasks()[TaskStatus.CLAIMED], len(good))
            for name in good:
                self.assertTrue(db.delete_task(name) and db.delete_session(name))
            self.assertEqual((list(db.iter_tasks()), db.list_sessions(), db.check()), ([], [], []))


# ---- what leaves and enters, and what people see of it


def records(db: OperatorDb, *, include_secrets: bool = True) -> list[bytes]:
    """Return the lines of an export, without the header."""
    out = BytesIO()
    db.export(out, include_secrets=include_secrets)
    return out.getvalue().splitlines()[1:]


def held(path: str) -> list[bytes]:
    """Return the lines of an export of a file, as a process sees it that knows no namespace in it."""
    with OperatorDb(path, read_only=True) as db:
        return records(db)


def stopped(act: Callable[[Callable[[int, int], None]], object], part: float = 0.5) -> Forked:
    """Return a child that has come so far with a long work, and waits there to be killed."""

    def work(say: Callable[[object], None]) -> None:
        def progress(done: int, total: int) -> None:
            if total and done >= total * part:
                say("so far")
                signal.pause()

        act(progress)

    child = Forked(work)
    child.line()
    return child


def interrupting(part: float) -> Callable[[int, int], None]:
    """Return a progress function that is Ctrl-C when so much of the work is done."""

    def progress(done: int, total: int) -> None:
        if total and done >= total * part:
            raise KeyboardInterrupt

    return progress


class TransferCase(FaultCase):
    """A database with some of everything, and a second path."""

    def setUp(self) -> None:
        super().setUp()
        self.fill(tasks=10)
        self.other = os.path.join(self.folder, "other.db")
        self.file = os.path.join(self.folder, "operator.jsonl")

    def fill_large(self, path: str) -> None:
        """Make a database that takes a backup several steps."""
        with OperatorDb(path, durable=False) as db, db.transaction():
            put(db, *(f"large{n}" for n in range(90)), payload=bytes(70_000))

    def store_secrets(self, db: OperatorDb) -> None:
        """Store a secret in each of four places."""
        db.store_config(OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=[f"https://x/?key={SECRET}"]))
        db.namespace("tallies", Tally, key="name").put(Tally(name="two", pin=SECRET))
        wallet = Wallet(owner="me", tallies=[Tally(name="in", pin=SECRET)])
        db.namespace("wallets", Wallet, key="owner").put(wallet)

    def pair(self, db: OperatorDb, value: int) -> None:
        """Change two records together, the first and the last that are walked."""
        with db.transaction():
            put(db, "+first", "~last", reward_lamports=value)

    def refused(self, error: type[OperatorDbError], action: Callable[[], object], *words: str) -> str:
        """Fail unless the action raises the error with these words, and without the secret anywhere."""
        with self.assertRaises(error) as caught:
            action()
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertNotIn(SECRET, "".join(traceback.format_exception(caught.exception)))
        return str(caught.exception)

    def names(self) -> set[str]:
        """Return the names of the files in the folder, without those that SQLite keeps beside an open database."""
        return {name for name in os.listdir(self.folder) if not re.search(r"\.db-(wal|shm)$", name)}

    @contextmanager
    def unchanged(self, path: str = "") -> Iterator[None]:
        """Fail when a record of the database changes, or a file appears or goes in the block."""
        path = path or self.path
        before, names = held(path), self.names()
        yield
        self.assertTrue(
            held(path) == before, "a record has changed"
        )  # a difference would be long in the making
        self.assertEqual(self.names(), names)


class AnExport(TransferCase):
    def test_is_one_snapshot_while_a_writer_goes_on(self) -> None:
        with OperatorDb(self.path) as db:
            self.pair(db, 0)
            out, values = BytesIO(), itertools.count(1)
            db.export(out, progress=lambda *_: in_threads(lambda: self.pair(db, next(values))))
            self.assertGreater(next(values), 20)
        header, *entries = map(json.loads, out.getvalue().splitlines())
        rewards = {e["record"].get("task_id"): e["record"].get("reward_lamports") for e in entries}
        self.assertEqual((rewards["+first"], rewards["~last"]), (0, 0))
        self.assertEqual(header["records"], Counter(entry["namespace"] for entry in entries))

    def test_and_an_import_take_memory_for_a_record_and_not_for_the_whole(self) -> None:
        peaks: dict[str, list[int]] = {"export": [], "import": []}
        for count in (5, 100):
            with OperatorDb(self.other + str(count), durable=False) as db:
                with db.transaction():
                    put(db, *map(str, range(count)), payload=bytes(50_000))
                for name, work in (("export", db.export), ("import", db.import_)):
                    tracemalloc.start()
                    work(self.file)
                    peaks[name].append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.stop()
        for name, (few, many) in peaks.items():
            self.assertLess(many, few + 3_000_000, name)
        with OperatorDb(self.path, durable=False) as db:  # and nothing is kept for each, however small
            with db.transaction():
                put(db, *map(str, range(2000)), payload=bytes(3000))
            for work in (db.export, db.import_):
                blocks = array("q")  # counts the allocated blocks, and allocates none for each count
                work(self.file, progress=lambda *_, seen=blocks: seen.append(sys.getallocatedblocks()))
                middle = len(blocks) // 2
                self.assertLess(min(blocks[middle:]) - min(blocks[:middle]), 700)

    def test_tells_of_its_progress_and_so_do_an_import_and_a_backup(self) -> None:
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            for work in (db.export, other.import_, partial(db.backup, overwrite=True)):
                told: list[tuple[int, int]] = []
                work(self.file, progress=lambda *so_far, told=told: told.append(so_far))
                for total in {
                    total for _, total in told if total
                }:  # a backup tells of pages, then of records
                    known = [done for done, of in told if of == total]
                    self.assertEqual((known, known[-1]), (sorted(known), total))

    def test_shows_secrets_only_when_asked(self) -> None:
        with OperatorDb(self.path) as db:
            self.store_secrets(db)
            for asked in (False, True):
                db.export(self.file, include_secrets=asked)
                text = contents(self.file).decode()
                self.assertEqual((text.count(SECRET), '"***"' in text), (4 * asked, not asked))
                self.assertEqual(json.loads(text.splitlines()[0])["withheld"] == {}, asked)

    def test_is_a_private_file_whatever_the_umask_and_whatever_was_there(self) -> None:
        with OperatorDb(self.path) as db:
            for umask, there in itertools.product((0o000, 0o077), (False, True)):
                if there:
                    os.chmod(self.file, 0o666)
                before = os.umask(umask)
                try:
                    db.export(self.file)
                    db.backup(self.other, overwrite=True)
                finally:
                    os.umask(before)
                for path in (self.file, self.other):
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

    def test_goes_to_any_kind_of_stream(self) -> None:
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)
        with OperatorDb(self.path) as db:
            put(db, "漢字")
            wanted = records(db, include_secrets=False)
            text, printed, from_fifo = StringIO(), TextIOWrapper(BytesIO(), encoding="ascii"), []
            db.export(text)
            with redirect_stdout(printed):
                db.export(sys.stdout)
            in_threads(lambda: db.export(fifo), lambda: from_fifo.append(contents(fifo)))
        for sent in (text.getvalue().encode(), printed.buffer.getvalue(), from_fifo[0]):  # type: ignore[attr-defined]
            lines = sent.splitlines()
            self.assertEqual(json.loads(lines[0])["format"], "operator_db/1")
            self.assertEqual(lines[1:], wanted)
        self.assertTrue(stat.S_ISFIFO(os.stat(fifo).st_mode))

    def test_into_a_slow_pipe_holds_no_snapshot_and_no_lock(self) -> None:
        reader, writer = os.pipe()
        with OperatorDb(self.path) as db, OperatorDb(self.path, timeout=0) as other:
            put(db, "large", payload=bytes(10**6))

            def export() -> None:
                with open(writer, "wb") as pipe:
                    db.export(pipe)

            def read() -> None:
                with open(reader, "rb") as pipe:
                    pipe.read(1)  # the rest does not fit into the pipe: the export waits
                    put(other, "meanwhile")
                    with self.raw() as raw:
                        busy, pages, moved = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                    self.assertEqual((busy, pages, moved, os.stat(self.path + "-wal").st_size), (0, 0, 0, 0))
                    self.assertEqual(pipe.read().count(b"\n"), len(records(db)))

            in_threads(export, read)

    def raw(self) -> Any:
        return closing(sqlite3.connect(self.path, isolation_level=None))

    def test_that_does_not_end_leaves_the_old_file_whole(self) -> None:
        put_contents(self.file, b"old")
        with OperatorDb(self.path) as db:
            for part in (0.01, 0.5, 1.0):
                with self.unchanged(), self.assertRaises(KeyboardInterrupt):
                    db.export(self.file, progress=interrupting(part))
                child = stopped(lambda progress: db.export(self.file, progress=progress), part)
                child.kill()
                self.assertEqual(contents(self.file), b"old")
                for name in os.listdir(self.folder):
                    if name.endswith(".new"):  # the killed child's
                        os.unlink(os.path.join(self.folder, name))
            put(db, "large", payload=bytes(10**6))

            def without_room() -> None:
                with file_limit(500_000):
                    self.assertRaises(StorageError, db.export, self.file)

            with self.unchanged():
                forked(without_room)
            self.assertEqual(contents(self.file), b"old")

    def test_of_a_damaged_record_is_refused_by_its_key(self) -> None:
        put_contents(self.file, b"old")
        with closing(sqlite3.connect(self.path)) as raw, raw:
            raw.execute("UPDATE proofs SET value = replace(value, 'b3V0', 'b3V1')")
        with OperatorDb(self.path) as db:
            self.refused(DamagedError, lambda: db.export(self.file), "proofs:t1")
            self.refused(DamagedError, lambda: db.backup(self.other), "proofs:t1")
        self.assertEqual((contents(self.file), os.path.exists(self.other)), (b"old", False))

    def test_goes_over_a_database_that_was_closed_here_as_over_any_file(self) -> None:
        with OperatorDb(self.other) as closed:
            put(closed, "old")
        with OperatorDb(self.path) as db:
            db.restore(closed.path)
            db.backup(closed.path, overwrite=True)
            db.export(closed.path)

    def test_or_any_other_transfer_keeps_off_the_files_of_a_database_that_is_open_here(self) -> None:
        link, hard = self.path + ".link", self.path + ".hard"
        os.symlink(self.path, link)
        os.link(self.path, hard)
        beside = os.path.join(self.folder, "..", os.path.basename(self.folder), "operator.db")
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            put(db, "in the log")
            for path in (self.path, self.path + "-wal", self.path + "-shm", link, hard, beside):
                for verb in ("export", "import_", "backup", "restore", "write_metrics"):
                    before = [os.stat(self.path + suffix) for suffix in ("", "-wal", "-shm")]
                    for here in (db, other)[: 1 if verb == "restore" else 2]:  # restoring goes through SQLite
                        with self.subTest(path=path, verb=verb, here=here.path):
                            options = {"overwrite": True} if verb == "backup" else {}
                            self.assertRaises(OperatorDbError, getattr(here, verb), path, **options)
                    for old, suffix in zip(before, ("", "-wal", "-shm"), strict=True):
                        new = os.stat(self.path + suffix)
                        self.assertEqual((new.st_ino, new.st_size), (old.st_ino, old.st_size))
            self.assertIsNotNone(db.get_task("in the log"))


PROTOTYPES = r"""{
  "exported_at": "2026-02-21T14:55:55.120394+00:00",
  "stats": {"total_tasks": 3, "task_counts": {"InProgress": 1, "Completed": 1, "Disputed": 1}, "total_sessions": 1, "total_proofs": 1},
  "config": {
    "wallet_pubkey": "4YRpGXNp5gfPE8XqcUAL3FV6xHMJaQkxVccPTSy8hutg", "rpc_url": "https://api.devnet.solana.com",
    "network": "devnet", "capabilities": ["voice", "code", "trading", "social", "email", "image"], "model_preferences": null
  },
  "tasks": [
    {"task_id": "2aotSaHBBZvWyUDt8qztEGesVGiVqg54xiPvBxZvAqFt", "payload": [123, 34, 106, 111, 98, 34, 58, 34, 195, 169, 34, 125],
     "status": "Disputed", "claimed_at": 1774627200, "completed_at": 1774627900,
     "on_chain_signature": "37WpEBkP5eWGkDs98BHyvTA6CMMbt61Hco7qn9khxy4iZJF4iY8y9RghrTdErYD1QDRhXPBZ2uLvAy9R8qRRA4ra",
     "description": "Summarise the readiness report", "reward_lamports": 18446744073709551615, "reward_skr_tokens": null,
     "creator": "AYwAQmXxTLB3ukpRPHV2LC6qA4DCo2hsuSTneNn9xnQN"},
    {"task_id": "task-in-progress", "payload": [], "status": "InProgress", "claimed_at": 1774627300, "completed_at": null,
     "on_chain_signature": null, "description": null, "reward_lamports": 0, "reward_skr_tokens": 5000000000, "creator": null},
    {"task_id": "task-done", "payload": [0, 255, 128], "status": "Completed", "claimed_at": 1774627000,
     "completed_at": 1774627100,
     "on_chain_signature": "65QAodfEi2q6bwa9L1HYumnjpSi18FfyrK3W7HU1wXKGcTVfHCTNGaefjFpqR3e75CphecDXQFY8eZmYZyeHsdzY",
     "description": "done", "reward_lamports": 1, "reward_skr_tokens": null, "creator": null}
  ],
  "sessions": [
    {"session_id": "session_1774627000123",
     "transcript": [{"role": "system", "content": "ClaimTask", "timestamp": 1774627001},
                    {"role": "user", "content": "what is it worth?", "timestamp": 1774627002}],
     "active_task_ids": ["task-in-progress"], "command_history": ["ClaimTask"], "created_at": 1774627000,
     "last_active": 1774627002}
  ]
}"""
GONE = object()  # what a field is set to, to take it away


def deep(levels: int) -> Any:
    """Return so many lists within each other."""
    made: Any = []
    for _ in range(levels):
        made = [made]
    return made


def altered(document: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """Return a JSON document with one field set, or taken away."""
    document = json.loads(json.dumps(document))
    within = document
    for step in place[:-1]:
        within = within[step]
    if value is GONE:
        del within[place[-1]]
    else:
        within[place[-1]] = value
    return document


class AnImport(TransferCase):
    RECORDS: ClassVar[list[tuple[str, tuple[str | int, ...], Any, str]]] = [
        ("tasks", ("reward_lamports",), "1", "reward_lamports"), ("tasks", ("reward_lamports",), -1, "reward_lamports"),
        ("tasks", ("reward_skr_tokens",), 2**64, "reward_skr_tokens"), ("tasks", ("claimed_at",), True, "claimed_at"),
        ("tasks", ("completed_at",), 1.5, "completed_at"), ("tasks", ("payload",), "not base64!", "payload"),
        ("tasks", ("payload",), [1, 2], "payload"), ("tasks", ("status",), "lost", "status"),
        ("tasks", ("description",), "\ud800", "description"), ("tasks", ("task_id",), "a\nb", "task_id"),
        ("tasks", ("task_id",), GONE, "task_id"), ("tasks", ("mood",), 1, "mood"), ("tasks", ("history",), {}, "history"),
        ("tasks", ("history", 0, "at"), "then", "at"), ("tasks", ("history", 0, "mood"), None, "mood"),
        ("sessions", ("transcript", 0, "content"), None, "transcript"), ("sessions", ("transcript", 0, "mood"), "", "mood"),
        ("sessions", ("active_task_ids",), "t1", "active_task_ids"), ("proofs", ("outputs",), GONE, "outputs"),
        ("proofs", ("proof_hash",), "00" * 32, "proof_hash"), ("proofs", ("submitted",), "yes", "submitted"),
        ("config", ("keypairs",), {"main": 5, "more": SECRET}, "keypairs"),
        ("config", ("keypairs",), {"main": "***", "more": SECRET}, "keypairs"),
        ("config", ("rpc_endpoints",), [SECRET, 7], "rpc_endpoints"), ("config", ("rpc_endpoints",), SECRET, "rpc_endpoints"),
        ("config", ("rpc_endpoints",), ["***", SECRET], "rpc_endpoints"),
        ("config", ("model_preferences",), {"a": deep(150)}, "model_preferences"), ("tallies", ("count",), "many", "count"),
        ("tallies", ("pin",), [SECRET], "pin"),
        ("tallies", ("name",), "another", "another"),
    ]  # fmt: skip
    ENTRIES: ClassVar[list[tuple[str, tuple[str, ...], Any]]] = [
        ("tasks", ("record",), [1]), ("tasks", ("record",), GONE), ("tasks", ("more",), 1),
        ("tasks", ("namespace",), "session_log"), ("tasks", ("namespace",), "No such"), ("tasks", ("namespace",), None),
        ("tasks", ("namespace",), "proofs"), ("tallies", ("namespace",), "tasks"), ("tallies", ("key",), GONE),
    ]  # fmt: skip
    LINES: ClassVar[list[tuple[bytes, str]]] = [
        (b'{"namespace":"config","record":{"network":"\xff"}}', "UTF-8"),
        (b'{"namespace":"config","record":{"model_preferences":{"a":NaN}}}', "NaN"),
        (b'{"namespace":"config","record":{"model_preferences":{"a":-Infinity}}}', "Infinity"),
        (b'{"namespace":"config","record":{"model_preferences":{"a":1e999}}}', "model_preferences"),
        (b'{"namespace":"config","record":' + b"[" * 10**5, "deep"),
        (b'{"namespace":"config","record":{"keypairs":{"main":"' + SECRET.encode(), "JSON"),
        (b"[1]", "object"),
        (b"7", "object"),
    ]

    def setUp(self) -> None:
        super().setUp()
        with OperatorDb(self.path) as db:
            db.export(self.file, include_secrets=True)
        self.header, *self.lines = contents(self.file).splitlines()
        self.entries = [json.loads(line) for line in self.lines]

    def text(self, *lines: bytes, **header: Any) -> BytesIO:
        """Return an export of these lines, by default with a header that counts them."""
        counts = Counter(str(json.loads(line)["namespace"]) for line in lines if "records" not in header)
        return BytesIO(
            b"\n".join(
                (json.dumps({**json.loads(self.header), "records": counts, **header}).encode(), *lines)
            )
        )

    def with_last(self, namespace: str, place: tuple[str | int, ...], value: Any) -> BytesIO:
        """Return the export with an altered entry of a namespace at its end."""
        entry = next(entry for entry in self.entries if entry["namespace"] == namespace)
        return self.text(*self.lines, json.dumps(altered(entry, place, value)).encode())

    def test_refuses_what_is_wrong_by_line_and_field_and_takes_nothing(self) -> None:
        last = f"line {len(self.lines) + 2}"
        with OperatorDb(self.other) as db:
            db.namespace("tallies", Tally, key="name")
            db.append_transcript("stays", "user", "here")
            for name, place, value, word in self.RECORDS:
                with self.subTest(namespace=name, place=place, value=value), self.unchanged(self.other):
                    text = self.with_last(name, ("record", *place), value)
                    self.refused(InvalidRecordError, lambda text=text: db.import_(text), last, word)
            for name, place, value in self.ENTRIES:
                with self.subTest(namespace=name, place=place, value=value), self.unchanged(self.other):
                    text = self.with_last(name, place, value)
                    self.refused(InvalidRecordError, lambda text=text: db.import_(text), last)
            for line, word in self.LINES:
                with self.subTest(line=line[:99]), self.unchanged(self.other):
                    text = self.text(*self.lines, line, records={})
                    self.refused(InvalidRecordError, lambda text=text: db.import_(text), last, word)

    def test_refuses_what_is_not_whole_or_not_an_export_or_from_the_future(self) -> None:
        counts = json.loads(self.header)["records"]
        whole = self.text(*self.lines, records=counts).getvalue()
        cases: list[tuple[type[OperatorDbError], BytesIO, str]] = [
            (InvalidRecordError, self.text(*self.lines[:-1], records=counts), "whole"),
            (InvalidRecordError, self.text(*self.lines, self.lines[-1], records=counts), "whole"),
            (InvalidRecordError, self.text(records=counts), "whole"),
            (InvalidRecordError, self.text(*self.lines, records=None), "line 1"),
            (InvalidRecordError, BytesIO(whole[: len(whole) // 2]), "line"),
            (NewerSchemaError, self.text(*self.lines, schema_version=99), "99"),
            (NewerSchemaError, self.text(*self.lines, format="operator_db/2"), "operator_db/2"),
            *((InvalidRecordError, BytesIO(text), "export") for text in (b"", b"\n", b"some text", b"{}", b"[]", b"[7]")),
        ]  # fmt: skip
        with OperatorDb(self.other) as db:
            for error, text, word in cases:
                with self.subTest(text=text.getvalue()[:99]), self.unchanged(self.other):
                    self.refused(error, lambda text=text: db.import_(text), word)

    def test_says_what_it_added_replaced_and_left_and_again_changes_nothing(self) -> None:
        with OperatorDb(self.other) as db:
            wanted = json.loads(self.header)["records"]
            self.assertEqual(db.import_(self.file), {name: {"added": n} for name, n in wanted.items()})
            with self.unchanged(self.other):
                again = db.import_(Path(self.file))
                self.assertEqual(again, {name: {"unchanged": n} for name, n in wanted.items()})
            self.assertEqual(records(db), self.lines)
            db.delete_task("t0")
            db.update_task_status("t1", "disputed")
            db.store_config(OperatorConfig(capabilities=["other"], keypairs={"main": "k" * 40}))
            db.namespace("tallies", Tally, key="name").update("one", lambda tally: replace(tally, count=9))
            counts = db.import_(StringIO(contents(self.file).decode()))
            self.assertEqual(counts["tasks"], {"added": 1, "unchanged": wanted["tasks"] - 1})
            self.assertEqual((counts["config"], counts["tallies"]), ({"replaced": 1}, {"replaced": 1}))
            db.delete_task("t1")
            db.import_(self.file)
            self.assertEqual(records(db), self.lines)

    def test_keeps_what_the_database_knows_more_of(self) -> None:
        with OperatorDb(self.path) as db:
            db.update_task_status("t0", "completed", signature="sig")
            db.append_transcript("s0", "user", "later")
            db.append_command("s1", "later")
            db.mark_proof_submitted("t3", "sig")
            with self.unchanged():
                counts = db.import_(self.file)
            for name in ("tasks", "sessions", "proofs"):
                self.assertEqual(set(counts[name]), {"unchanged"})
            db.export(self.file)
        with OperatorDb(self.other) as db:  # and what the file knows more of arrives
            db.import_(self.text(*self.lines))
            counts = db.import_(self.file)
            for name, count in (("tasks", 1), ("sessions", 2), ("proofs", 1)):
                self.assertEqual(counts[name]["replaced"], count, name)
            self.assertEqual(db.check(), [])
        self.assertEqual(held(self.other), held(self.path))

    def test_never_puts_a_different_proof_or_session_over_the_one_that_is_there(self) -> None:
        last = f"line {len(self.lines) + 2}"
        cases = [
            ("proofs", "outputs", "AAAA", "t1"),
            ("sessions", "command_history", ["another"], "s0"),
            ("sessions", "transcript", [{"role": "user", "content": "another", "timestamp": 0}], "s0"),
        ]  # fmt: skip
        with OperatorDb(self.path) as db:
            other = replace(db.list_proofs()[0], outputs=b"\0\0\0")
        self.entries = [
            altered(e, ("record", "evidence_hash"), other.evidence_hash) if e["namespace"] == "proofs" else e
            for e in self.entries
        ]
        with OperatorDb(self.other) as db:
            db.import_(self.file)
            put(db, "more")
            for namespace, name, value, key in cases:
                with self.subTest(name=name), self.unchanged(self.other):
                    text = self.with_last(namespace, ("record", name), value)
                    self.refused(ConflictError, lambda text=text: db.import_(text), last, key)

    def test_never_puts_stars_over_a_secret(self) -> None:
        with OperatorDb(self.path) as db:
            self.store_secrets(db)
            db.export(self.file)
            before = records(db)
            with self.unchanged():
                counts = db.import_(self.file)
                self.assertEqual({what for count in counts.values() for what in count}, {"unchanged"})
            db.namespace("tallies", Tally, key="name").update("two", lambda tally: replace(tally, count=5))
            db.store_config(replace(db.get_config() or OperatorConfig(), network="devnet"))
        with OperatorDb(self.path) as db:  # a process that does not know the namespaces
            self.assertEqual(db.import_(self.file)["tallies"], {"unchanged": 1, "replaced": 1})
            self.assertEqual(records(db), before)
        with OperatorDb(self.other) as db:
            self.refused(InvalidRecordError, lambda: db.import_(self.file), "line", "***")
            self.assertEqual(records(db), [])
            for name, record_type, key in (("tallies", Tally, "name"), ("wallets", Wallet, "owner")):
                db.namespace(name, record_type, key=key)
            db.import_(self.file)
            self.assertNotIn(b"***", b"".join(records(db)))

    def test_keeps_a_secret_that_a_record_cannot_be_made_without_and_checks_the_rest(self) -> None:
        @dataclass
        class Card:
            name: str
            pin: str = field(metadata={"secret": True})

        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            db.namespace("cards", Card, key="name").put(Card("one", SECRET))
            db.export(self.file)
            with self.unchanged():
                self.assertEqual(db.import_(self.file)["cards"], {"unchanged": 1})
                text = contents(self.file).decode().replace('"name":"one"', '"name":1')
                self.refused(InvalidRecordError, lambda: db.import_(StringIO(text)), "line", "name")
            other.namespace("cards", Card, key="name")
            with self.unchanged(self.other):
                self.refused(InvalidRecordError, lambda: other.import_(self.file), "line", "pin")

    def test_of_an_export_into_a_new_file_gives_the_same_export(self) -> None:
        with OperatorDb(self.path, durable=False) as db:
            devices = db.namespace("devices", PairedDevice, key="device_id", status="status", at="last_seen")
            odd: dict[str, Any] = {
                "token": SECRET,
                "inner": Inner("a", b"\xff"),
                "anything": [1, None, {"b": 2.5}],
            }
            devices.put(PairedDevice(device_id="d:é", **odd))
            devices.put(PairedDevice(device_id="lost", status="lost", last_seen=-5))
            put(db, "%:漢字", description='\0\x1b"\\\u202e\u2028', reward_lamports=2**64 - 1)
            db.export(self.file, include_secrets=True)
            wanted, rows = records(db), self.rows(self.path)
        for known in (False, True):
            path = f"{self.other}{known}"
            with OperatorDb(path) as db:
                if known:
                    db.namespace("devices", PairedDevice, key="device_id", status="status", at="last_seen")
                db.import_(self.file)
                self.assertEqual(records(db), wanted)
                self.assertEqual((self.rows(path), db.check()), (rows, []))

    def rows(self, path: str) -> list[tuple[Any, ...]]:
        """Return the columns of the operator's own namespace, as any program sees them."""
        with closing(sqlite3.connect(path)) as raw:
            return raw.execute("SELECT * FROM devices ORDER BY key").fetchall()

    def test_reads_its_input_before_it_takes_the_write_lock(self) -> None:
        reader, writer = os.pipe()
        begun = threading.Event()
        with OperatorDb(self.other) as db, OperatorDb(self.other, timeout=0) as another:

            def feed() -> None:
                with open(writer, "wb") as pipe:
                    pipe.write(b"\n".join((self.header, *self.lines[:3])) + b"\n")
                    pipe.flush()
                    self.assertTrue(begun.wait(10))
                    put(another, "meanwhile")
                    pipe.write(b"\n".join(self.lines[3:]))

            def read() -> None:
                with open(reader, "rb") as pipe:
                    db.import_(pipe, progress=lambda *_: begun.set())

            in_threads(feed, read)
            self.assertEqual(len(records(db)), len(self.lines) + 1)

    def test_that_does_not_end_takes_nothing(self) -> None:
        with OperatorDb(self.other) as db:
            put(db, "there")
            for part in (0.1, 0.5, 1.0):
                with self.unchanged(self.other), self.assertRaises(KeyboardInterrupt):
                    db.import_(self.file, progress=interrupting(part))
                put(db, f"no lock is held {part}")
        for part in (0.1, 1.0):
            with self.unchanged(self.other):
                stopped(self.imported, part).kill()
        self.check_sound(self.other)

    def imported(self, progress: Any) -> None:
        with OperatorDb(self.other) as db:
            db.import_(self.file, progress=progress)


class ThePrototypesExport(TransferCase):
    def setUp(self) -> None:
        super().setUp()
        self.document = json.loads(PROTOTYPES)

    def test_arrives_with_every_field_pretty_printed_or_on_one_line(self) -> None:
        config, tasks, (session,) = (self.document[name] for name in ("config", "tasks", "sessions"))
        for number, text in enumerate((PROTOTYPES, json.dumps(self.document), "\ufeff" + PROTOTYPES)):
            with self.subTest(number=number), OperatorDb(f"{self.other}{number}") as db:
                counts = db.import_(BytesIO(text.encode()))
                self.assertEqual(counts.pop("proofs"), {"left_behind": 1})
                added = {"config": {"added": 1}, "tasks": {"added": 3}, "sessions": {"added": 1}}
                self.assertEqual(counts, added)
                for old in tasks:
                    task = db.get_task(old["task_id"])
                    assert task
                    wanted = {**old, "payload": bytes(old["payload"]), "status": TaskStatus(old["status"])}
                    self.assertEqual({name: getattr(task, name) for name in old}, wanted)
                    self.assertEqual(task.history[-1].status, task.status)
                said = [TranscriptEntry(**entry) for entry in session["transcript"]]
                wanted = SessionState(**{**session, "transcript": said})
                self.assertEqual(db.get_session(session["session_id"]), wanted)
                wanted = {k: config[k] for k in ("wallet_pubkey", "network", "capabilities")}
                self.assertEqual(db.get_config(), OperatorConfig(rpc_endpoints=[config["rpc_url"]], **wanted))
                self.assertEqual((db.check(), db.list_proofs()), ([], []))
                again = db.import_(BytesIO(text.encode()))
                self.assertEqual((again["tasks"], again["sessions"]), ({"unchanged": 3}, {"unchanged": 1}))

    def test_that_is_damaged_is_refused_by_place(self) -> None:
        cases: list[tuple[tuple[str | int, ...], Any, tuple[str, ...]]] = [
            (("tasks", 1, "payload"), [256], ("tasks[1].payload",)), (("tasks", 1, "payload"), [-1], ("tasks[1].payload",)),
            (("tasks", 1, "payload"), ["x"], ("tasks[1].payload",)), (("tasks", 1, "payload"), "AAAA", ("tasks[1].payload",)),
            (("tasks", 1, "payload"), 10**12, ("tasks[1].payload",)),
            (("tasks", 2, "payload"), GONE, ("tasks[2]", "payload")),
            (("tasks", 0, "status"), "Lost", ("tasks[0]", "status")),
            (("tasks", 0, "task_id"), GONE, ("tasks[0]", "task_id")),
            (("tasks", 2, "reward_lamports"), -1, ("tasks[2]", "reward_lamports")),
            (("tasks", 2, "mood"), 1, ("tasks[2]", "mood")), (("tasks", 2), 7, ("tasks[2]",)), (("tasks",), {}, ("tasks",)),
            (("tasks",), GONE, ("export",)), (("sessions", 0, "transcript", 1, "content"), 5, ("sessions[0]", "transcript")),
            (("sessions", 0, "mood"), 5, ("sessions[0]", "mood")), (("sessions", 0), None, ("sessions[0]",)),
            (("config", "capabilities"), "voice", ("config", "capabilities")),
            (("config", "mood"), "voice", ("config", "mood")),
            (("config", "rpc_url"), {SECRET: 1}, ("config", "rpc_endpoints")), (("config",), [SECRET], ("config",)),
            (("stats", "total_tasks"), 4, ("total_tasks",)), (("stats", "total_sessions"), 0, ("total_sessions",)),
            (("proofs",), [], ("proofs",)),
        ]  # fmt: skip
        with OperatorDb(self.other) as db:
            put(db, "there")
            for place, value, words in cases:
                with self.subTest(place=place, value=value), self.unchanged(self.other):
                    text = StringIO(json.dumps(altered(self.document, place, value)))
                    self.refused(InvalidRecordError, lambda text=text: db.import_(text), *words)
            whole = PROTOTYPES
            for text in (whole[:-1], whole[:500], whole + "x", whole.replace("null", "NaN", 1)):
                with self.subTest(text=text[-9:]), self.unchanged(self.other):
                    self.refused(InvalidRecordError, lambda text=text: db.import_(StringIO(text)))

    def test_without_config_or_sessions_is_taken_too(self) -> None:
        with OperatorDb(self.other) as db:
            text = json.dumps({**self.document, "config": None, "sessions": [], "stats": {}})
            self.assertEqual(db.import_(StringIO(text)), {"tasks": {"added": 3}})
            self.assertIsNone(db.get_config())


class ABackup(TransferCase):
    def test_is_one_state_while_a_writer_goes_on_and_opens_as_a_database(self) -> None:
        self.fill_large(self.path)
        with OperatorDb(self.path) as db:
            self.pair(db, 0)
            before, values = records(db), itertools.count(1)
            db.backup(self.other, progress=lambda *_: in_threads(lambda: self.pair(db, next(values))))
            self.assertGreater(next(values), 3)
        self.assertEqual(set(os.listdir(self.folder)), {"operator.db", "other.db"})
        with OperatorDb(self.other) as copied:
            self.assertEqual((records(copied), copied.check()), (before, []))
            self.assertEqual(copied.namespace("tallies", Tally, key="name").count(), 1)
            self.pair(copied, 7)

    def test_takes_no_place_that_is_taken_not_even_meanwhile(self) -> None:
        with OperatorDb(self.path) as db:
            for taken in ("", "-wal"):
                for when in (0, 1):
                    with self.subTest(taken=taken, when=when):
                        appears = partial(put_contents, self.other + taken, b"somebody's")
                        if not when:
                            appears()
                        overwrite = taken == "-wal"
                        with self.assertRaises(StorageError) as caught:
                            db.backup(self.other, overwrite=overwrite, progress=lambda *_, it=appears: it())
                        self.assertIn(self.other + taken, str(caught.exception))
                        self.assertEqual(contents(self.other + taken), b"somebody's")
                        self.assertEqual(
                            set(os.listdir(self.folder)) - {"operator.db-wal", "operator.db-shm"},
                            {"operator.db", "other.db" + taken},
                        )
                        os.unlink(self.other + taken)
            put_contents(self.other, b"old")
            db.backup(self.other, overwrite=True)
        self.assertEqual(held(self.other), held(self.path))

    def test_that_does_not_end_leaves_nothing_or_what_was_there(self) -> None:
        self.fill_large(self.path)
        db = self.enterContext(OperatorDb(self.path))

        def without_room() -> None:
            with file_limit(2 * 10**6):
                self.refused(StorageError, lambda: db.backup(self.other, overwrite=True))

        for old in (False, True):
            if old:
                put_contents(self.other, b"old")
            with self.unchanged():
                forked(without_room)
                for part in (0.01, 1.0):
                    with self.assertRaises(KeyboardInterrupt):
                        db.backup(self.other, overwrite=True, progress=interrupting(part))
            for part in (0.01, 1.0):
                stopped(
                    lambda progress: db.backup(self.other, overwrite=True, progress=progress), part
                ).kill()
            self.assertEqual(os.path.exists(self.other), old)
        self.assertEqual(contents(self.other), b"old")

    def test_and_restore_and_compact_are_refused_inside_ones_own_block(self) -> None:
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            other.backup(self.file)
            for verb in (partial(db.backup, self.path + "2"), partial(db.restore, self.file), db.compact):
                with self.unchanged(), db.transaction():
                    self.refused(ConflictError, verb, "transaction")


class ARestore(TransferCase):
    def setUp(self) -> None:
        super().setUp()
        self.fill_large(self.other)
        self.old, self.new = held(self.path), held(self.other)

    def test_replaces_everything_for_all_who_have_it_open(self) -> None:
        def go_on(say: Callable[[object], None]) -> list[str]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            with OperatorDb(self.path) as db:
                say(len(ids(db)))
                signal.sigwait({signal.SIGUSR1})
                seen = ids(db)
                put(db, "from the other process")
                return seen

        child = Forked(go_on)
        self.assertEqual(child.line(), "10")
        with OperatorDb(self.path) as db, OperatorDb(self.path) as another:
            tallies = another.namespace("tallies", Tally, key="name")
            self.assertEqual((len(ids(another)), tallies.count()), (10, 1))
            db.restore(self.other)
            self.assertTrue(records(db) == records(another) == self.new)
            os.kill(child.pid, signal.SIGUSR1)
            self.assertEqual(len(child.result()), 90)
            put(another, "from the other handle")
            self.assertEqual((len(ids(db)), tallies.put(Tally(name="again"))), (92, True))
        self.check_sound()
        self.assertEqual(set(os.listdir(self.folder)), {"operator.db", "other.db"})

    def test_of_what_is_no_sound_backup_changes_nothing(self) -> None:
        damaged, newer, foreign, text, cut = (os.path.join(self.folder, f"{n}.db") for n in range(5))
        for path in (damaged, newer):
            put_contents(path, contents(self.other))
        with closing(sqlite3.connect(damaged)) as raw, raw:
            raw.execute("UPDATE tasks SET crc = crc + 1 WHERE key = 'tasks:large7'")
        with closing(sqlite3.connect(newer)) as raw:
            raw.execute("PRAGMA user_version = 99")
        with closing(sqlite3.connect(foreign)) as raw, raw:
            raw.execute("CREATE TABLE theirs(a)")
        put_contents(text, b"some text " * 99)
        put_contents(cut, contents(self.other)[:-5000])
        with OperatorDb(self.path) as db:
            for error, path in (
                (DamagedError, damaged),
                (NewerSchemaError, newer),
                (ForeignFileError, foreign),
                (ForeignFileError, text),
                (DamagedError, cut),
                (StorageError, self.path + ".missing"),
                (ForeignFileError, self.folder),
            ):
                with self.subTest(path=path), self.unchanged():
                    self.refused(error, lambda path=path: db.restore(path), path)
                    put(db, "t0", claimed_at=0, payload=random.Random(0).randbytes(0))  # no lock is held

    def test_that_does_not_end_leaves_what_was_there(self) -> None:
        def without_room() -> None:
            with file_limit(2 * 10**6):
                self.refused(StorageError, lambda: db.restore(self.other), self.path)
            self.assertTrue(records(db) == self.old)

        with OperatorDb(self.path) as db:
            forked(without_room)
            for part in (0.01, 0.5):
                with self.unchanged(), self.assertRaises(KeyboardInterrupt):
                    db.restore(self.other, progress=interrupting(part))
                put(db, "t0", claimed_at=0)  # no lock is held
            self.old = records(db)
        for part in (0.01, 0.5, 1.0):
            stopped(self.restored, part).kill()
            self.assertTrue(held(self.path) in (self.old, self.new))
            self.check_sound()
        self.restored(None)
        self.assertTrue(held(self.path) == self.new)

    def restored(self, progress: Any) -> None:
        with OperatorDb(self.path) as db:
            db.restore(self.other, progress=progress)

    def test_killed_at_any_moment_leaves_the_old_or_the_new(self) -> None:
        for delay in (0.002, 0.01, 0.02, 0.04):
            Forked(lambda _: self.restored(None)).kill(delay)
            self.assertTrue(held(self.path) in (self.old, self.new))
            self.check_sound()

    def test_waits_for_another_process_until_its_timeout(self) -> None:
        child = holding(self.path)
        with self.assertRaises(BusyError), OperatorDb(self.path, timeout=0.05) as db:
            db.restore(self.other)
        os.kill(child.pid, signal.SIGUSR1)
        child.result()
        with OperatorDb(self.path) as db:
            self.assertEqual(len(records(db)), len(self.old) + 1)


class Compacting(TransferCase):
    def test_makes_the_file_smaller_and_keeps_every_record_in_its_order(self) -> None:
        with OperatorDb(self.path, durable=False) as db, OperatorDb(self.path) as another:
            with db.transaction():
                names = [f"{n * 7919 % 400:03}" for n in range(400)]
                put(db, *names, payload=bytes(3000), claimed_at=5)
            for name in names[::2]:
                db.delete_task(name)
            before, order, size = records(db), db.list_tasks(), os.stat(self.path).st_size
            freed = db.compact()
            self.assertLess(os.stat(self.path).st_size, size * 0.7)
            self.assertGreater(freed, size * 0.3)
            self.assertEqual((records(another), another.list_tasks()), (before, order))
            put(another, "goes on")
        self.check_sound()

    def test_without_room_changes_nothing(self) -> None:
        self.fill_large(self.path)
        size = os.stat(self.path).st_size

        def without_room() -> None:
            with OperatorDb(self.path) as db:
                with file_limit(size - 2 * 10**6):
                    self.refused(StorageError, db.compact)
                put(db, "room again")

        before = held(self.path)
        forked(without_room)
        self.assertEqual(len(held(self.path)), len(before) + 1)
        self.check_sound()


Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scraped(text: str) -> Samples:
    """Parse Prometheus's text format, more strictly than it does; return the samples by name and labels."""
    assert text.endswith("\n") and not text.endswith("\n\n")
    kinds: dict[str, str] = {}
    said, found = "", Samples()
    for line in text[:-1].split("\n"):
        if told := re.fullmatch(r"# HELP ([a-z_]+) \S.*", line):
            said = told[1]
            assert said not in kinds, line
        elif told := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge|histogram)", line):
            assert told[1] == said and said not in kinds, line
            kinds[said] = told[2]
            assert said.endswith("_total") == (told[2] == "counter"), line
        else:
            told = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)', line)
            assert told, line
            endings = ("_bucket", "_sum", "_count") if kinds[said] == "histogram" else ("",)
            assert told[1] in [said + ending for ending in endings], line
            (which, _), *others = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', told[2])
            assert which == "database", line
            labels = tuple(others)
            assert labels not in found.setdefault(told[1], {}), line
            found[told[1]][labels] = float(told[3])
            assert 0 <= found[told[1]][labels] < float("inf"), line
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        series: dict[Any, list[tuple[float, float]]] = {}
        for labels, count in found[name + "_bucket"].items():
            assert labels[-1][0] == "le"
            series.setdefault(labels[:-1], []).append((float(labels[-1][1]), count))
        for labels, steps in series.items():
            assert steps == sorted(steps) and [n for _, n in steps] == sorted(n for _, n in steps), name
            assert steps[-1] == (float("inf"), found[name + "_count"][labels]), name
        assert series.keys() == found[name + "_sum"].keys() == found[name + "_count"].keys(), name
    return found


class Metrics(TransferCase):
    def test_count_every_call_of_sixteen_threads_and_its_error_by_name(self) -> None:
        interval = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, interval)
        with OperatorDb(self.path, durable=False) as db:
            tallies = db.namespace("tallies", Tally, key="name")

            def work(worker: int) -> None:
                for n in range(25):
                    put(db, f"{worker}:{n}")
                    for _ in range(4):
                        db.get_task("t1")
                    with suppress(NotFoundError):
                        db.update_task_status("nobody", "completed")
                    with suppress(ConflictError):
                        db.store_proof(proof("t1", b"different"))
                    with suppress(InvalidRecordError):
                        tallies.put(None)  # type: ignore[arg-type]
                    tallies.get("one")

            sys.setswitchinterval(1e-6)
            began = time.perf_counter()
            self.assertEqual(crowd(16, work)(), [])
            lasted = time.perf_counter() - began
            sys.setswitchinterval(interval)
            operations = db.stats().operations
        expected: list[tuple[str, int, dict[str, int]]] = [
            ("store_task", 400, {}),
            ("get_task", 1600, {}),
            ("update_task_status", 400, {"NotFoundError": 400}),
            ("store_proof", 400, {"ConflictError": 400}),
            ("tallies.put", 400, {"InvalidRecordError": 400}),
            ("tallies.get", 400, {}),
        ]  # fmt: skip
        for name, count, errors in expected:
            with self.subTest(name=name):
                found = operations[name]
                self.assertEqual((found.count, sum(found.buckets), found.errors), (count, count, errors))
                self.assertTrue(0 < found.seconds < lasted * 16)
        self.assertEqual(operations.keys() - {"stats"}, {name for name, *_ in expected})

    def test_put_each_latency_into_its_bucket_and_add_them_up(self) -> None:
        latency = operator_db.Latency()
        bounds = latency.bounds
        for number, bound in enumerate(bounds):
            for _ in range(number + 1):
                latency.add(bound)
        latency.add(0.0)
        latency.add(bounds[-1] * 2)
        below = list(range(1, len(bounds) + 1))
        self.assertEqual(latency.buckets, [below[0] + 1, *below[1:], 1])
        self.assertEqual(latency.count, sum(below) + 2)
        total = sum(bound * (n + 1) for n, bound in enumerate(bounds)) + bounds[-1] * 2
        self.assertAlmostEqual(latency.seconds, total)
        self.assertEqual((bounds, bounds[0] <= 1e-4, bounds[-1] >= 1), (tuple(sorted(bounds)), True, True))

    def test_name_the_database_whatever_its_path_holds(self) -> None:
        path = os.path.join(self.folder, 'a "b"\\\n.db')
        with OperatorDb(path) as db:
            text = db.prometheus()
        scraped(text)
        self.assertIn(r'a \"b\"\\\n.db"', text)

    def test_begin_anew_in_a_forked_child(self) -> None:
        with OperatorDb(self.path) as db:
            tallies = db.namespace("tallies", Tally, key="name")
            tallies.put(Tally(name="one"))
            put(db, "t")
            self.assertEqual(forked(lambda: db.stats().operations), {})
            self.assertEqual({"store_task", "tallies.put"} - db.stats().operations.keys(), set())

    def test_take_fixed_memory_however_many_calls_there_were(self) -> None:
        with OperatorDb(self.path) as db:
            for calls in (100, 3000):
                before = sys.getallocatedblocks()
                for _ in range(calls):
                    db.get_task("t1")
                kept = sys.getallocatedblocks() - before
        self.assertLess(kept, 1000)

    def test_in_prometheuss_format_say_what_stats_says(self) -> None:
        with OperatorDb(self.path) as db:
            put(db, "t")
            db.namespace("devices", PairedDevice, key="device_id").put(PairedDevice(device_id="d"))
            with suppress(NotFoundError):
                db.update_task_status("nobody", "completed")
            found, stats = scraped(db.prometheus()), db.stats()
        by = {  # what is labelled so, and in stats
            "records": ("namespace", stats.records), "namespace_bytes": ("namespace", stats.bytes),
            "tasks": ("status", stats.tasks), "file_bytes": ("file", stats.files),
        }  # fmt: skip
        for name, (label, values) in by.items():
            self.assertEqual(found[f"operator_db_{name}"], {((label, str(k)),): v for k, v in values.items()})
        self.assertEqual(found["operator_db_unsubmitted_proofs"], {(): stats.unsubmitted_proofs})
        self.assertEqual(found["operator_db_free_bytes"], {(): stats.free})
        counts = found["operator_db_operation_duration_seconds_count"]
        counted = {labels[0][1]: count for labels, count in counts.items() if count}
        self.assertEqual(counted, {"store_task": 1, "devices.put": 1, "update_task_status": 1})
        failed = (("operation", "update_task_status"), ("error", "NotFoundError"))
        self.assertEqual(found["operator_db_operation_errors_total"], {failed: 1})
        self.assertTrue(all(name.startswith("operator_db_") for name in found))

    def test_of_what_it_holds_are_the_truth(self) -> None:
        with OperatorDb(self.path) as db:
            stats = db.stats()
            lengths = [len(s.transcript) + len(s.command_history) for s in db.list_sessions()]
            self.assertEqual(
                stats.records,
                {
                    "tasks": 10,
                    "sessions": 3,
                    "session_log": sum(lengths),
                    "proofs": 5,
                    "config": 1,
                    "tallies": 1,
                },
            )
            self.assertEqual(
                (stats.tasks, stats.unsubmitted_proofs),
                (db.count_tasks(), len(db.list_proofs(submitted=False))),
            )
            self.assertEqual(set(stats.tasks.values()), {2})
            for name, suffix in (("database", ""), ("wal", "-wal"), ("shm", "-shm")):
                self.assertEqual(stats.files[name], os.stat(self.path + suffix).st_size)
            self.assertEqual((stats.path, stats.schema_version), (self.path, self.raw_pragma("user_version")))
            self.assertTrue(all(size >= 8192 for size in stats.bytes.values()), stats.bytes)
            self.assertLessEqual(sum(stats.bytes.values()) + stats.free, stats.files["database"])
            self.fill_large(self.path)
            for n in range(90):
                db.delete_task(f"large{n}")
            self.assertEqual(
                db.stats().free, self.raw_pragma("freelist_count") * self.raw_pragma("page_size")
            )
            self.assertGreater(db.stats().free, 10**6)

    def raw_pragma(self, name: str) -> Any:
        with closing(sqlite3.connect(self.path)) as raw:
            return raw.execute(f"PRAGMA {name}").fetchone()[0]

    def test_are_written_to_a_file_that_is_replaced_as_a_whole_and_that_others_can_read(self) -> None:
        target = os.path.join(self.folder, "operator_db.prom")
        with OperatorDb(self.path) as db:
            for umask in (0o000, 0o022, 0o077):
                before = os.umask(umask)
                try:
                    db.write_metrics(target)
                finally:
                    os.umask(before)
                with open(target, encoding="utf-8") as file:
                    self.assertEqual(stat.S_IMODE(os.stat(target).st_mode), 0o644)
                    db.write_metrics(Path(target))
                    self.assertNotEqual(os.stat(target).st_ino, os.fstat(file.fileno()).st_ino)
                    scraped(file.read())  # who reads meanwhile goes on with the old one, whole
            whole = contents(target)

            def without_room() -> None:
                db.stats()
                with file_limit(100):
                    self.refused(StorageError, lambda: db.write_metrics(target), target)

            with self.unchanged():
                forked(without_room)
            self.assertEqual(contents(target), whole)
            self.assertEqual(self.names(), {"operator.db", "operator_db.prom"})


STEERING = "\x1b]0;owned\x07\r\n\t\x9b31m\u202e\u200b é漢字\U0001f600"


def columns_of(text: str) -> int:
    """Return how many columns a terminal gives to a text."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


class Console(TransferCase):
    """The command line on a database with some of everything, run here unless a process of its own matters."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(mock.patch.dict(os.environ, {"AGENC_DB_PATH": self.path, "HOME": self.folder}))
        for name in ("COLUMNS", "LINES", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "LC_ALL"):
            os.environ.pop(name, None)
        now = int(time.time())
        with OperatorDb(self.path) as db:
            put(db, "é字\U0001f600", claimed_at=now - 3 * DAY, description=STEERING)
            put(db, "漢字" * 12, claimed_at=now, description="漢字 é " * 30, reward_lamports=1_500_000_000)
            put(db, "odd", claimed_at=2**63 - 1, reward_skr_tokens=7)
            db.append_transcript("voice", "user", STEERING + "漢字" * 50)
            db.store_config(OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=[SECRET]))

    def cli(self, *arguments: str, stdin: bytes = b"", encoding: str = "utf-8") -> tuple[int, str, str]:
        """Return the exit status, and what is written to standard output and standard error."""
        out, err = (TextIOWrapper(BytesIO(), encoding=encoding) for _ in range(2))
        read = TextIOWrapper(BytesIO(stdin), encoding=encoding)
        with mock.patch.multiple(sys, stdin=read, stdout=out, stderr=err):
            try:
                status = operator_db.main(list(arguments))
            except SystemExit as ended:
                status = int(ended.code or 0)
        for stream in (out, err):
            stream.flush()
        texts: list[bytes] = [stream.buffer.getvalue() for stream in (out, err)]  # type: ignore[attr-defined]
        return (
            status,
            texts[0].decode("utf-8" if arguments[0] == "export" else encoding),
            texts[1].decode(encoding),
        )

    def printed(self, *arguments: str, status: int = 0, **options: Any) -> str:
        """Return what a command prints; fail unless it ends as it should, with nothing on standard error."""
        done = self.cli(*arguments, **options)
        self.assertEqual((done[0], done[2]), (status, ""), arguments)
        return done[1]

    def facts(self, *arguments: str, status: int = 0, **options: Any) -> Any:
        return json.loads(self.printed(*arguments, "--json", status=status, **options))

    def program(self, *arguments: str, **options: Any) -> Any:
        """Start the module as a program."""
        command = [sys.executable, str(HERE / "operator_db.py"), *arguments]
        return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})

    def on_terminal(self, columns: int, *arguments: str) -> str:
        """Return what a command sends to a terminal of this width, on standard output and standard error."""
        controller, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        sent: list[bytes] = []

        def show() -> None:
            with (
                suppress(SystemExit),
                open(terminal, "w", encoding="utf-8") as screen,
                mock.patch.multiple(sys, stdout=screen, stderr=screen, __stdout__=screen),
            ):
                operator_db.main(list(arguments))

        def watch() -> None:
            with suppress(OSError):  # EIO, when the terminal is closed
                while part := os.read(controller, 65536):
                    sent.append(part)

        in_threads(show, watch)
        os.close(controller)
        return b"".join(sent).decode().replace("\r\n", "\n")


LOOKS = (
    ("stats",), ("list-tasks",), ("list-tasks", "--status", "completed"), ("list-proofs",), ("list-sessions",), ("check",),
    ("get", "tasks:t1"), ("get", "sessions:voice"), ("get", "config:operator"), ("get", "tallies:one"), ("keys", "tasks"),
    ("export",), ("stats", "--prometheus"), ("prune", "--dry-run"), ("dispute", "t1"),
)  # fmt: skip


class EveryCommand(Console):
    def test_is_the_thin_face_of_a_method_and_says_the_same_facts_to_programs(self) -> None:
        header, *lines = map(json.loads, self.printed("export").splitlines())
        exported = {(e["namespace"], *list(e["record"].values())[:1]): e["record"] for e in lines}
        db = self.enterContext(OperatorDb(self.path))
        self.assertEqual(sum(header["records"].values()), len(lines))

        def tasks(*found: TaskRecord) -> list[Any]:
            return [exported["tasks", task.task_id] for task in found]

        def proofs(*found: VerificationLog) -> list[Any]:
            return [exported["proofs", log.task_id] for log in found]

        bundle = db.dispute_bundle("t1")
        put_contents(self.file, json.dumps(bundle).encode())
        wanted: dict[str, Any] = {
            "stats": {name: value for name, value in vars(db.stats()).items() if name != "operations"},
            "list-tasks": tasks(*db.list_tasks()),
            "list-tasks --status InProgress": tasks(*db.list_tasks_by_status("in_progress")),
            "list-tasks --limit 3 --newest-first": tasks(*db.list_tasks(limit=3, newest_first=True)),
            "list-proofs": proofs(*db.list_proofs()),
            "list-proofs --unsubmitted": proofs(*db.list_proofs(submitted=False)),
            "list-sessions": [exported["sessions", session.session_id] for session in db.list_sessions()],
            "get tasks:t1": exported["tasks", "t1"],
            "get proofs:t1": exported["proofs", "t1"],
            "get sessions:voice": exported["sessions", "voice"],
            "get tallies:one": exported["tallies", "one"],
            "get config:operator": next(e["record"] for e in lines if e["namespace"] == "config"),
            "keys tasks": [f"tasks:{each}" for each in ids(db)],
            "keys sessions": [f"sessions:{name}" for name in ("s0", "s1", "s2", "voice")],
            "keys tallies": ["tallies:one"],
            "prune --dry-run": vars(db.prune(dry_run=True)),
            "check": {"path": self.path, "problems": []},
            "dispute t1": bundle,
            f"verify {self.file}": {"problems": verify_dispute_bundle(bundle), "evidence_hash": None},
            f"verify {self.file} --evidence-hash {bundle['evidence_hash']}": {
                "problems": [],
                "evidence_hash": bundle["evidence_hash"],
            },
        }
        self.assertEqual(wanted["get config:operator"]["keypairs"], "***")
        for command, facts in wanted.items():
            with self.subTest(command=command):
                self.assertEqual(self.facts(*command.split()), json.loads(json.dumps(facts)))
        here, there = scraped(self.printed("stats", "--prometheus")), scraped(db.prometheus())
        for name in ("tasks", "records", "unsubmitted_proofs"):
            self.assertEqual(here[f"operator_db_{name}"], there[f"operator_db_{name}"])

    def test_that_changes_something_does_it_and_says_what(self) -> None:
        before = held(self.path)
        self.assertEqual(self.printed("export", "-o", self.file, "--include-secrets"), "")
        self.assertEqual(contents(self.file).splitlines()[1:], before)
        copied = self.facts("backup", self.other)
        self.assertEqual(copied, {"path": self.other, "bytes": os.stat(self.other).st_size})
        removed = self.facts("prune", "--older-than", "0", "--session-days", "1", "--proof-days", "1")
        self.assertEqual([*removed.values()][:3], [2, 3, 1])
        self.assertEqual(self.facts("compact")["bytes"], os.stat(self.path).st_size)
        self.assertNotEqual(held(self.path), before)
        counts = self.facts("import", self.file)
        self.assertEqual(counts["sessions"], {"added": 3, "unchanged": 1})
        self.assertEqual(counts["proofs"], {"added": 1, "unchanged": 4})
        self.assertEqual(self.facts("import", "-", stdin=contents(self.file))["tasks"], {"unchanged": 13})
        self.assertEqual(held(self.path), before)
        os.unlink(self.path)
        self.assertEqual(self.facts("restore", self.other)["records"]["tasks"], 13)
        self.assertEqual(held(self.path), before)
        self.printed("stats", "--prometheus", "-o", self.file)
        self.assertIn("operator_db_tasks", scraped(contents(self.file).decode()))
        put_contents(self.file, PROTOTYPES.encode())
        self.assertIn("prototype does not export proofs", self.printed("import", self.file))
        for command in ("prune", "compact", f"restore {self.other}", f"backup {self.file}2"):
            self.assertRegex(self.printed(*command.split()), r"\d")

    def test_takes_its_options_before_and_after_and_its_path_from_flag_environment_or_home(self) -> None:
        del os.environ["AGENC_DB_PATH"]
        wanted = self.facts("keys", "proofs", "--db-path", self.path)
        os.environ["AGENC_DB_PATH"] = self.other
        for arguments in (
            ("--json", "--db-path", self.path, "keys", "proofs"),
            ("--db-path", self.path, "keys", "--json", "proofs"),
            ("--db-path", self.other, "keys", "proofs", "--json", "--db-path=" + self.path),
        ):
            self.assertEqual(json.loads(self.printed(*arguments)), wanted)
        os.environ["AGENC_DB_PATH"] = self.path
        self.assertEqual(self.facts("keys", "proofs"), wanted)
        del os.environ["AGENC_DB_PATH"]
        os.mkdir(os.path.join(self.folder, ".agenc"))
        os.rename(self.path, os.path.join(self.folder, ".agenc", "operator.db"))
        self.assertEqual(self.facts("keys", "proofs"), wanted)
        self.assertIn(operator_db.__version__, self.printed("--version"))

    def test_has_a_help_that_teaches_with_an_example_that_works(self) -> None:
        listed = self.printed("--help").partition("\ncommands")[2]
        commands = re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE)
        wanted = (
            "stats list-tasks list-proofs list-sessions get keys export import prune check backup restore"
        )
        self.assertEqual(set(commands), {*wanted.split(), "compact", "dispute", "verify"})
        os.environ["AGENC_DB_PATH"] = self.path + ".missing"
        for command in commands:
            with self.subTest(command=command):
                says = self.printed(command, "--help")
                self.assertTrue("--db-path PATH" in says and "--json" in says)
                (example,) = re.findall(rf"^ +\S*python3? operator_db.py ({command}.*)$", says, re.MULTILINE)
                status, out, err = self.cli(*shlex.split(example.partition(">")[0]))
                self.assertEqual(
                    (status, out), (1, "")
                )  # there is nothing to work on, and that alone is wrong
                self.assertRegex(err, "there is no|cannot read")
        self.assertEqual(self.names(), {"operator.db"})

    def test_ends_with_0_1_or_2(self) -> None:
        put_contents(self.file, json.dumps({**self.facts("dispute", "t1"), "evidence_hash": "00"}).encode())
        for command in (
            "get tasks:nobody", "get nothing:x", "keys nothing", "keys session_log", "import missing", "restore missing",
            "dispute t0", "verify missing", f"import {self.path}", f"import {self.file}", f"restore {self.file}",
            f"backup {self.path}", f"backup {self.file}", "export -o missing/file", "stats --prometheus -o missing/file",
        ):  # fmt: skip
            with self.subTest(command=command), self.unchanged():
                status, out, err = self.cli(*command.split())
                self.assertEqual((status, out, err.count("\n")), (1, "", 1))
                self.assertTrue(err.startswith("operator_db: "), err)
        self.assertIn("evidence_hash", self.printed("verify", self.file, status=1))
        self.assertEqual(len(self.facts("verify", self.file, status=1)["problems"]), 1)
        for command in (
            "nothing", "stats --nothing", "stats more", "list-tasks --status lost", "list-tasks --limit -1", "list-tasks --stat claimed",
            "get", "get tasks", "keys", "prune --older-than soon", "prune --older-than -1", "prune --session-days nan", "backup",
            "import", "restore", "dispute", "verify", "verify x --evidence-hash abc", "--json=5 stats",
        ):  # fmt: skip
            with self.subTest(command=command), self.unchanged():
                status, out, err = self.cli(*command.split())
                self.assertEqual((status, out, err.startswith("usage: ")), (2, "", True))
        with closing(sqlite3.connect(self.path)) as raw, raw:
            raw.execute("UPDATE tasks SET crc = crc + 1 WHERE key = 'tasks:t3'")
        self.assertIn("tasks:t3", self.printed("check", status=1))
        self.assertIn("tasks:t3", self.facts("check", status=1)["problems"][0])
        self.assertEqual(self.cli("list-tasks")[0], 1)


class WhatPeopleSee(Console):
    def test_never_steers_their_terminal_and_fits_every_encoding(self) -> None:
        for command in LOOKS:
            facts = []
            for encoding, flags in itertools.product(("utf-8", "ascii"), ((), ("--json",))):
                with self.subTest(encoding=encoding, command=command, flags=flags):
                    text = self.printed(*command, *flags, encoding=encoding)
                    shown = text if command != ("export",) else ""
                    self.assertEqual([c for c in shown if not c.isprintable() and c != "\n"], [])
                    if flags and command not in (("stats", "--prometheus"), ("export",)):
                        facts.append(json.loads(text))
            self.assertEqual(facts[1:], facts[:1])
        for key in ("tasks:\x1b[2J", "x\x1b:\r\n"):
            self.assertTrue(self.cli("get", key)[2].rstrip("\n").isprintable())
        environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        out, err = self.program("list-tasks", env=environment).communicate(timeout=30)
        self.assertEqual((out.decode("ascii"), err), (self.printed("list-tasks", encoding="ascii"), b""))

    def test_is_aligned_in_a_pipe_and_whole(self) -> None:
        head, *rows = self.printed("list-tasks").splitlines()
        self.assertEqual(len(rows), 13)
        for name in ("status", "since", "reward"):
            start = columns_of(head[: head.index(name)])
            for row in rows:
                cut = next(n for n in range(999) if columns_of((row + " " * 999)[:n]) >= start)
                before = row[:cut].ljust(cut)
                self.assertEqual((columns_of(before), before[-2:]), (start, "  "), row)
                self.assertTrue(row[cut : cut + 1].strip() or name == "reward", row)
        self.assertIn("漢字 é " * 29, self.printed("list-tasks"))

    def test_are_human_times_sizes_and_amounts(self) -> None:
        text = self.printed("list-tasks")
        for words in ("(3 d ago)", "(now)", "1.5 SOL", "7 SKR units", "1970-01-01 00:00"):
            self.assertIn(words, text)
        self.fill_large(self.path)
        self.assertRegex(self.printed("stats"), r"\d\.\d MiB")

    def test_are_bars_where_numbers_are_compared(self) -> None:
        tasks = self.facts("stats")["tasks"]
        for encoding, block in (("utf-8", "█"), ("ascii", "#")):
            text = self.printed("stats", encoding=encoding)
            bars = dict(re.findall(rf"^(\w+) +\d+ *({block}*)$", text, re.MULTILINE))
            for one, other in itertools.product(tasks, tasks):
                self.assertEqual(tasks[one] > tasks[other], len(bars[one]) > len(bars[other]))
            self.assertIn(block * 20, text.partition("bytes by namespace")[2])

    def test_fits_their_terminal(self) -> None:
        for columns in (20, 40, 80, 132):
            for command in ("stats", "list-tasks", "list-proofs", "list-sessions"):
                with self.subTest(columns=columns, command=command):
                    lines = self.on_terminal(columns, command).splitlines()
                    self.assertLessEqual(max(map(columns_of, lines)), columns)
                    self.assertGreater(len(lines), 3)

    def test_of_help_fits_their_terminal_too(self) -> None:
        for columns in (60, 80, 132):
            for command in ("", "stats", "prune", "verify", "get"):
                with self.subTest(columns=columns, command=command):
                    lines = self.on_terminal(columns, *command.split(), "--help").splitlines()
                    wide = [line for line in lines if columns_of(line) > columns and " python " not in line]
                    self.assertEqual(wide, [])

    def test_while_they_wait_is_a_bar_on_a_terminal_and_nothing_elsewhere(self) -> None:
        for columns in (20, 40, 80):
            sent = self.on_terminal(columns, "export", "-o", self.file)
            self.assertRegex(sent, r"^\rexport.*\d%\x1b\[K\r\x1b\[K$")
            self.assertLess(max(columns_of(part) for part in re.split(r"[\r\n]|\x1b\[K", sent)), columns)
        self.assertEqual(self.printed("export", "-o", self.file), "")
        self.assertRegex(self.on_terminal(80, "backup", self.other), r"\rbackup \[.*\n")

    def test_ends_quietly_when_nobody_reads_on(self) -> None:
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            put(db, *(f"many{n}" for n in range(900)), description="x" * 200)
        for command in (("list-tasks",), ("export",), ("keys", "tasks", "--json")):
            with self.subTest(command=command), self.program(*command) as told:
                self.assertTrue(told.stdout.readline())
                told.stdout.close()
                self.assertEqual(told.stderr.read(), b"")

    def test_is_one_clear_line_when_standard_output_is_full_and_nothing_when_it_is_closed(self) -> None:
        for command in (("list-tasks",), ("export",), ("stats", "--json"), ("stats", "--help")):
            with self.subTest(command=command), open("/dev/full", "wb") as full:
                told = self.program(*command, stdout=full)
                lines = told.communicate(timeout=30)[1].decode().splitlines()
                self.assertEqual((told.returncode, len(lines)), (1, 1), lines)
                self.assertIn(os.strerror(errno.ENOSPC), lines[0])
        for command in (("list-tasks",), ("export",), ("backup", self.other)):
            with self.subTest(command=command):
                told = self.program(*command, stdout=None, preexec_fn=lambda: os.close(1))
                self.assertEqual((told.communicate(timeout=30), told.returncode), ((None, b""), 0))
        self.assertEqual(held(self.other), held(self.path))


class Looking(Console):
    def test_beside_a_running_operator_is_consistent_and_never_holds_it_up(self) -> None:
        def operate(say: Callable[[object], None]) -> None:
            with OperatorDb(self.path, durable=False, timeout=0) as db:  # whoever holds it up is an error
                for n in itertools.count():
                    with db.transaction():
                        put(db, f"a{n % 300}", f"z{n % 300}", reward_lamports=n)
                    if n % 20 == 0:
                        say(n)

        operator = Forked(operate)
        operator.line()
        names = set(os.listdir(self.folder))
        for command in LOOKS:
            operator.line()
            text = self.printed(*command, *(("--json",) if command == ("list-tasks",) else ()))
            if command in (("list-tasks",), ("export",)):
                found = re.findall(r'"task_id": ?"([az])(\d+)".*?"reward_lamports": ?(\d+)', text, re.DOTALL)
                seen = [{name[1:] for name in found if name[0] == letter} for letter in "az"]
                self.assertEqual(seen[0], seen[1])
                self.assertGreater(len(seen[0]), 0)
            if command == ("stats",):
                count, _ = re.findall(r"^tasks +(\d+)", text, re.MULTILINE)  # by records, by bytes
                self.assertEqual(int(count) % 2, 1)
        self.facts("backup", self.other)
        self.assertEqual(set(os.listdir(self.folder)), names | {"other.db"})
        operator.line()
        operator.kill()
        self.check_sound()
        self.check_sound(self.other)

    def test_works_where_nothing_can_be_written_and_creates_nothing(self) -> None:
        wanted = [self.printed(*command) for command in LOOKS[:-3]]
        before = contents(self.path)

        def look() -> None:
            os.chmod(self.path, 0o400)
            os.chmod(self.folder, 0o500)
            for command, text in zip(LOOKS[:-3], wanted, strict=True):
                skipped = command in (
                    ("export",),
                    ("stats",),
                )  # the time, the sizes of what is beside the file
                texts = [each.split("\n", 1)[skipped:] for each in (self.printed(*command), text)]
                self.assertEqual(texts[0], texts[1], command)
            self.assertEqual(os.listdir(self.folder), ["operator.db"])

        try:
            as_nobody(self.folder, look)
        finally:
            os.chmod(self.folder, 0o700)
        self.assertEqual(contents(self.path), before)

    def test_at_what_is_no_database_of_ours_is_one_line_and_creates_nothing(self) -> None:
        places = {
            name: os.path.join(self.folder, name)
            for name in ("text", "redb", "theirs", "newer", "unreadable")
        }
        put_contents(places["text"], b"some text " * 99)
        put_contents(places["redb"], b"redb\x1a\n\xa9\r\n" + bytes(5000))
        put_contents(places["newer"], contents(self.path))
        put_contents(places["unreadable"], contents(self.path))
        with closing(sqlite3.connect(places["theirs"])) as raw, raw:
            raw.execute("CREATE TABLE theirs(a)")
        with closing(sqlite3.connect(places["newer"])) as raw:
            raw.execute("PRAGMA user_version = 99")
        places |= {
            name: os.path.join(self.folder, name) for name in ("missing", "missing/below", "text/below")
        }
        places["folder"] = self.folder

        def look() -> None:
            os.chmod(places["unreadable"], 0)
            before = {path: os.stat(path) for path in places.values() if os.path.exists(path)}
            names = os.listdir(self.folder)
            for (name, path), command in itertools.product(
                places.items(), (*LOOKS[:2], *LOOKS[-5:], ("prune",), ("compact",))
            ):
                status, out, err = self.cli("--db-path", path, *command)
                self.assertEqual(
                    (status, out, err.count("\n"), path in err), (1, "", 1, True), (name, command, err)
                )
            for path, old in before.items():
                new = os.stat(path)
                self.assertEqual((new.st_mtime_ns, new.st_size), (old.st_mtime_ns, old.st_size), path)
            self.assertEqual(sorted(os.listdir(self.folder)), sorted(names))

        self.cli("prune", "--dry-run")  # imports what is imported where it is used, while it can be read
        as_nobody(self.folder, look)


class TheReadmesHelp(Console):
    def test_is_that_of_the_command_line(self) -> None:
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        block = re.search(
            r"^```console\n\$ python operator_db\.py --help\n(.*?)^```", readme, re.MULTILINE | re.DOTALL
        )
        assert block, "the README shows no help"
        os.environ["COLUMNS"] = "100"
        self.assertEqual(block[1], self.printed("--help"))


def export_of(*entries: dict[str, Any], withheld: dict[str, list[str]] | None = None) -> BytesIO:
    """Return an export of these lines, the first of which is line 2."""
    header: dict[str, Any] = {"format": "operator_db/1", "schema_version": len(operator_db._MIGRATIONS)}
    header |= {"withheld": withheld or {}, "records": Counter(entry["namespace"] for entry in entries)}
    return BytesIO(b"\n".join(json.dumps(line).encode() for line in (header, *entries)))


def own(namespace: str, record: Any, status: str | None = None, at: int | None = None) -> dict[str, Any]:
    """Return a line of an export, in a namespace of the operator's own."""
    return {"namespace": namespace, "key": record["name"], "status": status, "at": at, "record": record}


class TheOtherEnd(TransferCase):
    """What an export goes to, and what is given in place of a path."""

    def test_gets_all_of_an_export_however_little_it_takes_or_an_error_is_raised(self) -> None:
        with OperatorDb(self.path) as db:
            got, sink = bytearray(), mock.Mock(spec=io.RawIOBase)
            sink.write.side_effect = lambda data: got.extend(data[:1000]) or min(1000, len(data))
            db.export(sink, include_secrets=True)
            self.assertEqual(got.splitlines()[1:], records(db))
            for taken in (None, OSError("gone"), BrokenPipeError(errno.EPIPE, "gone")):
                sink.write.side_effect = [taken]
                with self.subTest(taken=taken), self.unchanged():
                    self.refused(StorageError, lambda: db.export(sink), "stream")

    def test_is_never_the_default_of_the_constructor(self) -> None:
        places = [os.path.join(self.folder, "elsewhere"), os.path.join(self.folder, ".agenc", "operator.db")]
        os.mkdir(os.path.dirname(places[1]))
        self.enterContext(mock.patch.dict(os.environ, {"AGENC_DB_PATH": places[0], "HOME": self.folder}))
        with OperatorDb(self.path) as db:
            db.export(self.file, include_secrets=True)
            db.backup(self.other)
            verbs = [db.write_metrics, partial(db.backup, overwrite=True), db.restore, db.export, db.import_]
            for there, environ in itertools.product((None, self.file, self.other), ("", places[0])):
                os.environ["AGENC_DB_PATH"] = environ
                content = there and contents(there)
                for place in places if content else ():
                    put_contents(place, content)
                for verb in verbs:
                    with self.subTest(verb=verb, there=there, environ=environ), self.unchanged():
                        self.assertRaises(OperatorDbError, verb, None)
                left = [contents(place) for place in places if os.path.exists(place)]
                self.assertEqual(left, [content] * 2 if there else [])

    def test_is_a_pipe_still_after_it_was_sent_to(self) -> None:
        fifo, got = os.path.join(self.folder, "fifo"), []
        os.mkfifo(fifo)
        with OperatorDb(self.path) as db:
            with self.unchanged():
                self.refused(StorageError, lambda: db.backup(fifo, overwrite=True), fifo)
            for send in (
                lambda: db.write_metrics(fifo),
                lambda: operator_db.main(["stats", "--prometheus", "-o", fifo, "--db-path", self.path]),
                lambda: operator_db.main(["export", "-o", fifo, "--db-path", self.path]),
            ):
                in_threads(send, lambda: got.append(contents(fifo).decode()))
                self.assertTrue(stat.S_ISFIFO(os.stat(fifo).st_mode))
        for text in got[:2]:
            self.assertIn("operator_db_tasks", scraped(text))
        self.assertEqual(len(got[2].splitlines()), len(held(self.path)) + 1)

    def test_is_no_database_that_another_process_has_open(self) -> None:
        with OperatorDb(self.path) as db:
            for there in (False, True):
                for name in (self.other, *[self.other + "-wal"] * (not there)):
                    put_contents(name, b"somebody's")
                for verb in (db.export, db.write_metrics, partial(db.backup, overwrite=True)):
                    with self.subTest(verb=verb, there=there), self.unchanged():
                        self.refused(StorageError, lambda verb=verb: verb(self.other), self.other + "-wal")
                self.assertEqual(contents(self.other), b"somebody's")
                os.unlink(self.other)

    def test_that_was_a_database_here_once_is_a_file_like_any_other(self) -> None:
        with OperatorDb(self.other) as closed:
            put(closed, "old")
        os.rename(self.other, self.file)  # what has the inode now of a database that was open here
        with OperatorDb(self.path) as db:
            exported = BytesIO()
            db.export(exported)
            db.restore(self.file)
            self.assertEqual(ids(db), ["old"])
            put_contents(self.file, exported.getvalue())
            self.assertEqual(db.import_(self.file)["tasks"], {"added": 10})
            for verb in (db.export, db.write_metrics, partial(db.backup, overwrite=True)):
                os.replace(self.file, self.other)
                os.link(self.other, self.file)
                verb(self.file)
        self.check_sound(self.file)

    def test_hears_of_a_callbacks_own_error_as_it_is(self) -> None:
        out = BytesIO()
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            db.export(self.file)
            verbs = [partial(verb, self.file + "2") for verb in (db.export, db.backup)]
            verbs += [partial(db.export, out), partial(other.import_, self.file)]
            errors = (TimeoutError("mine"), BlockingIOError("mine"))
            for verb, error, late in itertools.product(verbs, errors, (False, True)):

                def progress(done: int, total: int, late: bool = late, error: Exception = error) -> None:
                    if not late or (total and done >= total):
                        raise error

                with self.subTest(verb=verb, error=error, late=late), self.unchanged(self.other):
                    with self.assertRaises(OSError) as caught:
                        verb(progress=progress)
                    self.assertIs(caught.exception, error)
        self.assertEqual(out.getvalue(), b"")

    def test_survives_a_child_that_is_forked_and_ends_while_it_is_made(self) -> None:
        parent = os.getpid()
        for verb, phase in itertools.product(("export", "backup"), (1, 2)):
            calls = itertools.count(1)

            def progress(*_: int, calls: Any = calls, phase: int = phase) -> None:
                if next(calls) == phase:
                    if not (child := os.fork()):
                        raise SystemExit
                    os.waitpid(child, 0)

            try:
                with OperatorDb(self.path) as db:
                    getattr(db, verb)(target := f"{self.file}{verb}{phase}", progress=progress)
            finally:
                if os.getpid() != parent:
                    os._exit(0)
            if verb == "backup":
                self.assertEqual(held(target), held(self.path))
            self.assertGreater(next(calls), phase)
            self.assertGreater(len(contents(target)), 1000)
        self.assertEqual(len(self.names()), 5)


class ADatabaseThatWasReplaced(TransferCase):
    def test_is_neither_restored_nor_compacted_as_if_that_were_kept(self) -> None:
        backup = self.file + ".bak"
        for verb in ("restore", "compact"):
            with OperatorDb(self.other + verb) as db:
                put(db, "t")
                if verb == "restore":
                    db.backup(backup)
                os.unlink(db.path)
                with self.assertRaises(StorageError):
                    db.restore(backup) if verb == "restore" else db.compact()

    def test_has_no_sizes_by_namespace_where_sqlite_cannot_tell_them(self) -> None:
        with OperatorDb(self.path) as db, mock.patch.object(db._store, "table_bytes", dict):
            stats, text = db.stats(), db.prometheus()
        self.assertEqual(stats.bytes, {})
        self.assertNotIn("operator_db_namespace_bytes{", text)


class AStreamThatWasPrintedTo(TransferCase):
    def test_gets_the_export_after_what_was_printed(self) -> None:
        out = BytesIO()
        stream = TextIOWrapper(out, encoding="ascii")
        with OperatorDb(self.path) as db:
            print("first", file=stream)
            db.export(stream)
        self.assertTrue(out.getvalue().startswith(b'first\n{"format"'))


class ABackupThatIsNotWhatItSeems(TransferCase):
    def setUp(self) -> None:
        super().setUp()
        self.fill(self.other, tasks=5)
        with OperatorDb(self.other) as db:
            db.namespace("wallets", Wallet, key="owner")
        self.whole, self.new = contents(self.other), held(self.other)

    def script(self, text: str) -> None:
        """Change the backup behind our back."""
        with closing(sqlite3.connect(self.other)) as raw:
            raw.executescript(text)

    def test_is_checked_as_the_very_copy_that_is_restored(self) -> None:
        check = operator_db._refuse_damaged
        worse, better = (f"UPDATE tasks SET crc = crc {sign} 1 WHERE key = 'tasks:t3'" for sign in "+-")
        for before, after in ((worse, better), ("", worse), (better, "")):

            def around(*arguments: Any, before: str = before, after: str = after) -> None:
                self.script(before)
                check(*arguments)
                self.script(after)

            patched = mock.patch.object(operator_db, "_refuse_damaged", around)
            with self.subTest(before=before, after=after), patched, OperatorDb(self.path) as db:
                if before == better:  # it was damaged when it was copied
                    with self.unchanged():
                        self.refused(DamagedError, partial(db.restore, self.other), "tasks:t3", self.other)
                else:
                    db.restore(self.other)
                self.assertEqual((db.check(), records(db) == self.new), ([], True))

    def test_is_refused_by_its_name_when_something_was_planted_in_it(self) -> None:
        with OperatorDb(self.path) as db:
            tallies = db.namespace("tallies", Tally, key="name")
            for planted in (
                "CREATE TRIGGER planted AFTER INSERT ON tallies BEGIN DELETE FROM tallies; END",
                "CREATE TRIGGER planted AFTER UPDATE ON wallets BEGIN SELECT 1; END",
                "CREATE INDEX planted ON tallies(key)",
                "DROP TABLE tallies; CREATE TABLE tallies(key, value)",
                "DROP TABLE tallies; CREATE VIEW tallies AS SELECT 1",
            ):
                put_contents(self.other, self.whole)
                self.script(planted)
                with self.subTest(planted), self.unchanged():
                    said = self.refused(ForeignFileError, lambda: db.restore(self.other), self.other)
                    self.assertNotIn(".new", said)
                    tallies.put(Tally(name="one", count=1))
            self.assertEqual((tallies.count(), db.check()), (1, []))

    def test_without_a_namespace_empties_it_for_all_who_have_it_open(self) -> None:
        with OperatorDb(self.other) as db, OperatorDb(self.other) as another:
            OperatorDb(self.file + ".db").close()
            spaces = [each.namespace("tallies", Tally, key="name") for each in (db, another)]
            self.assertEqual([space.count() for space in spaces], [1, 1])
            db.restore(self.file + ".db")
            self.assertEqual([(space.count(), space.get("one")) for space in spaces], [(0, None)] * 2)
            for number, space in enumerate(spaces):
                space.put(Tally(name=str(number)))
            self.assertEqual([space.count() for space in spaces], [2, 2])
            self.assertEqual((db.stats().records["tallies"], another.check()), (2, []))


class AnImportedRecord(TransferCase):
    def test_is_compared_as_it_is_stored(self) -> None:
        with OperatorDb(self.other) as db:
            for name in ("tallies", "config"):
                for value in (1, True, 1.0, 1, False, 0, 0.0):
                    line: dict[str, Any] = {"namespace": name, "record": {"model_preferences": {"a": value}}}
                    if name == "tallies":
                        line = own(name, {"name": "one", "count": value})
                    with self.subTest(name=name, value=value):
                        (counts,) = db.import_(export_of(line)).values()
                        self.assertNotIn("unchanged", counts)
                        again = db.import_(export_of(line))
                        self.assertEqual(again, {name: {"unchanged": 1}})
                        last = next(each for each in records(db) if json.loads(each)["namespace"] == name)
                        self.assertIn(f":{json.dumps(value)}}}".encode(), last)
            for columns in ((), ("new",), ("old",), ("old", 1), ("old", 2), (None, 2)):
                line = own("tallies", {"name": "one", "count": 0.0}, *columns)
                with self.subTest(columns=columns):
                    counted = db.import_(export_of(line))["tallies"]
                    self.assertEqual(counted, {"replaced" if columns else "unchanged": 1})
                    self.assertEqual(json.loads(records(db)[-1]), line)

    def test_of_a_proof_brings_the_signature_that_was_not_known(self) -> None:
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            db.store_proof(proof("signed", submitted=True, submission_signature="sig"))
            db.export(self.file)
            for submitted in (True, False):
                other.delete_proof("signed")
                other.store_proof(proof("signed", submitted=submitted))
                self.assertEqual(other.import_(self.file)["proofs"]["replaced"], 1)
                self.assertEqual(other.get_proof("signed"), db.get_proof("signed"))
                self.assertNotIn("replaced", other.import_(self.file)["proofs"])

    def test_may_hold_stars_that_stand_for_nothing(self) -> None:
        with OperatorDb(self.path) as db:
            tallies = db.namespace("tallies", Tally, key="name")
            tallies.put(Tally(name="stars", pin="***"))
            tallies.put(Tally(name="***"))
            put(db, "***", description="***")
            db.export(self.file, include_secrets=True)
        with OperatorDb(self.other) as db:
            db.import_(self.file)
            self.assertEqual(records(db), held(self.path))
            tallies = db.namespace("tallies", Tally, key="name")
            self.assertEqual(tallies.get("stars"), Tally(name="stars", pin="***"))

    def test_with_a_part_of_a_secret_is_refused_by_line_and_field(self) -> None:
        @dataclass
        class Vault:
            name: str
            content: Any = field(default=None, metadata={"secret": True})

        parts = ({"a": {"b": "***"}}, [["***"]], ["***", SECRET], {"a": SECRET, "b": [{"c": "***"}]})
        withheld = {"vaults": ["content"], "config": ["keypairs", "rpc_endpoints"]}
        with OperatorDb(self.other) as db:
            for known, value in itertools.product((False, True), parts):
                if known:
                    db.namespace("vaults", Vault, key="name")
                for line, name in (
                    (own("vaults", {"name": "v", "content": value}), "content"),
                    ({"namespace": "config", "record": {"keypairs": value}}, "keypairs"),
                    ({"namespace": "config", "record": {"rpc_endpoints": value}}, "rpc_endpoints"),
                ):
                    bring = partial(db.import_, export_of(line, withheld=withheld))
                    with self.subTest(known=known, line=line), self.unchanged(self.other):
                        self.refused(InvalidRecordError, bring, "line 2", name)

    def test_without_secrets_gives_up_none_that_is_stored_damaged(self) -> None:
        with OperatorDb(self.path) as db, closing(sqlite3.connect(self.path)) as raw:
            self.store_secrets(db)
            db.export(self.file)
            raw.executescript("UPDATE config SET crc = crc + 1; DELETE FROM tasks")
            before = [*raw.iterdump()]
            self.refused(DamagedError, lambda: db.import_(self.file), "line", "config:operator")
            self.assertEqual([*raw.iterdump()], before)

    def test_of_a_class_that_has_changed_since_is_the_record_still(self) -> None:
        @dataclass
        class Card:
            name: str
            colour: str
            pin: str = field(default="", metadata={"secret": True})

        @dataclass
        class Grown:
            name: str
            note: str = "none"
            code: str = field(default="", metadata={"secret": True})

        @dataclass
        class Shrunk:
            name: str

        with OperatorDb(self.path) as db:
            db.namespace("cards", Card, key="name").put(Card("one", "red", SECRET))
        for kind, path in ((Grown, self.other + "1"), (Shrunk, self.other + "2")):
            with self.subTest(kind=kind), OperatorDb(self.path) as db, OperatorDb(path) as other:
                _, cards = (each.namespace("cards", kind, key="name") for each in (db, other))
                db.export(self.file, include_secrets=True)
                other.import_(self.file)
                self.assertEqual((records(other), cards.get("one")), (records(db), kind("one")))
                self.assertIn(SECRET.encode(), b"".join(records(other)))
                withheld = records(db, include_secrets=False)
                self.assertFalse([line for line in withheld if SECRET.encode() in line], "it was a secret")


class AnImportedSecret(TransferCase):
    def test_of_a_class_that_is_not_known_is_never_made_up(self) -> None:
        @dataclass
        class Voice:
            name: str
            role: str = field(default="secret role", metadata={"secret": True})

        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            voices = db.namespace("voices", Voice, key="name")
            voices.put(Voice("v"))
            db.export(self.file)
            self.refused(InvalidRecordError, lambda: other.import_(self.file), "voices.role")
            db.namespace("voices", Voice, key="name").put(Voice("w"))
            self.assertEqual(db.stats().operations["voices.put"].count, 2)


class AnImportedHistory(TransferCase):
    def task(self, *moves: tuple[str, int]) -> TaskRecord:
        """Return a task that was claimed, and then went through these statuses."""
        changes = [StatusChange(status=TaskStatus(name), at=at) for name, at in (("claimed", 0), *moves)]
        return TaskRecord(task_id="t", claimed_at=0, history=changes, status=changes[-1].status)

    def test_that_diverges_is_kept_where_it_moved_last_and_loses_no_stored_entry(self) -> None:
        started, done, disputed = (("in_progress", 10), ("completed", 20), ("disputed", 20))
        again, lost = ("in_progress", 11), ("disputed", 30)
        for stored, given, kept in (
            ([started], [done], [started, done]),
            ([started], [("claimed", 5), done], [started, ("claimed", 5), done]),
            ([done], [started], [done]),
            ([done], [disputed], [done]),
            ([started, done], [again, lost], [started, done, again, lost]),
            ([started], [started, done], [started, done]),
            ([started, done], [started], [started, done]),
        ):
            with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
                for each, moves in ((db, given), (other, stored)):
                    each.delete_task("t")
                    each.store_task(self.task(*moves))
                db.export(self.file)
                with self.subTest(stored=stored, given=given):
                    self.assertEqual(other.import_(self.file)["tasks"]["replaced"], int(kept != stored))
                    self.assertEqual((task := other.get_task("t")).history, self.task(*kept).history)
                    self.assertEqual(task.status, kept[-1][0])
                    with self.unchanged(self.other):
                        other.import_(self.file)

    def test_that_does_not_end_with_the_status_of_its_task_is_refused_by_line(self) -> None:
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            put(other, "there")
            lines = map(json.loads, records(db))
            line = next(each for each in lines if each["record"].get("task_id") == "t2")
            other.import_(export_of(line))
            for name, value in (
                ("status", "claimed"), ("status", "disputed"), ("history", []),
                ("history", [*line["record"]["history"], {"status": "claimed", "at": 3, "signature": None}]),
                ("history", [{"status": "completed", "at": 3, "signature": "another"}]),
            ):  # fmt: skip
                with self.subTest(name=name, value=value), self.unchanged(self.other):
                    text = export_of(altered(line, ("record", name), value))
                    self.refused(InvalidRecordError, lambda it=text: other.import_(it), "line 2", "histor")

    def test_begins_with_what_the_prototype_says_and_that_must_be_all_of_it(self) -> None:
        document = json.loads(PROTOTYPES)
        with OperatorDb(self.other) as db:
            put(db, "there")
            for place, name in itertools.product(range(3), document["tasks"][0]):
                with self.subTest(place=place, name=name), self.unchanged(self.other):
                    text = json.dumps(altered(document, ("tasks", place, name), GONE))
                    bring = partial(db.import_, StringIO(text))
                    self.refused(InvalidRecordError, bring, f"tasks[{place}]", name)
            secret: dict[str, Any] = {"keypairs": {"main": SECRET}, "rpc_endpoints": ["https://rpc"]}
            more: dict[str, Any] = {"capabilities": ["voice"], "model_preferences": {"a": 1}}
            config = OperatorConfig(wallet_pubkey="w", network="devnet", **more, **secret)
            db.store_config(config)
            for nothing in (dict.fromkeys(document["config"]), {}):
                db.import_(StringIO(json.dumps({**document, "config": nothing})))
                self.assertEqual(db.get_config(), config)


class ACheck(TransferCase):
    def test_raises_no_alarm_over_sessions_that_come_and_go_meanwhile(self) -> None:
        with OperatorDb(self.path) as db:
            keys, statuses = db._sessions.keys, db._log.statuses

            def walked() -> Iterator[str]:
                yield from keys()
                for name in ("late", "later"):
                    db.append_transcript(name, "user", "hello")
                    db.append_command(name, "status")

            def listed() -> list[str]:
                found = statuses()
                db.delete_session("later")
                return found

            sessions = mock.patch.object(db._sessions, "keys", walked)
            with sessions, mock.patch.object(db._log, "statuses", listed):
                self.assertEqual(db.check(), [])
            self.assertEqual(len(db.list_sessions()), 4)
            with closing(sqlite3.connect(self.path)) as raw, raw:
                raw.execute("DELETE FROM sessions WHERE key = 'sessions:late'")
            self.assertEqual(len(db.check()), 2)


class FromAShell(Console):
    def failed(self, *arguments: str, **options: Any) -> str:
        """Return the one line that a command prints when it fails, as it must."""
        status, out, err = self.cli(*arguments, **options)
        self.assertEqual((status, out, err.count("\n")), (1, "", 1), err)
        return err

    def test_a_pipe_or_a_log_by_its_name_is_what_it_leads_to(self) -> None:
        def through(*arguments: str, sends: bytes = b"") -> bytes:
            """Run a command on one end of a pipe."""
            (reader, writer), got = os.pipe(), []
            here, there = (reader, writer) if sends else (writer, reader)

            def command() -> None:
                try:
                    self.printed(*arguments, f"/dev/fd/{here}")
                finally:
                    os.close(here)

            def other_end() -> None:
                with open(there, "wb" if sends else "rb") as pipe:
                    got.append(pipe.write(sends) if sends else pipe.read())

            in_threads(command, other_end)
            return got[0]

        exported = through("export", "--include-secrets", "-o")
        self.assertEqual(exported.splitlines()[1:], held(self.path))
        through("--db-path", self.other, "import", sends=exported)
        self.assertEqual(held(self.other), held(self.path))
        self.assertIn("operator_db_tasks", scraped(through("stats", "--prometheus", "-o").decode()))
        with open(self.file, "ab") as log:
            log.write(b"kept\n")
            log.flush()

            def append() -> None:
                os.dup2(log.fileno(), 1)
                self.printed("export", "--include-secrets", "-o", "/dev/stdout")

            inode = os.fstat(log.fileno()).st_ino
            forked(append)
            self.printed("export", "-o", f"/dev/fd/{log.fileno()}")
        lines = contents(self.file).splitlines()
        self.assertEqual((lines[0], lines[2 : len(lines) // 2 + 1]), (b"kept", held(self.path)))
        self.assertEqual((len(lines), os.stat(self.file).st_ino), (2 * len(held(self.path)) + 3, inode))

    def test_import_and_restore_make_a_database_only_of_what_is_good(self) -> None:
        self.printed("export", "-o", self.file, "--include-secrets")
        self.printed("backup", self.file + ".db")
        good, copied = contents(self.file), contents(self.file + ".db")
        for verb, source, whole in (("import", self.file, good), ("restore", self.file + ".db", copied)):
            wrong = whole.replace(b'"claimed_at"', b'"claimed_by"')
            for bad in (b"", b"text " * 200, whole[: len(whole) // 2], wrong):
                put_contents(source, bad)
                for path in (source, "-")[: 1 + (verb == "import")]:
                    with self.subTest(verb=verb, bad=bad[:20], path=path), self.unchanged():
                        self.failed("--db-path", self.other, verb, path, stdin=bad)
            put_contents(source, whole)
            before = os.umask(0)
            self.addCleanup(os.umask, before)
            self.printed("--db-path", self.other, verb, source)
            os.umask(before)
            self.assertEqual(held(self.other), held(self.path))
            self.assertEqual(os.stat(self.other).st_mode & 0o777, 0o600)
            os.unlink(self.other)
        self.assertEqual(set(os.listdir(self.folder)), {"operator.db", "operator.jsonl", "operator.jsonl.db"})

    def test_what_may_not_be_entered_or_written_is_said_to_be_so(self) -> None:
        self.printed("export", "-o", self.file)
        self.printed("backup", self.other)
        self.printed("--db-path", self.other, "import", self.file)  # and what it imports can be read here
        locked = os.path.join(self.folder, "locked")
        os.mkdir(locked)
        shutil.copy(self.path, within := os.path.join(locked, "operator.db"))
        verbs = (("prune",), ("compact",), ("import", self.file), ("restore", self.other))

        def look() -> None:
            os.chmod(locked, 0)
            os.chmod(self.path, 0o400)
            names, before = os.listdir(self.folder), os.stat(self.path)
            for command in (("stats",), ("check",), *verbs):
                said = self.failed("--db-path", within, *command)
                self.assertIn(os.strerror(errno.EACCES), said)
                self.assertNotIn("no database", said)
            for command in verbs:
                self.assertIn(self.path, self.failed(*command))
                self.assertEqual(os.listdir(self.folder), names)
            self.assertEqual(os.stat(self.path).st_mtime_ns, before.st_mtime_ns)

        try:
            as_nobody(self.folder, look)
        finally:
            os.chmod(locked, 0o700)

    def test_a_program_that_is_told_to_end_leaves_nothing_behind(self) -> None:
        header = export_of().getvalue() + b"\n" * 200_000  # more than a pipe holds: it is being read
        ending = f"""if True:
            import os, runpy, signal
            os.%s = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            runpy.run_path({str(HERE / "operator_db.py")!r}, None, "__main__")"""
        with self.unchanged(), ThreadPoolExecutor() as pool:
            sent = pool.submit(run, ending % "fsync", "export", "-o", self.file)
            copied = pool.submit(run, ending % "link", "backup", self.file + ".db")
            for path in (self.other, self.path):
                with self.program("--db-path", path, "import", "-", stdin=subprocess.PIPE) as waiting:
                    waiting.stdin.write(header)
                    waiting.stdin.flush()
                    waiting.terminate()
                    self.assertEqual((waiting.communicate(), waiting.returncode), ((b"", b""), 143))
            for told in (sent.result(), copied.result()):
                self.assertEqual((told.returncode, told.stdout, told.stderr), (143, "", ""))
        self.assertEqual(os.listdir(self.folder), ["operator.db"])

    def test_a_program_works_however_it_is_named_and_started(self) -> None:
        renamed = os.path.join(self.folder, "odb renamed")
        shutil.copy(HERE / "operator_db.py", renamed)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        plain = [sys.executable, "-OO", str(HERE / "operator_db.py"), "stats", "--help"]
        with subprocess.Popen([sys.executable, renamed], **pipes) as checks:
            told = subprocess.run(plain, capture_output=True, check=False, timeout=20)
            self.assertEqual((told.returncode, told.stderr), (0, b""))
            self.assertIn(b"--prometheus", told.stdout)
            closed = self.program("import", "-", preexec_fn=lambda: os.close(0))
            out, err = closed.communicate(timeout=20)
            self.assertEqual((closed.returncode, out, err.count(b"\n")), (1, b"", 1))
            out, err = checks.communicate(timeout=20)
            self.assertEqual((checks.returncode, err), (0, b""), out)
            self.assertIn(b"problems found: 0", out)

    def test_a_wrong_argument_steers_no_terminal_and_writes_nothing(self) -> None:
        for command in (("stats", "-o", self.file), ("stats", "--json", "-o", self.file)):
            with self.subTest(command=command), self.unchanged():
                status, out, err = self.cli(*command)
                self.assertEqual((status, out, "--prometheus" in err), (2, "", True))
        for command in (
            ("stats", STEERING), ("stats", f"--{STEERING}"), (STEERING,), ("prune", "--older-than", STEERING),
            ("list-tasks", "--status", STEERING), ("get", STEERING), ("verify", self.file, "--evidence-hash", STEERING),
        ):  # fmt: skip
            with self.subTest(command=command):
                status, out, err = self.cli(*command)
                self.assertEqual((status, out), (2, ""))
                self.assertEqual([c for c in err if not c.isprintable() and c != "\n"], [])


class ATable(Console):
    def test_on_a_narrow_terminal_says_what_it_cut_and_keeps_its_numbers_in_line(self) -> None:
        with OperatorDb(self.path) as db:
            for n in range(12):
                db.append_command("voice", f"command {n}")
            put(db, "long", description="é" * 100_000, claimed_at=0)
        text = forked(lambda: self.on_terminal(40, "list-tasks"), seconds=8)
        _, *rows = text.splitlines()
        cells = [re.split(" {2,}", row) for row in rows]
        self.assertTrue(all(cell.endswith("…") for row in cells for cell in row[1:3]), cells)
        self.assertTrue(next(row for row in rows if row.startswith("long")).endswith("éé…"), rows)
        _, *rows = self.on_terminal(40, "list-sessions").splitlines()
        ends = [tuple(match.end() for match in re.finditer(r"(?<= )\d+(?= )", row)) for row in rows]
        self.assertEqual((len(ends[0]), len(set(ends))), (2, 1), rows)

    def test_in_a_pipe_counts_the_columns_that_a_terminal_gives(self) -> None:
        with OperatorDb(self.path) as db:
            put(db, "ที่นี่", "ab", description="d")
        rows = {row.split()[0]: row for row in self.printed("list-tasks").splitlines()}
        for word in ("claimed", "  d"):
            self.assertEqual(rows["ที่นี่"].index(word), rows["ab"].index(word) + 4)


REPLICATOR = r"""
import os, sqlite3, sys
path = sys.argv[1]
db = sqlite3.connect(path, isolation_level=None, timeout=5)
db.execute("CREATE TABLE IF NOT EXISTS _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)")
db.execute("CREATE TABLE IF NOT EXISTS _litestream_lock (id INTEGER)")
def wal():
    with open(path + "-wal", "rb") as file:
        return file.read(32), os.fstat(file.fileno()).st_size
def lock_shortly():
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO _litestream_lock VALUES (1)")
    db.execute("ROLLBACK")
lock_shortly()
db.execute("INSERT OR REPLACE INTO _litestream_seq VALUES (1, 1)")
db.execute("BEGIN")
db.execute("SELECT count(*) FROM _litestream_seq").fetchone()
before = wal()
print("holds", flush=True)
sys.stdin.readline()
after = wal()
db.execute("ROLLBACK")
print(before[0] == after[0] and before[1] <= after[1], flush=True)
for _ in range(20):
    lock_shortly()
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")
sys.stdin.readline()
"""


class AReplicatorBesideIt(Scratch):
    """What Litestream does to a database: https://litestream.io/how-it-works/."""

    def test_keeps_its_read_lock_its_tables_and_an_unbroken_log(self) -> None:
        db = self.open()
        put(db, "first")
        command = [sys.executable, "-c", REPLICATOR, self.path]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as replicator:
            assert replicator.stdin is not None
            assert replicator.stdout is not None
            self.assertEqual(replicator.stdout.readline(), "holds\n")
            for number in range(50):
                db.store_task(
                    TaskRecord(task_id=str(number), payload=bytes(500_000), status="completed", claimed_at=0)
                )
            db.prune()
            self.assertGreater(os.stat(self.path + "-wal").st_size, 30 * 2**20)  # held back, as it must be
            replicator.stdin.write("\n")
            replicator.stdin.flush()
            self.assertEqual(
                replicator.stdout.readline(), "True\n", "the log was cut or begun anew under the lock"
            )
            for number in range(100):
                put(db, f"beside {number}")
            replicator.stdin.write("\n")
            replicator.stdin.flush()
        put(db, "last")
        self.assertLessEqual(os.stat(self.path + "-wal").st_size, 16 * 2**20)
        self.assertEqual((db.count_tasks()["claimed"], db.check()), (102, []))
        with self.raw() as raw:
            self.assertEqual(raw.execute("SELECT seq FROM _litestream_seq").fetchall(), [(1,)])


# ---- soak: random operations, random faults, and a model in memory to compare with

Model = dict[str, Any]  # of one worker: what the database must hold of its records
Operation = tuple[str, str, int]  # verb, id, size of the payload


def payload(record_id: str, size: int) -> bytes:
    """Return the bytes that belong to an id."""
    return random.Random(record_id).randbytes(size)


def choose(rng: random.Random, model: Model, fresh: str) -> Operation:
    """Return an operation that the model allows next."""
    verbs = [
        "store",
        "batch",
        "append",
        "tally",
        "old",
        "move",
        "complete",
        "delete",
        "forget",
        "prune",
        "secret",
    ]
    verb = rng.choices(verbs, (6, 2, 4, 4, 2, 3, 4, 1 + len(model["tasks"]) // 8, 3, 1, 1))[0]
    known = {"complete": "move", "forget": "proofs"}.get(verb, "tasks")
    if verb in ("move", "complete", "delete", "forget"):
        ids = [each for each in model["tasks"] if model["tasks"][each][0] == "claimed"]
        if verb in ("delete", "forget"):
            ids = list(model[known])
        if verb == "complete":
            ids = [each for each in ids if each not in model["proofs"]]
        if not ids:
            return "store", fresh, 10
        return verb, rng.choice(ids), rng.randrange(3000)
    return (
        ("hush" if len(model["log"]) > 60 else verb),
        fresh,
        rng.randrange(1, rng.choice((10, 3000, 60_000))),
    )


def perform(db: OperatorDb, worker: int, operation: Operation) -> None:
    """Do an operation on the database."""
    verb, name, size = operation
    if verb == "store":
        db.store_task(TaskRecord(task_id=name, payload=payload(name, size)))
    elif verb == "batch":
        with db.transaction():
            for part in range(5):
                db.store_task(TaskRecord(task_id=f"{name}/{part}", payload=payload(f"{name}/{part}", size)))
    elif verb == "append":
        db.append_transcript(str(worker), "user", name)
    elif verb == "hush":
        db.delete_session(str(worker))
    elif verb == "tally":
        db.namespace("tallies", Tally, key="name").update(
            str(worker), lambda t: replace(t, count=t.count + 1)
        )
    elif verb == "old":
        db.store_task(
            TaskRecord(task_id=name, payload=payload(name, size), status="completed", completed_at=1)
        )
    elif verb == "move":
        db.update_task_status(name, "in_progress", expected="claimed")
    elif verb == "complete":
        db.complete_task(name, proof(name, payload(name, size)))
    elif verb == "delete":
        db.delete_task(name)
    elif verb == "forget":
        with db.transaction():
            db.delete_task(name)
            db.mark_proof_submitted(name, "signature")
            db.delete_proof(name)
    elif verb == "prune":
        db.prune(session_days=None)
    else:
        db.store_config(OperatorConfig(keypairs={"main": name * 50}))


def expect(model: Model, operation: Operation) -> Model:
    """Return the model after an operation."""
    verb, name, size = operation
    model = {part: value if part == "tally" else value.copy() for part, value in model.items()}
    if verb in ("store", "old"):
        model["tasks" if verb == "store" else "old"][name] = (
            "claimed" if verb == "store" else "completed",
            size,
        )
    elif verb == "batch":
        model["tasks"] |= {f"{name}/{part}": ("claimed", size) for part in range(5)}
    elif verb == "append":
        model["log"].append(name)
    elif verb in ("hush", "prune"):
        model["log" if verb == "hush" else "old"].clear()
    elif verb == "tally":
        model["tally"] += 1
    elif verb == "move":
        model["tasks"][name] = ("in_progress", model["tasks"][name][1])
    elif verb == "complete":
        model["tasks"][name] = ("completed", model["tasks"][name][1])
        model["proofs"][name] = size
    if verb in ("delete", "forget"):
        model["tasks"].pop(name, None)
    if verb == "forget":
        del model["proofs"][name]
    return model


def holdings(db: OperatorDb, worker: int) -> Model:
    """Return what the database holds of a worker's records, in the shape of its model."""
    tasks = [task for task in db.iter_tasks() if task.task_id.startswith(f"{worker}-")]
    tally = db.namespace("tallies", Tally, key="name").get(str(worker))
    return {
        "tasks": {
            task.task_id: (task.status.value, len(task.payload))
            if task.payload == payload(task.task_id, len(task.payload))
            else "wrong"
            for task in tasks
        },
        "proofs": {
            log.task_id: len(log.outputs)
            if log.outputs == payload(log.task_id, len(log.outputs))
            else "wrong"
            for log in db.list_proofs()
            if log.task_id.startswith(f"{worker}-")
        },
        "log": [entry.content for entry in db.transcript(str(worker))],
        "tally": tally.count if tally else 0,
    }


def agree(found: Model, model: Model) -> bool:
    """Whether the database holds what the model says; old tasks may have been pruned by anybody."""
    old = {name: value for name, value in model["old"].items() if name in found["tasks"]}
    return {**found, "old": old} == {**model, "tasks": model["tasks"] | old, "old": old}


def soaked(
    path: str, worker: int, round_: int, seed: int, model: Model
) -> Callable[[Callable[[object], None]], None]:
    """Return a program that works at random without end, and says what it begins and what was acknowledged."""

    def work(say: Callable[[object], None], model: Model = model) -> None:
        rng = random.Random(f"{seed} {round_} {worker}")
        db = OperatorDb(path, durable=bool(rng.randrange(2)))
        for n in itertools.count():
            operation = choose(rng, model, f"{worker}-{round_}-{n}")
            say("i" + json.dumps(operation))
            fault = rng.random()
            try:
                if fault < 0.04:
                    with file_limit(
                        rng.choice((0, 30_000, os.stat(path).st_size, 2 * os.stat(path).st_size))
                    ):
                        perform(db, worker, operation)
                elif fault < 0.06:
                    forked(lambda operation=operation: perform(db, worker, operation))
                else:
                    perform(db, worker, operation)
            except StorageError:
                say("f")
                if fault >= 0.04:
                    raise
            else:
                say("a")
                model = expect(model, operation)

    return work


def flip(image: bytes, path: str, models: list[Model], rng: random.Random) -> bool:
    """Flip a bit of a copy and read it all; return whether every record that came back is one that was stored."""
    bad = bytearray(image)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    put_contents(path, bad)
    with suppress(OperatorDbError), OperatorDb(path, durable=False) as db:
        db.check()
        for worker, model in enumerate(models):
            for name, stored in (model["tasks"] | model["old"]).items():
                with suppress(DamagedError):
                    task = db.get_task(name)
                    right = task is None or task.payload == payload(name, len(task.payload))
                    if not right or (task and (task.status.value, len(task.payload)) != stored):
                        return False
            for name, size in model["proofs"].items():
                with suppress(DamagedError):
                    log = db.get_proof(name)
                    if log is not None and log.outputs != payload(name, size):
                        return False
            with suppress(DamagedError):
                if [entry.content for entry in db.transcript(str(worker))] not in ([], model["log"]):
                    return False
    return True


def soak(argv: list[str]) -> int:
    """Attack a scratch database for some minutes; print a summary; return 1 when anything was lost or came back wrong.

    `--seed` repeats the operations and faults; the moments at which the kernel stops a process are its own.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="soak", description=soak.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    options = parser.parse_args(argv)
    rng, seen, failures = random.Random(options.seed), Counter(), []
    models: list[Model] = [{"tasks": {}, "proofs": {}, "log": [], "old": {}, "tally": 0} for _ in range(3)]
    end = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory(prefix="operator-soak-") as folder:
        path, copy = os.path.join(folder, "operator.db"), os.path.join(folder, "copy.db")
        with OperatorDb(path) as db:
            for worker in range(len(models)):
                db.namespace("tallies", Tally, key="name").put(Tally(name=str(worker)))
        for round_ in itertools.count():
            if failures or time.monotonic() > end:
                break
            children = [
                Forked(soaked(path, worker, round_, options.seed, model), seconds=120)
                for worker, model in enumerate(models)
            ]
            pending: list[list[Operation]] = []
            for worker, child in enumerate(children):
                begun: Operation | None = None
                try:
                    said = [child.line() for _ in range(rng.randrange(2, 200))]
                    said += child.kill(after=rng.uniform(0, 0.01))
                except AssertionError as error:
                    failures.append(f"worker {worker}: {error}")
                    said = []
                for line in said:
                    if line[0] == "i":
                        begun = tuple(json.loads(line[1:]))
                    else:
                        models[worker] = expect(models[worker], begun) if line == "a" else models[worker]
                        seen["acknowledged" if line == "a" else "faults"] += 1
                        begun = None
                seen["operations"] += sum(line[0] == "i" for line in said)
                seen["kills"] += 1
                pending.append([begun] if begun else [])
            with OperatorDb(path) as db:
                problems = db.check()
                failures += problems
                for worker, model in enumerate(models):
                    found = holdings(db, worker)
                    possible = [model, *(expect(model, operation) for operation in pending[worker])]
                    fits = [each for each in possible if agree(found, each)]
                    seen["wrong records"] += "wrong" in (*found["tasks"].values(), *found["proofs"].values())
                    if not fits:
                        seen["losses"] += 1
                        failures.append(
                            f"worker {worker}, round {round_}: {pending[worker]}: {found} is not {model}"
                        )
                    models[worker] = fits[-1] if fits else model
            image = contents(path)
            for _ in range(10):
                seen["flips"] += 1
                if not flip(image, copy, models, rng):
                    seen["wrong records"] += 1
                    failures.append(f"round {round_}: a flipped bit changed a record")
            if sys.stderr.isatty():
                print(f"\r{max(0, end - time.monotonic()):5.0f} s left {dict(seen)}", end="", file=sys.stderr)
    names = ("operations", "acknowledged", "kills", "faults", "flips", "losses", "wrong records")
    print(
        f"seed {options.seed}, {options.minutes:g} minutes: "
        + ", ".join(f"{name} {seen[name]}" for name in names)
    )
    for failure in failures[:5]:
        print(f"FAIL (seed {options.seed}) {failure[:2000]}")
    return 1 if failures else 0


# ---- bench: every operation beside the same by hand, and as the database grows


class ByHand:
    """What a careful person would write: sqlite3, json, base64 and dicts; no checks, no threads, nobody else's file."""

    PUT = (
        "INSERT INTO {} VALUES(?,?,?,?) ON CONFLICT(key) DO UPDATE"
        " SET value=excluded.value, status=excluded.status, at=excluded.at"
    )

    def __init__(self, path: str, durable: bool = False) -> None:
        new = not os.path.exists(path)
        self.db = sqlite3.connect(path, isolation_level=None)
        self.run, self.close = self.db.execute, self.db.close
        settings = ["auto_vacuum=INCREMENTAL", "journal_mode=WAL"] if new else []
        settings += ["synchronous=FULL" if durable else "synchronous=NORMAL", "fullfsync=ON"]
        settings += [
            "checkpoint_fullfsync=ON",
            "secure_delete=ON",
            "cell_size_check=ON",
            "trusted_schema=OFF",
        ]
        for setting in (*settings, f"journal_size_limit={16 * 2**20}"):
            self.run(f"PRAGMA {setting}")
        for table in ("tasks", "sessions", "session_log") if new else ():
            columns = "key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, status TEXT, at INTEGER"
            self.run(f"CREATE TABLE {table}({columns})")
            self.run(f"CREATE INDEX {table}_status_at ON {table}(status, at)")

    def store_task(self, task: dict[str, Any]) -> None:
        value = json.dumps({**task, "payload": b64encode(task["payload"]).decode()})
        at = task["claimed_at"] if task["completed_at"] is None else task["completed_at"]
        self.run(self.PUT.format("tasks"), ("tasks:" + task["task_id"], value, task["status"], at))

    def load(self, batch: list[dict[str, Any]]) -> None:
        self.run("BEGIN IMMEDIATE")
        for fields in batch:
            self.store_task(by_hand(fields))
        self.run("COMMIT")

    @staticmethod
    def task(value: str) -> dict[str, Any]:
        task: dict[str, Any] = json.loads(value)
        task["payload"] = b64decode(task["payload"])
        return task

    def get_task(self, name: str) -> dict[str, Any] | None:
        row = self.run("SELECT value FROM tasks WHERE key=?", ("tasks:" + name,)).fetchone()
        return self.task(row[0]) if row else None

    def list_tasks_by_status(self, status: str) -> list[dict[str, Any]]:
        rows = self.run("SELECT value FROM tasks WHERE status=? ORDER BY at", (status,))
        return [self.task(value) for (value,) in rows]

    def latest_tasks(self, count: int) -> list[dict[str, Any]]:
        each = "SELECT * FROM (SELECT value, at FROM tasks WHERE status='{}' ORDER BY at DESC LIMIT {})"
        union = " UNION ALL ".join(each.format(status.value, count) for status in TaskStatus)
        rows = self.run(f"SELECT value FROM ({union}) ORDER BY at DESC LIMIT {count}")
        return [self.task(value) for (value,) in rows]

    def iter_tasks(self) -> Iterator[dict[str, Any]]:
        return (self.task(value) for (value,) in self.run("SELECT value FROM tasks ORDER BY key"))

    def update_task_status(self, name: str, status: str) -> None:
        self.run("BEGIN IMMEDIATE")
        task = self.get_task(name)
        assert task is not None
        task["history"].append({"status": status, "at": int(time.time()), "signature": None})
        self.store_task({**task, "status": status})
        self.run("COMMIT")

    def append_transcript(self, name: str, role: str, content: str) -> None:
        now = int(time.time())
        self.run("BEGIN IMMEDIATE")
        row = self.run("SELECT value FROM sessions WHERE key=?", ("sessions:" + name,)).fetchone()
        session = json.loads(row[0]) if row else {"id": name, "tasks": [], "created_at": now, "entries": 0}
        seq = session["entries"]
        entry = {"log": name, "seq": seq, "content": content, "role": role, "timestamp": now}
        self.run(self.PUT.format("session_log"), (f"session_log:{name}:{seq}", json.dumps(entry), name, seq))
        session |= {"entries": seq + 1, "last_active": now}
        self.run(self.PUT.format("sessions"), ("sessions:" + name, json.dumps(session), None, now))
        self.run("COMMIT")


START = int(time.time()) - 3 * 365 * DAY
LOAD = 2_500  # tasks in one transaction


def fields_of(n: int, prefix: str = "") -> dict[str, Any]:
    """The fields of a typical task: half of them are completed, a hundred of the first 10,000 disputed."""
    name = hashlib.sha256(b"%d" % n).hexdigest()
    status = TaskStatus.COMPLETED if n // 1_000 % 2 else TaskStatus.CLAIMED
    return {
        "task_id": prefix + name[:44],
        "payload": json.dumps({"url": f"https://example.org/{n}", "body": name * 3}).encode(),
        "status": TaskStatus.DISPUTED if n % 100 == 7 and n < 10_000 else status,
        "claimed_at": START + n,
        "description": f"Summarise document {n}",
        "reward_lamports": 5_000_000 + n,
        "creator": DEVNET_CREATOR,
    }


def by_hand(fields: dict[str, Any]) -> dict[str, Any]:
    """The same task as a dict, with the fields that TaskRecord fills in."""
    status = fields["status"].value
    history = [{"status": status, "at": fields["claimed_at"], "signature": None}]
    absent = {"completed_at": None, "on_chain_signature": None, "reward_skr_tokens": None}
    return {**fields, **absent, "status": status, "history": history}


class Bench:
    """Measures by hand and ours in turn, round after round, so that what else the machine does hurts both alike."""

    def __init__(self, folder: str, rows: int) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.sizes = [size for size in (10_000, 100_000, 1_000_000) if size < rows] + [rows]
        self.measures: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def tell(self, what: str) -> None:
        if sys.stderr.isatty():
            seconds = time.monotonic() - self.began
            print(f"\r\033[K{seconds:4.0f} s  {what}", end="", file=sys.stderr, flush=True)

    def compare(
        self,
        operation: str,
        hand: Callable[[int], object],
        ours: Callable[[int], object],
        *,
        at_most: float | None = None,
        tasks: int = 0,
        rounds: int = 15,
        calls: int = 100,
        each: int = 1,
        prepare: Callable[[int], object] = lambda turn: None,
    ) -> None:
        """Call both with a growing number; note the median microseconds, and the median of the rounds' ratios."""
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            self.tell(f"{operation}, {tasks:,} tasks, round {turn + 1} of {rounds}")
            prepare(turn)
            for side in (0, 1) if turn % 2 else (1, 0):
                action, began = (hand, ours)[side], time.perf_counter()
                for number in range(turn * calls, (turn + 1) * calls):
                    action(number)
                times[side].append((time.perf_counter() - began) / calls / each * 1e6)
        figures = dict(zip(("by_hand_us", "ours_us"), map(statistics.median, times), strict=True))
        ratio = statistics.median(ours / hand for hand, ours in zip(*times, strict=True))
        self.measures.append(
            {"operation": operation, "tasks": tasks, **figures, "ratio": ratio, "at_most": at_most}
        )

    def grow(self, before: int, size: int) -> None:
        """Load both databases up to a number of tasks, and measure what should not become slower with it."""
        paths, batch, rng = (self.path("hand.db"), self.path("ours.db")), list[Any](), random.Random(size)
        compare = partial(self.compare, tasks=size)
        names = [fields_of(rng.randrange(size))["task_id"] for _ in range(1_500)]
        hand, db = ByHand(paths[0]), OperatorDb(paths[1], durable=False)

        def prepare(turn: int) -> None:
            first = before + turn * LOAD
            batch[:] = map(fields_of, range(first, min(first + LOAD, size)))

        def load(_: int) -> None:
            with db.transaction():
                for fields in batch:
                    db.store_task(TaskRecord(**fields))

        def opened(kind: Any, path: str, n: int) -> None:
            with closing(kind(path)) as one:
                one.get_task(names[n])

        rounds, each = -(-(size - before) // LOAD), min(LOAD, size - before)
        loads = [lambda _: hand.load(batch), load]
        compare("bulk load, each task", *loads, at_most=2, calls=1, rounds=rounds, each=each, prepare=prepare)
        gets = [lambda n, by=by: by.get_task(names[n]) for by in (hand, db)]
        compare("get_task", *gets, at_most=1.3)
        lists = [lambda _, by=by: by.list_tasks_by_status("disputed") for by in (hand, db)]
        compare("list_tasks_by_status, 100 tasks", *lists, at_most=1.5, calls=10)
        latest = [lambda _: hand.latest_tasks(10), lambda _: db.list_tasks(limit=10, newest_first=True)]
        compare("list_tasks, latest 10", *latest, calls=20)
        new = [fields_of(n, f"new {size} ") for n in range(1_500)]
        stores = [
            lambda n: hand.store_task(by_hand(new[n])),
            lambda n: db.store_task(TaskRecord(**new[n])),
        ]
        compare("store_task", *stores)
        moves = [
            lambda n, by=by: by.update_task_status(new[n]["task_id"], "in_progress") for by in (hand, db)
        ]
        compare("update_task_status", *moves)
        for entries in (10, 10_000):
            append = [
                lambda _, by=by: by.append_transcript(f"{entries} {size}", "user", "some words")  # noqa: B023
                for by in (hand, db)
            ]
            for _ in range(entries):
                append[0](0)
                append[1](0)
            compare(f"append_transcript, entry {entries:,}", *append, calls=5)
        walks = [lambda _, by=by: deque(by.iter_tasks(), 0) for by in (hand, db)]
        compare("iter_tasks, each task", *walks, calls=1, rounds=3, each=size)
        hand.close()
        db.close()
        opens = [partial(opened, *each) for each in zip((ByHand, OperatorDb), paths, strict=True)]
        compare("open, get_task, close", *opens, calls=5)

    def durable(self) -> None:
        """Compare a store that has reached the disk when it returns: one by hand, one of ours, and so on."""
        hand, db = ByHand(self.path("durable-hand.db"), durable=True), OperatorDb(self.path("durable.db"))
        new = [fields_of(n) for n in range(500)]
        stores = [
            lambda n: hand.store_task(by_hand(new[n])),
            lambda n: db.store_task(TaskRecord(**new[n])),
        ]
        with closing(hand), db:
            self.compare("store_task, durable", *stores, at_most=1.15, calls=1, rounds=500)

    def processes(self) -> None:
        """Compare a process that imports the module with one that imports what it stands on, compiled and for the first time."""
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": self.path("compiled")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        imports = [
            lambda _, names=names: subprocess.run(
                [sys.executable, "-c", f"import {names}"], cwd=HERE, env=environment, check=True
            )
            for names in ("sqlite3, json, dataclasses", "operator_db")
        ]
        for each in imports:
            each(0)
        self.compare("import in a new process", *imports, at_most=1.3, calls=1, rounds=21)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        shutil.rmtree(next(Path(self.path("compiled")).rglob("operator_db.*.pyc")).parent)
        self.compare("import, not yet compiled", *imports, calls=1, rounds=5)

    def threads(self) -> None:
        """Note how many tasks a second are stored by one thread, and by sixteen through one handle."""
        for count in (1, 16):
            self.tell(f"{count} threads store tasks")
            with OperatorDb(self.path(f"{count} threads.db"), durable=False) as db:

                def store(thread: int, count: int = count, db: OperatorDb = db) -> None:
                    for n in range(3_200 // count):
                        db.store_task(TaskRecord(task_id=f"{thread} {n}"))

                began = time.perf_counter()
                in_threads(*(partial(store, thread) for thread in range(count)))
                speed = 3_200 / (time.perf_counter() - began)
                self.figures[f"store_task, calls a second with {count} threads"] = round(speed)

    def memory(self, size: int) -> None:
        """Note the peak memory of new processes (VmHWM, so on Linux alone), each of which meets every task."""
        program = (
            "import sys; from collections import deque; from operator_db import OperatorDb\n"
            "with OperatorDb(sys.argv[1], durable=False) as db: {}\n"
            "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        shutil.copy(self.path("ours.db"), self.path("pruned.db"))
        for action, name in (
            ("pass", "ours.db"),
            ("deque(db.iter_tasks(), 0)", "ours.db"),
            ("db.export(sys.argv[2])", "ours.db"),
            ("db.import_(sys.argv[2])", f"imported {size}.db"),
            ("db.prune()", "pruned.db"),
        ):
            if sys.platform == "linux" and ("port" not in action or hasattr(OperatorDb, "export")):
                self.tell(f"memory of {action}, {size:,} tasks")
                command = [sys.executable, "-c", program.format(action), self.path(name), self.path("export")]
                peak = subprocess.run(command, cwd=HERE, check=True, capture_output=True).stdout
                self.figures[f"peak memory in MB of {action}, {size:,} tasks"] = round(int(peak) / 1024, 1)

    def prune(self) -> None:
        """Prune half of the tasks while another thread writes, and note the longest that it waited."""
        db, done, waits = OperatorDb(self.path("ours.db"), durable=False), threading.Event(), [0.0]

        def write() -> None:
            while not done.is_set():
                began = time.perf_counter()
                db.store_task(TaskRecord(task_id=f"meanwhile {len(waits)}"))
                waits.append(time.perf_counter() - began)

        self.tell("prune while another thread writes")
        writer, began = threading.Thread(target=write), time.perf_counter()
        with db:
            writer.start()
            try:
                pruned = db.prune().tasks
                seconds = time.perf_counter() - began
            finally:
                done.set()
                writer.join()
        self.figures["prune, tasks"] = pruned
        self.figures["prune, microseconds a task"] = round(seconds / pruned * 1e6, 1)
        self.figures["prune, writes of another thread meanwhile"] = len(waits) - 1
        self.figures["prune, longest of these writes in ms"] = round(max(waits) * 1e3, 1)

    def run(self) -> None:
        self.processes()
        self.durable()
        self.threads()
        for before, size in itertools.pairwise((0, *self.sizes)):
            self.grow(before, size)
            self.memory(size)
        self.prune()
        self.tell("")
        first = [each["operation"] for each in self.measures].index
        self.measures.sort(key=lambda each: first(each["operation"]))


def bench(argv: list[str]) -> int:
    """Measure each operation beside the same by hand, and as the database grows; print a table, or JSON."""
    import argparse

    parser = argparse.ArgumentParser(prog="bench", description=bench.__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="tasks at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="operator-bench-") as folder:
        run = Bench(folder, options.rows)
        run.run()
    if options.json:
        print(json.dumps({"measures": run.measures, "figures": run.figures}, indent=1))
        return 0
    print(f"{'median microseconds':32}{'tasks':>10}{'by hand':>12}{'ours':>12}{'ratio':>8}{'at most':>9}")
    line = "{operation:32}{tasks:10,}{by_hand_us:12,.1f}{ours_us:12,.1f}{ratio:8.2f}{most:>9}"
    for each in run.measures:
        print(line.format(**each, most=each["at_most"] or ""))
    for name, figure in run.figures.items():
        print(f"{name:62}{figure:12,}")
    return 0


def run_tests(classes: slice) -> tuple[int, int, int]:
    """Run the tests of every class in a part of them; return how many passed, failed and were skipped."""
    suite = unittest.TestSuite(
        list(unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]))[classes]
    )
    result = unittest.TextTestRunner(warnings="error").run(suite)
    failed = len({str(test) for test, _ in result.failures + result.errors}) + len(result.unexpectedSuccesses)
    return result.testsRun - failed - len(result.skipped), failed, len(result.skipped)


def main(argv: list[str]) -> int:
    """Run the tests, or what is named: `soak [--minutes N] [--seed S]`, `bench [--rows N] [--json]`."""
    logging.getLogger("operator_db").addHandler(logging.NullHandler())
    if argv[:1] in (["soak"], ["bench"]):
        return (soak if argv[0] == "soak" else bench)(argv[1:])
    if argv == ["half"]:
        print(*run_tests(slice(1, None, 2)))
        return 0
    with tempfile.TemporaryDirectory(prefix="operator-compiled-") as compiled:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # so that not every process has to compile the module
        os.environ["PYTHONPYCACHEPREFIX"] = compiled
        if sys.gettrace():  # coverage follows one process
            counts = run_tests(slice(None))
        else:
            command = [sys.executable, str(Path(__file__).resolve()), "half"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as half:
                counts = run_tests(slice(0, None, 2))
                told = half.communicate()[0].split()[-3:]
            others = map(int, told) if half.returncode == 0 else (0, 1, 0)
            counts = tuple(map(sum, zip(counts, others, strict=True)))
    passed, failed, skipped = counts
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
