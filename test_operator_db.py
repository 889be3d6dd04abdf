"""The promises of operator_db, each a class of tests that fail when it is broken.

    python3 test_operator_db.py                                all tests, then: N passed, N failed
    python3 test_operator_db.py CLASS[.TEST] ...               some of them
    python3 test_operator_db.py soak [--minutes N] [--seed N]  random operations and faults
    python3 test_operator_db.py bench [--rows N] [--json]      each operation, beside one by hand

The classes stand in the order of the README's table of promises. Tests use what users can call, and
no private name of the module; where a test has to see what SQLite is asked, it listens at the
connections (`watch_connections`). Standard library only.
"""

from __future__ import annotations

import argparse
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
from array import array
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
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

# A real task on Solana devnet, 2026-03-27, recorded by the AgenC protocol's own readiness run: bid,
# claim, dispute, resolution. Program GN69CoBM1XUt8MJtA6Kwd7WRwLzTNtVqLwf5o3fwWDV3.
DEVNET_TASK = "2aotSaHBBZvWyUDt8qztEGesVGiVqg54xiPvBxZvAqFt"
DEVNET_CREATOR = "AYwAQmXxTLB3ukpRPHV2LC6qA4DCo2hsuSTneNn9xnQN"
DEVNET_WORKER = "4YRpGXNp5gfPE8XqcUAL3FV6xHMJaQkxVccPTSy8hutg"
DEVNET_CLAIM = (
    "4CtqyVXQuSC3ogSXU5ia9TYrUpGWwLSg2kZySbCmr2qC2X6vEpzqRzF9oYDViPGmrFvLeVDXeAS2SULjddBfv2EB"
)
DEVNET_DISPUTE = (
    "37WpEBkP5eWGkDs98BHyvTA6CMMbt61Hco7qn9khxy4iZJF4iY8y9RghrTdErYD1QDRhXPBZ2uLvAy9R8qRRA4ra"
)
DEVNET_RESOLVE = (
    "411bqVLrReRLerQ9ycCGhD6u4yQ4UPoE3GsDPVm9NE2Yod17uhD4UHYL9vSQxeduF5rrvHkzpzbe3QfWPQMHXQyg"
)

# ==== Records to store ============================================================================


class Colour(Enum):
    RED = 1
    BLUE = "blue"


class Rights(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Part:
    name: str
    raw: bytes = b""


@dataclass(kw_only=True)
class PairedDevice:
    """A record of an operator's own with a field of every kind."""

    device_id: str
    last_seen: int = 0
    status: str = "paired"
    token: str = field(default="", metadata={"secret": True})
    colour: Colour = Colour.RED
    part: Part | None = None
    parts: list[Part] = field(default_factory=list)
    by_name: dict[str, bytes] = field(default_factory=dict)
    ratio: float = 0.5
    trusted: bool = False
    anything: Any = None


@dataclass(kw_only=True)
class Tally:
    """A small record of an operator's own."""

    name: str
    count: int = 0
    pin: str = field(default="", metadata={"secret": True})


@dataclass(kw_only=True)
class Wallet:
    """A record of an operator's own that holds records with secrets."""

    owner: str
    tallies: list[Tally] = field(default_factory=list)


SECRET = "5ecretSecret5"


def devices_of(db: OperatorDb) -> operator_db.Namespace[PairedDevice]:
    return db.namespace("devices", PairedDevice, key="device_id", status="status", at="last_seen")


def tallies_of(db: OperatorDb) -> operator_db.Namespace[Tally]:
    return db.namespace("tallies", Tally, key="name")


def wallets_of(db: OperatorDb) -> operator_db.Namespace[Wallet]:
    return db.namespace("wallets", Wallet, key="owner")


def proof(task_id: str, outputs: bytes = b"result", **more: Any) -> VerificationLog:
    return VerificationLog(**{"task_id": task_id, "outputs": outputs, "timestamp": 7, **more})


def store_tasks(db: OperatorDb, *task_ids: str, **fields: Any) -> None:
    """Store a task of each id, all with the same other fields."""
    for task_id in task_ids:
        db.store_task(TaskRecord(task_id=task_id, **fields))


def task_ids(db: OperatorDb) -> list[str]:
    """Return the ids of all tasks, sorted."""
    return [task.task_id for task in db.iter_tasks()]


def store_secrets(db: OperatorDb) -> None:
    """Store SECRET in each of four places."""
    endpoints = [f"https://x/?key={SECRET}"]
    db.store_config(OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=endpoints))
    tallies_of(db).put(Tally(name="two", pin=SECRET))
    wallets_of(db).put(Wallet(owner="me", tallies=[Tally(name="in", pin=SECRET)]))


def fill(path: str, tasks: int = 40) -> None:
    """Make a database with some of everything."""
    with OperatorDb(path, durable=False) as db, db.transaction():
        for n in range(tasks):
            payload = random.Random(n).randbytes(n * 97 % 3000)
            status = list(TaskStatus)[n % 5]
            db.store_task(TaskRecord(task_id=f"t{n}", payload=payload, status=status, claimed_at=n))
            if n % 2:
                db.store_proof(proof(f"t{n}", b"out%d" % n, submitted=n % 4 == 1))
        for n in range(30):
            db.append_transcript(f"s{n % 3}", "user", f"utterance {n} " * 9, timestamp=n)
        db.append_command("s0", "status", timestamp=5)
        db.store_config(OperatorConfig(keypairs={"main": "k" * 40}, capabilities=["voice"]))
        tallies_of(db).put(Tally(name="one", count=1))


def every_record(db: OperatorDb) -> Iterator[tuple[tuple[str, str], Any]]:
    """Walk the records of a database made by `fill`, each with its namespace and id."""
    for task in db.iter_tasks():
        yield ("tasks", task.task_id), task
    for log in db.list_proofs():
        yield ("proofs", log.task_id), log
    for session in db.list_sessions():
        yield ("sessions", session.session_id), session
    yield ("config", "operator"), db.get_config()
    for tally in tallies_of(db).values():
        yield ("tallies", tally.name), tally


def exported(db: OperatorDb, *, include_secrets: bool = True) -> list[bytes]:
    """Return the lines of an export, without its header."""
    out = BytesIO()
    db.export(out, include_secrets=include_secrets)
    return out.getvalue().splitlines()[1:]


def content_of(path: str) -> list[bytes]:
    """Return every record of a file, as exported by a process that knows no class but ours."""
    with OperatorDb(path, read_only=True) as db:
        return exported(db)


# ==== Threads, programs, files ====================================================================


def run_in_threads(*actions: Callable[[], object]) -> None:
    """Run the actions at the same time; raise the first error of any."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        if thread.is_alive():
            raise AssertionError("a thread hangs")
    if errors:
        raise errors[0]


@contextmanager
def in_background(*actions: Callable[[], object]) -> Iterator[None]:
    """Run the actions in threads beside the block; wait for them at its end, and raise an error."""
    with ThreadPoolExecutor(len(actions)) as pool:
        running = [pool.submit(action) for action in actions]
        yield
        for each in running:
            each.result(15)


@contextmanager
def open_block(db: OperatorDb, *task_ids: str) -> Iterator[Callable[[], None]]:
    """Let another thread store tasks and stay in its transaction until the block ends it."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with db.transaction():
            store_tasks(db, *task_ids)
            inside.set()
            if not leave.wait(15):
                raise AssertionError("nobody ended the block")

    with in_background(hold):
        if not inside.wait(15):
            raise AssertionError("the block was never entered")
        try:
            yield leave.set
        finally:
            leave.set()


def run_program(
    program: str, *arguments: str, wrap: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program text in a new interpreter, with `sys` and our public names imported."""
    text = f"import sys; sys.path.insert(0, {str(HERE)!r}); from operator_db import *\n{program}"
    command = [*wrap, sys.executable, "-W", "ignore", "-c", text, *arguments]
    defaults = {"capture_output": True, "text": True, "timeout": 20}
    return subprocess.run(command, check=False, **{**defaults, **options})


def read_bytes(path: str) -> bytes:
    """Return the bytes of a file that nobody has open."""
    return Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a private file that nobody has open."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def open_descriptors(folder: str) -> int:
    """Count the descriptors of this process that lead into a folder."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith(folder)
    return found


# ==== Faults ======================================================================================

Say = Callable[[object], None]
Verb = Callable[[OperatorDb], object]
NOBODY = 65534  # a user whom file modes hold back


class Child:
    """A forked child that runs `action(say)`; what it says reaches the parent line by line.

    An alarm ends a child that hangs, and `alive` knows those that their test left behind.
    """

    alive: ClassVar[set[int]] = set()

    def __init__(self, action: Callable[[Say], Any], *, seconds: float = 20.0) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            self.alive.clear()
            sys.settrace(None)  # coverage slows the child down, and is not collected from it
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
            reason = json.loads(line[1:]) if line else "it died or hung"
            raise AssertionError(f"the child failed: {reason}")
        return line

    def kill(self, after: float = 0.0) -> list[str]:
        """Kill the child with SIGKILL so many seconds from now, and return what it had said."""
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


def in_child(action: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """Run an action in a forked child and return its result; what it raises fails here."""
    return Child(lambda _: action(), seconds=seconds).result()


def as_nobody(folder: str, action: Callable[[], Any]) -> Any:
    """Run an action in a child, as a user whom file modes hold back, in a folder of its own."""

    def drop() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return action()

    if os.geteuid() == 0:
        for name in (folder, *(os.path.join(folder, each) for each in os.listdir(folder))):
            os.chown(name, NOBODY, NOBODY)
    return in_child(drop)


def holding_the_lock(path: str, task_id: str = "held") -> Child:
    """Return a child that stays in a transaction which stores a task; SIGUSR1 ends it."""

    def hold(say: Say) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        with OperatorDb(path) as db, db.transaction():
            store_tasks(db, task_id)
            say("holding")
            signal.sigwait({signal.SIGUSR1})

    child = Child(hold)
    child.line()
    return child


def paused_at(verb: Callable[..., object], part: float) -> Child:
    """Return a child that has done a part of a verb with `progress=`, and waits to be killed."""

    def work(say: Say) -> None:
        def progress(done: int, total: int) -> None:
            if total and done >= total * part:
                say("so far")
                signal.pause()

        verb(progress=progress)

    child = Child(work)
    child.line()
    return child


def interrupt_when(part: float) -> Callable[[int, int], None]:
    """Return a progress function that is Ctrl-C when a part of the work is done."""

    def progress(done: int, total: int) -> None:
        if total and done >= total * part:
            raise KeyboardInterrupt

    return progress


def interrupt_at_random(action: Callable[[], object], longest: float, times: int) -> int:
    """Interrupt an action at random moments, as Ctrl-C would; return how often that struck."""
    rng, struck, armed = random.Random(8), 0, False

    def ring(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    for _ in range(times):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00002, longest))
            armed = True
            action()
            armed = False
        except KeyboardInterrupt:
            armed = False
            struck += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return struck


@contextmanager
def interrupt_at_call(number: int) -> Iterator[Callable[[], int]]:
    """Raise KeyboardInterrupt at one of the module's calls, or returns from C, in this thread.

    The block is given a function that tells how many there have been; -1 only counts them.
    """
    count = 0

    def strike(frame: Any, event: str, _: object) -> None:
        nonlocal count
        if event in ("call", "c_return") and frame.f_code.co_filename == operator_db.__file__:
            count += 1
            if count == number:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(strike)
    try:
        yield lambda: count
    finally:
        sys.setprofile(None)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: writes fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_flipped_bit(image: bytes, rng: random.Random) -> bytes:
    """Return the bytes of a file with one bit changed somewhere."""
    damaged = bytearray(image)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


class FaultDriver:
    """Puts one verb through one kind of fault after another, each time on a copy of one database.

    After each fault the file must be sound, and hold exactly what it held before or exactly what
    the verb makes of it: the latter where the verb had returned. Where the object lives on, it must
    be able to write. Time stands still, so that the verb makes the same of each copy.
    """

    FAULTS = ("kill", "full disk", "interrupt")

    def __init__(self, test: DatabaseTest, verb: Verb, *, tries: int = 10) -> None:
        self.test, self.verb, self.tries, self.rng = test, verb, tries, random.Random(3)
        self.path, self.outcomes = test.path, Counter[str]()
        self.image = read_bytes(self.path)  # nobody has it open
        self.before, began = content_of(self.path), time.monotonic()
        self.run()
        self.seconds, self.after = time.monotonic() - began, content_of(self.path)
        test.assertNotEqual(self.before, self.after, "the verb changes nothing")

    def run(self) -> None:
        with OperatorDb(self.path) as db:
            self.verb(db)

    def put_back(self) -> None:
        """Make the file what it was before the verb; remove what a killed process left."""
        for name in os.listdir(self.test.folder):
            if name.startswith("operator.db") and name.endswith(("-wal", "-shm", ".new")):
                os.unlink(os.path.join(self.test.folder, name))
        write_bytes(self.path, self.image)

    def go(self, *faults: str) -> Counter[str]:
        """Try these faults, or all; count how often each left the file as before, and as after."""
        for fault in faults or self.FAULTS:
            {"kill": self.kill, "full disk": self.fill_disk, "interrupt": self.interrupt}[fault]()
        self.put_back()
        return self.outcomes

    def judge(self, fault: str, acknowledged: bool, *others: str) -> None:
        """Fail unless the file holds all or nothing of the verb, and what was stored afterwards."""
        self.test.assert_sound()
        found = content_of(self.path)
        beside = [line for line in found if json.loads(line)["record"].get("task_id") in others]
        self.test.assertEqual(len(beside), len(others), f"{fault}: a later write is lost")
        found = [line for line in found if line not in beside]
        wanted = (self.after,) if acknowledged else (self.before, self.after)
        self.test.assertTrue(found in wanted, f"{fault}: {found} is neither before nor after")
        self.outcomes[f"{fault}: {'after' if found == self.after else 'before'}"] += 1

    def kill(self) -> None:
        def work(say: Say) -> None:
            say("begin")
            self.run()
            say("acknowledged")

        for _ in range(self.tries):
            self.put_back()
            child = Child(work)
            child.line()
            said = child.kill(after=self.rng.uniform(0, self.seconds * 1.3))
            self.judge("kill", "acknowledged" in said)

    def fill_disk(self) -> None:
        def work(limit: int) -> bool:
            with OperatorDb(self.path) as db:
                acknowledged = True
                try:
                    with file_size_limit(limit):
                        self.verb(db)
                except StorageError as error:
                    acknowledged = False
                    self.test.assertIn(self.path, str(error))
                store_tasks(db, "room again")
            return acknowledged

        size = max(len(self.image), sum(map(len, self.after)))
        for n in range(self.tries):
            self.put_back()
            limit = size * 2 * n // self.tries
            self.judge("full disk", in_child(partial(work, limit)), "room again")

    def interrupt(self) -> None:
        def calls() -> int:
            self.put_back()
            with OperatorDb(self.path) as db, interrupt_at_call(-1) as so_far:
                self.verb(db)
                return so_far()

        def work(number: int) -> bool:
            kept: list[BaseException] = []  # and with it all frames that it passed through
            with OperatorDb(self.path, timeout=2) as db:
                try:
                    with interrupt_at_call(number):
                        self.verb(db)
                except KeyboardInterrupt as error:
                    kept.append(error)
                store_tasks(db, "afterwards")
            return not kept

        total = in_child(calls)
        for number in sorted({self.rng.randrange(1, total + 2) for _ in range(self.tries)}):
            self.put_back()
            self.judge("interrupt", in_child(partial(work, number)), "afterwards")


# ==== The base of every class =====================================================================


class DatabaseTest(unittest.TestCase):
    """A folder, a home and an environment of its own for each test, and a time limit."""

    seconds = 20

    def setUp(self) -> None:
        def too_long(*_: object) -> None:
            raise AssertionError(f"the test took longer than {self.seconds} s")

        scratch = tempfile.TemporaryDirectory(prefix="operator_db-test-")
        self.folder = os.path.realpath(self.enterContext(scratch))
        names = ("operator.db", "other.db", "operator.jsonl")
        self.path, self.other, self.file = map(self.beside, names)
        environment = {**os.environ, "HOME": self.folder, "PYTHONPATH": str(HERE)}
        environment.pop("AGENC_DB_PATH", None)
        self.enterContext(mock.patch.dict(os.environ, environment, clear=True))
        before = signal.signal(signal.SIGALRM, too_long)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        self.addCleanup(lambda: [os.kill(pid, signal.SIGKILL) for pid in Child.alive])
        self.addCleanup(signal.alarm, 0)
        signal.alarm(self.seconds)

    def beside(self, name: str) -> str:
        """Return a path in the test's folder."""
        return os.path.join(self.folder, name)

    def names(self) -> set[str]:
        """Return the names in the folder, without what SQLite keeps beside an open database."""
        return {name for name in os.listdir(self.folder) if not re.search(r"\.db-(wal|shm)$", name)}

    def open(self, path: str | None = None, **options: Any) -> OperatorDb:
        """Open a database until the end of the test, with durable=False, which is quicker."""
        return self.enterContext(OperatorDb(path or self.path, **{"durable": False, **options}))

    def sql(self, statement: str, *values: Any, path: str | None = None) -> list[tuple[Any, ...]]:
        """Execute a statement as another program would, and return its rows."""
        with closing(sqlite3.connect(path or self.path, isolation_level=None)) as other:
            return other.execute(statement, values).fetchall()

    def script(self, text: str, *, path: str | None = None) -> None:
        """Execute several statements as another program would."""
        with closing(sqlite3.connect(path or self.path, isolation_level=None)) as other:
            other.executescript(text)

    def damage(self, key: str, *, path: str | None = None) -> None:
        """Make the checksum of a stored record wrong."""
        table = key.partition(":")[0]
        self.sql(f"UPDATE {table} SET crc = crc + 1 WHERE key = ?", key, path=path)

    def watch_connections(
        self, *, listener: Callable[[str], object] | None = None
    ) -> list[sqlite3.Connection]:
        """Return a list that each connection joins which the module opens during this test.

        `listener` is called with each statement as it begins, in the thread that executes it.
        """
        connect, opened = sqlite3.connect, list[sqlite3.Connection]()

        def recording(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            if "factory" in options:  # the module's, and not this test's own
                connection.set_trace_callback(listener)
                opened.append(connection)
            return connection

        self.enterContext(mock.patch.object(sqlite3, "connect", recording))
        return opened

    def assert_sound(self, path: str | None = None) -> None:
        """Fail unless a fresh look at the file finds nothing wrong."""
        with OperatorDb(path or self.path) as db:
            self.assertEqual(db.check(), [])

    def assert_refused(
        self, error: type[Exception], action: Callable[[], object], *words: str
    ) -> OperatorDbError:
        """Fail unless the action raises this error, with these words and without SECRET."""
        with self.assertRaises(error) as caught:
            action()
        message = str(caught.exception)
        for word in words:
            self.assertIn(word, message)
        self.assertIsInstance(caught.exception, OperatorDbError)
        self.assertLess(len(message), 1500)
        self.assertTrue(message.isprintable(), "a message carries no control character")
        self.assertNotIn(SECRET, "".join(traceback.format_exception(caught.exception)))
        return caught.exception

    @contextmanager
    def assert_unchanged(self, path: str | None = None) -> Iterator[None]:
        """Fail when a record of a database changes in the block, or a file comes or goes."""
        before, names = content_of(path or self.path), self.names()
        yield
        self.assertTrue(content_of(path or self.path) == before, "a record has changed")
        self.assertEqual(self.names(), names)

    @contextmanager
    def assert_bytes_unchanged(self) -> Iterator[None]:
        """Fail when a byte of the database or its WAL changes in the block, or a file comes.

        This process must not have it open: reading its bytes would drop SQLite's locks.
        """

        def files() -> dict[str, bytes]:
            names = set(os.listdir(self.folder)) - {"operator.db-shm"}
            paths = map(self.beside, sorted(names))
            return {path: read_bytes(path) if os.path.isfile(path) else b"" for path in paths}

        before = files()
        yield
        after = files()
        self.assertEqual(list(after), list(before))
        self.assertEqual([name for name in before if before[name] != after[name]], [])

    def assert_all_or_nothing(self, verb: Verb, *faults: str, tries: int = 10) -> Counter[str]:
        """Put a verb through faults, on copies of the closed database; see FaultDriver."""
        with mock.patch("time.time", return_value=1_774_628_000.0):
            return FaultDriver(self, verb, tries=tries).go(*faults)


def nested(levels: int) -> list[Any]:
    """Return lists within each other, so many levels deep."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def values_without_a_json_form() -> dict[str, Any]:
    """Return what a free-form field cannot store, by what is wrong with it."""
    circular_list: list[Any] = []
    circular_list.append(circular_list)
    circular_dict: dict[str, Any] = {}
    circular_dict["again"] = circular_dict
    return {
        "101 levels": nested(101),
        "5,000 levels": nested(5000),
        "a list that holds itself": circular_list,
        "a dict that holds itself": circular_dict,
        "an int of 5,001 digits": 10**5000,
        "not a number": float("nan"),
        "infinity": float("inf"),
        "half a surrogate pair": "\ud800",
        "half a surrogate pair as a key": {"\ud800": 1},
        "a number as a key": {1: 2},
        "a tuple": (1,),
        "a set": {"a"},
        "bytes": b"x",
        "an object": object(),
    }


class InvalidRecordsAreRefused(DatabaseTest):
    """A record is checked when it is made and again when it is stored, and every argument too."""

    REQUIRED: ClassVar[dict[type, dict[str, Any]]] = {
        TaskRecord: {"task_id": "t"},
        StatusChange: {"status": "claimed"},
        TranscriptEntry: {"role": "user", "content": "hello"},
        SessionState: {"session_id": "s"},
        VerificationLog: {"task_id": "t", "outputs": b"result"},
        OperatorConfig: {},
    }

    NOT_TEXT_OR_NONE = ("\ud800", 7, b"a", ["a"])
    NOT_TEXT = (*NOT_TEXT_OR_NONE, None)
    UNPRINTABLE = (*"\n\0\x1b\x7f\u202e\ufeff", " \t", "a\nb", "a\0", "a\0b", "a\u202eb")
    NOT_AN_ID = (*NOT_TEXT, "", *UNPRINTABLE)
    NOT_BYTES = ("text", None, bytearray(b"x"), [1])
    NOT_A_STATUS = ("nonsense", "", 3, None, b"claimed")
    NOT_A_TIME_OR_NONE = (True, False, 1.5, "1", 2**63, -(2**63) - 1)
    NOT_A_TIME = (*NOT_A_TIME_OR_NONE, None)
    NOT_AN_AMOUNT = (-1, 2**64, True, False, 1.0, "1")

    WRONG: ClassVar[dict[type, dict[str, tuple[Any, ...]]]] = {
        TaskRecord: {
            "task_id": NOT_AN_ID,
            "payload": NOT_BYTES,
            "status": NOT_A_STATUS,
            "claimed_at": NOT_A_TIME,
            "completed_at": NOT_A_TIME_OR_NONE,
            "on_chain_signature": NOT_TEXT_OR_NONE,
            "description": NOT_TEXT_OR_NONE,
            "reward_lamports": NOT_AN_AMOUNT,
            "reward_skr_tokens": NOT_AN_AMOUNT,
            "creator": NOT_TEXT_OR_NONE,
            "history": (None, (), [1], ["claimed"], [None]),
        },
        StatusChange: {
            "status": NOT_A_STATUS,
            "at": NOT_A_TIME,
            "signature": NOT_TEXT_OR_NONE,
        },
        TranscriptEntry: {
            "role": NOT_TEXT,
            "content": NOT_TEXT,
            "timestamp": NOT_A_TIME,
        },
        SessionState: {
            "session_id": NOT_AN_ID,
            "transcript": (None, (), ["text"], [None]),
            "command_history": (None, "text", [b""], ["\ud800"]),
            "active_task_ids": (None, "text", ["a\n"], [""], [7]),
            "created_at": NOT_A_TIME,
            "last_active": NOT_A_TIME,
        },
        VerificationLog: {
            "task_id": NOT_AN_ID,
            "outputs": NOT_BYTES,
            "inputs": NOT_BYTES,
            "proof": NOT_BYTES,
            "proof_hash": ("", "0" * 64, "AB" * 32, "a" * 63, b"a" * 64),
            "result_data": (b"", bytes(64), b"x" * 63, "x" * 64),
            "timestamp": NOT_A_TIME,
            "submitted": (0, 1, None, "yes"),
            "submission_signature": NOT_TEXT_OR_NONE,
        },
        OperatorConfig: {
            "keypairs": (None, ["a"], {"a": 1}, {1: "a"}, {"\ud800": "a"}),
            "rpc_endpoints": (None, "https://x", [1]),
            "model_preferences": (None, [1], {"a": (1, 2)}, {1: "a"}, {"a": float("nan")}),
            "capabilities": (None, "voice", [b"voice"]),
            "wallet_pubkey": NOT_TEXT_OR_NONE,
            "network": NOT_TEXT_OR_NONE,
        },
    }

    def test_a_field_of_a_wrong_type_or_range_is_refused_by_name(self) -> None:
        for record_type, wrong in self.WRONG.items():
            settable = {each.name for each in dataclasses.fields(record_type) if each.init}
            self.assertEqual(set(wrong), settable, "every field is tried")
            for name, values in wrong.items():
                for value in values:
                    make = partial(record_type, **{**self.REQUIRED[record_type], name: value})
                    with self.subTest(record_type.__name__, field=name, value=value):
                        error = self.assert_refused(InvalidRecordError, make, type(value).__name__)
                        self.assertRegex(str(error), rf"\b{record_type.__name__}\b.*\b{name}\b")

    def test_a_long_value_is_cut_in_the_message(self) -> None:
        cases = (
            ("payload", "x" * 10**6, "str"),
            ("description", b"x" * 10**6, "bytes"),
            ("history", dict.fromkeys(range(10**5)), "dict"),
            ("creator", nested(5000), "list"),
            ("reward_lamports", 10**5000, "int"),
        )
        for name, value, type_name in cases:
            make = partial(TaskRecord, **{"task_id": "t", name: value})
            with self.subTest(name):
                error = self.assert_refused(InvalidRecordError, make, name, type_name)
                self.assertLess(len(str(error)), 400)

    def test_a_submission_signature_needs_a_proof_that_is_submitted(self) -> None:
        make = partial(proof, "t", submission_signature="signature")
        self.assert_refused(InvalidRecordError, make, "submission_signature", "submitted")
        self.assertTrue(make(submitted=True).submitted)

    def test_a_secret_of_a_wrong_type_is_not_shown(self) -> None:
        cases = (
            ("keypairs", {"main": SECRET.encode()}),
            ("keypairs", [SECRET]),
            ("rpc_endpoints", f"https://{SECRET}"),
        )
        for name, value in cases:
            make = partial(OperatorConfig, **{name: value})
            with self.subTest(name, type=type(value)):
                self.assert_refused(InvalidRecordError, make, "OperatorConfig", name, "***")

    def test_a_status_may_be_spelled_as_the_prototype_or_the_command_line_spells_it(self) -> None:
        for status in TaskStatus:
            words = status.value.split("_")
            pascal_case = "".join(map(str.capitalize, words))
            for text in (status.value, status.value.upper(), "-".join(words), pascal_case):
                with self.subTest(text):
                    self.assertIs(TaskStatus(text), status)
                    self.assertIs(TaskRecord(task_id="t", status=text).status, status)

    def test_only_ids_a_transcripts_words_and_a_proofs_outputs_are_required(self) -> None:
        for record_type, required in self.REQUIRED.items():
            with self.subTest(record_type.__name__):
                self.assertIsInstance(record_type(**required), record_type)
                for missing in required:
                    others = {name: value for name, value in required.items() if name != missing}
                    self.assertRaises(TypeError, record_type, **others)

    def test_fields_are_given_by_name(self) -> None:
        for record_type, required in self.REQUIRED.items():
            with self.subTest(record_type.__name__):
                self.assertRaises(TypeError, record_type, *required.values(), "one more")

    def test_times_default_to_now_and_what_is_absent_is_none(self) -> None:
        with mock.patch("time.time", return_value=1000.9):
            task, session = TaskRecord(task_id="t"), SessionState(session_id="s")
            change = StatusChange(status=TaskStatus.DISPUTED)
            entry = TranscriptEntry(role="user", content="")
            log = VerificationLog(task_id="t", outputs=b"")
        self.assertEqual((task.claimed_at, session.created_at, session.last_active), (1000,) * 3)
        self.assertEqual((change.at, entry.timestamp, log.timestamp), (1000,) * 3)
        self.assertEqual((task.status, task.payload), (TaskStatus.CLAIMED, b""))
        absent = (task.completed_at, task.reward_lamports, task.reward_skr_tokens)
        self.assertEqual(absent, (None, None, None))

    def test_a_record_is_checked_again_when_it_is_stored(self) -> None:
        db = self.open()
        task = TaskRecord(task_id="t")
        task.reward_lamports = -1
        session = SessionState(session_id="s")
        session.transcript.append("no entry")
        config = OperatorConfig()
        config.keypairs["main"] = 5
        cases = (
            ("a task that was changed", db.store_task, task, "reward_lamports"),
            ("a session that was changed", db.store_session, session, "transcript"),
            ("a configuration that was changed", db.store_config, config, "keypairs"),
            ("a session as a task", db.store_task, SessionState(session_id="s"), "TaskRecord"),
            ("lists as a task", db.store_task, nested(5000), "TaskRecord"),
            ("None as a task", db.store_task, None, "TaskRecord"),
            ("None as a session", db.store_session, None, "SessionState"),
            ("None as a proof", db.store_proof, None, "VerificationLog"),
            ("None as a configuration", db.store_config, None, "OperatorConfig"),
        )
        for label, store, record, word in cases:
            with self.subTest(label):
                self.assert_refused(InvalidRecordError, partial(store, record), word)
        self.assertEqual(exported(db), [])

    def test_a_free_form_value_that_json_would_change_or_that_is_too_deep_is_refused(self) -> None:
        db = self.open()
        for label, value in values_without_a_json_form().items():

            def store(value: Any = value) -> None:
                db.store_config(OperatorConfig(model_preferences={"odd": value}))

            with self.subTest(label):
                self.assert_refused(InvalidRecordError, store, "OperatorConfig")
        self.assertIsNone(db.get_config())
        self.assert_sound()

    def test_an_id_that_is_not_printable_text_is_refused_by_every_verb(self) -> None:
        db = self.open()
        devices = devices_of(db)
        verbs: dict[str, Callable[[Any], object]] = {
            "get_task": db.get_task,
            "store_task": lambda name: db.store_task(TaskRecord(task_id=name)),
            "update_task_status": lambda name: db.update_task_status(name, "completed"),
            "complete_task": lambda name: db.complete_task(name, proof(name)),
            "get_session": db.get_session,
            "transcript": db.transcript,
            "append_transcript": lambda name: db.append_transcript(name, "user", "hello"),
            "append_command": lambda name: db.append_command(name, "status"),
            "link_task, a session": lambda name: db.link_task(name, "t"),
            "link_task, a task": lambda name: db.link_task("s", name),
            "unlink_task": lambda name: db.unlink_task(name, "t"),
            "get_proof": db.get_proof,
            "store_proof": lambda name: db.store_proof(proof(name)),
            "mark_proof_submitted": lambda name: db.mark_proof_submitted(name, "signature"),
            "dispute_bundle": db.dispute_bundle,
            "get": devices.get,
            "put": lambda name: devices.put(PairedDevice(device_id=name)),
            "update": lambda name: devices.update(name, lambda device: device),
        }
        # what another program has stored under any text can be deleted
        deletions: dict[str, Callable[[Any], object]] = {
            "delete_task": db.delete_task,
            "delete_session": db.delete_session,
            "delete_proof": db.delete_proof,
            "delete": devices.delete,
        }
        for (verb, call), name in (
            *itertools.product(verbs.items(), self.NOT_AN_ID),
            *itertools.product(deletions.items(), self.NOT_TEXT),
        ):
            with self.subTest(verb, id=name):
                self.assert_refused(InvalidRecordError, partial(call, name), repr(name))
        self.assertEqual(exported(db), [])

    def test_an_argument_that_is_nonsense_is_refused(self) -> None:
        db = self.open()
        devices, tallies, deep = devices_of(db), tallies_of(db), nested(5000)
        store_tasks(db, "t")
        db.store_proof(proof("t"))
        cases: tuple[tuple[str, Callable[[], object], str], ...] = (
            ("half a surrogate pair as a status", lambda: devices.list("\ud800"), "status"),
            (
                "half a surrogate pair as a status of a walk",
                lambda: list(devices.keys("\ud800")),
                "status",
            ),
            ("lists as a status", lambda: devices.count(deep), "status"),
            ("lists as a task's status", lambda: db.list_tasks(deep), "status"),
            ("an empty status of a task", lambda: db.list_tasks(""), "''"),
            ("False as a task's status", lambda: db.list_tasks(False), "False"),
            ("an unknown status", lambda: db.update_task_status("t", "odd"), "'odd'"),
            ("an unknown status of a walk", lambda: list(db.iter_tasks("odd")), "'odd'"),
            (
                "an unknown status that is expected",
                lambda: db.update_task_status("t", "completed", expected="odd"),
                "'odd'",
            ),
            ("text as a time", lambda: db.update_task_status("t", "resolved", at="now"), "now"),
            ("an empty signature", lambda: db.mark_proof_submitted("t", ""), "''"),
            (
                "an empty signature of a status change",
                lambda: db.update_task_status("t", "resolved", signature=""),
                "''",
            ),
            ("text as a flag", lambda: db.list_proofs(submitted="yes"), "submitted"),
            ("a negative limit", lambda: db.list_tasks(limit=-1), "limit"),
            ("True as a limit", lambda: db.list_proofs(limit=True), "limit"),
            ("text as a limit", lambda: devices.list(limit="3"), "limit"),
            ("a negative number of entries", lambda: db.transcript("s", last=-1), "last"),
            ("a negative age", lambda: db.prune(task_days=-1), "-1"),
            ("an age that is not a number", lambda: db.prune(task_days=float("nan")), "nan"),
            ("text as an age", lambda: devices.prune("3"), "'3'"),
            ("an age where records have none", lambda: tallies.prune(1), "tallies"),
            ("None as a role", lambda: db.append_transcript("s", None, "hello"), "role"),
            ("None as a command", lambda: db.append_command("s", None), "None"),
            ("None as a proof", lambda: db.complete_task("t", None), "VerificationLog"),
        )
        with self.assert_unchanged():
            for label, call, word in cases:
                with self.subTest(label):
                    self.assert_refused(InvalidRecordError, call, word)


class RecordsReadBackAsTheyWereStored(DatabaseTest):
    """What is read is what was stored, whatever is in it, and whoever reads the row."""

    TEXT = '\0\x1f"\\/ é 漢字 \U0001f600 \u202e \ufeff \u2028'

    def assert_no_default(self, record: Any) -> None:
        """Fail when a field has its default, which would read back even if it were not stored."""
        for each in dataclasses.fields(record):
            factory = each.default_factory
            default = each.default if factory is dataclasses.MISSING else factory()
            self.assertNotEqual(getattr(record, each.name), default, each.name)

    def test_every_field_of_our_records_reads_back(self) -> None:
        text = self.TEXT
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
            history=[
                StatusChange(status=status, at=n - 3, signature=text)
                for n, status in enumerate(TaskStatus)
            ],
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
            task_id="t",
            inputs=b"\0",
            outputs=b"\xff",
            proof=b"p",
            proof_hash="ab" * 32,
            result_data=b"r" * 64,
            timestamp=7,
            submitted=True,
            submission_signature=text,
        )
        config = OperatorConfig(
            keypairs={"main": text, text: ""},
            rpc_endpoints=["https://x/?key=1"],
            model_preferences={"a": [1, 2.5, None, True, {"b": text}], "deep": nested(99)},
            capabilities=["voice"],
            wallet_pubkey=DEVNET_WORKER,
            network="devnet",
        )
        for record in (task, session, log, config):
            self.assert_no_default(record)
        with OperatorDb(self.path) as db:
            db.store_task(task)
            db.store_session(session)
            db.store_proof(log)
            db.store_config(config)
        db = self.open()
        self.assertEqual(db.get_task(task.task_id), task)
        self.assertEqual(list(db.iter_tasks()), [task])
        self.assertEqual(db.list_tasks(), [task])
        self.assertEqual(db.get_session("s:1"), session)
        self.assertEqual(db.list_sessions(), [session])
        self.assertEqual(db.get_proof("t"), log)
        self.assertEqual(db.list_proofs(), [log])
        self.assertEqual(db.get_config(), config)
        self.assert_sound()

    def test_every_kind_of_field_of_a_custom_record_reads_back(self) -> None:
        device = PairedDevice(
            device_id="d:%",
            last_seen=-(2**63),
            status="",
            token=self.TEXT,
            colour=Colour.BLUE,
            part=Part("é", b"\xff"),
            parts=[Part("a"), Part("b", b"\0")],
            by_name={self.TEXT: b"\0", "": b""},
            ratio=-0.0,
            trusted=True,
            anything={"deep": nested(99), "mixed": [1, None, self.TEXT, 1e300]},
        )
        self.assert_no_default(device)
        with OperatorDb(self.path) as db:
            devices_of(db).put(device)
        read = devices_of(self.open()).get(device.device_id)
        self.assertEqual(read, device)
        self.assertEqual(repr(read.ratio), "-0.0")

    def test_a_combination_of_flags_reads_back(self) -> None:
        fields = [("name", str), ("rights", Rights)]
        granted_type: Any = dataclasses.make_dataclass("Granted", fields)
        grants = self.open().namespace("grants", granted_type, key="name")
        for rights in (Rights.READ, Rights.READ | Rights.WRITE, Rights(0)):
            grants.put(granted_type("a", rights))
            self.assertEqual(grants.get("a"), granted_type("a", rights))

    def test_payloads_from_nothing_to_64_mib_read_back(self) -> None:
        db = self.open()
        for size in (0, 1, 2, 3, 4096, 64 * 2**20):
            task = TaskRecord(task_id=str(size), payload=random.Random(size).randbytes(size))
            db.store_task(task)
            self.assertTrue(db.get_task(task.task_id) == task, f"{size} bytes")

    def test_ids_of_any_printable_characters_never_collide(self) -> None:
        names = [
            *("a", "A", "\u00e1", "a\u0301", "\u00e9", "e\u0301", "漢", "אב", "\U0001f600"),
            *(":", "a:", ":a", "a:0", "a:b", "a:b:0", "tasks:a", "transcript:a"),
            *("%", "a%b", "a%3A0", "a%3Ab", "*", "?1", "\\", "../../x", " ", "a b"),
            *("'", '"', "';", "'; DROP TABLE tasks; --"),
            *("x" * 2**20, "x" * (2**20 - 1)),
        ]
        db = self.open()
        for n, name in enumerate(names):
            db.store_task(TaskRecord(task_id=name, claimed_at=n))
            db.store_proof(proof(name, b"%d" % n))
            db.append_transcript(name, "user", f"said {n}")
            db.append_command(name, f"command {n}")
        for n, name in enumerate(names):
            with self.subTest(name[:30]):
                task, log, session = db.get_task(name), db.get_proof(name), db.get_session(name)
                self.assertTrue(task.task_id == log.task_id == session.session_id == name)
                self.assertEqual((task.claimed_at, log.outputs), (n, b"%d" % n))
                self.assertEqual([entry.content for entry in session.transcript], [f"said {n}"])
                self.assertEqual(session.command_history, [f"command {n}"])
        self.assertTrue(task_ids(db) == sorted(names, key=str.encode), "each once, in key order")
        self.assertEqual(db.check(), [])
        for n, name in enumerate(names, 1):
            self.assertTrue(db.delete_task(name) and db.delete_session(name))
            self.assertEqual(db.count_tasks()[TaskStatus.CLAIMED], len(names) - n)
        self.assertEqual(db.list_sessions(), [])

    def test_a_row_can_be_read_without_this_module(self) -> None:
        db = self.open()
        store_tasks(db, "t", payload=b"\xff\xfe", status=TaskStatus.IN_PROGRESS, claimed_at=9)
        part = Part("é è", b"\xff\xfe")
        devices_of(db).put(PairedDevice(device_id="d", last_seen=8, colour=Colour.BLUE, part=part))
        in_task = {"payload": "//4=", "status": "in_progress", "creator": None}
        in_device = {"colour": "blue", "part": {"name": "é è", "raw": "//4="}, "parts": []}
        cases = (
            ("tasks", ("tasks:t", "in_progress", 9), in_task),
            ("devices", ("devices:d", "paired", 8), in_device),
        )
        for table, (wanted_key, wanted_status, wanted_at), fields in cases:
            with self.subTest(table):
                ((key, value, status, at, crc),) = self.sql(f"SELECT * FROM {table}")
                self.assertEqual((key, status, at), (wanted_key, wanted_status, wanted_at))
                self.assertEqual(crc, crc32(value.encode()))
                document = json.loads(value)
                self.assertEqual({name: document[name] for name in fields}, fields)
                compact = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
                self.assertEqual(value, compact)

    def test_a_record_that_is_read_is_the_one_that_its_constructor_makes(self) -> None:
        db = self.open()
        fields = {"task_id": "t", "claimed_at": 5, "on_chain_signature": "accepted"}
        db.store_task(TaskRecord(**fields))
        document = json.loads(self.sql("SELECT value FROM tasks")[0][0])
        self.assertEqual(len(document["history"]), 1)
        document["history"] = []
        value = json.dumps(document)
        self.sql("UPDATE tasks SET value = ?, crc = ?", value, crc32(value.encode()))
        self.assertEqual(db.get_task("t"), TaskRecord(**fields))
        self.assertEqual(db.list_tasks(), [TaskRecord(**fields)])


class CustomNamespaces(DatabaseTest):
    """Any dataclass of an operator gets what our records have, or is refused with a reason."""

    def test_a_custom_namespace_has_every_verb(self) -> None:
        devices = devices_of(self.open())
        phone = PairedDevice(device_id="phone", last_seen=5)
        radio = PairedDevice(device_id="radio", last_seen=1, status="lost")
        watch = PairedDevice(device_id="watch", last_seen=3)

        self.assertTrue(devices.put(watch))
        self.assertTrue(devices.put(phone))
        self.assertFalse(devices.put(replace(phone, ratio=2.0), if_absent=True))
        self.assertTrue(devices.put(radio, if_absent=True))
        self.assertEqual((devices.get("phone"), devices.get("lamp")), (phone, None))

        self.assertEqual(devices.list(), [radio, watch, phone])
        self.assertEqual(devices.list("paired"), [watch, phone])
        self.assertEqual(devices.list(newest_first=True, limit=2), [phone, watch])
        self.assertEqual((devices.count(), devices.count("lost"), devices.count("x")), (3, 1, 0))
        self.assertEqual(devices.statuses(), ["lost", "paired"])
        self.assertEqual(list(devices.keys()), ["phone", "radio", "watch"])
        self.assertEqual(list(devices.values()), [phone, radio, watch])
        self.assertEqual(list(devices.items("lost")), [("radio", radio)])

        found = devices.update("radio", lambda device: replace(device, status="paired"))
        self.assertEqual(found, replace(radio, status="paired"))
        self.assertEqual(devices.get("radio"), found)
        self.assertEqual((devices.count("paired"), devices.count("lost")), (3, 0))

        self.assertEqual((devices.delete("radio"), devices.delete("radio")), (True, False))
        devices.put(radio)
        self.assertEqual((devices.clear("lost"), devices.get("radio")), (1, None))
        self.assertEqual((devices.prune(0, dry_run=True), devices.count()), (2, 2))
        self.assertEqual((devices.prune(0), devices.count()), (2, 0))
        self.assertEqual(list(devices.problems()), [])

    def test_a_class_evolves_by_its_defaults(self) -> None:
        old_type: Any = dataclasses.make_dataclass("Thing", [("name", str)])
        new_type: Any = dataclasses.make_dataclass("Thing", [("name", str), ("size", int, 3)])
        db = self.open()
        db.namespace("things", old_type, key="name").put(old_type("a"))
        new_things = db.namespace("things", new_type, key="name")
        self.assertEqual(new_things.get("a"), new_type("a", 3))
        new_things.put(new_type("b", 5))
        self.assertEqual(db.namespace("things", old_type, key="name").get("b"), old_type("b"))

    def test_a_record_is_read_through_its_own_constructor(self) -> None:
        made: list[str] = []

        @dataclass
        class Counted:
            name: str

            def __post_init__(self) -> None:
                made.append(self.name)

        counted = self.open().namespace("counted", Counted, key="name")
        counted.put(Counted("a"))
        made.clear()
        read = counted.get("a")
        self.assertEqual((read.name, made), ("a", ["a"]))

    def test_a_class_may_have_slots_and_be_frozen(self) -> None:
        @dataclass(slots=True, frozen=True)
        class Slotted:
            name: str

        slotted = self.open().namespace("slotted", Slotted, key="name")
        slotted.put(Slotted("a"))
        self.assertEqual(slotted.get("a"), Slotted("a"))

    def test_a_name_may_be_a_word_of_sql(self) -> None:
        db = self.open()
        tally = Tally(name="one", count=1)
        for name in ("order", "index", "values", "table", "transaction", "select", "a_1", "x" * 48):
            with self.subTest(name):
                namespace = db.namespace(name, Tally, key="name", status="name", at="count")
                namespace.put(tally)
                self.assertEqual((namespace.get("one"), namespace.list("one")), (tally, [tally]))
                self.assertEqual((list(namespace.values()), namespace.count()), ([tally], 1))
                self.assertEqual(db.check(), [])
                self.assertEqual(
                    (namespace.prune(0, dry_run=True), namespace.delete("one")), (1, True)
                )

    def test_a_status_may_be_empty(self) -> None:
        devices = devices_of(self.open())
        device = PairedDevice(device_id="d", status="")
        devices.put(device)
        self.assertEqual((devices.get("d"), devices.list("")), (device, [device]))
        self.assertEqual((devices.count(""), devices.statuses()), (1, [""]))
        self.assert_sound()

    @contextmanager
    def assert_no_new_table(self) -> Iterator[None]:
        """Fail when the schema changes in the block."""
        schema = self.sql("SELECT * FROM sqlite_schema")
        yield
        self.assertEqual(self.sql("SELECT * FROM sqlite_schema"), schema)

    def test_a_name_that_will_not_do_is_refused(self) -> None:
        names = (
            *("", "_a", "1a", "a-b", "a b", "a\n", "a\0b", "x" * 49, None, 5, b"a"),
            *("A", "Tasks", "é", "ä", "\u0430"),  # the last looks like an a, and is Cyrillic
            *("a(key)--", 'a"b', "a'b", "a; DROP TABLE proofs", 'a"; DROP TABLE tasks'),
            *("sqlite_a", "tasks", "sessions", "session_log", "proofs", "config"),
        )
        db = self.open()
        with self.assert_no_new_table():
            for name in names:
                with self.subTest(name=name):
                    declare = partial(db.namespace, name, Tally, key="name")
                    self.assert_refused(InvalidRecordError, declare, repr(name))

    def test_a_name_that_an_index_has_is_refused(self) -> None:
        db = self.open()
        devices_of(db)
        with self.assert_no_new_table():
            for name in ("tasks_status_at", "devices_status_at"):
                with self.subTest(name):
                    declare = partial(db.namespace, name, Tally, key="name")
                    self.assert_refused(OperatorDbError, declare, name)
        self.assert_sound()

    def test_a_class_or_column_that_will_not_do_is_refused(self) -> None:
        tuples, nothing = Enum("Pair", {"ONE": (1, 2)}), Enum("Absent", {"NOTHING": None})
        with_set, with_tuples, with_nothing = (
            dataclasses.make_dataclass("Odd", [("name", str), ("odd", hint)])
            for hint in (set[int], tuples, nothing)
        )
        cases: tuple[tuple[str, Any, dict[str, Any], str], ...] = (
            ("a field that is a set", with_set, {}, "Odd"),
            ("an enum of tuples", with_tuples, {}, "Pair"),
            ("an enum of None", with_nothing, {}, "Absent"),
            ("a class that is no dataclass", dict, {}, "dict"),
            ("a record in place of its class", Part("x"), {}, "Part"),
            ("a key that is no field", Tally, {"key": "missing"}, "missing"),
            ("a key that is a number", Tally, {"key": 5}, "key"),
            ("no key", Tally, {"key": None}, "key"),
            ("a status that is no field", Tally, {"status": "missing"}, "missing"),
            ("an age that is no field", Tally, {"at": "missing"}, "missing"),
            ("a secret key", Tally, {"key": "pin"}, "pin"),
            ("a secret status", Tally, {"status": "pin"}, "pin"),
            ("a secret age", Tally, {"at": "pin"}, "pin"),
        )
        db = self.open()
        with self.assert_no_new_table():
            for label, record_type, columns, word in cases:
                with self.subTest(label):
                    declare = partial(
                        db.namespace, "odd", record_type, **{"key": "name", **columns}
                    )
                    self.assert_refused(InvalidRecordError, declare, word)

    def test_a_value_of_a_wrong_type_is_refused_by_the_name_of_its_field(self) -> None:
        devices = devices_of(self.open())
        wrong: dict[str, tuple[Any, ...]] = {
            "device_id": (3, None, b"d", "\ud800"),
            "last_seen": (True, 1.0, "1", None),
            "status": (3, None, "\ud800"),
            "token": (b"x", None),
            "colour": (2, "red", "RED", Rights.READ),
            "part": ("x", {"name": "x"}),
            "parts": (None, [None], (Part("x"),)),
            "by_name": (None, {1: b""}, {"a": "text"}, {"\ud800": b""}),
            "ratio": (float("nan"), float("inf"), "1", True, None),
            "trusted": (0, 1, None, "true"),
        }
        cases = (
            *((name, value, name) for name, values in wrong.items() for value in values),
            ("part", Part(3), "name"),
            ("part", Part("x", "text"), "raw"),
            ("parts", [Part("x"), Part("\ud800")], "name"),
        )
        for name, value, named in cases:
            device = PairedDevice(**{"device_id": "d", name: value})
            with self.subTest(field=name, value=value):
                error = self.assert_refused(InvalidRecordError, partial(devices.put, device))
                self.assertRegex(str(error), rf"\b{named}\b")
        self.assertEqual(devices.count(), 0)

    def test_a_value_out_of_range_or_without_a_json_form_is_refused(self) -> None:
        devices = devices_of(self.open())
        cases = (
            ("an empty id", "device_id", "", "''"),
            ("an id that is not printable", "device_id", "a\n", repr("a\n")),
            ("an age of 65 bits", "last_seen", 2**63, str(2**63)),
            *(
                (label, "anything", value, "PairedDevice")
                for label, value in values_without_a_json_form().items()
            ),
        )
        for label, name, value, word in cases:
            device = PairedDevice(**{"device_id": "d", name: value})
            with self.subTest(label):
                self.assert_refused(InvalidRecordError, partial(devices.put, device), word)
        self.assertEqual(devices.count(), 0)

    def test_a_record_that_its_constructor_would_change_is_not_stored(self) -> None:
        @dataclass
        class Doubling:
            name: str
            size: int = 1

            def __post_init__(self) -> None:
                self.size *= 2

        @dataclass
        class Computing:
            name: str
            seen: int = field(init=False, default=0)

        db = self.open()
        doubling = db.namespace("doubling", Doubling, key="name")
        self.assert_refused(InvalidRecordError, lambda: doubling.put(Doubling("a")), "Doubling")
        computing, changed = db.namespace("computing", Computing, key="name"), Computing("a")
        changed.seen = 5
        self.assert_refused(InvalidRecordError, lambda: computing.put(changed), "Computing")
        self.assertEqual((doubling.count(), computing.count()), (0, 0))
        self.assertTrue(computing.put(Computing("a")))

    def test_a_constructor_that_refuses_a_secret_does_not_reveal_it(self) -> None:
        longest = len(SECRET)

        @dataclass
        class Private:
            name: str
            pin: str = field(default="", metadata={"secret": True})

            def __post_init__(self) -> None:
                if len(self.pin) > longest:
                    raise ArithmeticError(f"the pin {self.pin} is too long")

        private = self.open().namespace("private", Private, key="name")
        private.put(Private("stored", SECRET))
        longest = 4
        self.assert_refused(OperatorDbError, lambda: private.get("stored"), "private:stored")
        changed = Private("changed")
        changed.pin = SECRET
        self.assert_refused(InvalidRecordError, lambda: private.put(changed), "Private")
        self.assertEqual(list(private.keys()), ["stored"])

    def test_a_secret_is_hidden_in_repr(self) -> None:
        tallies = tallies_of(self.open())
        tallies.put(Tally(name="a", pin=SECRET))
        self.assertEqual(tallies.get("a").pin, SECRET)
        self.assertIn("***", repr(tallies.get("a")))
        self.assertNotIn(SECRET, repr(tallies.get("a")))

    def test_a_secret_is_hidden_in_errors_wherever_it_stands(self) -> None:
        def secret(hint: Any) -> tuple[Any, Any]:
            return hint, field(metadata={"secret": True})

        plain: Any = dataclasses.make_dataclass("Plain", [("value", str)])
        guarded: Any = dataclasses.make_dataclass("Guarded", [("value", *secret(str))])
        guarding: Any = dataclasses.make_dataclass(
            "Guarding", [("name", str), ("token", *secret(plain)), ("others", *secret(list[plain]))]
        )
        holding: Any = dataclasses.make_dataclass(
            "Holding", [("name", str), ("token", guarded), ("others", list[guarded])]
        )
        wrong = SECRET.encode()
        cases = (
            ("a field", Tally(name="a", pin=wrong), "pin"),
            ("within a secret field", guarding("a", plain([SECRET]), []), "token"),
            ("within a secret list", guarding("a", plain("x"), [plain(wrong)]), "others"),
            ("a field of a record within", holding("a", guarded(wrong), []), "token"),
            ("in place of a record within", holding("a", {"value": SECRET}, []), "token"),
            ("in place of a record in a list", holding("a", guarded("x"), [SECRET]), "others"),
        )
        db = self.open()
        for n, (label, record, word) in enumerate(cases):
            namespace: Any = db.namespace(f"n{n}", type(record), key="name")
            with self.subTest(label):
                self.assert_refused(InvalidRecordError, partial(namespace.put, record), word, "***")
                self.assertEqual(namespace.count(), 0)


class ErrorsAreTyped(unittest.TestCase):
    """Each error is an OperatorDbError and the builtin kind that it is, and is exported."""

    KINDS: ClassVar[dict[type[OperatorDbError], type[Exception]]] = {
        InvalidRecordError: ValueError,
        NotFoundError: LookupError,
        ConflictError: RuntimeError,
        BusyError: TimeoutError,
        ClosedError: RuntimeError,
        ForeignFileError: ValueError,
        NewerSchemaError: ValueError,
        DamagedError: ValueError,
        StorageError: OSError,
    }

    def test_each_error_is_an_operator_db_error_and_a_builtin_kind(self) -> None:
        for error, kind in self.KINDS.items():
            with self.subTest(error.__name__):
                self.assertTrue(issubclass(error, OperatorDbError))
                self.assertTrue(issubclass(error, kind))

    def test_every_error_is_exported(self) -> None:
        exported_names = {name for name in operator_db.__all__ if name.endswith("Error")}
        self.assertEqual(exported_names, {each.__name__ for each in (*self.KINDS, OperatorDbError)})


class ListsFindWhatTheyAreAskedFor(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()
        with self.db.transaction():
            for number in range(100):  # the higher the number, the older the task
                status = list(TaskStatus)[number % 5]
                store_tasks(self.db, f"{number:03}", status=status, claimed_at=1000 - number)

    def plans(self, statements: list[str]) -> list[str]:
        """Return the steps of these statements' query plans that read tasks; none may sort."""
        steps = [
            step[3]
            for statement in statements
            if "tasks" in statement
            for step in self.sql(f"EXPLAIN QUERY PLAN {statement}")
        ]
        self.assertNotIn("TEMP B-TREE", " ".join(steps), "a sort")
        return [step for step in steps if " tasks" in step]

    def test_tasks_of_a_status_are_listed_oldest_first(self) -> None:
        cases: list[tuple[dict[str, Any], Iterable[int]]] = [
            ({"status": "disputed"}, range(98, 0, -5)),
            ({"status": TaskStatus.DISPUTED}, range(98, 0, -5)),
            ({"status": "disputed", "limit": 2}, (98, 93)),
            ({"status": "disputed", "limit": 2, "newest_first": True}, (3, 8)),
            ({}, range(99, -1, -1)),
            ({"newest_first": True}, range(100)),
            ({"limit": 3}, (99, 98, 97)),
            ({"limit": 3, "newest_first": True}, (0, 1, 2)),
            ({"limit": 0}, ()),
        ]
        for options, numbers in cases:
            with self.subTest(**options):
                found = [task.task_id for task in self.db.list_tasks(**options)]
                self.assertEqual(found, [f"{number:03}" for number in numbers])
        by_status = self.db.list_tasks_by_status("disputed")
        self.assertEqual(by_status, self.db.list_tasks("disputed"))
        self.assertEqual(self.db.count_tasks(), dict.fromkeys(TaskStatus, 20))
        walked = [task.task_id for task in self.db.iter_tasks("claimed")]
        self.assertEqual(walked, [f"{number:03}" for number in range(0, 100, 5)])

    def test_tasks_of_one_age_are_listed_in_the_order_of_their_first_storing(self) -> None:
        store_tasks(self.db, "b", "c", "a", claimed_at=2000)
        self.db.update_task_status("c", "disputed")
        found = [task.task_id for task in self.db.list_tasks()]
        self.assertEqual(found[-3:], ["b", "c", "a"])
        found = [task.task_id for task in self.db.list_tasks(limit=3, newest_first=True)]
        self.assertEqual(found, ["a", "c", "b"])

    def test_an_invalid_status_or_limit_is_refused(self) -> None:
        db: Any = self.db
        for wrong in ("nonsense", "", 5, b"claimed"):
            for ask in (db.list_tasks, db.list_tasks_by_status, db.iter_tasks):
                with self.subTest(status=wrong, by=ask.__name__):
                    self.assert_refused(InvalidRecordError, partial(ask, wrong), "claimed")
        for wrong in (-1, True, 1.5, "1"):
            for ask in (db.list_tasks, db.list_sessions, db.list_proofs):
                with self.subTest(limit=wrong, by=ask.__name__):
                    self.assert_refused(InvalidRecordError, partial(ask, limit=wrong), "limit")
        for wrong in ("yes", 1):
            with self.subTest(submitted=wrong):
                ask = partial(db.list_proofs, submitted=wrong)
                self.assert_refused(InvalidRecordError, ask, "submitted")

    def test_a_status_query_is_answered_by_the_index_without_a_sort(self) -> None:
        statements: list[str] = []
        self.watch_connections(listener=statements.append)
        db = self.open()
        queries: dict[str, Callable[[], object]] = {
            "of a status": lambda: db.list_tasks_by_status("disputed"),
            "the newest of a status": lambda: db.list_tasks("disputed", limit=5, newest_first=True),
            "of any status": lambda: db.list_tasks(limit=5),
            "the newest of any status": lambda: db.list_tasks(limit=5, newest_first=True),
            "how many of each status": db.count_tasks,
            "old enough to be pruned": lambda: db.prune(1, None, dry_run=True),
        }
        for label, query in queries.items():
            statements.clear()
            query()
            with self.subTest(label):
                plans = self.plans(statements)
                self.assertNotEqual(plans, [])
                for plan in plans:
                    self.assertRegex(plan, r"SEARCH tasks USING (COVERING )?INDEX tasks_status_at")

    def test_a_walk_follows_the_keys_from_where_its_last_batch_ended(self) -> None:
        statements: list[str] = []
        self.watch_connections(listener=statements.append)
        db = self.open()
        for status in (None, "disputed"):
            statements.clear()
            self.assertEqual(len(list(db.iter_tasks(status))), 20 if status else 100)
            plans = self.plans(statements)
            self.assertNotEqual(plans, [])
            for plan in plans:
                self.assertRegex(plan, r"SEARCH tasks USING INDEX \S+ \(key>\? AND key<\?\)")

    def test_a_status_query_reads_no_task_of_another_status(self) -> None:
        self.sql("UPDATE tasks SET value = 'not json' WHERE status != 'resolved'")
        self.assertEqual(len(self.db.list_tasks_by_status("resolved")), 20)
        self.assert_refused(DamagedError, self.db.list_tasks, "tasks:")


class WalksSeeEveryRecordOnce(DatabaseTest):
    def test_a_walk_sees_every_task_that_stays_once_while_others_come_and_go(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, *(f"{number:04}" for number in range(3000)), claimed_at=0)
        seen = []
        for number, task in enumerate(db.iter_tasks()):
            seen.append(task.task_id)
            if number % 100 == 0:
                db.delete_task(f"{2999 - number // 100:04}")
                store_tasks(db, f"{number:04}x")
                db.update_task_status(f"{number:04}", "completed")
        stayed = [f"{number:04}" for number in range(2970)]
        self.assertEqual([name for name in seen if len(name) == 4 and name < "2970"], stayed)
        self.assertEqual(len(seen), len(set(seen)))

    def test_a_walk_holds_no_connection_between_batches_so_that_the_wal_can_be_cut(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, *(f"{number:04}" for number in range(1500)))
        walk = db.iter_tasks()
        next(walk)
        self.assertEqual(self.sql("PRAGMA wal_checkpoint(TRUNCATE)"), [(0, 0, 0)])
        db.close()
        self.assert_refused(ClosedError, lambda: list(walk), self.path)

    def test_a_walk_takes_memory_for_a_batch_and_not_for_the_whole(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, *map(str, range(40)), payload=bytes(2**18))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(sum(len(task.payload) for task in db.iter_tasks()), 10 * 2**20)
        self.assertLess(tracemalloc.get_traced_memory()[1], 5 * 2**20)


class TasksKeepTheirHistory(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()

    def task(self, task_id: str = "t") -> TaskRecord:
        """Return a task that is there."""
        task = self.db.get_task(task_id)
        assert task is not None
        return task

    def test_every_status_change_is_kept_with_its_time_and_signature(self) -> None:
        store_tasks(self.db, "t", claimed_at=10, on_chain_signature="s0")
        self.db.update_task_status("t", "in_progress", at=20)
        self.db.update_task_status("t", "completed", at=30, signature="s1")
        self.db.update_task_status("t", "disputed", at=40, signature="s2")
        task = self.db.update_task_status("t", "completed", at=50, signature="s3")
        self.assertEqual(
            [(change.status, change.at, change.signature) for change in task.history],
            [
                ("claimed", 10, "s0"),
                ("in_progress", 20, None),
                ("completed", 30, "s1"),
                ("disputed", 40, "s2"),
                ("completed", 50, "s3"),
            ],
        )
        self.assertEqual(task.completed_at, 30, "the first completion")
        self.assertEqual(task.on_chain_signature, "s3", "the latest signature")
        self.assertEqual(self.task(), task)

    def test_only_one_of_many_compare_and_set_changes_succeeds(self) -> None:
        store_tasks(self.db, "t")
        won: list[str] = []

        def attempt(signature: str) -> None:
            with suppress(ConflictError):
                self.db.update_task_status(
                    "t", "in_progress", signature=signature, expected="claimed"
                )
                won.append(signature)

        run_in_threads(*(partial(attempt, str(number)) for number in range(8)))
        self.assertEqual([change.signature for change in self.task().history], [None, *won])
        self.assertEqual(len(won), 1)

    def test_a_status_change_that_cannot_be_made_changes_nothing(self) -> None:
        store_tasks(self.db, "t")
        cases: list[tuple[str, str, Any, dict[str, Any], type[Exception], str]] = [
            ("no such task", "gone", "completed", {}, NotFoundError, "tasks:gone"),
            ("as a LookupError", "gone", "completed", {}, LookupError, "tasks:gone"),
            ("not expected", "t", "completed", {"expected": "disputed"}, ConflictError, "claimed"),
            ("unknown status", "t", "nonsense", {}, InvalidRecordError, "nonsense"),
            ("unknown expected", "t", "resolved", {"expected": "?"}, InvalidRecordError, "?"),
            ("empty signature", "t", "completed", {"signature": ""}, InvalidRecordError, "''"),
            ("wrong time", "t", "completed", {"at": "now"}, InvalidRecordError, "StatusChange.at"),
        ]
        before = self.task()
        for label, task_id, status, options, error, word in cases:
            with self.subTest(label):
                update = partial(self.db.update_task_status, task_id, status, **options)
                self.assert_refused(error, update, word)
                self.assertEqual(self.db.list_tasks(), [before])

    def test_one_transaction_of_the_chain_moves_a_task_once(self) -> None:
        store_tasks(self.db, "t", on_chain_signature="s0")
        for _ in range(2):
            self.db.update_task_status("t", "disputed", signature="s1")
            self.db.update_task_status("t", "resolved", signature="s2")
            self.db.update_task_status("t", "resolved")
        task = self.task()
        self.assertEqual([change.signature for change in task.history], ["s0", "s1", "s2"])
        self.assertEqual((task.status, task.on_chain_signature), ("resolved", "s2"))

    def test_a_task_stored_again_has_its_new_fields_and_a_longer_history(self) -> None:
        store_tasks(self.db, "t", claimed_at=1, on_chain_signature="s0", description="old")
        self.db.update_task_status("t", "disputed", at=2, signature="s1")
        fresh = TaskRecord(
            task_id="t", claimed_at=1, status=TaskStatus.RESOLVED, on_chain_signature="s2"
        )
        self.db.store_task(fresh)
        stored = self.task()
        self.assertEqual(stored, fresh, "the record that was stored is brought up to date")
        self.assertEqual((stored.description, stored.status), (None, "resolved"))
        self.assertEqual([change.signature for change in stored.history], ["s0", "s1", "s2"])

    def test_a_status_change_made_by_two_writers_is_in_the_history_once(self) -> None:
        store_tasks(self.db, "t", claimed_at=1)
        mine = self.task()
        self.db.update_task_status("t", "disputed", at=8)
        mine.status = TaskStatus.DISPUTED
        self.db.store_task(mine)
        changes = [(change.status, change.at) for change in mine.history]
        self.assertEqual(changes, [("claimed", 1), ("disputed", 8)])
        mine.status = TaskStatus.RESOLVED
        for _ in range(4):
            self.db.store_task(mine)
        statuses = [change.status for change in mine.history]
        self.assertEqual(statuses, ["claimed", "disputed", "resolved"])
        self.assertEqual(self.task(), mine)

    def test_a_completed_task_stored_over_an_open_one_is_stamped(self) -> None:
        store_tasks(self.db, "t", claimed_at=1)
        store_tasks(self.db, "t", claimed_at=9, status=TaskStatus.COMPLETED)
        self.assertEqual((self.task().completed_at, self.task().history[-1].at), (9, 9))

    def test_a_task_is_as_old_as_its_first_completion(self) -> None:
        claimed_at = int(time.time()) - 40 * DAY
        store_tasks(self.db, "t", claimed_at=claimed_at)
        task = self.task()
        task.status = TaskStatus.COMPLETED
        self.db.store_task(task)
        self.assertEqual(self.db.prune(30).tasks, 0)
        self.assertEqual(self.task(), task)
        store_tasks(self.db, "t", claimed_at=claimed_at, status=TaskStatus.DISPUTED)
        self.assertIsNotNone(task.completed_at)
        self.assertEqual(self.task().completed_at, task.completed_at)

    def test_a_task_is_completed_together_with_its_proof(self) -> None:
        log = proof("t")
        self.assert_refused(NotFoundError, lambda: self.db.complete_task("t", log), "tasks:t")
        self.assertIsNone(self.db.get_proof("t"))
        store_tasks(self.db, "t")
        with mock.patch("time.time", return_value=5000.0):
            done = self.db.complete_task("t", log, signature="s1")
        self.assertEqual((done.status, done.completed_at), ("completed", 5000))
        self.assertEqual(done.on_chain_signature, "s1")
        self.assertEqual((self.task(), self.db.get_proof("t")), (done, log))

    def test_completing_a_task_again_changes_nothing(self) -> None:
        store_tasks(self.db, "t")
        log = proof("t")
        done = self.db.complete_task("t", log, signature="s1")
        for again, signature in ((replace(log, timestamp=5000), "s1"), (log, "s2"), (log, None)):
            self.assertEqual(self.db.complete_task("t", again, signature=signature), done)
        self.assertEqual((self.task(), self.db.get_proof("t")), (done, log))

    def test_a_completion_that_contradicts_what_is_stored_is_refused(self) -> None:
        store_tasks(self.db, "t", "open")
        self.db.complete_task("t", proof("t"))
        store_tasks(self.db, "disputed", status=TaskStatus.DISPUTED)
        store_tasks(self.db, "resolved", status=TaskStatus.RESOLVED)
        complete: Any = self.db.complete_task
        cases = [
            ("other evidence", "t", proof("t", b"other"), ConflictError, "proofs:"),
            ("another task's proof", "t", proof("u"), ConflictError, "u"),
            ("a disputed task", "disputed", proof("disputed"), ConflictError, "tasks:"),
            ("a resolved task", "resolved", proof("resolved"), ConflictError, "tasks:"),
            ("no proof", "open", None, InvalidRecordError, "VerificationLog"),
        ]
        before = exported(self.db)
        for label, task_id, log, error, word in cases:
            with self.subTest(label):
                self.assert_refused(error, partial(complete, task_id, log), word)
                self.assertEqual(exported(self.db), before)
        for status in ("disputed", "resolved"):
            self.db.update_task_status("t", status)
            again = partial(complete, "t", proof("t"))
            self.assert_refused(ConflictError, again, "tasks:", status)

    def test_a_deleted_task_leaves_its_proof(self) -> None:
        store_tasks(self.db, "t")
        self.db.complete_task("t", proof("t"))
        self.assertTrue(self.db.delete_task("t"))
        self.assertFalse(self.db.delete_task("t"))
        self.assertIsNone(self.db.get_task("t"))
        self.assertEqual(self.db.get_proof("t"), proof("t"))

    def test_updates_by_many_threads_at_once_all_count(self) -> None:
        tallies = tallies_of(self.db)
        tallies.put(Tally(name="n"))
        store_tasks(self.db, "t")

        def update(thread: int) -> None:
            for number in range(10):
                tallies.update("n", lambda tally: replace(tally, count=tally.count + 1))
                self.db.update_task_status("t", "in_progress", signature=f"{thread}-{number}")
                store_tasks(self.db, "t", on_chain_signature=f"{thread}+{number}")

        run_in_threads(*(partial(update, thread) for thread in range(8)))
        self.assertEqual(tallies.get("n"), Tally(name="n", count=80))
        signatures = {change.signature for change in self.task().history}
        self.assertEqual(len(signatures), 161)

    def test_an_update_that_raises_or_returns_an_invalid_record_changes_nothing(self) -> None:
        tallies = tallies_of(self.db)
        tallies.put(Tally(name="a", count=1))

        def fail(tally: Tally) -> Tally:
            tally.count = 2
            raise KeyError("mine")

        changes: list[tuple[str, Any, type[Exception]]] = [
            ("it raises", fail, KeyError),
            ("it returns nothing", lambda _: None, InvalidRecordError),
            ("it returns another id", lambda _: Tally(name="b"), InvalidRecordError),
            ("it returns another kind", lambda _: TaskRecord(task_id="a"), InvalidRecordError),
        ]
        for label, change, error in changes:
            with self.subTest(label):
                with self.assertRaises(error):
                    tallies.update("a", change)
                self.assertEqual(list(tallies.values()), [Tally(name="a", count=1)])


class SessionsAreLogs(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.opened = self.watch_connections()
        self.db = self.open()

    def session(self, session_id: str = "s") -> SessionState:
        """Return a session that is there."""
        session = self.db.get_session(session_id)
        assert session is not None
        return session

    def said(self, **options: Any) -> list[str]:
        """Return the words of the transcript."""
        return [entry.content for entry in self.db.transcript("s", **options)]

    def steps(self, action: Callable[[], object]) -> int:
        """Return how many steps of its virtual machine SQLite takes for an action."""
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += 1

        def watch(handler: Callable[[], None] | None) -> None:
            for connection in self.opened:
                with suppress(sqlite3.ProgrammingError, ClosedError):  # one that is closed
                    connection.set_progress_handler(handler, 1)

        watch(count)
        action()
        watch(None)
        return steps

    def test_the_first_entry_or_link_creates_a_session(self) -> None:
        self.db.append_transcript("a", "user", "hello", timestamp=5)
        self.db.append_command("b", "ClaimTask", timestamp=6)
        with mock.patch("time.time", return_value=7.0):
            self.db.link_task("c", "t")
        entry = TranscriptEntry(role="user", content="hello", timestamp=5)
        a = SessionState(session_id="a", transcript=[entry], created_at=5, last_active=5)
        b = SessionState(session_id="b", command_history=["ClaimTask"], created_at=6, last_active=6)
        c = SessionState(session_id="c", active_task_ids=["t"], created_at=7, last_active=7)
        self.assertEqual([self.session(name) for name in "abc"], [a, b, c])
        self.assertEqual(self.db.list_sessions(), [a, b, c])
        self.assertEqual(self.db.list_sessions(limit=2), [a, b])
        self.assertIsNone(self.db.get_session("d"))

    def test_a_session_was_last_active_at_its_latest_entry(self) -> None:
        for timestamp, latest in ((10, 10), (5, 10), (20, 20)):
            self.db.append_transcript("s", "user", "x", timestamp=timestamp)
            self.db.append_command("s", "x", timestamp=timestamp)
            session = self.session()
            self.assertEqual((session.created_at, session.last_active), (10, latest))

    def test_a_transcript_gives_its_last_entries_when_asked(self) -> None:
        for number in range(20):
            self.db.append_transcript("s", "user", str(number), timestamp=number)
            self.db.append_command("s", "c")
        everything = [str(number) for number in range(20)]
        for last in (None, 0, 1, 3, 20, 21):
            with self.subTest(last=last):
                wanted = everything if last is None else everything[max(0, 20 - last) :]
                self.assertEqual(self.said(last=last), wanted)
        self.assertEqual(self.db.transcript("none"), [])
        for wrong in (-1, True, "1"):
            self.assert_refused(InvalidRecordError, partial(self.said, last=wrong), "last")

    def test_a_task_is_linked_once_and_unlinked_once(self) -> None:
        for task_id in ("t", "t", "u"):
            self.db.link_task("s", task_id)
        self.assertEqual(self.session().active_task_ids, ["t", "u"])
        self.assertTrue(self.db.unlink_task("s", "t"))
        self.assertFalse(self.db.unlink_task("s", "t"))
        self.assertFalse(self.db.unlink_task("none", "t"))
        self.assertEqual(self.session().active_task_ids, ["u"])

    def test_a_session_stored_again_extends_its_log_and_replaces_its_fields(self) -> None:
        self.db.append_transcript("s", "user", "one")
        mine = self.session()
        mine.transcript.append(TranscriptEntry(role="user", content="two"))
        mine.command_history.append("go")
        mine.active_task_ids = ["t"]
        self.db.store_session(mine)
        self.assertEqual(self.session(), mine)
        self.assertEqual((self.said(), mine.command_history), (["one", "two"], ["go"]))

    def test_a_session_that_lacks_a_stored_entry_is_refused(self) -> None:
        self.db.append_transcript("s", "user", "one", timestamp=1)
        self.db.append_command("s", "go", timestamp=1)
        stale = self.session()
        self.db.append_transcript("s", "user", "two of another", timestamp=2)
        mine = TranscriptEntry(role="user", content="two of mine", timestamp=2)
        cases = {
            "it was read before another's entry": stale,
            "it has another entry in that place": replace(
                stale, transcript=[*stale.transcript, mine]
            ),
            "it has no commands": replace(self.session(), command_history=[]),
            "it has another command": replace(self.session(), command_history=["stop"]),
        }
        before = self.session()
        for label, session in cases.items():
            with self.subTest(label):
                store = partial(self.db.store_session, session)
                self.assert_refused(ConflictError, store, "sessions:", "s")
                self.assertEqual(self.session(), before)

    def test_a_deleted_session_takes_its_log_with_it(self) -> None:
        self.db.append_transcript("s", "user", "one")
        self.db.append_command("s", "go")
        mine = self.session()
        self.assertTrue(self.db.delete_session("s"))
        self.assertFalse(self.db.delete_session("s"))
        self.assertEqual((self.db.get_session("s"), self.said()), (None, []))
        self.db.store_session(replace(mine, transcript=[], command_history=["again"]))
        self.assertEqual((self.session().command_history, self.said()), (["again"], []))

    def test_appends_and_last_entries_cost_the_same_at_entry_10_000_as_at_entry_10(self) -> None:
        entries = [TranscriptEntry(role="user", content=str(n), timestamp=n) for n in range(10_000)]
        self.db.store_session(SessionState(session_id="short", transcript=entries[:10]))
        self.db.store_session(SessionState(session_id="long", transcript=entries))
        self.db.list_sessions(limit=0)  # opens the connection that reads
        verbs: dict[str, Callable[[str], object]] = {
            "append_transcript": lambda name: self.db.append_transcript(name, "user", "next"),
            "append_command": lambda name: self.db.append_command(name, "next"),
            "transcript": lambda name: self.db.transcript(name, last=5),
        }
        for label, verb in verbs.items():
            with self.subTest(label):
                short, long = (self.steps(partial(verb, name)) for name in ("short", "long"))
                self.assertGreater(short, 0)
                self.assertLess(long, short * 1.5)


class ProofsAreWrittenOnce(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()

    def test_the_same_evidence_stored_again_changes_nothing(self) -> None:
        first = proof("t", timestamp=5)
        self.assertTrue(self.db.store_proof(first))
        self.assertEqual(self.db.get_proof("t"), first)
        submitted = self.db.mark_proof_submitted("t", "sig")
        wanted = replace(first, submitted=True, submission_signature="sig")
        self.assertEqual(submitted, wanted)
        self.assertFalse(self.db.store_proof(replace(first, timestamp=9)))
        self.assertFalse(self.db.store_proof(first))
        self.assertEqual(self.db.get_proof("t"), wanted)

    def test_other_evidence_for_the_same_task_is_refused(self) -> None:
        self.db.store_proof(proof("t"))
        changes: dict[str, Any] = {
            "outputs": b"x",
            "inputs": b"x",
            "proof": b"x",
            "proof_hash": "1" * 64,
            "result_data": b"x" * 64,
        }
        for name, value in changes.items():
            with self.subTest(name):
                store = partial(self.db.store_proof, replace(proof("t"), **{name: value}))
                self.assert_refused(ConflictError, store, "proofs:", proof("t").evidence_hash)
                self.assertEqual(self.db.list_proofs(), [proof("t")])

    def test_a_proof_waits_in_a_queue_until_it_is_submitted(self) -> None:
        for number in range(5):
            self.db.store_proof(proof(str(number), timestamp=100 - number))
        self.db.mark_proof_submitted("2", "sig")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"submitted": False}, "4310"),
            ({"submitted": False, "limit": 1}, "4"),
            ({"submitted": True}, "2"),
            ({}, "43210"),
            ({"limit": 2}, "43"),
        ]
        for options, wanted in cases:
            with self.subTest(**options):
                found = [log.task_id for log in self.db.list_proofs(**options)]
                self.assertEqual(found, list(wanted))

    def test_a_proof_is_marked_as_submitted_with_one_signature_only(self) -> None:
        for task_id in ("sent", "waiting"):
            self.db.store_proof(proof(task_id))
        sent = self.db.mark_proof_submitted("sent", "sig")
        self.assertEqual(self.db.mark_proof_submitted("sent", "sig"), sent)
        cases: list[tuple[str, str, Any, type[Exception], str]] = [
            ("another transaction", "sent", "other", ConflictError, "proofs:"),
            ("no proof", "gone", "sig", NotFoundError, "proofs:gone"),
            ("an empty signature", "waiting", "", InvalidRecordError, "''"),
            ("no signature", "waiting", None, InvalidRecordError, "None"),
        ]
        for label, task_id, signature, error, word in cases:
            with self.subTest(label):
                mark = partial(self.db.mark_proof_submitted, task_id, signature)
                self.assert_refused(error, mark, word)
                self.assertEqual(self.db.list_proofs(), [sent, proof("waiting")])

    def test_a_proof_that_may_be_needed_can_be_neither_deleted_nor_pruned(self) -> None:
        needed = {"unsubmitted", "claimed", "in_progress", "disputed"}
        store_tasks(self.db, "unsubmitted", status=TaskStatus.RESOLVED)
        statuses = [status.value for status in TaskStatus]
        for status in statuses:
            store_tasks(self.db, status, status=status)
        for name in ("unsubmitted", "without a task", *statuses):
            self.db.store_proof(proof(name, submitted=name != "unsubmitted"))
        for name in sorted(needed):
            with self.subTest(name):
                delete = partial(self.db.delete_proof, name)
                self.assert_refused(ConflictError, delete, "proofs:", name)
        self.assertEqual(self.db.prune(None, None, 1, dry_run=True).proofs, 3)
        self.assertEqual(len(self.db.list_proofs()), 7)
        self.assertEqual(self.db.prune(None, None, 1).proofs, 3)
        self.assertEqual({log.task_id for log in self.db.list_proofs()}, needed)
        self.db.update_task_status("disputed", "resolved")
        self.assertTrue(self.db.delete_proof("disputed"))
        self.assertFalse(self.db.delete_proof("disputed"))


class DisputeBundlesProveThemselves(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()
        self.db.store_task(TaskRecord(task_id="t", description="é"))
        log = proof("t", b"out", inputs=b"in", proof=b"p")
        self.db.complete_task("t", log)
        self.log, self.on_chain = log, log.evidence_hash
        self.bundle: dict[str, Any] = json.loads(json.dumps(self.db.dispute_bundle("t")))

    def forged_bundles(self, *changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the bundle that another database gives of the proof after each of the changes."""
        db = self.open(self.other)
        for change in changes:
            forged = replace(self.log, submitted=True, **change)
            db.store_proof(forged)
            yield db.dispute_bundle(forged.task_id)
            db.delete_proof(forged.task_id)

    def test_a_proof_gives_the_arguments_that_the_program_takes(self) -> None:
        log = proof("t", b"hello")
        digest = hashlib.sha256(b"hello").hexdigest()
        # what the reference worker submits: 32 bytes, and 64 bytes of ASCII
        self.assertEqual((log.proof_hash, log.result_data), (digest, digest.encode()))
        wanted = {"proof_hash": bytes.fromhex(digest), "result_data": digest.encode()}
        self.assertEqual(log.submit_args(), wanted)
        self.assertEqual([len(value) for value in wanted.values()], [32, 64])
        uri = f"agenc://evidence/sha256/{log.evidence_hash}"
        wanted = {"evidence_hash": bytes.fromhex(log.evidence_hash), "evidence": uri}
        self.assertEqual(log.dispute_args(), wanted)
        self.assertLessEqual(len(uri), 256)

    def test_verify_names_each_field_that_the_reference_worker_would_not_submit(self) -> None:
        self.assertEqual(proof("t").verify(), [])
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({"proof_hash": "ab" * 32}, ["proof_hash"]),
            ({"result_data": b"z" * 64}, ["result_data"]),
            ({"proof_hash": "ab" * 32, "result_data": b"z" * 64}, ["proof_hash", "result_data"]),
        ]
        for fields, wanted in cases:
            with self.subTest(fields=wanted):
                found = proof("t", **fields).verify()
                self.assertEqual(len(found), len(wanted))
                for name, line in zip(wanted, found, strict=True):
                    self.assertIn(name, line)

    def test_what_the_chain_would_reject_is_refused_when_a_proof_is_made(self) -> None:
        digits: list[Any] = ["0" * 64, "AB" * 32, "ab" * 31, "ab" * 33, "", "zz" * 32]
        digits += ["0x" + "ab" * 31, b"a" * 64, 5]
        data: list[Any] = [bytes(64), b"", b"x" * 63, b"x" * 65, "x" * 64, 5]
        for name, values in (("proof_hash", digits), ("result_data", data)):
            for value in values:
                with self.subTest(field=name, value=value):
                    make = partial(proof, "t", **{name: value})
                    self.assert_refused(InvalidRecordError, make, f"VerificationLog.{name}")
        with self.assertRaises(TypeError):
            proof("t", evidence_hash="1" * 64)  # it is computed

    def test_the_evidence_hash_is_the_same_everywhere(self) -> None:
        vectors = [
            (
                proof("t1", b"hello"),
                "33b3287ebcf5c40d42c31f90c9b10edac79a0dd65592e7c16631e62a67566446",
            ),
            (
                proof("é\U0001f600:%", b"", inputs=b"\xff", proof=b"p"),
                "a99fbcda7bc14701ebcb02a00f2f7f7263cffc59f062a5abe6ba2ad43c595679",
            ),
            (
                proof(DEVNET_TASK, bytes(range(256)), proof_hash="ab" * 32, result_data=b"r" * 64),
                "04311a00278693c95af6ebae1f118a21ff4539c30b5594f5c9ac395462a8a48b",
            ),
        ]
        for log, vector in vectors:
            self.assertEqual(log.evidence_hash, vector)
            later = replace(log, timestamp=0, submitted=True, submission_signature="sig")
            self.assertEqual(later.evidence_hash, vector, "it covers the evidence alone")

    def test_a_bundle_is_verified_without_a_database_and_without_its_task(self) -> None:
        self.assertEqual(self.bundle["task"]["description"], "é")
        self.assertEqual(verify_dispute_bundle(self.bundle), [])
        for on_chain in (self.on_chain, self.on_chain.upper()):
            self.assertEqual(verify_dispute_bundle(self.bundle, evidence_hash=on_chain), [])
        self.db.delete_task("t")
        without_task = self.db.dispute_bundle("t")
        self.assertEqual(without_task, {**self.bundle, "task": None})
        self.assertEqual(verify_dispute_bundle(without_task, evidence_hash=self.on_chain), [])
        missing = partial(self.db.dispute_bundle, "missing")
        self.assert_refused(NotFoundError, missing, "proofs:missing")

    def test_a_bundle_of_other_evidence_does_not_match_the_chain(self) -> None:
        changes: list[dict[str, Any]] = [
            {"task_id": "u"},
            {"inputs": b"in "},
            {"proof": b""},
            {"proof_hash": "1" * 64},
            {"result_data": b"1" * 64},
        ]
        for bit in range(len(b"out") * 8):
            outputs = bytearray(b"out")
            outputs[bit // 8] ^= 1 << bit % 8
            changes.append({"outputs": bytes(outputs)})
        for change, forged in zip(changes, self.forged_bundles(*changes), strict=True):
            with self.subTest(**change):
                self.assertEqual(verify_dispute_bundle(forged), [], "it agrees with itself")
                found = verify_dispute_bundle(forged, evidence_hash=self.on_chain)
                self.assertIn(forged["evidence_hash"], " ".join(found))
        found = verify_dispute_bundle(self.bundle, evidence_hash="1" * 64)
        self.assertIn(self.on_chain, " ".join(found))

    def test_a_bundle_in_which_one_field_was_changed_contradicts_itself(self) -> None:
        changes = {
            "task_id": "u",
            "inputs": "AAAA",
            "outputs": "AAAA",
            "proof": "AAAA",
            "proof_hash": "1" * 64,
            "result_data": "MTEx" * 21 + "MQ==",
            "evidence_hash": "1" * 64,
            "extra": 1,
        }
        changed = {name: {**self.bundle["proof"], name: changes[name]} for name in changes}
        bundles = {name: {**self.bundle, "proof": changed[name]} for name in changed}
        for name in self.bundle:
            bundles[f"without {name}"] = {**self.bundle}
            del bundles[f"without {name}"][name]
        bundles["another task"] = {**self.bundle, "task": {**self.bundle["task"], "task_id": "u"}}
        for label, bundle in bundles.items():
            for on_chain in (None, self.on_chain):
                with self.subTest(label, on_chain=on_chain):
                    self.assertNotEqual(verify_dispute_bundle(bundle, evidence_hash=on_chain), [])

    def test_a_malformed_bundle_is_reported_and_never_raises(self) -> None:
        bundle, stored, task = self.bundle, self.bundle["proof"], self.bundle["task"]
        deep: Any = {}
        for _ in range(5000):
            deep = {"task": deep}
        wrong: list[Any] = [None, 5, "text", b"", [], {}, deep, {1: 2}]
        wrong += [{"proof": value} for value in (None, [], {})]
        for value in (None, 5, [], {}, "x", "x" * 10_000, deep, [deep], 1e400, "\ud800"):
            changes = [{name: value} for name in bundle if value is not None or name != "task"]
            changes += [{"task": {**task, "status": value}}]
            changes += [{value if isinstance(value, str) else 7: 1}]
            changes += [
                {"proof": {**stored, name: value}}
                for name in stored
                if value != stored[name] and (name, value) != ("timestamp", 5)
            ]
            wrong += [{**bundle, **change} for change in changes]
        for each in wrong:
            found = verify_dispute_bundle(each)
            self.assertTrue(found)
            for line in found:
                self.assertIsInstance(line, str)
                self.assertLess(len(line), 500)


class PruningTakesOnlyWhatMayGo(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        self.db = self.open()

    def store_old_tasks(self, number: int, *, payload: bytes) -> None:
        with self.db.transaction():
            names = map(str, range(number))
            fields = {"status": TaskStatus.COMPLETED, "claimed_at": 0, "payload": payload}
            store_tasks(self.db, *names, **fields)

    def test_only_completed_tasks_strictly_older_and_idle_sessions_are_pruned(self) -> None:
        now = 1_774_628_000
        for status in TaskStatus:
            for name, age in (("old", 30 * DAY + 1), ("edge", 30 * DAY), ("new", 0)):
                store_tasks(self.db, f"{status}-{name}", status=status, claimed_at=now - age)
        late = {"status": TaskStatus.COMPLETED, "claimed_at": 0, "completed_at": now}
        store_tasks(self.db, "completed late", **late)
        for name, age in (("old", 90 * DAY + 1), ("edge", 90 * DAY), ("new", 0)):
            self.db.append_transcript(name, "user", "x", timestamp=now - age)
        self.db.store_proof(proof("completed-old", timestamp=0, submitted=True))
        before = exported(self.db)
        with mock.patch("time.time", return_value=float(now)):
            planned = self.db.prune(dry_run=True)
            self.assertEqual((planned.tasks, planned.sessions, planned.proofs), (1, 1, 0))
            self.assertTrue(planned.dry_run)
            self.assertEqual(exported(self.db), before)
            nothing = self.db.prune(None, None)
            self.assertEqual((nothing.tasks, nothing.sessions, nothing.proofs), (0, 0, 0))
            self.assertEqual(exported(self.db), before)
            report = self.db.prune()
        self.assertEqual((report.tasks, report.sessions, report.proofs), (1, 1, 0))
        self.assertFalse(report.dry_run)
        self.assertEqual(len(exported(self.db)), len(before) - 2)
        self.assertIsNone(self.db.get_task("completed-old"))
        self.assertEqual((self.db.get_session("old"), self.db.transcript("old")), (None, []))
        self.assertEqual(self.db.check(), [])

    def test_an_invalid_number_of_days_is_refused(self) -> None:
        store_tasks(self.db, "t", status=TaskStatus.COMPLETED, claimed_at=0)
        prune: Any = self.db.prune
        for name in ("task_days", "session_days", "proof_days"):
            for days in (-1, True, "1", float("nan"), float("inf")):
                with self.subTest(**{name: days}):
                    self.assert_refused(InvalidRecordError, partial(prune, **{name: days}), "days")
        self.assertEqual(task_ids(self.db), ["t"])

    def test_a_prune_gives_the_space_back_to_the_file_system(self) -> None:
        def size() -> int:
            return sum(os.path.getsize(self.path + end) for end in ("", "-wal"))

        self.store_old_tasks(500, payload=bytes(8192))
        before = size()
        report = self.db.prune()
        self.assertEqual((report.tasks, report.bytes_before), (500, before))
        self.assertEqual(report.bytes_after, size())
        self.assertLess(report.bytes_after, 200_000)

    def test_a_writer_gets_in_between_the_batches_of_a_long_prune(self) -> None:
        self.store_old_tasks(3000, payload=bytes(500))
        other, done, left = self.open(), threading.Event(), set[int]()

        def write() -> None:
            while not done.is_set():
                other.append_command("s", "x")
                left.add(other.count_tasks()[TaskStatus.COMPLETED])

        def prune() -> None:
            try:
                self.db.prune()
            finally:
                done.set()

        run_in_threads(write, prune)
        self.assertNotEqual(left - {0, 3000}, set(), "no write came in between")

    def test_a_prune_in_a_transaction_is_rolled_back_with_it(self) -> None:
        store_tasks(self.db, "t", status=TaskStatus.COMPLETED, claimed_at=0)
        with suppress(KeyError), self.db.transaction():
            self.assertEqual(self.db.prune().tasks, 1)
            self.assertEqual(task_ids(self.db), [])
            raise KeyError
        self.assertEqual(task_ids(self.db), ["t"])


class AnOperatorsLifeSurvives(DatabaseTest):
    """What an operator on devnet did, from claim to resolution, and each verb that it may use."""

    seconds = 40

    def operate(self, path: str, step: Callable[[str], object] = lambda _: None) -> None:
        """Do an operator's work on one task, from wherever a kill has left it."""
        with OperatorDb(path) as db:
            step("opened")
            if db.get_config() is None:
                db.store_config(
                    OperatorConfig(
                        wallet_pubkey=DEVNET_WORKER,
                        network="devnet",
                        rpc_endpoints=["https://api.devnet.solana.com"],
                    )
                )
            step("configured")
            task = db.get_task(DEVNET_TASK)
            if task is None:
                task = TaskRecord(
                    task_id=DEVNET_TASK,
                    creator=DEVNET_CREATOR,
                    claimed_at=1774627200,
                    on_chain_signature=DEVNET_CLAIM,
                )
                db.store_task(task)
            step("claimed")
            if not db.transcript("voice"):
                db.append_transcript("voice", "user", "what is it worth?", timestamp=1774627300)
            db.link_task("voice", DEVNET_TASK)
            step("talked")
            if task.status not in ("disputed", "resolved"):
                task = db.complete_task(DEVNET_TASK, proof(DEVNET_TASK, b"the report"))
            step("completed")
            db.mark_proof_submitted(DEVNET_TASK, "submission")
            step("submitted")
            if task.status == "completed":
                db.update_task_status(
                    DEVNET_TASK, "disputed", signature=DEVNET_DISPUTE, expected="completed"
                )
            step("disputed")
            db.update_task_status(DEVNET_TASK, "resolved", signature=DEVNET_RESOLVE)
            step("resolved")

    def operate_until_killed(self, last: str, *, during_next: float | None = None) -> None:
        """Operate in a child that is killed after a step, or so many seconds into the next."""

        def work(say: Say) -> None:
            def step(name: str) -> None:
                say(name)
                if name == last and during_next is None:
                    signal.pause()

            self.operate(self.path, step)

        child = Child(work)
        while child.line() != last:
            pass
        child.kill(after=during_next or 0.0)

    def test_every_fact_is_there_once_after_a_kill_at_every_step(self) -> None:
        steps, rng = list[str](), random.Random(5)
        self.operate(self.other, steps.append)
        for step in steps:
            self.operate_until_killed(step)
            self.operate_until_killed(step, during_next=rng.uniform(0, 0.003))
        self.operate(self.path)
        db = self.open()
        report = db.prune(0, None)
        self.assertEqual((report.tasks, report.proofs), (0, 0))
        (task,), (session,), (log,) = db.iter_tasks(), db.list_sessions(), db.list_proofs()
        config = db.get_config()
        assert config is not None
        self.assertEqual(
            [(change.status, change.signature) for change in task.history],
            [
                ("claimed", DEVNET_CLAIM),
                ("completed", None),
                ("disputed", DEVNET_DISPUTE),
                ("resolved", DEVNET_RESOLVE),
            ],
        )
        self.assertEqual((task.task_id, task.creator), (DEVNET_TASK, DEVNET_CREATOR))
        self.assertEqual((task.status, task.on_chain_signature), ("resolved", DEVNET_RESOLVE))
        self.assertEqual((config.wallet_pubkey, config.network), (DEVNET_WORKER, "devnet"))
        self.assertEqual([entry.content for entry in session.transcript], ["what is it worth?"])
        self.assertEqual(session.active_task_ids, [DEVNET_TASK])
        self.assertEqual((log.outputs, log.submission_signature), (b"the report", "submission"))
        self.assertEqual(db.check(), [])
        # what another program reads, without this module
        ((text,),) = self.sql("SELECT value FROM tasks WHERE key = ?", f"tasks:{DEVNET_TASK}")
        self.assertEqual(json.loads(text)["history"][-1]["signature"], DEVNET_RESOLVE)

    def test_a_resolved_task_and_its_proof_outlive_a_prune_of_tasks_and_sessions(self) -> None:
        self.operate(self.path)
        db = self.open()
        with mock.patch("time.time", return_value=time.time() + DAY):
            report = db.prune(0, 0)
        self.assertEqual((report.tasks, report.sessions, report.proofs), (0, 1, 0))
        self.assertIsNotNone(db.get_task(DEVNET_TASK))
        self.assertIsNotNone(db.get_proof(DEVNET_TASK))

    def store_some_of_each(self) -> None:
        """Store what `verbs` work on, and what they read from other files."""
        with OperatorDb(self.path) as db:
            store_tasks(db, "open", claimed_at=5)
            store_tasks(db, "old", claimed_at=5, status=TaskStatus.COMPLETED)
            db.store_proof(proof("waiting"))
            db.store_proof(proof("sent", submitted=True))
            db.store_session(self.session("s", 2))
            db.store_config(OperatorConfig(network="devnet"))
            devices_of(db).put(PairedDevice(device_id="one"))
            devices_of(db).put(PairedDevice(device_id="two"))
        fill(self.other, tasks=6)
        with OperatorDb(self.other) as db:
            db.export(self.file, include_secrets=True)

    @staticmethod
    def session(session_id: str, length: int) -> SessionState:
        """Return a session with so many utterances, and as many commands."""
        said = [
            TranscriptEntry(role="user", content=str(n) * 9000, timestamp=n) for n in range(length)
        ]
        commands = [f"command {number}" for number in range(length)]
        times = {"created_at": 5, "last_active": 5}
        log: dict[str, Any] = {"transcript": said, "command_history": commands}
        return SessionState(session_id=session_id, active_task_ids=["open"], **log, **times)

    def verbs(self) -> dict[str, Verb]:
        """Return a use of each verb that changes what `store_some_of_each` stored."""
        large = bytes(60_000)

        def block(db: OperatorDb) -> None:
            with db.transaction():
                db.complete_task("open", proof("open", large))
                db.append_transcript("s", "user", "it is done")
                with db.transaction():
                    db.delete_task("old")
                    devices_of(db).delete("one")

        resolved = {"status": TaskStatus.RESOLVED, "payload": large}
        return {
            "store_task": lambda db: store_tasks(db, "new", payload=large),
            "store_task over another": lambda db: store_tasks(db, "open", **resolved),
            "update_task_status": lambda db: db.update_task_status("open", "disputed"),
            "complete_task": lambda db: db.complete_task("open", proof("open", large)),
            "delete_task": lambda db: db.delete_task("open"),
            "store_session": lambda db: db.store_session(self.session("new", 6)),
            "store_session over another": lambda db: db.store_session(self.session("s", 6)),
            "append_transcript": lambda db: db.append_transcript("s", "user", "x" * 60_000),
            "append_transcript to none": lambda db: db.append_transcript("new", "user", "x"),
            "append_command": lambda db: db.append_command("s", "x"),
            "link_task": lambda db: db.link_task("s", "new"),
            "unlink_task": lambda db: db.unlink_task("s", "open"),
            "delete_session": lambda db: db.delete_session("s"),
            "store_proof": lambda db: db.store_proof(proof("open", large)),
            "mark_proof_submitted": lambda db: db.mark_proof_submitted("waiting", "sig"),
            "delete_proof": lambda db: db.delete_proof("sent"),
            "store_config": lambda db: db.store_config(OperatorConfig(network="mainnet")),
            "put": lambda db: devices_of(db).put(PairedDevice(device_id="new")),
            "update": lambda db: devices_of(db).update("one", lambda d: replace(d, status="lost")),
            "delete": lambda db: devices_of(db).delete("one"),
            "clear": lambda db: devices_of(db).clear("paired"),
            "prune of a task": lambda db: db.prune(1, None),
            "prune of a session": lambda db: db.prune(None, 1),
            "import_": lambda db: db.import_(self.file),
            "restore": lambda db: db.restore(self.other),
            "a block": block,
        }

    def test_every_verb_is_all_or_nothing_under_kill_full_disk_and_interrupt(self) -> None:
        self.store_some_of_each()
        for label, verb in self.verbs().items():
            # on a full disk these two fail at temporary files, before they touch the database
            faults = ("kill", "interrupt") if label in ("import_", "restore") else ()
            with self.subTest(label):
                self.assert_all_or_nothing(verb, *faults, tries=3)

    def test_other_connections_see_all_of_a_verb_or_nothing(self) -> None:
        """Look from outside before each statement of a verb: a kill there would leave just that."""
        self.store_some_of_each()
        image, seen, watching = read_bytes(self.path), list[list[str]](), False

        def look(_: str) -> None:
            if watching:
                with closing(sqlite3.connect(self.path)) as other:
                    seen.append([line for line in other.iterdump() if line.startswith("INSERT")])

        self.watch_connections(listener=look)
        for label, verb in self.verbs().items():
            write_bytes(self.path, image)
            seen.clear()
            with self.subTest(label), OperatorDb(self.path, durable=False) as db:
                watching = True
                look("before")
                verb(db)
                look("after")
                watching = False
                before, *during, after = seen
                self.assertNotEqual(before, after, "the verb changes nothing")
                self.assertGreaterEqual(len(during), 3)  # it begins, changes a row and commits
                for content in during:
                    self.assertTrue(content in (before, after), "a part of the verb can be seen")


# ==== What survives: kills, full disks, lost files ================================================


class SteppingChild(Child):
    """A child that runs a generator, and goes on to its next yield each time that it is told to."""

    def __init__(self, steps: Callable[[], Iterator[object]]) -> None:
        def work(say: Say) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            say("ready")
            signal.sigwait({signal.SIGUSR1})
            for value in steps():
                say(json.dumps(value))
                signal.sigwait({signal.SIGUSR1})

        super().__init__(work)
        self.line()

    def go_on(self) -> None:
        """Let the child go on, without waiting for it."""
        os.kill(self.pid, signal.SIGUSR1)

    def value(self) -> Any:
        """Wait for the next yield and return its value."""
        return json.loads(self.line())

    def next(self) -> Any:
        """Let the child go on to its next yield and return its value."""
        self.go_on()
        return self.value()


class AcknowledgedWritesSurvive(DatabaseTest):
    def write(self, db: OperatorDb, name: str, n: int) -> None:
        """Make the n-th write of a writer: one of five kinds in turn."""
        task_id = f"{name}-{n}"
        match n % 5:
            case 0:
                store_tasks(db, task_id, payload=bytes(n * 997 % 9000))
            case 1:
                parts = [f"{task_id}-{part}" for part in range(4)]
                with db.transaction():
                    store_tasks(db, *parts, payload=bytes(2000))
            case 2:
                db.append_transcript(name, "user", str(n))
            case 3:
                db.complete_task(f"{name}-{n - 3}", proof(f"{name}-{n - 3}"))
            case 4:
                store_tasks(db, task_id, status=TaskStatus.COMPLETED, completed_at=n)
                db.prune()

    def parts_found(self, db: OperatorDb, name: str, n: int) -> list[bool]:
        """Return for each part of a writer's n-th write whether the database shows it."""
        task_id = f"{name}-{n}"
        match n % 5:
            case 0:
                return [db.get_task(task_id) is not None]
            case 1:
                return [db.get_task(f"{task_id}-{part}") is not None for part in range(4)]
            case 2:
                return [str(n) in (entry.content for entry in db.transcript(name))]
            case 3:
                task = db.get_task(f"{name}-{n - 3}")
                is_completed = task is not None and task.status == TaskStatus.COMPLETED
                return [is_completed, db.get_proof(f"{name}-{n - 3}") is not None]
            case _:
                return [db.get_task(task_id) is None]  # it was pruned

    def test_every_acknowledged_write_survives_sigkill(self) -> None:
        def write_without_end(name: str, durable: bool, say: Say) -> None:
            with OperatorDb(self.path, durable=durable) as db:
                for n in itertools.count():
                    self.write(db, name, n)
                    say(n)

        rng = random.Random(3)
        for number in range(10):
            names = [f"w{number}a", f"w{number}b"]
            writers = [Child(partial(write_without_end, name, number % 2 == 0)) for name in names]
            for name, writer in zip(names, writers, strict=True):
                acknowledged = [writer.line() for _ in range(rng.randrange(25))]
                acknowledged += writer.kill(after=rng.uniform(0, 0.008))
                with OperatorDb(self.path) as db:
                    for n in range(len(acknowledged)):
                        self.assertTrue(all(self.parts_found(db, name, n)), f"{name}-{n} is lost")
                    unanswered = self.parts_found(db, name, len(acknowledged))
                    self.assertEqual(len(set(unanswered)), 1, f"{name} is stored by halves")
                    said = [int(entry.content) for entry in db.transcript(name)]
                    self.assertEqual(said, sorted(set(said)))
            self.assert_sound()

    def test_a_creator_that_is_killed_leaves_a_path_that_can_be_opened(self) -> None:
        def create(path: str, last_call: int, say: Say) -> int:
            """Die after one of the module's calls into C; 0: return how many there are."""
            calls = 0

            def strike(frame: Any, event: str, _: object) -> None:
                nonlocal calls
                if event == "c_return" and frame.f_code.co_filename == operator_db.__file__:
                    calls += 1
                    if calls == last_call:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(strike)
            with OperatorDb(path) as db:
                store_tasks(db, "first")
                say("acknowledged")
            return calls

        total = Child(partial(create, self.path, 0)).result()
        for last_call in range(1, total, total // 25):
            path = self.beside(f"{last_call}/operator.db")
            creator = Child(partial(create, path, last_call))
            said = creator.lines.read()
            creator.reap()
            self.assertNotIn("!", said, "the creator failed")
            with OperatorDb(path) as db:
                self.assertTrue(db.get_task("first") or "acknowledged" not in said)
                self.assertEqual(db.check(), [])

    def test_an_empty_database_that_a_killed_process_left_is_adopted(self) -> None:
        self.sql("PRAGMA journal_mode=WAL")
        self.assertGreater(os.stat(self.path).st_size, 0)
        with OperatorDb(self.path) as db:
            store_tasks(db, "t")
        self.assert_sound()

    def test_an_exit_with_threads_alive_is_silent_and_loses_nothing(self) -> None:
        program = """
import itertools, os, threading

db, seen = OperatorDb(sys.argv[1]), threading.Semaphore(0)

def work(name):
    for n in itertools.count():
        db.store_task(TaskRecord(task_id=f"{name} {n}"))
        os.write(1, f"{name} {n}\\n".encode())
        seen.release()

for name in range(4):
    threading.Thread(target=work, args=(name,), daemon=True).start()
for _ in range(40):
    seen.acquire()
"""
        done = run_program(program, self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with OperatorDb(self.path) as db:
            self.assertLessEqual(set(done.stdout.splitlines()), set(task_ids(db)))
            self.assertEqual(db.check(), [])


class FailedCallsStoreNothing(DatabaseTest):
    def without_room(self, size: int, action: Verb) -> None:
        """Call `action(db)` while no file may outgrow a size; then the same object must store."""

        def work() -> None:
            with OperatorDb(self.path) as db:
                with file_size_limit(size):
                    action(db)
                store_tasks(db, "room again", payload=bytes(2_000_000))
                self.assertEqual(db.check(), [])

        in_child(work)
        with OperatorDb(self.path) as db:
            self.assertEqual(len(db.get_task("room again").payload), 2_000_000)
            self.assertEqual(db.check(), [])

    def test_completing_a_task_without_room_stores_neither_status_nor_proof(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, "t", claimed_at=5)
        # limits so close that one of them lies between the proof and the status
        outcomes = self.assert_all_or_nothing(
            lambda db: db.complete_task("t", proof("t", bytes(9000))), "full disk", tries=20
        )
        self.assertGreater(outcomes["full disk: before"], 0)
        self.assertGreater(outcomes["full disk: after"], 0)

    def test_a_batch_without_room_is_undone_as_a_whole(self) -> None:
        def store_batch(db: OperatorDb) -> None:
            with db.transaction():  # more than SQLite's cache holds: it fails within, or at its end
                store_tasks(db, *map(str, range(60)), payload=bytes(60_000))

        OperatorDb(self.path).close()
        outcomes = self.assert_all_or_nothing(store_batch, "full disk", tries=6)
        self.assertGreater(outcomes["full disk: before"], 0)
        self.assertGreater(outcomes["full disk: after"], 0)

    def test_what_was_acknowledged_before_the_disk_was_full_can_be_read(self) -> None:
        def write(db: OperatorDb) -> None:
            acknowledged = []
            with self.assertRaises(StorageError) as caught:
                for n in range(1000):
                    store_tasks(db, f"t{n}", payload=bytes(20_000))
                    acknowledged.append(f"t{n}")
            self.assertIn(self.path, str(caught.exception))
            self.assertGreater(len(acknowledged), 3)
            for _ in range(3):
                with self.assertRaises(StorageError):
                    db.append_transcript("s", "user", "x" * 200_000)
            self.assertEqual(task_ids(db), sorted(acknowledged))
            self.assertIsNone(db.get_session("s"))

        self.without_room(400_000, write)

    def test_a_full_disk_dooms_the_whole_block_though_the_error_is_caught_within(self) -> None:
        later: tuple[tuple[str, Verb], ...] = (
            ("store", lambda db: store_tasks(db, "after")),
            ("read", lambda db: db.get_task("before")),
            ("append", lambda db: db.append_command("s", "after")),
            ("begin a block", lambda db: db.transaction().__enter__()),
        )

        def write(db: OperatorDb) -> None:
            reached = False
            with self.assertRaises(StorageError), db.transaction():
                store_tasks(db, "before")
                with self.assertRaises(StorageError), db.transaction():
                    store_tasks(db, *map(str, range(100)), payload=bytes(400_000))
                for label, verb in later:
                    with self.assertRaises(StorageError, msg=label):
                        verb(db)
                reached = True
            self.assertTrue(reached, "the block went on after the error")
            self.assertEqual(task_ids(db), [])

        self.without_room(300_000, write)

    def test_a_prune_without_room_can_be_done_again(self) -> None:
        def prune(db: OperatorDb) -> None:
            with self.assertRaises(StorageError):
                db.prune()
            left = len(task_ids(db))
            with suppress(StorageError):
                db.prune()
            self.assertLessEqual(len(task_ids(db)), left)
            self.assertEqual(db.check(), [])

        old = {"payload": bytes(3000), "status": TaskStatus.COMPLETED, "completed_at": 5}
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"t{n}" for n in range(400)), **old)
        self.without_room(33_000, prune)
        with OperatorDb(self.path) as db:
            db.prune()
            self.assertEqual(task_ids(db), ["room again"])

    def test_a_database_that_cannot_be_created_leaves_no_file(self) -> None:
        def create() -> None:
            for limit in (0, 4096, 20_000, 40_000):
                with file_size_limit(limit):
                    self.assert_refused(StorageError, lambda: OperatorDb(self.path), self.path)
                self.assertEqual(os.listdir(self.folder), [])

        in_child(create)

    def test_a_full_file_system_refuses_writes_until_there_is_room_again(self) -> None:
        program = """
import os

folder = sys.argv[1]
path, ballast = folder + "/operator.db", folder + "/ballast"
with open(ballast, "wb") as file:
    file.write(bytes(600_000))
db, acknowledged = OperatorDb(path), []
for _ in range(3):
    try:
        while True:
            db.store_task(TaskRecord(task_id=f"{len(acknowledged)}", payload=bytes(30_000)))
            acknowledged.append(f"{len(acknowledged)}")
    except StorageError as error:
        assert path in str(error), error
    try:
        with db.transaction():
            db.store_task(TaskRecord(task_id="half"))
            db.store_task(TaskRecord(task_id="other half", payload=bytes(10**7)))
    except StorageError:
        pass
    else:
        raise AssertionError("ten megabytes went into two")
assert len(acknowledged) > 5
os.unlink(ballast)
db.store_task(TaskRecord(task_id="room", payload=bytes(20_000)))
found = [task.task_id for task in db.iter_tasks()]
assert found == sorted([*acknowledged, "room"]), found
assert db.check() == [], db.check()
db.close()
with OperatorDb(path) as db:
    assert db.get_task("room")
"""
        mount = 'mount -t tmpfs -o size=2m none "$1" && shift && exec "$@"'
        wrap = ("unshare", "--mount", "sh", "-c", mount, "sh", self.folder)
        probe = [*wrap, "true"]
        may_try = os.geteuid() == 0 and shutil.which("unshare")
        if not may_try or subprocess.run(probe, capture_output=True, check=False).returncode:
            self.skipTest("needs the right to mount a file system")
        done = run_program(program, self.folder, wrap=wrap)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


class LostFilesAreNoticed(DatabaseTest):
    """A file or directory that may not be written, or that is gone, is never a silent loss."""

    def test_a_file_that_may_not_be_written_is_read_and_writes_are_refused(self) -> None:
        def look() -> None:
            with OperatorDb(self.path, read_only=True) as db:
                self.assertEqual(len(task_ids(db)), 40)
                self.assertEqual(db.check(), [])
                self.assert_refused(StorageError, lambda: store_tasks(db, "new"), self.path)
            with self.assertRaises(StorageError), OperatorDb(self.path) as db:
                store_tasks(db, "new")

        fill(self.path)
        with self.assert_unchanged():
            os.chmod(self.path, 0o400)
            as_nobody(self.folder, look)
            os.chmod(self.path, 0o600)

    def test_a_directory_that_may_not_be_written_is_read_and_writes_are_refused(self) -> None:
        def look() -> None:
            os.chmod(self.folder, 0o500)
            with OperatorDb(self.path, read_only=True) as db:
                self.assertEqual(len(task_ids(db)), 40)
            with self.assertRaises(StorageError), OperatorDb(self.path) as db:
                store_tasks(db, "new")
            self.assert_refused(StorageError, lambda: OperatorDb(self.other), self.other)

        fill(self.path)
        with self.assert_bytes_unchanged():
            as_nobody(self.folder, look)
            os.chmod(self.folder, 0o700)

    def test_modes_taken_away_under_an_open_database_lose_nothing_acknowledged(self) -> None:
        def work() -> list[str]:
            acknowledged = ["first"]
            with OperatorDb(self.path) as db:
                store_tasks(db, "first")
                for name, mode in ((self.path, 0o400), (self.folder, 0o500)):
                    os.chmod(name, mode)
                    with suppress(StorageError):
                        store_tasks(db, f"mode {mode:o}")
                        acknowledged.append(f"mode {mode:o}")
            return acknowledged

        acknowledged = as_nobody(self.folder, work)
        os.chmod(self.folder, 0o700)
        os.chmod(self.path, 0o600)
        with OperatorDb(self.path) as db:
            self.assertEqual(task_ids(db), sorted(acknowledged))

    def assert_loss_is_noticed(self, lose: Callable[[], object]) -> None:
        """Lose files under an open database; every write from then on must be refused."""
        with OperatorDb(self.path) as db:
            store_tasks(db, "before")
            lose()
            for _ in range(2):
                self.assert_refused(StorageError, lambda: store_tasks(db, "after"), self.path)
            with self.assertRaises(StorageError), db.transaction():
                db.append_transcript("s", "user", "after")

    def remove(self, *endings: str) -> None:
        """Remove the database or what stands beside it, where it is there."""
        for ending in endings:
            with suppress(FileNotFoundError):
                os.unlink(self.path + ending)

    def test_writes_to_files_that_were_deleted_are_refused(self) -> None:
        def replace_log() -> None:
            self.remove("-wal")
            write_bytes(self.path + "-wal", b"")

        cases: tuple[tuple[str, Callable[[], object]], ...] = (
            ("the database", partial(self.remove, "")),
            ("its log", partial(self.remove, "-wal")),
            ("its log, and a new one is there", replace_log),
            ("all files", partial(self.remove, "", "-wal", "-shm")),
        )
        for label, lose in cases:
            with self.subTest(label):
                self.assert_loss_is_noticed(lose)
                if not os.path.exists(self.path):
                    self.remove("-wal", "-shm")  # a log without its database is never opened
                self.assert_sound()

    def test_writes_to_a_replaced_file_are_refused_and_leave_the_new_one_alone(self) -> None:
        def replace_it() -> None:
            self.remove("-wal", "-shm")
            os.rename(self.other, self.path)

        fill(self.other)
        content, image = content_of(self.other), read_bytes(self.other)
        self.assert_loss_is_noticed(replace_it)
        self.assertTrue(read_bytes(self.path) == image)
        self.assertEqual(content_of(self.path), content)

    def test_closing_a_replaced_database_takes_nothing_from_its_successor(self) -> None:
        def succeed() -> Iterator[str]:
            with OperatorDb(self.path) as db:
                for task_id in ("one", "two"):
                    store_tasks(db, task_id)
                    yield "stored"

        successor = SteppingChild(succeed)
        self.addCleanup(successor.kill)
        db = OperatorDb(self.path)
        store_tasks(db, "old")
        for ending in ("", "-wal", "-shm"):
            os.rename(self.path + ending, self.path + ".moved" + ending)
        successor.next()
        self.assert_refused(StorageError, lambda: store_tasks(db, "lost"), self.path)
        db.close()
        successor.next()
        with OperatorDb(self.path) as db:
            self.assertEqual(task_ids(db), ["one", "two"])


# ==== Who may do what at the same time ============================================================


class TransactionsAreAllOrNothing(DatabaseTest):
    def test_a_transaction_is_whole_or_undone_whatever_happens(self) -> None:
        def change(db: OperatorDb) -> None:
            with db.transaction():
                store_tasks(db, "new", payload=bytes(90_000))
                with db.transaction():
                    db.append_transcript("s0", "user", "new")
                    db.complete_task("t0", proof("t0", submitted=True))
                db.delete_task("t1")

        fill(self.path, tasks=6)
        outcomes = self.assert_all_or_nothing(change, tries=12)
        self.assertGreater(outcomes["interrupt: before"], 0)
        self.assertGreater(outcomes["full disk: before"], 0)

    def test_a_block_sees_its_own_changes_and_others_see_them_once_it_ends(self) -> None:
        db, other = self.open(), self.open()
        store_tasks(db, "old")
        with db.transaction():
            store_tasks(db, "new")
            self.assertEqual(task_ids(db), ["new", "old"])
            self.assertIsNone(other.get_task("new"))
            run_in_threads(lambda: self.assertIsNone(db.get_task("new")))
        self.assertIsNotNone(other.get_task("new"))
        run_in_threads(lambda: self.assertIsNotNone(db.get_task("new")))

    def test_a_block_that_raises_is_undone_and_its_error_passes(self) -> None:
        db = self.open()
        store_tasks(db, "old")
        for error in (KeyError, StopIteration, KeyboardInterrupt, ConflictError):
            with self.subTest(error=error):
                with self.assertRaises(error), db.transaction():
                    db.delete_task("old")
                    db.append_transcript("s", "user", "x")
                    raise error
                with self.assertRaises(error), db.transaction(), db.transaction():
                    store_tasks(db, "new")
                    raise error
                with self.assertRaises(error), ExitStack() as stack:
                    stack.enter_context(db.transaction())
                    store_tasks(db, "new")
                    raise error
                self.assertEqual((task_ids(db), db.get_session("s")), (["old"], None))

    def test_a_block_in_an_exit_stack_is_committed(self) -> None:
        db = self.open()
        with ExitStack() as stack:
            stack.enter_context(db.transaction())
            store_tasks(db, "t")
        self.assertEqual(task_ids(db), ["t"])

    def test_a_nested_block_can_be_undone_without_the_outer_one(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, "outer")
            for depth in range(3):
                with suppress(KeyError), db.transaction():
                    store_tasks(db, f"inner {depth}")
                    with db.transaction():
                        store_tasks(db, f"innermost {depth}")
                    if depth != 1:
                        raise KeyError
        self.assertEqual(task_ids(db), ["inner 1", "innermost 1", "outer"])

    def test_a_call_that_fails_inside_a_block_leaves_nothing_of_itself(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, "t", "u")
            db.store_proof(proof("t", b"one"))
            with self.assertRaises(ConflictError):
                db.complete_task("t", proof("t", b"another"))
            with self.assertRaises(InvalidRecordError):
                db.complete_task("u", proof("u"), signature=5)  # found when the proof is stored
            db.append_transcript("s", "user", "kept")
            other = [TranscriptEntry(role="user", content="other")]
            with self.assertRaises(ConflictError):
                db.store_session(SessionState(session_id="s", transcript=other))
        self.assertEqual(db.count_tasks()[TaskStatus.CLAIMED], 2)
        self.assertEqual([log.outputs for log in db.list_proofs()], [b"one"])
        self.assertEqual([entry.content for entry in db.transcript("s")], ["kept"])

    def test_a_block_is_used_once(self) -> None:
        db = self.open()
        block = db.transaction()
        with block:
            store_tasks(db, "t")
        with self.assertRaises(ConflictError), block:
            pass
        self.assertEqual(task_ids(db), ["t"])


class ThreadsAndProcessesTakeTurns(DatabaseTest):
    @contextmanager
    def own_block(self, db: OperatorDb) -> Iterator[Callable[[], object]]:
        """Hold the lock in this thread until the block calls what it is given."""
        with ExitStack() as stack:
            stack.enter_context(db.transaction())
            store_tasks(db, "held")
            yield stack.close

    @contextmanager
    def block_of_a_process(self) -> Iterator[Callable[[], object]]:
        """Let another process hold the lock until the block calls what it is given."""
        child = holding_the_lock(self.path)

        def leave() -> None:
            os.kill(child.pid, signal.SIGUSR1)
            child.result()

        yield leave

    def test_a_write_that_waits_in_vain_is_a_busy_error_and_can_be_done_again(self) -> None:
        db, other = self.open(timeout=0.1), self.open()
        holders = (
            ("another thread", open_block(db, "held")),
            ("another object in another thread", open_block(other, "held")),
            ("another object in this thread", self.own_block(other)),
            ("another process", self.block_of_a_process()),
        )
        for label, holder in holders:
            with self.subTest(label), holder as leave:
                began = time.monotonic()
                error = self.assert_refused(BusyError, lambda: store_tasks(db, "mine"), self.path)
                self.assertTrue(0.1 <= time.monotonic() - began < 5)
                self.assertIsInstance(error, TimeoutError)
                self.assertEqual(task_ids(db), [], "a reader waits for nobody")
                leave()
                store_tasks(db, "mine")
                self.assertEqual(task_ids(db), ["held", "mine"])
                store_tasks(other, "its turn, too")
            for task_id in task_ids(db):
                db.delete_task(task_id)

    def test_a_place_in_a_long_queue_makes_nobody_wait_longer_than_the_timeout(self) -> None:
        db, waited = self.open(timeout=0.1), list[float]()

        def write() -> None:
            began = time.monotonic()
            with self.assertRaises(BusyError):
                store_tasks(db, "t")
            waited.append(time.monotonic() - began)

        with db.transaction():
            run_in_threads(*[write] * 800)
        self.assertEqual(len(waited), 800)
        self.assertLess(max(waited), 0.7)  # and not a millisecond for each place

    def test_writers_that_waited_for_each_other_do_not_sleep_after_their_turns(self) -> None:
        db, sleep, slept = self.open(), time.sleep, list[float]()

        def counted_sleep(seconds: float) -> None:
            slept.append(seconds)
            sleep(seconds)

        def write() -> None:
            for _ in range(10):
                db.append_command("s", "x")

        self.enterContext(mock.patch("time.sleep", counted_sleep))
        with open_block(db, "first") as leave, in_background(*[write] * 8):
            sleep(0.03)  # a long turn, after which other processes are let in
            leave()
        self.assertEqual(len(db.get_session("s").command_history), 80)
        self.assertLess(len(slept), 40)

    def test_a_block_that_has_only_read_keeps_other_writers_out(self) -> None:
        db, other = self.open(), self.open(timeout=0)
        store_tasks(db, "t", reward_lamports=1)
        with db.transaction():
            reward = db.get_task("t").reward_lamports
            self.assert_refused(BusyError, lambda: store_tasks(other, "t", reward_lamports=5))
            store_tasks(db, "t", reward_lamports=reward + 1)
        self.assertEqual(other.get_task("t").reward_lamports, 2)

    def test_threads_that_read_at_once_never_share_a_connection(self) -> None:
        meeting = threading.Barrier(2)

        def meet(statement: str) -> None:
            # a second thread on the same connection would wait for the first one's statement
            if "tasks:meet" in statement:
                with suppress(threading.BrokenBarrierError):
                    meeting.wait(2)

        def read_in_turn_then_at_once() -> None:
            connections = self.watch_connections(listener=meet)
            db = self.open()
            with ThreadPoolExecutor(1) as other:
                db.get_task("t")
                before = len(connections)
                for _ in range(5):
                    other.submit(db.get_task, "t").result()
                    db.get_task("t")
                self.assertEqual(len(connections), before, "threads that read in turn share one")
                for _ in range(5):
                    reading = other.submit(db.get_task, "meet")
                    db.get_task("meet")
                    reading.result()
            self.assertFalse(meeting.broken, "one thread had to wait for the other's connection")
            self.assertEqual(len(connections), before + 1)

        in_child(read_in_turn_then_at_once, seconds=5)  # a shared connection may hang for good

    def work(self, db: OperatorDb, worker: int, *, rounds: int = 12) -> None:
        """Read, and increment or append in one of four ways, many times."""
        tallies = tallies_of(db)
        for n in range(rounds):
            task_id = f"t{n * 7 % 40}"
            task = db.get_task(task_id)
            self.assertEqual((task.task_id, task.payload), (task_id, task_id.encode() * 99))
            match worker % 4:
                case 0:
                    tallies.update("a", lambda tally: replace(tally, count=tally.count + 1))
                case 1:
                    with db.transaction():
                        tally = tallies.get("b")
                        tallies.put(replace(tally, count=tally.count + 1))
                case 2:
                    db.append_transcript("shared", "user", f"{worker} {n}")
                case 3:
                    self.assertEqual(len(task_ids(db)), 40)

    def test_sixteen_threads_and_four_processes_lose_no_increment(self) -> None:
        def work_in_process(worker: int, _: Say) -> None:
            with OperatorDb(self.path, durable=False) as db:
                self.work(db, worker)

        db = self.open()
        for n in range(40):
            store_tasks(db, f"t{n}", payload=f"t{n}".encode() * 99)
        tallies = tallies_of(db)
        tallies.put(Tally(name="a"))
        tallies.put(Tally(name="b"))
        children = [Child(partial(work_in_process, worker)) for worker in range(16, 20)]
        run_in_threads(*(partial(self.work, db, worker) for worker in range(16)))
        for child in children:
            child.result()
        self.assertEqual([tally.count for tally in tallies.values()], [60, 60])
        said = [entry.content for entry in db.transcript("shared")]
        wanted = [f"{worker} {n}" for worker in range(2, 20, 4) for n in range(12)]
        self.assertEqual(sorted(said), sorted(wanted))
        self.assertEqual(db.check(), [])

    def test_a_second_handle_drops_no_lock_of_the_first(self) -> None:
        def write() -> Iterator[list[str]]:
            for number in itertools.count():
                with OperatorDb(self.path) as other:
                    store_tasks(other, f"{number} beside")
                    yield task_ids(other)

        process = SteppingChild(write)
        self.addCleanup(process.kill)
        db = self.open(durable=True)
        meddlers: tuple[tuple[str, Callable[[], object]], ...] = (
            ("another handle", lambda: OperatorDb(self.path).close()),
            ("a reader", lambda: OperatorDb(self.path, read_only=True).close()),
            ("a check", db.check),
            ("a prune", db.prune),
        )
        stored: list[str] = []
        for number, (label, meddle) in enumerate(meddlers):
            with self.subTest(label):
                store_tasks(db, f"{number} before")
                meddle()
                stored += [f"{number} before", f"{number} beside"]
                self.assertEqual(process.next(), stored)
                store_tasks(db, f"{number} later")
                stored.append(f"{number} later")
        self.assertEqual(process.next(), [*stored, "4 beside"])
        self.assertEqual(db.check(), [])

    def test_no_live_file_is_ever_opened_raw(self) -> None:
        opened, is_live = list[str](), False

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event != "open" or not is_live or isinstance(arguments[0], int):
                return
            for name in (self.path, self.path + "-wal", self.path + "-shm"):
                with suppress(FileNotFoundError):
                    if os.path.samefile(name, arguments[0]):
                        opened.append(f"{name} by {traceback.format_stack(limit=4)}")

        def open_and_close() -> None:
            OperatorDb(self.path).close()
            self.assertEqual(opened, [])

        def work() -> None:
            nonlocal is_live
            sys.addaudithook(watch)  # there for good: hence in a child
            db = OperatorDb(self.path)
            is_live = True
            store_tasks(db, "t", payload=bytes(50_000))
            for read_only in (False, True):
                with OperatorDb(self.path, read_only=read_only) as other:
                    other.list_tasks()
                    other.check()
            db.complete_task("t", proof("t"))
            verbs: tuple[Callable[[], object], ...] = (
                db.check,
                partial(db.prune, 0, 0, 0),
                db.count_tasks,
                lambda: task_ids(db),
                partial(db.dispute_bundle, "t"),
                db.stats,
                db.prometheus,
                db.compact,
                partial(db.backup, self.other),
                partial(db.restore, self.other),
                partial(db.write_metrics, self.beside("metrics")),
                partial(db.export, self.file),
                partial(db.import_, self.file),
            )
            for verb in verbs:
                verb()
            in_child(open_and_close)
            store_tasks(db, "u")
            db.close()
            self.assertEqual(opened, [])

        in_child(work)


class CoroutinesNeverShareABlock(DatabaseTest):
    """A transaction belongs to the thread and context that opened it."""

    def assert_kept_out(self, db: OperatorDb) -> None:
        """Fail unless the caller can neither join another's block nor see what it has done."""
        for action in (
            lambda: store_tasks(db, "outsider"),
            lambda: db.append_command("s", "outsider"),
            lambda: db.transaction().__enter__(),
        ):
            self.assert_refused(ConflictError, action)
        self.assertIsNone(db.get_task("inside"))

    def test_a_coroutine_cannot_write_while_anothers_block_is_open(self) -> None:
        async def main() -> None:
            opened, tried = asyncio.Event(), asyncio.Event()

            async def first() -> None:
                with db.transaction():
                    store_tasks(db, "inside")
                    opened.set()
                    await tried.wait()
                    store_tasks(db, "inside still")

            async def second() -> None:
                await opened.wait()
                self.assert_kept_out(db)
                self.assert_refused(ConflictError, db.close)
                tried.set()

            await asyncio.gather(first(), second())

        db = self.open()
        asyncio.run(main())
        self.assertEqual(task_ids(db), ["inside", "inside still"])

    def test_a_worker_or_task_begun_inside_a_block_gets_no_place_in_it(self) -> None:
        async def task() -> None:
            self.assert_kept_out(db)

        async def main() -> None:
            with db.transaction():
                store_tasks(db, "inside")
                await asyncio.to_thread(self.assert_kept_out, db)
                await asyncio.create_task(task())
                context = contextvars.copy_context()
                run_in_threads(partial(context.run, self.assert_kept_out, db))

        db = self.open()
        asyncio.run(main())
        asyncio.run(asyncio.to_thread(store_tasks, db, "later"))
        self.assertEqual(task_ids(db), ["inside", "later"])

    def test_a_thread_that_shares_the_context_of_a_block_gets_no_place_in_it(self) -> None:
        db, context = self.open(), contextvars.copy_context()
        block = db.transaction()
        context.run(block.__enter__)
        context.run(store_tasks, db, "inside")
        run_in_threads(partial(context.run, self.assert_kept_out, db))
        context.run(block.__exit__, None, None, None)
        self.assertEqual(task_ids(db), ["inside"])


class TheWriteAheadLogStaysShort(DatabaseTest):
    LIMIT = 40 * 2**20

    def log_size(self) -> int:
        return os.stat(self.path + "-wal").st_size

    def longest_log(self, db: OperatorDb, megabytes: int) -> int:
        """Write so much to the log, a little at a time, and return how long it was at most."""
        longest = 0
        for number in range(megabytes):
            # 1 MB as base64; the same bytes again would not be written
            store_tasks(db, str(number % 3), payload=bytes([number]) * 750_000)
            longest = max(longest, self.log_size())
        return longest

    def test_the_log_is_cut_by_checkpoints_that_take_the_write_lock(self) -> None:
        checkpoints: Counter[str] = Counter()

        def listen(statement: str) -> None:
            if mode := re.search(r"wal_checkpoint\W*(\w*)", statement):
                checkpoints[mode[1].upper()] += 1

        connections = self.watch_connections(listener=listen)
        db = self.open()
        self.assertLess(self.longest_log(db, 50), self.LIMIT)
        db.prune()
        self.assertLessEqual(set(checkpoints), {"FULL", "TRUNCATE"})
        self.assertGreater(checkpoints.total(), 0)
        pages = {self.pragma(connection, "wal_autocheckpoint") for connection in connections}
        self.assertEqual(pages - {None}, {0})

    def pragma(self, connection: sqlite3.Connection, name: str) -> int | None:
        """Return a setting of a connection that can write, None for another one."""
        with suppress(sqlite3.ProgrammingError, ClosedError):  # it is closed
            if connection.execute("PRAGMA query_only").fetchone() == (0,):
                return connection.execute(f"PRAGMA {name}").fetchone()[0]
        return None

    def test_the_log_stays_short_beside_steady_readers(self) -> None:
        def read(say: Say) -> None:
            """Read without a gap: each of two transactions begins before the other one ends."""
            first, second = (sqlite3.connect(self.path, isolation_level=None) for _ in range(2))
            while True:
                second.execute("BEGIN")
                second.execute("SELECT count(*) FROM tasks").fetchall()
                say("reads")
                first.rollback()
                first, second = second, first
                time.sleep(0.04)  # several commits

        db = self.open()
        store_tasks(db, "t")
        reader = Child(read)
        self.addCleanup(reader.kill)
        reader.line()
        self.assertLess(self.longest_log(db, 60), self.LIMIT)

    def test_a_checkpoint_that_fails_denies_nothing_that_is_committed(self) -> None:
        denied: list[str] = []

        def authorize(action: int, name: str | None, *_: object) -> int:
            if action == sqlite3.SQLITE_PRAGMA and name == "wal_checkpoint":
                denied.append(name)
                return sqlite3.SQLITE_DENY
            return sqlite3.SQLITE_OK

        connections, enough = self.watch_connections(), bytes(15_000_000)
        db = self.open()
        store_tasks(db, "first")
        for connection in connections:
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it is closed
                connection.set_authorizer(authorize)
        store_tasks(db, "alone", payload=enough)
        self.assertTrue(denied)
        denied.clear()
        with db.transaction():
            store_tasks(db, "in a block", payload=enough)
        self.assertTrue(denied)
        self.assertEqual(task_ids(db), ["alone", "first", "in a block"])

    def test_a_replicator_keeps_its_read_lock_and_an_unbroken_log(self) -> None:
        """Do beside a database what Litestream does: https://litestream.io/how-it-works/."""

        def header() -> bytes:
            with open(self.path + "-wal", "rb") as file:  # SQLite keeps no lock on the log itself
                return file.read(32)

        def replicate() -> Iterator[None]:
            with closing(sqlite3.connect(self.path, isolation_level=None, timeout=5)) as raw:

                def lock_shortly() -> None:
                    raw.execute("BEGIN IMMEDIATE")
                    raw.execute("INSERT INTO _litestream_lock VALUES (1)")
                    raw.execute("ROLLBACK")

                raw.execute("CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER)")
                raw.execute("CREATE TABLE _litestream_lock (id INTEGER)")
                lock_shortly()
                raw.execute("INSERT INTO _litestream_seq VALUES (1, 1)")
                raw.execute("BEGIN")
                raw.execute("SELECT count(*) FROM _litestream_seq").fetchone()
                yield
                raw.execute("ROLLBACK")
                yield
                for _ in range(20):
                    lock_shortly()
                    raw.execute("PRAGMA wal_checkpoint(PASSIVE)")
                yield

        db = self.open()
        replicator = SteppingChild(replicate)
        self.addCleanup(replicator.kill)
        store_tasks(db, "first")
        replicator.next()
        before = header()
        for number in range(3):
            large = {"payload": bytes(11_000_000), "status": "completed", "claimed_at": 0}
            store_tasks(db, f"large {number}", **large)
            store_tasks(db, *(f"{number} {part}" for part in range(10)))
        db.prune()
        self.assertGreater(self.log_size(), self.LIMIT, "the read lock holds the log back")
        self.assertEqual(header(), before, "the log was begun anew under the read lock")
        replicator.next()
        replicator.go_on()
        store_tasks(db, *(f"beside {number}" for number in range(100)))
        replicator.value()
        store_tasks(db, "last")
        self.assertLess(self.log_size(), self.LIMIT / 2)
        self.assertEqual((len(task_ids(db)), db.check()), (132, []))
        self.assertEqual(self.sql("SELECT seq FROM _litestream_seq"), [(1,)])


class ClosingEndsTheWork(DatabaseTest):
    def test_close_is_done_once_and_later_calls_say_so(self) -> None:
        db = self.open()
        store_tasks(db, "t")
        walk = db.iter_tasks()
        db.close()
        db.close()
        calls: tuple[tuple[str, Callable[[], object]], ...] = (
            ("get", partial(db.get_task, "t")),
            ("store", partial(store_tasks, db, "t")),
            ("iterate", partial(task_ids, db)),
            ("go on iterating", partial(next, walk)),
            ("count", db.count_tasks),
            ("check", db.check),
            ("prune", db.prune),
            ("begin a block", lambda: db.transaction().__enter__()),
        )
        for label, call in calls:
            with self.subTest(label):
                error = self.assert_refused(ClosedError, call, self.path)
                self.assertIsInstance(error, RuntimeError)

    def test_close_leaves_the_database_alone_in_its_directory(self) -> None:
        with OperatorDb(self.path) as db:
            run_in_threads(*[partial(store_tasks, db, "t")] * 3)
            run_in_threads(*[partial(db.get_task, "t")] * 3)
        self.assertEqual(os.listdir(self.folder), ["operator.db"])

    def test_close_inside_a_block_is_refused_and_the_block_goes_on(self) -> None:
        db = self.open()
        with db.transaction():
            self.assert_refused(ConflictError, db.close)
            store_tasks(db, "t")
        self.assertEqual(task_ids(db), ["t"])

    def test_close_waits_for_a_block_of_another_thread_until_its_timeout(self) -> None:
        db = self.open(timeout=0.15)

        def close() -> None:
            began = time.monotonic()
            self.assert_refused(BusyError, db.close, self.path)
            self.assertTrue(0.15 <= time.monotonic() - began < 5)

        with db.transaction():
            store_tasks(db, "before")
            run_in_threads(close)
            store_tasks(db, "after")
        self.assertEqual(task_ids(db), ["after", "before"])
        store_tasks(db, "later")

    def test_close_waits_for_the_block_and_refuses_the_writers_that_wait(self) -> None:
        db, refused = self.open(timeout=3), list[ClosedError]()

        def write() -> None:
            with self.assertRaises(ClosedError) as caught:
                store_tasks(db, "refused")
            refused.append(caught.exception)

        with open_block(db, "inside") as leave, in_background(*[write] * 4):
            timer = threading.Timer(0.1, leave)
            timer.start()
            db.close()
            timer.join()
        self.assertEqual(len(refused), 4)
        with OperatorDb(self.path) as db:
            self.assertEqual(task_ids(db), ["inside"])

    def test_close_amid_sixteen_busy_threads_ends_and_tells_every_one(self) -> None:
        db, started = self.open(), threading.Barrier(17)

        def work(worker: int) -> None:
            started.wait(10)
            with self.assertRaises(ClosedError):
                while True:
                    store_tasks(db, str(worker))
                    db.get_task(str(worker))

        def close() -> None:
            started.wait(10)
            db.close()

        run_in_threads(close, *(partial(work, worker) for worker in range(16)))
        self.assertEqual(open_descriptors(self.folder), 0)

    def test_a_walk_or_a_block_that_is_abandoned_holds_nothing(self) -> None:
        fill(self.path)
        with OperatorDb(self.path, timeout=2) as db:
            walk = db.iter_tasks()
            next(walk)
            block = db.transaction()
            block.__enter__()
            del block
            gc.collect()
            store_tasks(db, "t")
            del walk
        self.assertEqual(open_descriptors(self.folder), 0)

    def test_a_database_that_nobody_closed_gives_its_descriptors_back(self) -> None:
        for _ in range(20):
            store_tasks(OperatorDb(self.path), "t")
        gc.collect()
        self.assertEqual(open_descriptors(self.folder), 0)


def store_one_task(path: str, task_id: str) -> None:
    """Open a database and store a task; a function that multiprocessing finds by its name."""
    with OperatorDb(path) as db:
        store_tasks(db, task_id)


class ForkIsSafe(DatabaseTest):
    """Parent and child may go on with a database; what either was told is stored is stored."""

    def stored(self) -> list[str]:
        """Return the ids of all tasks, as a fresh handle finds them in a sound file."""
        self.assert_sound()
        with OperatorDb(self.path) as db:
            return task_ids(db)

    def test_parent_and_child_of_an_idle_database_both_write(self) -> None:
        with self.open() as db:
            for n in range(10):
                store_tasks(db, f"parent {n}")
                child = Child(lambda _, n=n: store_tasks(db, f"child {n}"))
                store_tasks(db, f"meanwhile {n}")
                child.result()
        self.assertEqual(len(self.stored()), 30)

    def test_a_database_that_waits_for_nobody_can_be_forked(self) -> None:
        db = self.open(timeout=0)
        store_tasks(db, "t")
        in_child(lambda: self.assertIsNotNone(db.get_task("t")))
        store_tasks(db, "t")

    def test_children_forked_while_threads_work_all_write_and_end(self) -> None:
        first, second = self.open(timeout=10), self.open(self.other, timeout=10)
        stop, counts = threading.Event(), Counter[int]()

        def write(worker: int) -> None:
            while not stop.is_set():
                store_tasks(first, f"thread {worker} {counts[worker]}")
                counts[worker] += 1
                list(itertools.islice(first.iter_tasks(), 20))

        def read(db: OperatorDb) -> None:
            while not stop.is_set():
                db.get_task("t")

        def child(n: int) -> None:
            store_tasks(first, f"child {n}")
            store_tasks(second, f"child {n}")

        writers = [partial(write, worker) for worker in range(3)]
        readers = [partial(read, db) for db in (first, second, second)]
        with in_background(*writers, *readers):
            try:
                for n in range(10):
                    in_child(partial(child, n))
            finally:
                stop.set()
        first.close()
        self.assertEqual(len(self.stored()), 10 + counts.total())
        self.assertEqual(len(task_ids(second)), 10)

    def test_a_walk_goes_on_in_parent_and_child(self) -> None:
        db = self.open()
        names = [f"{n:03}" for n in range(80)]
        with db.transaction():
            store_tasks(db, *names, payload=bytes(30_000))  # more than a walk reads at a time
        walk = (task.task_id for task in db.iter_tasks())
        next(walk)

        def rest(_: Say | None = None) -> list[str]:
            store_tasks(db, f"x{os.getpid()}")
            return [name for name in walk if name[0] != "x"]

        child = Child(rest)
        self.assertEqual(rest(), names[1:])
        self.assertEqual(child.result(), names[1:])

    def test_a_child_of_an_open_transaction_is_refused_and_the_parent_goes_on(self) -> None:
        db = self.open(timeout=0.2)

        def try_everything() -> None:
            for call in (partial(store_tasks, db, "child"), partial(db.get_task, "t"), db.check):
                self.assert_refused(ClosedError, call, self.path)
            self.assert_refused(ConflictError, partial(OperatorDb, self.path), self.path)
            db.close()

        with db.transaction():
            store_tasks(db, "of this thread")
            in_child(try_everything)
            store_tasks(db, "after the fork")
        with open_block(db, "of another thread"):  # for longer than the timeout
            in_child(try_everything)
        store_tasks(db, "later")
        beside = run_program("OperatorDb(sys.argv[1]).close()", self.path)
        self.assertEqual((beside.returncode, beside.stderr), (0, ""))
        store_tasks(db, "last")
        db.close()
        names = ["after the fork", "last", "later", "of another thread", "of this thread"]
        self.assertEqual(self.stored(), names)

    def test_a_child_that_leaves_its_parents_block_commits_nothing_and_undoes_nothing(self) -> None:
        db, other = self.open(), self.open()
        with ExitStack() as block:
            block.enter_context(db.transaction())
            store_tasks(db, "t")

            def fail() -> None:
                with block:
                    raise KeyError

            in_child(lambda: self.assertRaises(OperatorDbError, block.close))
            in_child(lambda: self.assertRaises(KeyError, fail))
            self.assertEqual(task_ids(other), [])
            self.assertEqual(task_ids(db), ["t"])
        self.assertEqual(task_ids(other), ["t"])

    def test_a_child_of_an_open_transaction_takes_no_commit_with_it_when_it_exits(self) -> None:
        program = """
import os, signal
db = OperatorDb(sys.argv[1])
reader, writer = os.pipe()
with db.transaction():
    db.store_task(TaskRecord(task_id="of the parent"))
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent lets it go
        sys.exit()
db.close()
if os.fork() == 0:
    OperatorDb(sys.argv[1]).store_task(TaskRecord(task_id="of one that was killed"))
    os.kill(os.getpid(), signal.SIGKILL)
os.wait()
os.close(writer)
os.wait()
"""
        done = run_program(program, self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(self.stored(), ["of one that was killed", "of the parent"])

    def test_either_side_may_die_first(self) -> None:
        def parent(say: Say) -> None:
            db = OperatorDb(self.path)
            store_tasks(db, "parent")
            reader, writer = os.pipe()
            if os.fork():
                store_tasks(db, "parent again")
                say("the parent has written")
                os.kill(os.getpid(), signal.SIGKILL)
            signal.alarm(10)
            os.close(writer)
            store_tasks(db, "orphan")
            os.read(reader, 1)  # ends when the parent is dead
            store_tasks(db, "orphan again")
            say("the orphan has written")
            os._exit(0)

        def write_on(say: Say) -> None:
            for n in itertools.count():
                store_tasks(db, f"child {n}")
                say(n)

        child = Child(parent)
        both = {child.line(), child.line()}
        self.assertEqual(both, {"the parent has written", "the orphan has written"})
        child.reap()
        self.assertEqual(self.stored(), ["orphan", "orphan again", "parent", "parent again"])
        with self.open() as db:
            child = Child(write_on)
            for _ in range(5):
                store_tasks(db, f"beside {child.line()}")
            said = child.kill()
            store_tasks(db, "survivor")
        acknowledged = {"survivor", *(f"child {n}" for n in said)}
        acknowledged |= {f"{who} {n}" for n in range(5) for who in ("child", "beside")}
        self.assertLessEqual(acknowledged, {*self.stored()})

    def test_multiprocessing_works_by_fork_and_by_spawn(self) -> None:
        with self.open() as db:
            for method in ("fork", "spawn"):
                context = multiprocessing.get_context(method)
                worker = context.Process(target=store_one_task, args=(self.path, method))
                worker.start()
                store_tasks(db, f"beside {method}")
                worker.join()
                self.assertEqual(worker.exitcode, 0)
        self.assertEqual(self.stored(), ["beside fork", "beside spawn", "fork", "spawn"])

    def test_a_block_may_use_another_database_while_another_thread_forks(self) -> None:
        def work() -> float:
            first, second = self.open(timeout=10), self.open(self.other, timeout=10)
            inside, forking = threading.Event(), threading.Event()
            os.register_at_fork(before=forking.set)

            def use_both() -> None:
                with first.transaction():
                    inside.set()
                    self.assertTrue(forking.wait(10))
                    store_tasks(second, "t")
                    self.assertIsNone(second.get_task("x"))

            def look() -> None:
                self.assertIsNone(first.get_task("t"))
                self.assertIsNotNone(second.get_task("t"))

            with in_background(use_both):
                self.assertTrue(inside.wait(10))
                began = time.monotonic()
                in_child(look)
            return time.monotonic() - began

        self.assertLess(in_child(work), 5)

    def test_two_threads_that_fork_at_once_do_not_wait_for_each_other(self) -> None:
        def work() -> float:
            db = self.open(timeout=10)
            inside, forking = threading.Event(), threading.Event()
            os.register_at_fork(before=forking.set)

            def fork_in_a_block() -> None:
                with db.transaction():
                    inside.set()
                    self.assertTrue(forking.wait(10))
                    in_child(int)
                    store_tasks(db, "t")

            with in_background(fork_in_a_block):
                self.assertTrue(inside.wait(10))
                began = time.monotonic()
                in_child(int)
            self.assertIsNotNone(db.get_task("t"))
            return time.monotonic() - began

        self.assertLess(in_child(work), 5)


class InterruptsLoseNothing(DatabaseTest):
    """KeyboardInterrupt may land between any two instructions of the module.

    Most tests here interrupt a verb at its first call, then at its second, and so on to its end.
    """

    def setUp(self) -> None:
        super().setUp()
        self.opened = self.watch_connections()
        self.db, self.second = self.open(timeout=2), self.open(timeout=0.5)
        self.mine, self.theirs = tallies_of(self.db), tallies_of(self.second)
        raw = self.enterContext(closing(sqlite3.connect(self.path, timeout=0)))
        self.checkpoint = partial(raw.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
        self.assert_nothing_held("at first")
        for connection in (raw, *self.opened):
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it has been closed
                connection.execute("PRAGMA synchronous=OFF")  # a sync at every step would be slow
        # an interrupt in a finalizer or a fork hook is printed by the interpreter, not raised
        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))

    def sweep(
        self,
        label: str,
        verb: Callable[[str], object],
        *,
        prepare: Callable[[str], object] = lambda name: None,
        parts: Callable[[str], tuple[object, ...]] = lambda name: (),
        every: int = 1,
    ) -> None:
        """Interrupt a verb at each of its calls, every time with another name for what it stores.

        The exceptions are kept, and with them all frames that they passed through. While one is
        handled nothing may be held, and all parts of the verb must be done, or none.
        """
        kept: list[BaseException] = []
        outcomes = set[bool]()
        with self.subTest(label):
            for number in itertools.count(1, every):
                name = f"{label} {number}"
                prepare(name)
                try:
                    with interrupt_at_call(number) as calls:
                        verb(name)
                except KeyboardInterrupt as error:
                    kept.append(error)
                    self.assert_nothing_held(name)
                    done = {bool(part) for part in parts(name)}
                    self.assertLess(len(done), 2, f"the verb is done by halves ({name})")
                    outcomes |= done
                if calls() < number:
                    break
            self.assertTrue(all(parts(name)), "the verb has returned and is not done")
            self.assertEqual(outcomes, {False, True} if parts(name) else set())
            self.assertGreater(len(kept), 10, "the verb was hardly interrupted")
            self.assertEqual(self.second.check(), [])

    def assert_nothing_held(self, when: str) -> None:
        """Fail unless no snapshot is open and both handles can write and see the other's write."""
        ((busy, *_),) = self.checkpoint()
        self.assertEqual(busy, 0, f"a lock or a snapshot is held ({when})")
        handles = (self.mine, self.theirs)
        for count, (writer, reader) in enumerate((handles, handles[::-1])):
            tally = Tally(name=f"after {when}", count=count)
            writer.put(tally)
            self.assertEqual(reader.get(tally.name), tally, "a later write is lost or not seen")

    def test_an_interrupted_write_is_done_whole_or_not_at_all(self) -> None:
        db, second = self.db, self.second
        completed = {"status": TaskStatus.COMPLETED, "claimed_at": 0}
        said = [TranscriptEntry(role="user", content="hello")]

        def nothing(_: str) -> None:
            pass

        def store(task_id: str) -> None:
            store_tasks(db, task_id)

        def append(session_id: str) -> None:
            db.append_transcript(session_id, "user", "hello")

        def session_parts(session_id: str) -> tuple[object, ...]:
            return second.get_session(session_id), second.transcript(session_id)

        def move(task_id: str) -> None:
            db.update_task_status(task_id, "in_progress")

        def move_parts(task_id: str) -> tuple[object, ...]:
            task = second.get_task(task_id)
            return task.status == "in_progress", len(task.history) == 2

        def completion_parts(task_id: str) -> tuple[object, ...]:
            return second.get_task(task_id).status == "completed", second.get_proof(task_id)

        cases: dict[str, tuple[Callable[[str], Any], ...]] = {
            "put": (
                nothing,
                lambda n: self.mine.put(Tally(name=n)),
                lambda n: (self.theirs.get(n),),
            ),
            "store_task": (nothing, store, lambda t: (second.get_task(t),)),
            "delete_task": (store, db.delete_task, lambda t: (not second.get_task(t),)),
            "update_task_status": (store, move, move_parts),
            "complete_task": (store, lambda t: db.complete_task(t, proof(t)), completion_parts),
            "append_transcript": (nothing, append, session_parts),
            "store_session": (
                nothing,
                lambda s: db.store_session(SessionState(session_id=s, transcript=said)),
                session_parts,
            ),
            "delete_session": (append, db.delete_session, lambda s: (not second.get_session(s),)),
            "prune": (
                lambda _: store_tasks(db, "old", **completed),
                lambda _: db.prune(session_days=None),
                lambda _: (not second.get_task("old"),),
            ),
        }
        for label, (prepare, verb, parts) in cases.items():
            self.sweep(label, verb, prepare=prepare, parts=parts)

    def test_an_interrupted_block_is_committed_whole_or_undone_at_once(self) -> None:
        db, entered = self.db, []

        def both(name: str) -> tuple[object, ...]:
            return self.second.get_task(f"{name} a"), self.second.get_task(f"{name} b")

        def plain(name: str) -> None:
            with db.transaction():
                store_tasks(db, f"{name} a", f"{name} b")

        def nested(name: str) -> None:
            with db.transaction():
                store_tasks(db, f"{name} a")
                with db.transaction():
                    store_tasks(db, f"{name} b")

        def in_a_variable(name: str) -> None:
            block = db.transaction()
            with block:
                entered.append(block)
                store_tasks(db, f"{name} a", f"{name} b")

        for verb in (plain, nested, in_a_variable):
            self.sweep(verb.__name__, verb, parts=both)
        for block in entered:
            with self.assertRaises(ConflictError), block:
                self.fail("a block was entered twice")

    def test_a_block_that_survives_an_interrupt_has_all_of_its_inner_block_or_nothing(self) -> None:
        db, kept = self.db, []
        for number in itertools.count(1):
            outer = [f"{number} before", f"{number} later"]
            inner = [f"{number} inner", f"{number} inner too"]
            inner_ended = False
            with suppress(ConflictError), db.transaction():
                store_tasks(db, outer[0])
                try:
                    with interrupt_at_call(number) as calls:
                        with db.transaction():
                            store_tasks(db, *inner)
                        inner_ended = True
                except KeyboardInterrupt as error:
                    kept.append(error)
                store_tasks(db, outer[1])
            found = [name for name in outer + inner if self.second.get_task(name)]
            allowed = [outer + inner] if inner_ended else [[], outer, outer + inner]
            self.assertIn(found, allowed, f"interrupted at call {number}")
            self.assert_nothing_held(f"call {number}")
            if calls() < number:
                break
        self.assertGreater(len(kept), 50)
        self.assertEqual(db.check(), [])

    def test_an_interrupted_read_holds_no_snapshot_and_no_connection(self) -> None:
        store_tasks(self.db, "t")
        self.db.store_proof(proof("t"))
        self.db.append_transcript("s", "user", "hello")
        self.db.append_command("s", "status")
        verbs: dict[str, Callable[[OperatorDb], object]] = {
            "get_task": lambda db: db.get_task("t"),
            "get_session": lambda db: db.get_session("s"),
            "list_tasks": OperatorDb.list_tasks,
            "list_sessions": OperatorDb.list_sessions,
            "list_proofs": OperatorDb.list_proofs,
            "iter_tasks": lambda db: list(db.iter_tasks()),
            "a dry prune": lambda db: db.prune(dry_run=True).tasks,
        }
        before = len(self.opened)
        for label, verb in verbs.items():
            self.sweep(label, lambda _, verb=verb: verb(self.db))
            self.assertEqual(verb(self.db), verb(self.second))
        self.assertEqual(len(self.opened), before, "an interrupted read kept its connection")

    def test_an_interrupted_opening_or_closing_leaves_no_descriptor(self) -> None:
        def use() -> None:
            with OperatorDb(self.other, durable=False) as db:
                db.get_task("t")

        use()
        for number in itertools.count(1):
            with suppress(KeyboardInterrupt), interrupt_at_call(number) as calls:
                use()
            if calls() < number:
                break
        self.assertGreater(number, 100)
        self.opened.clear()
        gc.collect()
        self.assertEqual(open_descriptors(self.other), 0)
        self.assert_sound(self.other)

    def test_an_interrupt_while_connections_are_opened_anew_loses_nothing(self) -> None:
        def close_connections(_: str) -> None:
            in_child(int)  # a fork closes them, and the last one takes the log with it

        for verb in (self.db.delete_task, self.db.get_task):
            self.sweep(verb.__name__, verb, prepare=close_connections)

    def test_an_interrupted_fork_leaves_the_parent_able_to_work(self) -> None:
        def write(task_id: str) -> bool:
            """Store a task in the child, unless the database refuses every call there."""
            with suppress(ClosedError):
                store_tasks(self.db, task_id)
                return True
            return False

        def work() -> None:
            with interrupt_at_call(-1) as calls:
                in_child(int)
            self.assertGreater(calls(), 10)
            for number in range(1, calls() + 1):
                name = f"call {number}"
                self.assert_nothing_held(name)
                with suppress(KeyboardInterrupt), interrupt_at_call(number):
                    stored = in_child(partial(write, name))
                    self.assertEqual(self.second.get_task(name) is not None, stored)
            self.assert_nothing_held("at last")
            with OperatorDb(self.other, timeout=2) as another:
                store_tasks(another, "t")

        in_child(work)
        self.assert_sound()

    def test_interrupts_at_random_moments_leave_blocks_whole_and_descriptors_closed(self) -> None:
        def work() -> int:
            names = map(str, itertools.count())
            with OperatorDb(self.other, durable=False, timeout=5) as db:

                def store_both() -> None:
                    name = next(names)
                    with db.transaction():
                        store_tasks(db, name)
                        with db.transaction():
                            db.append_command("s", name)
                    db.update_task_status(name, "in_progress")

                struck = interrupt_at_random(store_both, 0.0015, 200)
                store_both()
                self.assertEqual({*task_ids(db)}, {*db.get_session("s").command_history})
                self.assertEqual(db.check(), [])
            self.assertEqual(open_descriptors(self.other), 0)
            return struck

        self.assertGreater(in_child(work), 20)

    def test_a_wait_for_another_writer_is_interrupted_at_once(self) -> None:
        patient = self.open(timeout=15)

        def seconds() -> float:
            began = time.monotonic()
            struck = interrupt_at_random(partial(store_tasks, patient, "t"), 0.05, 3)
            self.assertEqual(struck, 3)
            return time.monotonic() - began

        def seconds_beside_a_thread() -> float:
            with open_block(patient, "held by a thread"):
                return seconds()

        holder = holding_the_lock(self.path, "held by a process")
        self.assertLess(in_child(seconds), 2)
        os.kill(holder.pid, signal.SIGUSR1)
        holder.result()
        self.assertLess(in_child(seconds_beside_a_thread), 2)
        self.assertEqual(task_ids(self.db), ["held by a process", "held by a thread"])
        self.assert_nothing_held("at last")

    def test_a_signal_handler_may_read_at_every_call_of_what_it_interrupts(self) -> None:
        db = self.db
        store_tasks(db, "t", description="as stored")
        db.append_transcript("s", "user", "hello")
        found: list[str | None] = []

        def handle(frame: Any, event: str, _: object) -> None:
            if event in ("call", "c_return") and frame.f_code.co_filename == operator_db.__file__:
                found.append(db.get_task("t").description)

        def write() -> None:
            with db.transaction():
                store_tasks(db, "of a block")
                with db.transaction():
                    db.append_transcript("s", "user", "hello again")

        def walk() -> None:
            self.assertEqual([task.task_id for task in db.iter_tasks()], ["of a block", "t"])

        for verb in (partial(db.get_task, "t"), partial(db.get_session, "s"), write, walk):
            found.clear()
            sys.setprofile(handle)
            try:
                verb()
            finally:
                sys.setprofile(None)
            self.assertGreater(len(found), 20)
            self.assertEqual({*found}, {"as stored"})
        self.assertEqual(len(self.second.transcript("s")), 2)
        self.assert_nothing_held("at last")

    def test_a_signal_handler_may_read_while_its_thread_waits_for_a_lock(self) -> None:
        db = self.open(timeout=15)
        holder = holding_the_lock(self.path, "held")
        found: list[TaskRecord | None] = []

        def handle(*_: object) -> None:
            found.append(db.get_task("held"))
            os.kill(holder.pid, signal.SIGUSR1)

        def wait() -> None:
            signal.signal(signal.SIGALRM, handle)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            store_tasks(db, "t")
            self.assertEqual(found, [None])

        in_child(wait)
        holder.result()
        self.assertEqual(task_ids(db), ["held", "t"])


class SecretsAreNotShown(DatabaseTest):
    """Files are private from their first byte; what is secret is masked wherever it is shown."""

    def setUp(self) -> None:
        super().setUp()
        handler = logging.StreamHandler(StringIO())
        logger = logging.getLogger("operator_db")
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(lambda: self.assertNotIn(SECRET, handler.stream.getvalue()))

    def test_every_file_is_private_at_every_moment_whatever_the_umask(self) -> None:
        def rights_of_others(umask: int) -> dict[str, int]:
            """Return all that others could ever do with each file and folder that is made."""
            os.umask(umask)
            top = self.beside(f"umask {umask:03o}")
            path = os.path.join(top, "below", "operator.db")
            rights = Counter[str]()

            def look(frame: Any, *_: object) -> None:
                if frame.f_code.co_filename == operator_db.__file__:
                    for folder, _, names in os.walk(top):
                        for name in (folder, *(os.path.join(folder, each) for each in names)):
                            with suppress(FileNotFoundError):
                                rights[name] |= os.stat(name).st_mode & 0o077

            sys.setprofile(look)
            with OperatorDb(path) as db:
                store_tasks(db, "t")
                db.backup(path + ".copy")
                db.export(path + ".jsonl")
            sys.setprofile(None)
            return dict(rights)

        for umask in (0o000, 0o077):
            with self.subTest(umask=umask):
                rights = in_child(partial(rights_of_others, umask))
                ends = {name[-4:] for name in rights}
                self.assertLessEqual({"r.db", "-wal", "-shm", ".new", "copy", "sonl"}, ends)
                self.assertEqual({name: mode for name, mode in rights.items() if mode}, {})

    def test_a_file_that_others_could_read_is_made_private_and_that_is_logged(self) -> None:
        OperatorDb(self.path).close()
        os.chmod(self.path, 0o644)
        with self.assertLogs("operator_db", logging.WARNING) as logs, OperatorDb(self.path):
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        self.assertIn(self.path, logs.output[0])

    def test_a_replaced_keypair_is_in_no_file_after_close(self) -> None:
        with OperatorDb(self.path) as db:
            for secret in (SECRET, "the one that replaces it"):
                keypairs = {"main": secret, "more than a page": secret * 3000}
                db.store_config(OperatorConfig(keypairs=keypairs))
                store_tasks(db, "between")
        files = {name: read_bytes(self.beside(name)) for name in os.listdir(self.folder)}
        self.assertIn(b"the one that replaces it", files["operator.db"])
        self.assertEqual([name for name in files if SECRET.encode() in files[name]], [])

    def test_a_repr_masks_every_secret(self) -> None:
        db = self.open()
        store_secrets(db)
        wallet = wallets_of(db).get("me")
        for record in (db.get_config(), tallies_of(db).get("two"), wallet, wallet.tallies):
            with self.subTest(type(record).__name__):
                self.assertNotIn(SECRET, repr(record))
                self.assertIn("***", repr(record))
        self.assertEqual((db.get_config().keypairs["main"], wallet.tallies[0].pin), (SECRET,) * 2)

    def test_no_error_about_a_record_shows_a_secret(self) -> None:
        db = self.open()
        tallies, wallets = tallies_of(db), wallets_of(db)
        tally = Tally(name="in", pin=SECRET)

        def make(field_name: str, value: Any) -> None:
            OperatorConfig(**{field_name: value})

        def store(field_name: str, value: Any) -> None:
            config = OperatorConfig()
            setattr(config, field_name, value)
            db.store_config(config)

        def put_pin(value: Any) -> None:
            tallies.put(Tally(name="n", pin=value))

        def put_wallet(owner: Any, *within: Any) -> None:
            wallets.put(Wallet(owner=owner, tallies=[*within]))

        wrong = ({"a": [SECRET]}, {"a": SECRET.encode()}, {SECRET: 1}, [[SECRET]], SECRET.encode())
        for name, values in {
            "keypairs": (*wrong, [SECRET], SECRET),
            "rpc_endpoints": (*wrong, SECRET),
        }.items():
            for value in values:
                with self.subTest(name, value=value):
                    self.assert_refused(InvalidRecordError, partial(make, name, value), name)
                    self.assert_refused(InvalidRecordError, partial(store, name, value), name)
        for value in (*wrong, [SECRET]):
            with self.subTest("pin", value=value):
                self.assert_refused(InvalidRecordError, partial(put_pin, value), "Tally.pin")
        for word, put in (
            ("tallies", partial(put_wallet, "o", tally, 1)),
            ("tallies", partial(put_wallet, "o", Tally(name=1, pin=SECRET))),
            ("id", partial(put_wallet, "", tally)),
            ("owner", partial(put_wallet, [tally])),
        ):
            with self.subTest(put=put):
                self.assert_refused(InvalidRecordError, put, word)

    def test_no_error_about_a_damaged_document_shows_a_secret(self) -> None:
        db = self.open()
        store_secrets(db)
        for value in (
            f'{{"keypairs":{{"main":"{SECRET}"}}',
            f'{{"keypairs":["{SECRET}"]}}',
            f'["{SECRET}"]',
        ):
            with self.subTest(value):
                self.sql("UPDATE config SET value = ?, crc = ?", value, crc32(value.encode()))
                error = self.assert_refused(DamagedError, db.get_config, "config:operator")
                self.assertTrue(error.__suppress_context__, "a parser's error holds the document")
                (problem,) = db.check()
                self.assertIn("config:operator", problem)
                self.assertNotIn(SECRET, problem)

    def test_no_error_about_a_record_of_another_class_shows_a_secret(self) -> None:
        Loose = dataclasses.make_dataclass("Tally", [("name", str), ("pin", Any)], kw_only=True)
        with OperatorDb(self.path) as db:
            loose = db.namespace("tallies", Loose, key="name")
            loose.put(Loose(name="two", pin=[SECRET]))
        tallies = tallies_of(self.open())
        self.assert_refused(DamagedError, lambda: tallies.get("two"), "tallies:two", "pin")


class OpeningFindsOrCreatesTheFile(DatabaseTest):
    def test_the_path_is_the_argument_then_the_environment_then_the_home_directory(self) -> None:
        with OperatorDb() as db:
            self.assertEqual(db.path, self.beside(".agenc/operator.db"))
        with mock.patch.dict(os.environ, AGENC_DB_PATH="~/env.db"):
            with OperatorDb.open() as db:
                self.assertEqual(db.path, self.beside("env.db"))
            with OperatorDb(Path("~/deep/er/arg.db"), timeout=1) as db:
                self.assertEqual(db.path, self.beside("deep/er/arg.db"))

    def test_a_wrong_path_or_timeout_is_refused_and_nothing_is_created(self) -> None:
        paths = ("", "a\0b", "\ud800", 5, 3.5, [], True)
        timeouts = (-1, True, float("nan"), float("inf"), "1")
        wrong = [{"path": path} for path in paths] + [{"timeout": each} for each in timeouts]
        for options in wrong:
            with self.subTest(**options):
                action = partial(OperatorDb, **{"path": self.path, **options})
                self.assert_refused(InvalidRecordError, action)
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_path_with_the_characters_of_a_uri_is_a_path(self) -> None:
        for name in ("a?mode=memory.db", "b#c.db", "d%41.db", "é \U0001f600.db", "e&f=g.db"):
            with self.subTest(name):
                store_tasks(self.open(self.beside(name)), "t")
                self.assertTrue(os.path.exists(self.beside(name)))

    def test_a_symbolic_link_opens_the_file_that_it_leads_to(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, "t")
        os.symlink(self.path, self.other)
        db = self.open(self.other)
        self.assertEqual((db.path, task_ids(db)), (self.path, ["t"]))

    def test_a_memory_database_is_a_private_file_that_is_gone_after_close(self) -> None:
        closed, dropped = OperatorDb(":memory:"), OperatorDb(":memory:")
        folders = [os.path.dirname(db.path) for db in (closed, dropped)]
        store_tasks(closed, "t")
        run_in_threads(lambda: self.assertEqual(task_ids(closed), ["t"]))
        self.assertEqual(task_ids(dropped), [])
        for folder in folders:
            self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700)
        closed.close()
        del dropped
        self.assertEqual([os.path.exists(folder) for folder in folders], [False, False])

    def test_many_threads_and_processes_create_one_file_and_all_succeed(self) -> None:
        gate, go = os.pipe()
        self.addCleanup(os.close, gate)
        self.addCleanup(os.close, go)
        for attempt in range(3):
            path = self.beside(f"{attempt}/operator.db")

            def create(_: Say, path: str = path) -> None:
                os.read(gate, 1)
                with OperatorDb(path) as db:
                    db.append_command("s", "x")

            children = [Child(create) for _ in range(4)]
            with ThreadPoolExecutor(12) as pool:
                os.write(go, b"go!!")  # a byte for each child
                handles = [*pool.map(OperatorDb, [path] * 12)]
                for handle in handles:
                    pool.submit(handle.append_command, "s", "x")
            for child in children:
                child.result()
            self.assertEqual(handles[0].get_session("s").command_history, ["x"] * 16)
            for handle in handles:
                handle.close()
            self.assertEqual(os.listdir(os.path.dirname(path)), ["operator.db"])

    def test_a_file_system_without_hard_links_will_do(self) -> None:
        def create() -> None:
            with mock.patch("os.link", side_effect=OSError(errno.EPERM, "no hard links")):
                store_tasks(OperatorDb(self.path), "t")

        in_child(create)
        self.assertEqual(task_ids(self.open()), ["t"])

    def test_an_empty_file_is_adopted(self) -> None:
        write_bytes(self.path, b"")
        for path in (self.path, self.other):
            with OperatorDb(path) as db:
                store_tasks(db, "t")
        pragmas = ("application_id", "user_version", "auto_vacuum", "journal_mode")
        adopted, new = (
            [self.sql(f"PRAGMA {pragma}", path=path)[0][0] for pragma in pragmas]
            for path in (self.path, self.other)
        )
        self.assertEqual(adopted, new)
        self.assertEqual((adopted[0], adopted[2]), (0x41474E43, 2), "AGNC, incremental")

    def test_files_and_directories_are_private_whatever_the_umask(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        for umask in (0, 0o077, 0o777):
            with self.subTest(umask=oct(umask)):
                folder = self.beside(f"{umask}")
                path = os.path.join(folder, "operator.db")
                if umask == 0o777:  # under which a new directory cannot be entered
                    os.mkdir(folder, 0o700)
                    os.chmod(folder, 0o700)
                os.umask(umask)
                with OperatorDb(path) as db:
                    store_tasks(db, "t")
                    modes = [os.stat(path + end).st_mode for end in ("", "-wal", "-shm")]
                os.umask(0)
                self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700)
                self.assertEqual([stat.S_IMODE(mode) for mode in modes], [0o600] * 3)

    def test_a_file_that_others_can_read_is_made_private_with_a_log_line(self) -> None:
        OperatorDb(self.path).close()
        os.chmod(self.path, 0o644)
        with self.assertLogs("operator_db", "WARNING") as logs:
            OperatorDb(self.path).close()
        self.assertIn(self.path, logs.output[0])
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        with self.assertNoLogs("operator_db", "WARNING"):
            OperatorDb(self.path).close()


class ForeignFilesAreLeftAlone(DatabaseTest):
    def assert_left_alone(self, error: type[OperatorDbError], *words: str) -> None:
        """Fail unless the file is refused, for writing and for reading, and no byte changes."""
        for read_only in (False, True):
            with self.assert_bytes_unchanged():
                action = partial(OperatorDb, self.path, read_only=read_only)
                raised = self.assert_refused(error, action, self.path, *words)
            self.assertIsNone(raised.__cause__)

    def test_a_crafted_file_is_refused_and_no_byte_of_it_changed(self) -> None:
        foreign, newer = ForeignFileError, NewerSchemaError
        view = "CREATE VIEW planted AS SELECT value FROM CONFIG"
        trigger = "CREATE TRIGGER planted AFTER INSERT ON {} BEGIN DELETE FROM {}; END"
        moved = "DROP INDEX tasks_status_at; CREATE INDEX tasks_status_at ON proofs(at)"
        columns = "DROP TABLE config; CREATE TABLE config(key, value)"
        replaced = "DROP TABLE proofs; CREATE VIEW proofs AS SELECT 1"
        renamed = "ALTER TABLE tasks RENAME TO t; ALTER TABLE t RENAME TO Tasks"
        # bytes are the whole file; text is what another program executes on a database of ours
        cases: tuple[tuple[str, bytes | str, type[OperatorDbError], str], ...] = (
            ("the prototype's file", b"redb\x1a\n\xa9\r\n" + bytes(5000), foreign, "redb"),
            ("another SQLite", b"SQLite format 2\0" + bytes(5000), foreign, "SQLite"),
            ("plain text", b"plain text " * 500, foreign, "SQLite"),
            ("a byte, which SQLite would overwrite", b"\0", foreign, ""),
            ("less than a header", b"x" * 511, foreign, "511"),
            ("another application's id", "PRAGMA application_id = 7", foreign, ""),
            ("no application id", "PRAGMA application_id = 0", foreign, ""),
            ("no schema version", "PRAGMA user_version = 0", foreign, ""),
            ("a newer schema", "PRAGMA user_version = 99", newer, "99"),
            ("a trigger on our table", trigger.format("tasks", "proofs"), foreign, "planted"),
            ("on an operator's table", trigger.format("tallies", "proofs"), foreign, "planted"),
            ("on another's table", trigger.format("notes", "Proofs"), foreign, "planted"),
            ("a view of our table", view, foreign, "planted"),
            ("a further index", "CREATE INDEX planted ON tasks(at)", foreign, "planted"),
            ("a unique index", "CREATE UNIQUE INDEX planted ON tasks(at)", foreign, "planted"),
            ("an index on another table", moved, foreign, "tasks"),
            ("an index too few", "DROP INDEX tasks_status_at", foreign, "tasks"),
            ("a further column", "ALTER TABLE tasks ADD COLUMN extra", foreign, "tasks"),
            ("other columns", columns, foreign, "config"),
            ("a table in capitals", renamed, foreign, ""),
            ("a view in a table's place", replaced, foreign, "proofs"),
            ("a table too few", "DROP TABLE proofs", foreign, "proofs"),
        )
        fill(self.path)
        self.sql("CREATE TABLE notes(x)")
        self.assert_sound()
        ours = read_bytes(self.path)
        for label, crafted, error, word in cases:
            with self.subTest(label):
                if isinstance(crafted, bytes):
                    write_bytes(self.path, crafted)
                else:
                    write_bytes(self.path, ours)
                    self.script(crafted)
                self.assert_left_alone(error, word)

    def test_what_is_no_regular_file_is_refused(self) -> None:
        for make, remove in ((os.mkdir, os.rmdir), (os.mkfifo, os.unlink)):
            with self.subTest(make.__name__):
                make(self.path)
                self.assert_left_alone(ForeignFileError)
                remove(self.path)

    def test_the_database_of_another_application_keeps_even_its_write_ahead_log(self) -> None:
        marks = ("PRAGMA application_id = 7", "PRAGMA user_version = 3", "CREATE TABLE notes(x)")
        for mark in marks:

            def use(say: Say, mark: str = mark) -> None:
                other = sqlite3.connect(self.path, isolation_level=None)
                other.execute("PRAGMA journal_mode = WAL")
                other.execute(mark)
                say("in the log")
                signal.pause()

            application = Child(use)
            application.line()
            with self.subTest(mark, state="in use"):
                self.assert_left_alone(ForeignFileError)
            application.kill()
            with self.subTest(mark, state="left by a killed process"):
                self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
                self.assert_left_alone(ForeignFileError)
            self.sql("SELECT * FROM sqlite_schema")  # SQLite moves the log into the file
            with self.subTest(mark, state="closed"):
                self.assertEqual(os.listdir(self.folder), ["operator.db"])
                self.assert_left_alone(ForeignFileError)
            os.unlink(self.path)

    def test_a_write_ahead_log_without_its_database_is_kept_and_named(self) -> None:
        write_bytes(self.path + "-wal", b"the only copy of the last commits")
        with self.assert_bytes_unchanged():
            self.assert_refused(StorageError, lambda: OperatorDb(self.path), self.path + "-wal")

    def test_tables_that_are_not_ours_are_left_alone(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, "t", status=TaskStatus.COMPLETED, claimed_at=5)
        self.script(
            "CREATE TABLE _litestream_seq(id INTEGER PRIMARY KEY, seq INTEGER);"
            "INSERT INTO _litestream_seq VALUES(1, 5);"
            "CREATE TABLE tallies(x); INSERT INTO tallies VALUES(6)"
        )
        db = self.open()
        self.assertEqual((db.check(), db.prune().tasks), ([], 1))
        self.assert_refused(ForeignFileError, lambda: tallies_of(db), "tallies")
        db.compact()
        self.assertEqual(self.sql("SELECT seq, x FROM _litestream_seq, tallies"), [(5, 6)])

    def test_a_schema_of_8_000_views_opens_and_answers_in_time(self) -> None:
        fill(self.path)
        self.script(
            "PRAGMA writable_schema = ON; WITH RECURSIVE numbers(n) AS"
            " (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 8000)"
            " INSERT INTO sqlite_schema SELECT 'view', 'other_' || n, 'other_' || n, 0,"
            " 'CREATE VIEW other_' || n || ' AS SELECT 1' FROM numbers"
        )
        began = time.monotonic()
        with OperatorDb(self.path) as db:
            self.assertEqual(len(db.list_tasks()), 40)
        # SQLite parses the schema anew for each connection, and nothing else takes long
        self.assertLess(time.monotonic() - began, 5)


class ReadOnlyChangesNothing(DatabaseTest):
    def assert_reads_and_refuses_to_write(self) -> None:
        """Fail unless each read answers, each write is refused, and no byte changes by either."""
        reads: dict[str, Verb] = {
            "get": lambda db: db.get_task("t1"),
            "list": lambda db: db.list_tasks_by_status("completed"),
            "walk": lambda db: list(db.iter_tasks()),
            "session": lambda db: db.get_session("s0"),
            "dispute": lambda db: db.dispute_bundle("t1"),
            "export": exported,
            "namespace": lambda db: tallies_of(db).get("one"),
            "stats": lambda db: db.prometheus(),
            "dry run": lambda db: db.prune(0, 0, 0, dry_run=True).tasks,
        }
        writes: dict[str, Verb] = {
            "store": lambda db: store_tasks(db, "new"),
            "update": lambda db: db.update_task_status("t0", "in_progress"),
            "complete": lambda db: db.complete_task("t0", proof("t0")),
            "delete": lambda db: db.delete_task("t1"),
            "append": lambda db: db.append_transcript("s0", "user", "more"),
            "config": lambda db: db.store_config(OperatorConfig()),
            "proof": lambda db: db.store_proof(proof("new")),
            "put": lambda db: tallies_of(db).put(Tally(name="two")),
            "namespace": devices_of,
            "prune": lambda db: db.prune(0, 0, 0),
            "block": lambda db: db.transaction().__enter__(),
            "import": lambda db: db.import_(self.file),
            "restore": lambda db: db.restore(self.other),
            "compact": lambda db: db.compact(),
        }
        with self.assert_bytes_unchanged(), OperatorDb(self.path, read_only=True) as db:
            for label, read in reads.items():
                with self.subTest(read=label):
                    self.assertTrue(read(db))
            self.assertEqual(db.check(), [])
            for label, write in writes.items():
                with self.subTest(write=label):
                    self.assert_refused(StorageError, partial(write, db), self.path)

    def test_a_read_only_database_reads_and_changes_no_byte(self) -> None:
        def write(say: Say) -> None:
            db = OperatorDb(self.path)
            store_tasks(db, "in the log", status=TaskStatus.COMPLETED, claimed_at=0)
            say("stored")
            signal.pause()

        fill(self.path)
        with OperatorDb(self.path) as db:
            db.backup(self.other)
            db.export(self.file, include_secrets=True)
        with self.subTest("closed"):
            self.assert_reads_and_refuses_to_write()
        writer = Child(write)
        writer.line()
        with self.subTest("open in another process"):
            self.assert_reads_and_refuses_to_write()
        writer.kill()
        with self.subTest("left by a killed process"):
            self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
            self.assert_reads_and_refuses_to_write()

    def test_a_read_only_opening_creates_nothing(self) -> None:
        for path in (self.path, self.beside("no/such/operator.db")):
            self.assert_refused(StorageError, partial(OperatorDb, path, read_only=True), path)
        self.assertEqual(os.listdir(self.folder), [])
        write_bytes(self.path, b"")
        with self.assert_bytes_unchanged():
            opening = partial(OperatorDb, self.path, read_only=True)
            self.assert_refused(StorageError, opening, self.path)

    def test_a_reader_sees_what_a_running_operator_commits(self) -> None:
        writer, reader = self.open(), self.open(read_only=True)
        for number in range(3):
            store_tasks(writer, str(number))
            self.assertEqual(len(task_ids(reader)), number + 1)
        reader.close()
        store_tasks(writer, "after")
        self.assertEqual(writer.check(), [])

    def assert_later_writes_are_seen(self, mode: int, folder_mode: int, is_open: bool) -> None:
        """Fail unless one who may not write there reads what another user writes meanwhile."""

        def read(say: Say) -> list[object]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            os.chmod(self.path, mode)
            os.chmod(self.folder, folder_mode)
            with OperatorDb(self.path, read_only=True) as reader:
                before = len(reader.list_tasks())
                say(os.getpid())
                signal.sigwait({signal.SIGUSR1})
                return [before, {task.task_id[:3] for task in reader.list_tasks()}, reader.check()]

        reader = Child(lambda say: as_nobody(self.folder, partial(read, say)))
        try:
            pid = int(reader.line())
        finally:
            os.chmod(self.folder, 0o700)
            os.chmod(self.path, 0o600)
        with OperatorDb(self.path, durable=False) as db:
            for n in range(50):
                db.delete_task(f"old{n}")
            store_tasks(db, *(f"new{n}" for n in range(50)), payload=bytes(9000))
            if not is_open:
                db.close()
            os.kill(pid, signal.SIGUSR1)
            self.assertEqual(reader.result(), [50, {"new"}, []])

    def test_a_reader_who_may_not_write_sees_what_another_user_writes_later(self) -> None:
        modes = {"file": (0o400, 0o700), "directory": (0o600, 0o500), "both": (0o400, 0o500)}
        for label, is_open in itertools.product(modes, (False, True)):
            with self.subTest(may_not_write=label, is_open=is_open):
                with OperatorDb(self.path, durable=False) as db:
                    store_tasks(db, *(f"old{n}" for n in range(50)), payload=bytes(5000))
                self.assert_later_writes_are_seen(*modes[label], is_open)
                os.unlink(self.path)


class MigrationsAreAllOrNothing(DatabaseTest):
    """A newer module, one step ahead of today's, meets a file that today's module has made."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.path, tasks=8)
        self.image, self.before = read_bytes(self.path), self.state()
        self.snapshot = f"{self.path}.v{self.before[0]}.bak"
        self.migrate()
        self.after = self.state()
        self.put_back()

    def put_back(self) -> None:
        """Make the file what it was before any migration."""
        for name in os.listdir(self.folder):
            os.unlink(self.beside(name))
        write_bytes(self.path, self.image)

    @contextmanager
    def newer_module(self, *steps: Callable[[Any], None]) -> Iterator[None]:
        """Let the module know further steps, as the README tells its maintainers to add them."""
        known = operator_db._MIGRATIONS
        with mock.patch.object(operator_db, "_MIGRATIONS", (*known, *steps)):
            yield

    @staticmethod
    def step(connection: Any) -> None:
        """Add a table, remove a record, and write a lot."""
        connection.query("CREATE TABLE added(x)")
        connection.query("DELETE FROM config")
        connection.query("INSERT INTO added SELECT randomblob(600000)")

    def migrate(self) -> None:
        with self.newer_module(self.step):
            OperatorDb(self.path).close()

    def state(self, path: str | None = None) -> tuple[int, list[Any], list[Any]]:
        """Return the schema version, the tables and the records, as another program sees them."""
        self.assertEqual(self.sql("PRAGMA integrity_check", path=path), [("ok",)])
        ((version,),) = self.sql("PRAGMA user_version", path=path)
        names = [name for (name,) in self.sql("SELECT name FROM sqlite_schema", path=path)]
        records: list[Any] = []
        for table in ("tasks", "sessions", "session_log", "proofs", "config", "tallies"):
            records += self.sql(f"SELECT key, value, crc FROM {table}", path=path)
        return version, names, records

    def judge(self, acknowledged: bool) -> bool:
        """Return whether the migration is done; fail if half of it is, or it cannot be done now."""
        found = self.state()
        self.assertIn(found, [self.after] if acknowledged else [self.before, self.after])
        self.migrate()
        self.assertEqual(self.state(), self.after)
        self.assertEqual(self.sql("SELECT count(*) FROM added"), [(1,)])
        self.assertEqual(self.state(self.snapshot), self.before)
        self.put_back()
        return found == self.after

    def test_the_missing_steps_run_after_a_private_snapshot(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        with self.newer_module(self.step), OperatorDb(self.path) as db:
            self.assertEqual(len(task_ids(db)), 8)
        self.assertEqual(self.names(), {"operator.db", os.path.basename(self.snapshot)})
        self.assertEqual(self.state()[0], self.before[0] + 1)
        self.assertEqual(self.state(self.snapshot), self.before)
        for path in (self.path, self.snapshot):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        os.unlink(self.snapshot)
        self.migrate()
        self.assertFalse(os.path.exists(self.snapshot), "there was nothing to migrate")
        self.assert_refused(NewerSchemaError, lambda: OperatorDb(self.path), self.path)

    def test_a_migration_that_is_killed_is_done_or_not_begun(self) -> None:
        def migrate(say: Say, fatal: int) -> int:
            def listener(_: str) -> None:
                if next(statements) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            statements = itertools.count(1)
            self.watch_connections(listener=listener)
            say("begin")
            self.migrate()
            say("done")
            return next(statements)

        began, rng, outcomes = time.monotonic(), random.Random(5), Counter[bool]()
        total = Child(partial(migrate, fatal=-1)).result()
        seconds = time.monotonic() - began
        self.put_back()
        for fatal in (*range(1, total, max(1, total // 20)), *[0] * 8):
            with self.subTest(statement=fatal):
                child = Child(partial(migrate, fatal=fatal))
                child.line()
                if fatal:  # before this statement
                    self.assertEqual(child.lines.read(), "", "it was not killed")
                    child.reap()
                    outcomes[self.judge(acknowledged=False)] += 1
                else:  # at any moment, in the midst of a statement too
                    said = child.kill(after=rng.uniform(0, seconds))
                    outcomes[self.judge(acknowledged="done" in said)] += 1
        self.assertEqual(len(outcomes), 2, "some were done, and some not begun")

    def test_a_migration_without_room_is_done_or_not_begun(self) -> None:
        def migrate(limit: int) -> str:
            try:
                with file_size_limit(limit):
                    self.migrate()
            except StorageError as error:
                return str(error)
            return ""

        size = len(self.image)
        for limit in (size // 2, size + 100_000, size + 600_000, size + 2_000_000):
            with self.subTest(limit=limit):
                refused = in_child(partial(migrate, limit))
                if limit < size + 1_000_000:
                    self.assertIn(self.path, refused)
                else:
                    self.assertEqual(refused, "")
                left = {name for name in self.names() if name.endswith((".new", "-journal"))}
                self.assertEqual(left, set())
                self.judge(acknowledged=not refused)

    def test_a_migration_that_is_interrupted_is_done_or_not_begun(self) -> None:
        def migrate(number: int) -> None:
            acknowledged = False
            with suppress(KeyboardInterrupt), interrupt_at_call(number):
                self.migrate()
                acknowledged = True
            self.judge(acknowledged)  # in the same process, where nothing may be locked

        with interrupt_at_call(-1) as so_far:
            self.migrate()
            total = so_far()
        self.put_back()
        rng = random.Random(5)
        for number in sorted(rng.sample(range(1, total), 10)):
            with self.subTest(number=number):
                in_child(partial(migrate, number))

    def test_a_step_that_fails_leaves_the_file_as_it_was(self) -> None:
        def raising(connection: Any) -> None:
            raise KeyError("half-way")

        def interrupted(connection: Any) -> None:
            raise KeyboardInterrupt

        def wrong(connection: Any) -> None:
            connection.query("INSERT INTO nowhere VALUES(1)")

        def planting(connection: Any) -> None:
            connection.query(
                "CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END"
            )

        for error, step in (
            (KeyError, raising),
            (KeyboardInterrupt, interrupted),
            (StorageError, wrong),
            (ForeignFileError, planting),
        ):
            with self.subTest(step.__name__):
                with self.newer_module(self.step, step), self.assertRaises(error):
                    OperatorDb(self.path)
                self.assertEqual(self.state(), self.before)
                self.assert_sound()
                self.judge(acknowledged=False)

    def test_a_planted_trigger_does_not_survive_in_a_newer_schema(self) -> None:
        self.script("CREATE TRIGGER planted AFTER DELETE ON config BEGIN DELETE FROM proofs; END")
        before = self.state()
        with self.newer_module(self.step):
            self.assert_refused(ForeignFileError, lambda: OperatorDb(self.path), self.path)
        self.assertEqual(self.state(), before)

    def test_of_several_processes_one_migrates_and_all_go_on(self) -> None:
        def migrate(say: Say) -> int:
            def slow_step(connection: Any) -> None:
                self.step(connection)
                signal.sigwait({signal.SIGUSR1})

            def listener(statement: str) -> None:
                if statement.startswith("BEGIN ") and not waits.is_set():
                    waits.set()
                    say("wants the lock")

            waits = threading.Event()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            self.watch_connections(listener=listener)
            with self.newer_module(slow_step), OperatorDb(self.path) as db:
                return len(task_ids(db))

        children = [Child(migrate) for _ in range(4)]
        for child in children:
            child.line()
        # one of them has the lock and stays in its step until it gets the signal
        for child in children:
            os.kill(child.pid, signal.SIGUSR1)
        self.assertEqual([child.result() for child in children], [8] * 4)
        self.judge(acknowledged=True)

    def test_a_module_that_had_the_file_open_before_cannot_write(self) -> None:
        def migrate(say: Say) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            say("ready")
            signal.sigwait({signal.SIGUSR1})
            self.migrate()

        newer = Child(migrate)
        newer.line()
        db = self.open()
        store_tasks(db, "before")
        os.kill(newer.pid, signal.SIGUSR1)
        newer.result()
        writes: dict[str, Verb] = {
            "store": lambda db: store_tasks(db, "t0", description="half understood"),
            "delete": lambda db: db.delete_task("t0"),
            "update": lambda db: db.update_task_status("t0", "in_progress"),
            "append": lambda db: db.append_transcript("s0", "user", "more"),
            "block": lambda db: db.transaction().__enter__(),
            "prune": lambda db: db.prune(0, 0, 0),
        }
        for label, write in writes.items():
            with self.subTest(label):
                self.assert_refused(NewerSchemaError, partial(write, db), self.path)
        db.close()
        self.assertEqual(self.sql("SELECT count(*) FROM tasks"), [(9,)])

    def test_a_read_only_opening_of_an_older_file_is_refused_and_changes_no_byte(self) -> None:
        opening = partial(OperatorDb, self.path, read_only=True)
        with self.assert_bytes_unchanged(), self.newer_module(self.step):
            self.assert_refused(StorageError, opening, self.path, str(self.before[0]))


class DamageIsFoundAndNamed(DatabaseTest):
    """What is read is what was stored, or DamagedError names it; check() finds it all."""

    def stored(self) -> dict[tuple[str, str], Any]:
        """Make a database with some of everything; return each record by namespace and id."""
        fill(self.path)
        with OperatorDb(self.path) as db:
            return dict(every_record(db))

    def assert_reads_are_right(self, db: OperatorDb, stored: dict[tuple[str, str], Any]) -> int:
        """Read every record in every way; return how many do not come back. None may differ."""
        get: dict[str, Callable[[str], Any]] = {
            "tasks": db.get_task,
            "proofs": db.get_proof,
            "sessions": db.get_session,
            "config": lambda _: db.get_config(),
        }
        lost = 0
        for (namespace, record_id), record in stored.items():
            if namespace in get:
                found = None  # a damaged index can hide a key from SQLite
                with suppress(DamagedError):
                    found = get[namespace](record_id)
                self.assertIn(found, (record, None))
                lost += found is None
        with suppress(DamagedError):
            for key, record in every_record(db):
                self.assertEqual(record, stored[key])
        for status in TaskStatus:
            with suppress(DamagedError):
                for task in db.list_tasks_by_status(status):
                    self.assertEqual(task, stored["tasks", task.task_id])
        return lost

    def plant(self, key: str, document: bytes) -> None:
        """Put a document into the row of a record, with the checksum that belongs to it."""
        table = key.partition(":")[0]
        statement = f"UPDATE {table} SET value = CAST(? AS TEXT), crc = ? WHERE key = ?"
        self.sql(statement, document, crc32(document), key)

    def flip(self, name: str, needle: bytes, offset: int, bit: int) -> None:
        """Change one bit of what an index says, in the closed file."""
        ((root,),) = self.sql("SELECT rootpage FROM sqlite_schema WHERE name = ?", name)
        ((page_size,),) = self.sql("PRAGMA page_size")
        image = bytearray(read_bytes(self.path))
        image[image.index(needle, (root - 1) * page_size) + offset] ^= bit
        write_bytes(self.path, image)

    # ---- rows that another program has written

    def assert_refused_by_key(
        self, db: OperatorDb, task: TaskRecord, damage: Callable[[], object]
    ) -> None:
        """Fail unless a damaged task is refused and reported by its key, and can be replaced."""
        key = f"tasks:{task.task_id}"
        damage()
        for read in (
            partial(db.get_task, task.task_id),
            lambda: list(db.iter_tasks()),
            db.list_tasks,
        ):
            self.assert_refused(DamagedError, read, key)
        self.damage("tasks:z")
        report = "\n".join(db.check())
        self.assertIn(key, report)
        self.assertIn("tasks:z", report, "check() goes on to the end")
        store_tasks(db, "z")
        db.store_task(task)
        self.assertEqual((db.check(), db.get_task(task.task_id)), ([], task))
        damage()
        self.assertTrue(db.delete_task(task.task_id))
        db.store_task(task)

    def test_a_row_of_another_program_is_refused_by_key_and_can_be_replaced(self) -> None:
        db = self.open()
        task = TaskRecord(task_id="a", status=TaskStatus.COMPLETED, claimed_at=5)
        db.store_task(task)
        store_tasks(db, "z")
        documents = (
            b"not JSON", b"", b"[]", b"{}", b"1e999", b"\xff", b"[" * 100_000,
            b'{"task_id":"b"}', b'{"task_id":"a"}', b'{"task_id":"a"}\xff',
            b'{"task_id":"a","reward_lamports":-1}', b'{"task_id":"a","payload":"***"}',
            b'{"task_id":"a","claimed_at":NaN}', b'{"task_id":"a","description":"\xed\xa0\x80"}',
        )  # fmt: skip
        columns = (
            "value = 'not JSON'", "value = x'00'", "value = 5", "crc = crc + 1", "crc = 'x'",
            "status = 'claimed'", "status = 'resolved'", "status = NULL", "status = x'00'",
            "status = x'ff'", "at = 6", "at = NULL", "at = 'x'", "at = x'05'",
        )  # fmt: skip
        for document in documents:
            with self.subTest(document=document[:60]):
                self.assert_refused_by_key(db, task, partial(self.plant, "tasks:a", document))
        for column in columns:
            with self.subTest(column):
                statement = f"UPDATE tasks SET {column} WHERE key = 'tasks:a'"
                self.assert_refused_by_key(db, task, partial(self.sql, statement))

    def test_a_value_that_is_no_text_is_reported(self) -> None:
        db = self.open()
        store_tasks(db, "a")
        self.sql("UPDATE tasks SET value = CAST(value AS BLOB)")
        self.assertIn("tasks:a", "\n".join(db.check()))
        store_tasks(db, "a")
        self.assertEqual(db.check(), [])

    def test_a_key_that_no_writer_stores_is_reported_and_never_returned(self) -> None:
        db = self.open()
        store_tasks(db, "a")
        for key in (b"tasks:a", "", "tasks:", "tasks:a\n", "a"):
            with self.subTest(key=key):
                self.sql("UPDATE tasks SET key = ? WHERE key = 'tasks:a'", key)
                self.assertIsNone(db.get_task("a"))
                self.assert_refused(DamagedError, db.list_tasks)
                self.assertEqual(len(db.check()), 1)
                self.sql("UPDATE tasks SET key = 'tasks:a' WHERE key = ?", key)
        self.assertEqual(db.check(), [])

    def test_a_namespace_that_this_process_does_not_know_is_checked_as_plain_json(self) -> None:
        devices_of(self.open()).put(PairedDevice(device_id="d", part=Part(name="p")))
        self.assert_sound()
        self.sql("UPDATE devices SET value = replace(value, 'paired', 'forged')")
        self.assertIn("devices:d", "\n".join(self.open().check()))
        self.plant("devices:d", b"not JSON")
        self.assertIn("devices:d", "\n".join(self.open().check()))

    # ---- proofs

    def test_a_damaged_proof_can_be_stored_again_or_deleted(self) -> None:
        db, log = self.open(), proof("p")
        db.store_proof(log)
        for _ in range(2):
            self.damage("proofs:p")
            self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p")
            self.assertTrue(db.store_proof(log))
            self.assertEqual(db.get_proof("p"), log)
        self.damage("proofs:p")
        self.assertTrue(db.delete_proof("p"))
        self.assertEqual(db.check(), [])

    def test_a_proof_that_is_whole_beside_damaged_columns_is_still_a_proof(self) -> None:
        db, log = self.open(), proof("p")
        db.store_proof(log)
        self.sql("UPDATE proofs SET at = at + 1")
        self.assert_refused(ConflictError, lambda: db.delete_proof("p"), "proofs:")
        different = partial(db.store_proof, proof("p", b"other"))
        self.assert_refused(ConflictError, different, "proofs:")
        self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p")
        self.assertFalse(db.store_proof(replace(log, timestamp=9)), "it is no new proof")
        self.assertEqual(db.get_proof("p"), log)

    def test_a_changed_proof_with_a_right_checksum_does_not_match_its_evidence_hash(self) -> None:
        db = self.open()
        db.store_proof(proof("p", b"x"))
        ((value,),) = self.sql("SELECT value FROM proofs")
        changed = value.replace('"outputs":"eA=="', '"outputs":"eQ=="')
        self.assertNotEqual(changed, value)
        self.plant("proofs:p", changed.encode())
        self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p", "evidence_hash")
        self.assertIn("proofs:p", "\n".join(db.check()))

    # ---- pruning

    def test_pruning_removes_nothing_on_the_word_of_a_column(self) -> None:
        db = self.open()
        store_tasks(db, "disputed", status=TaskStatus.DISPUTED)
        db.store_proof(proof("unsubmitted"))
        self.sql("UPDATE tasks SET status = 'completed', at = 1")
        self.sql("UPDATE proofs SET status = 'true', at = 1")
        for days, key in (((30, None, None), "disputed"), ((None, None, 30), "unsubmitted")):
            for dry_run in (True, False):
                with self.subTest(key, dry_run=dry_run):
                    prune = partial(db.prune, *days, dry_run=dry_run)
                    self.assert_refused(DamagedError, prune, key)
        self.assertEqual(
            self.sql("SELECT tasks.key, proofs.key FROM tasks, proofs"),
            [("tasks:disputed", "proofs:unsubmitted")],
        )

    def test_a_damaged_index_never_lets_a_proof_be_pruned_that_may_be_needed(self) -> None:
        with OperatorDb(self.path) as db:
            for n in range(1, 9):
                db.store_proof(proof(f"p{n}", timestamp=1000, submitted=n == 7))
        self.flip("proofs_status_at", b"true", 6, 2)  # it now leads to the row of another proof
        db = self.open()
        self.assert_refused(DamagedError, lambda: db.prune(None, None, 30), "proofs:p")
        self.assertEqual(sum(db.get_proof(f"p{n}") is not None for n in range(1, 9)), 8)

    # ---- sessions

    def test_a_damaged_index_never_makes_a_session_shorter(self) -> None:
        with OperatorDb(self.path) as db:
            db.append_transcript("s", "user", "x")
            db.append_command("s", "go")
        self.flip("session_log_status_at", b"commands:s", 0, 2)
        db = self.open()
        self.assert_refused(DamagedError, lambda: db.get_session("s"), "s")
        self.assertTrue(db.check())

    def test_an_append_never_overwrites_an_entry_that_cannot_be_seen(self) -> None:
        db = self.open()
        for n in range(5):
            db.append_transcript("s", "user", f"{n}")
        hide = "UPDATE session_log SET status = ? WHERE key = 'session_log:transcript:s:4'"
        self.sql(hide, None)
        self.assert_refused(DamagedError, lambda: db.get_session("s"), "transcript:s")
        db.append_transcript("s", "user", "next")
        self.sql(hide, "transcript:s")
        contents = [entry.content for entry in db.transcript("s")]
        self.assertEqual(contents, ["0", "1", "2", "3", "4", "next"])

    def test_a_session_that_has_lost_an_entry_is_refused_and_named(self) -> None:
        db = self.open()
        for n in range(5):
            db.append_transcript("s", "user", f"{n}")
        self.sql("DELETE FROM session_log WHERE key = 'session_log:transcript:s:4'")
        for read in (
            lambda: db.get_session("s"),
            lambda: db.transcript("s", last=1),
            db.list_sessions,
        ):
            self.assert_refused(DamagedError, read, "transcript:s")
        self.assertIn("transcript:s", "\n".join(db.check()))

    def test_a_log_without_its_session_is_named(self) -> None:
        db = self.open()
        db.append_transcript("s", "user", "hello")
        db.append_command("s", "status")
        self.sql("DELETE FROM sessions")
        transcript, commands = sorted(db.check(), reverse=True)
        self.assertIn("transcript:s", transcript)
        self.assertIn("commands:s", commands)
        append = partial(db.append_transcript, "s", "user", "a new beginning")
        self.assert_refused(DamagedError, append, "transcript:s")  # it would overwrite "hello"
        self.assertIn("hello", self.sql("SELECT value FROM session_log ORDER BY key DESC")[0][0])

    def test_records_that_come_and_go_during_a_check_raise_no_alarm(self) -> None:
        def talk(name: str) -> None:
            writer.append_transcript(name, "user", "hello")
            writer.append_command(name, "status")

        def act(_: str) -> None:
            verbs = (talk, writer.delete_session, partial(store_tasks, writer), writer.delete_task)
            rng.choice(verbs)(rng.choice("abc"))
            next(acts)

        writer, rng, acts = self.open(), random.Random(11), itertools.count()
        self.watch_connections(listener=act)  # at each statement of what is opened from now on
        checker = self.open()
        for number in range(30):
            with self.subTest(number=number):
                self.assertEqual(checker.check(), [])
        self.assertGreater(next(acts), 500)

    # ---- pages

    def test_a_damaged_index_never_leads_a_walk_round_in_circles(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *(f"t{n:02}" for n in range(20)))
        self.flip("sqlite_autoindex_tasks_1", b"tasks:t19", 6, 0x40)

        def walk() -> None:
            with OperatorDb(self.path) as db:
                self.assertTrue(db.check())
                self.assert_refused(DamagedError, lambda: list(db.iter_tasks()), "tasks")

        in_child(walk, seconds=5)

    def test_a_flipped_bit_in_any_page_never_changes_a_record_that_is_returned(self) -> None:
        stored, rng = self.stored(), random.Random(6)
        whole = read_bytes(self.path)
        opened = found = lost = 0
        for number in range(100):
            write_bytes(self.other, with_flipped_bit(whole, rng))
            with self.subTest(number=number):
                try:
                    with OperatorDb(self.other, durable=False, timeout=2) as db:
                        opened += 1
                        problems = db.check()
                        unread = self.assert_reads_are_right(db, stored)
                except OperatorDbError as error:
                    self.assertIn(self.other, str(error))
                    continue
                found, lost = found + bool(problems), lost + unread
                self.assertTrue(problems or not unread, "a record is lost, and check() is silent")
        self.assertGreater(opened, 30)
        self.assertGreater(found, 12)
        self.assertGreater(lost, 6)

    def test_reading_and_checking_a_damaged_file_changes_no_byte_of_it(self) -> None:
        stored = self.stored()
        image = bytearray(read_bytes(self.path))
        for place in range(9000, len(image), 9000):
            image[place] ^= 0x10
        write_bytes(self.path, image)
        with self.assert_bytes_unchanged(), OperatorDb(self.path) as db:
            self.assertGreater(self.assert_reads_are_right(db, stored), 0)
            self.assertTrue(db.check())

    def test_a_file_that_is_cut_short_is_refused_and_left_as_it_is(self) -> None:
        fill(self.path)
        whole = read_bytes(self.path)
        end = len(whole)
        for size in (*range(100, 600, 100), 512, *range(600, end, end // 25), end - 4096, end - 1):
            write_bytes(self.path, whole[:size])
            error = ForeignFileError if size < 512 else DamagedError
            for read_only in (False, True):
                with self.subTest(size=size, read_only=read_only), self.assert_bytes_unchanged():
                    opening = partial(OperatorDb, self.path, read_only=read_only)
                    self.assert_refused(error, opening, self.path)

    def test_a_damaged_log_never_makes_a_record_that_was_not_stored(self) -> None:
        def write(say: Say) -> None:
            db = OperatorDb(self.path)
            for n in range(30):
                store_tasks(db, f"t{n % 10}", payload=b"%d" % n * 500)
            say("stored")
            signal.pause()

        child = Child(write)
        child.line()
        child.kill()
        image, log, rng = read_bytes(self.path), read_bytes(self.path + "-wal"), random.Random(7)
        for number in range(40):
            is_longer = number < 10
            garbage = rng.randbytes(rng.randrange(1, 9000))
            path = self.beside(f"{number}.db")
            write_bytes(path, image)
            write_bytes(path + "-wal", log + garbage if is_longer else with_flipped_bit(log, rng))
            refusals = () if is_longer else (DamagedError, StorageError, ForeignFileError)
            with self.subTest(number=number), suppress(*refusals), OperatorDb(path) as db:
                payloads = {task.task_id: task.payload for task in db.iter_tasks()}
                for task_id, payload in payloads.items():
                    n = int(task_id.removeprefix("t"))
                    self.assertIn(payload, [b"%d" % each * 500 for each in range(n, 30, 10)])
                self.assertTrue(len(payloads) == 10 or not is_longer)

    def test_a_check_goes_on_past_pages_that_cannot_be_read_and_ends(self) -> None:
        def look() -> tuple[list[str], set[str]]:
            """Return what check() finds, and the tasks that cannot be read by their keys."""
            refused = set()
            with OperatorDb(self.path) as db:
                for n in range(40):
                    try:
                        db.get_task(f"t{n}")
                    except DamagedError:
                        refused.add(f"tasks:t{n}")
                return db.check(), refused

        fill(self.path)
        self.damage("tasks:t30")
        self.damage("proofs:t5")
        try:
            found = self.sql(
                "SELECT name, pageno FROM dbstat WHERE pagetype = 'leaf' ORDER BY path"
            )
        except sqlite3.OperationalError:
            self.skipTest("this SQLite was built without dbstat")
        ((size,),) = self.sql("PRAGMA page_size")
        image, leaves = read_bytes(self.path), dict[str, list[slice]]()
        for name, number in found:
            leaves.setdefault(name, []).append(slice((number - 1) * size, number * size))
        rows = [leaf for leaf in leaves["tasks"] if b'"task_id":"t30"' not in image[leaf]]
        keys, statuses = leaves["sqlite_autoindex_tasks_1"], leaves["tasks_status_at"]
        cases = [("rows", [leaf]) for leaf in rows]
        cases += [("keys", [leaf]) for leaf in keys]
        cases += [("statuses", [leaf]) for leaf in statuses]
        cases += [("keys and rows", [*keys, leaf]) for leaf in rows[::6]]
        cases += [("keys and the last rows", [*keys, rows[-1]])]
        contents = (bytes(size), random.Random(9).randbytes(size))
        for (label, pages), content in itertools.product(cases, contents):
            with self.subTest(label, pages=pages, zeros=not any(content)):
                damaged = bytearray(image)
                for page in pages:
                    damaged[page] = content
                write_bytes(self.path, damaged)
                problems, refused = in_child(look, seconds=5)
                self.assertGreater(len(problems), 2, "the pages are damaged, too")
                named = set(re.findall(r"\b(?:tasks|proofs):t\d+\b", "\n".join(problems)))
                self.assertLessEqual({"tasks:t30", "proofs:t5"}, named)
                if label == "rows":  # their keys can be read
                    self.assertLessEqual(refused, named)


# ==== Export, import, backup, restore, compact ====================================================

# As `agenc-db export --format json` writes it, one string moved to a line of its own.
PROTOTYPE_EXPORT = r"""{
  "exported_at": "2026-02-21T14:55:55.120394+00:00",
  "stats": {
    "total_tasks": 3, "task_counts": {"InProgress": 1, "Completed": 1, "Disputed": 1},
    "total_sessions": 1, "total_proofs": 1
  },
  "config": {
    "wallet_pubkey": "4YRpGXNp5gfPE8XqcUAL3FV6xHMJaQkxVccPTSy8hutg",
    "rpc_url": "https://api.devnet.solana.com", "network": "devnet",
    "capabilities": ["voice", "code", "trading", "social", "email", "image"],
    "model_preferences": null
  },
  "tasks": [
    {
      "task_id": "2aotSaHBBZvWyUDt8qztEGesVGiVqg54xiPvBxZvAqFt",
      "payload": [123, 34, 106, 111, 98, 34, 58, 34, 195, 169, 34, 125],
      "status": "Disputed", "claimed_at": 1774627200, "completed_at": 1774627900,
      "on_chain_signature":
"37WpEBkP5eWGkDs98BHyvTA6CMMbt61Hco7qn9khxy4iZJF4iY8y9RghrTdErYD1QDRhXPBZ2uLvAy9R8qRRA4ra",
      "description": "Summarise the readiness report",
      "reward_lamports": 18446744073709551615, "reward_skr_tokens": null,
      "creator": "AYwAQmXxTLB3ukpRPHV2LC6qA4DCo2hsuSTneNn9xnQN"
    },
    {
      "task_id": "task-in-progress", "payload": [], "status": "InProgress",
      "claimed_at": 1774627300, "completed_at": null, "on_chain_signature": null,
      "description": null, "reward_lamports": 0, "reward_skr_tokens": 5000000000, "creator": null
    },
    {
      "task_id": "task-done", "payload": [0, 255, 128], "status": "Completed",
      "claimed_at": 1774627000, "completed_at": 1774627100,
      "on_chain_signature":
"65QAodfEi2q6bwa9L1HYumnjpSi18FfyrK3W7HU1wXKGcTVfHCTNGaefjFpqR3e75CphecDXQFY8eZmYZyeHsdzY",
      "description": "done", "reward_lamports": 1, "reward_skr_tokens": null, "creator": null
    }
  ],
  "sessions": [
    {
      "session_id": "session_1774627000123",
      "transcript": [
        {"role": "system", "content": "ClaimTask", "timestamp": 1774627001},
        {"role": "user", "content": "what is it worth?", "timestamp": 1774627002}
      ],
      "active_task_ids": ["task-in-progress"], "command_history": ["ClaimTask"],
      "created_at": 1774627000, "last_active": 1774627002
    }
  ]
}"""


def export_of(
    *entries: dict[str, Any], withheld: dict[str, list[str]] | None = None, **header: Any
) -> BytesIO:
    """Return an export of these lines, the first of which is line 2; `header` changes line 1."""
    first: dict[str, Any] = {
        "format": "operator_db/1",
        "schema_version": 1,  # which every later edition takes
        "withheld": withheld or {},
        "records": Counter(entry["namespace"] for entry in entries),
    }
    return BytesIO(b"\n".join(json.dumps(line).encode() for line in (first | header, *entries)))


REMOVED = object()  # in place of a value: without the field


def with_field(document: Any, place: str, value: Any) -> Any:
    """Return a copy of a JSON document with another value in a place such as `history.0.at`."""
    within = changed = json.loads(json.dumps(document))
    *path, last = (int(step) if step.isdigit() else step for step in place.split("."))
    for step in path:
        within = within[step]
    if value is REMOVED:
        del within[last]
    else:
        within[last] = value
    return changed


def at_progress(part: float, action: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a progress function that acts once, when a part of the work is done."""
    waiting = [action]

    def progress(done: int, total: int) -> None:
        if waiting and total and done >= total * part:
            waiting.pop()()

    return progress


class TransferTest(DatabaseTest):
    """A database with some of everything: made once, and copied for each test."""

    image = b""

    def setUp(self) -> None:
        super().setUp()
        if not TransferTest.image:
            fill(self.path, tasks=10)
            TransferTest.image = read_bytes(self.path)
        write_bytes(self.path, self.image)

    def fill_large(self, path: str, tasks: int = 60) -> None:
        """Add large tasks to a database: 60 are so much that it is copied in several steps."""
        with OperatorDb(path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"large{n}" for n in range(tasks)), payload=bytes(70_000))

    def store_pair(self, db: OperatorDb, value: int) -> None:
        """Change two tasks in one transaction, the first and the last that are walked."""
        with db.transaction():
            store_tasks(db, "+first", "~last", reward_lamports=value)


class ExportsHoldEverything(TransferTest):
    def test_an_export_is_one_snapshot_while_a_writer_goes_on(self) -> None:
        db, out, values = self.open(), BytesIO(), itertools.count()
        self.store_pair(db, next(values))
        db.export(
            out, progress=lambda *_: run_in_threads(lambda: self.store_pair(db, next(values)))
        )
        self.assertGreater(next(values), 20)
        header, *entries = map(json.loads, out.getvalue().splitlines())
        records = [entry["record"] for entry in entries]
        rewards = {each.get("task_id"): each.get("reward_lamports") for each in records}
        self.assertEqual((rewards["+first"], rewards["~last"]), (0, 0))
        self.assertEqual(header["records"], Counter(entry["namespace"] for entry in entries))

    def test_export_and_import_take_the_memory_of_one_record(self) -> None:
        peaks: dict[str, list[int]] = {"export": [], "import_": []}
        for count in (2, 20):
            db = self.open(f"{self.other}{count}")
            store_tasks(db, *map(str, range(count)), payload=bytes(500_000))
            for verb, of_verb in peaks.items():
                tracemalloc.start()
                getattr(db, verb)(self.file)
                of_verb.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
        for verb, (few, many) in peaks.items():
            self.assertLess(many, few + 3_000_000, verb)

    def test_export_and_import_keep_nothing_for_each_record(self) -> None:
        db = self.open()
        with db.transaction():
            store_tasks(db, *map(str, range(1000)), payload=bytes(3000))
        db.export(self.file)  # from now on it is known what a batch of records takes
        for verb in (db.export, db.import_):
            blocks = array("q")  # which allocates none for a number that joins it
            verb(self.file, progress=lambda *_, seen=blocks: seen.append(sys.getallocatedblocks()))
            early, late = blocks[: len(blocks) // 10], blocks[len(blocks) // 2 :]
            self.assertLess(max(late) - max(early), 500, verb)

    def test_progress_rises_to_its_total(self) -> None:
        db, other, backup = self.open(), self.open(self.other), self.beside("backup.db")
        for verb in (
            partial(db.export, self.file),
            partial(other.import_, self.file),
            partial(db.backup, backup),
            partial(other.restore, backup),
        ):
            calls: list[tuple[int, int]] = []
            verb(progress=lambda *so_far, calls=calls: calls.append(so_far))
            totals = {total for _, total in calls if total}  # of pages and of records
            for total in totals:
                done = [done for done, of in calls if of == total]
                with self.subTest(verb=verb, total=total):
                    self.assertEqual((done, done[-1]), (sorted(done), total))
            self.assertTrue(totals)

    def test_an_export_shows_secrets_only_when_asked(self) -> None:
        db = self.open()
        store_secrets(db)
        for asked in (False, True):
            db.export(self.file, include_secrets=asked)
            text = read_bytes(self.file).decode()
            self.assertEqual((text.count(SECRET), '"***"' in text), (4 * asked, not asked))
            self.assertEqual(json.loads(text.splitlines()[0])["withheld"] == {}, asked)

    def test_exports_and_backups_are_private_whatever_the_umask_and_the_old_file(self) -> None:
        db = self.open()
        self.addCleanup(os.umask, os.umask(0))
        for umask, old_mode in itertools.product((0o000, 0o777), (None, 0o666)):
            for verb, path in (
                (db.export, self.file),
                (partial(db.backup, overwrite=True), self.other),
            ):
                if old_mode:
                    os.chmod(path, old_mode)
                os.umask(umask)
                verb(path)
                with self.subTest(path=path, umask=umask, old_mode=old_mode):
                    self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_any_kind_of_stream_gets_the_whole_export(self) -> None:
        db, text, binary, unbuffered = self.open(), StringIO(), BytesIO(), bytearray()
        store_tasks(db, "漢字")
        db.export(text)

        with redirect_stdout(TextIOWrapper(binary, encoding="ascii")) as printed:
            print("printed before")
            db.export(sys.stdout)
        self.assertEqual(printed.encoding, "ascii")
        before, _, sent = binary.getvalue().partition(b"\n")
        self.assertEqual(before, b"printed before")

        raw = mock.Mock(spec=io.RawIOBase)
        raw.write.side_effect = lambda data: unbuffered.extend(data[:1000]) or min(1000, len(data))
        db.export(raw)

        streams = {"text": text.getvalue().encode(), "stdout": sent, "unbuffered": unbuffered}
        for label, got in streams.items():
            with self.subTest(label):
                header, *lines = got.splitlines()
                self.assertEqual(json.loads(header)["format"], "operator_db/1")
                self.assertEqual(lines, exported(db, include_secrets=False))

    def test_a_stream_that_fails_is_a_storage_error(self) -> None:
        db, stream = self.open(), mock.Mock(spec=io.RawIOBase)
        for result in (None, OSError("gone"), BrokenPipeError(errno.EPIPE, "gone")):
            stream.write.side_effect = [result]
            with self.subTest(result=result), self.assert_unchanged():
                self.assert_refused(StorageError, lambda: db.export(stream), "stream")

    def test_a_named_pipe_is_written_to_and_never_replaced(self) -> None:
        fifo, db = self.beside("fifo"), self.open()
        os.mkfifo(fifo)
        with self.assert_unchanged():
            self.assert_refused(StorageError, lambda: db.backup(fifo, overwrite=True), fifo)
        command = ["--db-path", self.path, "export", "-o", fifo]
        metrics = ["--db-path", self.path, "stats", "--prometheus", "-o", fifo]
        export, metric = b'{"format":"operator_db/1"', b"\noperator_db_tasks{"
        for label, send, wanted in (
            ("export", lambda: db.export(fifo), export),
            ("export by command", lambda: operator_db.main(command), export),
            ("metrics", lambda: db.write_metrics(fifo), metric),
            ("metrics by command", lambda: operator_db.main(metrics), metric),
        ):
            got: list[bytes] = []
            run_in_threads(send, lambda got=got: got.append(read_bytes(fifo)))
            with self.subTest(label):
                self.assertIn(wanted, got[0])
                if wanted is export:
                    self.assertEqual(got[0].splitlines()[1:], exported(db, include_secrets=False))
                self.assertTrue(stat.S_ISFIFO(os.stat(fifo).st_mode))

    def test_an_export_into_a_slow_pipe_holds_no_snapshot_and_no_lock(self) -> None:
        reader, writer = os.pipe()
        db, other = self.open(), self.open(timeout=0)
        store_tasks(db, "large", payload=bytes(10**6))

        def export() -> None:
            with open(writer, "wb") as pipe:
                db.export(pipe)

        with in_background(export), open(reader, "rb") as pipe:
            pipe.read(1)  # the rest does not fit into the pipe: the export waits
            store_tasks(other, "meanwhile")
            self.assertEqual(self.sql("PRAGMA wal_checkpoint(TRUNCATE)"), [(0, 0, 0)])
            self.assertEqual(os.stat(self.path + "-wal").st_size, 0)
            self.assertEqual(pipe.read().count(b"\n"), len(exported(db)))

    def test_an_export_that_does_not_end_leaves_the_old_file(self) -> None:
        db = self.open()
        write_bytes(self.file, b"old")

        def without_room() -> None:
            with file_size_limit(500_000):
                self.assert_refused(StorageError, lambda: db.export(self.file), self.file)

        for part in (0.01, 0.5, 1.0):
            with self.subTest(part=part):
                with self.assert_unchanged(), self.assertRaises(KeyboardInterrupt):
                    db.export(self.file, progress=interrupt_when(part))
                paused_at(partial(db.export, self.file), part).kill()
                self.assertEqual(read_bytes(self.file), b"old")
        store_tasks(db, "large", payload=bytes(10**6))
        with self.assert_unchanged():
            in_child(without_room)
        self.assertEqual(read_bytes(self.file), b"old")

    def test_a_damaged_record_is_not_exported_but_named(self) -> None:
        db = self.open()
        write_bytes(self.file, b"old")
        self.damage("proofs:t1")
        self.assert_refused(DamagedError, lambda: db.export(self.file), "proofs:t1")
        self.assertEqual(read_bytes(self.file), b"old")


class ImportTest(TransferTest):
    """An export with secrets is in `file`, its lines after the header in `lines` and `entries`."""

    def setUp(self) -> None:
        super().setUp()
        out = BytesIO()
        with OperatorDb(self.path, durable=False) as db:
            db.export(out, include_secrets=True)
        write_bytes(self.file, out.getvalue())
        header, *self.lines = out.getvalue().splitlines()
        self.entries = [json.loads(line) for line in self.lines]
        self.records: dict[str, int] = json.loads(header)["records"]
        self.last = f"line {len(self.lines) + 2}"  # that of one more

    def own_entry(
        self, namespace: str, record: Any, status: str | None = None, at: int | None = None
    ) -> dict[str, Any]:
        """Return the line of a record in a namespace of the operator's own."""
        columns = {"key": record["name"], "status": status, "at": at}
        return {"namespace": namespace, **columns, "record": record}


class ImportsTakeAllOrNothing(ImportTest):
    DEEP = json.loads("[" * 150 + "]" * 150)
    WRONG_ENTRIES = (  # namespace, place in its line, value there, what the error names
        ("tasks", "record.reward_lamports", "1", "reward_lamports"),
        ("tasks", "record.reward_lamports", -1, "reward_lamports"),
        ("tasks", "record.reward_skr_tokens", 2**64, "reward_skr_tokens"),
        ("tasks", "record.claimed_at", True, "claimed_at"),
        ("tasks", "record.completed_at", 1.5, "completed_at"),
        ("tasks", "record.payload", "not base64!", "payload"),
        ("tasks", "record.payload", [1, 2], "payload"),
        ("tasks", "record.status", "lost", "status"),
        ("tasks", "record.description", "\ud800", "description"),
        ("tasks", "record.task_id", "a\nb", "task_id"),
        ("tasks", "record.task_id", REMOVED, "task_id"),
        ("tasks", "record.claimed_at", REMOVED, "claimed_at"),
        ("tasks", "record.mood", 1, "mood"),
        ("tasks", "record.history", {}, "history"),
        ("tasks", "record.history.0.at", "then", "history"),
        ("tasks", "record.history.0.mood", None, "mood"),
        ("sessions", "record.transcript.0.content", None, "transcript"),
        ("sessions", "record.transcript.0.mood", "", "mood"),
        ("sessions", "record.transcript.0.timestamp", REMOVED, "timestamp"),
        ("sessions", "record.active_task_ids", "t1", "active_task_ids"),
        ("proofs", "record.outputs", REMOVED, "outputs"),
        ("proofs", "record.proof_hash", "00" * 32, "proof_hash"),
        ("proofs", "record.submitted", "yes", "submitted"),
        ("config", "record.keypairs", {"main": 5, "more": SECRET}, "keypairs"),
        ("config", "record.keypairs", {"main": "***", "more": SECRET}, "keypairs"),
        ("config", "record.rpc_endpoints", [SECRET, 7], "rpc_endpoints"),
        ("config", "record.rpc_endpoints", SECRET, "rpc_endpoints"),
        ("config", "record.rpc_endpoints", ["***", SECRET], "rpc_endpoints"),
        ("config", "record.model_preferences", {"a": DEEP}, "model_preferences"),
        ("tallies", "record.count", "many", "count"),
        ("tallies", "record.pin", [SECRET], "pin"),
        ("tallies", "record.name", "another", "another"),  # its key is another one
        ("tallies", "key", REMOVED, ""),
        ("tallies", "namespace", "tasks", ""),
        ("tasks", "namespace", "proofs", ""),
        ("tasks", "namespace", "session_log", ""),
        ("tasks", "namespace", "No such", ""),
        ("tasks", "namespace", None, ""),
        ("tasks", "record", [1], ""),
        ("tasks", "record", REMOVED, ""),
        ("tasks", "more", 1, ""),
    )
    OF_CONFIG = b'{"namespace":"config","record":'
    WRONG_LINES = (  # text of a line, what the error names
        (OF_CONFIG + b'{"network":"\xff"}}', "UTF-8"),
        (OF_CONFIG + b'{"model_preferences":{"a":NaN}}}', "NaN"),
        (OF_CONFIG + b'{"model_preferences":{"a":-Infinity}}}', "Infinity"),
        (OF_CONFIG + b'{"model_preferences":{"a":1e999}}}', "model_preferences"),
        (OF_CONFIG + b'{"keypairs":{"main":"' + SECRET.encode(), "JSON"),
        (OF_CONFIG + b"[" * 10**5, ""),
        (b"[1]", "JSON"),
        (b"7", "JSON"),
    )

    def test_a_wrong_line_is_refused_by_its_number_and_field(self) -> None:
        db = self.open(self.other)
        tallies_of(db)
        db.append_transcript("stays", "user", "here")
        lines: list[tuple[bytes, str]] = [*self.WRONG_LINES]
        for namespace, place, value, word in self.WRONG_ENTRIES:
            entry = next(each for each in self.entries if each["namespace"] == namespace)
            lines.append((json.dumps(with_field(entry, place, value)).encode(), word))
        for line, word in lines:
            text = export_of(*self.entries).getvalue() + b"\n" + line
            with self.subTest(line=line[:120]), self.assert_unchanged(self.other):
                bring = partial(db.import_, BytesIO(text))
                self.assert_refused(InvalidRecordError, bring, self.last, word)

    def test_what_is_cut_or_newer_or_no_export_is_refused(self) -> None:
        entries, records = self.entries, self.records
        whole = export_of(*entries).getvalue()
        cases = (
            ("last line lost", export_of(*entries[:-1], records=records), "tallies"),
            ("last line twice", export_of(*entries, entries[-1], records=records), "tallies"),
            ("all lines lost", export_of(records=records), "config"),
            ("no counts", export_of(*entries, records=None), "line 1"),
            ("cut within a line", BytesIO(whole[: len(whole) // 2]), "line"),
            ("newer schema", export_of(*entries, schema_version=99), "99"),
            ("newer format", export_of(*entries, format="operator_db/2"), "operator_db/2"),
            *(
                (f"{text}", BytesIO(text), "")
                for text in (b"", b"\n", b"text", b"{}", b"[]", b"[7]")
            ),
        )
        db = self.open(self.other)
        for label, text, word in cases:
            error = NewerSchemaError if label.startswith("newer") else InvalidRecordError
            with self.subTest(label), self.assert_unchanged(self.other):
                self.assert_refused(error, lambda text=text: db.import_(text), word)

    def test_a_secret_that_is_withheld_in_part_is_refused_by_line_and_field(self) -> None:
        @dataclass
        class Vault:
            name: str
            content: Any = field(default=None, metadata={"secret": True})

        db = self.open(self.other)
        withheld = {"vaults": ["content"], "config": ["keypairs", "rpc_endpoints"]}
        parts = (
            {"a": {"b": "***"}},
            [["***"]],
            ["***", SECRET],
            {"a": SECRET, "b": [{"c": "***"}]},
        )
        for known in (False, True):
            if known:
                db.namespace("vaults", Vault, key="name")
            for value in parts:
                for name, line in (
                    ("content", self.own_entry("vaults", {"name": "v", "content": value})),
                    ("keypairs", {"namespace": "config", "record": {"keypairs": value}}),
                    ("rpc_endpoints", {"namespace": "config", "record": {"rpc_endpoints": value}}),
                ):
                    bring = partial(db.import_, export_of(line, withheld=withheld))
                    with self.subTest(known=known, line=line), self.assert_unchanged(self.other):
                        self.assert_refused(InvalidRecordError, bring, "line 2", name)

    def test_a_history_that_does_not_end_with_the_status_of_its_task_is_refused(self) -> None:
        entry = next(each for each in self.entries if each["record"].get("task_id") == "t2")
        history = entry["record"]["history"]
        db = self.open(self.other)
        db.import_(export_of(entry))
        for name, value in (
            ("status", "claimed"),
            ("status", "disputed"),
            ("history", []),
            ("history", [*history, {"status": "claimed", "at": 3, "signature": None}]),
            ("history", [{"status": "completed", "at": 3, "signature": "another"}]),
        ):
            bring = partial(db.import_, export_of(with_field(entry, f"record.{name}", value)))
            with self.subTest(name=name, value=value), self.assert_unchanged(self.other):
                self.assert_refused(InvalidRecordError, bring, "line 2", "history")

    def test_an_import_into_a_new_file_gives_the_same_export(self) -> None:
        with OperatorDb(self.path, durable=False) as db:
            devices = devices_of(db)
            anything = [1, None, {"b": 2.5}]
            odd = PairedDevice(
                device_id="d:é", token=SECRET, part=Part("a", b"\xff"), anything=anything
            )
            devices.put(odd)
            devices.put(PairedDevice(device_id="lost", status="lost", last_seen=-5))
            most = {"description": '\0\x1b"\\\u202e\u2028', "reward_lamports": 2**64 - 1}
            store_tasks(db, "%:漢字", **most)
            db.export(self.file, include_secrets=True)
        rows = self.sql("SELECT * FROM devices ORDER BY key")
        for known in (False, True):
            path = f"{self.other}{known}"
            with self.subTest(known=known), OperatorDb(path, durable=False) as db:
                if known:
                    self.assertEqual(devices_of(db).count(), 0)
                db.import_(self.file)
                self.assertEqual((exported(db), db.check()), (content_of(self.path), []))
                self.assertEqual(self.sql("SELECT * FROM devices ORDER BY key", path=path), rows)
                self.assertEqual(devices_of(db).get("d:é"), odd)

    def test_an_import_reports_what_it_added_replaced_and_left_alone(self) -> None:
        db, records = self.open(self.other), self.records
        self.assertEqual(db.import_(self.file), {name: {"added": n} for name, n in records.items()})
        with self.assert_unchanged(self.other):
            again = db.import_(Path(self.file))
        self.assertEqual(again, {name: {"unchanged": n} for name, n in records.items()})
        self.assertEqual(exported(db), self.lines)

        db.delete_task("t0")
        db.update_task_status("t1", "disputed")
        db.store_config(OperatorConfig(capabilities=["other"], keypairs={"main": "k" * 40}))
        tallies_of(db).update("one", lambda tally: replace(tally, count=9))
        counts = db.import_(StringIO(read_bytes(self.file).decode()))
        self.assertEqual(counts["tasks"], {"added": 1, "unchanged": records["tasks"] - 1})
        self.assertEqual(counts["config"], {"replaced": 1})
        self.assertEqual(counts["tallies"], {"replaced": 1})
        db.delete_task("t1")  # whose status was kept
        db.import_(self.file)
        self.assertEqual(exported(db), self.lines)

    def test_imported_values_keep_their_json_type_and_columns(self) -> None:
        db = self.open(self.other)
        for namespace, value in itertools.product(
            ("tallies", "config"), (1, True, 1.0, 1, False, 0, 0.0)
        ):
            line = self.own_entry("tallies", {"name": "one", "count": value})
            if namespace == "config":
                line = {"namespace": "config", "record": {"model_preferences": {"a": value}}}
            with self.subTest(namespace=namespace, value=value):
                self.assertNotIn("unchanged", db.import_(export_of(line))[namespace])
                self.assertEqual(db.import_(export_of(line)), {namespace: {"unchanged": 1}})
                start = f'{{"namespace":"{namespace}"'.encode()
                (stored,) = (each for each in exported(db) if each.startswith(start))
                self.assertIn(f":{json.dumps(value)}}}".encode(), stored)
        for columns in ((), ("new",), ("old",), ("old", 1), ("old", 2), (None, 2)):
            line = self.own_entry("tallies", {"name": "one", "count": 0.0}, *columns)
            with self.subTest(columns=columns):
                outcome = "replaced" if columns else "unchanged"
                self.assertEqual(db.import_(export_of(line))["tallies"], {outcome: 1})
                self.assertEqual(json.loads(exported(db)[-1]), line)

    def test_the_input_is_read_before_the_write_lock_is_taken(self) -> None:
        reader, writer = os.pipe()
        began = threading.Event()
        db, another = self.open(self.other), self.open(self.other, timeout=0)
        whole = read_bytes(self.file)

        def read() -> None:
            with open(reader, "rb") as pipe:
                db.import_(pipe, progress=lambda *_: began.set())

        with in_background(read), open(writer, "wb") as pipe:
            pipe.write(whole[:-500])
            pipe.flush()
            self.assertTrue(began.wait(10))
            store_tasks(another, "meanwhile")
            pipe.write(whole[-500:])
        self.assertEqual(len(exported(db)), len(self.lines) + 1)

    def test_an_import_that_does_not_end_takes_nothing(self) -> None:
        db = self.open(self.other)

        def without_room() -> None:
            with ExitStack() as limits:

                def fill_disk() -> None:  # only then: the input is read into a temporary file
                    limits.enter_context(file_size_limit(4096))

                bring = partial(db.import_, self.file, progress=at_progress(1.0, fill_disk))
                self.assert_refused(StorageError, bring, self.other)
            store_tasks(db, "room again")

        for part in (0.1, 0.5, 1.0):
            with self.subTest(part=part):
                with self.assert_unchanged(self.other), self.assertRaises(KeyboardInterrupt):
                    db.import_(self.file, progress=interrupt_when(part))
                store_tasks(db, f"no lock is held {part}")
                with self.assert_unchanged(self.other):
                    paused_at(partial(db.import_, self.file), part).kill()
        in_child(without_room)
        self.assertEqual(task_ids(db)[-1], "room again")
        self.assertEqual(len(exported(db)), 4)  # with what was stored meanwhile
        self.assert_sound(self.other)

    def test_an_import_is_all_or_nothing_whatever_happens(self) -> None:
        with OperatorDb(self.path) as db:
            for task_id in task_ids(db)[::2]:
                db.delete_task(task_id)
            db.delete_session("s1")
            tallies_of(db).delete("one")
        self.assert_all_or_nothing(lambda db: db.import_(self.file), "kill", "interrupt", tries=6)


class ImportsNeverGoBack(ImportTest):
    def test_what_the_database_knows_more_of_is_kept(self) -> None:
        with OperatorDb(self.path) as db:
            db.update_task_status("t0", "completed", signature="sig")
            db.append_transcript("s0", "user", "later")
            db.append_command("s1", "later")
            db.mark_proof_submitted("t3", "sig")
            with self.assert_unchanged():
                counts = db.import_(self.file)
            for name in ("tasks", "sessions", "proofs"):
                self.assertEqual(set(counts[name]), {"unchanged"})
            db.export(self.file)
        db = self.open(self.other)  # and what the file knows more of arrives
        db.import_(export_of(*self.entries))
        counts = db.import_(self.file)
        replaced = {name: counts[name]["replaced"] for name in ("tasks", "sessions", "proofs")}
        self.assertEqual(replaced, {"tasks": 1, "sessions": 2, "proofs": 1})
        self.assertEqual((db.check(), exported(db)), ([], content_of(self.path)))

    def test_other_evidence_or_another_log_is_refused_by_line_and_key(self) -> None:
        with OperatorDb(self.beside("contradicting.db")) as other:
            other.store_proof(proof("t1", b"another"))
            other.append_command("s0", "another")
            other.append_transcript("s1", "user", "another", timestamp=0)
            contradictions = exported(other)
        db = self.open(self.other)
        db.import_(self.file)
        store_tasks(db, "more")
        for key, line in zip(("s0", "s1", "t1"), contradictions, strict=True):
            bring = partial(db.import_, export_of(*self.entries, json.loads(line)))
            with self.subTest(key), self.assert_unchanged(self.other):
                self.assert_refused(ConflictError, bring, self.last, key)

    def test_a_proof_gains_the_signature_that_was_not_known(self) -> None:
        signed = proof("signed", submitted=True, submission_signature="sig")
        with OperatorDb(self.path) as db:
            db.store_proof(signed)
            db.export(self.file)
        db = self.open(self.other)
        for submitted in (True, False):
            db.delete_proof("signed")
            db.store_proof(proof("signed", submitted=submitted))
            with self.subTest(submitted=submitted):
                self.assertEqual(db.import_(self.file)["proofs"]["replaced"], 1)
                self.assertEqual(db.get_proof("signed"), signed)
                self.assertNotIn("replaced", db.import_(self.file)["proofs"])

    def test_of_two_histories_the_later_is_kept_and_no_stored_entry_is_lost(self) -> None:
        def task(moves: list[tuple[str, int]]) -> TaskRecord:
            changes = [StatusChange(status=TaskStatus(name), at=at) for name, at in moves]
            return TaskRecord(task_id="t", claimed_at=0, history=changes, status=changes[-1].status)

        claimed, again = ("claimed", 0), ("claimed", 5)
        started, late = ("in_progress", 10), ("in_progress", 11)
        early, done = ("completed", 5), ("completed", 20)
        disputed, lost = ("disputed", 20), ("disputed", 30)
        db = self.open(self.other)
        for stored, given, kept in (
            ([started], [done], [started, done]),
            ([started], [again, done], [started, again, done]),
            ([done], [started], [done]),
            ([done], [disputed], [done]),
            ([started, done], [late, lost], [started, done, late, lost]),
            ([started], [started, done], [started, done]),
            ([started, done], [started], [started, done]),
            ([started, early], [started], [started, early]),  # whatever its clock said
        ):
            db.delete_task("t")
            db.store_task(task([claimed, *given]))
            (entry,) = map(json.loads, exported(db))
            db.delete_task("t")
            db.store_task(task([claimed, *stored]))
            with self.subTest(stored=stored, given=given):
                counts = db.import_(export_of(entry))["tasks"]
                self.assertEqual(counts["replaced"], int(kept != stored))
                merged, wanted = db.get_task("t"), task([claimed, *kept])
                self.assertEqual((merged.history, merged.status), (wanted.history, wanted.status))
                with self.assert_unchanged(self.other):
                    db.import_(export_of(entry))

    def test_a_secret_that_is_withheld_stays_as_it_is_stored(self) -> None:
        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
            before = exported(db)
            with self.assert_unchanged():
                counts = db.import_(self.file)
            outcomes = {outcome for count in counts.values() for outcome in count}
            self.assertEqual(outcomes, {"unchanged"})
            tallies_of(db).update("two", lambda tally: replace(tally, count=5))
            db.store_config(replace(db.get_config(), network="devnet"))
        with OperatorDb(self.path) as db:  # to which no class of a namespace is known
            self.assertEqual(db.import_(self.file)["tallies"], {"unchanged": 1, "replaced": 1})
            self.assertEqual(exported(db), before)

    def test_a_secret_that_is_withheld_and_not_stored_is_its_default_or_refused(self) -> None:
        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
        db = self.open(self.other)
        bring = partial(db.import_, self.file)
        self.assert_refused(InvalidRecordError, bring, "line", "tallies.pin")
        self.assertEqual(exported(db), [])
        self.assertEqual((tallies_of(db).count(), wallets_of(db).count()), (0, 0))
        bring()
        self.assertNotIn(b"***", b"".join(exported(db)))
        self.assertEqual(tallies_of(db).get("two"), Tally(name="two"))

    def test_a_secret_without_a_default_is_kept_and_the_rest_is_checked(self) -> None:
        @dataclass
        class Card:
            name: str
            pin: str = field(metadata={"secret": True})

        db, other = self.open(), self.open(self.other)
        db.namespace("cards", Card, key="name").put(Card("one", SECRET))
        db.export(self.file)
        with self.assert_unchanged():
            self.assertEqual(db.import_(self.file)["cards"], {"unchanged": 1})
            text = read_bytes(self.file).replace(b'"name":"one"', b'"name":1')
            bring = partial(db.import_, BytesIO(text))
            self.assert_refused(InvalidRecordError, bring, "line", "name")
        other.namespace("cards", Card, key="name")
        with self.assert_unchanged(self.other):
            self.assert_refused(InvalidRecordError, lambda: other.import_(self.file), "line", "pin")

    def test_a_secret_of_an_unknown_class_is_never_made_up(self) -> None:
        @dataclass
        class Voice:
            name: str
            role: str = field(default="secret role", metadata={"secret": True})

        db, other = self.open(), self.open(self.other)
        db.namespace("voices", Voice, key="name").put(Voice("v"))
        db.export(self.file)
        self.assert_refused(InvalidRecordError, lambda: other.import_(self.file), "voices.role")
        self.assertEqual(exported(other), [])

    def test_stars_that_stand_for_nothing_are_imported_as_they_are(self) -> None:
        with OperatorDb(self.path) as db:
            tallies_of(db).put(Tally(name="stars", pin="***"))
            tallies_of(db).put(Tally(name="***"))
            store_tasks(db, "***", description="***")
            db.export(self.file, include_secrets=True)
        db = self.open(self.other)
        db.import_(self.file)
        self.assertEqual(exported(db), content_of(self.path))
        self.assertEqual(tallies_of(db).get("stars"), Tally(name="stars", pin="***"))

    def test_a_damaged_record_is_not_given_up_for_one_without_its_secrets(self) -> None:
        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
        self.damage("config:operator")
        self.sql("DELETE FROM tasks")
        with closing(sqlite3.connect(self.path)) as raw:
            before = [*raw.iterdump()]
            bring = partial(self.open().import_, self.file)
            self.assert_refused(DamagedError, bring, "line", "config:operator")
            self.assertEqual([*raw.iterdump()], before)

    def test_a_record_of_a_class_that_has_changed_since_arrives_whole(self) -> None:
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
        for now in (Grown, Shrunk):
            path = f"{self.other}{now.__name__}"
            with self.subTest(now), OperatorDb(self.path) as db, OperatorDb(path) as other:
                _, cards = (each.namespace("cards", now, key="name") for each in (db, other))
                db.export(self.file, include_secrets=True)
                other.import_(self.file)
                self.assertEqual((exported(other), cards.get("one")), (exported(db), now("one")))
                self.assertIn(SECRET.encode(), b"".join(exported(other)))
                withheld = exported(db, include_secrets=False)
                self.assertNotIn(SECRET.encode(), b"".join(withheld))


class ThePrototypesExportMovesIn(TransferTest):
    DOCUMENT = json.loads(PROTOTYPE_EXPORT)
    DAMAGE = (  # place, value there, what the error names
        ("tasks.1.payload", [256], "tasks[1] payload"),
        ("tasks.1.payload", [-1], "tasks[1] payload"),
        ("tasks.1.payload", ["x"], "tasks[1] payload"),
        ("tasks.1.payload", "AAAA", "tasks[1] payload"),
        ("tasks.1.payload", 10**12, "tasks[1] payload"),
        ("tasks.0.status", "Lost", "tasks[0] status"),
        ("tasks.2.reward_lamports", -1, "tasks[2] reward_lamports"),
        ("tasks.2.mood", 1, "tasks[2] mood"),
        ("tasks.2", 7, "tasks[2]"),
        ("tasks", {}, "tasks"),
        ("tasks", REMOVED, ""),
        ("sessions.0.transcript.1.content", 5, "sessions[0] transcript"),
        ("sessions.0.mood", 5, "sessions[0] mood"),
        ("sessions.0", None, "sessions[0]"),
        ("config.capabilities", "voice", "config capabilities"),
        ("config.mood", "voice", "config mood"),
        ("config.rpc_url", {SECRET: 1}, "config rpc_endpoints"),
        ("config", [SECRET], "config"),
        ("stats.total_tasks", 4, "total_tasks"),
        ("stats.total_sessions", 0, "total_sessions"),
        ("proofs", [], "proofs"),
        *(
            (f"tasks.{n}.{name}", REMOVED, f"tasks[{n}] {name}")
            for n, task in enumerate(DOCUMENT["tasks"])
            for name in task
        ),
    )

    def test_every_field_arrives_however_the_document_is_printed(self) -> None:
        config, tasks, (session,) = (
            self.DOCUMENT[name] for name in ("config", "tasks", "sessions")
        )
        rpc_endpoints = [config["rpc_url"]]
        arriving = {name: config[name] for name in ("wallet_pubkey", "network", "capabilities")}
        transcript = [TranscriptEntry(**entry) for entry in session["transcript"]]
        for label, text in (
            ("pretty-printed", PROTOTYPE_EXPORT),
            ("on one line", json.dumps(self.DOCUMENT)),
            ("with a byte order mark", "\ufeff" + PROTOTYPE_EXPORT),
        ):
            with self.subTest(label), OperatorDb(self.beside(label), durable=False) as db:
                counts = db.import_(BytesIO(text.encode()))
                self.assertEqual(counts.pop("proofs"), {"left_behind": 1})
                added = {"config": {"added": 1}, "tasks": {"added": 3}, "sessions": {"added": 1}}
                self.assertEqual(counts, added)
                for old in tasks:
                    task = db.get_task(old["task_id"])
                    payload, status = bytes(old["payload"]), TaskStatus(old["status"])
                    wanted = {**old, "payload": payload, "status": status}
                    self.assertEqual({name: getattr(task, name) for name in old}, wanted)
                    self.assertEqual(task.history[-1].status, status)
                wanted = SessionState(**{**session, "transcript": transcript})
                self.assertEqual(db.list_sessions(), [wanted])
                wanted = OperatorConfig(rpc_endpoints=rpc_endpoints, **arriving)
                self.assertEqual(db.get_config(), wanted)
                self.assertEqual((db.check(), db.list_proofs()), ([], []))
                again = db.import_(BytesIO(text.encode()))
                self.assertEqual(again["tasks"], {"unchanged": 3})
                self.assertEqual(again["sessions"], {"unchanged": 1})

    def test_a_damaged_document_is_refused_by_place(self) -> None:
        db = self.open(self.other)
        store_tasks(db, "there")
        for place, value, words in self.DAMAGE:
            text = json.dumps(with_field(self.DOCUMENT, place, value))
            with self.subTest(place=place, value=value), self.assert_unchanged(self.other):
                bring = partial(db.import_, StringIO(text))
                self.assert_refused(InvalidRecordError, bring, *words.split())
        whole = PROTOTYPE_EXPORT
        for text in (whole[:-1], whole[:500], whole + "x", whole.replace("null", "NaN", 1)):
            with self.subTest(end=text[-9:]), self.assert_unchanged(self.other):
                self.assert_refused(InvalidRecordError, partial(db.import_, StringIO(text)))

    def test_a_document_without_config_or_sessions_is_taken(self) -> None:
        db = self.open(self.other)
        text = json.dumps({**self.DOCUMENT, "config": None, "sessions": [], "stats": {}})
        self.assertEqual(db.import_(StringIO(text)), {"tasks": {"added": 3}})
        self.assertIsNone(db.get_config())

    def test_a_configuration_without_values_replaces_none(self) -> None:
        db = self.open(self.other)
        config = OperatorConfig(
            wallet_pubkey="w",
            network="devnet",
            capabilities=["voice"],
            model_preferences={"a": 1},
            keypairs={"main": SECRET},
            rpc_endpoints=["https://rpc"],
        )
        db.store_config(config)
        for empty in (dict.fromkeys(self.DOCUMENT["config"]), {}):
            db.import_(StringIO(json.dumps({**self.DOCUMENT, "config": empty})))
            self.assertEqual(db.get_config(), config)


class BackupsAreWholeAndChecked(TransferTest):
    def test_a_backup_is_one_state_while_a_writer_goes_on(self) -> None:
        self.fill_large(self.path)
        with OperatorDb(self.path, durable=False) as db:
            values = itertools.count()
            self.store_pair(db, next(values))
            before = exported(db)

            def write(*_: int) -> None:
                run_in_threads(lambda: self.store_pair(db, next(values)))

            db.backup(self.other, progress=write)
            self.assertGreater(next(values), 4)
        self.assertEqual(set(os.listdir(self.folder)), {"operator.db", "other.db"})
        copied = self.open(self.other)
        self.assertTrue(exported(copied) == before)
        self.assertEqual((copied.check(), tallies_of(copied).count()), ([], 1))
        self.store_pair(copied, 7)

    def test_a_damaged_database_is_not_backed_up_but_its_record_named(self) -> None:
        db = self.open()
        self.damage("proofs:t1")
        self.assert_refused(DamagedError, lambda: db.backup(self.other), "proofs:t1")
        self.assertEqual(self.names(), {"operator.db"})

    def test_a_name_that_is_taken_is_never_replaced_not_even_meanwhile(self) -> None:
        db = self.open()
        for taken, meanwhile in itertools.product(("", "-wal"), (False, True)):
            name = self.other + taken
            take_name = partial(write_bytes, name, b"somebody's")
            if not meanwhile:
                take_name()
            progress = at_progress(0.0, take_name) if meanwhile else None
            backup = partial(db.backup, self.other, overwrite=taken == "-wal", progress=progress)
            with self.subTest(taken=taken, meanwhile=meanwhile):
                self.assert_refused(StorageError, backup, name)
                self.assertEqual(read_bytes(name), b"somebody's")
                files = set(os.listdir(self.folder)) - {"operator.db-wal", "operator.db-shm"}
                self.assertEqual(files, {"operator.db", "other.db" + taken})
            os.unlink(name)
        write_bytes(self.other, b"old")
        db.backup(self.other, overwrite=True)
        self.assertEqual(content_of(self.other), content_of(self.path))

    def test_backup_restore_and_compact_are_refused_inside_a_transaction(self) -> None:
        db, other = self.open(), self.open(self.other)
        other.backup(self.file)
        for verb in (
            partial(db.backup, self.beside("new")),
            partial(db.restore, self.file),
            db.compact,
        ):
            with self.subTest(verb=verb), self.assert_unchanged(), db.transaction():
                self.assert_refused(ConflictError, verb, "transaction")

    def test_a_backup_that_does_not_end_leaves_nothing_or_the_old_file(self) -> None:
        self.fill_large(self.path)
        db = self.open()
        backup = partial(db.backup, self.other, overwrite=True)

        def without_room() -> None:
            with file_size_limit(2 * 10**6):
                self.assert_refused(StorageError, backup, self.other)

        for old in (None, b"old"):
            if old:
                write_bytes(self.other, old)
            with self.assert_unchanged():
                in_child(without_room)
            for part in (0.01, 1.0):
                with self.subTest(old=old, part=part):
                    with self.assert_unchanged(), self.assertRaises(KeyboardInterrupt):
                        backup(progress=interrupt_when(part))
                    paused_at(backup, part).kill()
                    self.assertEqual(read_bytes(self.other) if old else None, old)
                    self.assertEqual(os.path.exists(self.other), old is not None)


class RestoresReplaceEverything(TransferTest):
    def setUp(self) -> None:
        super().setUp()
        write_bytes(self.other, self.image)
        with OperatorDb(self.other, durable=False) as db:
            for task_id in task_ids(db)[5:]:
                db.delete_task(task_id)
            wallets_of(db)
        self.old, self.new = content_of(self.path), content_of(self.other)

    def test_everyone_who_has_the_database_open_goes_on_with_what_was_restored(self) -> None:
        def go_on(say: Say) -> list[str]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            with OperatorDb(self.path) as db:
                say(len(task_ids(db)))
                signal.sigwait({signal.SIGUSR1})
                seen = task_ids(db)
                store_tasks(db, "from the other process")
                return seen

        child = Child(go_on)
        self.assertEqual(child.line(), "10")
        with OperatorDb(self.path) as db, OperatorDb(self.path) as another:
            tallies = tallies_of(another)
            self.assertEqual((len(task_ids(another)), tallies.count()), (10, 1))
            db.restore(self.other)
            self.assertEqual(os.stat(self.path + "-wal").st_size, 0)
            self.assertEqual((exported(db), exported(another)), (self.new, self.new))
            os.kill(child.pid, signal.SIGUSR1)
            self.assertEqual(len(child.result()), 5)
            store_tasks(another, "from the other handle")
            self.assertEqual((len(task_ids(db)), tallies.put(Tally(name="again"))), (7, True))
        self.assert_sound()
        self.assertEqual(set(os.listdir(self.folder)), {"operator.db", "other.db"})

    def test_a_namespace_that_the_backup_lacks_is_empty_for_everyone(self) -> None:
        OperatorDb(self.beside("empty.db")).close()
        db, another = self.open(), self.open()
        spaces = tallies_of(db), tallies_of(another)
        self.assertEqual([space.count() for space in spaces], [1, 1])
        db.restore(self.beside("empty.db"))
        for space in spaces:
            self.assertEqual((space.count(), space.get("one")), (0, None))
        for number, space in enumerate(spaces):
            space.put(Tally(name=str(number)))
        self.assertEqual([space.count() for space in spaces], [2, 2])
        self.assertEqual((db.stats().records["tallies"], another.check()), (2, []))

    def test_what_is_no_sound_backup_is_refused_by_its_path(self) -> None:
        damaged, newer, foreign, text, cut = map(
            self.beside, ("damaged.db", "newer.db", "foreign.db", "text.db", "cut.db")
        )
        for path in (damaged, newer):
            shutil.copy(self.other, path)
        self.damage("tasks:t3", path=damaged)
        self.sql("PRAGMA user_version = 99", path=newer)
        self.sql("CREATE TABLE theirs(a)", path=foreign)
        write_bytes(text, b"some text " * 99)
        write_bytes(cut, read_bytes(self.other)[:-5000])
        db = self.open()
        for error, path in (
            (DamagedError, damaged),
            (NewerSchemaError, newer),
            (ForeignFileError, foreign),
            (ForeignFileError, text),
            (DamagedError, cut),
            (StorageError, self.beside("missing.db")),
            (ForeignFileError, self.folder),
        ):
            with self.subTest(path=path), self.assert_unchanged():
                self.assert_refused(error, lambda path=path: db.restore(path), path)
                store_tasks(db, "t0", claimed_at=0)  # as it is: no lock is held

    def test_a_backup_with_anything_planted_in_it_is_refused_by_its_path(self) -> None:
        image, db = read_bytes(self.other), self.open()
        tallies = tallies_of(db)
        for planted in (
            "CREATE TRIGGER planted AFTER INSERT ON tallies BEGIN DELETE FROM tallies; END",
            "CREATE TRIGGER planted AFTER UPDATE ON wallets BEGIN SELECT 1; END",
            "CREATE INDEX planted ON tallies(key)",
            "DROP TABLE tallies; CREATE TABLE tallies(key, value)",
            "DROP TABLE tallies; CREATE VIEW tallies AS SELECT 1",
        ):
            write_bytes(self.other, image)
            self.script(planted, path=self.other)
            restore = partial(db.restore, self.other)
            with self.subTest(planted), self.assert_unchanged():
                error = self.assert_refused(ForeignFileError, restore, self.other)
                self.assertNotIn(".new", str(error))  # the name of a temporary copy
                tallies.put(Tally(name="one", count=1))
        self.assertEqual((tallies.count(), db.check()), (1, []))

    def test_what_was_checked_is_what_is_restored(self) -> None:
        """However the backup changes meanwhile: a copy of it is checked, and restored."""
        worsen, mend = (
            partial(self.sql, f"UPDATE tallies SET crc = crc {sign} 1", path=self.other)
            for sign in "+-"  # of a record that is checked late
        )
        db, image = self.open(), read_bytes(self.other)
        for label, part in (("as the check begins", 0.0), ("as the check ends", 1.0)):
            progress = at_progress(part, worsen)
            with self.subTest(f"damaged {label}"):
                store_tasks(db, "not in the backup")
                db.restore(self.other, progress=progress)
                with self.assertRaises(DamagedError):
                    content_of(self.other)
                self.assertEqual((exported(db), db.check()), (self.new, []))
            write_bytes(self.other, image)
        worsen()
        with self.assert_unchanged():
            restore = partial(db.restore, self.other, progress=at_progress(0.0, mend))
            self.assert_refused(DamagedError, restore, "tallies:one", self.other)
        self.assertEqual(content_of(self.other), self.new)

    def test_a_restore_that_is_interrupted_or_killed_leaves_the_old_and_no_lock(self) -> None:
        self.fill_large(self.other)
        calls: list[tuple[int, int]] = []
        with OperatorDb(self.beside("elsewhere.db")) as elsewhere:
            elsewhere.restore(self.other, progress=lambda *so_far: calls.append(so_far))
        db = self.open()

        def after(number: int, action: Callable[[], object]) -> Callable[[int, int], None]:
            left = iter(range(number))
            return lambda *_: None if next(left, None) is not None else action()

        def interrupt() -> None:
            raise KeyboardInterrupt

        def restore_and_wait(number: int, say: Say) -> None:
            def wait() -> None:
                say("so far")
                signal.pause()

            db.restore(self.other, progress=after(number, wait))

        # the first look at what is restored, a later one, and two steps in the midst of copying it
        for number in (0, len(calls) // 2, len(calls) - 3, len(calls) - 2):
            with self.subTest(number=number, of=len(calls)):
                with self.assert_unchanged(), self.assertRaises(KeyboardInterrupt):
                    db.restore(self.other, progress=after(number, interrupt))
                store_tasks(db, "t0", claimed_at=0)  # as it is: no lock is held
                child = Child(partial(restore_and_wait, number))
                child.line()
                child.kill()
                self.assertTrue(content_of(self.path) == self.old)

    def test_a_restore_is_all_or_nothing_whatever_happens(self) -> None:
        backup = self.path + ".backup"  # an error names the one or the other, and so self.path
        os.rename(self.other, backup)
        outcomes = self.assert_all_or_nothing(lambda db: db.restore(backup), tries=6)
        self.assertGreater(outcomes["full disk: before"], 1)

    def test_a_restore_waits_for_another_process_until_its_timeout(self) -> None:
        child = holding_the_lock(self.path)
        with OperatorDb(self.path, timeout=0.05) as db:
            self.assert_refused(BusyError, lambda: db.restore(self.other))
        os.kill(child.pid, signal.SIGUSR1)
        child.result()
        self.assertEqual(len(content_of(self.path)), len(self.old) + 1)

    def test_neither_restore_nor_compact_is_done_on_a_file_that_was_removed(self) -> None:
        for label in ("restore", "compact"):
            with self.subTest(label), OperatorDb(self.beside(label)) as db:
                store_tasks(db, "t")
                self.assertEqual(task_ids(db), ["t"])  # and so both its connections are open
                os.unlink(db.path)
                verb = partial(db.restore, self.other) if label == "restore" else db.compact
                self.assert_refused(StorageError, verb, db.path)


class CompactingGivesSpaceBack(TransferTest):
    def test_the_file_is_smaller_and_every_record_in_its_order(self) -> None:
        with OperatorDb(self.path, durable=False) as db, OperatorDb(self.path) as another:
            names = [f"{n * 7919 % 400:03}" for n in range(400)]
            with db.transaction():
                store_tasks(db, *names, payload=bytes(3000), claimed_at=5)
            with db.transaction():
                for name in names[::2]:
                    db.delete_task(name)
            before, order, size = exported(db), db.list_tasks(), os.stat(self.path).st_size
            freed = db.compact()
            self.assertLess(os.stat(self.path).st_size, size * 0.7)
            self.assertGreater(freed, size * 0.3)
            self.assertEqual((exported(another), another.list_tasks()), (before, order))
            store_tasks(another, "goes on")
        self.assert_sound()

    def test_compacting_loses_nothing_whatever_happens(self) -> None:
        self.fill_large(self.path, tasks=8)

        def delete_and_compact(db: OperatorDb) -> None:
            db.delete_task("large0")
            db.compact()

        self.assert_all_or_nothing(delete_and_compact, "kill", "interrupt", tries=6)

    def test_compacting_without_room_is_refused_and_changes_nothing(self) -> None:
        self.fill_large(self.path, tasks=8)
        before = content_of(self.path)

        def without_room() -> None:
            db = self.open()
            with file_size_limit(os.stat(self.path).st_size // 2):
                self.assert_refused(StorageError, db.compact, self.path)
            store_tasks(db, "~ room again")

        in_child(without_room)
        found = content_of(self.path)
        self.assertEqual(len(found), len(before) + 1)
        self.assertEqual(set(before) - set(found), set())
        self.assert_sound()


class TransfersSpareOtherFiles(TransferTest):
    def test_the_files_of_a_database_that_is_open_here_are_refused(self) -> None:
        """To open and close one as a plain file would drop the locks that SQLite holds on it."""
        db, other = self.open(), self.open(self.other)
        store_tasks(db, "in the log")
        link, hard = self.path + ".link", self.path + ".hard"
        os.symlink(self.path, link)
        os.link(self.path, hard)
        roundabout = os.path.join(self.folder, "..", os.path.basename(self.folder), "operator.db")
        files = (self.path, self.path + "-wal", self.path + "-shm")

        def identities() -> list[tuple[int, int]]:
            return [(found.st_ino, found.st_size) for found in map(os.stat, files)]

        before = identities()
        for path in (*files, link, hard, roundabout):
            for label, verb in (
                ("export", db.export),
                ("export of another", other.export),
                ("import", db.import_),
                ("import into another", other.import_),
                ("backup", partial(db.backup, overwrite=True)),
                ("backup of another", partial(other.backup, overwrite=True)),
                ("metrics", db.write_metrics),
                ("metrics of another", other.write_metrics),
                ("restore", db.restore),  # into another one is allowed: it goes through SQLite
            ):
                with self.subTest(label, path=path):
                    self.assertRaises(OperatorDbError, verb, path)
                    self.assertEqual(identities(), before)
        self.assertIsNotNone(db.get_task("in the log"))
        try_to_lock = """if True:
            import fcntl
            for path in sys.argv[1:]:
                with open(path, "r+b") as file:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        print("locked")
            """
        tried = run_program(try_to_lock, self.path, self.path + "-shm")
        self.assertEqual(tried.stdout.split(), ["locked", "locked"])

    def test_a_database_that_another_process_has_open_is_not_replaced(self) -> None:
        db = self.open()
        write_bytes(self.other + "-wal", b"somebody's")
        for there in (False, True):
            if there:
                write_bytes(self.other, b"somebody's")
            for verb in (db.export, db.write_metrics, partial(db.backup, overwrite=True)):
                with self.subTest(verb=verb, there=there), self.assert_unchanged():
                    write = partial(verb, self.other)
                    self.assert_refused(StorageError, write, self.other + "-wal")
        self.assertEqual(read_bytes(self.other), b"somebody's")

    def test_a_database_that_was_closed_here_is_a_file_like_any_other(self) -> None:
        db, out = self.open(), BytesIO()
        db.export(out)
        for label, verb in (
            ("export", db.export),
            ("backup", partial(db.backup, overwrite=True)),
            ("metrics", db.write_metrics),
            ("restore", db.restore),
            ("import", db.import_),  # into what was restored
        ):
            with self.subTest(label):
                with OperatorDb(self.beside(label), durable=False) as closed:
                    store_tasks(closed, "old")
                if label == "import":
                    write_bytes(closed.path, out.getvalue())  # in the same inode
                verb(closed.path)
        self.assertEqual(len(task_ids(db)), 11)

    def test_none_never_means_the_default_path(self) -> None:
        defaults = named, _ = self.beside("named.db"), self.beside(".agenc/operator.db")
        os.mkdir(self.beside(".agenc"))
        db = self.open()
        db.export(self.file)
        db.backup(self.other)
        verbs = (db.export, db.import_, partial(db.backup, overwrite=True), db.restore)
        for source, environment in itertools.product((None, self.file, self.other), ("", named)):
            os.environ["AGENC_DB_PATH"] = environment
            content = read_bytes(source) if source else None
            for path in defaults if source else ():
                write_bytes(path, content)
            for verb in (*verbs, db.write_metrics):
                case = {"verb": verb, "source": source, "environment": environment}
                with self.subTest(**case), self.assert_unchanged():
                    self.assertRaises(OperatorDbError, verb, None)
            found = [read_bytes(path) if os.path.exists(path) else None for path in defaults]
            self.assertEqual(found, [content, content])

    def test_an_error_of_a_progress_function_is_passed_on_as_it_is(self) -> None:
        db, other, out = self.open(), self.open(self.other), BytesIO()
        db.export(self.file)
        db.backup(self.beside("backup.db"))
        verbs = (
            partial(db.export, self.beside("new")),
            partial(db.export, out),
            partial(db.backup, self.beside("new")),
            partial(other.import_, self.file),
            partial(other.restore, self.beside("backup.db")),
        )
        errors = (TimeoutError("mine"), BlockingIOError("mine"))
        for verb, error, late in itertools.product(verbs, errors, (False, True)):

            def progress(done: int, total: int, late: bool = late, error: OSError = error) -> None:
                if not late or (total and done >= total):
                    raise error

            with self.subTest(verb=verb, error=error, late=late), self.assert_unchanged(self.other):
                with self.assertRaises(OSError) as caught:
                    verb(progress=progress)
                self.assertIs(caught.exception, error)
        self.assertEqual(out.getvalue(), b"")

    def test_a_child_that_a_progress_function_forks_does_no_harm(self) -> None:
        """It ends there, and removes none of the files that its parent makes."""
        parent, content = os.getpid(), content_of(self.path)

        def fork_and_wait() -> None:
            if not (child := os.fork()):
                raise SystemExit
            os.waitpid(child, 0)

        for verb, part in itertools.product(("export", "backup"), (0.0, 1.0)):
            target = f"{self.file}-{verb}-{part}"
            try:
                with OperatorDb(self.path) as db:
                    options = {"include_secrets": True} if verb == "export" else {}
                    progress = at_progress(part, fork_and_wait)
                    getattr(db, verb)(target, progress=progress, **options)
            finally:
                if os.getpid() != parent:
                    os._exit(0)
            with self.subTest(verb=verb, part=part):
                if verb == "backup":
                    self.assertEqual(content_of(target), content)
                else:
                    self.assertEqual(set(content) - set(read_bytes(target).splitlines()), set())
        self.assertEqual(len(self.names()), 5)


Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse_prometheus(text: str) -> Samples:
    """Parse Prometheus's text format, more strictly than Prometheus does.

    Returns the values by the sample's name and labels, without `database`, which each has to have.
    """
    label = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
    kinds: dict[str, str] = {}
    found: Samples = {}
    assert text.startswith("# HELP ") and text.endswith("\n")
    for family in re.split(r"^# HELP ", text, flags=re.MULTILINE)[1:]:
        pattern = r"([a-z_]+) \S.*\n# TYPE \1 (counter|gauge|histogram)\n((?:.+\n)*)"
        match = re.fullmatch(pattern, family)
        assert match and match[1] not in kinds, family
        name, kinds[match[1]], lines = match.groups()
        assert name.endswith("_total") == (kinds[name] == "counter"), family
        suffixes = ("_bucket", "_sum", "_count") if kinds[name] == "histogram" else ("",)
        for line in lines.split("\n")[:-1]:
            match = re.fullmatch(rf"([a-z_]+)\{{({label}(?:,{label})*)\}} (\S+)", line)
            assert match and match[1].removeprefix(name) in suffixes, line
            (first, _), *labels = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2])
            values = found.setdefault(match[1], {})
            assert first == "database" and tuple(labels) not in values, line
            values[tuple(labels)] = float(match[3])
            assert 0 <= float(match[3]) < float("inf"), line
        if kinds[name] == "histogram":
            check_histogram(*(found[name + suffix] for suffix in suffixes))
    return found


def check_histogram(buckets: Any, sums: Any, counts: Any) -> None:
    """Fail unless the buckets of each set of labels are cumulative, up to the count of all."""
    series: dict[Any, list[tuple[float, float]]] = {}
    for (*labels, (last, bound)), count in buckets.items():
        assert last == "le"
        series.setdefault(tuple(labels), []).append((float(bound), count))
    for labels, steps in series.items():
        assert steps == sorted(steps), labels
        assert [count for _, count in steps] == sorted(count for _, count in steps), labels
        assert steps[-1] == (float("inf"), counts[labels]), labels
    assert series.keys() == sums.keys() == counts.keys()


class MetricsCountEveryCall(DatabaseTest):
    def test_every_call_of_sixteen_threads_is_counted_and_its_error_by_name(self) -> None:
        def work(worker: int) -> None:
            for n in range(6):
                store_tasks(db, f"{worker}:{n}")
                for _ in range(4):
                    db.get_task("t1")
                with suppress(NotFoundError):
                    db.update_task_status("nobody", "completed")
                with suppress(ConflictError):
                    db.store_proof(proof("t1", b"different"))
                with suppress(InvalidRecordError):
                    tallies.put(None)  # type: ignore[arg-type]
                tallies.get("one")

        fill(self.path, tasks=10)
        db = self.open()
        tallies = tallies_of(db)
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        began = time.perf_counter()
        run_in_threads(*(partial(work, worker) for worker in range(16)))
        elapsed = time.perf_counter() - began
        operations = db.stats().operations
        each = 16 * 6
        expected: dict[str, tuple[int, dict[str, int]]] = {
            "store_task": (each, {}),
            "get_task": (4 * each, {}),
            "update_task_status": (each, {"NotFoundError": each}),
            "store_proof": (each, {"ConflictError": each}),
            "tallies.put": (each, {"InvalidRecordError": each}),
            "tallies.get": (each, {}),
        }
        self.assertEqual(operations.keys() - {"stats"}, expected.keys())
        for name, (count, errors) in expected.items():
            with self.subTest(name=name):
                found = operations[name]
                self.assertEqual((found.count, found.errors), (count, errors))
                self.assertEqual(sum(found.buckets), count)
                self.assertTrue(0 < found.seconds < elapsed * 16)

    def test_a_latency_is_counted_in_its_bucket_and_added_to_the_sum(self) -> None:
        latency = operator_db.Latency()
        bounds = latency.bounds
        for times, bound in enumerate(bounds, 1):
            for _ in range(times):
                latency.add(bound)
        latency.add(0.0)
        latency.add(bounds[-1] * 2)
        times_each = list(range(1, len(bounds) + 1))
        self.assertEqual(latency.buckets, [times_each[0] + 1, *times_each[1:], 1])
        self.assertEqual(latency.count, sum(times_each) + 2)
        total = sum(times * bound for times, bound in enumerate(bounds, 1))
        self.assertAlmostEqual(latency.seconds, total + bounds[-1] * 2)
        self.assertEqual(bounds, tuple(sorted(bounds)))
        self.assertTrue(bounds[0] <= 1e-4 and bounds[-1] >= 1)

    def test_a_latency_counts_the_calls_of_several_threads(self) -> None:
        def work() -> None:
            for _ in range(20_000):
                latency.add(0.1)

        latency = operator_db.Latency()
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        run_in_threads(*[work] * 4)
        self.assertEqual(latency.count, 80_000)
        self.assertAlmostEqual(latency.seconds, 8000.0, 3)

    def test_counting_takes_fixed_memory_however_many_calls_there_were(self) -> None:
        db = self.open()
        for calls in (100, 3000):
            before = sys.getallocatedblocks()
            for _ in range(calls):
                db.get_task("t1")
            kept = sys.getallocatedblocks() - before
        self.assertLess(kept, 1000)

    def test_counting_begins_anew_in_a_forked_child(self) -> None:
        db = self.open()
        tallies_of(db).put(Tally(name="one"))
        store_tasks(db, "t")
        self.assertEqual(in_child(lambda: db.stats().operations), {})
        self.assertLessEqual({"store_task", "tallies.put"}, db.stats().operations.keys())

    def test_statistics_are_true_of_records_files_and_free_space(self) -> None:
        def pragma(name: str) -> Any:
            return self.sql(f"PRAGMA {name}")[0][0]

        fill(self.path, tasks=10)
        db = self.open()
        stats = db.stats()
        entries = [len(s.transcript) + len(s.command_history) for s in db.list_sessions()]
        records = {"tasks": 10, "sessions": 3, "session_log": sum(entries), "proofs": 5}
        self.assertEqual(stats.records, {**records, "config": 1, "tallies": 1})
        self.assertEqual(stats.tasks, db.count_tasks())
        self.assertEqual(set(stats.tasks.values()), {2})
        self.assertEqual(stats.unsubmitted_proofs, len(db.list_proofs(submitted=False)))
        self.assertEqual(stats.path, self.path)
        self.assertEqual(stats.schema_version, pragma("user_version"))
        for name, suffix in (("database", ""), ("wal", "-wal"), ("shm", "-shm")):
            self.assertEqual(stats.files[name], os.stat(self.path + suffix).st_size)
        self.assertEqual(stats.bytes.keys(), stats.records.keys())
        self.assertTrue(all(size >= 8192 for size in stats.bytes.values()), stats.bytes)
        self.assertLessEqual(sum(stats.bytes.values()) + stats.free, stats.files["database"])
        store_tasks(db, "large", payload=bytes(2_000_000))
        db.delete_task("large")
        free = db.stats().free
        self.assertEqual(free, pragma("freelist_count") * pragma("page_size"))
        self.assertGreater(free, 10**6)

    def test_statistics_have_no_sizes_by_namespace_where_sqlite_cannot_tell_them(self) -> None:
        def refuse_dbstat(action: int, table: str | None, *_: object) -> int:
            return sqlite3.SQLITE_DENY if table == "dbstat" else sqlite3.SQLITE_OK

        connections = self.watch_connections()
        db = self.open()
        self.assertIn("operator_db_namespace_bytes", parse_prometheus(db.prometheus()))
        for connection in connections:
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it is closed by now
                connection.set_authorizer(refuse_dbstat)
        stats, text = db.stats(), db.prometheus()
        self.assertEqual(stats.bytes, {})
        self.assertEqual(stats.records["tasks"], 0)
        self.assertNotIn("operator_db_namespace_bytes", parse_prometheus(text))

    def test_the_prometheus_text_has_what_stats_returns(self) -> None:
        fill(self.path, tasks=10)
        db = self.open()
        store_tasks(db, "t")
        devices_of(db).put(PairedDevice(device_id="d"))
        with suppress(NotFoundError):
            db.update_task_status("nobody", "completed")
        found, stats = parse_prometheus(db.prometheus()), db.stats()
        labelled: dict[str, tuple[str, dict[Any, int]]] = {
            "records": ("namespace", stats.records),
            "namespace_bytes": ("namespace", stats.bytes),
            "tasks": ("status", stats.tasks),
            "file_bytes": ("file", stats.files),
        }
        for name, (label, values) in labelled.items():
            samples = {((label, str(key)),): value for key, value in values.items()}
            self.assertEqual(found[f"operator_db_{name}"], samples)
        self.assertEqual(found["operator_db_unsubmitted_proofs"], {(): stats.unsubmitted_proofs})
        self.assertEqual(found["operator_db_free_bytes"], {(): stats.free})
        counts = found["operator_db_operation_duration_seconds_count"]
        counted = {labels[0][1]: count for labels, count in counts.items() if count}
        self.assertEqual(counted, {"store_task": 1, "devices.put": 1, "update_task_status": 1})
        failed = (("operation", "update_task_status"), ("error", "NotFoundError"))
        self.assertEqual(found["operator_db_operation_errors_total"], {failed: 1})
        self.assertTrue(all(name.startswith("operator_db_") for name in found))

    def test_the_prometheus_text_names_the_database_whatever_its_path_holds(self) -> None:
        db = self.open(self.beside('a "b"\\\n.db'))
        text = db.prometheus()
        parse_prometheus(text)
        self.assertIn(r'a \"b\"\\\n.db"', text)

    def test_a_metrics_file_is_replaced_as_a_whole_and_others_can_read_it(self) -> None:
        db = self.open()
        target = self.beside("operator_db.prom")
        for umask in (0o000, 0o022, 0o077):
            self.addCleanup(os.umask, os.umask(umask))  # which returns the one before
            db.write_metrics(target)
            with open(target, encoding="utf-8") as file:
                self.assertEqual(stat.S_IMODE(os.stat(target).st_mode), 0o644)
                db.write_metrics(Path(target))
                self.assertNotEqual(os.stat(target).st_ino, os.fstat(file.fileno()).st_ino)
                parse_prometheus(file.read())  # who reads meanwhile goes on with the old one, whole
        self.assertEqual(self.names(), {"operator.db", "operator_db.prom"})

    def test_a_metrics_file_stays_as_it_was_when_the_disk_is_full(self) -> None:
        def without_room() -> None:
            db.stats()
            with file_size_limit(100):
                self.assert_refused(StorageError, lambda: db.write_metrics(target), target)

        db = self.open()
        target = self.beside("operator_db.prom")
        db.write_metrics(target)
        before = read_bytes(target)
        in_child(without_room)
        self.assertEqual(read_bytes(target), before)
        self.assertEqual(self.names(), {"operator.db", "operator_db.prom"})


# What takes over a terminal, moves its cursor, reverses its text or is invisible; then what is wide
STEERING = "\x1b]0;owned\x07\r\n\t\x9b31m\u202e\u200b é漢字\U0001f600"
INSPECTIONS = (
    "stats",
    "stats --prometheus",
    "list-tasks",
    "list-tasks --status completed",
    "list-proofs",
    "list-sessions",
    "get tasks:t1",
    "get sessions:voice",
    "get config:operator",
    "get tallies:one",
    "keys tasks",
    "check",
    "export",
    "prune --dry-run",
    "dispute t1",
)


def on_screen(text: str) -> list[str]:
    """Return what each column of a terminal shows of a line; a wide character takes two."""
    columns: list[str] = []
    for character in text:
        if columns and unicodedata.category(character) in ("Mn", "Me", "Cf"):
            columns[-1] += character
        elif unicodedata.east_asian_width(character) in "WF":
            columns += (character, "")
        else:
            columns.append(character)
    return columns


def steering_characters(text: str) -> list[str]:
    """Return the characters of a printed text that do more than stand there."""
    return [character for character in text if not character.isprintable() and character != "\n"]


class CommandLineTest(DatabaseTest):
    """A database with some of everything, and commands that run in this process or as a program."""

    def setUp(self) -> None:
        super().setUp()
        os.environ["AGENC_DB_PATH"] = self.path
        for name in ("COLUMNS", "LINES", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "LC_ALL"):
            os.environ.pop(name, None)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        fill(self.path, tasks=10)
        now, chinese = int(time.time()), "漢字"
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, "é字\U0001f600", claimed_at=now - 3 * DAY, description=STEERING)
            rich = {"claimed_at": now, "reward_lamports": 1_500_000_000}
            store_tasks(db, chinese * 12, description=f"{chinese} é " * 30, **rich)
            store_tasks(db, "odd", claimed_at=2**63 - 1, reward_skr_tokens=7)
            store_tasks(db, "ที่นี่", description="combined")
            db.append_transcript("voice", "user", STEERING + chinese * 50)
            db.store_config(OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=[SECRET]))

    def run_command(
        self, *arguments: str, stdin: bytes = b"", encoding: str = "utf-8"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this process, with standard streams of an encoding."""
        out, err = BytesIO(), BytesIO()
        streams: dict[str, Any] = {
            "stdin": TextIOWrapper(BytesIO(stdin), encoding=encoding),
            "stdout": TextIOWrapper(out, encoding=encoding),
            "stderr": TextIOWrapper(err, encoding=encoding),
        }
        with mock.patch.multiple(sys, **streams):
            try:
                status = operator_db.main(list(arguments))
            except SystemExit as ended:
                status = int(ended.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
        printed = out.getvalue().decode("utf-8" if "export" in arguments else encoding)
        return subprocess.CompletedProcess(
            arguments, status, printed, err.getvalue().decode(encoding)
        )

    def printed(self, *arguments: str, status: int = 0, **options: Any) -> str:
        """Return what a command prints; fail unless it ends with this status, and no message."""
        done = self.run_command(*arguments, **options)
        self.assertEqual((done.returncode, done.stderr), (status, ""), arguments)
        return done.stdout

    def facts(self, *arguments: str, status: int = 0, **options: Any) -> Any:
        """Return what a command prints with `--json`."""
        return json.loads(self.printed(*arguments, "--json", status=status, **options))

    def failure(self, *arguments: str, **options: Any) -> str:
        """Return the one line that a command prints when it fails, as it must."""
        done = self.run_command(*arguments, **options)
        self.assertEqual((done.returncode, done.stdout), (1, ""), arguments)
        self.assertRegex(done.stderr, r"\Aoperator_db: .+\n\Z")
        self.assertEqual(steering_characters(done.stderr), [])
        return done.stderr

    def in_shell(
        self, line: str, *, python: tuple[str, ...] = ("-m", "operator_db"), **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the module as a program, with arguments and redirections as one types them."""
        shell = ["sh", "-c", f"exec {shlex.join([sys.executable, *python])} {line}"]
        defaults = {"capture_output": True, "text": True, "timeout": 20}
        return subprocess.run(shell, check=False, **{**defaults, **options})

    def on_terminal(self, columns: int, *arguments: str) -> str:
        """Return what a command sends to a terminal of this width, on both of its outputs."""
        controller, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        sent: list[bytes] = []

        def watch() -> None:
            with suppress(OSError):  # EIO, when the terminal is closed
                while part := os.read(controller, 65536):
                    sent.append(part)

        with in_background(watch), open(terminal, "w", encoding="utf-8") as screen:
            streams: dict[str, Any] = dict.fromkeys(("stdout", "stderr", "__stdout__"), screen)
            with mock.patch.multiple(sys, **streams), suppress(SystemExit):
                operator_db.main(list(arguments))
        os.close(controller)
        return b"".join(sent).decode().replace("\r\n", "\n")


class CommandsDoWhatTheApiDoes(CommandLineTest):
    def test_each_inspection_gives_programs_what_the_api_returns(self) -> None:
        header, *lines = map(json.loads, self.printed("export").splitlines())
        ids = {"tasks": "task_id", "proofs": "task_id", "sessions": "session_id", "tallies": "name"}
        exported = {
            (line["namespace"], line["record"].get(ids.get(line["namespace"]))): line["record"]
            for line in lines
        }
        self.assertEqual(sum(header["records"].values()), len(lines))
        self.assertEqual(exported["config", None]["keypairs"], "***")
        db = self.open()
        stats = {name: value for name, value in vars(db.stats()).items() if name != "operations"}
        bundle = db.dispute_bundle("t1")
        digest = bundle["evidence_hash"]
        age = 40_000  # days, which no record has reached
        write_bytes(self.file, json.dumps(bundle).encode())

        def listed(namespace: str, found: Iterable[Any]) -> list[Any]:
            return [exported[namespace, record.task_id] for record in found]

        sessions = [exported["sessions", session.session_id] for session in db.list_sessions()]
        latest = db.list_tasks(limit=3, newest_first=True)
        wanted: dict[str, Any] = {
            "stats": stats,
            "list-tasks": listed("tasks", db.list_tasks()),
            "list-tasks --status InProgress": listed(
                "tasks", db.list_tasks_by_status("in_progress")
            ),
            "list-tasks --limit 3 --newest-first": listed("tasks", latest),
            "list-proofs": listed("proofs", db.list_proofs()),
            "list-proofs --limit 2": listed("proofs", db.list_proofs(limit=2)),
            "list-proofs --unsubmitted": listed("proofs", db.list_proofs(submitted=False)),
            "list-sessions": sessions,
            "list-sessions --limit 2": sessions[:2],
            "get tasks:t1": exported["tasks", "t1"],
            "get proofs:t1": exported["proofs", "t1"],
            "get sessions:voice": exported["sessions", "voice"],
            "get tallies:one": exported["tallies", "one"],
            "get config:operator": exported["config", None],
            "keys tasks": [f"tasks:{each}" for each in task_ids(db)],
            "keys sessions": [f"sessions:{name}" for name in ("s0", "s1", "s2", "voice")],
            "keys tallies": ["tallies:one"],
            "prune --dry-run": vars(db.prune(dry_run=True)),
            f"prune --dry-run --older-than {age}": vars(db.prune(age, dry_run=True)),
            f"prune --dry-run --session-days {age}": vars(db.prune(30, age, dry_run=True)),
            "prune --dry-run --proof-days 1": vars(db.prune(proof_days=1, dry_run=True)),
            "check": {"path": self.path, "problems": []},
            "dispute t1": bundle,
            f"verify {self.file}": {"problems": [], "evidence_hash": None},
            f"verify {self.file} --evidence-hash {digest}": {
                "problems": [],
                "evidence_hash": digest,
            },
        }
        for command, facts in wanted.items():
            with self.subTest(command=command):
                self.assertEqual(self.facts(*command.split()), json.loads(json.dumps(facts)))
        here = parse_prometheus(self.printed("stats", "--prometheus"))
        there = parse_prometheus(db.prometheus())
        for name in ("tasks", "records", "unsubmitted_proofs"):
            self.assertEqual(here[f"operator_db_{name}"], there[f"operator_db_{name}"])

    def test_each_change_is_made_and_its_result_reported(self) -> None:
        before = content_of(self.path)
        self.assertEqual(self.printed("export", "-o", self.file, "--include-secrets"), "")
        self.assertEqual(read_bytes(self.file).splitlines()[1:], before)
        copied = self.facts("backup", self.other)
        self.assertEqual(copied, {"path": self.other, "bytes": os.stat(self.other).st_size})
        self.assertEqual(self.facts("backup", self.other, "--overwrite"), copied)
        days = ("--older-than", "0", "--session-days", "1", "--proof-days", "1")
        removed = self.facts("prune", *days)
        self.assertEqual([removed[name] for name in ("tasks", "sessions", "proofs")], [2, 3, 1])
        self.assertEqual(self.facts("compact")["bytes"], os.stat(self.path).st_size)
        self.assertEqual(len(content_of(self.path)), len(before) - 6)
        counts = self.facts("import", self.file)
        self.assertEqual(counts["sessions"], {"added": 3, "unchanged": 1})
        self.assertEqual(counts["proofs"], {"added": 1, "unchanged": 4})
        self.assertEqual(content_of(self.path), before)
        counts = self.facts("import", "-", stdin=read_bytes(self.file))
        self.assertEqual(counts["tasks"], {"unchanged": 14})
        os.unlink(self.path)
        self.assertEqual(self.facts("restore", self.other)["records"]["tasks"], 14)
        self.assertEqual(content_of(self.path), before)
        self.printed("stats", "--prometheus", "-o", self.file)
        self.assertIn("operator_db_tasks", parse_prometheus(read_bytes(self.file).decode()))
        for command in ("prune", "compact", f"restore {self.other}", f"backup {self.file}2"):
            self.assertRegex(self.printed(*command.split()), r"\d")

    def test_an_import_from_the_prototype_reports_the_proofs_that_it_lacks(self) -> None:
        write_bytes(self.file, PROTOTYPE_EXPORT.encode())
        self.assertRegex(self.printed("import", self.file), r"(?mi)^(?=.*prototype).*proofs")
        self.assertIn("left_behind", self.facts("import", self.file)["proofs"])

    def test_the_path_comes_from_the_option_else_the_environment_else_the_home(self) -> None:
        wanted = [f"proofs:t{n}" for n in range(1, 10, 2)]
        for environment in ({}, {"AGENC_DB_PATH": self.other}):
            os.environ.pop("AGENC_DB_PATH")
            os.environ |= environment
            for arguments in (
                ("--json", "--db-path", self.path, "keys", "proofs"),
                ("--db-path", self.path, "keys", "--json", "proofs"),
                ("--db-path", self.other, "keys", "proofs", "--json", f"--db-path={self.path}"),
            ):
                with self.subTest(arguments=arguments, environment=environment):
                    self.assertEqual(json.loads(self.printed(*arguments)), wanted)
            os.environ["AGENC_DB_PATH"] = self.path
            self.assertEqual(self.facts("keys", "proofs"), wanted)
        del os.environ["AGENC_DB_PATH"]
        os.mkdir(self.beside(".agenc"))
        os.rename(self.path, self.beside(".agenc/operator.db"))
        self.assertEqual(self.facts("keys", "proofs"), wanted)

    def test_import_and_restore_make_a_database_only_of_what_is_good(self) -> None:
        backup = self.beside("backup.db")
        self.printed("export", "-o", self.file, "--include-secrets")
        self.printed("backup", backup)
        for verb, source in (("import", self.file), ("restore", backup)):
            whole = read_bytes(source)
            wrong = whole.replace(b'"claimed_at"', b'"claimed_by"')
            for bad in (b"", b"text " * 200, whole[: len(whole) // 2], wrong):
                write_bytes(source, bad)
                for path in (source, "-") if verb == "import" else (source,):
                    with self.subTest(verb=verb, bad=bad[:20], path=path), self.assert_unchanged():
                        self.failure("--db-path", self.other, verb, path, stdin=bad)
            write_bytes(source, whole)
            before = os.umask(0)
            self.addCleanup(os.umask, before)
            self.printed("--db-path", self.other, verb, source)
            os.umask(before)
            self.assertEqual(content_of(self.other), content_of(self.path))
            self.assertEqual(stat.S_IMODE(os.stat(self.other).st_mode), 0o600)
            os.unlink(self.other)
        self.assertEqual(self.names(), {"operator.db", "operator.jsonl", "backup.db"})

    def test_a_pipe_given_by_its_name_is_read_and_written(self) -> None:
        def through_pipe(*arguments: str, send: bytes = b"") -> bytes:
            """Run a command on one end of a pipe; send it something or return what it sends."""
            ours, theirs = reversed(os.pipe()) if send else os.pipe()
            received: list[bytes] = []

            def command() -> None:
                try:
                    self.printed(*arguments, f"/dev/fd/{theirs}")
                finally:
                    os.close(theirs)

            def other_end() -> None:
                with open(ours, "wb" if send else "rb") as pipe:
                    received.append(b"" if send and pipe.write(send) else pipe.read())

            run_in_threads(command, other_end)
            return received[0]

        exported = through_pipe("export", "--include-secrets", "-o")
        self.assertEqual(exported.splitlines()[1:], content_of(self.path))
        through_pipe("--db-path", self.other, "import", send=exported)
        self.assertEqual(content_of(self.other), content_of(self.path))
        metrics = through_pipe("stats", "--prometheus", "-o")
        self.assertIn("operator_db_tasks", parse_prometheus(metrics.decode()))

    def test_a_log_given_by_its_name_is_appended_to(self) -> None:
        records = content_of(self.path)
        write_bytes(self.file, b"kept\n")
        inode = os.stat(self.file).st_ino
        done = self.in_shell(f"export --include-secrets -o /dev/stdout >> {self.file}")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        with open(self.file, "ab") as log:
            self.printed("export", "--include-secrets", "-o", f"/dev/fd/{log.fileno()}")
        kept, *lines = read_bytes(self.file).splitlines()
        self.assertEqual((kept, os.stat(self.file).st_ino), (b"kept", inode))
        half = len(records) + 1  # with a header each
        self.assertEqual([lines[1:half], lines[half + 1 :]], [records, records])

    def test_the_help_lists_each_command_and_each_has_an_example_that_runs(self) -> None:
        self.assertIn(operator_db.__version__, self.printed("--version"))
        commands = re.findall(r"^ +([a-z][a-z-]*) {2,}\S", self.printed("--help"), re.MULTILINE)
        self.assertEqual(
            " ".join(sorted(commands)),
            "backup check compact dispute export get import keys list-proofs list-sessions "
            "list-tasks prune restore stats verify",
        )
        os.environ["AGENC_DB_PATH"] = missing = self.beside("missing.db")
        for command in commands:
            with self.subTest(command=command):
                text = self.printed(command, "--help")
                self.assertIn("--db-path PATH", text)
                self.assertIn("--json", text)
                pattern = rf"^ +\S*python3? operator_db\.py ({command}.*)$"
                (example,) = re.findall(pattern, text, re.MULTILINE)
                arguments = shlex.split(example.partition(">")[0])
                message = self.failure(*arguments)  # there is nothing to work on, and only that
                reason = arguments[1] if command in ("import", "restore", "verify") else missing
                self.assertIn(reason, message)
        self.assertEqual(self.names(), {"operator.db"})


class OutputIsMadeForPeople(CommandLineTest):
    def table(self, text: str) -> list[dict[str, str]]:
        """Return the rows of a printed table; fail unless each cell stands below its title."""
        head, *lines = text.splitlines()
        titles = list(re.finditer(r"\S+(?: \S+)*", head))
        starts = [title.start() for title in titles]
        rows = []
        for line in lines:
            columns = on_screen(line.ljust(200))
            self.assertEqual({"".join(columns[start - 2 : start]) for start in starts[1:]}, {"  "})
            cells = ["".join(columns[slice(*ends)]) for ends in itertools.pairwise([*starts, None])]
            for cell in cells:
                self.assertTrue(cell[0] != " " or not cell.strip(), line)
            titled = zip((title[0] for title in titles), map(str.rstrip, cells), strict=True)
            rows.append(dict(titled))
        return rows

    def test_nothing_printed_steers_the_terminal_and_all_fits_every_encoding(self) -> None:
        for command in INSPECTIONS:
            facts = []
            for encoding, flags in itertools.product(("utf-8", "ascii"), ((), ("--json",))):
                with self.subTest(encoding=encoding, command=command, flags=flags):
                    text = self.printed(*command.split(), *flags, encoding=encoding)
                    if command == "export":
                        continue  # for programs, and always UTF-8
                    self.assertEqual(steering_characters(text), [])
                    if flags and "--prometheus" not in command:
                        facts.append(json.loads(text))
            self.assertEqual(facts[1:], facts[:1])
        for key in ("tasks:\x1b[2J", "x\x1b:\r\n"):
            self.failure("get", key)
        environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = self.in_shell("list-tasks", env=environment)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, self.printed("list-tasks", encoding="ascii"))

    def test_a_wrong_argument_is_shown_without_steering_the_terminal(self) -> None:
        for command in (
            ("stats", STEERING),
            ("stats", f"--{STEERING}"),
            (STEERING,),
            ("prune", "--older-than", STEERING),
            ("list-tasks", "--status", STEERING),
            ("get", STEERING),
            ("verify", self.file, "--evidence-hash", STEERING),
        ):
            with self.subTest(command=command):
                done = self.run_command(*command)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertEqual(steering_characters(done.stderr), [])
                self.assertIn("owned", done.stderr)

    def test_a_table_in_a_pipe_is_aligned_and_whole(self) -> None:
        rows = {row["task"]: row for row in self.table(self.printed("list-tasks"))}
        with OperatorDb(self.path) as db:
            tasks = {task.task_id: task for task in db.list_tasks()}
        self.assertEqual(list(rows), list(tasks))
        for task_id, row in rows.items():
            self.assertEqual(list(row), ["task", "status", "since", "reward", "description"])
            self.assertEqual(row["status"], tasks[task_id].status)
            if "\n" not in (description := tasks[task_id].description or ""):
                self.assertEqual(row["description"], description.rstrip())

    def test_times_amounts_and_sizes_are_as_people_read_them(self) -> None:
        rows = {row["task"]: row for row in self.table(self.printed("list-tasks"))}
        self.assertRegex(rows["é字\U0001f600"]["since"], r"\d{4}-\d\d-\d\d \d\d:\d\d \(3 d ago\)")
        self.assertIn("(now)", rows["漢字" * 12]["since"])
        self.assertIn("1970-01-01 00:00", rows["t0"]["since"])
        self.assertEqual(rows["漢字" * 12]["reward"], "1.5 SOL")
        self.assertEqual(rows["odd"]["reward"], "7 SKR units")
        with OperatorDb(self.path, durable=False) as db:
            store_tasks(db, "large", payload=bytes(1_500_000))
        self.assertRegex(self.printed("stats"), r"\d\.\d MiB")

    def test_numbers_to_compare_are_drawn_as_bars(self) -> None:
        tasks = self.facts("stats")["tasks"]
        for encoding, block in (("utf-8", "█"), ("ascii", "#")):
            text = self.printed("stats", encoding=encoding)
            bars = dict(re.findall(rf"^(\w+) +\d+ *({block}*)$", text, re.MULTILINE))
            for one, other in itertools.product(tasks, tasks):
                self.assertEqual(tasks[one] > tasks[other], len(bars[one]) > len(bars[other]))
            self.assertIn(block * 20, text.partition("bytes")[2])

    def test_a_table_fits_the_terminal(self) -> None:
        commands = ("stats", "list-tasks", "list-proofs", "list-sessions")
        for columns, command in itertools.product((20, 40, 80, 132), commands):
            with self.subTest(columns=columns, command=command):
                lines = self.on_terminal(columns, command).splitlines()
                self.assertLessEqual(max(len(on_screen(line)) for line in lines), columns)
                self.assertGreater(len(lines), 3)

    def test_a_table_on_a_narrow_terminal_marks_what_it_cut_and_keeps_numbers_in_line(self) -> None:
        with OperatorDb(self.path, durable=False) as db:
            for n in range(12):
                db.append_command("voice", f"command {n}")
            store_tasks(db, "long", description="é" * 100_000, claimed_at=0)
        _, *rows = self.on_terminal(40, "list-tasks").splitlines()
        for row in rows:
            cells = re.split(" {2,}", row)
            self.assertTrue(all(cell.endswith("…") for cell in cells[1:3]), row)
        self.assertTrue(next(row for row in rows if row.startswith("long")).endswith("éé…"), rows)
        _, *rows = self.on_terminal(40, "list-sessions").splitlines()
        ends = [[match.end() for match in re.finditer(r"(?<= )\d+(?= )", row)] for row in rows]
        self.assertEqual(ends, [ends[0]] * 4)
        self.assertEqual(len(ends[0]), 2)

    def test_the_help_fits_the_terminal(self) -> None:
        commands = ("", "stats", "prune", "verify", "get")
        for columns, command in itertools.product((60, 80, 132), commands):
            with self.subTest(columns=columns, command=command):
                text = self.on_terminal(columns, *command.split(), "--help")
                lines = [line for line in text.splitlines() if " python " not in line]  # to copy
                self.assertLessEqual(max(map(len, lines)), columns)

    def test_long_work_is_a_progress_bar_on_a_terminal_and_nothing_elsewhere(self) -> None:
        for columns in (20, 40, 80):
            sent = self.on_terminal(columns, "export", "-o", self.file)
            self.assertRegex(sent, r"^\rexport\b.*\d%")
            self.assertTrue(sent.endswith("\r\x1b[K"), sent)  # it is erased
            for part in re.split(r"\r|\x1b\[K", sent):
                self.assertLess(len(on_screen(part)), columns)
        self.assertEqual(self.printed("export", "-o", self.file), "")
        self.assertRegex(self.on_terminal(80, "backup", self.other), r"^\rbackup\b[^\n]*%[^\n]*\n")


class InspectionChangesNothing(CommandLineTest):
    def test_an_inspection_beside_a_running_operator_is_consistent_and_does_not_block_it(
        self,
    ) -> None:
        def operate(say: Say) -> None:
            with OperatorDb(self.path, durable=False, timeout=0) as db:  # waiting is an error
                for n in itertools.count():
                    with db.transaction():
                        store_tasks(db, f"a{n % 300}", f"z{n % 300}", reward_lamports=n)
                    if n % 20 == 0:
                        say(n)

        def assert_consistent(tasks: list[dict[str, Any]]) -> None:
            rewards = {task["task_id"]: task["reward_lamports"] for task in tasks}
            pairs = [name[1:] for name in rewards if name.startswith("a")]
            self.assertGreater(len(pairs), 0)
            self.assertEqual(
                [rewards.get(f"a{name}") for name in pairs],
                [rewards.get(f"z{name}") for name in pairs],
            )
            self.assertEqual(len(tasks), 14 + 2 * len(pairs))

        operator = Child(operate)
        operator.line()
        names = set(os.listdir(self.folder))
        for command in INSPECTIONS:
            operator.line()
            self.printed(*command.split())
        assert_consistent(self.facts("list-tasks"))
        operator.line()
        lines = list(map(json.loads, self.printed("export").splitlines()))
        assert_consistent([line["record"] for line in lines if line.get("namespace") == "tasks"])
        operator.line()
        stats = self.facts("stats")
        self.assertEqual(stats["records"]["tasks"], sum(stats["tasks"].values()))
        self.assertEqual(stats["records"]["tasks"] % 2, 0)
        self.facts("backup", self.other)
        self.assertEqual(set(os.listdir(self.folder)), names | {"other.db"})
        operator.line()
        operator.kill()
        self.assert_sound()
        self.assert_sound(self.other)

    def test_an_inspection_works_where_nothing_can_be_written(self) -> None:
        self.enterContext(mock.patch("time.time", return_value=time.time()))
        wanted = {command: self.printed(*command.split()) for command in INSPECTIONS}

        def look() -> None:
            os.chmod(self.path, 0o400)
            os.chmod(self.folder, 0o500)
            for command, text in wanted.items():
                found = self.printed(*command.split())
                if "stats" not in command:  # which tell the sizes of what is beside the file
                    self.assertEqual(found, text, command)
            self.assertEqual(os.listdir(self.folder), ["operator.db"])

        with self.assert_bytes_unchanged():
            try:
                as_nobody(self.folder, look)
            finally:
                os.chmod(self.folder, 0o700)

    def test_what_is_no_database_of_ours_is_named_and_left_alone(self) -> None:
        names = ("text", "redb", "theirs", "newer", "unreadable", "missing", "missing/below")
        places = {name: self.beside(name) for name in (*names, "text/below")}
        write_bytes(places["text"], b"some text " * 99)
        write_bytes(places["redb"], b"redb\x1a\n\xa9\r\n" + bytes(5000))
        write_bytes(places["newer"], read_bytes(self.path))
        write_bytes(places["unreadable"], read_bytes(self.path))
        self.sql("CREATE TABLE theirs(a)", path=places["theirs"])
        self.sql("PRAGMA user_version = 99", path=places["newer"])
        places["folder"] = self.folder
        commands = ("stats", "list-tasks", "check", "export", "prune --dry-run", "prune", "compact")

        def state() -> dict[str, tuple[int, int]]:
            found = {name: os.stat(name) for name in (".", *os.listdir(self.folder))}
            return {name: (each.st_mtime_ns, each.st_size) for name, each in found.items()}

        def look() -> None:
            os.chmod(places["unreadable"], 0)
            before = state()
            for (name, path), command in itertools.product(places.items(), commands):
                message = self.failure("--db-path", path, *command.split())
                self.assertIn(path, message, name)
            self.assertEqual(state(), before)

        self.printed("prune", "--dry-run")  # import what is imported late, while it can be read
        as_nobody(self.folder, look)

    def test_a_database_that_may_not_be_reached_or_written_is_named(self) -> None:
        self.printed("export", "-o", self.file)
        self.printed("backup", self.other)
        self.printed("--db-path", self.other, "import", self.file)  # import what is imported late
        locked, within = self.beside("locked"), self.beside("locked/operator.db")
        os.mkdir(locked)
        shutil.copy(self.path, within)
        changes = (("prune",), ("compact",), ("import", self.file), ("restore", self.other))

        def look() -> None:
            os.chmod(locked, 0)
            os.chmod(self.path, 0o400)
            names, before = os.listdir(self.folder), os.stat(self.path)
            for command in (("stats",), ("check",), *changes):
                message = self.failure("--db-path", within, *command)
                self.assertIn(os.strerror(errno.EACCES), message)
                self.assertIn(within, message)
            for command in changes:
                self.assertIn(self.path, self.failure(*command))
            self.assertEqual(os.listdir(self.folder), names)
            self.assertEqual(os.stat(self.path).st_mtime_ns, before.st_mtime_ns)

        try:
            as_nobody(self.folder, look)
        finally:
            os.chmod(locked, 0o700)


class ProgramsEndCleanly(CommandLineTest):
    def test_a_command_that_fails_is_status_1_and_one_line_that_names_the_reason(self) -> None:
        write_bytes(self.file, b'{"an export": false}')
        cases = (
            ("get tasks:nobody", "tasks:nobody"),
            ("get nothing:x", "nothing"),
            ("keys nothing", "nothing"),
            ("keys session_log", "session_log"),
            ("dispute t0", "t0"),
            ("import missing", "missing"),
            ("restore missing", "missing"),
            ("verify missing", "missing"),
            (f"import {self.path}", self.path),
            (f"import {self.file}", ""),
            (f"restore {self.file}", self.file),
            (f"backup {self.path}", self.path),
            (f"backup {self.file}", self.file),
            ("export -o missing/file", "missing/file"),
            ("stats --prometheus -o missing/file", "missing/file"),
        )
        with self.assert_unchanged():
            for command, word in cases:
                with self.subTest(command=command):
                    self.assertIn(word, self.failure(*command.split()))

    def test_a_problem_found_is_status_1(self) -> None:
        bundle = self.facts("dispute", "t1")
        write_bytes(self.file, json.dumps(bundle).encode())
        other_hash = ("--evidence-hash", "ab" * 32)
        self.assertIn("evidence", self.printed("verify", self.file, *other_hash, status=1))
        write_bytes(self.file, json.dumps({**bundle, "evidence_hash": "00"}).encode())
        self.assertIn("evidence_hash", self.printed("verify", self.file, status=1))
        self.assertEqual(len(self.facts("verify", self.file, status=1)["problems"]), 1)
        self.damage("tasks:t3")
        self.assertIn("tasks:t3", self.printed("check", status=1))
        (problem,) = self.facts("check", status=1)["problems"]
        self.assertIn("tasks:t3", problem)
        self.assertIn("tasks:t3", self.failure("list-tasks"))

    def test_a_wrong_command_line_is_status_2_and_names_what_is_wrong(self) -> None:
        cases = (
            ("nothing", "nothing"),
            ("stats --nothing", "--nothing"),
            ("stats more", "more"),
            (f"stats -o {self.file}", "--prometheus"),
            (f"stats --json -o {self.file}", "--prometheus"),
            ("list-tasks --status lost", "lost"),
            ("list-tasks --limit -1", "-1"),
            ("list-tasks --stat claimed", "--stat"),
            ("get", "KEY"),
            ("get tasks", "tasks"),
            ("keys", "NAMESPACE"),
            ("prune --older-than soon", "soon"),
            ("prune --older-than -1", "-1"),
            ("prune --session-days nan", "nan"),
            ("backup", "DEST"),
            ("import", "FILE"),
            ("restore", "SRC"),
            ("dispute", "TASK_ID"),
            ("verify", "FILE"),
            ("verify x --evidence-hash abc", "abc"),
            ("--json=5 stats", "--json"),
        )
        with self.assert_unchanged():
            for command, word in cases:
                with self.subTest(command=command):
                    done = self.run_command(*command.split())
                    self.assertEqual((done.returncode, done.stdout), (2, ""))
                    self.assertIn(word, done.stderr.splitlines()[-1])

    def test_a_program_ends_quietly_when_nobody_reads_on(self) -> None:
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"many{n}" for n in range(900)), description="x" * 200)
        for command in ("list-tasks", "export", "keys tasks --json"):
            with self.subTest(command=command):
                done = self.in_shell(f"{command} | head -n 1")
                self.assertEqual((done.stdout.count("\n"), done.stderr), (1, ""))

    def test_a_full_standard_output_is_status_1_and_one_line(self) -> None:
        for command in ("list-tasks", "export", "stats --json", "stats --help"):
            with self.subTest(command=command):
                done = self.in_shell(f"{command} > /dev/full")
                self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
                self.assertIn(os.strerror(errno.ENOSPC), done.stderr)

    def test_a_program_works_without_standard_output(self) -> None:
        for command in ("list-tasks", "export", f"backup {self.other}"):
            with self.subTest(command=command):
                done = self.in_shell(f"{command} >&-")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(content_of(self.other), content_of(self.path))

    def test_an_import_without_standard_input_is_status_1_and_one_line(self) -> None:
        done = self.in_shell("import - <&-")
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1))

    def test_a_program_works_whatever_its_name_and_without_docstrings(self) -> None:
        renamed = shutil.copy(HERE / "operator_db.py", self.beside("odb renamed"))
        for line, flags, word in (("stats --help", ["-OO"], "--prometheus"), ("", [], self.path)):
            with self.subTest(line=line):
                done = self.in_shell(line, python=(*flags, renamed))
                self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
                self.assertIn(word, done.stdout)

    def test_a_program_told_to_end_leaves_nothing_behind(self) -> None:
        started = export_of().getvalue() + b"\n" * 200_000  # more than a pipe holds: it is read
        for path, number in ((self.other, signal.SIGTERM), (self.path, signal.SIGHUP)):
            with self.subTest(path=path), self.assert_unchanged():
                command = [sys.executable, "-m", "operator_db", "--db-path", path, "import", "-"]
                pipes: dict[str, Any] = dict.fromkeys(
                    ("stdin", "stdout", "stderr"), subprocess.PIPE
                )
                with subprocess.Popen(command, **pipes) as program:
                    assert program.stdin
                    program.stdin.write(started)
                    program.stdin.flush()
                    program.send_signal(number)
                    self.assertEqual(program.communicate(), (b"", b""))
                self.assertEqual(program.returncode, 128 + number)

    def test_a_program_told_to_end_as_its_file_is_completed_leaves_nothing_behind(self) -> None:
        cases = (
            ("export", ("-o", self.file), ("fsync",)),
            ("backup", (self.other,), ("link", "rename", "replace")),
        )
        for command, arguments, moments in cases:
            with self.subTest(command=command), self.assert_unchanged():
                done = run_program(
                    f"""if True:
                    import os, runpy, signal
                    for name in {moments!r}:
                        setattr(os, name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
                    runpy.run_module("operator_db", None, "__main__", alter_sys=True)""",
                    command,
                    *arguments,
                )
                self.assertEqual((done.returncode, done.stdout, done.stderr), (143, "", ""))

    def test_a_command_interrupted_by_ctrl_c_is_status_130_and_leaves_nothing_behind(self) -> None:
        self.printed("export", "-o", self.file, "--include-secrets")
        command = ("--db-path", self.other, "import", self.file)
        with interrupt_at_call(-1) as calls:
            self.printed(*command)
            total = calls()
        os.unlink(self.other)
        for part in (0.3, 0.5, 0.8):
            with self.subTest(part=part), self.assert_unchanged():
                try:
                    with interrupt_at_call(int(total * part)):
                        done = self.run_command(*command)
                except KeyboardInterrupt:
                    self.fail("it was not caught")
                self.assertEqual((done.returncode, done.stdout), (130, ""))
                self.assertEqual(done.stderr.count("\n"), 1)


class TheSelfCheckShowsThePromises(CommandLineTest):
    def test_it_keeps_at_least_ten_promises_and_leaves_nothing_behind(self) -> None:
        os.unlink(self.path)
        module = (str(HERE / "operator_db.py"),)
        done = self.in_shell("", python=module, env={**os.environ, "TMPDIR": self.folder})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        *promises, count, inspection = done.stdout.splitlines()
        self.assertGreaterEqual(len(promises), 10)
        for line in promises:
            self.assertRegex(line, r"^ok    \S.*")
        self.assertEqual(len(set(promises)), len(promises))
        self.assertRegex(count, rf"^{len(promises)} .*promises")
        self.assertIn(f"operator_db {operator_db.__version__}", count)
        self.assertTrue(inspection.startswith(f"{self.path}: "), inspection)
        self.assertEqual(os.listdir(self.folder), [])

    def test_it_inspects_the_operators_own_database(self) -> None:
        with self.assert_unchanged():
            inspection = self.printed().splitlines()[-1]
        records = sum(self.facts("stats")["records"].values())
        self.assertRegex(inspection, rf"^{self.path}: .*\b{records}\b")
        self.damage("tasks:t3")
        text = self.printed(status=1)
        self.assertNotIn("FAIL", text)
        self.assertIn("tasks:t3", text)

    def test_it_gives_programs_the_same_facts(self) -> None:
        facts = self.facts()
        self.assertEqual((facts["path"], facts["problems"]), (self.path, []))
        self.assertGreaterEqual(len(facts["promises"]), 10)

    def test_a_broken_promise_is_reported(self) -> None:
        nothing = operator_db.PruneReport(
            tasks=0, sessions=0, proofs=0, bytes_before=0, bytes_after=0, dry_run=False
        )
        broken: dict[str, Callable[..., Any]] = {
            "get_task": lambda *_: None,
            "prune": lambda *_, **__: nothing,
        }
        for verb, wrong in broken.items():
            with self.subTest(verb=verb), mock.patch.object(OperatorDb, verb, wrong):
                text = self.printed(status=1)
                self.assertRegex(text, r"(?m)^FAIL  \S")
                kept = len(re.findall(r"(?m)^ok    ", text))
                self.assertRegex(text, rf"(?m)^{kept} .*promises")


class TheReadmeIsTrue(CommandLineTest):
    def setUp(self) -> None:
        super().setUp()
        self.readme = (HERE / "README.md").read_text(encoding="utf-8")

    def test_each_example_prints_what_the_readme_says(self) -> None:
        del os.environ["AGENC_DB_PATH"]
        programs = re.findall(r"^```python\n(.*?)^```", self.readme, re.MULTILINE | re.DOTALL)
        self.assertGreaterEqual(len(programs), 4)
        for number, program in enumerate(programs):
            with self.subTest(program=program):
                folder = self.beside(str(number))
                os.mkdir(folder)
                done = run_program(program, cwd=folder)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                printed = re.findall(r"# prints: (.*)", program)
                self.assertEqual(done.stdout.splitlines(), printed)

    def test_the_evidence_hash_made_by_the_shell_is_the_modules(self) -> None:
        pattern = r"^\$ (printf .* \| sha256sum)\n([0-9a-f]{64})  -$"
        ((command, digest),) = re.findall(pattern, self.readme, re.MULTILINE)
        self.assertEqual(digest, VerificationLog(task_id="t1", outputs=b"hello").evidence_hash)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.split()[0], digest)

    def test_the_help_is_that_of_the_command_line(self) -> None:
        pattern = r"^```console\n\$ python operator_db\.py --help\n(.*?)^```"
        (shown,) = re.findall(pattern, self.readme, re.MULTILINE | re.DOTALL)
        os.environ["COLUMNS"] = "100"
        self.assertEqual(shown, self.printed("--help"))

    def test_the_module_imports_the_standard_library_alone_and_little_of_it(self) -> None:
        program = "import sys, operator_db; print(*sys.modules)"
        command = [sys.executable, "-S", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        imported = {name.partition(".")[0] for name in done.stdout.split()}
        allowed = {*sys.stdlib_module_names, "operator_db", "__main__"}
        self.assertEqual(imported - allowed, set())
        self.assertEqual(imported & {"argparse", "logging", "ctypes", "asyncio"}, set())


def show_progress(text: str) -> None:
    """Show a text in place of the one before, on a terminal's stderr."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ==== Soak: random operations and faults, and a model to compare with =============================

Facts = tuple[Any, ...]  # of one record: its state, and what else the model knows of it
Model = dict[tuple[str, str], Facts]  # the records of one worker, by namespace and id
Changes = dict[tuple[str, str], Facts | None]  # None: the record is removed

LONG_AGO = 1  # when a task was completed that any prune removes
SHARED = ("prunable", "config")  # states of a record that another worker may remove or replace


def content_for(record_id: str, size: int) -> bytes:
    """Return the bytes that are stored under an id, and under no other."""
    return random.Random(record_id).randbytes(size)


def worker_of(record_id: str) -> str:
    """Return the worker whose record this is: an id is the worker's own, or begins with it."""
    return record_id.partition("-")[0]


def facts_of(record: Any) -> Facts:
    """Return what the model of a worker knows of a record."""

    def size(record_id: str, content: bytes) -> int | str:
        return len(content) if content == content_for(record_id, len(content)) else "wrong"

    match record:
        case TaskRecord():
            state = "prunable" if record.completed_at == LONG_AGO else record.status.value
            return state, size(record.task_id, record.payload)
        case VerificationLog():
            return "proof", size(record.task_id, record.outputs)
        case SessionState():
            return "transcript", *(entry.content for entry in record.transcript)
        case OperatorConfig():
            return "config", record.keypairs["main"]
        case _:
            return "tally", record.count


def get_record(db: OperatorDb, namespace: str, record_id: str) -> Any:
    """Return a record of any namespace, or None."""
    if namespace == "config":
        return db.get_config()
    get: dict[str, Callable[[str], Any]] = {
        "tasks": db.get_task,
        "proofs": db.get_proof,
        "sessions": db.get_session,
        "tallies": tallies_of(db).get,
    }
    return get[namespace](record_id)


def ids_in(model: Model, namespace: str, *states: str) -> list[str]:
    """Return the ids of the records of a namespace that are in one of these states."""
    return [key[1] for key, facts in model.items() if key[0] == namespace and facts[0] in states]


@dataclass(frozen=True)
class Step:
    """What a worker does next: an operation, the record, and the size of its content."""

    operation: str
    id: str
    size: int

    @property
    def content(self) -> bytes:
        return content_for(self.id, self.size)

    @property
    def worker(self) -> str:
        return worker_of(self.id)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What workers do to the database, and the changes that the model expects of it."""

    weight: int  # how often it is chosen, compared with the others
    candidates: Callable[[Model], list[str]] | None = None  # the ids it may have; None: a new one
    perform: Callable[[OperatorDb, Step], object]
    changes: Callable[[Model, Step], Changes]


def tasks_beyond_sixty(model: Model) -> list[str]:
    tasks = ids_in(model, "tasks", "claimed", "in_progress", "completed")
    return tasks if len(tasks) > 60 else []


def sessions_beyond_sixty_entries(model: Model) -> list[str]:
    sessions = ids_in(model, "sessions", "transcript")
    return [name for name in sessions if len(model["sessions", name]) > 60]


def store_five_tasks(db: OperatorDb, step: Step) -> None:
    with db.transaction():
        for n in range(5):
            name = f"{step.id}/{n}"
            store_tasks(db, name, payload=content_for(name, step.size))


def delete_task_and_proof(db: OperatorDb, step: Step) -> None:
    with db.transaction():
        db.delete_task(step.id)
        db.mark_proof_submitted(step.id, "signature")
        db.delete_proof(step.id)


def increment_tally(db: OperatorDb, step: Step) -> None:
    tallies_of(db).update(step.worker, lambda tally: replace(tally, count=tally.count + 1))


OPERATIONS = {
    "store a task": Operation(
        weight=6,
        perform=lambda db, step: store_tasks(db, step.id, payload=step.content),
        changes=lambda _, step: {("tasks", step.id): ("claimed", step.size)},
    ),
    "store five tasks in one transaction": Operation(
        weight=2,
        perform=store_five_tasks,
        changes=lambda _, step: {
            ("tasks", f"{step.id}/{n}"): ("claimed", step.size) for n in range(5)
        },
    ),
    "start a task": Operation(
        weight=3,
        candidates=lambda model: ids_in(model, "tasks", "claimed"),
        perform=lambda db, step: db.update_task_status(step.id, "in_progress", expected="claimed"),
        changes=lambda model, step: {
            ("tasks", step.id): ("in_progress", model["tasks", step.id][1])
        },
    ),
    "complete a task": Operation(
        weight=4,
        candidates=lambda model: ids_in(model, "tasks", "claimed", "in_progress"),
        perform=lambda db, step: db.complete_task(step.id, proof(step.id, step.content)),
        changes=lambda model, step: {
            ("tasks", step.id): ("completed", model["tasks", step.id][1]),
            ("proofs", step.id): ("proof", step.size),
        },
    ),
    "delete a task": Operation(
        weight=20,
        candidates=tasks_beyond_sixty,
        perform=lambda db, step: db.delete_task(step.id),
        changes=lambda _, step: {("tasks", step.id): None},
    ),
    "delete a task and its proof": Operation(
        weight=3,
        candidates=lambda model: ids_in(model, "proofs", "proof"),
        perform=delete_task_and_proof,
        changes=lambda _, step: {("tasks", step.id): None, ("proofs", step.id): None},
    ),
    "store a task that can be pruned": Operation(
        weight=2,
        perform=lambda db, step: store_tasks(
            db, step.id, payload=step.content, status="completed", completed_at=LONG_AGO
        ),
        changes=lambda _, step: {("tasks", step.id): ("prunable", step.size)},
    ),
    "prune": Operation(
        weight=1,
        perform=lambda db, _: db.prune(session_days=None),
        changes=lambda model, _: {
            ("tasks", task_id): None for task_id in ids_in(model, "tasks", "prunable")
        },
    ),
    "append to a transcript": Operation(
        weight=4,
        perform=lambda db, step: db.append_transcript(step.worker, "user", step.id),
        changes=lambda model, step: {
            ("sessions", step.worker): (
                *model.get(("sessions", step.worker), ("transcript",)),
                step.id,
            )
        },
    ),
    "delete a session": Operation(
        weight=20,
        candidates=sessions_beyond_sixty_entries,
        perform=lambda db, step: db.delete_session(step.id),
        changes=lambda _, step: {("sessions", step.id): None},
    ),
    "increment a tally": Operation(
        weight=4,
        perform=increment_tally,
        changes=lambda model, step: {
            ("tallies", step.worker): ("tally", model["tallies", step.worker][1] + 1)
        },
    ),
    "store the configuration": Operation(
        weight=1,
        perform=lambda db, step: db.store_config(OperatorConfig(keypairs={"main": step.id})),
        changes=lambda _, step: {("config", "operator"): ("config", step.id)},
    ),
}


def choose_step(model: Model, new_id: str, rng: random.Random) -> Step:
    """Choose among the operations that are possible now."""
    possible = {}
    for name, operation in OPERATIONS.items():
        ids = [new_id] if operation.candidates is None else operation.candidates(model)
        if ids:
            possible[name] = ids
    (name,) = rng.choices(list(possible), [OPERATIONS[each].weight for each in possible])
    size = rng.randrange(1, rng.choice((10, 3_000, 60_000)))
    return Step(name, rng.choice(possible[name]), size)


def after_step(model: Model, step: Step) -> Model:
    """Return the model after a step."""
    changed = {**model, **OPERATIONS[step.operation].changes(model, step)}
    return {key: facts for key, facts in changed.items() if facts is not None}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a worker during a step."""

    weight: int  # how often it is chosen, compared with the others
    run: Callable[[Callable[[], object], OperatorDb, random.Random], object]
    errors: tuple[type[OperatorDbError], ...] = ()  # after which nothing may have been stored


def run_with_file_size_limit(
    perform: Callable[[], object], db: OperatorDb, rng: random.Random
) -> None:
    size = os.stat(db.path).st_size
    with file_size_limit(rng.choice((0, 30_000, size, 2 * size))):
        perform()


FAULTS = {
    "none": Fault(weight=94, run=lambda perform, db, rng: perform()),
    "file size limit": Fault(weight=4, run=run_with_file_size_limit, errors=(StorageError,)),
    "fork": Fault(weight=2, run=lambda perform, db, rng: in_child(perform)),
}


def work(path: str, id_prefix: str, model: Model, rng: random.Random, say: Say) -> None:
    """Do steps without end; say what begins, and whether it was acknowledged or refused."""
    db = OperatorDb(path, durable=rng.random() < 0.5)
    weights = [fault.weight for fault in FAULTS.values()]
    for n in itertools.count():
        step = choose_step(model, f"{id_prefix}-{n}", rng)
        (fault,) = rng.choices(list(FAULTS.values()), weights)
        say(json.dumps(dataclasses.asdict(step)))
        try:
            fault.run(partial(OPERATIONS[step.operation].perform, db, step), db, rng)
        except fault.errors:
            say("refused")
        else:
            say("acknowledged")
            model = after_step(model, step)


def differences(found: Model, model: Model) -> list[str]:
    """Return where a worker's records are not as its model expects."""
    return [
        f"{':'.join(key)} is {found.get(key)}, not {model.get(key)}"
        for key in {**model, **found}
        if found.get(key) != model.get(key) and (key in found or model[key][0] not in SHARED)
    ]


class Soak:
    """Lets workers loose on one database, kills them, and compares what is stored, in rounds.

    Every step of a worker that was acknowledged must be there. The step during which it was killed
    may be there as a whole, or not at all.
    """

    WORKERS = ("0", "1", "2")
    FLIPS = 10  # in each round

    def __init__(self, folder: str, seed: int) -> None:
        self.folder, self.path = folder, os.path.join(folder, "operator.db")
        self.seed, self.rng, self.round = seed, random.Random(seed), 0
        self.models: dict[str, Model] = {}
        self.counts, self.failures = Counter[str](), list[str]()
        with OperatorDb(self.path) as db:
            for worker in self.WORKERS:
                tallies_of(db).put(Tally(name=worker))
                db.store_config(OperatorConfig(keypairs={"main": worker}))
                self.models[worker] = {
                    ("tallies", worker): ("tally", 0),
                    ("config", "operator"): ("config", worker),
                }

    def fail(self, kind: str, problem: str) -> None:
        self.counts[kind] += 1
        self.failures.append(f"round {self.round}: {problem[-3000:]}")  # the end of a traceback

    def run(self, minutes: float) -> None:
        """Go on for some minutes, or until something is wrong."""
        end = time.monotonic() + minutes * 60
        while not self.failures and time.monotonic() < end:
            self.round += 1
            try:
                stored = self.compare(self.let_workers_work())
                if not self.failures:
                    self.flip_bits(stored)
            except OperatorDbError as error:
                self.fail("losses", f"the database cannot be read: {error!r}")
            left = max(0, end - time.monotonic())
            show_progress(f"{left:5.0f} s left {dict(self.counts)}")
        show_progress("")

    def let_workers_work(self) -> dict[str, Step | None]:
        """Start the workers and kill them; return the step in which each was killed, if any."""
        children = {}
        for worker, model in self.models.items():
            prefix = f"{worker}-{self.round}"
            rng = random.Random(f"{self.seed} {prefix}")
            action = partial(work, self.path, prefix, model, rng)
            children[worker] = Child(action, seconds=120)
        return {worker: self.kill(worker, child) for worker, child in children.items()}

    def kill(self, worker: str, child: Child) -> Step | None:
        """Kill a worker after a while, and bring its model up to what it had said."""
        said, lines = list[str](), self.rng.randrange(2, 200)
        try:
            while len(said) < lines:
                said.append(child.line())
            # this waits for a child that the worker has forked, too
            said += child.kill(after=self.rng.uniform(0, 0.01))
        except AssertionError as error:
            self.fail("failed workers", f"worker {worker}: {error}")
            if len(said) == lines:  # it failed when it had said more, which is not known
                del self.models[worker]
                return None
        step: Step | None = None
        for line in said:
            if step is None:
                step = Step(**json.loads(line))
                self.counts["operations"] += 1
            elif line == "acknowledged":
                self.models[worker] = after_step(self.models[worker], step)
                self.counts["acknowledged"] += 1
                step = None
            else:
                self.counts["faults"] += 1
                step = None
        self.counts["kills"] += 1
        return step

    def compare(self, pending: dict[str, Step | None]) -> Model:
        """Compare what is stored with the models, and return it."""
        with OperatorDb(self.path) as db:
            for problem in db.check():
                self.fail("problems", problem)
            stored = {key: facts_of(record) for key, record in every_record(db)}
        for key, facts in stored.items():
            if "wrong" in facts:
                self.fail("wrong records", f"{':'.join(key)} is not what was stored: {facts}")
        for worker, model in self.models.items():
            found = {
                key: facts
                for key, facts in stored.items()
                # the configuration is the record of the worker that stored it last
                if worker == worker_of(facts[1] if key[0] == "config" else key[1])
            }
            step = pending[worker]
            possible = [model] if step is None else [after_step(model, step), model]
            fitting = [each for each in possible if not differences(found, each)]
            if fitting:
                self.models[worker] = fitting[0]
            else:
                wrong = differences(found, model)[:5]
                self.fail("losses", f"worker {worker}, killed in {step}: {wrong}")
        return stored

    def flip_bits(self, stored: Model) -> None:
        """Flip a bit in each of some copies: a record may be refused then, but not be another."""
        image = read_bytes(self.path)
        for _ in range(self.FLIPS):
            self.counts["flips"] += 1
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                path = os.path.join(folder, "damaged.db")
                write_bytes(path, with_flipped_bit(image, self.rng))
                with suppress(OperatorDbError), OperatorDb(path, durable=False) as db:
                    db.check()
                    for key, facts in stored.items():
                        with suppress(DamagedError):
                            record = get_record(db, *key)
                            if record is not None and facts_of(record) != facts:
                                name = ":".join(key)
                                self.fail("wrong records", f"a flipped bit changed {name}")

    def report(self, minutes: float) -> None:
        names = ("operations", "acknowledged", "kills", "faults", "flips", "losses")
        counts = ", ".join(f"{name} {self.counts[name]}" for name in (*names, "wrong records"))
        print(f"seed {self.seed}, {minutes:g} minutes: {counts}")
        for failure in self.failures[:5]:
            print(f"FAIL (seed {self.seed}) {failure}")


def soak(argv: list[str]) -> int:
    """Attack a scratch database; return 1 when a record was lost, or came back wrong.

    `--seed` repeats the operations and faults; the moments at which the kernel stops a process are
    its own.
    """
    parser = argparse.ArgumentParser(prog="soak", description=soak.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="operator-soak-") as folder:
        run = Soak(folder, options.seed)
        run.run(options.minutes)
    run.report(options.minutes)
    return 1 if run.failures else 0


# ==== Bench: each operation beside the same by hand, and as the database grows ====================


class ByHand:
    """What a careful person would write by hand with sqlite3, json, base64 and dicts.

    It has no checks and no threads, and trusts that the file is its own.
    """

    PRAGMAS = (
        "fullfsync = ON",
        "checkpoint_fullfsync = ON",
        "secure_delete = ON",
        "cell_size_check = ON",
        "trusted_schema = OFF",
        f"journal_size_limit = {16 * 2**20}",
    )
    CREATE = (
        "CREATE TABLE {}"
        "(key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, status TEXT, at INTEGER)"
    )
    INDEX = "CREATE INDEX {0}_status_at ON {0}(status, at)"
    PUT = (
        "INSERT INTO {} VALUES(?, ?, ?, ?) ON CONFLICT(key) DO UPDATE"
        " SET value = excluded.value, status = excluded.status, at = excluded.at"
    )
    GET = "SELECT value FROM {} WHERE key = ?"
    BY_STATUS = "SELECT value FROM tasks WHERE status = ? ORDER BY at"
    BY_KEY = "SELECT value FROM tasks ORDER BY key"
    LATEST_OF_STATUS = (
        "SELECT * FROM (SELECT value, at FROM tasks WHERE status = '{}' ORDER BY at DESC LIMIT {})"
    )
    LATEST = "SELECT value FROM ({}) ORDER BY at DESC LIMIT {}"

    def __init__(self, path: str, *, durable: bool = False) -> None:
        new = not os.path.exists(path)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.execute, self.close = self.connection.execute, self.connection.close
        if new:
            self.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.execute("PRAGMA journal_mode = WAL")
        for pragma in (f"synchronous = {'FULL' if durable else 'NORMAL'}", *self.PRAGMAS):
            self.execute(f"PRAGMA {pragma}")
        for table in ("tasks", "sessions", "session_log") if new else ():
            self.execute(self.CREATE.format(table))
            self.execute(self.INDEX.format(table))

    @staticmethod
    def decode(value: str) -> dict[str, Any]:
        task: dict[str, Any] = json.loads(value)
        task["payload"] = b64decode(task["payload"])
        return task

    def store_task(self, task: dict[str, Any]) -> None:
        value = json.dumps({**task, "payload": b64encode(task["payload"]).decode()})
        at = task["claimed_at"] if task["completed_at"] is None else task["completed_at"]
        row = ("tasks:" + task["task_id"], value, task["status"], at)
        self.execute(self.PUT.format("tasks"), row)

    def get_task(self, task_id: str) -> dict[str, Any] | None:
        row = self.execute(self.GET.format("tasks"), ("tasks:" + task_id,)).fetchone()
        return self.decode(row[0]) if row else None

    def list_tasks_by_status(self, status: str) -> list[dict[str, Any]]:
        return [self.decode(value) for (value,) in self.execute(self.BY_STATUS, (status,))]

    def list_latest_tasks(self, count: int) -> list[dict[str, Any]]:
        each = [self.LATEST_OF_STATUS.format(status.value, count) for status in TaskStatus]
        rows = self.execute(self.LATEST.format(" UNION ALL ".join(each), count))
        return [self.decode(value) for (value,) in rows]

    def iter_tasks(self) -> Iterator[dict[str, Any]]:
        return (self.decode(value) for (value,) in self.execute(self.BY_KEY))

    def update_task_status(self, task_id: str, status: str) -> None:
        self.execute("BEGIN IMMEDIATE")
        task = self.get_task(task_id)
        assert task is not None
        task["history"].append({"status": status, "at": int(time.time()), "signature": None})
        self.store_task({**task, "status": status})
        self.execute("COMMIT")

    def append_transcript(self, session_id: str, role: str, content: str) -> None:
        now = int(time.time())
        self.execute("BEGIN IMMEDIATE")
        key = "sessions:" + session_id
        row = self.execute(self.GET.format("sessions"), (key,)).fetchone()
        session: dict[str, Any] = {"id": session_id, "tasks": [], "created_at": now, "entries": 0}
        if row:
            session = json.loads(row[0])
        seq = session["entries"]
        entry = {"log": session_id, "seq": seq, "content": content, "role": role, "timestamp": now}
        entry_row = (f"session_log:{session_id}:{seq}", json.dumps(entry), session_id, seq)
        self.execute(self.PUT.format("session_log"), entry_row)
        session |= {"entries": seq + 1, "last_active": now}
        self.execute(self.PUT.format("sessions"), (key, json.dumps(session), None, now))
        self.execute("COMMIT")


def fields_of_task(n: int, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a typical task.

    Half of the tasks are completed, and long enough ago to be pruned. A hundred of the first 10,000
    are disputed, however many there are in all.
    """
    name = hashlib.sha256(b"%d" % n).hexdigest()
    status = TaskStatus.COMPLETED if n // 1_000 % 2 else TaskStatus.CLAIMED
    return {
        "task_id": prefix + name[:44],
        "payload": json.dumps({"url": f"https://example.org/{n}", "body": name * 3}).encode(),
        "status": TaskStatus.DISPUTED if n % 100 == 7 and n < 10_000 else status,
        "claimed_at": Bench.START + n,
        "description": f"Summarise document {n}",
        "reward_lamports": 5_000_000 + n,
        "creator": DEVNET_CREATOR,
    }


def dict_of_task(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the same task as a dict, with the fields that TaskRecord fills in."""
    status = fields["status"].value
    history = [{"status": status, "at": fields["claimed_at"], "signature": None}]
    absent = {"completed_at": None, "on_chain_signature": None, "reward_skr_tokens": None}
    return {**fields, **absent, "status": status, "history": history}


Action = Callable[[int], object]


class Bench:
    """Measures the same work by hand and ours in turn, round after round.

    So whatever else the machine does slows both. Time is the thread's CPU time, except where
    waiting is part of the work: for the disk, for processes, for other threads.
    """

    START = int(time.time()) - 3 * 365 * DAY  # when the first task was claimed
    BATCH = 2_500  # tasks in one transaction of the bulk load

    def __init__(self, folder: str, rows: int) -> None:
        self.folder = folder
        self.sizes = [size for size in (10_000, 100_000, 1_000_000) if size < rows] + [rows]
        self.measures: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}

    def run(self) -> None:
        self.measure_imports()
        self.measure_durable_stores()
        self.measure_threads()
        for before, size in itertools.pairwise((0, *self.sizes)):
            self.measure_size(before, size)
            self.measure_memory(size)
        self.measure_long_session()
        self.measure_prune()
        show_progress("")
        first = [each["operation"] for each in self.measures].index
        self.measures.sort(key=lambda each: first(each["operation"]))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def compare(
        self,
        operation: str,
        by_hand: Action,
        ours: Action,
        *,
        at_most: float | None = None,
        tasks: int = 0,
        rounds: int = 15,
        calls: int = 100,
        each: int = 1,
        prepare: Action = lambda turn: None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Call both actions with a growing number, in rounds of so many calls.

        Notes the medians of the microseconds that a call takes, or one of the `each` things that it
        does, and the median of the rounds' ratios. `prepare` is called before each round.
        """
        actions = (by_hand, ours)
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            show_progress(f"{operation}, {tasks:,} tasks, round {turn + 1} of {rounds}")
            prepare(turn)
            for side in (0, 1) if turn % 2 else (1, 0):
                action, began = actions[side], clock()
                for number in range(turn * calls, (turn + 1) * calls):
                    action(number)
                times[side].append((clock() - began) / calls / each * 1e6)
        measure = {
            "operation": operation,
            "tasks": tasks,
            "by_hand_us": statistics.median(times[0]),
            "ours_us": statistics.median(times[1]),
            "ratio": statistics.median(ours / hand for hand, ours in zip(*times, strict=True)),
            "at_most": at_most,
        }
        self.measures.append(measure)

    def measure_size(self, before: int, size: int) -> None:
        """Load both databases up to a number of tasks, and measure what should not depend on it."""
        hand = ByHand(self.path("hand.db"))
        with closing(hand), OperatorDb(self.path("ours.db"), durable=False) as db:
            self.measure_bulk_load(hand, db, before, size)
            self.measure_reads(hand, db, size)
            self.measure_writes(hand, db, size)
        self.measure_opening(size)

    def measure_bulk_load(self, hand: ByHand, db: OperatorDb, before: int, size: int) -> None:
        batch: list[dict[str, Any]] = []

        def next_batch(turn: int) -> None:
            first = before + turn * self.BATCH
            batch[:] = map(fields_of_task, range(first, min(first + self.BATCH, size)))

        def load_by_hand(_: int) -> None:
            hand.execute("BEGIN IMMEDIATE")
            for fields in batch:
                hand.store_task(dict_of_task(fields))
            hand.execute("COMMIT")

        def load_ours(_: int) -> None:
            with db.transaction():
                for fields in batch:
                    db.store_task(TaskRecord(**fields))

        self.compare(
            "bulk load, each task",
            load_by_hand,
            load_ours,
            at_most=1.7,
            tasks=size,
            rounds=-(-(size - before) // self.BATCH),
            calls=1,
            each=min(self.BATCH, size - before),
            prepare=next_batch,
        )

    def measure_reads(self, hand: ByHand, db: OperatorDb, size: int) -> None:
        compare, both, ids = partial(self.compare, tasks=size), (hand, db), self.some_ids(size)
        get = [lambda n, by=by: by.get_task(ids[n]) for by in both]
        compare("get_task", *get, at_most=1.45)
        disputed = [lambda _, by=by: by.list_tasks_by_status("disputed") for by in both]
        compare("list_tasks_by_status, 100 tasks", *disputed, at_most=1.6, calls=10)
        latest = (
            lambda _: hand.list_latest_tasks(10),
            lambda _: db.list_tasks(limit=10, newest_first=True),
        )
        compare("list_tasks, latest 10", *latest, calls=20)
        walk = [lambda _, by=by: deque(by.iter_tasks(), 0) for by in both]
        compare("iter_tasks, each task", *walk, rounds=3, calls=1, each=size)

    def measure_writes(self, hand: ByHand, db: OperatorDb, size: int) -> None:
        compare = partial(self.compare, tasks=size)
        new = [fields_of_task(n, f"new {size} ") for n in range(1_500)]
        store = (
            lambda n: hand.store_task(dict_of_task(new[n])),
            lambda n: db.store_task(TaskRecord(**new[n])),
        )
        compare("store_task", *store, at_most=1.8)
        update = [
            lambda n, by=by: by.update_task_status(new[n]["task_id"], "in_progress")
            for by in (hand, db)
        ]
        compare("update_task_status", *update, at_most=1.7)
        for entries in (10, 10_000):
            self.measure_appends(hand, db, entries, size)

    def measure_appends(self, hand: ByHand, db: OperatorDb, entries: int, tasks: int = 0) -> None:
        """Compare appends to a transcript that has so many entries."""
        name = f"{entries} {tasks}"
        append: list[Action] = [
            partial(lambda by, _: by.append_transcript(name, "user", "some words"), by)
            for by in (hand, db)
        ]
        for n in range(entries):
            for action in append:
                action(n)
        operation = f"append_transcript, entry {entries:,}"
        self.compare(operation, *append, at_most=1.6, tasks=tasks, calls=5)

    def measure_opening(self, size: int) -> None:
        ids = self.some_ids(size)

        def open_and_get(kind: type[ByHand | OperatorDb], path: str, n: int) -> None:
            with closing(kind(path)) as opened:
                opened.get_task(ids[n])

        by_hand = partial(open_and_get, ByHand, self.path("hand.db"))
        ours = partial(open_and_get, OperatorDb, self.path("ours.db"))
        self.compare("open, get_task, close", by_hand, ours, at_most=2.2, tasks=size, calls=5)

    @staticmethod
    def some_ids(size: int) -> list[str]:
        """Return the ids of tasks anywhere among so many."""
        rng = random.Random(size)
        return [fields_of_task(rng.randrange(size))["task_id"] for _ in range(1_500)]

    def measure_long_session(self) -> None:
        hand = ByHand(self.path("long-hand.db"))
        with closing(hand), OperatorDb(self.path("long.db"), durable=False) as db:
            self.measure_appends(hand, db, 50_000)

    def measure_durable_stores(self) -> None:
        """Compare stores that have reached the disk when they return: one by hand, one of ours."""
        hand = ByHand(self.path("durable-hand.db"), durable=True)
        new = [fields_of_task(n) for n in range(500)]
        with closing(hand), OperatorDb(self.path("durable.db")) as db:
            self.compare(
                "store_task, durable",
                lambda n: hand.store_task(dict_of_task(new[n])),
                lambda n: db.store_task(TaskRecord(**new[n])),
                at_most=1.15,
                rounds=len(new),
                calls=1,
                clock=time.perf_counter,
            )

    def measure_imports(self) -> None:
        """Compare a process that imports the module with one that imports what it stands on."""
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": self.path("compiled")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def import_in_process(names: str, _: int) -> None:
            command = [sys.executable, "-c", f"import {names}"]
            subprocess.run(command, cwd=HERE, env=environment, check=True)

        by_hand = partial(import_in_process, "sqlite3, json, dataclasses")
        ours = partial(import_in_process, "operator_db")
        compare = partial(self.compare, calls=1, clock=time.perf_counter)
        by_hand(0)  # which compiles what is imported
        ours(0)
        compare("import in a new process", by_hand, ours, at_most=1.3, rounds=21)
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        for compiled in Path(self.path("compiled")).rglob("operator_db.*.pyc"):
            compiled.unlink()
        compare("import, not yet compiled", by_hand, ours, rounds=5)

    def measure_threads(self) -> None:
        """Note how many tasks a second one thread stores, and sixteen through one handle."""
        tasks, rounds = 3_200, 5
        speeds: dict[int, list[float]] = {1: [], 16: []}
        for turn in range(rounds):
            for count in speeds:
                show_progress(f"{count} threads store tasks, round {turn + 1} of {rounds}")
                path = self.path(f"{count} threads {turn}.db")
                with OperatorDb(path, durable=False) as db:

                    def store(thread: int, count: int = count, db: OperatorDb = db) -> None:
                        store_tasks(db, *(f"{thread} {n}" for n in range(tasks // count)))

                    began = time.perf_counter()
                    run_in_threads(*(partial(store, thread) for thread in range(count)))
                    speeds[count].append(tasks / (time.perf_counter() - began))
        for count, each in speeds.items():
            name = f"store_task, calls a second with {count} threads"
            self.figures[name] = round(statistics.median(each))
        shares = [many / one for one, many in zip(*speeds.values(), strict=True)]
        name = "store_task, 16 threads in % of one thread (at least 80)"
        self.figures[name] = round(statistics.median(shares) * 100)

    def measure_memory(self, size: int) -> None:
        """Note the peak memory of new processes, each of which meets every task; on Linux alone."""
        if sys.platform != "linux":
            return
        program = (
            "import sys; from collections import deque; from operator_db import OperatorDb\n"
            "with OperatorDb(sys.argv[1], durable=False) as db: {}\n"
            "status = open('/proc/self/status')\n"
            "print(*(line.split()[1] for line in status if line.startswith('VmHWM')))"
        )
        shutil.copy(self.path("ours.db"), self.path("pruned.db"))
        actions = {
            "pass": "ours.db",
            "deque(db.iter_tasks(), 0)": "ours.db",
            "db.export(sys.argv[2])": "ours.db",
            "db.import_(sys.argv[2])": f"imported {size}.db",
            "db.prune()": "pruned.db",
        }
        for action, name in actions.items():
            show_progress(f"memory of {action}, {size:,} tasks")
            arguments = [program.format(action), self.path(name), self.path("export")]
            command = [sys.executable, "-c", *arguments]
            peak = subprocess.run(command, cwd=HERE, check=True, capture_output=True).stdout
            figure = f"peak memory in MB of {action}, {size:,} tasks"
            self.figures[figure] = round(int(peak) / 1024, 1)

    def measure_prune(self) -> None:
        """Prune half of the tasks while another thread writes, and note how long that waited."""
        db, done, waits = OperatorDb(self.path("ours.db"), durable=False), threading.Event(), [0.0]

        def write() -> None:
            while not done.is_set():
                began = time.perf_counter()
                store_tasks(db, f"meanwhile {len(waits)}")
                waits.append(time.perf_counter() - began)

        show_progress("prune while another thread writes")
        with db, in_background(write):
            try:
                began = time.thread_time()
                pruned = db.prune().tasks
                seconds = time.thread_time() - began
            finally:
                done.set()
        self.figures["prune, tasks"] = pruned
        self.figures["prune, microseconds a task"] = round(seconds / pruned * 1e6, 1)
        self.figures["prune, writes of another thread meanwhile"] = len(waits) - 1
        self.figures["prune, longest of these writes in ms"] = round(max(waits) * 1e3, 1)

    def report(self) -> None:
        columns = ("tasks", "by hand", "ours", "ratio", "at most")
        print("{:32}{:>10}{:>12}{:>12}{:>8}{:>9}".format("median microseconds", *columns))
        line = "{operation:32}{tasks:10,}{by_hand_us:12,.1f}{ours_us:12,.1f}{ratio:8.2f}{most:>9}"
        for measure in self.measures:
            print(line.format(**measure, most=measure["at_most"] or ""))
        for name, figure in self.figures.items():
            print(f"{name:62}{figure:12,}")


def bench(argv: list[str]) -> int:
    """Measure each operation beside the same by hand, and as the database grows."""
    parser = argparse.ArgumentParser(prog="bench", description=bench.__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="tasks at most (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="operator-bench-") as folder:
        run = Bench(folder, options.rows)
        run.run()
    if options.json:
        print(json.dumps({"measures": run.measures, "figures": run.figures}, indent=1))
    else:
        run.report()
    return 0


# ==== Running =====================================================================================

LAST_LINE = re.compile(r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?\n\Z")


class CountingResult(unittest.TextTestResult):
    """Counts tests, where unittest counts each failure of a `subTest`, too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def counts(self) -> tuple[int, int, int]:
        """Return how many passed, failed and were skipped."""

        def names(outcomes: list[tuple[Any, str]]) -> set[str]:
            return {getattr(test, "test_case", test).id() for test, _ in outcomes}

        failed = names(self.failures) | names(self.errors)
        skipped = names(self.skipped) - failed
        return self.passed, len(failed) + len(self.unexpectedSuccesses), len(skipped)


def classes_with_tests() -> list[str]:
    """Return the names of all classes that have tests, those with the most tests first."""
    tests = {
        name: len(unittest.defaultTestLoader.getTestCaseNames(each))
        for name, each in globals().items()
        if isinstance(each, type) and issubclass(each, unittest.TestCase)
    }
    return sorted(filter(tests.get, tests), key=tests.__getitem__, reverse=True)


def run_tests(names: list[str]) -> tuple[int, int, int]:
    """Run classes or tests in this process; return how many passed, failed and were skipped."""
    suite = unittest.defaultTestLoader.loadTestsFromNames(names, sys.modules[__name__])
    runner = unittest.TextTestRunner(warnings="error", resultclass=CountingResult)
    result = runner.run(suite)
    assert isinstance(result, CountingResult)
    return result.counts()


def run_in_two_processes(names: list[str]) -> tuple[int, int, int]:
    """Run every second class in another process, which is this program with names."""
    command = [sys.executable, str(Path(__file__).resolve()), *names[1::2]]
    with tempfile.TemporaryFile("w+") as log:  # so that two reports do not mix
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as other:
            counts = run_tests(names[::2])
            output = other.communicate()[0]
        log.seek(0)
        sys.stderr.write(log.read())
    last = LAST_LINE.search(output)
    if last is None:
        print(f"\nthe other process ended with {other.returncode}", file=sys.stderr)
    others = map(int, last.groups("0")) if last else (0, 1, 0)
    passed, failed, skipped = map(sum, zip(counts, others, strict=True))
    return passed, failed, skipped


def main(argv: list[str]) -> int:
    """Run the soak, the bench, the tests that are named, or all tests."""
    logging.getLogger("operator_db").addHandler(logging.NullHandler())
    if argv[:1] == ["soak"]:
        return soak(argv[1:])
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CLASS[.TEST]")
    names = parser.parse_args(argv).names
    with tempfile.TemporaryDirectory(prefix="operator-compiled-") as compiled:
        # so that not every process has to compile the module
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.setdefault("PYTHONPYCACHEPREFIX", compiled)
        all_names = classes_with_tests()
        if names:
            counts = run_tests(names)
        elif len(all_names) < 2 or sys.gettrace() or "coverage" in sys.modules:
            counts = run_tests(all_names)  # coverage follows one process
        else:
            counts = run_in_two_processes(all_names)
    passed, failed, skipped = counts
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not (passed or skipped) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
