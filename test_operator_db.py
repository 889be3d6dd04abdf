"""The promises of operator_db, as sentences that fail when they are broken. Standard library only.

`python3 test_operator_db.py` runs them all; its last line reads `N passed, N failed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import unittest
import zlib
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from enum import Enum, Flag
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

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

    def python(self, program: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
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
                for r in raw.execute("EXPLAIN QUERY PLAN " + operator_db._WALK.format("tasks"), ("", None))
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
        stored.status = TaskStatus.DISPUTED
        db.store_task(stored)
        self.assertEqual([c.status for c in stored.history], ["claimed", "disputed", "resolved", "disputed"])
        for _ in range(3):
            db.store_task(stored)
        self.assertEqual(db.get_task("t"), stored)

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
                if name != "task" or value is not None:
                    wrong.append({**bundle, name: value})
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


def soak(argv: list[str]) -> int:
    return 0


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

    def test_leaves_the_database_alone_in_its_directory(self) -> None:
        with OperatorDb(self.path) as db:
            in_threads(*[lambda: db.store_task(TaskRecord(task_id="t"))] * 3)
        self.assertEqual(os.listdir(self.directory), ["operator.db"])


class AnInterrupt(Scratch):
    """KeyboardInterrupt may land between any two instructions of this module."""

    @contextmanager
    def landing_in(self, function: str) -> Any:
        """Raise KeyboardInterrupt at the first instruction of the next call of a function, as a signal would."""

        def trace(frame: Any, event: str, argument: object) -> Any:
            if frame.f_code.co_name == function and frame.f_code.co_filename == operator_db.__file__:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)

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
        done = subprocess.run(
            [sys.executable, "-c", program, self.path],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
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
        done = subprocess.run(
            [sys.executable, "-c", program, self.path],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
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
        with redirect_stdout(StringIO()):
            self.assertTrue(operator_db.inspect())
        path.write_bytes(path.read_bytes().replace(b"original", b"0riginal"))
        done = self.python("import operator_db, sys; sys.exit(0 if operator_db.inspect() else 1)")
        self.assertEqual(done.returncode, 1)
        self.assertIn("tasks:t", done.stdout)

    def test_a_promise_that_is_broken_is_reported(self) -> None:
        def broken(path: str) -> None:
            operator_db._expect(1 == 2, "one is two")

        done: list[str] = []
        promises = (("arithmetic", broken), ("nothing", lambda path: None))
        with (
            mock.patch("operator_db._PROMISES", promises),
            mock.patch("builtins.print", lambda *a, **k: done.append(a[0])),
        ):
            self.assertFalse(operator_db.self_check())
        self.assertIn("FAIL  arithmetic", done[0])
        self.assertIn("1 of 2 promises held", done[-1])

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


def main(argv: list[str]) -> int:
    """Run the tests, or what is named: `soak`."""
    if argv[:1] == ["soak"]:
        return soak(argv[1:])
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    result = unittest.TextTestRunner(verbosity=1 if not argv else 2, warnings="error").run(suite)
    failed = len({str(test) for test, _ in result.failures + result.errors}) + len(result.unexpectedSuccesses)
    skipped = len(result.skipped)
    print(
        f"{result.testsRun - failed - skipped} passed, {failed} failed"
        + (f", {skipped} skipped" if skipped else "")
    )
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
