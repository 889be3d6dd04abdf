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
import contextlib
import contextvars
import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import inspect
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
import weakref
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum, Flag, StrEnum
from functools import cached_property, partial
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock
from zlib import crc32

import operator_db
from operator_db import (
    BusyError,
    ClosedError,
    ConflictError,
    DamagedError,
    FileReplacedError,
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
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999

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


def row_checksum(key: str, value: bytes, status: str | None, at: int | None) -> int:
    """Return the checksum of a row, as the README describes it."""
    text = b"" if status is None else status.encode()
    length = -1 if status is None else len(text)
    columns = f"agenc/2\0{key}\0{at}\0{length}\0".encode() + text
    return crc32(columns + value)


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


def make_table_with_a_collation(path: str) -> None:
    """Make a table as another program would, which alone has the collation that it needs."""
    with closing(sqlite3.connect(path)) as other:
        other.create_collation("theirs", lambda one, two: (one > two) - (one < two))
        other.execute("CREATE TABLE notes(x COLLATE theirs)")
        other.execute("CREATE INDEX notes_x ON notes(x)")
        other.executemany("INSERT INTO notes VALUES(?)", [("a",), ("b",)])
        other.commit()


def fill(path: str, tasks: int = 40) -> None:
    """Make a database with some of everything."""
    with OperatorDb(path, durable=False) as db:
        tallies = tallies_of(db)
        with db.transaction():
            fill_tables(db, tallies, tasks)


def fill_tables(db: OperatorDb, tallies: operator_db.Namespace[Tally], tasks: int) -> None:
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
    tallies.put(Tally(name="one", count=1))


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


@contextmanager
def in_background(*actions: Callable[[], object]) -> Iterator[None]:
    """Run the actions in threads beside the block; wait for them, and raise their first error."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(15)
        if thread.is_alive():
            raise AssertionError("a thread hangs")
    if errors:
        raise errors[0]


def run_in_threads(*actions: Callable[[], object]) -> None:
    """Run the actions at the same time; raise the first error of any."""
    with in_background(*actions):
        pass


@contextmanager
def open_block(db: OperatorDb, *task_ids: str) -> Iterator[Callable[[], None]]:
    """Let another thread store tasks and stay in its transaction until the block ends it."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with db.transaction():
            store_tasks(db, *task_ids)
            inside.set()
            leave.wait(15)

    with in_background(hold):
        inside.wait(15)
        try:
            yield leave.set
        finally:
            leave.set()


def run_program(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program text in a new interpreter, with `sys` and our public names imported."""
    text = f"import sys; sys.path.insert(0, {str(HERE)!r}); from operator_db import *\n{program}"
    command = [sys.executable, "-W", "ignore", "-c", text, *arguments]
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


def run_main(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its status and all that it printed."""
    printed = StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = operator_db.main([*arguments])
    return status, printed.getvalue()


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
            sys.setprofile(None)
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
        return self.last_words()

    def last_words(self) -> list[str]:
        """Wait for the child's end and return what it had said by then."""
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
    rng, struck = random.Random(8), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(times):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00002, longest))
            action()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            struck += 1
    signal.signal(signal.SIGALRM, before)
    return struck


@contextmanager
def at_each_call(action: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Act at each call and return from C, of the module and its with statements, in this thread.

    The block is given a function that tells how many there have been.
    """
    count, files = 0, (operator_db.__file__, contextlib.__file__)

    def look(frame: Any, event: str, _: object) -> None:
        nonlocal count
        code = frame.f_code
        # where a generator goes on, what is raised here would pass its except clauses by
        is_resumed = event == "call" and bool(code.co_flags & inspect.CO_GENERATOR)
        if event in ("call", "c_return") and code.co_filename in files and not is_resumed:
            count += 1
            action()

    sys.setprofile(look)
    try:
        yield lambda: count
    finally:
        if sys.getprofile() is look:  # not when it is collected late, and another has begun
            sys.setprofile(None)


@contextmanager
def interrupt_at_call(number: int, *, kill: bool = False) -> Iterator[Callable[[], int]]:
    """Raise KeyboardInterrupt at one of those calls, or kill this process; -1 only counts them."""

    def strike() -> None:
        if calls() == number:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            sys.setprofile(None)
            raise KeyboardInterrupt

    with at_each_call(strike) as calls:
        yield calls


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

    FAULTS: ClassVar[dict[str, Callable[[int], AbstractContextManager[object]]]] = {
        "kill": partial(interrupt_at_call, kill=True),
        "full disk": file_size_limit,
        "interrupt": interrupt_at_call,
    }

    def __init__(self, test: DatabaseTest, verb: Verb, *, tries: int = 10) -> None:
        self.test, self.verb, self.tries, self.rng = test, verb, tries, random.Random(3)
        self.path, self.outcomes = test.path, Counter[str]()
        self.image = read_bytes(self.path)  # nobody has it open
        self.before = content_of(self.path)
        with OperatorDb(self.path) as db:
            verb(db)
        self.after = content_of(self.path)
        test.assertNotEqual(self.before, self.after, "the verb changes nothing")

    def put_back(self) -> None:
        """Make the file what it was before the verb; remove what a killed process left."""
        for name in os.listdir(self.test.folder):
            if name.startswith("operator.db") and name.endswith(("-wal", "-shm", ".new")):
                os.unlink(os.path.join(self.test.folder, name))
        write_bytes(self.path, self.image)

    def go(self, *faults: str) -> Counter[str]:
        """Try these faults, or all; count how often each left the file as before, and as after."""
        for fault in faults or self.FAULTS:
            for number in self.sizes() if fault == "full disk" else self.calls():
                self.put_back()
                said = Child(partial(self.use_verb, fault, number)).last_words()
                self.judge(fault, said)
        self.put_back()
        return self.outcomes

    def sizes(self) -> list[int]:
        """Return sizes of files, from nothing to more than enough."""
        size = max(len(self.image), sum(map(len, self.after)))
        return [size * 2 * n // self.tries for n in range(self.tries)]

    def calls(self) -> list[int]:
        """Choose among the calls of the module that the verb makes, and add the one after them."""

        def count() -> int:
            with OperatorDb(self.path) as db, interrupt_at_call(-1) as calls:
                self.verb(db)
                return calls()

        self.put_back()
        total = in_child(count)
        return sorted({*(self.rng.randrange(1, total) for _ in range(self.tries - 1)), total + 1})

    def use_verb(self, fault: str, number: int, say: Say) -> None:
        """Use the verb under a fault, and store something more unless that is the end."""
        kept: list[BaseException] = []  # and with it all frames that it passed through
        with OperatorDb(self.path, timeout=2) as db:
            try:
                with self.FAULTS[fault](number):
                    self.verb(db)
                    say("acknowledged")
                    if fault == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
            except KeyboardInterrupt as error:
                kept.append(error)
            except StorageError as error:
                self.test.assertEqual(fault, "full disk")
                self.test.assertIn(self.path, str(error))
            store_tasks(db, "afterwards")
            say("went on")

    def judge(self, fault: str, said: list[str]) -> None:
        """Fail unless the file holds all or nothing of the verb, and what was stored afterwards."""
        self.test.assert_sound()
        found = content_of(self.path)
        more = [line for line in found if json.loads(line)["record"].get("task_id") == "afterwards"]
        self.test.assertEqual(len(more), said.count("went on"), f"{fault}: a later write is lost")
        found = [line for line in found if line not in more]
        wanted = (self.after,) if "acknowledged" in said else (self.before, self.after)
        self.test.assertTrue(found in wanted, f"{fault}: {found} is neither before nor after")
        self.outcomes[f"{fault}: {'after' if found == self.after else 'before'}"] += 1


def staying_open(use: Callable[[], object]) -> Child:
    """Return a child that has made something and keeps it until the child is killed."""

    def work(say: Say) -> None:
        kept = use()
        say(f"done: {kept}")
        signal.pause()

    child = Child(work)
    child.line()
    return child


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

    @cached_property
    def db(self) -> OperatorDb:
        """The test's own database, opened when it is first used."""
        return self.open()

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

    def plant(self, key: str, document: bytes) -> None:
        """Put a document into the row of a record, with the checksum that belongs to it."""
        table = key.partition(":")[0]
        ((status, at),) = self.sql(f"SELECT status, at FROM {table} WHERE key = ?", key)
        statement = f"UPDATE {table} SET value = CAST(? AS TEXT), crc = ? WHERE key = ?"
        self.sql(statement, document, row_checksum(key, document, status, at), key)

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


# ==== Records and namespaces ======================================================================


def nested(levels: int) -> list[Any]:
    """Return lists within each other, so many levels deep."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


class InvalidRecordsAreRefused(DatabaseTest):
    """A record is checked when it is made and again when it is stored, and every argument too."""

    REQUIRED: ClassVar[dict[type, dict[str, Any]]] = {
        TaskRecord: {"task_id": "t"},
        StatusChange: {"status": "claimed"},
        TranscriptEntry: {"role": "user", "content": "hello"},
        SessionState: {"session_id": "s"},
        VerificationLog: {"task_id": "t", "outputs": b"result"},
        OperatorConfig: {},
        PairedDevice: {"device_id": "d"},
    }

    NOT_TEXT_OR_NONE = ("\ud800", 7, b"a", ["a"])
    NOT_TEXT = (*NOT_TEXT_OR_NONE, None)
    UNPRINTABLE = (*"\n\0\x1b\x7f\u202e\ufeff", " \t", "a\nb", "a\0", "a\0b", "a\u202eb")
    NOT_AN_ID = (*NOT_TEXT, "", *UNPRINTABLE)
    NOT_BYTES = ("text", None, bytearray(b"x"), [1])
    NOT_A_STATUS_OR_NONE = ("nonsense", "", 3, False, b"claimed")
    NOT_A_STATUS = (*NOT_A_STATUS_OR_NONE, None)
    NOT_A_TIME_OR_NONE = (True, False, 1.5, "1", LAST_SECOND + 1, FIRST_SECOND - 1, 2**63)
    NOT_A_TIME = (*NOT_A_TIME_OR_NONE, None)
    NOT_AN_AMOUNT = (-1, 2**64, True, False, 1.0, "1")
    NOT_DAYS = (-1, True, "1", float("nan"), float("inf"))
    NOT_HEX = ("0" * 64, "AB" * 32, "ab" * 31, "ab" * 33, "zz" * 32, "0x" + "ab" * 31, "")

    WRONG: ClassVar[dict[type, dict[str, tuple[Any, ...]]]] = {
        TaskRecord: {
            "task_id": NOT_AN_ID,
            "payload": NOT_BYTES,
            "status": NOT_A_STATUS,
            "claimed_at": NOT_A_TIME,
            "completed_at": NOT_A_TIME_OR_NONE,
            "reward_lamports": NOT_AN_AMOUNT,
            "reward_skr_tokens": NOT_AN_AMOUNT,
            **dict.fromkeys(("on_chain_signature", "description", "creator"), NOT_TEXT_OR_NONE),
            "history": (None, (), [1], ["claimed"], [None]),
        },
        StatusChange: {"status": NOT_A_STATUS, "at": NOT_A_TIME, "signature": NOT_TEXT_OR_NONE},
        TranscriptEntry: {"role": NOT_TEXT, "content": NOT_TEXT, "timestamp": NOT_A_TIME},
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
            **dict.fromkeys(("inputs", "outputs", "proof"), NOT_BYTES),
            "proof_hash": (*NOT_HEX, b"a" * 64, 5),
            "result_data": (b"", bytes(64), b"x" * 63, b"x" * 65, "x" * 64, 5),
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
        PairedDevice: {
            "device_id": NOT_TEXT,
            "last_seen": (True, 1.0, "1", None),
            "status": NOT_TEXT,
            "token": NOT_TEXT,
            "colour": (2, "red", "RED", Rights.READ),
            "part": ("x", {"name": "x"}),
            "parts": (None, [None], (Part("x"),)),
            "by_name": (None, {1: b""}, {"a": "text"}, {"\ud800": b""}),
            "ratio": (float("nan"), float("inf"), "1", True, None),
            "trusted": (0, 1, None, "true"),
            "anything": ((1,), {1: 2}, b"x"),
        },
    }

    def test_a_field_of_a_wrong_type_or_range_is_refused_by_name(self) -> None:
        put = devices_of(self.db).put  # a custom record is checked when it is stored
        for record_type, wrong in self.WRONG.items():
            settable = {each.name for each in dataclasses.fields(record_type) if each.init}
            self.assertEqual(set(wrong), settable, "every field is tried")
            for name, values in wrong.items():
                for value in values:
                    make = partial(record_type, **{**self.REQUIRED[record_type], name: value})
                    call = partial(put, make()) if record_type is PairedDevice else make
                    with self.subTest(record_type.__name__, field=name, value=value):
                        error = self.assert_refused(InvalidRecordError, call, type(value).__name__)
                        self.assertRegex(str(error), rf"\b{record_type.__name__}\b.*\b{name}\b")
        self.assertEqual(exported(self.db), [])

    def test_a_time_in_milliseconds_is_refused_by_that_name(self) -> None:
        db, devices, now = self.db, devices_of(self.db), 1_774_627_200_000
        store_tasks(db, "t")
        move = partial(db.update_task_status, "t")
        calls: tuple[tuple[str, Callable[[], object]], ...] = (
            ("TaskRecord.claimed_at", lambda: TaskRecord(task_id="t", claimed_at=now)),
            ("TaskRecord.completed_at", lambda: TaskRecord(task_id="t", completed_at=now)),
            ("StatusChange.at", lambda: StatusChange(status="claimed", at=now)),
            (
                "TranscriptEntry.timestamp",
                lambda: TranscriptEntry(role="", content="", timestamp=now),
            ),
            ("SessionState.created_at", lambda: SessionState(session_id="s", created_at=now)),
            ("SessionState.last_active", lambda: SessionState(session_id="s", last_active=now)),
            ("VerificationLog.timestamp", lambda: proof("t", timestamp=now)),
            ("at must", lambda: move("disputed", at=now)),
            ("at must", lambda: move("claimed", at=now)),  # where it is
            ("timestamp must", lambda: db.append_transcript("s", "user", "hello", timestamp=now)),
            ("timestamp must", lambda: db.append_command("s", "status", timestamp=now)),
            ("devices: at=", lambda: devices.put(PairedDevice(device_id="d", last_seen=now))),
        )
        with self.assert_unchanged():
            for name, call in calls:
                with self.subTest(name):
                    words = (name, "Unix seconds", str(now), "looks like milliseconds")
                    self.assert_refused(InvalidRecordError, call, *words)
        for other in (10**15, LAST_SECOND * 1000 + 1000, "now"):  # which look like something else
            make = partial(TaskRecord, task_id="t", claimed_at=other)
            self.assertNotIn(
                "milli", str(self.assert_refused(InvalidRecordError, make, "claimed_at"))
            )

    def test_a_long_value_is_cut_in_the_message(self) -> None:
        long = ("x" * 10**6, b"x" * 10**6, dict.fromkeys(range(10**5)), nested(5000), 10**5000)
        for value in long:
            with self.subTest(type(value)):
                make = partial(TaskRecord, task_id="t", history=value)
                self.assert_refused(InvalidRecordError, make, "history", type(value).__name__)

    def test_a_status_may_be_spelled_as_the_prototype_or_the_command_line_spells_it(self) -> None:
        for status in TaskStatus:
            words = status.value.split("_")
            pascal_case = "".join(map(str.capitalize, words))
            for text in (status.value, status.value.upper(), "-".join(words), pascal_case):
                with self.subTest(text):
                    self.assertIs(TaskStatus(text), status)
                    self.assertIs(TaskRecord(task_id="t", status=text).status, status)

    def test_fields_are_given_by_name_and_only_those_without_a_default_are_required(self) -> None:
        for record_type, required in self.REQUIRED.items():
            with self.subTest(record_type.__name__):
                self.assertRaises(TypeError, record_type, *required.values(), "one more")
                for missing in required:
                    others = {name: value for name, value in required.items() if name != missing}
                    self.assertRaises(TypeError, record_type, **others)
        with mock.patch("time.time", return_value=1000.9):
            task, change, entry, session, log, *_ = (
                record_type(**required) for record_type, required in self.REQUIRED.items()
            )
        self.assertEqual((task.claimed_at, session.created_at, session.last_active), (1000,) * 3)
        self.assertEqual((change.at, entry.timestamp, log.timestamp), (1000,) * 3)
        self.assertEqual((task.status, task.payload, task.completed_at), ("claimed", b"", None))
        self.assertEqual((task.reward_lamports, task.reward_skr_tokens), (None, None))

    def test_a_record_is_checked_again_when_it_is_stored(self) -> None:
        task, session = TaskRecord(task_id="t"), SessionState(session_id="s")
        config, deep = OperatorConfig(), nested(5000)
        task.reward_lamports = -1
        session.transcript.append("no entry")
        config.keypairs["main"] = 5
        cases = (
            (self.db.store_task, task, "TaskRecord.reward_lamports"),
            (self.db.store_session, session, "SessionState.transcript"),
            (self.db.store_config, config, "OperatorConfig.keypairs"),
            *((self.db.store_task, odd, "TaskRecord") for odd in (None, session, deep)),
            *((self.db.store_session, odd, "SessionState") for odd in (None, task, deep)),
            *((self.db.store_proof, odd, "VerificationLog") for odd in (None, task, deep)),
            *((self.db.store_config, odd, "OperatorConfig") for odd in (None, task, deep)),
        )
        for store, record, word in cases:
            with self.subTest(word, given=type(record)):
                self.assert_refused(InvalidRecordError, partial(store, record), word)
        self.assertEqual(exported(self.db), [])

    def test_a_free_form_value_that_json_would_change_or_that_is_too_deep_is_refused(self) -> None:
        devices = devices_of(self.db)
        circular: dict[str, Any] = {}
        circular["again"] = [circular]
        values = (
            *(nested(101), nested(5000), circular, {"\ud800": 1}, {1: 2}, (1,), {"a"}, object()),
            *("\ud800", b"x", 10**5000, float("nan"), float("inf")),
        )
        for number, value in enumerate(values):
            config, device = OperatorConfig(), PairedDevice(device_id="d", anything=value)
            config.model_preferences["odd"] = value
            store, put = partial(self.db.store_config, config), partial(devices.put, device)
            with self.subTest(type(value).__name__, number=number):
                self.assert_refused(InvalidRecordError, store, "OperatorConfig")
                self.assert_refused(InvalidRecordError, put, "PairedDevice")
        self.assertEqual(exported(self.db), [])

    def test_an_argument_that_is_nonsense_is_refused_by_every_verb(self) -> None:
        db = self.open()
        devices = devices_of(db)
        store_tasks(db, "t", status="completed", claimed_at=0)  # a prune would take it
        db.store_proof(proof("t"))
        wrong: dict[str, tuple[Any, ...]] = {
            **dict.fromkeys(("task_id", "session_id", "record_id"), self.NOT_AN_ID),
            "status": self.NOT_A_STATUS_OR_NONE,
            "expected": (*self.NOT_A_STATUS_OR_NONE, (), ["nonsense"], ("claimed", None)),
            **dict.fromkeys(("at", "timestamp"), self.NOT_A_TIME_OR_NONE),
            **dict.fromkeys(("role", "content", "command"), self.NOT_TEXT),
            **dict.fromkeys(("limit", "last"), (-1, True, 1.5, "1")),
            **dict.fromkeys(("days", "task_days", "session_days", "proof_days"), self.NOT_DAYS),
            "signature": ("", "a\n", 5),
            "submitted": ("yes", 1),
            "proof": (None, "proof", TaskRecord(task_id="t")),
        }
        task, session = {"task_id": "t"}, {"session_id": "s"}
        move, say = {**task, "status": "resolved"}, {**session, "role": "user", "content": "hello"}
        change = {"record_id": "d", "change": lambda record: record}
        verbs: tuple[tuple[Callable[..., object], dict[str, Any], str], ...] = (
            (db.get_task, {}, "task_id"),
            (db.list_tasks, {}, "status limit"),
            (db.list_tasks_by_status, {}, "status"),
            (db.iter_tasks, {}, "status"),
            (db.update_task_status, move, "task_id status signature at expected"),
            (db.update_task, {**task, "change": lambda record: record}, "task_id"),
            (db.complete_task, {**task, "proof": proof("t")}, "proof"),
            (db.get_session, {}, "session_id"),
            (db.list_sessions, {}, "limit"),
            (db.append_transcript, say, "session_id role content timestamp"),
            (db.append_command, {**session, "command": "status"}, "session_id command timestamp"),
            (db.transcript, session, "session_id last"),
            (db.link_task, {**session, **task}, "session_id task_id"),
            (db.unlink_task, {**session, **task}, "session_id"),
            (db.get_proof, {}, "task_id"),
            (db.list_proofs, {}, "submitted limit"),
            (db.mark_proof_submitted, {**task, "signature": "signature"}, "task_id signature"),
            (db.dispute_bundle, {}, "task_id"),
            (db.prune, {}, "task_days session_days proof_days"),
            (devices.get, {}, "record_id"),
            (devices.update, change, "record_id"),
            (devices.list, {}, "limit"),
            (devices.prune, {}, "days"),
        )
        words = {"expected": "status", "proof": "VerificationLog"}
        with self.assert_unchanged():
            for verb, valid, names in verbs:
                for name in names.split():
                    word = words.get(name, name.split("_")[-1])
                    for value in wrong[name]:
                        with self.subTest(verb.__name__, **{name: value}):
                            call = partial(verb, **{**valid, name: value})
                            self.assert_refused(InvalidRecordError, call, word)
            # what another program has stored under any text can be deleted
            for delete in (db.delete_task, db.delete_session, db.delete_proof, devices.delete):
                for value in self.NOT_TEXT:
                    with self.subTest(delete.__name__, id=value):
                        self.assert_refused(InvalidRecordError, partial(delete, value), "id")
            for status in ("\ud800", 5, nested(5000)):
                for ask in (devices.list, devices.count, lambda each: list(devices.keys(each))):
                    with self.subTest(ask.__name__, status=type(status)):
                        self.assert_refused(InvalidRecordError, partial(ask, status), "status")
            self.assert_refused(InvalidRecordError, lambda: tallies_of(db).prune(1), "tallies")


class RecordsReadBackAsTheyWereStored(DatabaseTest):
    """What is read is what was stored, whatever is in it, and whoever reads the row."""

    def test_every_field_reads_back(self) -> None:
        text = '\0\x1f"\\/ é 漢字 \U0001f600 \u202e \ufeff \u2028'
        task = TaskRecord(
            task_id="tasks:%00'\"; DROP TABLE tasks; --",
            payload=bytes(range(256)),
            status=TaskStatus.RESOLVED,
            claimed_at=FIRST_SECOND,
            completed_at=LAST_SECOND,
            reward_lamports=2**64 - 1,
            reward_skr_tokens=0,
            history=[StatusChange(status=status, at=-3, signature=text) for status in TaskStatus],
            **dict.fromkeys(("on_chain_signature", "description", "creator"), text),
        )
        session = SessionState(
            session_id="s:1",
            transcript=[TranscriptEntry(role=text, content=text, timestamp=-5)],
            command_history=[text, ""],
            active_task_ids=["a", "é:%"],
            created_at=1,
            last_active=2,
        )
        log = VerificationLog(
            task_id="t:%",
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
        device = PairedDevice(
            device_id="d:%",
            last_seen=FIRST_SECOND,
            status="",
            token=text,
            colour=Colour.BLUE,
            part=Part("é", b"\xff"),
            parts=[Part("a"), Part("b", b"\0")],
            by_name={text: b"\0", "": b""},
            ratio=-0.0,
            trusted=True,
            anything={"deep": nested(99), "mixed": [1, None, text, 1e300]},
        )
        for record in (task, session, log, config, device):
            least = type(record)(**InvalidRecordsAreRefused.REQUIRED[type(record)])
            for each in dataclasses.fields(record):  # a default reads back even if it is lost
                self.assertNotEqual(getattr(record, each.name), getattr(least, each.name))
        with OperatorDb(self.path) as db:
            db.store_task(task)
            db.store_session(session)
            db.store_proof(log)
            db.store_config(config)
            devices_of(db).put(device)
        db = self.open()
        self.assertEqual(db.get_task(task.task_id), task)
        self.assertEqual((list(db.iter_tasks()), db.list_tasks()), ([task], [task]))
        self.assertEqual((db.get_session("s:1"), db.list_sessions()), (session, [session]))
        self.assertEqual((db.get_proof("t:%"), db.list_proofs()), (log, [log]))
        self.assertEqual(db.get_config(), config)
        found = devices_of(db).get("d:%")
        self.assertEqual((found, repr(found.ratio)), (device, "-0.0"))
        self.assert_sound()

    def test_payloads_from_nothing_to_64_mib_read_back(self) -> None:
        for size in (0, 1, 2, 3, 4096, 64 * 2**20):
            task = TaskRecord(task_id=str(size), payload=random.Random(size).randbytes(size))
            self.db.store_task(task)
            self.assertTrue(self.db.get_task(task.task_id) == task, f"{size} bytes")

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
                self.assertEqual(db.get_task(name).claimed_at, n)
                self.assertEqual(db.get_proof(name).outputs, b"%d" % n)
                self.assertEqual([each.content for each in db.transcript(name)], [f"said {n}"])
                self.assertEqual(db.get_session(name).command_history, [f"command {n}"])
        self.assertTrue(task_ids(db) == sorted(names, key=str.encode), "each once, in key order")
        self.assertEqual(db.check(), [])
        for n, name in enumerate(names, 1):
            self.assertTrue(db.delete_task(name) and db.delete_session(name))
            self.assertEqual(db.count_tasks()[TaskStatus.CLAIMED], len(names) - n)

    def test_a_task_stored_without_history_is_read_as_its_constructor_makes_it(self) -> None:
        store_tasks(self.db, "t", claimed_at=9, on_chain_signature="sig")
        ((value,),) = self.sql("SELECT value FROM tasks")
        document = {**json.loads(value), "history": []}
        value = json.dumps(document)
        self.plant("tasks:t", value.encode())
        made = TaskRecord(task_id="t", claimed_at=9, on_chain_signature="sig", history=[])
        self.assertEqual((self.db.get_task("t"), self.db.list_tasks()), (made, [made]))

    def test_a_row_can_be_read_without_this_module(self) -> None:
        part = Part("é è", b"\xff\xfe")
        store_tasks(self.db, "t", payload=part.raw, status="in_progress", claimed_at=9)
        devices_of(self.db).put(PairedDevice(device_id="d", colour=Colour.BLUE, part=part))
        in_task = {"payload": "//4=", "status": "in_progress", "creator": None}
        in_device = {"colour": "blue", "part": {"name": "é è", "raw": "//4="}, "parts": []}
        for table, columns, fields in (
            ("tasks", ("tasks:t", "in_progress", 9), in_task),
            ("devices", ("devices:d", "paired", 0), in_device),
        ):
            with self.subTest(table):
                ((key, value, status, at, crc),) = self.sql(f"SELECT * FROM {table}")
                self.assertEqual((key, status, at), columns)
                self.assertEqual(crc, row_checksum(key, value.encode(), status, at))
                document = json.loads(value)
                self.assertEqual({**document, **fields}, document)
                compact = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
                self.assertEqual(value, compact)

    def store_while_changing(self, change: Callable[[int], object], store: Verb) -> int:
        """Store 20 times while another thread calls change(1), change(2) and so on.

        Returns how often that was not refused.
        """
        stored, stop = 0, threading.Event()

        def keep_changing() -> None:
            for n in itertools.count(1):
                change(n)
                if stop.is_set():
                    return

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-5)
        with in_background(keep_changing), ExitStack() as stack:
            stack.callback(stop.set)
            for _ in range(20):
                with suppress(InvalidRecordError):
                    store(self.db)
                    stored += 1
        return stored

    def test_a_record_whose_fields_another_thread_replaces_is_stored_as_it_was(self) -> None:
        """Each moment has a number, by which every field is known."""
        devices, payloads = devices_of(self.db), [bytes([n]) * 300_000 for n in range(5)]

        def task_at(n: int) -> dict[str, Any]:
            status = list(TaskStatus)[n % 5]
            moves = [StatusChange(status=status, at=at) for at in range(n, n + 40)]
            times = {"claimed_at": n, "completed_at": n}
            return {"status": status, "payload": payloads[n % 5], "history": moves, **times}

        def session_at(n: int) -> dict[str, Any]:
            said = [TranscriptEntry(role="user", content=str(n), timestamp=n)] * (n % 9)
            return {"transcript": said, "command_history": [str(n)] * (n % 9), "last_active": n}

        def config_at(n: int) -> dict[str, Any]:
            preferences = {"deep": [{"n": [n] * 50}] * 5}
            return {"keypairs": {str(n): "k"}, "model_preferences": preferences, "network": str(n)}

        def device_at(n: int) -> dict[str, Any]:
            parts = [Part(str(n), bytes(n % 1000)) for _ in range(20)]
            more = {"by_name": {str(n): b""}, "anything": {"n": [n] * 30}}
            return {"status": str(n), "last_seen": n, "part": parts[0], "parts": parts, **more}

        def store_task(db: OperatorDb) -> TaskRecord:
            db.delete_task("t")
            return db.store_task(task)

        def store_session(db: OperatorDb) -> None:
            db.delete_session("s")
            db.store_session(session)

        task, session = TaskRecord(task_id="t"), SessionState(session_id="s")
        config, device = OperatorConfig(), PairedDevice(device_id="d")
        for record, at, number, store, read in (
            (task, task_at, "claimed_at", store_task, lambda db: db.get_task("t")),
            (session, session_at, "last_active", store_session, lambda db: db.get_session("s")),
            (
                config,
                config_at,
                "network",
                lambda db: db.store_config(config),
                OperatorDb.get_config,
            ),
            (
                device,
                device_at,
                "status",
                lambda _: devices.put(device),
                lambda _: devices.get("d"),
            ),
        ):

            def change(n: int, record: Any = record, at: Any = at) -> None:
                vars(record).update(at(n))

            def store_and_read(
                db: OperatorDb,
                at: Any = at,
                number: str = number,
                store: Any = store,
                read: Any = read,
            ) -> None:
                returned, found = store(db), read(db)
                self.assertEqual(found, replace(found, **at(int(getattr(found, number)))))
                self.assertTrue(returned in (None, True, found))

            with self.subTest(type(record).__name__):
                change(0)
                self.assertEqual(self.store_while_changing(change, store_and_read), 20)
        self.assertEqual(self.db.check(), [])

    def test_a_record_that_another_thread_changes_in_place_is_stored_readable_or_refused(
        self,
    ) -> None:
        devices, numbers = devices_of(self.db), itertools.count()
        task, session = (
            TaskRecord(task_id="t", payload=bytes(300_000)),
            SessionState(session_id="s"),
        )
        config = OperatorConfig(model_preferences={"deep": {}})
        device = PairedDevice(device_id="d", parts=[Part("a") for _ in range(50)], anything=[{}])

        def change_task(n: int) -> None:
            task.history.append(StatusChange(status=list(TaskStatus)[n % 5], at=n))
            task.status = list(TaskStatus)[n % 5] if n % 50 else "lost"  # which is none
            del task.history[:-90]

        def change_session(n: int) -> None:
            session.transcript.append(TranscriptEntry(role="user", content=str(n)))
            session.command_history.append(str(n))
            del session.transcript[:-90], session.command_history[:-70]

        def change_config(n: int) -> None:
            deep = config.model_preferences["deep"]
            deep[str(n % 90)] = {"n": [n] * (n % 20)}
            deep.pop(str(n * 7 % 90), None)
            config.capabilities = ["voice"] if n % 50 else [5]

        def change_device(n: int) -> None:
            device.parts[n % 50].name = str(n) if n % 50 else n
            device.part = None if n % 2 else Part(str(n))
            device.by_name[str(n % 90)] = b"" if n % 500 else ""
            device.by_name.pop(str(n * 7 % 90), None)
            device.anything[0][str(n % 90)] = [n] * (n % 20)
            device.anything[0].pop(str(n * 7 % 90), None)
            device.status, device.last_seen = str(n % 5), n

        def store_task(db: OperatorDb) -> None:
            vars(task)["task_id"] = f"t{next(numbers)}"
            stored = db.store_task(task)
            self.assertEqual(db.get_task(stored.task_id), stored)

        def store_session(db: OperatorDb) -> None:
            vars(session)["session_id"] = f"s{next(numbers)}"
            db.store_session(session)
            self.assertIsNotNone(db.get_session(session.session_id))

        def store_config(db: OperatorDb) -> None:
            db.store_config(config)
            self.assertIsNotNone(db.get_config())

        def put_device(_: OperatorDb) -> None:
            devices.put(device)
            self.assertIsNotNone(devices.get("d"))

        for change, store in (
            (change_task, store_task),
            (change_session, store_session),
            (change_config, store_config),
            (change_device, put_device),
        ):
            with self.subTest(store.__name__):
                self.store_while_changing(change, store)
        self.assertEqual(self.db.check(), [])

    def test_storing_a_task_leaves_the_given_one_alone_and_returns_what_is_stored(self) -> None:
        plain = TaskRecord(task_id="plain")
        plain.status = "completed"  # as text
        store_tasks(self.db, "moved", "completed later")
        self.db.update_task_status("moved", "in_progress", signature="sig")
        for given in (
            plain,
            TaskRecord(task_id="new", payload=b"p", status=TaskStatus.COMPLETED),
            TaskRecord(task_id="moved", status=TaskStatus.DISPUTED, description="d"),
            TaskRecord(task_id="completed later", status=TaskStatus.COMPLETED),
        ):
            with self.subTest(given.task_id):
                before, moves = repr(given), given.history
                stored = self.db.store_task(given)
                self.assertEqual(repr(given), before)
                self.assertEqual(stored, self.db.get_task(given.task_id))
                self.assertIsInstance(stored.status, TaskStatus)
                stored.history.clear()
                self.assertIs(given.history, moves)
                self.assertEqual(repr(given), before)
        self.assertEqual(self.db.check(), [])


class CustomNamespaces(DatabaseTest):
    """Any dataclass of an operator gets what our records have, or is refused with a reason."""

    def declare(self, record_type: Any) -> operator_db.Namespace[Any]:
        """Return a namespace of this class, with its ids in `name`."""
        return self.db.namespace(record_type.__name__.lower(), record_type, key="name")

    def test_a_custom_namespace_has_every_verb(self) -> None:
        devices = devices_of(self.db)
        phone = PairedDevice(device_id="phone", last_seen=5)
        radio = PairedDevice(device_id="radio", last_seen=1, status="")
        watch = PairedDevice(device_id="watch", last_seen=3)

        self.assertTrue(devices.put(watch))
        self.assertTrue(devices.put(phone))
        self.assertFalse(devices.put(replace(phone, ratio=2.0), if_absent=True))
        self.assertTrue(devices.put(radio, if_absent=True))
        self.assertEqual((devices.get("phone"), devices.get("lamp")), (phone, None))

        self.assertEqual(devices.list(), [radio, watch, phone])
        self.assertEqual((devices.list("paired"), devices.list("")), ([watch, phone], [radio]))
        self.assertEqual(devices.list(newest_first=True, limit=2), [phone, watch])
        self.assertEqual((devices.count(), devices.count(""), devices.count("x")), (3, 1, 0))
        self.assertEqual(devices.statuses(), ["", "paired"])
        self.assertEqual(list(devices.keys()), ["phone", "radio", "watch"])
        self.assertEqual(list(devices.values()), [phone, radio, watch])
        self.assertEqual(list(devices.items("")), [("radio", radio)])

        found = devices.update("radio", lambda device: replace(device, status="paired"))
        self.assertEqual(found, replace(radio, status="paired"))
        self.assertEqual(devices.get("radio"), found)
        self.assertEqual((devices.count("paired"), devices.count("")), (3, 0))

        self.assertEqual((devices.delete("radio"), devices.delete("radio")), (True, False))
        devices.put(radio)
        self.assertEqual((devices.clear(""), devices.get("radio")), (1, None))
        self.assertEqual((devices.prune(0, dry_run=True), devices.count()), (2, 2))
        self.assertEqual((devices.prune(0), devices.count()), (2, 0))
        self.assertEqual(list(devices.problems()), [])

    def test_an_age_in_milliseconds_that_an_earlier_version_stored_is_still_read(self) -> None:
        now, db = 1_774_627_200_000, self.db
        old = PairedDevice(device_id="old", last_seen=now)
        devices_of(db).put(replace(old, last_seen=5))
        out = BytesIO()
        db.export(out, include_secrets=True)
        # where the class is not known, an import stores the line as it was written
        with self.open(self.other) as other:
            line = out.getvalue().replace(b'"at":5', b'"at":%d' % now)
            other.import_(BytesIO(line.replace(b'"last_seen":5', b'"last_seen":%d' % now)))
        other = self.open(self.other)
        devices = devices_of(other)
        self.assertEqual((devices.get("old"), devices.list()), (old, [old]))
        self.assertEqual((other.check(), devices.prune(0, dry_run=True)), ([], 0))
        change = partial(devices.update, "old")
        for is_mended in (False, True):
            seen = now // 1000 if is_mended else now
            mend = partial(change, lambda device, seen=seen: replace(device, last_seen=seen))
            if is_mended:
                self.assertEqual(mend(), devices.get("old"))
            else:
                self.assert_refused(InvalidRecordError, mend, "milliseconds")
        self.assertEqual((devices.prune(0), other.check()), (1, []))

    def test_an_enum_is_stored_by_its_values_whatever_else_it_is(self) -> None:
        class Label(StrEnum):
            LOW = "l", "Low"
            HIGH = "h", "High"

            def __new__(cls, value: str, text: str) -> Any:
                self = str.__new__(cls, text)
                self._value_ = value
                return self

        columns: Any = [("name", str), ("label", Label), ("labels", list[Label])]
        Ticket: Any = dataclasses.make_dataclass("Ticket", columns)
        tickets = self.declare(Ticket)
        ticket = Ticket("a", Label.HIGH, [Label.LOW])
        tickets.put(ticket)
        self.assertEqual(tickets.get("a"), ticket)
        ((value,),) = self.sql("SELECT value FROM ticket")
        self.assertEqual(json.loads(value), {"name": "a", "label": "h", "labels": ["l"]})

    def test_a_frozen_record_with_slots_and_flags_is_read_through_its_constructor(self) -> None:
        made: list[Rights] = []

        @dataclass(slots=True, frozen=True)
        class Grant:
            name: str
            rights: Rights

            def __post_init__(self) -> None:
                made.append(self.rights)

        grants = self.declare(Grant)
        for rights in (Rights.READ, Rights.READ | Rights.WRITE, Rights(0)):
            grant = Grant("a", rights)
            grants.put(grant)
            made.clear()
            self.assertEqual((grants.get("a"), made), (grant, [rights]))

    def test_a_name_may_be_a_word_of_sql(self) -> None:
        tally = Tally(name="one", count=1)
        for name in ("order", "index", "values", "table", "transaction", "select", "a_1", "x" * 48):
            with self.subTest(name):
                namespace = self.db.namespace(name, Tally, key="name", status="name", at="count")
                namespace.put(tally)
                self.assertEqual((namespace.get("one"), namespace.list("one")), (tally, [tally]))
                self.assertEqual((list(namespace.values()), namespace.count()), ([tally], 1))
                self.assertEqual(self.db.check(), [])
                self.assertEqual(namespace.prune(0, dry_run=True), 1)
                self.assertTrue(namespace.delete("one"))

    def assert_not_declared(
        self, error: type[OperatorDbError], name: Any, record_type: Any, word: str, **columns: Any
    ) -> None:
        """Fail unless a namespace is refused, with this word, and the schema is as before."""
        declare = partial(self.db.namespace, name, record_type, **{"key": "name", **columns})
        schema = self.sql("SELECT * FROM sqlite_schema")
        self.assert_refused(error, declare, word)
        self.assertEqual(self.sql("SELECT * FROM sqlite_schema"), schema)

    def test_a_name_that_will_not_do_is_refused(self) -> None:
        names = (
            *("", "_a", "1a", "a-b", "a b", "a\n", "a\0b", "x" * 49, None, 5, b"a"),
            *("A", "Tasks", "é", "ä", "\u0430"),  # the last looks like an a, and is Cyrillic
            *("a(key)--", 'a"b', "a'b", "a; DROP TABLE proofs", 'a"; DROP TABLE tasks'),
            *("sqlite_a", "tasks", "sessions", "session_log", "proofs", "config"),
        )
        for name in names:
            with self.subTest(name=name):
                self.assert_not_declared(InvalidRecordError, name, Tally, repr(name))
        devices_of(self.db)
        for name in ("tasks_status_at", "devices_status_at"):
            with self.subTest("an index has it", name=name):
                self.assert_not_declared(OperatorDbError, name, Tally, name)
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
        for label, record_type, columns, word in cases:
            with self.subTest(label):
                self.assert_not_declared(InvalidRecordError, "odd", record_type, word, **columns)

    def test_an_invalid_id_age_or_part_of_a_custom_record_is_refused(self) -> None:
        devices = devices_of(self.db)
        cases = (
            ("device_id", "", "id"),
            ("device_id", "a\n", "id"),
            ("last_seen", LAST_SECOND + 1, str(LAST_SECOND + 1)),
            ("last_seen", FIRST_SECOND - 1, "devices: at="),
            ("part", Part(3), "name"),
            ("part", Part("x", "text"), "raw"),
            ("parts", [Part("x"), Part("\ud800")], "name"),
        )
        for name, value, word in cases:
            put = partial(devices.put, PairedDevice(**{"device_id": "d", name: value}))
            with self.subTest(name, value=value):
                self.assert_refused(InvalidRecordError, put, word)
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

        changed = Computing("a")
        changed.seen = 5
        for record in (Doubling("a"), changed):
            namespace, record_type = self.declare(type(record)), type(record).__name__
            self.assert_refused(InvalidRecordError, partial(namespace.put, record), record_type)
            self.assertEqual(namespace.count(), 0)
        self.assertTrue(self.declare(Computing).put(Computing("a")))


class ErrorsKeepNothing(DatabaseTest):
    def test_an_error_that_was_handled_keeps_no_frame_of_its_caller(self) -> None:
        class Local:
            pass

        db = self.open()
        store_tasks(db, "t")
        self.sql("DROP TABLE proofs")

        def use() -> weakref.ref[Local]:
            local = Local()
            with suppress(StorageError):
                db.get_proof("t")
            return weakref.ref(local)

        kept = use()
        gc.collect()
        self.assertIsNone(kept())


def make_class(*fields: tuple[Any, ...]) -> Any:
    """Return a dataclass Thing with an id, `name`, and these fields."""
    return dataclasses.make_dataclass("Thing", [("name", str), *fields], kw_only=True)


def was(former: str, **more: Any) -> Any:
    return field(metadata={"was": former}, **more)


class ClassesChangeAndLoseNothing(DatabaseTest):
    """A class may change from build to build, and each build keeps what others have stored."""

    def things(self, record_type: Any, **columns: str) -> operator_db.Namespace[Any]:
        """Return the namespace as another build of the operator, which has this class, sees it."""
        return self.open().namespace("things", record_type, key="name", **columns)

    def document(self, name: str = "a") -> dict[str, Any]:
        ((value,),) = self.sql("SELECT value FROM things WHERE key = ?", f"things:{name}")
        return dict(json.loads(value))

    def test_a_new_field_takes_its_default_and_an_older_build_reads_on(self) -> None:
        old_type, new_type = make_class(), make_class(("size", int, 3))
        self.things(old_type).put(old_type(name="a"))
        things = self.things(new_type)
        self.assertEqual(things.get("a"), new_type(name="a", size=3))
        things.put(new_type(name="b", size=5))
        self.assertEqual(self.things(old_type).get("b"), old_type(name="b"))

    def test_a_record_that_the_class_cannot_take_any_more_is_invalid_and_not_damaged(self) -> None:
        old_type = make_class(("size", int, 3))
        self.things(old_type).put(old_type(name="a"))
        for new_type, word in (
            (make_class(("colour", str)), "Thing.colour is missing, and has no default"),
            (make_class(("size", str, "x")), "Thing.size must be a str"),
        ):
            things = self.things(new_type)
            reads = (partial(things.get, "a"), things.list, partial(list, things.values()))
            for read in reads:
                message = str(self.assert_refused(InvalidRecordError, read, "things:a", word))
                self.assertNotIn("damaged", message)
            (problem,) = things.problems()
            self.assertIn(word, problem)
        self.assertEqual(self.open().check(), [])
        self.assertEqual(self.things(old_type).get("a"), old_type(name="a"))

    def test_a_renamed_field_is_read_under_its_former_name(self) -> None:
        Old = make_class(("size", int), ("part", Any, None))
        NewPart = make_class(("bytes", int, was("raw")))
        New = make_class(
            ("length", int, was("size")),
            ("piece", NewPart | None, was("part", default=None)),
        )
        self.things(Old).put(Old(name="a", size=7, part={"name": "p", "raw": 9}))
        things = self.things(New)
        found = New(name="a", length=7, piece=NewPart(name="p", bytes=9))
        self.assertEqual((things.get("a"), things.list()), (found, [found]))
        things.update("a", lambda thing: replace(thing, length=8))
        part = {"name": "p", "bytes": 9}
        self.assertEqual(self.document(), {"name": "a", "length": 8, "piece": part})
        self.plant("things:a", b'{"name":"a","size":1,"length":2,"piece":null}')
        self.assertEqual(things.get("a").length, 2, "the present name wins")
        things.update("a", lambda thing: replace(thing, length=3))
        self.assertNotIn("size", self.document())

    def test_a_former_name_that_is_none_is_refused(self) -> None:
        for label, record_type in (
            ("a present name", make_class(("size", int, was("name")))),
            ("no str", make_class(("size", int, was(5)))),  # type: ignore[arg-type]
            ("two of one", make_class(("size", int, was("x")), ("width", int, was("x")))),
        ):
            with self.subTest(label):
                self.assert_refused(InvalidRecordError, partial(self.things, record_type), "was")

    def test_update_keeps_what_another_build_stores_and_put_drops_it(self) -> None:
        NewPart, Part = make_class(("raw", int, 0), ("added", str, "")), make_class(("raw", int, 0))
        New, Old = (
            make_class(
                ("size", int, 0),
                ("part", part | None, None),
                ("parts", list[part], field(default_factory=list)),
                ("by_name", dict[str, part], field(default_factory=dict)),
                *more,
            )
            for part, more in (
                (NewPart, [("added", dict, field(default_factory=dict))]),
                (Part, []),
            )
        )
        parts = [NewPart(name=name, added=f"of {name}") for name in "xyz"]
        new = New(
            name="a", part=parts[0], parts=parts, by_name={"k": parts[1]}, added={"deep": [1]}
        )
        self.things(New).put(new)

        def change(thing: Any) -> Any:
            thing.size, thing.part.raw, thing.by_name["k"].raw = 1, 2, 3
            thing.parts = [thing.parts[2], thing.parts[0]]  # one has gone, two have moved
            return thing

        self.things(Old).update("a", change)
        wanted = New(
            name="a",
            size=1,
            part=replace(parts[0], raw=2),
            parts=[parts[2], parts[0]],
            by_name={"k": replace(parts[1], raw=3)},
            added={"deep": [1]},
        )
        self.assertEqual(self.things(New).get("a"), wanted)

        def change_in_place(thing: Any) -> Any:
            thing.parts[1].raw = 9
            return thing

        def change_and_append(thing: Any) -> Any:
            thing.parts[0].raw = 7
            thing.parts.append(Part(name="new"))
            return thing

        self.things(Old).update("a", change_and_append)
        parts = [replace(parts[2], raw=7), parts[0], parts[1]]
        found = self.things(New).get("a").parts
        self.assertEqual(found, [*parts[:2], NewPart(name="new")])
        self.things(Old).update("a", lambda thing: replace(thing, part=None))
        self.assertIsNone(self.things(New).get("a").part)
        parts = [parts[1], None, parts[0]]
        self.things(Old).update("a", change_in_place)
        wanted_parts = [parts[2], replace(parts[0], raw=9), NewPart(name="new")]
        self.assertEqual(self.things(New).get("a").parts, wanted_parts)
        old = self.things(Old)
        old.put(old.get("a"))
        self.assertEqual(self.things(New).get("a").added, {})
        self.assertEqual(self.open().check(), [])

    def test_status_and_age_that_are_declared_later_or_moved_find_every_record(self) -> None:
        Thing = make_class(("state", str, "new"), ("mood", str | None, None), ("seen", int, 0))
        things = self.things(Thing)
        for n in range(1500):  # more than a walk reads at a time
            things.put(Thing(name=f"{n}", state="old" if n % 3 else "new", mood="calm", seen=n))
        self.sql("UPDATE things SET crc = crc + 1 WHERE key = 'things:7'")
        for columns, status, count in (
            ({"status": "state", "at": "seen"}, "new", 500),
            ({"status": "mood", "at": "seen"}, "calm", 1499),
            ({}, None, 1500),
            ({"status": "state"}, "new", 500),
        ):
            with self.subTest(**columns):
                things = self.things(Thing, **columns)
                self.assertEqual(things.count(status), count)
                if "at" in columns:
                    self.assertEqual(things.list(status, limit=1)[0].seen, 0)
                (problem,) = self.open().check()
                self.assertIn("things:7", problem)

    def test_a_moved_column_that_a_record_cannot_give_changes_nothing(self) -> None:
        Thing = make_class(("state", str, "new"), ("mood", Any, None))
        things = self.things(Thing, status="state")
        things.put(Thing(name="a", mood="calm"))
        things.put(Thing(name="b", mood=5))
        before = self.sql("SELECT * FROM things UNION SELECT * FROM _namespaces")
        moved = partial(self.things, Thing, status="mood")
        self.assert_refused(InvalidRecordError, moved, "things:b", "mood")
        self.assertEqual(self.sql("SELECT * FROM things UNION SELECT * FROM _namespaces"), before)
        things.update("b", lambda thing: replace(thing, mood=None))
        self.assertEqual(self.things(Thing, status="mood").count("calm"), 1)

    def test_columns_are_moved_wholly_or_not_and_never_inside_a_block(self) -> None:
        Thing = make_class(("state", str, "new"))
        things = self.things(Thing)
        for n in range(40):
            things.put(Thing(name=f"{n}"))
        db = self.open()
        moved = partial(db.namespace, "things", Thing, key="name", status="state")
        with self.assertRaises(ConflictError), db.transaction():
            moved()

        def kill_at(number: int, _: Say) -> None:
            with interrupt_at_call(number, kill=True):
                self.things(Thing, status="state")

        counts = set[int]()
        for number in range(60, 1200, 120):
            self.assertEqual(Child(partial(kill_at, number)).last_words(), [])
            counts.update(count for (count,) in self.sql("SELECT count(status) FROM things"))
        self.assertEqual(counts, {0})
        moved()
        self.assertEqual(self.sql("SELECT count(status) FROM things"), [(40,)])

    def test_rows_that_come_from_elsewhere_get_the_columns_of_today(self) -> None:
        """From a backup or an export of an older build: status and age are not yet the new ones."""
        now = int(time.time())
        Thing = make_class(("state", str, "new"), ("seen", int, 5), ("touched", int, now))
        columns = {"status": "state", "at": "touched"}
        self.things(Thing, at="seen").put(Thing(name="a"))
        old = self.beside("version 1.db")
        with OperatorDb(self.path) as db:
            db.backup(self.other)
            db.backup(old)
            db.export(self.file)
        make_version_1(old)
        header, *lines = read_bytes(self.file).splitlines()
        undeclared = json.dumps({**json.loads(header), "namespaces": []}).encode()

        for label, bring in (
            ("restore", lambda db: db.restore(self.other)),
            ("restore of version 1", lambda db: db.restore(old)),
            ("import", lambda db: db.import_(self.file)),
            ("undeclared import", lambda db: db.import_(BytesIO(b"\n".join([undeclared, *lines])))),
        ):
            for is_declared in (False, True):
                path = self.beside(f"{label} {is_declared}.db")
                with self.subTest(label, is_declared=is_declared):
                    with OperatorDb(path) as db:
                        if is_declared:
                            db.namespace("things", Thing, key="name", **columns)
                    with OperatorDb(path) as db:
                        bring(db)
                    with OperatorDb(path) as db:
                        things = db.namespace("things", Thing, key="name", **columns)
                        self.assertEqual((things.prune(30), len(things.list("new"))), (0, 1))

    def test_what_a_backup_gives_back_gets_the_columns_of_today(self) -> None:
        now = int(time.time())
        Thing = make_class(("seen", int, 5), ("touched", int, now))
        self.things(Thing, at="seen").put(Thing(name="a"))
        with OperatorDb(self.path) as db:
            db.backup(self.other)
        self.things(Thing, at="touched")
        self.sql("UPDATE things SET crc = crc + 1")
        with OperatorDb(self.path) as db:
            self.assertEqual(len(db.repair(backup=self.other)), 2)
        things = self.things(Thing, at="touched")
        self.assertEqual((things.prune(30), things.count()), (0, 1))

    def test_another_key_is_refused_unless_it_is_the_same_field_renamed(self) -> None:
        Thing, Renamed = make_class(("other", str, "x")), make_class(("id", str, was("name")))
        self.things(Thing).put(Thing(name="a"))
        other_key = partial(self.open().namespace, "things", Thing, key="other")
        self.assert_refused(ConflictError, other_key, "key='name'")
        Renamed = dataclasses.make_dataclass("Thing", [("id", str, was("name"))])
        renamed: Any = self.open().namespace("things", Renamed, key="id")
        self.assertEqual(renamed.get("a"), Renamed(id="a"))

    def test_a_build_with_other_columns_never_prunes_by_them(self) -> None:
        Thing = make_class(("made", int, 0), ("seen", int, 0))
        stale, now = self.things(Thing, at="made"), int(time.time())
        stale.put(Thing(name="a", seen=now))
        things = self.things(Thing, at="seen")
        for dry_run in (True, False):
            prune = partial(stale.prune, 30, dry_run=dry_run)
            self.assert_refused(ConflictError, prune, "things", "seen")
        self.assertEqual((things.prune(30), things.count()), (0, 1))

    def test_a_property_that_a_clock_decides_is_no_damage(self) -> None:
        moment = "fresh"

        @dataclass
        class Thing:
            name: str

            @property
            def state(self) -> str:
                return moment

        things = self.things(Thing, status="state")
        things.put(Thing("a"))
        moment = "stale"
        self.assertEqual((things.get("a"), things.list("fresh")), (Thing("a"), [Thing("a")]))
        self.assertEqual(self.open().check(), [])
        things.update("a", lambda thing: thing)
        self.assertEqual((things.count("fresh"), things.count("stale")), (0, 1))
        with OperatorDb(self.path) as db:  # an import, too, takes what the class gives now
            db.namespace("things", Thing, key="name", status="state")
            db.export(self.file)
            moment = "old"
            db.import_(self.file)
        self.assertEqual((things.count("stale"), things.count("old")), (0, 1))

    def test_a_read_only_database_is_used_as_it_is_declared(self) -> None:
        Thing = make_class(("state", str, "new"))
        with OperatorDb(self.path) as db:
            db.namespace("things", Thing, key="name").put(Thing(name="a"))
        with self.assert_bytes_unchanged():
            in_child(partial(self.read_with_other_columns, Thing))

    def read_with_other_columns(self, Thing: Any) -> None:
        with OperatorDb(self.path, read_only=True) as db:
            self.assertEqual(db.namespace("things", Thing, key="name").get("a"), Thing(name="a"))
            moved = partial(db.namespace, "things", Thing, key="name", status="state")
            self.assert_refused(ConflictError, moved, "things", "writable")


class ErrorsAreTyped(unittest.TestCase):
    def test_each_error_is_an_operator_db_error_and_a_builtin_kind_and_is_exported(self) -> None:
        kinds: dict[type[OperatorDbError], type[Exception]] = {
            InvalidRecordError: ValueError,
            NotFoundError: LookupError,
            ConflictError: RuntimeError,
            BusyError: TimeoutError,
            ClosedError: RuntimeError,
            ForeignFileError: ValueError,
            NewerSchemaError: ValueError,
            DamagedError: ValueError,
            StorageError: OSError,
            FileReplacedError: StorageError,
        }
        for error, kind in kinds.items():
            self.assertTrue(issubclass(error, OperatorDbError) and issubclass(error, kind), error)
        errors = {name for name in operator_db.__all__ if name.endswith("Error")}
        self.assertEqual(errors, {error.__name__ for error in (OperatorDbError, *kinds)})


# ==== Tasks, sessions, proofs =====================================================================


class ListsFindWhatTheyAreAskedFor(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        with self.db.transaction():
            for number in range(100):  # the higher the number, the older the task
                status = list(TaskStatus)[number % 5]
                store_tasks(self.db, f"{number:03}", status=status, claimed_at=1000 - number)

    def test_tasks_of_a_status_are_listed_oldest_first(self) -> None:
        cases: tuple[tuple[dict[str, Any], Iterable[int]], ...] = (
            ({"status": "disputed"}, range(98, 0, -5)),
            ({"status": TaskStatus.DISPUTED, "limit": 2}, (98, 93)),
            ({"status": "disputed", "limit": 2, "newest_first": True}, (3, 8)),
            ({}, range(99, -1, -1)),
            ({"newest_first": True}, range(100)),
            ({"limit": 3}, (99, 98, 97)),
            ({"limit": 3, "newest_first": True}, (0, 1, 2)),
            ({"limit": 0}, ()),
        )
        for options, numbers in cases:
            with self.subTest(**options):
                found = [int(task.task_id) for task in self.db.list_tasks(**options)]
                self.assertEqual(found, [*numbers])
        by_status, walk = self.db.list_tasks_by_status("disputed"), self.db.iter_tasks("claimed")
        self.assertEqual(by_status, self.db.list_tasks("disputed"))
        self.assertEqual([int(task.task_id) for task in walk], [*range(0, 100, 5)])
        self.assertEqual(self.db.count_tasks(), dict.fromkeys(TaskStatus, 20))

    def test_tasks_of_one_age_are_listed_in_the_order_of_their_first_storing(self) -> None:
        store_tasks(self.db, "b", "c", "a", claimed_at=2000)
        self.db.update_task_status("c", "disputed")
        found = [task.task_id for task in self.db.list_tasks(limit=3, newest_first=True)]
        self.assertEqual(found, ["a", "c", "b"])
        self.assertEqual([task.task_id for task in self.db.list_tasks()][-3:], found[::-1])

    def test_a_status_query_reads_no_task_of_another_status(self) -> None:
        self.sql("UPDATE tasks SET value = 'not json' WHERE status != 'resolved'")
        self.assertEqual(len(self.db.list_tasks_by_status("resolved")), 20)
        self.assert_refused(DamagedError, self.db.list_tasks, "tasks:")

    def test_queries_and_walks_are_answered_by_an_index_without_a_sort(self) -> None:
        statements: list[str] = []
        self.watch_connections(listener=statements.append)
        db = self.open()
        by_status = r"INDEX tasks_status_at"
        by_key = r"INDEX \S+ \(key>\? AND key<\?\)"  # from where the last batch ended
        queries: tuple[tuple[str, Callable[[], object], str], ...] = (
            ("of a status", lambda: db.list_tasks("disputed"), by_status),
            ("the newest", lambda: db.list_tasks(limit=5, newest_first=True), by_status),
            ("of any status", lambda: db.list_tasks(limit=5), by_status),
            ("how many of each status", db.count_tasks, by_status),
            ("old enough to be pruned", lambda: db.prune(1, None, dry_run=True), by_status),
            ("a walk", lambda: list(db.iter_tasks()), by_key),
            ("a walk of a status", lambda: list(db.iter_tasks("disputed")), by_key),
        )
        for label, query, index in queries:
            statements.clear()
            query()
            about_tasks = [statement for statement in statements if "tasks" in statement]
            plans = [self.sql(f"EXPLAIN QUERY PLAN {statement}") for statement in about_tasks]
            steps = [step[3] for plan in plans for step in plan]
            with self.subTest(label):
                self.assertNotIn("TEMP B-TREE", " ".join(steps), "a sort")
                steps = [step for step in steps if " tasks" in step]
                self.assertNotEqual(steps, [])
                for step in steps:
                    self.assertRegex(step, f"SEARCH tasks USING (COVERING )?{index}")


class WalksSeeEveryRecordOnce(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        with self.db.transaction():
            store_tasks(self.db, *(f"{number:04}" for number in range(3000)), claimed_at=0)

    def test_a_walk_sees_every_task_that_stays_once_while_others_come_and_go(self) -> None:
        seen: list[str] = []
        for number, task in enumerate(self.db.iter_tasks()):
            seen.append(task.task_id)
            if number % 100 == 0:
                self.db.delete_task(f"{2999 - number // 100:04}")
                store_tasks(self.db, f"{number:04}x")
                self.db.update_task_status(f"{number:04}", "completed")
        stayed = [f"{number:04}" for number in range(2970)]
        self.assertEqual([name for name in seen if len(name) == 4 and name < "2970"], stayed)
        self.assertEqual(len(seen), len(set(seen)))

    def test_a_walk_holds_no_connection_between_batches_so_that_the_wal_can_be_cut(self) -> None:
        walk = self.db.iter_tasks()
        next(walk)
        self.assertEqual(self.sql("PRAGMA wal_checkpoint(TRUNCATE)"), [(0, 0, 0)])
        self.db.close()
        self.assert_refused(ClosedError, lambda: list(walk), self.path)


class TasksKeepTheirHistory(DatabaseTest):
    CLAIMED = StatusChange(status=TaskStatus.CLAIMED, at=1, signature="s0")
    STARTED = StatusChange(status=TaskStatus.IN_PROGRESS, at=2)
    DONE = StatusChange(status=TaskStatus.COMPLETED, at=3, signature="s1")
    LATE = StatusChange(status=TaskStatus.DISPUTED, at=8, signature="s2")
    MOVES = (CLAIMED, STARTED, DONE)
    STORED: ClassVar[dict[str, Any]] = {
        "payload": b"job",
        "description": "old",
        "reward_lamports": 5,
        "reward_skr_tokens": 0,
        "creator": "them",
        "completed_at": 3,
        "on_chain_signature": "s1",
    }
    CLAIM_OF_OLD: ClassVar[dict[str, Any]] = {
        name: value for name, value in STORED.items() if name != "completed_at"
    } | {"on_chain_signature": "s0"}

    def store_completed(self) -> TaskRecord:
        """Store a task that was claimed, started and completed."""
        self.db.delete_task("t")
        return self.db.store_task(self.read_at(*self.MOVES, **self.STORED))

    @staticmethod
    def read_at(*moves: StatusChange, **fields: Any) -> TaskRecord:
        """Return the task as it was read after these moves; another status is set since."""
        status = fields.pop("status", moves[-1].status)
        given = TaskRecord(task_id="t", claimed_at=1, history=[*moves], **fields)
        given.status = TaskStatus(status)
        return given

    @staticmethod
    def made(**fields: Any) -> TaskRecord:
        """Return the task as an operator makes it that knows nothing of the stored one."""
        return TaskRecord(**{"task_id": "t", "claimed_at": 100, **fields})

    def task(self) -> Any:
        return self.db.get_task("t")

    def signatures(self) -> list[str | None]:
        return [change.signature for change in self.task().history]

    def test_every_status_change_is_kept_once_with_its_time_and_signature(self) -> None:
        store_tasks(self.db, "t", claimed_at=10, on_chain_signature="s0")
        changes = [
            ("in_progress", 20, None),
            ("completed", 30, "s1"),
            ("disputed", 40, "s2"),
            ("completed", 50, "s3"),
        ]
        for status, at, signature in (*changes, *changes[1:], ("completed", 60, None)):
            task = self.db.update_task_status("t", status, at=at, signature=signature)
        found = [(change.status, change.at, change.signature) for change in task.history]
        self.assertEqual(found, [("claimed", 10, "s0"), *changes])
        self.assertEqual(task.completed_at, 30, "the first completion")
        self.assertEqual((task.status, task.on_chain_signature), ("completed", "s3"))
        self.assertEqual(self.task(), task)

    def test_a_task_stored_again_has_its_new_fields_and_a_longer_history(self) -> None:
        store_tasks(self.db, "t", claimed_at=1, on_chain_signature="s0", description="old")
        self.db.update_task_status("t", "disputed", at=2, signature="s1")
        fresh = TaskRecord(task_id="t", claimed_at=1, status="resolved", on_chain_signature="s2")
        given = replace(fresh, history=[*fresh.history])
        stored = self.db.store_task(given)
        self.assertEqual((self.task(), given), (stored, fresh), "the given record is left alone")
        self.assertEqual((stored.description, stored.status), (None, "resolved"))
        self.assertEqual(self.signatures(), ["s0", "s1", "s2"])

    def test_a_status_change_made_by_two_writers_is_in_the_history_once(self) -> None:
        store_tasks(self.db, "t", claimed_at=1)
        mine = self.task()
        self.db.update_task_status("t", "disputed", at=8)
        for status in ("disputed", "resolved", "resolved"):
            mine.status = TaskStatus(status)
            mine = stored = self.db.store_task(mine)
        statuses = [each.status for each in stored.history]
        self.assertEqual(statuses, ["claimed", "disputed", "resolved"])
        self.assertEqual((self.task(), stored.history[1].at), (stored, 8))

    def test_a_stale_record_that_says_nothing_new_changes_nothing(self) -> None:
        made, read_at, old = self.made, self.read_at, self.CLAIM_OF_OLD
        set_since = made()
        set_since.status, set_since.on_chain_signature = TaskStatus.COMPLETED, "s1"
        cases: tuple[tuple[str, TaskRecord], ...] = (
            ("a claim done over", made()),
            ("a claim done over, with its signature and fields", made(**old)),
            ("a start done over", made(status="in_progress")),
            ("a completion done over", made(status="completed", **self.STORED)),
            ("status and signature set since it was made", set_since),
            ("read before it was started", read_at(self.CLAIMED, **old)),
            ("and then started by itself", read_at(self.CLAIMED, status="in_progress", **old)),
            ("read before it was completed", read_at(self.CLAIMED, self.STARTED, **old)),
            ("no history at all", replace(made(), history=[])),
        )
        for label, given in cases:
            stored = self.store_completed()
            with self.subTest(label):
                self.assertEqual(self.db.store_task(given), stored)
                self.assertEqual(self.task(), stored)

    def test_a_record_that_is_stale_or_would_move_the_task_back_is_refused(self) -> None:
        made, read_at, claimed, moves = self.made, self.read_at, self.CLAIMED, self.MOVES
        news: dict[str, Any] = {
            "payload": b"new",
            "description": "new",
            "reward_lamports": 6,
            "reward_skr_tokens": 1,
            "creator": "me",
            "on_chain_signature": "new",
        }
        of_status = {"status": "completed", "completed_at": 9}
        again, other = replace(claimed, at=9), replace(self.STARTED, at=9)
        cases: tuple[tuple[str, TaskRecord], ...] = (
            *((f"made anew, new {name}", made(**{name: news[name]})) for name in news),
            *(
                (f"read before, new {name}", read_at(claimed, **{name: news[name]}))
                for name in news
            ),
            ("made anew, another completion", made(**of_status)),
            ("read before, moved to where it never was", read_at(claimed, status="disputed")),
            ("read now, moved back", read_at(*moves, status="claimed", **self.STORED)),
            ("a longer history that leads back", read_at(*moves, again, **self.STORED)),
            ("another history that leads back", read_at(claimed, other, **self.CLAIM_OF_OLD)),
        )
        for label, given in cases:
            stored, before = self.store_completed(), replace(given, history=[*given.history])
            with self.subTest(label):
                store = partial(self.db.store_task, given)
                self.assert_refused(ConflictError, store, "tasks:'t'", "read it", "update_task")
                self.assertEqual((self.task(), given), (stored, before))

    def test_a_record_that_is_not_stale_replaces_the_fields_and_adds_to_the_history(self) -> None:
        made, read_at, moves, late = self.made, self.read_at, self.MOVES, self.LATE
        claimed, done = StatusChange(status=TaskStatus.CLAIMED, at=5), replace(self.DONE, at=9)
        resolved = StatusChange(status=TaskStatus.RESOLVED, at=100)
        moved = mock.ANY  # the entry that storing it adds
        cases: tuple[tuple[str, TaskRecord, tuple[StatusChange, ...]], ...] = (
            ("equal", read_at(*moves), moves),
            ("equal, moved on", read_at(*moves, status="disputed"), (*moves, moved)),
            ("longer", read_at(*moves, late), (*moves, late)),
            (
                "longer, and moved on",
                read_at(*moves, late, status="resolved"),
                (*moves, late, moved),
            ),
            ("made anew, with a later status", made(status="resolved"), (*moves, resolved)),
            ("another", read_at(claimed, done), (*moves, claimed, done)),
        )
        for label, given, wanted in cases:
            self.store_completed()
            given.description = "new"
            with self.subTest(label):
                stored = self.db.store_task(given)
                self.assertEqual((stored.history, stored.status), ([*wanted], given.status))
                self.assertEqual((stored.description, stored.payload), ("new", b""))
                self.assertEqual(stored.completed_at, 3, "no None takes its place")
                latest = "s2" if late in given.history else "s1"
                self.assertEqual(stored.on_chain_signature, latest, "no None takes its place")
                self.assertEqual(self.task(), stored)

    def test_a_record_made_with_the_very_history_that_is_stored_replaces_the_fields(self) -> None:
        self.db.store_task(self.made(description="old", payload=b"job"))
        stored = self.db.store_task(self.made(description="new"))
        self.assertEqual((stored.description, stored.payload), ("new", b""))
        self.assertEqual((self.task(), len(stored.history)), (stored, 1))

    def test_a_signature_is_recorded_with_the_move_that_it_was_given_for(self) -> None:
        store_tasks(self.db, "t", claimed_at=1, on_chain_signature="s0")
        task = self.task()
        task.status = TaskStatus.IN_PROGRESS
        task = self.db.store_task(task)
        task.status, task.on_chain_signature = TaskStatus.COMPLETED, "s1"
        self.db.store_task(task)
        self.assertEqual(self.signatures(), ["s0", None, "s1"])

    def test_a_completed_task_stays_so_after_a_stale_store_and_a_claim_done_over(self) -> None:
        """Replay two accidents, each of which put a completed task back to claimed."""
        claim = partial(TaskRecord, task_id="t", payload=b"job", on_chain_signature="s0")
        self.db.store_task(claim(claimed_at=1))
        stale = self.task()  # held by another part of the operator while the task is completed
        done = self.db.complete_task("t", proof("t"), signature="s1")
        stale.description = "noted meanwhile"
        self.assert_refused(ConflictError, partial(self.db.store_task, stale), "tasks:'t'")
        self.assertEqual(self.task(), done)

        self.db.close()
        db = self.open()  # the operator was restarted, and claims what it finds on chain
        self.assertEqual(db.store_task(claim()), done)
        self.assertEqual(db.complete_task("t", proof("t")), done)
        noted = db.update_task("t", lambda task: replace(task, description="noted at last"))
        self.assertEqual(noted, replace(done, description="noted at last"))
        self.assertEqual(db.list_tasks_by_status("completed"), [noted])

    def test_an_update_changes_fields_and_adds_a_changed_status_to_the_history(self) -> None:
        def moved(task: TaskRecord) -> TaskRecord:
            task.status, task.on_chain_signature = TaskStatus.COMPLETED, "s1"
            return task

        def forgetful(task: TaskRecord) -> TaskRecord:
            task.history.clear()
            task.description = task.completed_at = task.on_chain_signature = None
            return task

        store_tasks(self.db, "t", claimed_at=1, on_chain_signature="s0")
        described = self.db.update_task("t", lambda task: replace(task, description="new"))
        self.assertEqual((self.task(), described.description), (described, "new"))
        self.assertEqual(self.signatures(), ["s0"])
        with mock.patch("time.time", return_value=30.0):
            done = self.db.update_task("t", moved)
            back = self.db.update_task("t", lambda task: replace(task, status="in_progress"))
        entries = [(change.status, change.at, change.signature) for change in back.history]
        moves = [("claimed", 1, "s0"), ("completed", 30, "s1"), ("in_progress", 30, None)]
        self.assertEqual((done.completed_at, entries), (30, moves))
        self.assertEqual((self.task(), back.completed_at), (back, 30), "the first completion")
        self.assertEqual(self.db.update_task("t", forgetful), replace(back, description=None))
        self.assertEqual(self.task(), replace(back, description=None))

    def test_an_update_that_fails_or_gives_another_task_changes_nothing(self) -> None:
        def fail(task: TaskRecord) -> TaskRecord:
            task.description = "half done"
            raise KeyError("mine")

        store_tasks(self.db, "t", claimed_at=1)
        changes: tuple[tuple[str, str, Any, type[Exception]], ...] = (
            ("there is no such task", "gone", lambda task: task, NotFoundError),
            ("it raises", "t", fail, KeyError),
            ("it returns nothing", "t", lambda _: None, InvalidRecordError),
            ("it is no function", "t", None, TypeError),
            ("another id", "t", lambda task: replace(task, task_id="u"), InvalidRecordError),
            ("a write", "t", lambda task: store_tasks(self.db, "u") or task, ConflictError),
        )
        with self.assert_unchanged():
            for label, task_id, change, error in changes:
                with self.subTest(label):
                    self.assertRaises(error, self.db.update_task, task_id, change)

    def test_a_change_may_expect_one_status_or_any_of_several(self) -> None:
        allowed: tuple[Any, ...] = (
            *("in_progress", "InProgress", TaskStatus.IN_PROGRESS),
            *(
                ["claimed", "in_progress"],
                {TaskStatus.IN_PROGRESS},
                iter(("resolved", "InProgress")),
            ),
        )
        for expected in allowed:
            self.db.delete_task("t")
            store_tasks(self.db, "t", status="in_progress")
            with self.subTest(expected=expected):
                task = self.db.update_task_status("t", "disputed", expected=expected)
                self.assertEqual(task.status, "disputed")
        resolve = partial(self.db.update_task_status, "t", "resolved")
        for expected, names in (
            ("claimed", "claimed"),
            (("claimed", "InProgress", "completed"), "claimed or in_progress or completed"),
        ):
            with self.subTest(expected=expected), self.assert_unchanged():
                resolving = partial(resolve, expected=expected)
                self.assert_refused(
                    ConflictError, resolving, "tasks:'t' is disputed", f"not {names}"
                )

    def test_a_task_is_as_old_as_its_first_completion(self) -> None:
        store_tasks(self.db, "t", claimed_at=1)
        store_tasks(self.db, "t", claimed_at=9, status="completed")
        self.assertEqual((self.task().completed_at, self.task().history[-1].at), (9, 9))
        store_tasks(self.db, "t", claimed_at=1, status="disputed")
        self.assertEqual(self.task().completed_at, 9)
        store_tasks(self.db, "claimed long ago", claimed_at=1)
        task = self.db.get_task("claimed long ago")
        task.status = TaskStatus.COMPLETED
        self.db.store_task(task)
        self.assertEqual(self.db.prune(30).tasks, 0)

    def test_changes_by_many_threads_are_all_kept_and_one_compare_and_set_succeeds(self) -> None:
        store_tasks(self.db, "t")

        def change(thread: int) -> None:
            update = partial(self.db.update_task_status, "t", "in_progress")
            with suppress(ConflictError):
                update(signature=f"{thread}", expected="claimed")
            for number in range(10):
                update(signature=f"{thread}-{number}")
                signed = partial(replace, on_chain_signature=f"{thread}+{number}")
                self.db.update_task("t", signed)

        run_in_threads(*(partial(change, thread) for thread in range(8)))
        claimed, compared_and_set, *others = self.signatures()
        self.assertEqual((claimed, len(compared_and_set)), (None, 1))
        self.assertEqual((len(others), len(set(others))), (8 * 20, 8 * 20))

    def test_a_task_is_completed_once_together_with_its_proof(self) -> None:
        log = proof("t")
        store_tasks(self.db, "t")
        with mock.patch("time.time", return_value=5000.0):
            done = self.db.complete_task("t", log, signature="s1")
        self.assertEqual((done.status, done.completed_at), ("completed", 5000))
        self.assertEqual(done.on_chain_signature, "s1")
        for again, signature in ((replace(log, timestamp=5000), "s1"), (log, "s2"), (log, None)):
            self.assertEqual(self.db.complete_task("t", again, signature=signature), done)
            self.assertEqual((self.task(), self.db.get_proof("t")), (done, log))
        self.assertEqual((self.db.delete_task("t"), self.db.delete_task("t")), (True, False))
        self.assertEqual((self.task(), self.db.get_proof("t")), (None, log), "it outlives its task")

    def test_a_change_that_contradicts_what_is_stored_is_refused(self) -> None:
        complete, update = self.db.complete_task, self.db.update_task_status
        for task_id in ("t", "disputed", "resolved"):
            store_tasks(self.db, task_id)
            complete(task_id, proof(task_id))
        for status in ("disputed", "resolved"):
            update(status, status)
        cases = (
            (NotFoundError, partial(update, "gone", "completed"), "tasks:gone"),
            (NotFoundError, partial(complete, "gone", proof("gone")), "tasks:gone"),
            (ConflictError, partial(update, "t", "resolved", expected="claimed"), "completed"),
            (ConflictError, partial(complete, "t", proof("t", b"other evidence")), "proofs:"),
            (ConflictError, partial(complete, "t", proof("of another task")), "another"),
            (ConflictError, partial(complete, "disputed", proof("disputed")), "tasks:"),
            (ConflictError, partial(complete, "resolved", proof("resolved")), "tasks:"),
        )
        with self.assert_unchanged():
            for error, change, word in cases:
                with self.subTest(change.args):
                    self.assert_refused(error, change, word)

    def test_an_update_that_raises_or_returns_an_invalid_record_changes_nothing(self) -> None:
        def fail(tally: Tally) -> Tally:
            tally.count = 2
            raise KeyError("mine")

        tallies = tallies_of(self.db)
        tallies.put(Tally(name="a", count=1))
        changes: tuple[tuple[str, Any, type[Exception]], ...] = (
            ("it raises", fail, KeyError),
            ("it returns nothing", lambda _: None, InvalidRecordError),
            ("it returns another id", lambda _: Tally(name="b"), InvalidRecordError),
            ("it returns another kind", lambda _: TaskRecord(task_id="a"), InvalidRecordError),
        )
        for label, change, error in changes:
            with self.subTest(label):
                self.assertRaises(error, tallies.update, "a", change)
                self.assertEqual(list(tallies.values()), [Tally(name="a", count=1)])


class SessionsAreLogs(DatabaseTest):
    def session(self, session_id: str = "s") -> Any:
        return self.db.get_session(session_id)

    def said(self, **options: Any) -> list[str]:
        """Return the words of the transcript."""
        return [entry.content for entry in self.db.transcript("s", **options)]

    def test_the_first_entry_or_link_creates_a_session(self) -> None:
        self.db.append_transcript("a", "user", "hello", timestamp=5)
        self.db.append_command("b", "ClaimTask", timestamp=6)
        with mock.patch("time.time", return_value=7.0):
            self.db.link_task("c", "t")
        entry = TranscriptEntry(role="user", content="hello", timestamp=5)
        a = SessionState(session_id="a", transcript=[entry], created_at=5, last_active=5)
        b = SessionState(session_id="b", command_history=["ClaimTask"], created_at=6, last_active=6)
        c = SessionState(session_id="c", active_task_ids=["t"], created_at=7, last_active=7)
        self.assertEqual([self.session(name) for name in "abcd"], [a, b, c, None])
        self.assertEqual(self.db.list_sessions(), [a, b, c])
        self.assertEqual(self.db.list_sessions(limit=2), [a, b])

    def test_a_session_was_last_active_at_its_latest_entry(self) -> None:
        for timestamp, latest in ((10, 10), (5, 10), (20, 20)):
            self.db.append_transcript("s", "user", "x", timestamp=timestamp)
            self.db.append_command("s", "x", timestamp=timestamp)
            times = self.session().created_at, self.session().last_active
            self.assertEqual(times, (10, latest))

    def test_a_transcript_gives_its_last_entries_when_asked(self) -> None:
        everything = [str(number) for number in range(20)]
        for content in everything:
            self.db.append_transcript("s", "user", content)
            self.db.append_command("s", "c")
        self.assertEqual((self.said(), self.db.transcript("none")), (everything, []))
        for last in (0, 1, 3, 20, 21):
            with self.subTest(last=last):
                self.assertEqual(self.said(last=last), everything[max(0, 20 - last) :])

    def test_a_task_is_linked_once_and_unlinked_once(self) -> None:
        for task_id in ("t", "t", "u"):
            self.db.link_task("s", task_id)
        self.assertEqual(self.session().active_task_ids, ["t", "u"])
        unlinked = [self.db.unlink_task(session_id, "t") for session_id in ("s", "s", "none")]
        self.assertEqual(unlinked, [True, False, False])
        self.assertEqual(self.session().active_task_ids, ["u"])

    def test_a_session_stored_again_extends_its_log_and_replaces_its_fields(self) -> None:
        self.db.append_transcript("s", "user", "one")
        mine = self.session()
        mine.transcript.append(TranscriptEntry(role="user", content="two"))
        mine.command_history.append("go")
        mine.active_task_ids = ["t"]
        self.db.store_session(mine)
        self.assertEqual((self.session(), self.said()), (mine, ["one", "two"]))

    def test_a_session_that_lacks_a_stored_entry_is_refused(self) -> None:
        self.db.append_transcript("s", "user", "one")
        self.db.append_command("s", "go")
        stale = self.session()
        self.db.append_transcript("s", "user", "two of another")
        stored, mine = self.session(), TranscriptEntry(role="user", content="two of mine")
        cases = (
            ("it was read before another's entry", stale),
            ("it has another entry there", replace(stale, transcript=[*stale.transcript, mine])),
            ("it has no commands", replace(stored, command_history=[])),
            ("it has another command", replace(stored, command_history=["stop"])),
        )
        for label, session in cases:
            with self.subTest(label):
                store = partial(self.db.store_session, session)
                self.assert_refused(ConflictError, store, "sessions:", "s")
                self.assertEqual(self.session(), stored)

    def test_a_deleted_session_takes_its_log_with_it(self) -> None:
        self.db.append_transcript("s", "user", "one")
        self.db.append_command("s", "go")
        mine = self.session()
        self.assertEqual((self.db.delete_session("s"), self.db.delete_session("s")), (True, False))
        self.assertEqual((self.session(), self.said()), (None, []))
        self.db.store_session(replace(mine, transcript=[], command_history=["again"]))
        self.assertEqual((self.session().command_history, self.said()), (["again"], []))

    def test_appends_and_last_entries_cost_the_same_at_entry_10_000_as_at_entry_10(self) -> None:
        def steps(verb: Callable[[str], object], session_id: str) -> int:
            """Return how many steps of its virtual machine SQLite takes."""
            taken: list[None] = []
            for connection in opened:
                with suppress(sqlite3.ProgrammingError, ClosedError):  # one that is closed
                    connection.set_progress_handler(partial(taken.append, None), 1)
            verb(session_id)
            return len(taken)

        opened = self.watch_connections()
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
                self.assertGreater(steps(verb, "short"), 0)
                self.assertLess(steps(verb, "long"), steps(verb, "short") * 1.5)


OTHER_EVIDENCE: dict[str, Any] = {
    "inputs": b"x",
    "outputs": b"x",
    "proof": b"x",
    "proof_hash": "1" * 64,
    "result_data": b"1" * 64,
}


class ProofsAreWrittenOnce(DatabaseTest):
    def test_a_proof_is_stored_once_and_submitted_in_one_transaction(self) -> None:
        log, mark = proof("t", timestamp=5), self.db.mark_proof_submitted
        unsent = partial(proof, "t", submission_signature="sig")
        self.assert_refused(InvalidRecordError, unsent, "submission_signature")
        self.assertTrue(self.db.store_proof(log))
        self.assert_refused(InvalidRecordError, lambda: mark("t", None), "None")
        self.assertEqual(self.db.get_proof("t"), log)
        sent = replace(log, submitted=True, submission_signature="sig")
        self.assertEqual((mark("t", "sig"), mark("t", "sig")), (sent, sent))
        for again in (log, sent, replace(log, timestamp=9)):
            self.assertFalse(self.db.store_proof(again))
        self.assert_refused(ConflictError, lambda: mark("t", "other"), "proofs:")
        self.assert_refused(NotFoundError, lambda: mark("gone", "sig"), "proofs:gone")
        self.assertEqual(self.db.list_proofs(), [sent])

    def test_a_proof_with_other_outputs_keeps_its_hash_or_has_it_computed_anew(self) -> None:
        log, new = proof("t"), proof("t", b"new")
        self.assertNotEqual((log.proof_hash, log.result_data), (new.proof_hash, new.result_data))
        kept = replace(log, outputs=b"new")
        self.assertEqual((kept.proof_hash, kept.result_data), (log.proof_hash, log.result_data))
        self.assertEqual(len(kept.verify()), 2)
        anew = replace(log, outputs=b"new", proof_hash=None, result_data=None)
        self.assertEqual((anew, anew.verify()), (new, []))

    def test_other_evidence_for_the_same_task_is_refused(self) -> None:
        self.db.store_proof(proof("t"))
        for name, value in OTHER_EVIDENCE.items():
            with self.subTest(name):
                store = partial(self.db.store_proof, replace(proof("t"), **{name: value}))
                self.assert_refused(ConflictError, store, "proofs:", proof("t").evidence_hash)
                self.assertEqual(self.db.list_proofs(), [proof("t")])

    def test_a_proof_waits_in_a_queue_until_it_is_submitted(self) -> None:
        for number in range(5):
            self.db.store_proof(proof(str(number), timestamp=100 - number))
        self.db.mark_proof_submitted("2", "sig")
        cases: tuple[tuple[dict[str, Any], str], ...] = (
            ({"submitted": False}, "4310"),
            ({"submitted": False, "limit": 1}, "4"),
            ({"submitted": True}, "2"),
            ({}, "43210"),
            ({"limit": 2}, "43"),
        )
        for options, wanted in cases:
            with self.subTest(**options):
                logs = self.db.list_proofs(**options)
                self.assertEqual("".join(log.task_id for log in logs), wanted)

    def test_a_proof_that_may_be_needed_can_be_neither_deleted_nor_pruned(self) -> None:
        needed = {"unsubmitted", "claimed", "in_progress", "disputed"}
        store_tasks(self.db, "unsubmitted", status="resolved")
        for status in map(str, TaskStatus):
            store_tasks(self.db, status, status=status)
        for name in ("unsubmitted", "without a task", *map(str, TaskStatus)):
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
        store_tasks(self.db, "t", description="é")
        self.log = proof("t", b"out", inputs=b"in", proof=b"p")
        self.db.complete_task("t", self.log)
        self.bundle: dict[str, Any] = json.loads(json.dumps(self.db.dispute_bundle("t")))

    def test_a_proof_gives_the_arguments_that_the_program_takes(self) -> None:
        log = proof("t", b"hello")
        digest = hashlib.sha256(b"hello").hexdigest()
        # what the reference worker submits: 32 bytes, and 64 bytes of ASCII
        self.assertEqual((log.proof_hash, log.result_data), (digest, digest.encode()))
        wanted = {"proof_hash": bytes.fromhex(digest), "result_data": digest.encode()}
        self.assertEqual(log.submit_args(), wanted)
        uri = f"agenc://evidence/sha256/{log.evidence_hash}"
        wanted = {"evidence_hash": bytes.fromhex(log.evidence_hash), "evidence": uri}
        self.assertEqual(log.dispute_args(), wanted)
        self.assertLessEqual(len(uri), 256)

    def test_verify_names_each_field_that_the_reference_worker_would_not_submit(self) -> None:
        fields: dict[str, Any] = {"proof_hash": "ab" * 32, "result_data": b"z" * 64}
        for names in ((), ("proof_hash",), ("result_data",), ("proof_hash", "result_data")):
            with self.subTest(names=names):
                found = proof("t", **{name: fields[name] for name in names}).verify()
                for name, line in zip(names, found, strict=True):
                    self.assertIn(name, line)

    def test_the_evidence_hash_is_the_same_everywhere(self) -> None:
        logs = (
            proof("t1", b"hello"),
            proof("é\U0001f600:%", b"", inputs=b"\xff", proof=b"p"),
            proof(DEVNET_TASK, bytes(range(256)), proof_hash="ab" * 32, result_data=b"r" * 64),
        )
        hashes = (
            "33b3287ebcf5c40d42c31f90c9b10edac79a0dd65592e7c16631e62a67566446",
            "a99fbcda7bc14701ebcb02a00f2f7f7263cffc59f062a5abe6ba2ad43c595679",
            "04311a00278693c95af6ebae1f118a21ff4539c30b5594f5c9ac395462a8a48b",
        )
        self.assertEqual(tuple(log.evidence_hash for log in logs), hashes)
        later = replace(logs[0], timestamp=0, submitted=True, submission_signature="sig")
        self.assertEqual(later.evidence_hash, hashes[0], "it covers the evidence alone")
        self.assertRaises(TypeError, partial(proof, "t", evidence_hash="1" * 64))  # it is computed

    def test_a_bundle_is_verified_without_a_database_and_without_its_task(self) -> None:
        self.assertEqual(self.bundle["task"]["description"], "é")
        self.assertEqual(verify_dispute_bundle(self.bundle), [])
        for on_chain in (self.log.evidence_hash, self.log.evidence_hash.upper()):
            self.assertEqual(verify_dispute_bundle(self.bundle, evidence_hash=on_chain), [])
        self.db.delete_task("t")
        without_task = self.db.dispute_bundle("t")
        self.assertEqual(without_task, {**self.bundle, "task": None})
        self.assertEqual(verify_dispute_bundle(without_task, evidence_hash=on_chain), [])
        self.assert_refused(NotFoundError, lambda: self.db.dispute_bundle("gone"), "proofs:gone")

    def test_a_bundle_of_other_evidence_does_not_match_the_chain(self) -> None:
        for name, value in {"task_id": "u", **OTHER_EVIDENCE}.items():
            other = replace(self.log, **{name: value})
            with self.subTest(name), OperatorDb(":memory:") as db:
                db.store_proof(other)
                bundle = db.dispute_bundle(other.task_id)
                self.assertEqual(verify_dispute_bundle(bundle), [], "it agrees with itself")
                found = verify_dispute_bundle(bundle, evidence_hash=self.log.evidence_hash)
                self.assertIn(other.evidence_hash, " ".join(found))

    def test_a_bundle_that_was_changed_or_malformed_is_reported_and_never_raises(self) -> None:
        bundle, stored, task = self.bundle, self.bundle["proof"], self.bundle["task"]
        deep: Any = {}
        for _ in range(5000):
            deep = {"task": deep}
        wrong: list[Any] = [None, 5, "text", b"", [], {}, deep, {1: 2}]
        wrong += [{"proof": value} for value in (None, [], {})]
        wrong += [{key: bundle[key] for key in bundle if key != name} for name in bundle]
        wrong += [{**bundle, name: 1} for name in ("more", "x" * 10_000, "\ud800", 7)]
        wrong += [{**bundle, "task": {**task, "task_id": "u"}}]
        right_in_form = ("AAAA", "1" * 64, "MTEx" * 21 + "MQ==")
        wrong_in_form = (None, 5, [], {}, "x", "x" * 10_000, deep, [deep], 1e400, "\ud800")
        for value in (*right_in_form, *wrong_in_form):
            changes = [{name: value} for name in bundle if value is not None or name != "task"]
            changes += [{"task": {**task, "status": value}}]
            changes += [
                {"proof": {**stored, name: value}}
                for name in (*stored, "extra")
                if value != stored.get(name, "none") and (name, value) != ("timestamp", 5)
            ]
            wrong += [{**bundle, **change} for change in changes]
        for each in wrong:
            found = verify_dispute_bundle(each)
            self.assertTrue(found)
            for line in found:
                self.assertIsInstance(line, str)
                self.assertLess(len(line), 500)


class PruningTakesOnlyWhatMayGo(DatabaseTest):
    def test_only_completed_tasks_strictly_older_and_idle_sessions_are_pruned(self) -> None:
        now = 1_774_628_000
        self.enterContext(mock.patch("time.time", return_value=float(now)))
        for status in TaskStatus:
            for name, age in (("old", 30 * DAY + 1), ("edge", 30 * DAY), ("new", 0)):
                store_tasks(self.db, f"{status}-{name}", status=status, claimed_at=now - age)
        store_tasks(self.db, "late", status="completed", claimed_at=0, completed_at=now)
        for name, age in (("old", 90 * DAY + 1), ("edge", 90 * DAY), ("new", 0)):
            self.db.append_transcript(name, "user", "x", timestamp=now - age)
        self.db.store_proof(proof("completed-old", timestamp=0, submitted=True))
        before = len(exported(self.db))
        with self.assert_unchanged():
            self.db.prune(None, None)
            planned = self.db.prune(dry_run=True)
        done = self.db.prune()
        for report in (planned, done):
            self.assertEqual((report.tasks, report.sessions, report.proofs), (1, 1, 0))
        self.assertEqual((planned.dry_run, done.dry_run), (True, False))
        self.assertEqual(len(exported(self.db)), before - 2)
        self.assertIsNone(self.db.get_task("completed-old"))
        self.assertEqual((self.db.get_session("old"), self.db.transcript("old")), (None, []))
        self.assert_sound()

    def store_old_tasks(self, number: int, *, payload: bytes) -> None:
        with self.db.transaction():
            fields = {"status": "completed", "claimed_at": 0, "payload": payload}
            store_tasks(self.db, *map(str, range(number)), **fields)

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

        with in_background(write):
            try:
                self.db.prune()
            finally:
                done.set()
        self.assertNotEqual(left - {0, 3000}, set(), "no write came in between")

    def store_old(self, number: int, payload: bytes) -> None:
        """Store tasks, the first half of which may go: what stays has to move to their place."""
        for start in range(0, number, 100):
            with self.db.transaction():
                for n in range(start, min(start + 100, number)):
                    status = "completed" if n < number // 2 else "disputed"
                    store_tasks(self.db, str(n), status=status, claimed_at=5, payload=payload)

    def test_a_prune_of_some_60_mb_keeps_the_write_ahead_log_short(self) -> None:
        longest = 0

        def measure(_: str) -> None:
            nonlocal longest
            with suppress(FileNotFoundError):
                longest = max(longest, os.stat(self.path + "-wal").st_size)

        self.watch_connections(listener=measure)
        for number, size in ((2400, 20_000), (60, 780_000)):  # 64 MB each, as base64
            with self.subTest(size=size):
                self.store_old(number, bytes(size))
                self.db.compact()
                longest = 0
                report = self.db.prune()
                self.assertEqual(report.tasks, number // 2)
                self.assertLess(report.bytes_after, report.bytes_before * 0.6)
                self.assertLess(longest, 24 * 2**20)
                for task_id in task_ids(self.db):
                    self.db.delete_task(task_id)

    def test_a_prune_that_fails_half_way_says_how_much_it_has_removed(self) -> None:
        def prune() -> tuple[str, int]:
            with OperatorDb(self.path) as db, file_size_limit(6_000_000):
                error = self.assert_refused(StorageError, db.prune, self.path)
                return str(error), db.count_tasks()[TaskStatus.COMPLETED]

        self.store_old(3000, bytes(2000))
        self.db.close()
        message, left = in_child(prune)
        self.assertTrue(0 < left < 1500, f"it did not fail half-way: {left} are left")
        self.assertRegex(message, rf"\b{1500 - left}\b")
        self.assert_sound()

    def test_a_long_session_is_pruned_in_short_transactions_and_readable_at_each(self) -> None:
        entries = [TranscriptEntry(role="user", content=f"{n}", timestamp=5) for n in range(9000)]
        session = SessionState(session_id="s", transcript=entries, last_active=5, created_at=5)
        session.command_history = [str(n) for n in range(3000)]
        watching, found = False, []
        another = self.open()

        def look(statement: str) -> None:
            nonlocal watching
            if watching and statement.startswith("BEGIN IMMEDIATE"):
                watching = False  # for what is read here
                found.append(another.get_session("s"))
                watching = True

        self.watch_connections(listener=look)
        self.db.store_session(session)
        watching = True
        report = self.db.prune()
        watching = False
        self.assertEqual((report.sessions, self.db.get_session("s")), (1, None))
        parts = [each for each in found if each is not None]
        for part in parts:
            said, commands = len(part.transcript), len(part.command_history)
            self.assertEqual(part.transcript, session.transcript[:said])
            self.assertEqual(part.command_history, session.command_history[:commands])
        lengths = [len(part.transcript) + len(part.command_history) for part in parts]
        steps = [before - after for before, after in itertools.pairwise([*lengths, 0])]
        self.assertGreater(len(set(lengths)), 3, "it is removed in a few long transactions")
        self.assertLess(max(steps), 4000)
        self.assertEqual(self.db.check(), [])

    def test_a_prune_ends_where_rows_are_missing(self) -> None:
        def prune() -> None:
            with OperatorDb(self.path) as db:
                self.assertTrue(db.check())
                with suppress(DamagedError):
                    db.prune()

        with OperatorDb(self.path) as db:
            store_tasks(db, "a", "b", status="completed", claimed_at=5)
            entry = TranscriptEntry(role="user", content="x", timestamp=5)
            long = SessionState(session_id="long", transcript=[entry] * 3000, last_active=5)
            db.store_session(long)
        whole = read_bytes(self.path)
        roots = dict(self.sql("SELECT name, rootpage FROM sqlite_schema"))
        ((size,),) = self.sql("PRAGMA page_size")
        empty = (roots["sqlite_autoindex_config_1"] - 1) * size
        for label in ("tasks", "sessions", "entries"):
            write_bytes(self.path, whole)
            if label == "entries":
                self.sql("DELETE FROM session_log")
            else:  # its index of keys is that of an empty table
                image, start = bytearray(whole), (roots[f"sqlite_autoindex_{label}_1"] - 1) * size
                image[start : start + size] = whole[empty : empty + size]
                write_bytes(self.path, image)
            with self.subTest(label):
                in_child(prune, seconds=3)


class AnOperatorsLifeSurvives(DatabaseTest):
    """What an operator on devnet did, from claim to resolution, and each verb that it may use."""

    seconds = 40

    def operate(self, path: str, say: Say) -> None:
        """Do an operator's work on one task, from wherever a kill has left it."""
        with OperatorDb(path) as db:
            say("opened")
            db.store_config(OperatorConfig(wallet_pubkey=DEVNET_WORKER, network="devnet"))
            say("configured")
            if db.get_task(DEVNET_TASK) is None:
                claim = {"creator": DEVNET_CREATOR, "on_chain_signature": DEVNET_CLAIM}
                store_tasks(db, DEVNET_TASK, **claim)
            say("claimed")
            if not db.transcript("voice"):
                db.append_transcript("voice", "user", "what is it worth?")
            db.link_task("voice", DEVNET_TASK)
            say("talked")
            if db.get_task(DEVNET_TASK).status in ("claimed", "completed"):
                db.complete_task(DEVNET_TASK, proof(DEVNET_TASK, b"the report"))
            say("completed")
            db.mark_proof_submitted(DEVNET_TASK, "submission")
            say("submitted")
            db.update_task_status(DEVNET_TASK, "disputed", signature=DEVNET_DISPUTE)
            say("disputed")
            db.update_task_status(DEVNET_TASK, "resolved", signature=DEVNET_RESOLVE)
            say("resolved")

    def test_every_fact_is_there_once_after_kills_at_every_step(self) -> None:
        self.enterContext(mock.patch("time.time", return_value=1_774_628_000.0))
        steps, rng = list[str](), random.Random(5)
        self.operate(self.other, steps.append)
        for step in steps * 2:
            child = Child(partial(self.operate, self.path))
            while child.line() != step:
                pass
            child.kill(after=rng.uniform(0, 0.003))
        self.operate(self.path, steps.append)
        self.assertEqual(content_of(self.path), content_of(self.other))
        self.assert_sound()
        db = self.open()
        (task,), (session,), (log,) = db.iter_tasks(), db.list_sessions(), db.list_proofs()
        signatures = [change.signature for change in task.history]
        self.assertEqual(signatures, [DEVNET_CLAIM, None, DEVNET_DISPUTE, DEVNET_RESOLVE])
        self.assertEqual((task.status, task.on_chain_signature), ("resolved", DEVNET_RESOLVE))
        self.assertEqual((len(session.transcript), session.active_task_ids), (1, [DEVNET_TASK]))
        self.assertEqual((log.outputs, log.submission_signature), (b"the report", "submission"))
        with mock.patch("time.time", return_value=time.time() + DAY):
            self.assertEqual(db.prune(0, 0).sessions, 1)
        self.assertEqual((db.get_task(DEVNET_TASK), db.get_proof(DEVNET_TASK)), (task, log))

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
    def session(session_id: str, size: int) -> SessionState:
        """Return a session with so many utterances, and as many commands."""
        said = [TranscriptEntry(role="user", content="x" * 9000, timestamp=n) for n in range(size)]
        log: dict[str, Any] = {"transcript": said, "command_history": [*map(str, range(size))]}
        return SessionState(session_id=session_id, active_task_ids=["open"], last_active=5, **log)

    def verbs(self) -> dict[str, Verb]:
        """Return a use of each verb that changes what `store_some_of_each` stored."""
        large = bytes(60_000)

        def block(db: OperatorDb) -> None:
            with db.transaction():
                db.complete_task("open", proof("open", large))
                db.append_transcript("s", "user", "it is done")
                with db.transaction():
                    db.prune(1, None)
                    devices_of(db).delete("one")

        resolved = {"status": TaskStatus.RESOLVED, "payload": large}
        return {
            "store_task": lambda db: store_tasks(db, "new", payload=large),
            "store_task over another": lambda db: store_tasks(db, "open", **resolved),
            "update_task_status": lambda db: db.update_task_status("open", "disputed"),
            "update_task": lambda db: db.update_task("open", lambda t: replace(t, **resolved)),
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
            "update_config": lambda db: db.update_config(lambda c: replace(c, network="mainnet")),
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
                self.assertGreaterEqual(len(during), 3)  # it begins, changes a row and commits
                for content in during:
                    self.assertTrue(content in (before, after), "a part of the verb can be seen")


# ==== What survives: kills, full disks, lost files ================================================


class AcknowledgedWritesSurvive(DatabaseTest):
    def test_every_acknowledged_write_survives_sigkill(self) -> None:
        def write_without_end(name: str, durable: bool, say: Say) -> None:
            with OperatorDb(self.path, durable=durable) as db:
                for n in itertools.count():
                    with db.transaction():
                        store_tasks(db, f"{name} {n:03} a", payload=bytes(n * 997 % 9000))
                        store_tasks(db, f"{name} {n:03} b")
                    db.append_command(name, str(n))
                    say(n)

        rng = random.Random(3)
        for number in range(10):
            names, durable = (f"w{number}a", f"w{number}b"), number % 2 == 0
            writers = {name: Child(partial(write_without_end, name, durable)) for name in names}
            for name, writer in writers.items():
                acknowledged = [writer.line() for _ in range(rng.randrange(1, 25))]
                acknowledged += writer.kill(after=rng.uniform(0, 0.008))
                with OperatorDb(self.path) as db:
                    said = db.get_session(name).command_history
                    stored = [task_id for task_id in task_ids(db) if task_id.startswith(name)]
                blocks = len(stored) // 2
                self.assertTrue(len(acknowledged) <= len(said) <= blocks <= len(said) + 1)
                self.assertEqual(said, [*map(str, range(len(said)))])
                whole = [f"{name} {n:03} {part}" for n in range(blocks) for part in "ab"]
                self.assertEqual(stored, whole)
            self.assert_sound()

    def test_a_creator_that_is_killed_leaves_a_path_that_can_be_opened(self) -> None:
        def create(path: str, number: int, say: Say) -> int:
            with interrupt_at_call(number, kill=True) as calls, OperatorDb(path) as db:
                store_tasks(db, "first")
                say("acknowledged")
            return calls()

        no_link = mock.Mock(side_effect=OSError(errno.EPERM, "no hard links here"))
        for label, link in (("links", os.link), ("no links", no_link)):
            with self.subTest(label), mock.patch("os.link", link):
                total = Child(partial(create, self.beside(label), -1)).result()
                for number in range(1, total, total // 20):
                    path = self.beside(f"{label} {number}/operator.db")
                    said = Child(partial(create, path, number)).last_words()
                    with OperatorDb(path) as db:
                        self.assertTrue(db.get_task("first") or "acknowledged" not in said)
                        self.assertEqual(db.check(), [])

    def test_an_exit_with_threads_alive_is_silent_and_loses_nothing(self) -> None:
        program = """
import os, threading

def work(name):
    for n in range(10**9):
        db.store_task(TaskRecord(task_id=f"{name} {n}"))
        os.write(1, f"{name} {n}\\n".encode())
        seen.release()

db, seen = OperatorDb(sys.argv[1]), threading.Semaphore(0)
for name in range(4):
    threading.Thread(target=work, args=(name,), daemon=True).start()
for _ in range(40):
    seen.acquire()
"""
        done = run_program(program, self.path)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_sound()
        self.assertLessEqual(set(done.stdout.splitlines()), set(task_ids(self.open())))


def mount_two_megabytes(folder: str) -> bool:
    """Give this process a disk of its own at a folder; return whether it may have one."""
    libc, unshare_mounts, recursive_and_private = ctypes.CDLL(None), 0x20000, 0x44000
    return not (
        libc.unshare(unshare_mounts)
        or libc.mount(None, b"/", None, recursive_and_private, None)
        or libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=2m")
    )


class FailedCallsStoreNothing(DatabaseTest):
    def use_up_the_room(self, db: OperatorDb) -> list[str]:
        """Write more than there is room for; return the tasks that must be there."""

        def store_too_much(db: OperatorDb) -> None:
            with db.transaction():
                store_tasks(db, *map(str, range(100)), payload=bytes(400_000))

        doomed: tuple[Verb, ...] = (
            store_too_much,
            lambda db: store_tasks(db, "after"),
            lambda db: db.get_task("before"),
            lambda db: db.append_command("s", "after"),
            lambda db: db.transaction().__enter__(),
        )
        refused, acknowledged = 0, list[str]()
        with self.assertRaises(StorageError), db.transaction():
            store_tasks(db, "before")
            for verb in doomed:
                with self.assertRaises(StorageError):
                    verb(db)
                refused += 1
        self.assertEqual(refused, len(doomed), "the block could not go on after the first error")
        with self.assertRaises(StorageError) as caught:
            for n in range(1000):
                store_tasks(db, f"{n:03}", payload=bytes(20_000))
                acknowledged.append(f"{n:03}")
        self.assertIn(self.path, str(caught.exception))
        self.assertGreater(len(acknowledged), 3)
        with self.assertRaises(StorageError):
            db.append_transcript("s", "user", "x" * 200_000)
        self.assertEqual((task_ids(db), db.get_session("s")), (acknowledged, None))
        return acknowledged

    def test_a_full_disk_loses_nothing_and_is_written_to_again_when_there_is_room(self) -> None:
        @contextmanager
        def ballast() -> Iterator[None]:
            write_bytes(self.beside("ballast"), bytes(600_000))
            yield
            os.unlink(self.beside("ballast"))

        def write(disk_is_full: AbstractContextManager[object]) -> None:
            with OperatorDb(self.path) as db:
                with disk_is_full:
                    acknowledged = self.use_up_the_room(db)
                store_tasks(db, "room again", payload=bytes(100_000))
            self.assert_sound()
            with OperatorDb(self.path) as db:
                self.assertEqual(task_ids(db), [*acknowledged, "room again"])

        def write_to_a_small_disk() -> bool:
            may_mount = mount_two_megabytes(self.folder)
            if may_mount:
                write(ballast())
            return may_mount

        in_child(partial(write, file_size_limit(400_000)))
        if not in_child(write_to_a_small_disk):
            self.skipTest("needs the right to mount a file system")

    def test_a_prune_without_room_can_be_done_again(self) -> None:
        def prune() -> None:
            with OperatorDb(self.path) as db:
                with file_size_limit(33_000):
                    self.assert_refused(StorageError, db.prune)
                    self.assertEqual(db.check(), [])
                db.prune()
                self.assertEqual(task_ids(db), [])

        old = {"payload": bytes(3000), "status": TaskStatus.COMPLETED, "completed_at": 5}
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *map(str, range(400)), **old)
        in_child(prune)

    def test_a_database_that_cannot_be_created_leaves_no_file(self) -> None:
        def create() -> None:
            for limit in (0, 4096, 20_000, 40_000):
                with file_size_limit(limit):
                    self.assert_refused(StorageError, lambda: OperatorDb(self.path), self.path)
                self.assertEqual(os.listdir(self.folder), [])

        in_child(create)


class LostFilesAreNoticed(DatabaseTest):
    """A file or directory that may not be written, or that is gone, is never a silent loss."""

    def test_what_may_not_be_written_is_read_and_writes_are_refused(self) -> None:
        def use(path: str, name: str, mode: int) -> list[str]:
            os.chmod(name, mode)
            with OperatorDb(path, read_only=True) as db:
                self.assertEqual((task_ids(db), db.check()), (["before"], []))
            with self.assertRaises(StorageError), OperatorDb(path) as db:
                store_tasks(db, "new")
            if name == self.folder:
                self.assert_refused(StorageError, lambda: OperatorDb(self.file), self.file)
            os.chmod(name, mode | 0o200)
            with OperatorDb(path) as db:
                os.chmod(name, mode)
                with suppress(StorageError):  # what is open already may still be written
                    store_tasks(db, "after")
                return task_ids(db)

        for path, name, mode in ((self.path, self.path, 0o400), (self.other, self.folder, 0o500)):
            with self.subTest(name):
                with OperatorDb(path) as db:
                    store_tasks(db, "before")
                stored = as_nobody(self.folder, partial(use, path, name, mode))
                os.chmod(name, mode | 0o200)
                with OperatorDb(path) as db:
                    self.assertEqual(task_ids(db), stored)
        self.assertEqual(self.names(), {"operator.db", "other.db"})

    def test_writes_to_files_that_were_removed_or_replaced_are_refused(self) -> None:
        fill(self.other)
        image, all_files = read_bytes(self.other), ("", "-wal", "-shm")
        cases: tuple[tuple[str, tuple[str, ...], bytes | None], ...] = (
            ("the database is gone", ("",), None),
            ("its log is gone", ("-wal",), None),
            ("its log is another", ("-wal",), b""),
            ("all files are gone", all_files, None),
            ("the database is another, beside its log", ("",), image),
            ("the database is another", all_files, image),
        )
        for label, removed, replacement in cases:
            with self.subTest(label):
                with OperatorDb(self.path) as db:
                    store_tasks(db, "before")
                    for ending in removed:
                        os.unlink(self.path + ending)
                    if replacement is not None:
                        write_bytes(self.path + removed[0], replacement)
                    for _ in range(2):
                        store = partial(store_tasks, db, "after")
                        self.assert_refused(StorageError, store, self.path)
                    with self.assertRaises(StorageError), db.transaction():
                        db.append_transcript("s", "user", "after")
                for ending in all_files[1:]:  # a log without its database is never opened
                    with suppress(FileNotFoundError):
                        os.unlink(self.path + ending)
                self.assert_sound()
        self.assertTrue(read_bytes(self.path) == image, "the other database was changed")

    def test_closing_a_replaced_database_takes_nothing_from_its_successor(self) -> None:
        db = OperatorDb(self.path)
        store_tasks(db, "old")
        for ending in ("", "-wal", "-shm"):
            os.rename(self.path + ending, self.path + ".moved" + ending)
        with OperatorDb(self.path) as successor:
            store_tasks(successor, "one")
            self.assert_refused(StorageError, lambda: store_tasks(db, "lost"), self.path)
            db.close()
            store_tasks(successor, "two")
            self.assertEqual(task_ids(self.open()), ["one", "two"])

    def test_a_write_is_refused_when_the_shm_was_removed_or_replaced(self) -> None:
        remove = partial(os.unlink, self.path + "-shm")

        def put_another() -> None:
            remove()
            write_bytes(self.path + "-shm", b"")

        def at_commit(statement: str) -> None:
            if statement == "COMMIT" and late:
                late.pop()()

        late: list[Callable[[], object]] = []
        self.watch_connections(listener=at_commit)
        for label, now, then in (
            ("removed", remove, None),
            ("replaced", put_another, None),
            ("removed while it is stored", None, remove),
        ):
            with self.subTest(label):
                db = OperatorDb(self.path)
                store_tasks(db, "before")
                if now:
                    now()
                late[:] = [then] if then else []
                for _ in range(2):
                    store = partial(store_tasks, db, "after")
                    self.assert_refused(FileReplacedError, store, self.path)
                with self.assertRaises(FileReplacedError), db.transaction():
                    db.append_transcript("s", "user", "after")
                db.close()
                self.assert_sound()
                with OperatorDb(self.path) as db:
                    self.assertIsNotNone(db.get_task("before"))

    def test_what_others_store_after_the_shm_was_removed_is_kept(self) -> None:
        program = """if True:
            with OperatorDb(sys.argv[1]) as db:
                for task_id in "abc":
                    db.store_task(TaskRecord(task_id=task_id))"""
        last_calls: tuple[tuple[str, bool, Verb], ...] = (
            ("it does nothing more", False, lambda db: None),
            ("it reads", False, lambda db: db.get_task("first")),
            ("it writes", False, lambda db: store_tasks(db, "refused")),
            ("it may only read", True, lambda db: db.get_task("first")),
        )
        for label, read_only, last_call in last_calls:
            with self.subTest(label):
                with OperatorDb(self.path) as db:
                    store_tasks(db, "first")
                db = OperatorDb(self.path, read_only=read_only)
                db.get_task("first")
                os.unlink(self.path + "-shm")
                self.assertEqual(run_program(program, self.path).stderr, "")
                with suppress(FileReplacedError):
                    last_call(db)
                db.close()
                with OperatorDb(self.path) as db:
                    self.assertLessEqual({"first", "a", "b", "c"}, set(task_ids(db)))
                    self.assertEqual(db.check(), [])
                os.unlink(self.path)

    def test_a_file_put_in_the_place_of_the_database_is_never_mixed_with_its_log(self) -> None:
        with OperatorDb(self.path, durable=False) as db:
            store_tasks(db, *(f"old{n}" for n in range(50)), payload=bytes(900))
            db.backup(self.other)
            store_tasks(db, *(f"new{n}" for n in range(300)), payload=bytes(900))
        wanted = content_of(self.other)
        db = OperatorDb(self.path)
        store_tasks(db, *(f"in the log {n}" for n in range(20)))
        db.update_task_status("old3", "completed")  # on a page that both files have
        os.replace(self.other, self.path)
        self.assert_refused(FileReplacedError, partial(store_tasks, db, "lost"), self.path)
        db.close()
        with suppress(StorageError), OperatorDb(self.path) as again:  # as the error says
            self.assertTrue(exported(again) == wanted, "it is not what was put there")
        for ending in ("-wal", "-shm"):
            Path(self.path + ending).unlink(missing_ok=True)
        self.assertTrue(content_of(self.path) == wanted, "it is not what was put there")

    def test_once_a_file_is_lost_every_call_says_so_for_good_and_close_works(self) -> None:
        verbs: tuple[Verb, ...] = (
            lambda db: db.get_task("before"),
            lambda db: [*db.iter_tasks()],
            lambda db: db.list_tasks("claimed", limit=1),
            lambda db: db.count_tasks(),
            lambda db: db.get_session("s"),
            lambda db: db.transcript("s"),
            lambda db: db.list_proofs(),
            lambda db: db.get_config(),
            lambda db: db.dispute_bundle("before"),
            lambda db: db.stats(),
            lambda db: db.write_metrics(self.file),
            lambda db: db.check(),
            lambda db: db.export(self.file),
            lambda db: db.backup(self.file),
            lambda db: db.prune(dry_run=True),
            lambda db: db.prune(),
            lambda db: db.compact(),
            lambda db: db.repair(),
            lambda db: db.restore(self.other),
            lambda db: store_tasks(db, "after"),
            lambda db: db.delete_task("nobody"),
            lambda db: db.append_command("s", "after"),
            lambda db: db.transaction().__enter__(),
            tallies_of,
        )
        fill(self.other)
        clock = time.monotonic
        for suffix, is_replaced in itertools.product(("", "-wal", "-shm"), (False, True)):
            with self.subTest(suffix=suffix, is_replaced=is_replaced):
                db, kept = OperatorDb(self.path), self.beside("kept")
                store_tasks(db, "before")
                reader = OperatorDb(self.path, read_only=True)
                self.assertEqual((task_ids(db), task_ids(reader)), (["before"], ["before"]))
                os.rename(self.path + suffix, kept)
                if is_replaced:
                    write_bytes(self.path + suffix, b"")
                with mock.patch("time.monotonic", lambda: clock() + 1):  # a second later
                    for each in (db, reader):
                        self.assert_refused(FileReplacedError, partial(verbs[0], each), self.path)
                reader.close()
                for verb in verbs:
                    self.assert_refused(FileReplacedError, partial(verb, db), self.path)
                os.replace(kept, self.path + suffix)
                self.assert_refused(FileReplacedError, partial(verbs[0], db), self.path)
                db.close()
                self.assert_refused(ClosedError, partial(verbs[0], db), self.path)
                with OperatorDb(self.path) as db:
                    self.assertEqual((task_ids(db), db.check()), (["before"], []))
                self.assertFalse(os.path.exists(self.file))
                os.unlink(self.path)

    def test_upkeep_beside_a_lost_shm_deletes_nothing_that_others_store(self) -> None:
        copy = self.beside("copy.db")
        with OperatorDb(self.path) as db:
            store_tasks(db, "old")
            db.backup(copy)
        for label, upkeep in (
            ("prune", OperatorDb.prune),
            ("compact", OperatorDb.compact),
            ("restore", lambda db: db.restore(copy)),
        ):
            with self.subTest(label):
                wait, go_on = os.pipe()

                def store_more(say: Say, label: str = label, wait: int = wait) -> None:
                    os.read(wait, 1)
                    with OperatorDb(self.path) as other:
                        store_tasks(other, *(f"{label} {n}" for n in range(50)))
                        say("stored")
                        signal.pause()

                child = Child(store_more)  # before it is open here, for a fork would close it
                db = OperatorDb(self.path)
                db.get_task("old")
                os.unlink(self.path + "-shm")
                os.write(go_on, b".")
                child.line()
                self.assert_refused(FileReplacedError, partial(upkeep, db), "-shm")
                db.close()
                child.kill()
                with OperatorDb(self.path) as found:
                    self.assertEqual(sum(name.startswith(label) for name in task_ids(found)), 50)
                    self.assertEqual(found.check(), [])


# ==== Who may do what at the same time ============================================================


class TransactionsAreAllOrNothing(DatabaseTest):
    def test_a_transaction_is_whole_or_undone_whatever_happens(self) -> None:
        def change(db: OperatorDb) -> None:
            with db.transaction():  # more than SQLite's cache holds: it writes before the end
                store_tasks(db, *map(str, range(40)), payload=bytes(60_000))
                with db.transaction():
                    db.append_transcript("s0", "user", "new")
                    db.complete_task("t0", proof("t0", submitted=True))
                db.delete_task("t1")

        fill(self.path, tasks=6)
        outcomes = self.assert_all_or_nothing(change, tries=8)
        for fault in ("kill: before", "interrupt: before", "full disk: before", "full disk: after"):
            self.assertGreater(outcomes[fault], 0, fault)

    def test_a_block_sees_its_own_changes_and_others_see_them_once_it_ends(self) -> None:
        db, other = self.open(), self.open()
        store_tasks(db, "old")
        with db.transaction():
            store_tasks(db, "new")
            self.assertEqual(task_ids(db), ["new", "old"])
            self.assertIsNone(other.get_task("new"))
            run_in_threads(lambda: self.assertIsNone(db.get_task("new")))
        self.assertIsNotNone(other.get_task("new"))

    def test_a_block_is_committed_once_or_undone_and_its_error_passes(self) -> None:
        db = self.open()
        store_tasks(db, "old")
        for error in (KeyError, StopIteration, KeyboardInterrupt, ConflictError):
            with self.subTest(error=error):
                with self.assertRaises(error), db.transaction():
                    db.delete_task("old")
                    with db.transaction():
                        db.append_transcript("s", "user", "x")
                        raise error
                with self.assertRaises(error), ExitStack() as stack:
                    stack.enter_context(db.transaction())
                    store_tasks(db, "new")
                    raise error
                self.assertEqual((task_ids(db), db.get_session("s")), (["old"], None))
        block = db.transaction()
        with ExitStack() as stack:
            stack.enter_context(block)
            store_tasks(db, "new")
        with self.assertRaises(ConflictError), block:
            self.fail("a block was entered twice")
        self.assertEqual(task_ids(db), ["new", "old"])

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

    def test_a_namespace_that_a_block_would_create_is_refused_and_can_be_made_later(self) -> None:
        db = self.db
        for error in (KeyError, None):
            with suppress(KeyError), db.transaction():
                self.assert_refused(ConflictError, partial(wallets_of, db))
                store_tasks(db, "t")
                if error is not None:
                    raise error
        self.assertEqual(task_ids(db), ["t"])
        self.assertEqual(self.sql("SELECT name FROM sqlite_master WHERE name = 'wallets'"), [])
        wallets = wallets_of(db)
        with suppress(KeyError), db.transaction():
            for namespace in (wallets, wallets_of(db)):  # which is there already
                namespace.put(Wallet(owner="me"))
            raise KeyError
        wallets.put(Wallet(owner="you"))
        self.assertEqual((list(wallets.keys()), db.check()), (["you"], []))

    def test_a_namespace_that_an_undone_import_made_is_no_dead_object(self) -> None:
        db, moved, target = self.open(), BytesIO(), self.open(self.other)
        wallets_of(db).put(Wallet(owner="me"))
        db.export(moved, include_secrets=True)
        with suppress(KeyError, ConflictError), target.transaction():
            moved.seek(0)
            target.import_(moved)
            wallets = wallets_of(target)
            raise KeyError
        with suppress(NameError):  # it was refused
            self.assertIsNone(wallets.get("me"))
            wallets.put(Wallet(owner="you"))

    def test_an_inner_block_that_failed_is_never_committed_in_part(self) -> None:
        """Ctrl-C lands while it is undone, and the outer block goes on."""
        db = self.open()
        for number in itertools.count(1):
            store_tasks(db, "t")

            def fail(number: int = number) -> int:
                with interrupt_at_call(number) as calls, suppress(KeyError), db.transaction():
                    db.delete_task("t")
                    store_tasks(db, "half")
                    raise KeyError
                return calls()

            calls = number
            with suppress(StorageError), db.transaction():
                store_tasks(db, "outer")
                with suppress(KeyboardInterrupt):
                    calls = fail()
            self.assertIn(task_ids(db), (["outer", "t"], ["t"]), f"at call {number}")
            db.delete_task("outer")
            if calls < number:
                break
        self.assertGreater(number, 40)


class FunctionsThatAVerbCallsMayOnlyRead(DatabaseTest):
    FUNCTIONS: ClassVar[dict[str, Callable[..., object]]] = {
        # which a verb calls: each calls `act` once, in the middle of that verb
        "change": lambda _, tallies, act: tallies.update("one", lambda tally: act() or tally),
        "change of the configuration": lambda db, _, act: db.update_config(
            lambda config: act() or config
        ),
        "keep": lambda db, _, act: devices_of(db).prune(1, keep=lambda _: not act()),
        "keep of a dry run": lambda db, _, act: devices_of(db).prune(
            1, keep=lambda _: not act(), dry_run=True
        ),
        "progress of an export": lambda db, _, act: db.export(
            BytesIO(), progress=lambda done, _: done == 1 and act()
        ),
        "progress of an import": lambda db, _, act: db.import_(
            BytesIO(b'{"tasks":[],"config":{"network":"devnet"}}'),
            progress=lambda _, total: total and act(),
        ),
    }

    def setUp(self) -> None:
        super().setUp()
        self.tallies = tallies_of(self.db)
        self.tallies.put(Tally(name="one", count=1))
        devices_of(self.db).put(PairedDevice(device_id="d", last_seen=5))
        self.other = self.open(timeout=2)

    def test_a_function_that_a_verb_calls_reads_what_the_block_has_done_so_far(self) -> None:
        db, read = self.db, list[Any]()

        def look() -> None:
            log, session = (
                db.dispute_bundle("t") if db.get_proof("t") else None,
                db.get_session("s"),
            )
            names = task_ids(db), [task.task_id for task in db.list_tasks()]
            counts = self.tallies.count(), db.count_tasks()[TaskStatus.COMPLETED]
            read.append((log is not None, session is not None, *names, *counts))

        before = (False, False, [], [], 1, 0)
        within = (True, True, ["t"], ["t"], 2, 1)
        for label, call in self.FUNCTIONS.items():
            with self.subTest(label):
                read.clear()
                call(db, self.tallies, look)
                with suppress(KeyError), db.transaction():
                    store_tasks(db, "t")
                    db.complete_task("t", proof("t"))
                    db.append_transcript("s", "user", "hello")
                    self.tallies.put(Tally(name="two"))
                    call(db, self.tallies, look)
                    self.assertIsNone(self.other.get_task("t"))
                    raise KeyError
                self.assertEqual(read, [before, within])

    def test_a_write_in_a_function_that_a_verb_calls_is_refused_and_nothing_is_lost(self) -> None:
        db, tallies, devices = self.db, self.tallies, devices_of(self.db)
        writes: tuple[Callable[[], object], ...] = (
            lambda: tallies.update("one", lambda tally: replace(tally, count=99)),
            lambda: tallies.put(Tally(name="one", count=99)),
            lambda: tallies.delete("one"),
            lambda: store_tasks(db, "t"),
            lambda: db.append_command("s", "status"),
            lambda: db.store_proof(proof("t")),
            lambda: db.transaction().__enter__(),
            lambda: db.import_(BytesIO(b'{"tasks":[],"config":{"network":"mainnet"}}')),
            lambda: devices.prune(0),
            lambda: wallets_of(db),
            db.prune,
            db.close,
        )
        refused = 0

        def try_to_write() -> None:
            nonlocal refused
            for write in writes:
                began = time.monotonic()
                self.assert_refused(ConflictError, write)
                self.assertLess(time.monotonic() - began, 1)
                refused += 1

        for label, call in self.FUNCTIONS.items():
            for block in (contextlib.nullcontext, db.transaction):
                with self.subTest(label, block=block), block():
                    tallies.update("one", lambda tally: replace(tally, count=tally.count + 1))
                    call(db, tallies, try_to_write)
        self.assertEqual(refused, len(writes) * 2 * len(self.FUNCTIONS))
        db.close()
        found = tallies_of(self.other).get("one"), task_ids(self.other), self.other.get_session("s")
        self.assertEqual(found, (Tally(name="one", count=1 + 2 * len(self.FUNCTIONS)), [], None))
        self.assert_sound()

    def test_a_function_that_a_verb_calls_may_use_every_verb_that_reads(self) -> None:
        db, tallies, devices = self.db, self.tallies, devices_of(self.db)
        reads: tuple[Callable[[], object], ...] = (
            lambda: devices.prune(1, keep=lambda _: False, dry_run=True),
            partial(db.prune, 1, 1, 1, dry_run=True),
            lambda: [*tallies.items(), *tallies.keys(), *tallies.list(), *db.list_proofs()],
            lambda: (db.get_config(), db.list_sessions(), db.transcript("s")),
            lambda: (db.check(), db.stats(), db.export(BytesIO())),
            lambda: tallies_of(db).count(),
        )

        def read_all() -> None:
            for read in reads:
                read()

        signal.alarm(3)  # none may wait for itself
        for call in self.FUNCTIONS.values():
            for block in (contextlib.nullcontext, db.transaction):
                with block():
                    call(db, tallies, read_all)


class ThreadsAndProcessesTakeTurns(DatabaseTest):
    @contextmanager
    def block_that_has_only_read(self, db: OperatorDb) -> Iterator[None]:
        with db.transaction():
            self.assertIsNone(db.get_task("mine"))
            yield

    @contextmanager
    def block_of_a_process(self) -> Iterator[None]:
        child = holding_the_lock(self.path)
        yield
        os.kill(child.pid, signal.SIGUSR1)
        child.result()

    def test_updates_of_the_configuration_by_many_threads_are_all_kept(self) -> None:
        def add(name: str, config: OperatorConfig) -> OperatorConfig:
            config.capabilities.append(name)
            return config

        names = [*map(str, range(8))]
        run_in_threads(*(partial(self.db.update_config, partial(add, name)) for name in names))
        config = self.db.get_config()
        self.assertEqual(sorted(config.capabilities), names)
        # the first was given an empty one
        self.assertEqual(config, OperatorConfig(capabilities=config.capabilities))

    def test_an_update_of_the_configuration_that_fails_changes_nothing(self) -> None:
        def fail(config: OperatorConfig) -> OperatorConfig:
            config.network = "half done"
            raise KeyError("mine")

        for stored in (None, OperatorConfig(network="devnet", keypairs={"main": SECRET})):
            if stored is not None:
                self.db.update_config(lambda _, stored=stored: stored)
            for change, error in ((fail, KeyError), (lambda _: None, InvalidRecordError)):
                with self.subTest(stored=stored, error=error):
                    self.assertRaises(error, self.db.update_config, change)
                    self.assertEqual(self.db.get_config(), stored)

    def test_a_write_that_waits_in_vain_is_a_busy_error_and_can_be_done_again(self) -> None:
        db, other = self.open(timeout=0.1), self.open()
        store = partial(store_tasks, db, "mine")
        holders = (
            ("another thread", open_block(db, "held")),
            ("another object in another thread", open_block(other, "held")),
            ("another object in this thread", self.block_that_has_only_read(other)),
            ("another process", self.block_of_a_process()),
        )
        for label, block in holders:
            with self.subTest(label):
                with block:
                    began = time.monotonic()
                    error = self.assert_refused(BusyError, store, self.path)
                    self.assertTrue(0.1 <= time.monotonic() - began < 5)
                    self.assertIsInstance(error, TimeoutError)
                    self.assertEqual(task_ids(db), [], "a reader waits for nobody")
                store()
                store_tasks(other, "its turn, too")
                self.assertLessEqual({"its turn, too", "mine"}, {*task_ids(db)})
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
        self.assertLess(max(waited), 0.7)  # and not a millisecond for each place

    def test_writers_that_waited_for_each_other_do_not_sleep_after_their_turns(self) -> None:
        db = self.open()

        def write() -> None:
            for _ in range(10):
                db.append_command("s", "x")

        with (
            mock.patch("time.sleep", wraps=time.sleep) as sleep,
            open_block(db, "first") as leave,
            in_background(*[write] * 8),
        ):
            sleep(0.03)  # a long turn, after which other processes are let in
            leave()
        self.assertEqual(len(db.get_session("s").command_history), 80)
        self.assertLess(sleep.call_count, 40)

    def test_threads_that_read_at_once_never_share_a_connection(self) -> None:
        meeting = threading.Barrier(2)

        def meet(statement: str) -> None:
            # a second thread on the same connection would wait for the first one's statement
            if "tasks:meet" in statement:
                with suppress(threading.BrokenBarrierError):
                    meeting.wait(2)

        def read_at_once() -> None:
            connections = self.watch_connections(listener=meet)
            db = self.open()
            db.get_task("t")
            before = len(connections)
            with ThreadPoolExecutor(1) as other:
                for _ in range(5):
                    reading = other.submit(db.get_task, "meet")
                    db.get_task("meet")
                    reading.result()
            self.assertFalse(meeting.broken, "one thread had to wait for the other's connection")
            self.assertEqual(len(connections), before + 1)

        in_child(read_at_once, seconds=5)  # a shared connection may hang for good

    def test_sixteen_threads_and_four_processes_lose_no_increment(self) -> None:
        def work(db: OperatorDb, worker: int) -> None:
            tallies = tallies_of(db)
            for n in range(6):
                task_id = f"t{(worker + n) % 9}"
                task = db.get_task(task_id)
                self.assertEqual((task.task_id, task.payload), (task_id, task_id.encode() * 99))
                tallies.update("a", lambda tally: replace(tally, count=tally.count + 1))
                with db.transaction():
                    tally = tallies.get("b")
                    tallies.put(replace(tally, count=tally.count + 1))
                db.append_command("shared", f"{worker} {n}")
                self.assertEqual(len(task_ids(db)), 9)

        db = self.open()
        for n in range(9):
            store_tasks(db, f"t{n}", payload=f"t{n}".encode() * 99)
        for name in ("a", "b"):
            tallies_of(db).put(Tally(name=name))
        children = [Child(lambda _, n=n: work(OperatorDb(self.path), n)) for n in range(16, 20)]
        run_in_threads(*(partial(work, db, worker) for worker in range(16)))
        for child in children:
            child.result()
        self.assertEqual([tally.count for tally in tallies_of(db).values()], [120, 120])
        said = Counter(f"{worker} {n}" for worker in range(20) for n in range(6))
        self.assertEqual(Counter(db.get_session("shared").command_history), said)
        self.assertEqual(db.check(), [])

    def test_no_live_file_is_ever_opened_raw(self) -> None:
        """Closing a descriptor of a file drops every lock that SQLite holds on it."""
        live, opened = {self.path + ending for ending in ("", "-wal", "-shm")}, list[str]()

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and arguments[0] in live:
                opened.append(arguments[0])

        def look_through_another_handle(read_only: bool) -> None:
            with OperatorDb(self.path, read_only=read_only) as other:
                other.list_tasks()
                other.check()
            self.assertEqual(opened, [])

        def repair() -> None:
            self.damage("tasks:u")
            self.assertEqual(len(db.repair()), 2)

        def work() -> None:
            sys.addaudithook(watch)  # there for good: hence in a child
            store_tasks(db, "t", payload=bytes(50_000))
            for verb in (
                partial(look_through_another_handle, read_only=False),
                partial(look_through_another_handle, read_only=True),
                partial(in_child, partial(look_through_another_handle, read_only=False)),
                partial(db.complete_task, "t", proof("t")),
                db.check,
                partial(db.prune, 0, 0, 0),
                partial(task_ids, db),
                partial(db.dispute_bundle, "t"),
                db.prometheus,
                db.compact,
                partial(db.backup, self.other),
                partial(db.restore, self.other),
                partial(db.write_metrics, self.beside("metrics")),
                partial(db.export, self.file),
                partial(db.import_, self.file),
                partial(store_tasks, db, "u"),
                repair,
                db.close,
            ):
                verb()
                self.assertEqual(opened, [], verb)

        db = OperatorDb(self.path)
        in_child(work)
        db.close()


class CoroutinesNeverShareABlock(DatabaseTest):
    """A transaction belongs to the thread and context that opened it."""

    def assert_kept_out(self, db: OperatorDb) -> None:
        """Fail unless the caller can neither join another's block nor see what it has done."""
        for action in (
            lambda: store_tasks(db, "outsider"),
            lambda: db.append_command("s", "outsider"),
            lambda: db.transaction().__enter__(),
            db.close,
        ):
            self.assert_refused(ConflictError, action)
        self.assertIsNone(db.get_task("inside"))

    def test_a_coroutine_or_worker_gets_no_place_in_the_block_of_another(self) -> None:
        async def look() -> None:
            self.assert_kept_out(db)

        async def main() -> None:
            begun_before = asyncio.create_task(look())
            with db.transaction():
                store_tasks(db, "inside")
                await begun_before
                await asyncio.create_task(look())
                await asyncio.to_thread(self.assert_kept_out, db)
                store_tasks(db, "inside still")
            await asyncio.to_thread(store_tasks, db, "later")

        db = self.open()
        asyncio.run(main())
        self.assertEqual(task_ids(db), ["inside", "inside still", "later"])

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

    def test_the_log_is_cut_under_the_write_lock_beside_steady_readers(self) -> None:
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

        statements, longest = list[str](), 0
        connections = self.watch_connections(listener=statements.append)
        db = self.open()
        reader = Child(read)
        self.addCleanup(reader.kill)
        reader.line()
        for number in range(60):
            # 1 MB as base64; the same bytes again would not be written
            payload = bytes([number]) * 750_000
            store_tasks(db, str(number % 3), payload=payload, claimed_at=1)
            longest = max(longest, self.log_size())
        db.prune()
        self.assertLess(longest, self.LIMIT)
        modes = set(re.findall(r"wal_checkpoint\W*(\w*)", "\n".join(statements)))
        self.assertEqual(modes - {"FULL"}, {"TRUNCATE"}, "others do not take the write lock")
        for connection in connections:
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it has been closed
                if connection.execute("PRAGMA query_only").fetchone() == (0,):
                    pages = connection.execute("PRAGMA wal_autocheckpoint").fetchone()
                    self.assertEqual(pages, (0,), "SQLite's own checkpoints do not take it")

    def test_a_checkpoint_that_fails_denies_nothing_that_is_committed(self) -> None:
        denied: list[str] = []

        def authorize(action: int, name: str | None, *_: object) -> int:
            if (action, name) != (sqlite3.SQLITE_PRAGMA, "wal_checkpoint"):
                return sqlite3.SQLITE_OK
            denied.append(name)
            return sqlite3.SQLITE_DENY

        connections, enough = self.watch_connections(), bytes(15_000_000)
        db = self.open()
        store_tasks(db, "first")
        for connection in connections:
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it has been closed
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

        def lock_shortly() -> None:
            raw.executescript("BEGIN IMMEDIATE; INSERT INTO _litestream_lock VALUES (1); ROLLBACK")

        def header() -> bytes:
            with open(self.path + "-wal", "rb") as file:  # SQLite keeps no lock on the log itself
                return file.read(32)

        def copy_the_log() -> None:
            for _ in range(20):
                lock_shortly()
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)")

        db, large = self.open(), {"payload": bytes(11_000_000), "status": "completed"}
        raw = self.enterContext(
            closing(sqlite3.connect(self.path, isolation_level=None, check_same_thread=False))
        )
        raw.executescript(
            "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY, seq INTEGER);"
            "CREATE TABLE _litestream_lock (id INTEGER); INSERT INTO _litestream_seq VALUES (1, 1)"
        )
        lock_shortly()
        raw.execute("BEGIN")
        raw.execute("SELECT count(*) FROM _litestream_seq").fetchone()
        before = header()
        for number in range(3):
            store_tasks(db, f"large {number}", claimed_at=0, **large)
            store_tasks(db, *(f"{number} {part}" for part in range(10)))
        db.prune()
        self.assertGreater(self.log_size(), self.LIMIT, "the read lock holds the log back")
        self.assertEqual(header(), before, "the log was begun anew under the read lock")
        raw.execute("ROLLBACK")
        with in_background(copy_the_log):
            store_tasks(db, *(f"beside {number}" for number in range(100)))
        store_tasks(db, "last")
        self.assertLess(self.log_size(), self.LIMIT / 2)
        self.assertEqual((len(task_ids(db)), db.check()), (131, []))


class ClosingEndsTheWork(DatabaseTest):
    def test_close_is_done_once_and_later_calls_say_so(self) -> None:
        db = self.open()
        store_tasks(db, "t")
        walk = db.iter_tasks()
        db.close()
        db.close()
        for call in (
            partial(db.get_task, "t"),
            partial(store_tasks, db, "t"),
            partial(task_ids, db),
            partial(next, walk),
            db.count_tasks,
            db.check,
            db.prune,
            lambda: db.transaction().__enter__(),
        ):
            with self.subTest(call=call):
                error = self.assert_refused(ClosedError, call, self.path)
                self.assertIsInstance(error, RuntimeError)

    def test_close_is_refused_in_a_block_and_waits_for_anothers_until_its_timeout(self) -> None:
        db = self.open(timeout=0.15)

        def close() -> None:
            began = time.monotonic()
            self.assert_refused(BusyError, db.close, self.path)
            self.assertTrue(0.15 <= time.monotonic() - began < 5)

        with db.transaction():
            self.assert_refused(ConflictError, db.close)
            store_tasks(db, "before")
            run_in_threads(close)
            store_tasks(db, "after")
        store_tasks(db, "later")
        self.assertEqual(task_ids(db), ["after", "before", "later"])

    def test_close_waits_for_the_block_and_refuses_the_writers_that_wait(self) -> None:
        db, refused = self.open(timeout=3), []

        def write() -> None:
            refused.append(self.assert_refused(ClosedError, lambda: store_tasks(db, "refused")))

        with open_block(db, "inside") as leave, in_background(*[write] * 4):
            threading.Timer(0.1, leave).start()
            db.close()
        self.assertEqual(len(refused), 4)
        self.assertEqual(task_ids(self.open()), ["inside"])

    def test_close_amid_sixteen_busy_threads_ends_and_leaves_the_database_alone(self) -> None:
        db, started = self.open(), threading.Barrier(17)

        def work(worker: int) -> None:
            started.wait(10)
            with self.assertRaises(ClosedError):
                while True:
                    store_tasks(db, str(worker))
                    db.get_task(str(worker))

        with in_background(*(partial(work, worker) for worker in range(16))):
            started.wait(10)
            db.close()
        self.assertEqual(open_descriptors(self.folder), 0)
        self.assertEqual(os.listdir(self.folder), ["operator.db"])

    def test_what_is_abandoned_holds_nothing(self) -> None:
        fill(self.path)
        with OperatorDb(self.path, timeout=2) as db:
            walk = db.iter_tasks()
            next(walk)
            db.transaction().__enter__()
            gc.collect()
            store_tasks(db, "t")
            del walk
        for _ in range(20):
            store_tasks(OperatorDb(self.path), "t")
        gc.collect()
        self.assertEqual(open_descriptors(self.folder), 0)

    def test_a_memory_database_is_there_while_anything_of_it_is_in_use_and_then_gone(self) -> None:
        def namespace(db: OperatorDb) -> Callable[[], object]:
            tallies = tallies_of(db)
            return lambda: (tallies.put(Tally(name="b")), self.assertEqual(tallies.count(), 2))

        def walk(db: OperatorDb) -> Callable[[], object]:
            tallies, tasks = tallies_of(db).values(), db.iter_tasks()
            next(tasks)
            return lambda: self.assertEqual((len([*tasks]), len([*tallies])), (79, 1))

        def block(db: OperatorDb) -> Callable[[], object]:
            tallies, stack = tallies_of(db), ExitStack()
            stack.enter_context(db.transaction())
            tallies.put(Tally(name="b"))
            return lambda: (tallies.put(Tally(name="c")), stack.close())

        def method(db: OperatorDb) -> Callable[[], object]:
            return partial(store_tasks, db, "t")

        for begin in (namespace, walk, block, method):
            with self.subTest(begin.__name__):
                db = OperatorDb(":memory:", durable=False)
                folder = os.path.dirname(db.path)
                tallies_of(db).put(Tally(name="a"))
                with db.transaction():  # more than a walk reads at a time
                    store_tasks(db, *(f"{n}" for n in range(80)), payload=bytes(30_000))
                go_on = begin(db)
                del db
                gc.collect()
                self.assertTrue(os.path.exists(folder))
                go_on()
                del go_on
                gc.collect()
                self.assertFalse(os.path.exists(folder))
                self.assertEqual(open_descriptors(folder), 0)

    def test_a_closed_memory_database_is_gone_whoever_holds_a_part_of_it(self) -> None:
        db = OperatorDb(":memory:")
        tallies, walk = tallies_of(db), db.iter_tasks()
        db.close()
        self.assertFalse(os.path.exists(db.path))
        for call in (partial(tallies.get, "a"), partial(next, walk), partial(store_tasks, db, "t")):
            self.assert_refused(ClosedError, call)

    def test_a_memory_database_that_cannot_be_opened_leaves_nothing_behind(self) -> None:
        self.enterContext(mock.patch("tempfile.tempdir", self.folder))
        self.assert_refused(StorageError, partial(OperatorDb, ":memory:", read_only=True))
        gc.collect()
        self.assertEqual(os.listdir(self.folder), [])


class ForkIsSafe(DatabaseTest):
    """Parent and child may go on with a database; what either was told is stored is stored."""

    count_tasks = "with OperatorDb(sys.argv[1]) as db: print(len(db.list_tasks()))"

    def stored(self) -> list[str]:
        """Return the ids of all tasks, as a fresh handle finds them in a sound file."""
        self.assert_sound()
        with OperatorDb(self.path) as db:
            return task_ids(db)

    def test_parent_and_child_of_an_idle_database_both_write_and_go_on_with_a_walk(self) -> None:
        db, names = self.open(timeout=0), [f"{n:03}" for n in range(80)]
        with db.transaction():
            store_tasks(db, *names, payload=bytes(30_000))  # more than a walk reads at a time
        walk = (task.task_id for task in db.iter_tasks())
        next(walk)

        def go_on(name: str) -> list[str]:
            store_tasks(db, name)
            return [task_id for task_id in walk if task_id in names]

        for n in range(3):
            store_tasks(db, f"parent {n}")
            in_child(partial(store_tasks, db, f"child {n}"))
        self.assertEqual(in_child(partial(go_on, "child 3")), names[1:])
        self.assertEqual(go_on("parent 3"), names[1:])
        db.close()
        self.assertEqual(len(self.stored()), 80 + 8)

    def test_children_forked_while_threads_work_all_write_and_end(self) -> None:
        first, second = self.open(timeout=10), self.open(self.other, timeout=10)
        stop, counts = threading.Event(), Counter[int]()

        def work(worker: int) -> None:
            while not stop.is_set():
                store_tasks(first, f"thread {worker} {counts[worker]}")
                counts[worker] += 1
                list(itertools.islice(first.iter_tasks(), 20))
                second.get_task("t")

        def store_in_both(task_id: str) -> None:
            store_tasks(first, task_id)
            store_tasks(second, task_id)

        with in_background(*(partial(work, worker) for worker in range(5))), ExitStack() as stack:
            stack.callback(stop.set)
            for n in range(10):
                in_child(partial(store_in_both, f"child {n}"))
        first.close()
        self.assertEqual(len(self.stored()), 10 + counts.total())
        self.assertEqual(len(task_ids(second)), 10)

    def test_a_child_of_an_open_transaction_is_refused_and_the_parent_goes_on(self) -> None:
        db = self.open(timeout=0.2)

        def try_everything() -> None:
            for call in (partial(store_tasks, db, "child"), partial(db.get_task, "t"), db.check):
                self.assert_refused(ClosedError, call, self.path)
            self.assert_refused(ConflictError, partial(OperatorDb, self.path), self.path)
            db.close()

        def leave_by_an_error() -> None:
            with block:
                raise KeyError

        with ExitStack() as block:
            block.enter_context(db.transaction())
            store_tasks(db, "of this thread")
            in_child(try_everything)
            in_child(lambda: self.assertRaises(OperatorDbError, block.close))
            in_child(lambda: self.assertRaises(KeyError, leave_by_an_error))
            self.assertEqual(run_program(self.count_tasks, self.path).stdout, "0\n")
            store_tasks(db, "after the fork")
        with open_block(db, "of another thread"):  # for longer than the timeout
            in_child(try_everything)
        store_tasks(db, "later")
        self.assertEqual(run_program(self.count_tasks, self.path).stdout, "4\n")
        store_tasks(db, "last")
        db.close()
        names = ["after the fork", "last", "later", "of another thread", "of this thread"]
        self.assertEqual(self.stored(), names)

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

    def test_a_child_outlives_its_parent(self) -> None:
        def parent(_: Say) -> None:
            db, pid = OperatorDb(self.path), os.getpid()
            store_tasks(db, "parent")
            if os.fork():
                store_tasks(db, "parent again")
                os.kill(pid, signal.SIGKILL)
            signal.alarm(10)
            store_tasks(db, "orphan")
            while os.getppid() == pid:
                time.sleep(0.001)
            store_tasks(db, "orphan again")

        Child(parent).result()
        self.assertEqual(self.stored(), ["orphan", "orphan again", "parent", "parent again"])

    def test_a_fork_waits_for_no_block_that_waits_for_it(self) -> None:
        def fork_beside_a_block(act: Verb) -> None:
            db, other = self.open(timeout=10), self.open(self.other, timeout=10)
            inside, forking = threading.Event(), threading.Event()
            os.register_at_fork(before=forking.set)  # there for good: hence in a child

            def act_in_a_block() -> None:
                with db.transaction():
                    inside.set()
                    self.assertTrue(forking.wait(10))
                    act(other)
                    store_tasks(db, "t")

            with in_background(act_in_a_block):
                self.assertTrue(inside.wait(10))
                began = time.monotonic()
                in_child(int)
            self.assertLess(time.monotonic() - began, 5)
            self.assertIsNotNone(db.get_task("t"))

        for label, act in (
            ("use another database", lambda other: (store_tasks(other, "t"), other.get_task("t"))),
            ("fork, too", lambda _: in_child(int)),
        ):
            with self.subTest(label):
                in_child(partial(fork_beside_a_block, act))

    @staticmethod
    def usable(*databases: OperatorDb) -> str:
        """Return what this process can do with these databases: `works`, `refuses`, or both."""
        found = set[str]()
        for db in databases:
            for call in (partial(db.get_task, "t"), partial(store_tasks, db, f"{os.getpid()}")):
                try:
                    call()
                    found.add("works")
                except (ClosedError, ConflictError):
                    found.add("refuses")
        return " and ".join(sorted(found))

    def test_ctrl_c_in_a_fork_hook_reaches_the_parent_once_it_has_forked(self) -> None:
        """Wherever it lands; and the child can use all of its databases."""
        db, other = self.open(timeout=1), self.open(self.other, timeout=1)
        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))

        def fork_interrupted_at(number: int) -> int:
            """Fork, with Ctrl-C at a call in the hooks; return how many come before the fork."""
            parent, calls = os.getpid(), 0

            def strike() -> None:
                nonlocal calls
                if os.getpid() == parent:
                    calls += 1
                    if calls == number:
                        raise KeyboardInterrupt

            store_tasks(db, "t", claimed_at=1)
            other.get_task("t")
            has_arrived = False
            try:
                with at_each_call(strike):
                    if os.fork() == 0:
                        sys.setprofile(None)
                        os._exit(calls if self.usable(db, other) == "works" else 0)
                for _ in range(30 if calls >= number > 0 else 0):
                    time.sleep(0.01)  # it may come a moment later
            except KeyboardInterrupt:
                has_arrived = True
            calls_before = os.waitstatus_to_exitcode(os.wait()[1])
            self.assertGreater(calls_before, 0, f"the child of {number} cannot use its databases")
            if number > 0 and not has_arrived:
                self.assertEqual(number, calls_before)  # the second call of the hook, done already
            return calls_before

        def sweep() -> int:
            calls_before = fork_interrupted_at(0)
            for number in range(1, calls_before + 1, 2):
                fork_interrupted_at(number)
            return calls_before

        self.assertGreater(in_child(sweep), 20)

    def test_ctrl_c_in_a_fork_hook_ends_the_wait_for_the_child(self) -> None:
        def fork_and_wait() -> bool:
            began = time.monotonic()
            try:
                with interrupt_at_call(5):
                    if os.fork() == 0:
                        signal.alarm(4)
                        signal.pause()
                os.wait()
            except KeyboardInterrupt:
                pass
            return time.monotonic() - began < 3

        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))
        store_tasks(self.db, "t")
        self.assertTrue(in_child(fork_and_wait), "it came when the child had ended")

    def test_ctrl_c_in_a_fork_hook_of_the_parent_does_not_reach_the_child(self) -> None:
        def fork_interrupted() -> int:
            try:
                with interrupt_at_call(5):
                    if os.fork() == 0:
                        time.sleep(0.2)  # it is sent 10 ms after the fork
                        os._exit(0)
                signal.pause()
            except KeyboardInterrupt:
                pass
            return os.wait()[1]

        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))
        store_tasks(self.db, "t")
        self.assertEqual(in_child(fork_interrupted), 0)

    def test_ctrl_c_in_the_hook_of_a_child_lets_it_use_nothing_that_its_parent_uses(self) -> None:
        """Ctrl-C is sent to all processes of a terminal, also to one that has just begun."""
        db, idle = self.open(timeout=0.02), self.open(self.other, timeout=0.02)

        def fork_and_use(number: int, *databases: OperatorDb) -> bool:
            """Fork, with Ctrl-C at a call in the child's hooks; return whether it has so many."""
            parent, calls, (reader, writer) = os.getpid(), 0, os.pipe()

            def strike() -> None:
                nonlocal calls
                if os.getpid() != parent:
                    calls += 1
                    if calls == number:
                        raise KeyboardInterrupt

            names = [f"{number} later {n}" for n in range(20)]
            with suppress(OperatorDbError), ExitStack() as stack:
                if db in databases:
                    stack.enter_context(db.transaction())
                    store_tasks(db, f"{number} in a block")
                with at_each_call(strike):
                    child = os.fork()
                    sys.setprofile(None)
                if child == 0:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is sent again in a moment
                    os.read(reader, 1)  # until the parent has left its block, and gone on
            if child == 0:
                os._exit(2 if self.usable(*databases) != "refuses" else calls >= number)
            for name in names:
                store_tasks(databases[0], name, payload=bytes(3000))
            os.write(writer, b".")
            status = os.waitstatus_to_exitcode(os.wait()[1])
            self.assertIn(status, (0, 1), f"the child of {number} uses its databases")
            self.assertLessEqual({*names}, {*task_ids(databases[0])})
            os.close(reader)
            os.close(writer)
            return status == 1

        def sweep(*databases: OperatorDb) -> int:
            return next(n for n in itertools.count(1, 2) if not fork_and_use(n, *databases))

        def sweep_beside_a_block() -> int:
            with open_block(db):
                return sweep(idle)

        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))
        self.assertGreater(in_child(partial(sweep, db)), 5)
        self.assertGreater(in_child(sweep_beside_a_block), 5)

    def test_a_fork_waits_for_a_long_block_while_all_others_read_on(self) -> None:
        def fork_beside_a_block() -> tuple[str, int]:
            db, other = self.open(timeout=5), self.open(self.other, timeout=5)
            store_tasks(db, "t")
            store_tasks(other, "t")
            inside, forking, stop = threading.Event(), threading.Event(), threading.Event()
            os.register_at_fork(before=forking.set)  # there for good: hence in a child
            reads, read_meanwhile = Counter[str](), Counter[str]()

            def read(each: OperatorDb) -> None:
                while not stop.is_set():
                    self.assertIsNotNone(each.get_task("t"))
                    reads[each.path] += 1

            def hold() -> None:
                with db.transaction():
                    inside.set()
                    self.assertTrue(forking.wait(5))
                    before = reads.copy()
                    while min(reads[each.path] - before[each.path] for each in (db, other)) < 100:
                        time.sleep(0.001)
                    read_meanwhile.update(reads - before)
                    store_tasks(db, "in the block")

            with in_background(hold, partial(read, db), partial(read, other)), ExitStack() as stack:
                stack.callback(stop.set)
                self.assertTrue(inside.wait(5))
                began = time.monotonic()
                found = in_child(lambda: (self.usable(db, other), len(task_ids(db))))
                self.assertLess(time.monotonic() - began, 4)
            return found, min(read_meanwhile.values())

        (found, read_meanwhile) = in_child(fork_beside_a_block)
        self.assertEqual(found, ("works", 3))
        self.assertGreaterEqual(read_meanwhile, 100)

    def test_a_child_of_a_database_at_work_for_longer_than_its_timeout_uses_none(self) -> None:
        busy, idle = self.open(timeout=0.1), self.open(self.other, timeout=10)
        store_tasks(idle, "t")

        def try_everything() -> None:
            self.enterContext(mock.patch("tempfile.tempdir", self.folder))
            names = os.listdir(self.folder)
            for db in (busy, idle):
                for call in (db.check, db.prune, db.stats, lambda db=db: db.export(BytesIO())):
                    self.assert_refused(ClosedError, call, db.path)
                self.assertEqual(self.usable(db), "refuses")
                self.assert_refused(ClosedError, lambda db=db: db.transaction().__enter__())
            for path in (self.path, self.other, self.beside("later.db"), ":memory:"):
                self.assert_refused(ConflictError, partial(OperatorDb, path))
            self.assertEqual(os.listdir(self.folder), names)
            busy.close()
            idle.close()

        with open_block(busy, "in a block"):
            began = time.monotonic()
            in_child(try_everything, seconds=5)
            self.assertLess(time.monotonic() - began, 5)
            store_tasks(idle, "meanwhile")
        store_tasks(busy, "later")
        self.assertEqual(
            (task_ids(busy), task_ids(idle)), (["in a block", "later"], ["meanwhile", "t"])
        )
        self.assertEqual(in_child(partial(self.usable, busy, idle)), "works")

    def test_another_object_on_the_file_of_a_block_that_forks_refuses_in_the_child(self) -> None:
        db, second, other = self.open(timeout=1), self.open(timeout=1), self.open(self.other)
        os.symlink(self.path, self.beside("link.db"))
        linked = self.open(self.beside("link.db"), timeout=1)
        for each in (second, other, linked):
            each.get_task("t")

        def use_in_child() -> None:
            self.assertEqual(self.usable(db, second, linked), "refuses")
            for path in (self.path, linked.path):
                self.assert_refused(ConflictError, partial(OperatorDb, path), self.path)
            self.assertEqual(self.usable(other), "works")

        with db.transaction():
            store_tasks(db, "in the block")
            in_child(use_in_child)
        self.assertEqual(task_ids(second), ["in the block"])
        self.assertEqual(in_child(partial(self.usable, db, second, linked, other)), "works")

    def test_a_child_that_the_progress_of_a_copy_forks_goes_no_further(self) -> None:
        db, copy, statuses = self.open(), self.beside("copy.db"), list[int]()
        store_tasks(db, *map(str, range(40)))
        db.backup(copy)
        for verb in (partial(db.backup, self.other, overwrite=True), partial(db.restore, copy)):
            calls = list[int]()
            verb(progress=lambda done, _, calls=calls: calls.append(done))
            for number in (1, len(calls) // 2, len(calls)):
                left = itertools.count(1)

                def progress(*_: int, number: int = number, left: Any = left) -> None:
                    if next(left) == number and (child := os.fork()) != 0:
                        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

                verb(progress=progress)
                store_tasks(db, "later")
                self.assertTrue(db.delete_task("later"))
        self.assertEqual(statuses, [os.EX_SOFTWARE] * 6)
        self.assertEqual(content_of(self.other), content_of(copy))

    def test_a_handler_may_fork_in_the_middle_of_a_read(self) -> None:
        db = self.open()
        store_tasks(db, "t")
        db.append_command("s", "x")
        for read in (lambda: db.get_task("t"), lambda: db.get_session("s"), db.list_tasks):
            for number in itertools.count(1):

                def fork(number: int = number) -> None:
                    if calls() == number:
                        if (child := os.fork()) == 0:
                            os._exit(0)
                        os.waitpid(child, 0)

                self.assertTrue(read())  # so that a connection is open
                with at_each_call(fork) as calls:
                    self.assertTrue(read())
                if calls() < number:
                    break
            self.assertGreater(number, 10)

    def test_a_child_that_leaves_long_work_by_an_exception_adds_nothing_to_it(self) -> None:
        class LeaveError(Exception):
            pass

        def count_calls(verb: Callable[..., object]) -> int:
            calls = list[int]()
            verb(progress=lambda done, _: calls.append(done))
            return len(calls)

        def fork_at(number: int, verb: Callable[..., Any]) -> Any:
            """Use a verb; fork at a call of its progress function, and let the child leave."""
            calls = itertools.count(1)

            def progress(*_: int) -> None:
                if next(calls) == number:
                    if os.fork() == 0:
                        raise LeaveError
                    os.wait()

            try:
                return verb(progress=progress)
            except LeaveError:
                os._exit(0)

        fill(self.path, tasks=10)
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"large {n}" for n in range(60)), payload=bytes(60_000))
            store_tasks(db, *(f"small {n}" for n in range(60)))
        db, lines, copy = self.open(), content_of(self.path), self.beside("copy.db")
        db.backup(copy)
        db.export(self.file, include_secrets=True)
        export = partial(db.export, include_secrets=True)

        for label, verb, found in (
            ("a path", partial(export, self.file), lambda: read_bytes(self.file).splitlines()[1:]),
            (
                "a backup",
                partial(db.backup, self.other, overwrite=True),
                lambda: content_of(self.other),
            ),
        ):
            calls = count_calls(verb)
            for number in (2, calls // 2):
                with self.subTest(label, call=number):
                    fork_at(number, verb)
                    self.assertTrue(found() == lines)
        with OperatorDb(":memory:") as target:
            calls = count_calls(partial(target.restore, copy))
        for number in (calls // 3, calls * 2 // 3, calls - 1):
            with (
                self.subTest("a restore", call=number),
                OperatorDb(":memory:", durable=False) as target,
            ):
                store_tasks(target, "gone")  # so that its write-ahead log is in use
                target.delete_task("gone")
                fork_at(number, partial(target.restore, copy))
                self.assertTrue(target.check() == [], "the database is damaged")
                self.assertTrue(exported(target) == lines)


class InterruptsLoseNothing(DatabaseTest):
    """KeyboardInterrupt may land between any two instructions of the module.

    Most tests here interrupt a verb at its first call, then at its second, and so on to its end.
    """

    class Handler:
        """What interrupts a verb: it reads, tries to write, and notes what it is told.

        Its writes are to the records that the verb itself changes. What is wrong goes into
        `problems`, because an error that a handler raises ends the verb.
        """

        def __init__(self, db: OperatorDb, name: str = "", *, reads: int = 4) -> None:
            self.db, self.tallies, self.name, self.reads = db, tallies_of(db), name, reads
            self.problems, self.acknowledged = list[str](), [list[str](), list[str](), list[str]()]
            self.count, self.refused, self.slowest = 0, 0, 0.0
            self.readers = (
                self.look_at_session,
                self.look_at_pair,
                self.look_at_bundle,
                db.list_proofs,
            )
            self.writers = (self.append, self.move, self.add)
            self.tallies.put(Tally(name="count"))
            db.delete_session("s")
            db.append_command("s", "first")
            db.delete_task("t")
            store_tasks(db, "t")
            if db.get_task("done") is None:
                store_tasks(db, "done")
                db.complete_task("done", proof("done"))

        def __call__(self, *_: object) -> None:
            began = time.monotonic()
            self.count += 1
            for n in range(self.reads):
                try:
                    self.readers[(self.count + n) % 4]()
                except OperatorDbError as error:
                    self.problems.append(f"a read raised {error!r}")
            kind, mark = self.count % 3, str(self.count)
            try:
                self.writers[kind](mark)
                self.acknowledged[kind].append(mark)
            except ConflictError:
                self.refused += 1
            except OperatorDbError as error:
                self.problems.append(f"a write raised {error!r}")
            self.slowest = max(self.slowest, time.monotonic() - began)

        def look_at_session(self) -> None:
            session = self.db.get_session(self.name or "s")
            if (
                session
                and self.name
                and (len(session.transcript), len(session.command_history)) != (2, 2)
            ):
                self.problems.append(f"half a session: {session}")

        def look_at_pair(self) -> None:
            task, log = self.db.get_task(self.name or "t"), self.db.get_proof(self.name or "t")
            if task is not None and (task.status == "completed") != (log is not None):
                self.problems.append(f"half a completion: {task}, {log}")

        def look_at_bundle(self) -> None:
            if verify_dispute_bundle(self.db.dispute_bundle("done")):
                self.problems.append("a false bundle")

        def append(self, mark: str) -> None:
            self.db.append_command("s", mark)

        def move(self, mark: str) -> None:
            self.db.update_task_status("t", "in_progress", signature=mark)

        def add(self, _: str) -> None:
            with self.db.transaction():
                self.tallies.update("count", lambda tally: replace(tally, count=tally.count + 1))

        def missing(
            self, *commands: str, signatures: Iterable[str] = (), added: int = 0
        ) -> list[str]:
            """Return what was acknowledged, here and by the verb, and is not stored."""
            db, problems = self.db, [*self.problems, *self.db.check()]
            appended, moved, counted = self.acknowledged
            found = Counter(db.get_session("s").command_history)
            if found != Counter(["first", *appended, *commands]):
                problems.append(f"commands: {found}, not {appended} and {commands}")
            history = Counter(change.signature for change in db.get_task("t").history[1:])
            if history != Counter([*moved, *signatures]):
                problems.append(f"signatures: {history}, not {moved} and {signatures}")
            if (count := self.tallies.get("count").count) != len(counted) + added:
                problems.append(f"{count} updates, not {len(counted)} and {added}")
            return problems

    seconds = 40

    def setUp(self) -> None:
        super().setUp()
        self.opened = self.watch_connections()
        self.db, self.second = self.open(timeout=2), self.open(timeout=0.5)
        self.mine, self.theirs = tallies_of(self.db), tallies_of(self.second)
        raw = self.enterContext(closing(sqlite3.connect(self.path, timeout=0)))
        for connection in (raw, *self.opened):
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it has been closed
                connection.execute("PRAGMA synchronous=OFF")  # a sync at every step would be slow
        self.checkpoint = partial(raw.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
        self.enterContext(mock.patch("time.time", return_value=1_774_628_000.0))
        # an interrupt in a finalizer or a fork hook is printed by the interpreter, not raised
        self.enterContext(mock.patch("sys.unraisablehook", lambda _: None))

    def sweep(
        self, label: str, verb: Callable[[str], Any], prepare: Callable[[str], Any] = lambda _: None
    ) -> None:
        """Interrupt a verb at each of its calls, every time with another name for its records.

        The last exceptions are kept, and with them all frames that they passed through. Nothing may
        be held afterwards, and the verb must be done as a whole, or not at all.
        """
        kept, found = list[BaseException](), list[str]()
        with self.subTest(label):
            for number in itertools.count():
                name = f"{label} {number}"
                prepare(name)
                if number == 0:
                    found.append(self.find(name))
                try:
                    with interrupt_at_call(number) as calls:
                        verb(name)
                except KeyboardInterrupt as error:
                    kept[:] = [*kept[-9:], error]
                self.assert_nothing_held(name)
                found.append(self.find(name))
                if calls() < number:
                    break
            before, after, *outcomes = found
            self.assertEqual(outcomes[-1], after, "the verb has returned and is not done")
            self.assertEqual({*outcomes}, {before, after})
            self.assertGreater(number, 5, "the verb was hardly interrupted")
            self.assertEqual(self.second.check(), [])

    def find(self, name: str) -> str:
        """Return what another handle finds of the records of a name."""
        found = (self.second.get_task(name), self.second.get_session(name), self.theirs.get(name))
        return repr((*found, self.second.get_proof(name) is None)).replace(name, "NAME")

    def assert_nothing_held(self, when: str) -> None:
        """Fail unless no snapshot is open and both handles can write and see the other's write."""
        ((busy, *_),) = self.checkpoint()
        self.assertEqual(busy, 0, f"a lock or a snapshot is held ({when})")
        handles = (self.mine, self.theirs)
        for count, (writer, reader) in enumerate((handles, handles[::-1])):
            tally = Tally(name=f"after {when}", count=count)
            writer.put(tally)
            self.assertEqual(reader.get(tally.name), tally, "a later write is lost or not seen")

    def test_an_interrupted_verb_is_done_whole_or_not_at_all_and_holds_nothing(self) -> None:
        db, before = self.db, len(self.opened)

        def store(name: str) -> None:
            store_tasks(db, name)

        def store_old(name: str) -> None:
            db.prune()  # the one of the last time, which may still be there
            store_tasks(db, name, status=TaskStatus.COMPLETED, claimed_at=0)

        def append(name: str) -> None:
            db.append_transcript(name, "user", "hello")

        def blocks(name: str) -> None:
            outer = db.transaction()  # which the traceback of the interrupt refers to
            with outer:
                store(name)
                with db.transaction():
                    append(name)

        store_tasks(db, "t", status=TaskStatus.DISPUTED)
        for label, verb, *prepare in (
            ("put", lambda name: self.mine.put(Tally(name=name))),
            ("store_task", store),
            ("delete_task", db.delete_task, store),
            ("complete_task", lambda name: db.complete_task(name, proof(name)), store),
            ("append_transcript", append),
            ("delete_session", db.delete_session, append),
            ("prune", lambda _: db.prune(session_days=None), store_old),
            ("blocks", blocks),
            ("get_task", db.get_task, store),
            ("get_session", db.get_session, append),
            ("list_tasks", lambda _: db.list_tasks(limit=2)),
            ("list_sessions", lambda _: db.list_sessions(limit=2)),
            ("iter_tasks", lambda _: list(db.iter_tasks("disputed"))),
            ("a dry prune", lambda _: db.prune(dry_run=True)),
        ):
            self.sweep(label, verb, *prepare)
        self.assertEqual(len(self.opened), before, "an interrupted verb kept its connection")

    def test_an_interrupt_while_connections_are_opened_anew_loses_nothing(self) -> None:
        for verb in (self.db.delete_task, self.db.get_task):
            # a fork closes them, and the last one takes the log with it
            self.sweep(verb.__name__, verb, lambda _: in_child(int))

    def test_a_block_that_survives_an_interrupt_has_all_of_its_inner_block_or_nothing(self) -> None:
        db, kept = self.db, []
        for number in itertools.count(1):
            outer = [f"{number} before", f"{number} later"]
            inner = [f"{number} inner", f"{number} inner too"]
            with suppress(ConflictError), db.transaction():
                store_tasks(db, outer[0])
                try:
                    with interrupt_at_call(number) as calls, db.transaction():
                        store_tasks(db, *inner)
                except KeyboardInterrupt as error:
                    kept.append(error)
                store_tasks(db, outer[1])
            found = [name for name in outer + inner if self.second.get_task(name)]
            self.assertIn(found, ([], outer, outer + inner), f"interrupted at call {number}")
            self.assert_nothing_held(f"call {number}")
            if calls() < number:
                break
        self.assertEqual(found, outer + inner)
        self.assertGreater(len(kept), 50)
        self.assertEqual(db.check(), [])

    def test_an_interrupted_opening_or_closing_leaves_no_descriptor(self) -> None:
        def use(_: str) -> None:
            with OperatorDb(self.other, durable=False) as db:
                db.get_task("t")

        self.sweep("open and close", use)
        self.opened.clear()
        gc.collect()
        self.assertEqual(open_descriptors(self.other), 0)
        self.assert_sound(self.other)

    def test_interrupts_at_random_moments_leave_blocks_whole_and_nothing_held(self) -> None:
        numbers = itertools.count()

        def store_both() -> None:
            name = f"{next(numbers)}"
            with self.db.transaction():
                store_tasks(self.db, name)
                with self.db.transaction():
                    self.db.append_command("s", name)
            self.db.update_task_status(name, "in_progress")

        struck = in_child(partial(interrupt_at_random, store_both, 0.0015, 200))
        self.assertGreater(struck, 20)
        self.assertEqual({*task_ids(self.db)}, {*self.db.get_session("s").command_history})
        self.assert_nothing_held("at last")

    def test_a_wait_for_another_writer_is_interrupted_at_once_and_a_handler_may_read(self) -> None:
        db = self.open(timeout=15)

        def wait_in_vain() -> None:
            found: list[TaskRecord | None] = []

            def handle(*_: object) -> None:
                found.append(db.get_task("held"))
                if len(found) == 3:
                    raise KeyboardInterrupt

            signal.signal(signal.SIGALRM, handle)
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            began = time.monotonic()
            with self.assertRaises(KeyboardInterrupt):
                store_tasks(db, "t")
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.assertLess(time.monotonic() - began, 2)
            self.assertEqual(found, [None] * 3)

        def wait_for_a_thread() -> None:
            with open_block(db, "of a thread"):
                wait_in_vain()
            store_tasks(db, "later")

        holder = holding_the_lock(self.path, "of a process")
        in_child(wait_in_vain)
        os.kill(holder.pid, signal.SIGUSR1)
        holder.result()
        in_child(wait_for_a_thread)
        self.assertEqual(task_ids(self.db), ["later", "of a process", "of a thread"])

    def test_a_signal_handler_may_read_at_every_call_of_what_it_interrupts(self) -> None:
        db = self.db
        store_tasks(db, "t", description="as stored")
        db.append_transcript("s", "user", "hello")

        def write() -> None:
            with db.transaction():
                store_tasks(db, "of a block")
                with db.transaction():
                    db.append_transcript("s", "user", "hello again")

        found: list[str | None] = []
        reads = (partial(db.get_task, "t"), partial(db.get_session, "s"), partial(task_ids, db))
        for verb in (*reads, write):
            found.clear()
            with at_each_call(lambda: found.append(db.get_task("t").description)):
                verb()
            self.assertGreater(len(found), 20)
            self.assertEqual({*found}, {"as stored"})
        self.assertEqual(len(self.second.transcript("s")), 2)
        self.assert_nothing_held("at last")

    def test_what_a_handler_reads_is_whole_and_what_it_writes_is_stored_or_refused(self) -> None:
        db = self.open(timeout=5)
        tallies = tallies_of(db)

        def session_of(name: str) -> SessionState:
            said = [TranscriptEntry(role="user", content=word, timestamp=1) for word in "ab"]
            return SessionState(session_id=name, transcript=said, command_history=["a", "b"])

        def store_pair(name: str) -> None:
            store_tasks(db, name)
            db.complete_task(name, proof(name))

        def plus_one(tally: Tally) -> Tally:
            return replace(tally, count=tally.count + 1)

        moved = BytesIO(b'{"tasks":[],"config":{"network":"devnet"}}')
        for label, verb, prepare, outcome in (
            ("append_command", lambda _: db.append_command("s", "verb"), None, ("verb",)),
            ("append_transcript", lambda _: db.append_transcript("s", "user", "verb"), None, ()),
            ("link_task", lambda name: db.link_task("s", name), None, ()),
            ("update", lambda _: tallies.update("count", plus_one), None, 1),
            ("put", lambda name: tallies.put(Tally(name=name)), None, ()),
            (
                "update_task_status",
                lambda _: db.update_task_status("t", "disputed", signature="verb"),
                None,
                "signature",
            ),
            ("store_task", partial(store_tasks, db), None, ()),
            ("delete_task", db.delete_task, partial(store_tasks, db), ()),
            (
                "complete_task",
                lambda n: db.complete_task(n, proof(n)),
                partial(store_tasks, db),
                (),
            ),
            ("store_session", lambda name: db.store_session(session_of(name)), None, ()),
            ("delete_session", db.delete_session, lambda n: db.store_session(session_of(n)), ()),
            ("mark", lambda name: db.mark_proof_submitted(name, "sig"), store_pair, ()),
            ("prune", lambda _: db.prune(task_days=None), None, ()),
            ("import", lambda _: (moved.seek(0), db.import_(moved)), None, ()),
            ("get_session", lambda _: db.get_session("s"), None, ()),
            ("list_tasks", lambda _: db.list_tasks(limit=3), None, ()),
            (
                "after a fork",
                lambda _: db.append_command("s", "verb"),
                lambda _: in_child(int),
                ("verb",),
            ),
        ):
            for block in (contextlib.nullcontext, db.transaction):
                name = f"{label} {block.__name__}"
                with self.subTest(name):
                    handler = self.Handler(db, name, reads=1)
                    if prepare is not None:
                        prepare(name)
                    with at_each_call(handler), block():
                        verb(name)
                    missing = handler.missing(
                        *(outcome if isinstance(outcome, tuple) else ()),
                        signatures=["verb"] if outcome == "signature" else [],
                        added=outcome if isinstance(outcome, int) else 0,
                    )
                    self.assertEqual(missing, [])
                    self.assertGreater(handler.count, 20)
                    self.assertLess(handler.slowest, 1)

    def test_signals_at_random_moments_lose_nothing_that_their_handler_was_told(self) -> None:
        rng = random.Random(5)

        def serve_signals(db: OperatorDb) -> tuple[list[str], int, int, float]:
            handler, done = self.Handler(db, reads=1), Counter[str]()
            verbs = {
                "append": lambda: db.append_command("s", "verb"),
                "move": lambda: db.update_task_status(
                    "t", "disputed", signature=f"{-done['move']}"
                ),
                "add": partial(handler.add, ""),
                "list": db.list_tasks,
            }

            def handle(*_: object) -> None:
                handler()
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00002, 0.0004))

            signal.signal(signal.SIGALRM, handle)
            signal.raise_signal(signal.SIGALRM)
            while handler.count < 250:
                with rng.choice((contextlib.nullcontext, db.transaction))():
                    for name in rng.sample([*verbs], 2):
                        verbs[name]()
                        done[name] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            moves = [f"{-n}" for n in range(done["move"])]
            missing = handler.missing(
                *["verb"] * done["append"], signatures=moves, added=done["add"]
            )
            told = sum(map(len, handler.acknowledged))
            return missing, told, handler.refused, handler.slowest

        def serve() -> None:
            db, outcomes = self.open(timeout=5), list[Any]()
            for _ in range(10):
                outcomes.append(serve_signals(db))
                self.assertEqual(outcomes[-1][0], [])
            _, told, refused, slowest = zip(*outcomes, strict=True)
            self.assertGreater(min(sum(told), sum(refused)), 300)
            self.assertLess(max(slowest), 2)

        in_child(serve)

    def test_a_handler_that_interrupts_a_verb_never_waits_for_others(self) -> None:
        """Not even for a fork, close() or another writer that waits for that verb to end."""

        def look_at(db: OperatorDb) -> None:
            self.assertIsNotNone(db.get_task("t"))
            self.assertIsNotNone(db.get_session("s"))
            self.assertIsNotNone(db.dispute_bundle("t"))
            self.assertEqual(len(db.list_proofs()), 1)

        def write_to(db: OperatorDb) -> None:
            with db.transaction():
                store_tasks(db, "t")

        def interrupt_beside(begin: Callable[[OperatorDb, OperatorDb], object]) -> None:
            """Interrupt an update at each call from when something else waits for it."""
            path = self.beside(f"{begin.__name__}.db")
            db, other = self.open(path, timeout=3), self.open(path, timeout=3)
            tallies, waits, sleep, moments = (
                tallies_of(db),
                threading.Event(),
                time.sleep,
                list[float](),
            )
            tallies.put(Tally(name="one"))
            store_tasks(db, "t")
            db.complete_task("t", proof("t"))
            db.append_command("s", "first")

            def note_and_sleep(seconds: float) -> None:
                waits.set()
                sleep(seconds)

            def handle() -> None:
                if waits.is_set():
                    began = time.monotonic()
                    for act in (look_at, write_to):
                        with suppress(ConflictError, ClosedError):  # once the verb has ended
                            act(db)
                    moments.append(time.monotonic() - began)

            def change(tally: Tally) -> Tally:
                thread.start()
                self.assertTrue(waits.wait(5))
                look_at(db)
                self.assert_refused(ConflictError, partial(write_to, db))
                return replace(tally, count=1)

            thread = threading.Thread(target=begin, args=(db, other))
            with mock.patch("time.sleep", note_and_sleep), at_each_call(handle):
                tallies.update("one", change)
            thread.join(5)
            self.assertFalse(thread.is_alive())
            self.assertEqual(tallies_of(other).get("one").count, 1)
            self.assertGreater(len(moments), 20)
            self.assertLess(max(moments), 1)

        def fork(*_: OperatorDb) -> None:
            if os.fork() == 0:
                os._exit(0)
            os.wait()

        def close(db: OperatorDb, _: OperatorDb) -> None:
            db.close()

        def write(_: OperatorDb, other: OperatorDb) -> None:
            store_tasks(other, "u")

        for begin in (fork, close, write):
            with self.subTest(begin.__name__):
                in_child(partial(interrupt_beside, begin))

    def test_a_handler_never_waits_for_the_fork_or_close_that_it_interrupts(self) -> None:
        def fork(_: OperatorDb) -> None:
            if os.fork() == 0:
                os._exit(0)
            os.wait()

        def interrupt(verb: Verb, act: Verb, number: int) -> bool:
            """Act at a call of a verb; return whether there is no such call."""
            parent, found = os.getpid(), list[tuple[float, type[Exception] | None]]()
            db = OperatorDb(self.beside("fork.db"), durable=False, timeout=1)
            store_tasks(db, "t")

            def handle() -> None:
                if os.getpid() == parent and calls() == number:
                    began, kind = time.monotonic(), None
                    try:
                        act(db)
                    except OperatorDbError as error:
                        kind = type(error)
                    found.append((time.monotonic() - began, kind))

            with at_each_call(handle) as calls:
                verb(db)
            db.close()
            for seconds, kind in found:
                self.assertIn(kind, (None, ConflictError, ClosedError), f"at call {number}")
                self.assertLess(seconds, 0.5)
            return not found

        for verb, act in itertools.product(
            (fork, OperatorDb.close),
            (
                lambda db: db.get_task("t"),
                lambda db: db.get_session("s"),
                lambda db: store_tasks(db, "u"),
            ),
        ):
            with self.subTest(verb=verb):
                number = 1
                while not interrupt(verb, act, number):
                    number += 2
                self.assertGreater(number, 20)

    def test_a_list_that_a_handler_interrupts_in_a_block_has_each_record_once(self) -> None:
        db, names = self.open(), ["0", "1", "2", "3"]
        for number in itertools.count(1):

            def move_the_first() -> None:
                if calls() == number:  # noqa: B023  it is called in this very pass
                    with suppress(ConflictError):
                        store_tasks(db, "0", claimed_at=99)

            with suppress(KeyError), db.transaction():
                for n, name in enumerate(names):
                    store_tasks(db, name, claimed_at=n)
                with at_each_call(move_the_first) as calls:
                    found = db.list_tasks_by_status("claimed")
                self.assertEqual(sorted(task.task_id for task in found), names, f"call {number}")
                raise KeyError
            if calls() < number:
                break
        self.assertGreater(number, 10)

    def test_a_handler_that_waits_for_another_database_stops_no_thread_of_this_one(self) -> None:
        db, other = self.open(timeout=5), self.open(self.other, timeout=0.05)
        store_tasks(db, "t")
        stopped, readers = list[int](), list[threading.Thread]()

        def wait_in_vain() -> None:
            if calls() % 3 == 0:
                has_read = threading.Event()
                readers.append(threading.Thread(target=lambda: (db.get_task("t"), has_read.set())))
                readers[-1].start()
                try:
                    store_tasks(other, "u")
                except BusyError:  # it has waited for 0.05 s
                    stopped.extend([] if has_read.is_set() else [calls()])
                except ConflictError:
                    pass

        with open_block(other, "of another thread"), at_each_call(wait_in_vain) as calls:
            db.get_task("t")
        for thread in readers:
            thread.join(5)
        self.assertEqual(stopped, [])

    def test_an_error_that_a_handler_raises_passes_and_loses_nothing(self) -> None:
        """`TimeoutError` from an alarm is the usual one."""
        db, done = self.open(timeout=2), [("in_progress", "a"), ("completed", "b")]
        db.append_command("s", "first")
        read: dict[str, Any] = {}
        described = partial(replace, description="new")
        for label, verb in (
            ("get_task", db.get_task),
            ("get_session", lambda _: db.get_session("s")),
            ("update_task", lambda name: db.update_task(name, described)),
            ("store_task", lambda name: db.store_task(described(read[name]))),
            ("complete_task", lambda name: db.complete_task(name, proof(name, b"n"))),
            ("append_command", lambda name: db.append_command("s", name)),
        ):
            with self.subTest(label):
                for number in itertools.count(1):
                    name = f"{label} {number}"
                    store_tasks(db, name)
                    for status, signature in done:
                        read[name] = db.update_task_status(name, status, signature=signature)
                    db.store_proof(proof(name, b"n"))

                    def strike(number: int = number) -> None:
                        if calls() == number:
                            sys.setprofile(None)
                            raise TimeoutError

                    with suppress(TimeoutError), at_each_call(strike) as calls:
                        verb(name)
                    signatures = [change.signature for change in db.get_task(name).history]
                    self.assertEqual(signatures[:3], [None, "a", "b"], f"at call {number}")
                    if calls() < number:
                        break
                self.assertGreater(number, 20)
        self.assertEqual(db.check(), [])

    def test_an_error_of_a_handler_in_a_block_leaves_the_block_as_it_is(self) -> None:
        db = self.open()
        for number in range(1, 60):

            def strike(number: int = number) -> None:
                if calls() == number:
                    sys.setprofile(None)
                    raise ConflictError("the handler's")

            with db.transaction():
                store_tasks(db, f"{number}")
                with suppress(ConflictError), at_each_call(strike) as calls:
                    db.get_task("x")
                    db.get_task("y")
                    self.assertLess(calls(), number, "it was swallowed")
                self.assertIsNotNone(db.get_task(f"{number}"), f"at call {number}")

    def test_an_alarm_during_an_import_is_no_fault_of_the_file(self) -> None:
        db, moved = self.open(), BytesIO()
        store_tasks(db, *map(str, range(4)))
        db.export(moved)
        for number in itertools.count(1, 7):

            def strike(number: int = number) -> None:
                if calls() == number:
                    sys.setprofile(None)
                    raise TimeoutError

            moved.seek(0)
            with suppress(TimeoutError), at_each_call(strike) as calls:
                db.import_(moved)
            if calls() < number:
                break
        self.assertGreater(number, 100)

    def test_an_error_of_a_handler_passes_as_it_is_inside_an_except_clause(self) -> None:
        db = self.open()
        store_tasks(db, "t")
        for around in (KeyError("mine"), DamagedError("mine")):
            for number in range(1, 40):

                def strike(number: int = number) -> None:
                    if calls() == number:
                        sys.setprofile(None)
                        raise TimeoutError

                try:
                    raise around
                except (KeyError, DamagedError):
                    with suppress(TimeoutError), at_each_call(strike) as calls:
                        db.get_task("t")


class SecretsAreNotShown(DatabaseTest):
    """Files are private from their first byte; what is secret is masked wherever it is shown."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(self.assertNoLogs("operator_db"))

    def modes(self) -> dict[str, int]:
        """Return the modes of all files and folders in the test's folder, by their paths."""
        modes = {}
        for folder, folders, files in os.walk(self.folder):
            for path in (os.path.join(folder, name) for name in (*folders, *files)):
                with suppress(FileNotFoundError):
                    modes[path] = os.stat(path).st_mode & 0o777
        return modes

    def test_every_file_is_private_at_every_moment_whatever_the_umask(self) -> None:
        def work(umask: int) -> None:
            folder = self.beside(f"{umask:o}")
            path, copy, export = (f"{folder}/b/{name}" for name in ("db", "copy", "export"))
            rights_of_others = Counter[str]()

            def look() -> None:
                for name, mode in self.modes().items():
                    rights_of_others[name] |= mode & 0o077

            def write(db: OperatorDb) -> None:
                store_tasks(db, "t")
                db.backup(copy, overwrite=True)
                db.export(export)

            if umask == 0o777:  # under which a new directory cannot be entered
                OperatorDb(path).close()
                os.unlink(path)
            os.umask(umask)
            with at_each_call(look):
                db = OperatorDb(path)
                write(db)
            self.assertIn("new", {name[-3:] for name in rights_of_others})
            self.assertEqual(rights_of_others.total(), 0, rights_of_others)
            for name in (copy, export):
                os.chmod(name, 0o666)  # what replaces them is private all the same
            write(db)
            db.write_metrics(f"{folder}/metrics")  # for others to read
            private = (path, path + "-wal", path + "-shm", copy, export)
            wanted = {folder: 0o700, f"{folder}/b": 0o700, f"{folder}/metrics": 0o644}
            self.assertEqual(self.modes(), {**wanted, **dict.fromkeys(private, 0o600)})
            shutil.rmtree(folder)

        for umask in (0o000, 0o077, 0o777):
            with self.subTest(umask=umask):
                in_child(partial(work, umask))

    def test_a_file_that_others_could_read_is_made_private_and_that_is_logged_once(self) -> None:
        OperatorDb(self.path).close()
        os.chmod(self.path, 0o644)
        with self.assertLogs("operator_db", logging.WARNING) as logs:
            OperatorDb(self.path).close()
        self.assertIn(self.path, logs.output[0])
        self.assertEqual(self.modes(), {self.path: 0o600})
        with self.assertNoLogs("operator_db", logging.WARNING):
            OperatorDb(self.path).close()

    def test_a_replaced_keypair_is_in_no_file_after_close(self) -> None:
        with OperatorDb(self.path) as db:
            for secret in (SECRET, "the one that replaces it"):
                keypairs = {"main": secret, "more than a page": secret * 3000}
                db.store_config(OperatorConfig(keypairs=keypairs))
                store_tasks(db, "between")
        self.assertEqual(os.listdir(self.folder), ["operator.db"])
        image = read_bytes(self.path)
        self.assertEqual((b"that replaces it" in image, SECRET.encode() in image), (True, False))

    def test_a_repr_masks_every_secret(self) -> None:
        db = self.open()
        store_secrets(db)
        wallet = wallets_of(db).get("me")
        for record in (db.get_config(), tallies_of(db).get("two"), wallet, wallet.tallies):
            with self.subTest(type(record).__name__):
                self.assertNotIn(SECRET, repr(record))
                self.assertIn("***", repr(record))
        self.assertEqual((db.get_config().keypairs["main"], wallet.tallies[0].pin), (SECRET,) * 2)

    def test_no_error_about_a_configuration_shows_a_secret(self) -> None:
        db, raw = self.open(), SECRET.encode()
        wrong: tuple[Any, ...] = ({"a": [SECRET]}, {"a": raw}, {SECRET: 1}, [[SECRET]], raw, SECRET)
        cases = [*itertools.product(("keypairs", "rpc_endpoints"), wrong), ("keypairs", [SECRET])]
        for name, value in cases:
            config = OperatorConfig()
            setattr(config, name, value)
            with self.subTest(name, value=value):
                make = partial(OperatorConfig, **{name: value})
                for action in (make, partial(db.store_config, config)):
                    self.assert_refused(InvalidRecordError, action, "OperatorConfig", name, "***")

    def test_no_error_about_a_custom_record_shows_a_secret(self) -> None:
        @dataclass
        class Vault:
            name: str = "a"
            tally: Tally | None = None
            part: Part = field(default_factory=partial(Part, "x"), metadata={"secret": True})
            parts: list[Part] = field(default_factory=list, metadata={"secret": True})

        wrong, tally = SECRET.encode(), Tally(name="in", pin=SECRET)
        cases = (
            ("a field", Tally(name="a", pin=wrong), "Tally.pin"),
            ("a list in place of a field", Tally(name="a", pin=[SECRET]), "Tally.pin"),
            ("a field of a record within", Vault(tally=Tally(name="in", pin=wrong)), "tally"),
            ("in place of a record within", Vault(tally={"pin": SECRET}), "tally"),
            ("in place of a record in a list", Wallet(owner="o", tallies=[SECRET]), "tallies"),
            ("within a secret field", Vault(part=Part([SECRET])), "part"),
            ("within a secret list", Vault(parts=[Part("x", SECRET)]), "parts"),
            ("beside what is wrong in a list", Wallet(owner="o", tallies=[tally, 1]), "tallies"),
            ("beside a wrong field", Vault(tally=Tally(name=1, pin=SECRET)), "tally"),
            ("beside a wrong id", Wallet(owner="", tallies=[tally]), "id"),
            ("within a wrong id", Wallet(owner=[tally]), "owner"),
        )
        db = self.open()
        for n, (label, record, word) in enumerate(cases):
            key = dataclasses.fields(record)[0].name
            namespace: Any = db.namespace(f"n{n}", type(record), key=key)
            with self.subTest(label):
                self.assert_refused(InvalidRecordError, partial(namespace.put, record), word)
                self.assertEqual(namespace.count(), 0)

    def test_no_error_about_a_record_that_its_class_refuses_shows_a_secret(self) -> None:
        longest = len(SECRET)

        @dataclass
        class Private:
            name: str
            pin: str = field(default="", metadata={"secret": True})

            def __post_init__(self) -> None:
                if len(self.pin) > longest:
                    raise ArithmeticError(f"the pin {self.pin} is too long")

        private, record = self.open().namespace("private", Private, key="name"), Private("new")
        private.put(Private("stored", SECRET))
        longest, record.pin = 4, SECRET
        self.assert_refused(OperatorDbError, lambda: private.get("stored"), "private:stored")
        self.assert_refused(InvalidRecordError, lambda: private.put(record), "Private")

    def test_no_error_about_a_damaged_document_shows_a_secret(self) -> None:
        db = self.open()
        store_secrets(db)
        for value in (
            f'{{"keypairs":{{"main":"{SECRET}"}}',
            f'{{"keypairs":["{SECRET}"]}}',
            f'["{SECRET}"]',
        ):
            with self.subTest(value):
                self.plant("config:operator", value.encode())
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
        self.assert_refused(InvalidRecordError, lambda: tallies.get("two"), "tallies:two", "pin")

    def test_a_secret_field_of_an_operators_own_stays_secret_whoever_looks(self) -> None:
        """The file remembers: an older build, a renamed or removed field unmask nothing."""
        plain, secret = make_class(("token", str, "")), {"metadata": {"secret": True}}
        Masked = make_class(("token", str, field(default="", **secret)))
        moved = {"metadata": {"secret": True, "was": "token"}}
        Renamed = make_class(("key", str, field(default="", **moved)))

        def look(case: str) -> None:
            shown = ""
            for command in ("get things:a", "export", "get things:a --json"):
                status, printed = run_main("--db-path", self.path, *command.split())
                shown += printed if status == 0 else "failed"
            self.assertEqual((shown.count("***"), shown.count(SECRET)), (3, 0), (case, shown))

        for case, record_type in (
            ("declared", Masked),
            ("by an older build", plain),
            ("renamed", Renamed),
            ("removed", make_class()),
        ):
            with self.subTest(case), OperatorDb(self.path) as db:
                things = db.namespace("things", record_type, key="name")
                if case == "declared":
                    things.put(Masked(name="a", token=SECRET))
                look(case)
                self.assertNotIn(SECRET.encode(), b"".join(exported(db, include_secrets=False)))
                things.update("a", lambda thing: thing)
        status, printed = run_main("--db-path", self.path, "get", "things:a", "--include-secrets")
        self.assertEqual((status, printed.count(SECRET)), (0, 1))

    def test_a_field_that_becomes_secret_and_is_renamed_is_masked_under_both_names(self) -> None:
        plain = make_class(("token", str, ""))
        moved = {"metadata": {"secret": True, "was": "token"}}
        with OperatorDb(self.path) as db:
            db.namespace("things", plain, key="name").put(plain(name="a", token=SECRET))
            db.namespace("things", make_class(("key", str, field(default="", **moved))), key="name")
            self.assertNotIn(SECRET.encode(), b"".join(exported(db, include_secrets=False)))
        self.assertIn("***", run_main("--db-path", self.path, "get", "things:a")[1])

    def test_a_backup_from_before_a_field_was_secret_unmasks_nothing(self) -> None:
        plain, secret = make_class(("token", str, "")), {"metadata": {"secret": True}}
        Masked = make_class(("token", str, field(default="", **secret)))
        with OperatorDb(self.path) as db:
            db.namespace("things", plain, key="name").put(plain(name="a"))
            db.backup(self.other)
            things = db.namespace("things", Masked, key="name")
            db.restore(self.other)
            things.put(Masked(name="a", token=SECRET))
        status, printed = run_main("--db-path", self.path, "get", "things:a")
        self.assertEqual((status, SECRET in printed, "***" in printed), (0, False, True))

    def test_an_import_brings_what_is_secret_along_and_never_unmasks(self) -> None:
        plain, secret = make_class(("token", str, "")), {"metadata": {"secret": True}}
        Masked = make_class(("token", str, field(default="", **secret)))
        with OperatorDb(self.path) as db:
            db.namespace("things", Masked, key="name").put(Masked(name="a", token=SECRET))
            db.export(self.file, include_secrets=True)
        for label, first in (("absent", None), ("declared as plain", plain)):
            with self.subTest(label), OperatorDb(self.beside(f"{label}.db")) as target:
                if first is not None:
                    target.namespace("things", first, key="name")
                self.assertEqual(target.import_(self.file), {"things": {"added": 1}})
                self.assertNotIn(SECRET.encode(), b"".join(exported(target, include_secrets=False)))
        with OperatorDb(self.other) as target:
            target.namespace("things", make_class(("token", str, "")), key="token")
        with OperatorDb(self.other) as target, self.assert_unchanged(self.other):
            refused = partial(target.import_, self.file)
            self.assert_refused(ConflictError, refused, "things", "'token'", "'name'")


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
        wrong = [{"path": path} for path in paths]
        wrong += [{"path": self.path, "timeout": timeout} for timeout in timeouts]
        for options in wrong:
            with self.subTest(**options):
                self.assert_refused(InvalidRecordError, partial(OperatorDb, **options))
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_database_that_is_not_to_be_created_must_be_there(self) -> None:
        for opens in (OperatorDb, OperatorDb.open):
            for path in (self.path, self.beside("no/such/operator.db"), None, ":memory:"):
                missing = path if path not in (None, ":memory:") else "operator.db"
                for read_only in (False, True):
                    with self.subTest(opens, path=path, read_only=read_only):
                        opening = partial(opens, path, create=False, read_only=read_only)
                        word = "read-only" if read_only else "create=False"
                        words = (missing, "no database", word)
                        self.assert_refused(StorageError, opening, *words)
        self.assertEqual(os.listdir(self.folder), [])
        write_bytes(self.path, b"")
        with self.assert_bytes_unchanged():
            opening = partial(OperatorDb, self.path, create=False)
            self.assert_refused(StorageError, opening, self.path, "empty", "create=False")
        store_tasks(self.db, "t")
        self.assertEqual(task_ids(self.open(create=False)), ["t"])
        self.db.close()
        with OperatorDb.open(self.path, create=False) as db:
            store_tasks(db, "u")

    def test_a_path_with_the_characters_of_a_uri_is_a_path(self) -> None:
        for name in ("a?mode=memory.db", "b#c.db", "d%41.db", "é \U0001f600.db", "e&f=g.db"):
            with self.subTest(name):
                store_tasks(self.open(self.beside(name)), "t")
                self.assertTrue(os.path.exists(self.beside(name)))

    def test_a_symbolic_link_opens_the_file_that_it_leads_to(self) -> None:
        OperatorDb(self.path).close()
        os.symlink(self.path, self.other)
        self.assertEqual(self.open(self.other).path, self.path)

    def test_a_memory_database_is_a_private_file_that_is_gone_after_close(self) -> None:
        closed, dropped = OperatorDb(":memory:"), OperatorDb(":memory:")
        folders = [os.path.dirname(db.path) for db in (closed, dropped)]
        store_tasks(closed, "t")
        run_in_threads(lambda: self.assertEqual(task_ids(closed), ["t"]))
        self.assertEqual(task_ids(dropped), [])
        self.assertEqual([os.stat(folder).st_mode & 0o777 for folder in folders], [0o700] * 2)
        closed.close()
        del dropped
        self.assertEqual([os.path.exists(folder) for folder in folders], [False, False])

    def test_many_threads_and_processes_create_one_file_and_all_succeed(self) -> None:
        def create(path: str, _: Say) -> None:
            together.wait()
            with OperatorDb(path) as db:
                db.append_command("s", "x")

        together = multiprocessing.get_context("fork").Barrier(5, timeout=10)
        for attempt in range(3):
            path = self.beside(f"{attempt}/operator.db")
            children = [Child(partial(create, path)) for _ in range(4)]
            together.wait()
            with ThreadPoolExecutor(12) as pool:
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
        def settings(path: str) -> list[Any]:
            with OperatorDb(path) as db:
                store_tasks(db, "t")
            pragmas = ("application_id", "user_version", "auto_vacuum", "journal_mode")
            return [self.sql(f"PRAGMA {pragma}", path=path)[0][0] for pragma in pragmas]

        write_bytes(self.path, b"")
        adopted = settings(self.path)
        self.assertEqual(adopted, settings(self.other))
        self.assertEqual((adopted[0], adopted[2]), (0x41474E43, 2), "AGNC, incremental")

    def test_descriptors_that_are_used_up_are_not_called_a_missing_permission(self) -> None:
        def open_with(spare: int) -> str:
            limit = max(map(int, os.listdir("/proc/self/fd"))) + 10
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            taken = []
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for descriptor in taken[:spare]:
                os.close(descriptor)
            try:
                with OperatorDb(self.path) as db:
                    db.get_task("t")
            except StorageError as error:
                return str(error)
            return ""

        OperatorDb(self.path).close()
        messages = [in_child(partial(open_with, spare)) for spare in range(8)]
        for message in filter(None, messages):
            self.assertIn(self.path, message)
            self.assertIn(os.strerror(errno.EMFILE), message)
        self.assertTrue(messages[0])
        self.assertEqual(messages[-1], "")

    def test_an_empty_path_is_refused_whatever_the_environment_says(self) -> None:
        with mock.patch.dict(os.environ, AGENC_DB_PATH=":memory:"):
            self.assert_refused(InvalidRecordError, partial(OperatorDb, ""))

    def test_a_file_that_could_not_be_opened_may_be_replaced_by_a_backup_at_once(self) -> None:
        store_tasks(self.db, "t")
        write_bytes(self.other, b"SQLite format 3\0" + bytes(8000))
        try:
            OperatorDb(self.other)
        except DamagedError:
            self.db.backup(self.other, overwrite=True)
        with OperatorDb(self.other) as restored:
            self.assertEqual(task_ids(restored), ["t"])


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
            ("an index on another table", moved, foreign, "tasks"),
            ("an index too few", "DROP INDEX tasks_status_at", foreign, "tasks"),
            ("a further column", "ALTER TABLE tasks ADD COLUMN extra", foreign, "tasks"),
            ("other columns", columns, foreign, "config"),
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
        def use(mark: str) -> sqlite3.Connection:
            other = sqlite3.connect(self.path, isolation_level=None)
            other.execute("PRAGMA journal_mode = WAL")
            other.execute(mark)  # which stands in the log
            return other

        for mark in (
            "PRAGMA application_id = 7",
            "PRAGMA user_version = 3",
            "CREATE TABLE notes(x)",
        ):
            application = staying_open(partial(use, mark))
            with self.subTest(mark):
                self.assert_left_alone(ForeignFileError)  # it is in use
                application.kill()
                self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
                self.assert_left_alone(ForeignFileError)
                self.sql("SELECT * FROM sqlite_schema")  # SQLite moves the log into the file
                self.assertEqual(os.listdir(self.folder), ["operator.db"])
                self.assert_left_alone(ForeignFileError)
            os.unlink(self.path)

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

    def assert_commands_leave_alone(self, *commands: str) -> None:
        """Fail unless each command is refused with the path, and no byte changes."""
        for command in commands:
            with self.subTest(command=command), self.assert_bytes_unchanged():
                status, printed = run_main("--db-path", self.path, *command.split())
                self.assertEqual(status, 1, printed)
                self.assertIn(self.path, printed)

    def make_sources(self) -> tuple[str, str]:
        """Make a backup and an export; return the commands that create a database from them."""
        fill(self.other)
        with OperatorDb(self.other) as db:
            db.export(self.file, include_secrets=True)
        return f"restore {self.other}", f"import {self.file}"

    def leave_log(self, suffix: str) -> None:
        """Make a database of which a killed process has left a log, with committed records."""

        def use() -> object:
            if suffix == "-wal":
                db = OperatorDb(self.path)
                store_tasks(db, *map(str, range(20)), payload=bytes(1000))
                return db
            fill(self.path)
            other = sqlite3.connect(self.path, isolation_level=None)
            other.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 5; BEGIN")
            other.execute("UPDATE tasks SET value = value || ' '")
            return other

        staying_open(use).kill()
        self.assertGreater(os.path.getsize(self.path + suffix), 10_000)

    def test_a_log_without_its_database_is_played_into_no_new_one(self) -> None:
        creating = self.make_sources()
        for suffix in ("-wal", "-journal"):
            with self.subTest(suffix):
                self.leave_log(suffix)
                for ending in ("", "-shm"):
                    Path(self.path + ending).unlink(missing_ok=True)
                self.assert_left_alone(StorageError)
                self.assert_commands_leave_alone(*creating, "stats", "check")
                os.unlink(self.path + suffix)

    def test_a_database_that_was_emptied_beside_its_log_is_refused_and_the_log_kept(self) -> None:
        creating = self.make_sources()
        for suffix in ("-wal", "-journal"):
            with self.subTest(suffix):
                self.leave_log(suffix)
                os.truncate(self.path, 0)
                self.assert_left_alone(OperatorDbError)
                self.assert_commands_leave_alone(*creating, "stats", "check", "prune", "keys tasks")
                for ending in ("", "-shm", suffix):
                    Path(self.path + ending).unlink(missing_ok=True)

    def test_a_file_with_two_names_is_refused_under_both_until_one_is_gone(self) -> None:
        fill(self.path)
        os.link(self.path, self.other)
        self.assert_left_alone(StorageError)
        self.assert_commands_leave_alone("stats", "prune")
        self.assert_refused(StorageError, lambda: OperatorDb(self.other), self.other)
        os.unlink(self.other)
        self.assert_sound()

    def test_a_creation_that_was_killed_after_its_link_is_opened_and_tidied_up(self) -> None:
        restore, import_ = self.make_sources()
        wanted, link = content_of(self.other), os.link
        names = {"operator.db", "other.db", "operator.jsonl"}

        def create(command: str, _: Say) -> None:
            def link_and_die(*names: str) -> None:
                link(*names)
                os.kill(os.getpid(), signal.SIGKILL)

            with mock.patch("os.link", link_and_die):
                if command:
                    run_main("--db-path", self.path, *command.split())
                OperatorDb(self.path).close()

        for command in ("", restore, import_):
            with self.subTest(command=command):
                Child(partial(create, command)).last_words()
                self.assertEqual(os.stat(self.path).st_nlink, 2)
                with self.assert_bytes_unchanged():
                    found = content_of(self.path)
                    self.assertEqual(run_main("--db-path", self.path, "check")[0], 0)
                self.assertTrue(found == (wanted if command else []))
                with OperatorDb(self.path) as db:
                    store_tasks(db, "t")
                self.assertEqual(self.names(), names)
                self.assertEqual(os.stat(self.path).st_nlink, 1)
                os.unlink(self.path)

    def plant(self, path: str, statement: str, *row: str) -> None:
        """Create `planted`, and hide it from those who look at type, name and table of its row."""
        hide = "UPDATE sqlite_schema SET type = ?, name = ?, tbl_name = ? WHERE name = 'planted'"
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(statement)
            other.execute("PRAGMA writable_schema = ON")
            other.execute(hide, row)

    def test_a_schema_that_hides_a_trigger_or_an_index_is_refused_everywhere(self) -> None:
        trigger = "CREATE TRIGGER planted AFTER INSERT ON {} BEGIN DELETE FROM proofs; END"
        ours, theirs = trigger.format("tasks"), trigger.format("notes")
        index = "CREATE UNIQUE INDEX planted ON tasks(at)"
        fill(self.file)
        self.sql("CREATE TABLE notes(x)", path=self.file)
        whole = read_bytes(self.file)
        for statement, *row in (
            (ours, "trigger\0", "planted", "tasks"),
            (ours, "TRIGGER", "PLANTED", "TASKS"),
            (ours, "trigger", "planted\0", "tasks\0"),
            (theirs, "trigger\0 or table", "planted", "notes"),
            (theirs, "Trigger", "planted", "notes"),
            (index, "index", "planted", "tasks\0"),
            (index, "INDEX\0", "planted", "tasks\0"),
            (index, "index", "planted", "Tasks"),
        ):
            with self.subTest(statement=statement, row=row):
                write_bytes(self.path, whole)
                write_bytes(self.other, whole)
                with OperatorDb(self.path) as db:
                    self.plant(self.other, statement, *row)
                    restore = partial(db.restore, self.other)
                    self.assert_refused(ForeignFileError, restore, self.other)
                    self.assertEqual(db.check(), [])
                    self.plant(self.path, statement, *row)
                    self.assertRegex("\n".join(db.check()), "(?i)planted")
                    before = self.names()
                    backup = partial(db.backup, self.beside("backup.db"))
                    self.assert_refused(ForeignFileError, backup)
                    self.assertEqual(self.names(), before)
                self.assert_left_alone(ForeignFileError)

    def test_a_file_that_is_encoded_in_utf_16_is_refused(self) -> None:
        fill(self.other)
        definitions = self.sql("SELECT sql FROM sqlite_schema WHERE sql NOT NULL", path=self.other)
        for encoding in ("UTF-16le", "UTF-16be"):
            with self.subTest(encoding):
                same_shape = "; ".join(sql for (sql,) in definitions)
                header = "PRAGMA application_id = 0x41474E43; PRAGMA user_version = 1"
                self.script(f"PRAGMA encoding = '{encoding}'; {same_shape}; {header}")
                self.assert_left_alone(ForeignFileError)
                with OperatorDb(self.other) as db:
                    self.assert_refused(ForeignFileError, partial(db.restore, self.path), self.path)
                os.unlink(self.path)


WRITES: dict[str, Verb] = {
    "store": lambda db: store_tasks(db, "t0", description="other"),
    "update": lambda db: db.update_task_status("t0", "in_progress"),
    "delete": lambda db: db.delete_task("t0"),
    "append": lambda db: db.append_transcript("s0", "user", "more"),
    "put": lambda db: tallies_of(db).put(Tally(name="two")),
    "namespace": devices_of,
    "block": lambda db: db.transaction().__enter__(),
    "prune": lambda db: db.prune(0, 0, 0),
}


class ReadOnlyChangesNothing(DatabaseTest):
    def assert_reads_and_refuses_to_write(self) -> None:
        """Fail unless each read answers, each write is refused, and no byte changes by either."""
        reads: tuple[Verb, ...] = (
            exported,
            lambda db: [*every_record(db)],
            lambda db: db.list_tasks_by_status("completed"),
            lambda db: db.dispute_bundle("t1"),
            lambda db: db.prometheus(),
            lambda db: db.prune(0, 0, 0, dry_run=True).tasks,
        )
        writes = WRITES | {
            "import": lambda db: db.import_(self.file),
            "restore": lambda db: db.restore(self.other),
            "compact": lambda db: db.compact(),
            "repair": lambda db: db.repair(),
        }
        with self.assert_bytes_unchanged(), OperatorDb(self.path, read_only=True) as db:
            for read in reads:
                self.assertTrue(read(db))
            self.assertEqual(db.check(), [])
            for label, write in writes.items():
                with self.subTest(write=label):
                    self.assert_refused(StorageError, partial(write, db), self.path)

    def test_a_read_only_database_reads_and_changes_no_byte(self) -> None:
        def write() -> OperatorDb:
            db = OperatorDb(self.path)
            store_tasks(db, "in the log", status=TaskStatus.COMPLETED, claimed_at=0)
            return db

        fill(self.path)
        with OperatorDb(self.path) as db:
            db.backup(self.other)
            db.export(self.file, include_secrets=True)
        self.assert_reads_and_refuses_to_write()
        writer = staying_open(write)
        self.assert_reads_and_refuses_to_write()
        writer.kill()
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

    def test_a_reader_sees_what_another_user_writes_later_even_if_it_may_not_write(self) -> None:
        def read(mode: int, folder_mode: int) -> list[object]:
            os.chmod(self.path, mode)
            os.chmod(self.folder, folder_mode)
            with OperatorDb(self.path, read_only=True) as db:
                before = task_ids(db)
                turn.wait()
                turn.wait()
                return [before, task_ids(db), db.check()]

        turn = multiprocessing.get_context("fork").Barrier(2, timeout=10)
        old, new = ([f"{age} {n:02}" for n in range(50)] for age in ("old", "new"))
        for modes, is_closed in itertools.product(
            ((0o600, 0o700), (0o400, 0o700), (0o600, 0o500), (0o400, 0o500)), (False, True)
        ):
            with OperatorDb(self.path, durable=False) as db:
                store_tasks(db, *old, payload=bytes(5000))
            read_there = partial(as_nobody, self.folder, partial(read, *modes))
            reader = Child(lambda _, read=read_there: read())
            turn.wait()
            os.chmod(self.folder, 0o700)
            os.chmod(self.path, 0o600)
            with self.subTest(modes=modes, is_closed=is_closed), self.open() as db:
                for name in old:
                    db.delete_task(name)
                store_tasks(db, *new, payload=bytes(9000))
                if is_closed:
                    db.close()
                turn.wait()
                self.assertEqual(reader.result(), [old, new, []])
            os.unlink(self.path)


# Rows as version 1.0.0 wrote them: value, status, age, checksum (of the value alone).
VERSION_1_ROWS: dict[str, tuple[str, str | None, int | None, int]] = {
    "tasks:a:b%c": (
        '{"task_id":"a:b%c","payload":"","status":"disputed","claimed_at":1774627500,'
        '"completed_at":null,"on_chain_signature":null,"description":null,'
        '"reward_lamports":null,"reward_skr_tokens":null,"creator":null,"history":'
        '[{"status":"disputed","at":1774627500,"signature":null}]}',
        "disputed",
        1774627500,
        228349666,
    ),
    "sessions:voice-1": (
        '{"session_id":"voice-1","active_task_ids":["t1"],"created_at":1774628000,'
        '"last_active":1795576912,"transcript_entries":1,"commands":1}',
        None,
        1795576912,
        0,
    ),
    "session_log:transcript:voice-1:0": (
        '{"log":"transcript:voice-1","seq":0,"content":"line 0","role":"user",'
        '"timestamp":1774628000}',
        "transcript:voice-1",
        0,
        3381114717,
    ),
    "session_log:commands:voice-1:0": (
        '{"log":"commands:voice-1","seq":0,"content":"status t1","role":null,'
        '"timestamp":1774628100}',
        "commands:voice-1",
        0,
        4135443540,
    ),
    "config:operator": (
        '{"keypairs":{"main":"/keys/main.json"},"rpc_endpoints":'
        '["https://rpc.example/?key=k-51"],"model_preferences":{"chat":{"temperature":0.5}},'
        '"capabilities":["voice"],"wallet_pubkey":null,"network":"devnet"}',
        None,
        None,
        3402587712,
    ),
    "devices:phone": (
        '{"device_id":"phone","status":"paired","last_seen":1774628200,"token":"tok-phone"}',
        "paired",
        1774628200,
        1295472866,
    ),
}


def make_version_1(path: str) -> None:
    """Take a closed database back to the file that version 1.0.0 would have made."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.create_function("crc32", 1, lambda value: crc32(value.encode()))
        raw.execute("BEGIN IMMEDIATE")
        raw.execute("DROP TABLE _namespaces")
        for (table,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            raw.execute(f"UPDATE {table} SET crc = crc32(value)")
        raw.execute("PRAGMA user_version = 1")
        raw.execute("COMMIT")
        raw.execute("VACUUM")


class VersionOneMovesOn(DatabaseTest):
    """A file of version 1.0.0 is there in version 2, and what was damaged still is."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.path, tasks=6)
        with OperatorDb(self.path) as db:
            devices_of(db).put(PairedDevice(device_id="d", last_seen=5, token=SECRET))
            db.store_proof(proof("whole"))
        self.lines = content_of(self.path)
        make_version_1(self.path)

    @staticmethod
    def dump(path: str) -> list[str]:
        with closing(sqlite3.connect(path)) as raw:
            return [*raw.iterdump(), str(raw.execute("PRAGMA user_version").fetchone())]

    def test_every_record_moves_on_and_the_old_file_is_kept(self) -> None:
        dump = self.dump(self.path)
        with OperatorDb(self.path) as db:
            self.assertEqual(db.check(), [])
            self.assertEqual(devices_of(db).get("d").token, SECRET)
        self.assertTrue(content_of(self.path) == self.lines)
        self.assertEqual(self.dump(self.path + ".v1.bak"), dump)
        self.assertEqual(os.stat(self.path + ".v1.bak").st_mode & 0o777, 0o600)

    def test_rows_that_version_1_wrote_are_read(self) -> None:
        """Checksums and documents are those of a file which that version has made."""
        for key, (value, status, at, crc) in VERSION_1_ROWS.items():
            table = key.partition(":")[0]
            if crc:
                self.assertEqual(crc32(value.encode()), crc)
            self.sql(f"DELETE FROM {table} WHERE key = ?", key)
            row = (key, value, status, at, crc or crc32(value.encode()))
            self.sql(f"INSERT INTO {table} VALUES(?, ?, ?, ?, ?)", *row)
        db = self.open()
        self.assertEqual(db.check(), [])
        self.assertEqual(db.get_task("a:b%c").history[0].at, 1774627500)
        session = db.get_session("voice-1")
        entry = TranscriptEntry(role="user", content="line 0", timestamp=1774628000)
        self.assertEqual((session.transcript, session.command_history), ([entry], ["status t1"]))
        self.assertEqual(db.get_config().keypairs, {"main": "/keys/main.json"})
        self.assertEqual(devices_of(db).get("phone").token, "tok-phone")

    def test_a_time_in_milliseconds_that_version_1_stored_is_read(self) -> None:
        now = 1774627200000
        for key, name in (
            ("tasks:t1", "claimed_at"),
            ("sessions:s0", "last_active"),
            ("session_log:transcript:s0:0", "timestamp"),
            ("proofs:whole", "timestamp"),
            ("devices:d", "last_seen"),
        ):
            table = key.partition(":")[0]
            ((value, at),) = self.sql(f"SELECT value, at FROM {table} WHERE key = ?", key)
            value = re.sub(f'"{name}":-?[0-9]+', f'"{name}":{now}', value)
            row = (value, crc32(value.encode()), at if table == "session_log" else now, key)
            self.sql(f"UPDATE {table} SET value = ?, crc = ?, at = ? WHERE key = ?", *row)
        db = self.open()
        self.assertEqual(db.check(), [])
        self.assertEqual(devices_of(db).get("d").last_seen, now)
        self.assertEqual(db.get_task("t1").claimed_at, now)
        self.assertEqual(db.transcript("s0")[0].timestamp, now)
        self.assertEqual(db.update_task_status("t1", "disputed").claimed_at, now)
        db.append_transcript("s0", "user", "goes on")
        self.assertEqual(db.get_proof("whole").timestamp, now)
        self.assertTrue(db.mark_proof_submitted("whole", "sig").submitted)
        self.damage("session_log:transcript:s0:1")
        self.assertEqual(len(db.repair()), 3)
        self.assertEqual((db.check(), db.get_session("s0").last_active), ([], now))

    def test_what_was_damaged_still_is_and_nothing_else(self) -> None:
        damages = {
            "tasks:t1": "UPDATE tasks SET crc = crc + 1",
            "tasks:t2": "UPDATE tasks SET value = replace(value, 'claimed_at', 'claimed_aT')",
            "tasks:t3": "UPDATE tasks SET status = 'resolved'",
            "tasks:t4": "UPDATE tasks SET at = at + 1",
            "proofs:t0": "UPDATE proofs SET status = 'true'",
            "proofs:whole": "UPDATE proofs SET crc = -1",
            "config:operator": "UPDATE config SET at = 5",
            "devices:d": "UPDATE devices SET value = replace(value, 'red', 'blue'), crc = 5",
        }
        with OperatorDb(self.path) as db:  # as it reads today
            db.store_proof(proof("t0"))
        make_version_1(self.path)
        for key, statement in damages.items():
            self.sql(f"{statement} WHERE key = ?", key)
        db = self.open()
        problems = db.check()
        self.assertEqual(len(problems), len(damages), problems)
        for key in damages:
            self.assertEqual(sum(repr(key) in problem for problem in problems), 1, key)
        self.assert_refused(DamagedError, lambda: db.list_tasks("resolved"), "tasks:")
        # columns are mended where the value is whole, and only there
        self.assertFalse(db.store_proof(proof("t0")))
        self.assertIsNotNone(db.get_proof("t0"))
        self.assert_refused(DamagedError, lambda: db.store_proof(proof("whole")))

    def test_records_beside_a_page_that_cannot_be_read_move_on(self) -> None:
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *map(str, range(300)), payload=bytes(500))
        make_version_1(self.path)
        ((page, page_size),) = self.sql(
            "SELECT pageno, pgsize FROM dbstat WHERE name = 'tasks' AND pagetype = 'leaf'"
            " ORDER BY pageno DESC LIMIT 1 OFFSET 9"  # not where the new table's root has to be
        )
        image = bytearray(read_bytes(self.path))
        image[(page - 1) * page_size : page * page_size] = bytes(page_size)
        write_bytes(self.path, image)
        db = self.open()
        readable = 0
        for n in range(300):
            with suppress(DamagedError):
                readable += db.get_task(str(n)) is not None
        self.assertGreater(readable, 270)
        self.assertIsNotNone(db.get_config())

    def test_a_backup_of_version_1_is_restored_and_stays_as_it_is(self) -> None:
        image = read_bytes(self.path)
        target = self.open(self.other)
        target.restore(self.path)
        self.assertTrue(read_bytes(self.path) == image)
        self.assertTrue(exported(target) == self.lines)
        self.assertNotIn(".bak", " ".join(self.names()))
        self.damage("tasks:t1")
        self.assert_refused(DamagedError, lambda: target.restore(self.path), self.path, "tasks:t1")

    def test_an_export_of_version_1_is_imported(self) -> None:
        with OperatorDb(self.path) as db:
            db.export(self.file, include_secrets=True)
        header, *lines = read_bytes(self.file).splitlines()
        old_header = json.loads(header) | {"schema_version": 1}
        del old_header["namespaces"]
        target = self.open(self.other)
        target.import_(BytesIO(b"\n".join([json.dumps(old_header).encode(), *lines])))
        self.assertTrue(exported(target) == self.lines)

    def test_progress_and_room_are_looked_at(self) -> None:
        calls = list[tuple[int, int]]()
        no_room = mock.Mock(return_value=mock.Mock(free=10_000))
        with self.assert_bytes_unchanged(), mock.patch("shutil.disk_usage", no_room):
            self.assert_refused(StorageError, partial(OperatorDb, self.path), "10,000", self.path)
        with OperatorDb(self.path, progress=lambda done, total: calls.append((done, total))):
            pass
        ((total,),) = {(total,) for _, total in calls}
        self.assertEqual(calls[-1], (total, total))
        self.assertEqual([done for done, _ in calls], sorted(done for done, _ in calls))

    def test_a_namespace_that_nobody_has_declared_shows_no_record_of_it(self) -> None:
        OperatorDb(self.path).close()
        self.sql("DROP TABLE tallies")

        def run(*arguments: str) -> str:
            status, printed = run_main("--db-path", self.path, *arguments)
            self.assertEqual(status, 0, printed)
            return printed

        self.assertIn("devices:d", run("keys", "devices"))
        shown = run("get", "devices:d")
        self.assertEqual(json.loads(shown), {"key": "devices:d", "status": "paired", "at": 5})
        self.assertIn(SECRET, run("get", "devices:d", "--include-secrets"))
        status, printed = run_main("--db-path", self.path, "export", "-o", self.file)
        self.assertEqual((status, os.path.exists(self.file)), (1, False))
        self.assertIn("devices", printed)
        run("export", "-o", self.file, "--include-secrets")
        with OperatorDb(self.path) as db:
            devices_of(db)
        self.assertNotIn(SECRET, run("get", "devices:d") + run("export"))
        self.assertIn('"token": "***"', run("get", "devices:d"))


class MigrationsAreAllOrNothing(DatabaseTest):
    """A file of version 1 is migrated by the step to version 2, and by further ones."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.path, tasks=8)
        make_version_1(self.path)
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
    def step(connection: Any, *_: object) -> None:
        """Add a table, remove a record, and write a lot."""
        connection.query("CREATE TABLE added(x)")
        connection.query("DELETE FROM config")
        connection.query("INSERT INTO added SELECT zeroblob(600000)")

    def migrate(self) -> None:
        OperatorDb(self.path).close()

    def state(self, path: str | None = None) -> tuple[int, list[str]]:
        """Return the schema version, and the statements that would make the same database."""
        self.assertEqual(self.sql("PRAGMA integrity_check", path=path), [("ok",)])
        ((version,),) = self.sql("PRAGMA user_version", path=path)
        with closing(sqlite3.connect(path or self.path)) as raw:
            return version, [*raw.iterdump()]

    def judge(self) -> bool:
        """Return whether the migration is done; fail if half of it is, or it cannot be done now."""
        found = self.state()
        self.assertTrue(found in (self.before, self.after), "it is done in part")
        self.migrate()
        self.assertTrue(self.state() == self.after)
        self.assertEqual(self.state(self.snapshot), self.before)
        self.put_back()
        return found == self.after

    def test_the_missing_steps_run_after_a_private_snapshot(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        with OperatorDb(self.path) as db:
            self.assertEqual(len(task_ids(db)), 8)
        self.assertEqual(self.names(), {"operator.db", os.path.basename(self.snapshot)})
        self.assertEqual(self.state()[0], 2)
        self.assertEqual(self.state(self.snapshot), self.before)
        self.assertEqual(os.stat(self.snapshot).st_mode & 0o777, 0o600)
        os.unlink(self.snapshot)
        self.migrate()
        self.assertFalse(os.path.exists(self.snapshot), "there was nothing to migrate")
        with self.newer_module(self.step):
            self.migrate()
        self.assertEqual(self.state()[0], 3)
        self.assert_refused(NewerSchemaError, lambda: OperatorDb(self.path), self.path)

    def test_a_migration_is_done_or_not_begun_wherever_it_is_interrupted_or_killed(self) -> None:
        def migrate(number: int, kill: bool, _: Say) -> bool:
            with suppress(KeyboardInterrupt), interrupt_at_call(number, kill=kill):
                self.migrate()
            return self.judge()  # in the same process, where nothing may be locked

        with interrupt_at_call(-1) as so_far:
            self.migrate()
            total = so_far()
        self.put_back()
        outcomes = Counter[tuple[bool, bool]]()
        numbers = [*range(1, total, total // 12), *range(total - 60, total, 15)]
        for number, kill in itertools.product(numbers, (False, True)):
            with self.subTest(number=number, of=total, kill=kill):
                child = Child(partial(migrate, number, kill))
                if kill:
                    self.assertEqual(child.last_words(), [])
                outcomes[kill, self.judge() if kill else child.result()] += 1
        self.assertEqual(len(outcomes), 4, "some were done, and some not begun")

    def test_a_migration_without_room_is_done_or_not_begun(self) -> None:
        def migrate(limit: int) -> None:
            with file_size_limit(limit):
                self.assert_refused(StorageError, self.migrate, self.path)

        size = len(self.image)
        for limit in (size // 2, size - 4096):
            with self.subTest(limit=limit):
                in_child(partial(migrate, limit))
                self.assertNotRegex(" ".join(self.names()), r"\.new|-journal")
                self.judge()

    def test_a_step_that_fails_leaves_the_file_as_it_was(self) -> None:
        planted = "CREATE TRIGGER planted AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END"
        for label, error, fail in (
            ("raises", KeyError, mock.Mock(side_effect=KeyError)),
            ("is interrupted", KeyboardInterrupt, mock.Mock(side_effect=KeyboardInterrupt)),
            ("is wrong", StorageError, lambda connection, *_: connection.query("SELECT wrong")),
            ("plants", ForeignFileError, lambda connection, *_: connection.query(planted)),
        ):
            with self.subTest(label):
                with self.newer_module(self.step, fail), self.assertRaises(error):
                    OperatorDb(self.path)
                self.assertFalse(self.judge())

    def test_of_several_processes_one_migrates_and_all_go_on(self) -> None:
        def migrate(say: Say) -> int:
            def listen(statement: str) -> None:
                if statement.startswith("BEGIN "):
                    say("wants the lock")

            self.watch_connections(listener=listen)
            with OperatorDb(self.path) as db:
                return len(task_ids(db))

        def hold(say: Say) -> None:
            with closing(sqlite3.connect(self.path, isolation_level=None)) as raw:
                raw.execute("BEGIN IMMEDIATE")
                say("holding")
                signal.pause()

        holder = Child(hold)
        holder.line()
        children = [Child(migrate) for _ in range(4)]
        for child in children:
            child.line()
        holder.kill()
        self.assertEqual([child.result() for child in children], [8] * 4)
        self.assertTrue(self.judge())

    def test_a_module_that_had_the_file_open_before_cannot_write(self) -> None:
        db = self.open()
        store_tasks(db, "before")
        with self.newer_module(self.step):
            self.migrate()
        for label, write in WRITES.items():
            with self.subTest(label):
                self.assert_refused(NewerSchemaError, partial(write, db), self.path)
        self.assertEqual(self.sql("SELECT count(*) FROM tasks"), [(9,)])
        self.sql("UPDATE tasks SET crc = crc + 1")  # as a newer version may compute it
        for read in (partial(db.get_task, "before"), db.list_tasks):
            self.assert_refused(NewerSchemaError, read, self.path)

    def test_a_read_only_opening_of_an_older_file_is_refused_and_changes_no_byte(self) -> None:
        opening = partial(OperatorDb, self.path, read_only=True)
        with self.assert_bytes_unchanged():
            self.assert_refused(StorageError, opening, self.path, str(self.before[0]))


class DamageIsFoundAndNamed(DatabaseTest):
    """What is read is what was stored, or DamagedError names it; check() finds it all."""

    def assert_reported(self, db: OperatorDb, *keys: str) -> None:
        """Fail unless check() names each of these."""
        report = "\n".join(db.check())
        for key in keys:
            self.assertIn(key, report)

    def flip(self, name: str, needle: bytes, offset: int, bit: int) -> None:
        """Change one bit of what an index says, in the closed file."""
        ((root,),) = self.sql("SELECT rootpage FROM sqlite_schema WHERE name = ?", name)
        ((page_size,),) = self.sql("PRAGMA page_size")
        image = bytearray(read_bytes(self.path))
        image[image.index(needle, (root - 1) * page_size) + offset] ^= bit
        write_bytes(self.path, image)

    def test_a_row_of_another_program_is_refused_by_key_and_can_be_replaced(self) -> None:
        documents = (
            b"not JSON", b"", b"[]", b"{}", b"1e999", b"\xff", b"[" * 100_000,
            b'{"task_id":"a"}\xff',
            b'{"task_id":"a","reward_lamports":-1}', b'{"task_id":"a","payload":"***"}',
            b'{"task_id":"a","claimed_at":NaN}', b'{"task_id":"a","description":"\xed\xa0\x80"}',
        )  # fmt: skip
        columns = (
            "value = 'not JSON'", "value = x'00'", "value = 5", "crc = crc + 1", "crc = 'x'",
            "status = 'claimed'", "status = 'resolved'", "status = NULL", "status = x'00'",
            "status = x'ff'", "at = 6", "at = NULL", "at = 'x'", "at = x'05'",
        )  # fmt: skip
        damages: dict[str, Callable[[], object]] = {}
        for document in documents:
            damages[str(document[:60])] = partial(self.plant, "tasks:a", document)
        for column in columns:
            damages[column] = partial(self.sql, f"UPDATE tasks SET {column} WHERE key = 'tasks:a'")
        db = self.open()
        task = TaskRecord(task_id="a", status=TaskStatus.COMPLETED, claimed_at=5)
        for label, damage in damages.items():
            with self.subTest(label):
                db.store_task(task)
                damage()
                for read in (partial(db.get_task, "a"), partial(task_ids, db), db.list_tasks):
                    self.assert_refused(DamagedError, read, "tasks:a")
                store_tasks(db, "z")
                self.damage("tasks:z")
                self.assert_reported(db, "tasks:a", "tasks:z")  # it goes on to the end
                store_tasks(db, "z")
                db.store_task(task)
                self.assertEqual((db.check(), db.get_task("a")), ([], task))
                damage()
                self.assertTrue(db.delete_task("a"))

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
        self.sql("UPDATE tasks SET value = CAST(value AS BLOB)")  # nor does it store this
        self.assert_reported(db, "tasks:a")

    def test_a_namespace_that_this_process_does_not_know_is_checked_as_plain_json(self) -> None:
        devices_of(self.open()).put(PairedDevice(device_id="d", part=Part(name="p")))
        self.assert_sound()
        self.sql("UPDATE devices SET value = replace(value, 'paired', 'forged')")
        self.assert_reported(self.open(), "devices:d")
        self.plant("devices:d", b"not JSON")
        self.assert_reported(self.open(), "devices:d")

    def test_a_damaged_proof_is_never_overwritten_and_can_be_deleted(self) -> None:
        db, log = self.open(), proof("p")
        db.store_proof(log)
        store_tasks(db, "p")
        self.damage("proofs:p")
        self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p")
        stored = self.sql("SELECT * FROM proofs")
        for given in (log, proof("p", b"other")):
            self.assert_refused(DamagedError, partial(db.store_proof, given), "proofs:p")
            self.assert_refused(DamagedError, partial(db.complete_task, "p", given), "proofs:p")
        self.assertEqual(self.sql("SELECT * FROM proofs"), stored)
        self.assertTrue(db.delete_proof("p"))
        self.assertEqual(db.check(), [])

    def test_a_proof_that_is_whole_beside_damaged_columns_is_still_a_proof(self) -> None:
        db, log = self.open(), proof("p")
        db.store_proof(log)
        self.sql("UPDATE proofs SET at = at + 1")
        self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p")
        for change in (partial(db.delete_proof, "p"), lambda: db.store_proof(proof("p", b"other"))):
            self.assert_refused(ConflictError, change, "proofs:")
        self.assertFalse(db.store_proof(replace(log, timestamp=9)), "it is no new proof")
        self.assertEqual(db.get_proof("p"), log)

    def test_a_changed_proof_with_a_right_checksum_does_not_match_its_evidence_hash(self) -> None:
        db = self.open()
        db.store_proof(proof("p", b"x"))
        ((value,),) = self.sql("SELECT value FROM proofs")
        self.assertIn('"outputs":"eA=="', value)
        self.plant("proofs:p", value.replace("eA==", "eQ==").encode())
        self.assert_refused(DamagedError, lambda: db.get_proof("p"), "proofs:p", "evidence_hash")
        self.assert_reported(db, "proofs:p")

    def test_pruning_removes_nothing_on_the_word_of_a_column(self) -> None:
        db = self.open()
        store_tasks(db, "disputed", status=TaskStatus.DISPUTED)
        db.store_proof(proof("unsubmitted"))
        self.sql("UPDATE tasks SET status = 'completed', at = 1")
        self.sql("UPDATE proofs SET status = 'true', at = 1")
        for dry_run in (True, False):
            for days, key in (((30, None), "disputed"), ((None, None, 30), "unsubmitted")):
                with self.subTest(key, dry_run=dry_run):
                    prune = partial(db.prune, *days, dry_run=dry_run)
                    self.assert_refused(DamagedError, prune, key)
        keys = self.sql("SELECT tasks.key, proofs.key FROM tasks, proofs")
        self.assertEqual(keys, [("tasks:disputed", "proofs:unsubmitted")])

    def test_a_damaged_index_never_lets_a_proof_be_pruned_that_may_be_needed(self) -> None:
        with OperatorDb(self.path) as db:
            for n in range(1, 9):
                db.store_proof(proof(f"p{n}", timestamp=1000, submitted=n == 7))
        self.flip("proofs_status_at", b"true", 6, 2)  # it now leads to the row of another proof
        db = self.open()
        self.assert_refused(DamagedError, lambda: db.prune(None, None, 30), "proofs:p")
        self.assertEqual(sum(db.get_proof(f"p{n}") is not None for n in range(1, 9)), 8)

    def test_a_session_that_lacks_an_entry_is_refused_and_an_append_overwrites_none(self) -> None:
        db = self.open()
        for n in range(5):
            db.append_transcript("s", "user", f"{n}")
        change = "UPDATE session_log SET status = ? WHERE key = 'session_log:transcript:s:4'"
        self.sql(change, None)  # so that it cannot be seen
        self.assert_refused(DamagedError, lambda: db.get_session("s"), "transcript:s")
        db.append_transcript("s", "user", "5")
        self.sql(change, "transcript:s")
        self.assertEqual([entry.content for entry in db.transcript("s")], [*"012345"])
        self.sql("DELETE FROM session_log WHERE key = 'session_log:transcript:s:5'")
        reads = (
            partial(db.get_session, "s"),
            partial(db.transcript, "s", last=1),
            db.list_sessions,
        )
        for read in reads:
            self.assert_refused(DamagedError, read, "transcript:s")
        self.assert_reported(db, "transcript:s")

    def test_a_log_without_its_session_is_named(self) -> None:
        db = self.open()
        db.append_transcript("s", "user", "hello")
        db.append_command("s", "status")
        self.sql("DELETE FROM sessions")
        self.assert_reported(db, "transcript:s", "commands:s")
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
        for _ in range(30):
            self.assertEqual(checker.check(), [])
        self.assertGreater(next(acts), 500)

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

    def test_a_flipped_bit_changes_no_record_that_is_read_and_reading_changes_no_byte(self) -> None:
        fill(self.path)
        with OperatorDb(self.path) as db:
            stored = dict(every_record(db))
        whole, rng = read_bytes(self.path), random.Random(6)
        opened = lost = 0
        for number in range(100):
            damaged = with_flipped_bit(whole, rng)
            write_bytes(self.path, damaged)
            with self.subTest(number=number):
                try:
                    with OperatorDb(self.path, durable=False, timeout=2) as db:
                        opened += 1
                        problems = db.check()
                        unread = self.assert_reads_are_right(db, stored)
                    lost += unread
                    self.assertTrue(problems or not unread, "a record is lost, check() is silent")
                except OperatorDbError as error:
                    self.assertIn(self.path, str(error))
                self.assertTrue(read_bytes(self.path) == damaged, "to read it has changed it")
        self.assertGreater(opened, 30)
        self.assertGreater(lost, 6)

    def test_a_damaged_index_never_leads_a_walk_round_in_circles(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *(f"t{n:02}" for n in range(20)))
        self.flip("sqlite_autoindex_tasks_1", b"tasks:t19", 6, 0x40)
        db = self.open()
        walk = partial(list, itertools.islice(db.iter_tasks(), 100))
        self.assert_refused(DamagedError, walk, "tasks")
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
        def write() -> OperatorDb:
            db = OperatorDb(self.path)
            for n in range(30):
                store_tasks(db, f"t{n % 10}", payload=b"%d" % n * 500, claimed_at=1)
            return db

        staying_open(write).kill()
        image, log, rng = read_bytes(self.path), read_bytes(self.path + "-wal"), random.Random(7)
        for number in range(40):
            write_bytes(self.other, image)
            write_bytes(self.other + "-wal", with_flipped_bit(log, rng))
            refusals = (DamagedError, StorageError, ForeignFileError)
            with self.subTest(number=number), suppress(*refusals), OperatorDb(self.other) as db:
                for task in db.iter_tasks():
                    written = range(int(task.task_id.removeprefix("t")), 30, 10)
                    self.assertIn(task.payload, [b"%d" % n * 500 for n in written])

    def test_a_check_goes_on_past_pages_that_cannot_be_read_and_ends(self) -> None:
        def assert_damage_is_named(task_keys: list[str]) -> None:
            with OperatorDb(self.path) as db:
                problems = db.check()
                self.assertGreater(len(problems), 2, "the pages are damaged, too")
                named = set(re.findall(r"\b(?:tasks|proofs):t\d+\b", "\n".join(problems)))
                self.assertLessEqual({"tasks:t30", "proofs:t5"}, named)
                for key in task_keys:
                    try:
                        db.get_task(key.removeprefix("tasks:"))
                    except DamagedError:
                        self.assertIn(key, named)

        fill(self.path)
        self.damage("tasks:t30")
        self.damage("proofs:t5")
        image, rng = read_bytes(self.path), random.Random(9)
        try:
            pages = self.sql("SELECT name, pgoffset, pgsize FROM dbstat WHERE pagetype = 'leaf'")
        except sqlite3.OperationalError:
            self.skipTest("this SQLite was built without dbstat")
        rows, keys, statuses = (
            [slice(offset, offset + size) for name, offset, size in pages if name == wanted]
            for wanted in ("tasks", "sqlite_autoindex_tasks_1", "tasks_status_at")
        )
        rows = [row for row in rows if b'"task_id":"t30"' not in image[row]]
        cases = [("a row", [leaf]) for leaf in rows]
        cases += [("an index", [leaf]) for leaf in (*keys, *statuses)]
        cases += [("keys and a row", [*keys, leaf]) for leaf in (*rows[::6], rows[-1])]
        for (label, pages), is_zeros in itertools.product(cases, (True, False)):
            with self.subTest(label, pages=pages, is_zeros=is_zeros):
                damaged = bytearray(image)
                for page in pages:
                    size = page.stop - page.start
                    damaged[page] = bytes(size) if is_zeros else rng.randbytes(size)
                write_bytes(self.path, damaged)
                # where their keys can be read
                task_keys = [f"tasks:t{n}" for n in range(40)] if label == "a row" else []
                in_child(partial(assert_damage_is_named, task_keys), seconds=5)

    def test_checks_and_transfers_end_where_both_roots_of_a_table_are_lost(self) -> None:
        def look(table: str) -> None:
            with OperatorDb(self.path) as db:
                self.assertIn(table, "\n".join(db.check()))
                self.assert_refused(DamagedError, lambda: db.backup(self.beside("backup.db")))
            with OperatorDb(self.other) as db:
                self.assert_refused(DamagedError, lambda: db.restore(self.path), self.path)
            self.assertEqual(run_main("--db-path", self.path, "check")[0], 1)

        fill(self.path)
        whole = read_bytes(self.path)
        roots = dict(self.sql("SELECT name, rootpage FROM sqlite_schema"))
        ((size,),) = self.sql("PRAGMA page_size")
        OperatorDb(self.other).close()
        for table in ("tasks", "proofs", "session_log", "tallies"):
            damaged = bytearray(whole)
            for name in (table, f"sqlite_autoindex_{table}_1"):
                damaged[(roots[name] - 1) * size : roots[name] * size] = bytes(size)
            write_bytes(self.path, damaged)
            with self.subTest(table):
                in_child(partial(look, table), seconds=4)
        status, printed = in_child(lambda: run_main("--db-path", self.path), seconds=6)
        self.assertEqual(status, 1)
        self.assertIn(self.path, printed)

    def test_another_programs_collation_hides_no_damage_and_prevents_no_backup(self) -> None:
        fill(self.path)
        make_table_with_a_collation(self.path)
        with OperatorDb(self.path) as db:
            self.assertEqual(db.check(), [])
            db.backup(self.other)
            db.restore(self.other)
            self.assertEqual(db.check(), [])
        self.assertEqual(self.sql("SELECT count(*) FROM notes"), [(2,)])
        self.damage("tasks:t3")
        ((root,),) = self.sql("SELECT rootpage FROM sqlite_schema WHERE name = 'tasks_status_at'")
        ((size,),) = self.sql("PRAGMA page_size")
        image = bytearray(read_bytes(self.path))
        image[(root - 1) * size : root * size] = bytes(size)
        write_bytes(self.path, image)
        with OperatorDb(self.path) as db:
            self.assertIn("tasks:t3", "\n".join(db.check()))
            self.assertGreater(len(db.check()), 1, "the index is not found to be damaged")
            self.assert_refused(DamagedError, lambda: db.backup(self.beside("backup.db")))


class DamageStopsOneRecord(DatabaseTest):
    """repair() keeps every record that can be read, names each that is lost, and spares others."""

    seconds = 30

    def fill(self, tasks: int = 16) -> None:
        """Make a database with some of everything, a backup of it, and remember its records."""
        fill(self.path, tasks)
        with OperatorDb(self.path) as db:
            db.backup(self.other)
            self.stored = dict(every_record(db))
        self.image = read_bytes(self.path)
        ((self.page_size,),) = self.sql("PRAGMA page_size")
        self.roots = dict(self.sql("SELECT name, rootpage FROM sqlite_schema"))

    def smash(self, *pages: int, content: Callable[[int], bytes] = bytes) -> None:
        """Overwrite pages of the closed file, all others being what `fill` made them."""
        image = bytearray(self.image)
        for page in pages:
            image[(page - 1) * self.page_size : page * self.page_size] = content(self.page_size)
        write_bytes(self.path, image)

    def clean(self) -> None:
        """Remove the copies of damaged files."""
        for name in self.kept():
            os.unlink(name)

    def kept(self) -> list[str]:
        """Return the paths of the copies of damaged files."""
        return [self.beside(name) for name in os.listdir(self.folder) if "damaged" in name]

    def repair(self, **options: Any) -> tuple[list[str], set[tuple[str, str]]]:
        """Repair the file; return the lines, and the keys of those that are not there any more."""
        with OperatorDb(self.path, durable=False) as db:
            lines = db.repair(**options)
            self.assertEqual(db.check(), [])
            found = dict(every_record(db))
        self.assertIn("damaged", lines[0])
        for key, record in found.items():
            if record != self.stored.get(key) and record is not None:
                self.assertEqual(key[0], "sessions", f"{key} is not what was stored")
        self.clean()
        return lines, {key for key in self.stored if found.get(key) is None}

    def test_a_page_of_another_table_in_place_of_ours_is_no_record_of_ours(self) -> None:
        """A write that went to the wrong place: a leaf of `proofs` stands where tasks were."""
        fill(self.path, tasks=30)
        with OperatorDb(self.path) as db:
            for n in range(30):
                db.store_proof(proof(f"t{n}", b"out%d" % n))
            db.backup(self.other)
            tasks = {task.task_id: task for task in db.iter_tasks()}
        leaves = dict[str, int]()
        for name, page in self.sql(
            "SELECT name, pageno FROM dbstat WHERE pagetype = 'leaf' ORDER BY pageno DESC"
        ):
            leaves[name] = page
        image = bytearray(read_bytes(self.path))
        ((size,),) = self.sql("PRAGMA page_size")
        there, here = ((leaves[name] - 1) * size for name in ("proofs", "tasks"))
        image[here : here + size] = image[there : there + size]
        for backup in (None, self.other):
            write_bytes(self.path, image)
            with self.subTest(backup=backup), OperatorDb(self.path, durable=False) as db:
                lines = db.repair(backup=backup)
                self.assertEqual(db.check(), [])
                found = {task.task_id: task for task in db.list_tasks()}
                self.assertEqual({**tasks, **found}, tasks, "no other task, and none changed")
                lost = tasks.keys() - found.keys()
                self.assertEqual(bool(lost), backup is None)
                for task_id in lost:
                    self.assertTrue(any(f"'tasks:{task_id}' is lost" in line for line in lines))
            self.clean()

    def test_nothing_comes_back_that_another_program_copied_or_freed(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *map(str, range(200)), payload=bytes(200))
        self.sql("CREATE TABLE archive AS SELECT * FROM tasks")  # with the keys of then
        with OperatorDb(self.path) as db:
            for n in range(200):
                db.update_task_status(str(n), "completed")
            store_tasks(db, *(f"freed {n}" for n in range(100)), payload=bytes(200))
        self.script("PRAGMA secure_delete = OFF; DELETE FROM tasks WHERE key GLOB '*freed*'")
        with OperatorDb(self.path) as db:
            for n in range(0, 200, 5):
                db.delete_task(str(n))
        ((page, size),) = self.sql(
            "SELECT pageno, pgsize FROM dbstat WHERE name = 'tasks' AND pagetype = 'leaf' LIMIT 1"
        )
        image = bytearray(read_bytes(self.path))
        image[(page - 1) * size : page * size] = bytes(size)
        write_bytes(self.path, image)
        with OperatorDb(self.path, durable=False) as db:
            lines = db.repair()
            found = {task.task_id: task.status for task in db.iter_tasks()}
        self.assertEqual({*found.values()}, {TaskStatus.COMPLETED})
        self.assertEqual([n for n in range(0, 200, 5) if str(n) in found], [])
        self.assertEqual(len(found) + sum("is lost" in line for line in lines), 160)

    def test_a_record_whose_class_has_changed_is_no_damage_and_its_value_stays(self) -> None:
        New = make_class(("state", str, "a"), ("extra", str, ""))
        Old, Strict = make_class(("state", str, "a")), make_class(("must", int))
        with OperatorDb(self.path) as db:
            things = db.namespace("things", New, key="name", status="state")
            things.put(New(name="a", extra="precious"))
        with OperatorDb(self.path) as db:
            db.namespace("things", Old, key="name", status="state")
            self.sql("UPDATE things SET status = 'x'")
            self.assertEqual(len(db.repair()), 1)
        self.clean()
        with OperatorDb(self.path) as db:
            self.assertEqual(
                db.namespace("things", New, key="name", status="state").get("a").extra, "precious"
            )
        with OperatorDb(self.path) as db:
            other = db.namespace("others", Old, key="name")
            other.put(Old(name="a"))
        with OperatorDb(self.path) as db:
            db.namespace("others", Strict, key="name")
            self.assertIn("must", db.check()[0])
            self.assertEqual((db.repair(), self.kept()), ([], []))

    def test_a_sound_database_is_left_as_it_is(self) -> None:
        self.fill()
        with self.assert_bytes_unchanged(), OperatorDb(self.path) as db:
            self.assertEqual(db.repair(), [])
            self.assertEqual(db.repair(backup=self.other), [])
            self.assert_refused(InvalidRecordError, lambda: db.repair(backup="\0"), "path")

    def test_a_damaged_record_of_any_table_is_lost_alone_or_comes_from_the_backup(self) -> None:
        self.fill()
        for key in ("tasks:t3", "proofs:t5", "config:operator", "tallies:one"):
            namespace, _, record_id = key.partition(":")
            damages = {
                "checksum": "crc = crc + 1",
                "value": "value = replace(value, ':', ';')",
                "columns": "status = 'x', at = 77",
            }
            for label, damage in damages.items():
                with self.subTest(key, damage=label):
                    write_bytes(self.path, self.image)
                    self.sql(f"UPDATE {namespace} SET {damage} WHERE key = ?", key)
                    damaged = read_bytes(self.path)
                    lines, lost = self.repair()
                    if label == "columns":  # the record itself is whole
                        self.assertEqual((lines[1:], lost), ([], set()))
                        continue
                    self.assertEqual(lost, {(namespace, record_id)})
                    self.assertEqual((len(lines), key in lines[1]), (2, True), lines)
                    write_bytes(self.path, damaged)
                    lines, lost = self.repair(backup=self.other)
                    self.assertEqual((len(lines), lost), (2, set()))
                    self.assertIn(self.other, lines[1])

    def test_records_of_a_class_that_this_process_knows_are_whole_beside_damaged_columns(
        self,
    ) -> None:
        db = self.open()
        devices_of(db).put(PairedDevice(device_id="d"))
        self.sql("UPDATE devices SET key = 'devices:other', status = NULL, at = 5")
        self.assertEqual(len(db.repair()), 1)
        self.assertEqual(devices_of(db).list("paired"), [PairedDevice(device_id="d")])

    def test_any_page_but_the_first_may_be_smashed(self) -> None:
        self.fill(tasks=10)
        number, rng, lost_in_all = len(self.image) // self.page_size, random.Random(12), 0
        for page in range(2, number + 1):
            content = bytes if page % 2 else rng.randbytes
            on_page = self.image[(page - 1) * self.page_size : page * self.page_size]
            named = re.findall(rb"(tasks|proofs|config|tallies|sessions):(\w+)", on_page)
            keys = {(namespace.decode(), record_id.decode()) for namespace, record_id in named}
            with self.subTest(page=page, zeros=content is bytes):
                self.smash(page, content=content)
                with OperatorDb(self.path) as db:
                    if not db.check():  # a page that is not in use
                        continue
                lines, lost = self.repair()
                self.assertTrue(lost <= keys or len(lost) == 1, "more is lost than was on the page")
                for namespace, record_id in lost:
                    if namespace != "sessions":
                        self.assertIn(f"{namespace}:{record_id}", "\n".join(lines))
                lost_in_all += len(lost)
                if lost:
                    self.smash(page, content=content)
                    self.assertEqual(self.repair(backup=self.other)[1], set())
        self.assertGreater(lost_in_all, 15)

    def test_a_table_whose_root_is_lost_with_that_of_its_keys_is_found_page_by_page(self) -> None:
        self.fill(tasks=60)
        self.script("CREATE TABLE numbers(x, y); INSERT INTO numbers VALUES(5, 7.5), (NULL, x'00')")
        self.image = read_bytes(self.path)
        for table in ("tasks", "session_log", "proofs", "sessions", "config", "tallies"):
            with self.subTest(table):
                self.smash(self.roots[table], self.roots[f"sqlite_autoindex_{table}_1"])
                lines, lost = self.repair()
                if table in ("tasks", "session_log", "proofs"):  # their roots hold no rows
                    self.assertEqual(lost, set(), lines)
                self.assertIn(f"{table}: records may be lost", "\n".join(lines))
                self.smash(self.roots[table], self.roots[f"sqlite_autoindex_{table}_1"])
                self.assertEqual(self.repair(backup=self.other)[1], set())
        content = random.Random(1).randbytes
        for name in [name for name in self.roots if name.endswith(("_1", "_status_at"))]:
            with self.subTest(name):
                self.smash(self.roots[name], content=content)
                self.assertEqual((self.repair()[0][1:], self.repair_again()), ([], []))

    def repair_again(self) -> list[str]:
        with OperatorDb(self.path) as db:
            return db.repair()

    def test_what_was_deleted_or_replaced_is_not_found_on_a_page_that_it_has_left(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *(f"t{n}" for n in range(90)), payload=b"old" * 300)
            for n in range(0, 60, 2):
                db.delete_task(f"t{n}")
            store_tasks(db, *(f"t{n}" for n in range(30, 60)), payload=b"new" * 999)
            for n in range(60, 90):
                db.delete_task(f"t{n}")
            wanted = exported(db)
        self.image, self.page_size = read_bytes(self.path), 4096
        self.roots = dict(self.sql("SELECT name, rootpage FROM sqlite_schema"))
        self.smash(self.roots["tasks"], self.roots["sqlite_autoindex_tasks_1"])
        with OperatorDb(self.path, durable=False) as db:
            db.repair()
            self.assertEqual(exported(db), wanted)

    def test_a_record_whose_value_goes_on_on_a_smashed_page_hides_none_beside_it(self) -> None:
        names = [f"t{n:02}" for n in range(60)]
        with OperatorDb(self.path) as db:
            for n, name in enumerate(names):
                store_tasks(db, name, payload=bytes([n]) * (9000 if n % 3 == 0 else 9))
        self.image, self.page_size = read_bytes(self.path), 4096
        self.roots = dict(self.sql("SELECT name, rootpage FROM sqlite_schema"))
        value = b64encode(bytes([30]) * 9000)[:4000]
        page = self.image.index(value) // self.page_size + 1
        roots = self.roots["tasks"], self.roots["sqlite_autoindex_tasks_1"]
        for others in ((), roots[1:], roots):
            with self.subTest(others=others):
                self.smash(page, *others)
                with OperatorDb(self.path, durable=False) as db:
                    self.assertIn("tasks:t30' is lost", "\n".join(db.repair()))
                    self.assertEqual(task_ids(db), [name for name in names if name != "t30"])

    def test_row_numbers_that_are_damaged_never_lead_round_in_circles(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *(f"t{n:02}" for n in range(20)))
        image = bytearray(read_bytes(self.path))
        number = image.index(b"tasks:t19{") - 8  # before the header of that row
        self.assertEqual(image[number], 20)
        image[number] = 1
        write_bytes(self.path, image)
        with OperatorDb(self.path, durable=False) as db:
            self.assertEqual((len(db.repair()), db.check()), (1, []))
            self.assertEqual(len(task_ids(db)), 20)

    def test_where_the_schema_may_not_be_written_the_keys_lead_past_a_smashed_page(self) -> None:
        def forbid(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            connection.set_authorizer(
                lambda action, name, *_: (
                    sqlite3.SQLITE_IGNORE
                    if (action, name) == (sqlite3.SQLITE_PRAGMA, "writable_schema")
                    else sqlite3.SQLITE_OK
                )
            )
            return connection

        self.fill(tasks=60)
        leaf = self.image.index(b"tasks:t20{") // self.page_size + 1
        self.smash(leaf)
        connect = sqlite3.connect
        with mock.patch.object(sqlite3, "connect", forbid):
            lines, lost = self.repair()
        self.assertIn(("tasks", "t20"), lost)
        self.assertLess(len(lost), 10)
        self.assertEqual(len(lines), 1 + len(lost))

    def test_a_damaged_freelist_or_pointer_map_loses_nothing(self) -> None:
        with OperatorDb(self.path) as db:
            store_tasks(db, *(f"t{n}" for n in range(60)), payload=bytes(3000))
            for n in range(30, 60):
                db.delete_task(f"t{n}")
            wanted = exported(db)
        self.image, self.page_size = read_bytes(self.path), 4096
        first_free = int.from_bytes(self.image[32:36], "big")
        self.assertGreater(first_free, 0)
        for label, page in (("the freelist", first_free), ("the pointer map", 2)):
            for content in (bytes, random.Random(2).randbytes):
                with self.subTest(label, content=content):
                    self.smash(page, content=content)
                    with OperatorDb(self.path) as db:
                        self.assertEqual(len(db.repair()), db.check() == [])
                        self.assertEqual(exported(db), wanted)
                        store_tasks(db, "new", payload=bytes(60_000))
                        self.assertEqual(db.check(), [])

    def test_what_remains_of_a_session_keeps_its_order_and_goes_on(self) -> None:
        db = self.open()
        for n in range(6):
            db.append_transcript("s", "user", f"{n}", timestamp=10 + n)
            db.append_command("s", f"c{n}")
        db.link_task("s", "t")
        db.backup(self.other)
        whole = db.get_session("s")
        log = "DELETE FROM session_log WHERE key IN ('session_log:transcript:s:{}', {!r})"
        self.sql(log.format(0, "session_log:transcript:s:3"))
        lines = "\n".join(db.repair())
        self.assertRegex(lines, "transcript:s' has 4 entries, not 6")
        db.append_transcript("s", "user", "6")
        said = [entry.content for entry in db.transcript("s")]
        self.assertEqual((said, db.transcript("s", last=2)[0].content), ([*"12456"], "5"))
        self.sql("DELETE FROM sessions")
        self.assertIn("sessions:'s' is made from its log", "\n".join(db.repair()))
        made = db.get_session("s")
        assert made is not None and whole is not None
        self.assertEqual((made.created_at, len(made.command_history)), (11, 6))
        self.sql("UPDATE sessions SET crc = 0")
        self.damage("session_log:commands:s:2")
        self.assertIn(
            "sessions:s is taken",
            "\n".join(map(repr, db.repair(backup=self.other))).replace("'", ""),
        )
        self.assertEqual(db.get_session("s").command_history, whole.command_history)  # type: ignore[union-attr]
        self.sql("UPDATE session_log SET value = 'x'")
        db.repair()
        self.assertEqual(db.transcript("s"), [])
        db.append_transcript("s", "user", "on")
        self.assertEqual(db.check(), [])

    def test_a_backup_never_brings_back_what_has_changed_or_gone_since(self) -> None:
        db = self.open()
        store_tasks(db, "changed", "gone", "damaged")
        for name in ("deleted", "begun anew"):
            db.append_transcript(name, "user", "old", timestamp=1)
            db.append_transcript(name, "user", "older", timestamp=1)
        db.backup(self.other)
        db.update_task_status("changed", "in_progress")
        db.delete_task("gone")
        for name in ("deleted", "begun anew"):
            db.delete_session(name)
        db.append_transcript("begun anew", "user", "new", timestamp=2)
        db.append_transcript("begun anew", "user", "newer", timestamp=2)
        self.damage("tasks:damaged")
        self.damage("session_log:transcript:begun anew:1")
        lines = db.repair(backup=self.other)
        self.assertEqual(task_ids(db), ["changed", "damaged"])
        self.assertEqual(db.get_task("changed").status, "in_progress")  # type: ignore[union-attr]
        self.assertEqual([each.content for each in db.transcript("begun anew")], ["new"])
        self.assertEqual([each.session_id for each in db.list_sessions()], ["begun anew"])
        self.assertEqual(sum(self.other in line for line in lines), 1, lines)

    def test_the_file_as_it_was_is_kept_private_and_named(self) -> None:
        self.fill()
        self.damage("tasks:t3")
        damaged = self.sql("SELECT * FROM tasks")
        with OperatorDb(self.path) as db:
            (kept, line) = db.repair()
        path = self.kept()[0]
        self.assertTrue(kept.endswith(path) and path.startswith(self.path), kept)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(self.sql("SELECT * FROM tasks", path=path), damaged)
        self.assertIn("tasks:t3", line)

    def test_records_keep_their_order(self) -> None:
        db, names = self.open(), [f"{n * 7 % 30:02}" for n in range(30)]
        store_tasks(db, *names, claimed_at=5)
        db.delete_task(names.pop(3))
        db.backup(self.other)
        self.damage(f"tasks:{names[20]}")
        db.repair(backup=self.other)
        self.assertEqual([task.task_id for task in db.list_tasks()], names)
        self.damage(f"tasks:{names.pop(10)}")
        db.repair()
        self.assertEqual([task.task_id for task in db.list_tasks()], names)

    def test_others_who_have_the_file_open_go_on_with_the_repaired_one(self) -> None:
        def go_on() -> int:
            with OperatorDb(self.path) as db:
                before = db.get_task("t0")
                turn.wait()
                turn.wait()
                store_tasks(db, "from the other process")
                return (before == db.get_task("t0")) + len(db.list_tasks())

        self.fill()
        self.damage("tasks:t3")
        turn = multiprocessing.get_context("fork").Barrier(2, timeout=10)
        process = Child(lambda _: go_on())
        turn.wait()
        with OperatorDb(self.path) as db, OperatorDb(self.path) as another:
            tallies = tallies_of(another)
            db.repair()
            turn.wait()
            self.assertEqual(process.result(), 1 + 16)
            self.assertEqual((len(another.list_tasks()), tallies.count()), (16, 1))
            store_tasks(another, "from the other object")
        self.assert_sound()

    def building(self) -> bool:
        """Whether a repair has begun to build the new database."""
        return bool(self.new_databases())

    def new_databases(self) -> set[str]:
        """Return the names of the databases that repairs are building."""
        return {name for name in self.names() if re.fullmatch(r"operator\.db\.[\w-]+\.new", name)}

    def test_what_another_commits_during_a_repair_is_kept_or_the_repair_is_given_up(self) -> None:
        self.fill()
        for label, times in (("once", 1), ("twice", 2), ("each time", 1000)):
            for where in ("another object", "another process"):
                with self.subTest(label, where=where), ExitStack() as stack:
                    write_bytes(self.path, self.image)
                    self.damage("tasks:t3")
                    db = stack.enter_context(OperatorDb(self.path, durable=False))
                    writer = stack.enter_context(OperatorDb(self.path, durable=False))
                    told: list[str] = []
                    attempts = set[str]()

                    def write(*_: int) -> None:
                        new = self.new_databases() - attempts  # noqa: B023
                        if not new or len(attempts) >= times:  # noqa: B023
                            return
                        attempts.update(new)  # noqa: B023
                        name = f"m{len(told)}"  # noqa: B023
                        if where == "another object":  # noqa: B023
                            store_tasks(writer, name)  # noqa: B023
                        else:
                            program = "with OperatorDb(sys.argv[1]) as db:"
                            program += " db.store_task(TaskRecord(task_id=sys.argv[2]))"
                            run_program(program, self.path, name)
                        told.append(name)  # noqa: B023

                    if times < 3:
                        self.assertEqual(len(db.repair(progress=write)), 2)
                        self.assertEqual(db.check(), [])
                    else:
                        self.assert_refused(BusyError, partial(db.repair, progress=write), "again")
                        self.assertEqual(self.kept(), [])
                        self.assertEqual(len(db.check()), 1)
                    self.assertEqual(len(told), min(times, 3))
                    for name in told:
                        self.assertIsNotNone(db.get_task(name), "an acknowledged write is lost")
                self.clean()
                self.assertFalse(self.building())

    def test_threads_that_write_through_the_same_object_do_not_hold_a_repair_up(self) -> None:
        def write() -> None:
            while not done.is_set():
                store_tasks(db, name := f"h{next(numbers)}")
                stored.append(name)

        self.fill()
        db, done, stored, numbers = self.open(), threading.Event(), list[str](), itertools.count()
        self.damage("tasks:t3")
        with in_background(write, write):
            try:
                self.assertEqual(len(db.repair()), 2)
            finally:
                done.set()
        self.assertLessEqual(set(stored), set(task_ids(db)))
        self.assertEqual(db.check(), [])

    def test_writers_beside_repairs_lose_nothing(self) -> None:
        """Threads of the same object wait; another process is seen, or holds the repair up."""

        def write(say: Say) -> None:
            with OperatorDb(self.path) as db:
                for n in itertools.count():
                    store_tasks(db, f"p{n}")
                    say(n)

        def write_here() -> None:
            while not done.is_set():
                store_tasks(db, f"h{len(here)}")
                here.append(len(here))

        self.fill()
        db, done, here = self.open(), threading.Event(), list[int]()
        child, repaired = Child(write), 0
        child.line()
        with in_background(write_here):
            for _ in range(2):
                self.damage("tasks:t3")
                with suppress(BusyError):
                    repaired += bool(db.repair(backup=self.other))
            done.set()
        said = [int(n) for n in child.kill()]
        while not repaired:
            repaired += bool(db.repair(backup=self.other))
        self.assertEqual(db.check(), [])
        names = set(task_ids(db))
        self.assertLessEqual({f"p{n}" for n in range(max(said) + 1)}, names)
        self.assertLessEqual({f"h{n}" for n in here}, names)

    def test_of_two_processes_that_repair_at_once_one_does_it(self) -> None:
        def repair() -> int:
            with OperatorDb(self.path) as db:
                turn.wait()
                return len(db.repair(backup=self.other))

        self.fill()
        self.damage("tasks:t3")
        turn = multiprocessing.get_context("fork").Barrier(2, timeout=10)
        children = [Child(lambda _: repair()) for _ in range(2)]
        self.assertEqual(sorted(child.result() for child in children), [0, 2])
        self.assertEqual(len(self.kept()), 1)
        with OperatorDb(self.path) as db:
            self.assertEqual((db.check(), dict(every_record(db))), ([], self.stored))

    def test_a_repair_that_is_killed_has_changed_nothing_or_all(self) -> None:
        def repair(number: int, say: Say) -> int:
            with OperatorDb(self.path) as db:
                store_tasks(db, "acknowledged")
                kill = number >= 0
                with interrupt_at_call(number, kill=kill) as calls:
                    db.repair()
                    say("done")
                    return calls()

        self.fill()
        self.smash(self.roots["session_log"])
        image, rng, outcomes = read_bytes(self.path), random.Random(4), set()
        total = Child(partial(repair, -1)).result()
        numbers = [rng.randrange(1, total) for _ in range(10)] + [
            total - n for n in range(1, 200, 20)
        ]
        for number in numbers:
            self.clean()
            for name in os.listdir(self.folder):
                if name.endswith(("-wal", "-shm", ".new")):
                    os.unlink(self.beside(name))
            write_bytes(self.path, image)
            said = Child(partial(repair, number)).last_words()
            with self.subTest(number=number), OperatorDb(self.path) as db:
                is_repaired = db.check() == []
                self.assertTrue(is_repaired or not said)
                self.assertFalse(is_repaired and not self.kept(), "what was damaged is gone")
                outcomes.add(is_repaired)
                db.repair()
                self.assertEqual(db.check(), [])
                self.assertIsNotNone(db.get_task("acknowledged"))
                self.assertEqual(
                    dict(every_record(db)).keys() - self.stored.keys(), {("tasks", "acknowledged")}
                )
        self.assertEqual(outcomes, {True, False})

    def test_a_repair_without_room_changes_nothing(self) -> None:
        def repair(size: int) -> bool:
            with OperatorDb(self.path) as db:
                with file_size_limit(size):
                    try:
                        db.repair()
                    except StorageError as error:
                        self.assertIn(self.path, str(error))
                        self.assertNotIn(".new", str(error))
                store_tasks(db, "room again")
                return db.check() == []

        self.fill()
        self.damage("tasks:t3")
        damaged, outcomes = read_bytes(self.path), set()
        size = len(damaged)
        for limit in (0, size // 3, size // 2, size - 4096, size, size + 40_000, size * 3):
            write_bytes(self.path, damaged)
            with self.subTest(limit=limit):
                is_sound = in_child(partial(repair, limit))
                outcomes.add(is_sound)
                self.assertEqual(len(self.kept()), is_sound)
                self.assertFalse(self.building())
                with OperatorDb(self.path) as db:
                    self.assertEqual(len(db.check()), not is_sound)
                    self.assertIsNotNone(db.get_task("room again"))
            self.clean()
        self.assertEqual(outcomes, {True, False})
        write_bytes(self.path, damaged)
        usage = mock.Mock(free=size)
        with OperatorDb(self.path) as db, mock.patch("shutil.disk_usage", return_value=usage):
            self.assert_refused(StorageError, db.repair, self.path, "free space")
        self.assertEqual(read_bytes(self.path), damaged)

    def test_an_error_of_the_progress_function_is_passed_on_and_nothing_is_changed(self) -> None:
        self.fill()
        self.damage("tasks:t3")
        calls = 0

        def count(*_: int) -> None:
            nonlocal calls
            calls += 1

        image = read_bytes(self.path)
        with OperatorDb(self.path, durable=False) as db:
            db.repair(progress=count)
        self.clean()
        write_bytes(self.path, image)
        db = self.open()
        for number in (0, calls // 2, calls - 9, calls - 3):
            numbers = itertools.count()

            def fail(*_: int) -> None:
                if next(numbers) == number:  # noqa: B023
                    raise TimeoutError("mine")

            with self.subTest(number=number):
                with self.assertRaisesRegex(TimeoutError, "mine"):
                    db.repair(progress=fail)
                self.assertEqual((len(db.check()), self.kept(), self.building()), (1, [], False))
                store_tasks(db, "no lock is held")
                db.delete_task("no lock is held")

    def test_a_child_that_a_progress_function_forks_ends_there(self) -> None:
        def fork(*_: int) -> None:
            if self.building() and not statuses:
                if not (child := os.fork()):
                    return
                statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

        statuses = list[int]()
        self.fill()
        self.damage("tasks:t3")
        with OperatorDb(self.path) as db:
            self.assertEqual(len(db.repair(progress=fork)), 2)
            self.assertEqual((statuses, db.check()), ([os.EX_SOFTWARE], []))

    def test_nothing_is_put_in_place_of_a_newer_schema_or_of_another_file(self) -> None:
        self.fill()
        self.damage("tasks:t3")
        image = read_bytes(self.path)
        with OperatorDb(self.path) as db:
            self.sql("PRAGMA user_version = 99")
            self.assert_refused(NewerSchemaError, db.repair, self.path)
            self.assertEqual((self.sql("PRAGMA user_version"), self.kept()), ([(99,)], []))
        write_bytes(self.path, image)
        db = self.open()

        def replace_file(*_: int) -> None:
            if self.building() and os.stat(self.path).st_ino == first:
                shutil.copy(self.other, self.file)
                os.replace(self.file, self.path)

        first = os.stat(self.path).st_ino
        self.assert_refused(FileReplacedError, partial(db.repair, progress=replace_file), self.path)
        self.assertEqual(self.kept(), [])
        db.close()
        self.assertEqual(content_of(self.path), content_of(self.other))

    def test_a_repair_waits_for_another_process_until_its_timeout(self) -> None:
        self.fill()
        self.damage("tasks:t3")
        child = holding_the_lock(self.path)
        with OperatorDb(self.path, timeout=0.05) as db:
            self.assert_refused(BusyError, db.repair, self.path)
            self.assertEqual((self.kept(), self.building()), ([], False))
        child.kill()
        self.assertEqual(self.repair()[1], {("tasks", "t3")})

    def test_a_repair_that_cannot_be_made_is_refused(self) -> None:
        self.fill()
        self.damage("tasks:t3")
        self.damage("tasks:t4", path=self.other)
        with OperatorDb(self.path, read_only=True) as looking:
            self.assert_refused(StorageError, looking.repair, "read-only")
        db, missing = self.open(), self.beside("missing.db")
        with db.transaction():
            self.assert_refused(ConflictError, db.repair, "outside the block")
        for backup, error in (
            (self.other, DamagedError),
            (missing, StorageError),
            (self.path, InvalidRecordError),
            (self.folder, ForeignFileError),
        ):
            with self.subTest(backup=backup):
                self.assert_refused(error, partial(db.repair, backup=backup), backup)
                self.assertEqual((len(db.check()), self.kept(), self.building()), (1, [], False))

    def test_what_other_programs_keep_in_the_file_is_copied_as_far_as_it_can_be_read(self) -> None:
        self.fill()
        self.script(
            "CREATE TABLE notes(id INTEGER PRIMARY KEY, x, double AS (2 * id), y TEXT DEFAULT 'd');"
            "CREATE INDEX notes_x ON notes(x); CREATE VIEW latest AS SELECT max(id) FROM notes;"
            "CREATE TABLE plain(x); CREATE TABLE pairs(a TEXT, b, PRIMARY KEY(a, b)) WITHOUT ROWID;"
            "CREATE TRIGGER noted AFTER INSERT ON plain BEGIN UPDATE notes SET y = 'n'; END;"
            'CREATE TABLE "odd ""name"("rowid", "order");'
            'INSERT INTO "odd ""name" VALUES(x\'00\', 1.5);'
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)"
            " INSERT INTO notes(id, x) SELECT i * 3, printf('%0300d', i) FROM n;"
            "INSERT INTO plain SELECT x FROM notes; DELETE FROM plain WHERE rowid < 9;"
            "INSERT INTO pairs SELECT id, y FROM notes;"
        )
        tables = ("notes", "plain", "pairs", 'odd "name', "latest")
        select = 'SELECT {}* FROM "{}"'

        def rows(table: str) -> list[Any]:
            with_numbers = "rowid, " if table in ("notes", "plain") else ""
            return self.sql(select.format(with_numbers, table.replace('"', '""')))

        def schema() -> list[Any]:
            query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
            return self.sql(query)

        before, definitions = {table: rows(table) for table in tables}, schema()
        self.image = read_bytes(self.path)
        self.damage("tasks:t3")
        self.assertEqual(self.repair()[1], {("tasks", "t3")})
        self.assertEqual(
            ({table: rows(table) for table in tables}, schema()), (before, definitions)
        )
        query = "SELECT pageno FROM dbstat WHERE name = 'notes' AND pagetype = 'leaf'"
        try:
            pages = [page for (page,) in self.sql(query)]
        except sqlite3.OperationalError:
            self.skipTest("this SQLite was built without dbstat")
        self.image = read_bytes(self.path)
        self.smash(pages[len(pages) // 2])
        self.assertIn("'notes'", self.repair()[0][1])
        left = rows("notes")
        self.assertTrue(set(left) < set(before["notes"]) and len(left) > 280, len(left))
        self.assertEqual(left, sorted(left))
        self.assertEqual(rows("pairs"), before["pairs"])

    def test_a_table_that_another_program_alone_can_make_is_named_and_stays_in_the_kept_file(
        self,
    ) -> None:
        self.fill()
        make_table_with_a_collation(self.path)
        self.damage("tasks:t3")
        with OperatorDb(self.path) as db:
            lines = db.repair()
            self.assertEqual(dict(every_record(db)).keys() ^ self.stored.keys(), {("tasks", "t3")})
        self.assertRegex(lines[1], "'notes'.*theirs")
        self.assertRegex(lines[2], "'notes_x'")
        self.assertNotIn(".new", "".join(lines))
        self.assertEqual(self.sql("SELECT x FROM notes", path=self.kept()[0]), [("a",), ("b",)])

    def test_a_trigger_that_was_planted_on_a_table_of_ours_is_left_out(self) -> None:
        self.fill()
        with OperatorDb(self.path) as db:
            self.script(
                "CREATE TRIGGER planted AFTER INSERT ON tallies BEGIN DELETE FROM proofs; END"
            )
            self.assertIn("planted", db.repair()[1])
            self.assertEqual((db.check(), dict(every_record(db))), ([], self.stored))

    def test_a_database_of_pages_of_another_size_is_repaired(self) -> None:
        self.fill()
        self.script("PRAGMA journal_mode = DELETE; PRAGMA page_size = 8192; VACUUM")
        self.damage("tasks:t3")
        self.assertEqual(self.repair()[1], {("tasks", "t3")})
        self.assertEqual(self.sql("PRAGMA page_size"), [(8192,)])

    def test_every_message_about_damage_leads_to_repair(self) -> None:
        self.fill()
        columns = {
            "a record": "UPDATE tasks SET value = 'x'",
            "its columns": "UPDATE tasks SET at = 5",
            "a status": "UPDATE tasks SET status = x'00'",
            "an entry": "DELETE FROM session_log WHERE at = 3",
            "its session": "DELETE FROM sessions",
        }
        reads: tuple[Verb, ...] = (
            lambda db: db.get_task("t0"),
            OperatorDb.list_tasks,
            lambda db: list(db.iter_tasks()),
            lambda db: db.get_session("s0"),
            lambda db: db.append_transcript("s0", "user", "x"),
            lambda db: db.prune(),
            lambda db: db.export(BytesIO()),
            lambda db: db.backup(self.file),
        )
        for label, statement in columns.items():
            write_bytes(self.path, self.image)
            self.sql(statement)
            refused = 0
            with OperatorDb(self.path) as db:
                for read in reads:
                    with self.subTest(label), suppress(NotFoundError):
                        try:
                            read(db)
                        except DamagedError as error:
                            refused += 1
                            self.assertIn("run repair()", str(error))
            self.assertGreater(refused, 1)
        for name in self.roots:
            self.smash(self.roots[name])
            with OperatorDb(self.path) as db:
                for read in reads:
                    with self.subTest(name):
                        try:
                            read(db)
                        except DamagedError as error:
                            self.assertIn("run repair()", str(error))
            with suppress(FileNotFoundError):
                os.unlink(self.file)

    def test_a_file_that_cannot_be_opened_says_how_to_begin_anew(self) -> None:
        self.fill()
        rng = random.Random(3)
        for label, image in (
            ("no first page", bytes(self.page_size) + self.image[self.page_size :]),
            ("a random one", rng.randbytes(self.page_size) + self.image[self.page_size :]),
            ("no schema", self.image[:100] + bytes(3996) + self.image[self.page_size :]),
            ("cut short", self.image[:-5000]),
        ):
            with self.subTest(label):
                write_bytes(self.path, image)
                opening = partial(OperatorDb, self.path)
                with self.assertRaisesRegex(ValueError, "aside with its -wal.*`restore`"):
                    opening()
                self.assertNotIn("repair", str(self.assert_refused(OperatorDbError, opening)))
        os.rename(self.path, self.path + ".aside")
        self.assertEqual(run_main("--db-path", self.path, "restore", self.other)[0], 0)
        with OperatorDb(self.path) as db:
            self.assertEqual(dict(every_record(db)), self.stored)


# ==== Export, import, backup, restore, compact ====================================================

# As `agenc-db export --format json` writes it.
PROTOTYPE_EXPORT = r"""{
  "exported_at": "2026-02-21T14:55:55.120394+00:00",
  "stats": {"total_tasks": 2, "task_counts": {"InProgress": 1, "Disputed": 1},
            "total_sessions": 1, "total_proofs": 1},
  "config": {"wallet_pubkey": "4YRpGXNp5gfPE8XqcUAL3FV6xHMJaQkxVccPTSy8hutg", "network": "devnet",
             "rpc_url": "https://api.devnet.solana.com", "capabilities": ["voice", "code"],
             "model_preferences": null},
  "tasks": [
    {"task_id": "2aotSaHBBZvWyUDt8qztEGesVGiVqg54xiPvBxZvAqFt", "payload": [0, 255, 128, 195, 169],
     "status": "Disputed", "claimed_at": 1774627200, "completed_at": 1774627900,
     "on_chain_signature": "37WpEBkP5eWGkDs98BHyvTA6CMMbt61Hco7qn9khxy4i",
     "description": "Summarise the report", "reward_lamports": 18446744073709551615,
     "reward_skr_tokens": null, "creator": "AYwAQmXxTLB3ukpRPHV2LC6qA4DCo2hsuSTneNn9xnQN"},
    {"task_id": "task-in-progress", "payload": [], "status": "InProgress",
     "claimed_at": 1774627300, "completed_at": null, "on_chain_signature": null,
     "description": null, "reward_lamports": 0, "reward_skr_tokens": 5000000000, "creator": null}
  ],
  "sessions": [
    {"session_id": "session_1774627000123", "active_task_ids": ["task-in-progress"],
     "transcript": [{"role": "system", "content": "ClaimTask", "timestamp": 1774627001},
                    {"role": "user", "content": "what is it worth?", "timestamp": 1774627002}],
     "command_history": ["ClaimTask"], "created_at": 1774627000, "last_active": 1774627002}
  ]
}"""


def export_of(*entries: dict[str, Any], **header: Any) -> BytesIO:
    """Return an export of these lines, the first of which is line 2; `header` changes line 1."""
    first: dict[str, Any] = {"format": "operator_db/1", "schema_version": 1, "withheld": {}}
    first["records"] = Counter(entry["namespace"] for entry in entries)
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
    """A database with some of everything."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.path, tasks=10)

    def fill_large(self, path: str, tasks: int = 60) -> None:
        """Add large tasks to a database: 60 are so much that it is copied in several steps."""
        with OperatorDb(path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"large{n}" for n in range(tasks)), payload=bytes(70_000))


class ExportsHoldEverything(TransferTest):
    def test_an_export_or_backup_is_one_snapshot_while_a_writer_goes_on(self) -> None:
        def store_pair() -> None:
            with db.transaction():  # the first and the last task that are walked
                ends = {"reward_lamports": next(values), "claimed_at": 1}
                store_tasks(db, "+first", "~last", **ends)

        def write(*_: int) -> None:
            run_in_threads(store_pair)

        self.fill_large(self.path)
        db, values = self.open(), itertools.count()
        store_pair()
        before = exported(db, include_secrets=False)
        db.export(self.file, progress=write)
        self.assertTrue(read_bytes(self.file).splitlines()[1:] == before)
        before = exported(db)
        db.backup(self.other, progress=write)
        self.assertTrue(content_of(self.other) == before)
        self.assertGreater(next(values), 50)
        db.import_(self.file)  # which compares the records with the header

    def test_export_and_import_take_no_more_memory_for_more_records(self) -> None:
        # a few large records, and many: of these not even something small is kept
        for size, few, many, room in ((200_000, 2, 20, 2_000_000), (3000, 600, 1000, 10_000)):
            peaks: dict[str, list[int]] = {"export": [], "import_": []}
            for count in (few, many):
                db = self.open(f"{self.other}{count}")
                with db.transaction():
                    store_tasks(db, *map(str, range(count)), payload=bytes(size))
                for verb, of_verb in peaks.items():
                    tracemalloc.start()
                    getattr(db, verb)(self.file)
                    of_verb.append(tracemalloc.get_traced_memory()[1])
                    tracemalloc.stop()
            for verb, (less, more) in peaks.items():
                with self.subTest(verb, size=size):
                    self.assertLess(more, less + room)

    def test_any_kind_of_stream_gets_the_whole_export(self) -> None:
        db, text, unbuffered = self.open(), StringIO(), bytearray()
        printed = TextIOWrapper(BytesIO(), encoding="ascii")
        raw = mock.Mock(spec=io.RawIOBase)
        raw.write.side_effect = lambda data: unbuffered.extend(data[:1000]) or min(1000, len(data))
        store_tasks(db, "漢字")
        print("printed before", file=printed)
        for stream in (text, printed, raw):
            db.export(stream)
        before, _, sent = printed.buffer.getvalue().partition(b"\n")
        self.assertEqual(before, b"printed before")
        for got in (text.getvalue().encode(), sent, unbuffered):
            header, *lines = got.splitlines()
            self.assertEqual(json.loads(header)["format"], "operator_db/1")
            self.assertEqual(lines, exported(db, include_secrets=False))

    def test_a_named_pipe_is_written_to_and_never_replaced(self) -> None:
        fifo, db = self.beside("fifo"), self.open()
        os.mkfifo(fifo)
        with self.assert_unchanged():
            self.assert_refused(StorageError, lambda: db.backup(fifo, overwrite=True), fifo)
        got: list[bytes] = []
        for send in (db.export, db.write_metrics):
            run_in_threads(partial(send, fifo), lambda: got.append(read_bytes(fifo)))
            self.assertTrue(stat.S_ISFIFO(os.stat(fifo).st_mode))
        self.assertEqual(got[0].splitlines()[1:], exported(db, include_secrets=False))
        self.assertIn(b"\noperator_db_tasks{", got[1])

    def test_an_export_into_a_slow_pipe_holds_no_snapshot_and_no_lock(self) -> None:
        def export() -> None:
            with open(writer, "wb") as pipe:
                db.export(pipe)

        reader, writer = os.pipe()
        db, other = self.open(), self.open(timeout=0)
        store_tasks(db, "large", payload=bytes(10**6))
        with in_background(export), open(reader, "rb") as pipe:
            pipe.read(1)  # the rest does not fit into the pipe: the export waits
            store_tasks(other, "meanwhile")
            self.assertEqual(self.sql("PRAGMA wal_checkpoint(TRUNCATE)"), [(0, 0, 0)])
            self.assertEqual(os.stat(self.path + "-wal").st_size, 0)
            self.assertEqual(pipe.read().count(b"\n"), len(exported(db)))

    def test_a_damaged_record_is_neither_exported_nor_backed_up_but_named(self) -> None:
        db, stream = self.open(), BytesIO()
        write_bytes(self.file, b"old")
        self.damage("proofs:t1")
        for verb, file in ((db.export, self.file), (db.export, stream), (db.backup, self.other)):
            self.assert_refused(DamagedError, partial(verb, file), "proofs:t1")
        self.assertEqual((read_bytes(self.file), stream.getvalue()), (b"old", b""))
        self.assertEqual(self.names(), {"operator.db", "operator.jsonl"})


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


class ImportsTakeAllOrNothing(ImportTest):
    DEEP = json.loads("[" * 150 + "]" * 150)
    WRONG_ENTRIES = (  # namespace, place in its line, value there, what the error names
        ("tasks", "record.reward_lamports", "1", "reward_lamports"),
        ("tasks", "record.reward_skr_tokens", 2**64, "reward_skr_tokens"),
        ("tasks", "record.claimed_at", True, "claimed_at"),
        ("tasks", "record.claimed_at", 1_774_627_200_000, "looks like milliseconds"),
        ("tasks", "record.payload", "not base64!", "payload"),
        ("tasks", "record.status", "completed", "history"),  # with which it must end
        ("tasks", "record.task_id", "a\nb", "task_id"),
        ("tasks", "record.task_id", REMOVED, "task_id"),
        ("tasks", "record.claimed_at", REMOVED, "claimed_at"),
        ("tasks", "record.mood", 1, "mood"),
        ("tasks", "record.history", [], "history"),
        ("tasks", "record.history.0.status", "disputed", "history"),
        ("tasks", "record.history.0.signature", "another", "history"),
        ("tasks", "record.history.0.mood", None, "mood"),
        ("sessions", "record.transcript.0.content", None, "transcript"),
        ("sessions", "record.transcript.0.timestamp", REMOVED, "timestamp"),
        ("proofs", "record.outputs", REMOVED, "outputs"),
        ("proofs", "record.proof_hash", "00" * 32, "proof_hash"),
        ("proofs", "record.submitted", "yes", "submitted"),
        ("config", "record.keypairs", {"main": 5, "more": SECRET}, "keypairs"),
        ("config", "record.keypairs", {"main": "***", "more": SECRET}, "keypairs"),
        ("config", "record.rpc_endpoints", [SECRET, 7], "rpc_endpoints"),
        ("config", "record.rpc_endpoints", ["***", SECRET], "rpc_endpoints"),
        ("config", "record.model_preferences", {"a": DEEP}, "model_preferences"),
        ("tallies", "record.count", "many", "count"),
        ("tallies", "record.pin", [SECRET], "pin"),
        ("tallies", "record.name", "another", "another"),  # its key is another one
        ("tallies", "key", REMOVED, ""),
        ("tasks", "namespace", "proofs", ""),
        ("tasks", "namespace", "session_log", ""),
        ("tasks", "namespace", "No such", ""),
        ("tasks", "record", REMOVED, ""),
        ("tasks", "more", 1, ""),
    )
    OF_CONFIG = b'{"namespace":"config","record":'
    WRONG_LINES = (  # text of a line, what the error names
        (OF_CONFIG + b'{"network":"\xff"}}', "UTF-8"),
        (OF_CONFIG + b'{"model_preferences":{"a":NaN}}}', "NaN"),
        (OF_CONFIG + b'{"model_preferences":{"a":1e999}}}', "model_preferences"),
        (OF_CONFIG + b'{"keypairs":{"main":"' + SECRET.encode(), "JSON"),
        (OF_CONFIG + b"[" * 10**5, ""),
        (b"[1]", "JSON"),
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
        db, entries, records = self.open(self.other), self.entries, self.records
        whole = export_of(*entries).getvalue()
        invalid, newer = InvalidRecordError, NewerSchemaError
        cases: tuple[tuple[str, BytesIO, type[OperatorDbError], str], ...] = (
            ("last line lost", export_of(*entries[:-1], records=records), invalid, "tallies"),
            ("a line twice", export_of(*entries, entries[-1], records=records), invalid, "tallies"),
            ("all lines lost", export_of(records=records), invalid, "config"),
            ("no counts", export_of(*entries, records=None), invalid, "line 1"),
            ("cut within a line", BytesIO(whole[: len(whole) // 2]), invalid, "line"),
            ("newer schema", export_of(*entries, schema_version=99), newer, "99"),
            ("newer format", export_of(*entries, format="operator_db/2"), newer, "operator_db/2"),
            *(
                (repr(text), BytesIO(text), invalid, "")
                for text in (b"", b"\n", b"text", b"{}", b"[]", b"[7]")
            ),
        )
        for label, text, error, word in cases:
            with self.subTest(label), self.assert_unchanged(self.other):
                self.assert_refused(error, partial(db.import_, text), word)

    def test_a_secret_that_is_withheld_in_part_is_refused_by_line_and_field(self) -> None:
        db = self.open(self.other)
        for content in ({"a": {"b": "***"}}, [["***"]], {"a": SECRET, "b": [{"c": "***"}]}):
            line = {"namespace": "vaults", "key": "v", "status": None, "at": None}
            line["record"] = {"name": "v", "content": content}
            bring = partial(db.import_, export_of(line, withheld={"vaults": ["content"]}))
            with self.subTest(content=content), self.assert_unchanged(self.other):
                self.assert_refused(InvalidRecordError, bring, "line 2", "content")

    def test_an_import_into_a_new_file_gives_the_same_export(self) -> None:
        anything = [1, None, {"b": 2.5}]
        odd = PairedDevice(
            device_id="d:é", token=SECRET, part=Part("a", b"\xff"), anything=anything
        )
        with OperatorDb(self.path, durable=False) as db:
            devices_of(db).put(odd)
            devices_of(db).put(PairedDevice(device_id="lost", status="lost", last_seen=-5))
            description = '\0\x1b"\\\u202e\u2028'
            store_tasks(db, "%:漢字", description=description, reward_lamports=2**64 - 1)
            store_tasks(db, "***", description="***")  # stars that stand for nothing
            tallies_of(db).put(Tally(name="***", pin="***"))
            db.export(self.file, include_secrets=True)
        select = "SELECT * FROM devices ORDER BY key"
        for is_class_known in (False, True):
            path = f"{self.other}{is_class_known}"
            with self.subTest(is_class_known=is_class_known), OperatorDb(path) as db:
                if is_class_known:
                    devices_of(db)
                db.import_(self.file)
                self.assertEqual((exported(db), db.check()), (content_of(self.path), []))
                self.assertEqual(self.sql(select, path=path), self.sql(select))
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
        kept = {"unchanged": 1, "kept_capabilities": 1}
        self.assertEqual((counts["config"], counts["tallies"]), (kept, {"replaced": 1}))
        self.assertEqual(db.get_config().capabilities, ["other"])
        db.delete_task("t1")  # whose status was kept
        db.update_config(lambda config: replace(config, capabilities=[]))
        self.assertEqual(db.import_(self.file)["config"], {"replaced": 1})
        self.assertEqual(exported(db), self.lines)

    def test_the_input_is_read_before_the_write_lock_is_taken(self) -> None:
        def read() -> None:
            with open(reader, "rb") as pipe:
                db.import_(pipe, progress=lambda *_: began.set())

        reader, writer = os.pipe()
        began = threading.Event()
        db, another = self.open(self.other), self.open(self.other, timeout=0)
        whole = read_bytes(self.file)
        with in_background(read), open(writer, "wb") as pipe:
            pipe.write(whole[:-500])
            pipe.flush()
            self.assertTrue(began.wait(10))
            store_tasks(another, "meanwhile")
            pipe.write(whole[-500:])
        self.assertEqual(len(exported(db)), len(self.lines) + 1)


class ImportsNeverGoBack(ImportTest):
    def test_what_the_database_knows_more_of_is_kept(self) -> None:
        with OperatorDb(self.path) as db:
            db.update_task_status("t0", "completed", signature="sig")
            db.append_transcript("s0", "user", "later")
            db.append_command("s1", "later")
            db.mark_proof_submitted("t1", "sig")  # which was submitted before
            db.mark_proof_submitted("t3", "sig")
            with self.assert_unchanged():
                counts = db.import_(self.file)
            self.assertEqual({name for each in counts.values() for name in each}, {"unchanged"})
            db.export(self.file)
        db = self.open(self.other)  # and what the file knows more of arrives
        db.import_(export_of(*self.entries))
        counts = db.import_(self.file)
        replaced = {name: each["replaced"] for name, each in counts.items() if each["replaced"]}
        self.assertEqual(replaced, {"tasks": 1, "sessions": 2, "proofs": 2})
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

    def test_of_two_histories_the_later_is_kept_and_no_stored_entry_is_lost(self) -> None:
        def task(moves: list[tuple[str, int]]) -> TaskRecord:
            changes = [StatusChange(status=TaskStatus(name), at=at) for name, at in moves]
            return TaskRecord(task_id="t", claimed_at=0, history=changes, status=changes[-1].status)

        claimed, again = ("claimed", 0), ("claimed", 5)
        started, late, afresh = (("in_progress", at) for at in (10, 11, 40))
        early, done = ("completed", 5), ("completed", 20)
        disputed, lost = ("disputed", 20), ("disputed", 30)
        db, elsewhere = self.open(self.other), self.open(self.beside("elsewhere.db"))
        for stored, given, kept in (
            ([started], [done], [started, done]),
            ([started], [again, done], [started, again, done]),
            ([done], [started], [done]),
            ([done], [disputed], [done]),
            ([started, done], [late, lost], [started, done, late, lost]),
            ([started], [started, done], [started, done]),
            ([started, done], [started], [started, done]),
            ([started, early], [started], [started, early]),  # whatever its clock said
            ([started, again], [started], [started, again]),  # and was moved back
            ([done], [lost, afresh], [done]),  # it moved last, and is not as far
            ([done], [done, started], [done, started]),  # it went on, and was moved back
        ):
            for each, moves in ((elsewhere, given), (db, stored)):
                each.delete_task("t")
                each.store_task(task([claimed, *moves]))
            elsewhere.export(self.file)
            with self.subTest(stored=stored, given=given):
                counts = db.import_(self.file)
                self.assertEqual(counts["tasks"]["replaced"], int(kept != stored))
                merged, wanted = db.get_task("t"), task([claimed, *kept])
                self.assertEqual((merged.history, merged.status), (wanted.history, wanted.status))
                with self.assert_unchanged(self.other):
                    db.import_(self.file)

    def test_a_session_keeps_its_later_activity_its_first_time_and_every_link(self) -> None:
        def session(said: int, commands: int, *fields: Any) -> SessionState:
            """Return a session of so many entries; the fields are its links and times."""
            entry = TranscriptEntry(role="user", content="hello", timestamp=5)
            log: dict[str, Any] = {
                "transcript": [entry] * said,
                "command_history": ["x"] * commands,
            }
            names = ("active_task_ids", "created_at", "last_active")
            return SessionState(session_id="s", **log, **dict(zip(names, fields, strict=True)))

        first, second = "stored in the one", "given by the other"
        cases: tuple[tuple[str, SessionState, SessionState, SessionState], ...] = (
            (
                "the same log",
                session(1, 1, ["a", "b"], 3, 9),
                session(1, 1, ["c", "b", "d"], 2, 8),
                session(1, 1, ["a", "b", "c", "d"], 2, 9),
            ),
            (
                "the other goes on",
                session(1, 1, ["a"], 2, 9),
                session(3, 2, [], 3, 8),
                session(3, 2, ["a"], 2, 9),
            ),
            (
                "the one has gone on",
                session(3, 2, [], 3, 8),
                session(1, 1, ["a"], 2, 9),
                session(3, 2, ["a"], 2, 9),
            ),
            (
                "each goes on in a part of the log",
                session(3, 1, ["a"], 2, 8),
                session(1, 2, ["b"], 2, 9),
                session(3, 2, ["a", "b"], 2, 9),
            ),
            (
                "nothing to add",
                session(3, 2, ["a", "b"], 2, 9),
                session(1, 2, ["b"], 3, 8),
                session(3, 2, ["a", "b"], 2, 9),
            ),
        )
        one, another = self.open(self.beside(first)), self.open(self.beside(second))
        for label, stored, given, wanted in cases:
            with self.subTest(label), BytesIO() as moved:
                for db, each in ((one, stored), (another, given)):
                    db.delete_session("s")
                    db.store_session(each)
                another.export(moved)
                for outcome in ("unchanged" if wanted == stored else "replaced", "unchanged"):
                    moved.seek(0)
                    self.assertEqual(one.import_(moved), {"sessions": {outcome: 1}})
                    self.assertEqual(one.get_session("s"), wanted)
                self.assertEqual(one.check(), [])

    def test_a_configuration_keeps_its_fields_and_only_empty_ones_are_filled(self) -> None:
        full: dict[str, Any] = {
            "keypairs": {"main": SECRET},
            "rpc_endpoints": ["https://rpc"],
            "model_preferences": {"a": 1},
            "capabilities": ["voice"],
            "wallet_pubkey": DEVNET_WORKER,
            "network": "devnet",
        }
        others: dict[str, Any] = {
            "keypairs": {"main": "another", "more": SECRET},
            "rpc_endpoints": ["https://another"],
            "model_preferences": {"b": 2},
            "capabilities": ["text"],
            "wallet_pubkey": DEVNET_CREATOR,
            "network": "mainnet",
        }
        self.assertEqual(set(full), {each.name for each in dataclasses.fields(OperatorConfig)})
        empty = {"keypairs": {}, "rpc_endpoints": [], "model_preferences": {}, "capabilities": []}
        entries = [{"namespace": "config", "record": {**empty, **full}}]
        for name, other in others.items():
            stored = {name: other}
            without: Any = {"wallet_pubkey": None, "network": ""}.get(name, type(other)())
            for label, given, is_reported in (
                ("another", full, True),
                ("the same", {**full, name: other}, False),
                ("empty", {**full, name: without}, False),
            ):
                entries[0]["record"] = given
                with self.subTest(name, given=label), OperatorDb(":memory:", durable=False) as db:
                    db.store_config(OperatorConfig(**stored))
                    reported = {f"kept_{name}": 1} if is_reported else {}
                    counts = db.import_(export_of(*entries))
                    self.assertEqual(counts["config"], {"replaced": 1, **reported})
                    self.assertEqual(db.get_config(), OperatorConfig(**{**full, **stored}))
                    counts = db.import_(export_of(*entries))
                    self.assertEqual(counts["config"], {"unchanged": 1, **reported})

    def test_a_configuration_that_cannot_be_read_is_replaced_by_a_whole_one(self) -> None:
        with OperatorDb(self.path) as db:
            before = db.get_config()
            self.damage("config:operator")
            self.assertEqual(db.import_(self.file)["config"], {"replaced": 1})
            self.assertEqual(db.get_config(), before)

    def test_a_secret_that_is_withheld_stays_as_it_is_stored(self) -> None:
        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
            before = exported(db)
            with self.assert_unchanged():
                counts = db.import_(self.file)
            self.assertEqual({name for each in counts.values() for name in each}, {"unchanged"})
            tallies_of(db).update("two", lambda tally: replace(tally, count=5))
        with OperatorDb(self.path) as db:  # to which no class of a namespace is known
            self.assertEqual(db.import_(self.file)["tallies"], {"unchanged": 1, "replaced": 1})
            self.assertEqual(exported(db), before)

    def test_a_secret_that_is_withheld_and_not_stored_is_its_default_or_refused(self) -> None:
        @dataclass
        class Card:
            name: str
            pin: str = field(metadata={"secret": True})

        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
        self.assertNotIn(SECRET.encode(), read_bytes(self.file))
        db = self.open(self.other)
        bring = partial(db.import_, self.file)
        self.assert_refused(InvalidRecordError, bring, "line", "tallies.pin")
        self.assertEqual(exported(db), [])
        self.assertEqual((tallies_of(db).count(), wallets_of(db).count()), (0, 0))
        bring()
        self.assertNotIn(b"***", b"".join(exported(db)))
        self.assertEqual(tallies_of(db).get("two"), Tally(name="two"))

        cards = db.namespace("cards", Card, key="name")
        entry = {"namespace": "cards", "key": "one", "status": None, "at": None}
        for name, is_stored, word in (("one", False, "pin"), (1, True, "name")):
            entry["record"] = {"name": name, "pin": "***"}
            if is_stored:
                cards.put(Card("one", SECRET))
            bring = partial(db.import_, export_of(entry, withheld={"cards": ["pin"]}))
            with self.subTest(is_stored=is_stored), self.assert_unchanged(self.other):
                self.assert_refused(InvalidRecordError, bring, "line 2", word)
        entry["record"]["name"] = "one"
        counts = db.import_(export_of(entry, withheld={"cards": ["pin"]}))
        self.assertEqual((counts["cards"], cards.get("one").pin), ({"unchanged": 1}, SECRET))

    def test_a_damaged_record_is_not_given_up_for_one_without_its_secrets(self) -> None:
        with OperatorDb(self.path) as db:
            store_secrets(db)
            db.export(self.file)
            self.damage("config:operator")
            self.sql("DELETE FROM tasks")
            before = self.sql("SELECT * FROM config")
            bring = partial(db.import_, self.file)
            self.assert_refused(DamagedError, bring, "line", "config:operator")
            self.assertEqual((task_ids(db), self.sql("SELECT * FROM config")), ([], before))

    def test_a_record_of_a_class_that_has_changed_since_arrives_whole(self) -> None:
        @dataclass
        class Card:
            name: str
            colour: str
            pin: str = field(default="", metadata={"secret": True})

        @dataclass
        class Changed:
            name: str
            note: str = "none"

        with OperatorDb(self.path) as db:
            db.namespace("cards", Card, key="name").put(Card("one", "red", SECRET))
        with OperatorDb(self.path) as db, OperatorDb(self.other) as other:
            _, cards = (each.namespace("cards", Changed, key="name") for each in (db, other))
            db.export(self.file, include_secrets=True)
            other.import_(self.file)
            self.assertEqual((exported(other), cards.get("one")), (exported(db), Changed("one")))
            self.assertIn(SECRET.encode(), b"".join(exported(other)))
            self.assertNotIn(SECRET.encode(), b"".join(exported(db, include_secrets=False)))

    def test_no_default_of_an_older_file_replaces_what_was_filled_in_since(self) -> None:
        db, moved = self.open(self.other), BytesIO()
        store_tasks(db, "t", claimed_at=5)
        db.export(moved)
        known = {"description": "d", "reward_lamports": 7, "creator": "c", "payload": b"p"}
        task = db.update_task("t", lambda task: replace(task, **known))
        moved.seek(0)
        self.assertEqual(db.import_(moved), {"tasks": {"unchanged": 1}})
        self.assertEqual(db.get_task("t"), task)

    def test_an_import_that_lacks_only_the_completion_changes_nothing(self) -> None:
        db, moved = self.open(self.other), BytesIO()
        store_tasks(db, "t", "u", claimed_at=5)
        for name, status in (("t", "completed"), ("u", "completed"), ("u", "disputed")):
            db.update_task_status(name, status, signature="sig")
        db.export(moved)
        header, *lines = moved.getvalue().splitlines()
        entries = [json.loads(line) for line in lines]
        for entry in entries:
            self.assertIsNotNone(entry["record"]["completed_at"])
            entry["record"]["completed_at"] = None
        text = b"\n".join([header, *(json.dumps(entry).encode() for entry in entries)])
        with self.assert_unchanged(self.other):
            self.assertEqual(db.import_(BytesIO(text)), {"tasks": {"unchanged": 2}})


class ThePrototypesExportMovesIn(TransferTest):
    DOCUMENT = json.loads(PROTOTYPE_EXPORT)
    DAMAGE = (  # place, value there, what the error names
        ("tasks.1.payload", [256], "tasks[1] payload"),
        ("tasks.1.payload", 10**12, "tasks[1] payload"),
        ("tasks.0.status", "Lost", "tasks[0] status"),
        ("tasks.1.reward_lamports", -1, "tasks[1] reward_lamports"),
        ("tasks.1.mood", 1, "tasks[1] mood"),
        ("tasks", {}, "tasks"),
        ("tasks", REMOVED, ""),
        ("sessions.0.transcript.1.content", 5, "sessions[0] transcript"),
        ("sessions.0.mood", 5, "sessions[0] mood"),
        ("sessions.0", None, "sessions[0]"),
        ("config.capabilities", "voice", "config capabilities"),
        ("config.rpc_url", {SECRET: 1}, "config rpc_endpoints"),
        ("config", [SECRET], "config"),
        ("stats.total_tasks", 4, "total_tasks"),
        ("proofs", [], "proofs"),
        *((f"tasks.0.{name}", REMOVED, f"tasks[0] {name}") for name in DOCUMENT["tasks"][0]),
    )

    def test_every_field_arrives_however_the_document_is_printed(self) -> None:
        given = json.loads(PROTOTYPE_EXPORT)
        for task in given["tasks"]:
            task |= {"payload": bytes(task["payload"]), "status": TaskStatus(task["status"])}
        (session,) = given["sessions"]
        session["transcript"] = [TranscriptEntry(**entry) for entry in session["transcript"]]
        config = {**given["config"], "model_preferences": {}}
        config["rpc_endpoints"] = [config.pop("rpc_url")]
        for label, text in (
            ("pretty-printed", PROTOTYPE_EXPORT),
            ("on one line", json.dumps(self.DOCUMENT)),
            ("with a byte order mark", "\ufeff" + PROTOTYPE_EXPORT),
        ):
            with self.subTest(label), OperatorDb(self.beside(label), durable=False) as db:
                for outcome in ("added", "unchanged"):
                    counts = db.import_(BytesIO(text.encode()))
                    self.assertEqual(counts.pop("proofs"), {"left_behind": 1})
                    self.assertEqual([*counts.values()], [{outcome: n} for n in (1, 2, 1)])
                for wanted in given["tasks"]:
                    task = db.get_task(wanted["task_id"])
                    self.assertEqual({name: getattr(task, name) for name in wanted}, wanted)
                    self.assertEqual(task.history[-1].status, task.status)
                self.assertEqual(db.list_sessions(), [SessionState(**session)])
                self.assertEqual(db.get_config(), OperatorConfig(**config))
                self.assertEqual((db.check(), db.list_proofs()), ([], []))

    def test_a_damaged_document_is_refused_by_place(self) -> None:
        db = self.open(self.other)
        store_tasks(db, "there")
        whole = PROTOTYPE_EXPORT
        cases = [
            (json.dumps(with_field(self.DOCUMENT, place, value)), words)
            for place, value, words in self.DAMAGE
        ]
        cases += [(whole[:-1], ""), (whole[:500], ""), (whole + "x", "")]
        cases += [(whole.replace("null", "NaN", 1), "NaN")]
        for text, words in cases:
            with self.subTest(words, end=text[-9:]), self.assert_unchanged(self.other):
                bring = partial(db.import_, StringIO(text))
                self.assert_refused(InvalidRecordError, bring, *words.split())

    def test_a_document_without_values_replaces_none(self) -> None:
        db = self.open(self.other)
        text = json.dumps({**self.DOCUMENT, "config": None, "sessions": [], "stats": {}})
        self.assertEqual(db.import_(StringIO(text)), {"tasks": {"added": 2}})
        self.assertIsNone(db.get_config())
        values = {"network": "devnet", "capabilities": ["voice"], "model_preferences": {"a": 1}}
        config = OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=["https://rpc"], **values)
        db.store_config(config)
        for empty in (dict.fromkeys(self.DOCUMENT["config"]), {}):
            db.import_(StringIO(json.dumps({**self.DOCUMENT, "config": empty})))
            self.assertEqual(db.get_config(), config)


class BackupsAreWholeAndChecked(TransferTest):
    def test_a_name_that_is_taken_is_never_replaced_not_even_meanwhile(self) -> None:
        """Nor is a database that has a write-ahead log, and so is open elsewhere."""
        db, log = self.open(), self.other + "-wal"
        overwrite = partial(db.backup, overwrite=True)
        for verb, taken, meanwhile in (
            *itertools.product((db.backup,), (self.other, log), (False, True)),
            *itertools.product((db.export, overwrite), (log,), (False, True)),
            (db.write_metrics, log, False),
        ):
            take_name = partial(write_bytes, taken, b"somebody's")
            if not meanwhile:
                take_name()
            options = {"progress": at_progress(0.0, take_name)} if meanwhile else {}
            with self.subTest(verb=verb, taken=taken, meanwhile=meanwhile):
                self.assert_refused(StorageError, partial(verb, self.other, **options), taken)
                self.assertEqual(read_bytes(taken), b"somebody's")
                found = [name for name in os.listdir(self.folder) if "operator.db" not in name]
                self.assertEqual(found, [os.path.basename(taken)])
            os.unlink(taken)
        write_bytes(self.other, b"old")
        overwrite(self.other)
        self.assertEqual(content_of(self.other), content_of(self.path))

    def test_backup_restore_and_compact_are_refused_inside_a_transaction(self) -> None:
        db, other = self.open(), self.open(self.other)
        other.backup(self.file)
        backup, restore = partial(db.backup, self.beside("new")), partial(db.restore, self.file)
        for verb in (backup, restore, db.compact):
            with self.subTest(verb=verb), self.assert_unchanged(), db.transaction():
                self.assert_refused(ConflictError, verb, "transaction")


class RestoresReplaceEverything(TransferTest):
    def setUp(self) -> None:
        super().setUp()
        fill(self.other, tasks=5)
        with OperatorDb(self.other, durable=False) as db:
            wallets_of(db)
        self.old, self.new = content_of(self.path), content_of(self.other)

    def test_everyone_who_has_the_database_open_goes_on_with_what_was_restored(self) -> None:
        def go_on() -> list[list[str]]:
            with OperatorDb(self.path) as db:
                before = task_ids(db)
                turn.wait()
                turn.wait()
                after = task_ids(db)
                store_tasks(db, "from the other process")
                return [before, after]

        turn = multiprocessing.get_context("fork").Barrier(2, timeout=10)
        process = Child(lambda _: go_on())
        turn.wait()
        with OperatorDb(self.path) as db, OperatorDb(self.path) as another:
            tallies = tallies_of(another)
            self.assertEqual((len(task_ids(another)), tallies.count()), (10, 1))
            db.restore(self.other)
            self.assertEqual(os.stat(self.path + "-wal").st_size, 0)
            self.assertEqual((exported(db), exported(another)), (self.new, self.new))
            turn.wait()
            self.assertEqual([len(names) for names in process.result()], [10, 5])
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
        for number, space in enumerate(spaces):
            self.assertEqual((space.count(), space.get("one")), (number, None))
            space.put(Tally(name=str(number)))
        self.assertEqual((db.stats().records["tallies"], another.check()), (2, []))

    def test_what_is_no_sound_backup_is_refused_by_its_path(self) -> None:
        sound, db = read_bytes(self.other), self.open()
        tallies = tallies_of(db)
        trigger = "CREATE TRIGGER planted AFTER INSERT ON {0} BEGIN DELETE FROM {0}; END"
        # bytes are the whole file; text is what another program executes on a sound one
        cases: tuple[tuple[str, type[OperatorDbError], bytes | str], ...] = (
            ("damaged", DamagedError, "UPDATE tasks SET crc = crc + 1"),
            ("cut short", DamagedError, sound[:-5000]),
            ("newer", NewerSchemaError, "PRAGMA user_version = 99"),
            ("another's", ForeignFileError, "PRAGMA application_id = 7"),
            ("no database", ForeignFileError, b"some text " * 99),
            ("a trigger", ForeignFileError, trigger.format("tallies")),
            ("a trigger where we have no table", ForeignFileError, trigger.format("wallets")),
            ("an index", ForeignFileError, "CREATE INDEX planted ON tallies(key)"),
            ("other columns", ForeignFileError, "DROP TABLE tallies; CREATE TABLE tallies(key)"),
            ("a view", ForeignFileError, "DROP TABLE tallies; CREATE VIEW tallies AS SELECT 1"),
        )
        for label, expected, crafted in cases:
            write_bytes(self.other, crafted if isinstance(crafted, bytes) else sound)
            if isinstance(crafted, str):
                self.script(crafted, path=self.other)
            with self.subTest(label), self.assert_unchanged():
                error = self.assert_refused(expected, partial(db.restore, self.other), self.other)
                self.assertNotIn(".new", str(error))  # the name of a temporary copy
                tallies.put(Tally(name="one", count=1))  # as it is: no lock is held
        missing = self.beside("missing.db")
        self.assert_refused(StorageError, partial(db.restore, missing), missing)
        self.assert_refused(ForeignFileError, partial(db.restore, self.folder), self.folder)

    def test_what_was_checked_is_what_is_restored(self) -> None:
        """However the backup changes meanwhile: a copy of it is checked, and restored."""
        change = "UPDATE tallies SET crc = crc {} 1"  # of a record that is checked late
        worsen, mend = (partial(self.sql, change.format(sign), path=self.other) for sign in "+-")
        db = self.open()
        for part in (0.0, 1.0):
            db.restore(self.other, progress=at_progress(part, worsen))
            self.assertRaises(DamagedError, content_of, self.other)
            self.assertEqual((exported(db), db.check()), (self.new, []))
            store_tasks(db, "not in the backup")
            mend()
        worsen()
        with self.assert_unchanged():
            restore = partial(db.restore, self.other, progress=at_progress(0.0, mend))
            self.assert_refused(DamagedError, restore, "tallies:one", self.other)
        self.assertEqual(content_of(self.other), self.new)

    def test_a_restore_waits_for_another_process_until_its_timeout(self) -> None:
        child = holding_the_lock(self.path)
        with OperatorDb(self.path, timeout=0.05) as db:
            self.assert_refused(BusyError, lambda: db.restore(self.other))
        child.kill()
        self.assertEqual(content_of(self.path), self.old)

    def test_neither_restore_nor_compact_is_done_on_a_file_that_was_removed(self) -> None:
        for label in ("restore", "compact"):
            with self.subTest(label), OperatorDb(self.beside(label)) as db:
                store_tasks(db, "t")
                self.assertEqual(task_ids(db), ["t"])  # and so both its connections are open
                os.unlink(db.path)
                verb = partial(db.restore, self.other) if label == "restore" else db.compact
                self.assert_refused(StorageError, verb, db.path)

    def test_a_copy_that_another_program_made_is_restored_opened_and_still_shrinks(self) -> None:
        fields = {"status": "completed", "claimed_at": 5, "payload": bytes(4000)}
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"old{n}" for n in range(200)), **fields)
        wanted = content_of(self.path)
        for label, settings in (
            ("as it is", ""),
            ("without auto_vacuum", "PRAGMA auto_vacuum = NONE"),
            ("in DELETE mode", "PRAGMA journal_mode = DELETE"),
        ):
            copy, new = self.beside(f"{label}.copy"), self.beside(f"{label}.new.db")
            if label == "in DELETE mode":
                shutil.copy(self.path, copy)
                self.script(settings, path=copy)
            else:
                self.script(f"{settings}; VACUUM INTO '{copy}'")
            os.chmod(copy, 0o600)
            with self.subTest(label):
                self.assertEqual(run_main("--db-path", new, "restore", copy)[0], 0)
                with OperatorDb(self.other, durable=False) as db:
                    db.restore(copy)
                for path in (new, self.other):
                    self.assertTrue(content_of(path) == wanted)
                    with OperatorDb(path, durable=False) as db:
                        report = db.prune(0)
                    self.assertLess(report.bytes_after, report.bytes_before / 3)
                    self.assert_sound(path)
                    os.unlink(path)
                with OperatorDb(copy) as db:
                    store_tasks(db, "opened")
                    self.assertEqual(db.check(), [])


class CompactingGivesSpaceBack(TransferTest):
    def test_the_file_is_smaller_and_every_record_in_its_order(self) -> None:
        with OperatorDb(self.path, durable=False) as db, OperatorDb(self.path) as another:
            names = [f"{n * 7919 % 400:03}" for n in range(400)]
            with db.transaction():
                store_tasks(db, *names, payload=bytes(3000), claimed_at=5)
            with db.transaction():
                for name in names[::2]:
                    db.delete_task(name)
            before, order = exported(db), db.list_tasks()
            ((size,),) = self.sql(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            )
            freed = db.compact()
            self.assertLess(os.stat(self.path).st_size, size * 0.7)
            self.assertGreater(freed, size * 0.3)
            self.assertEqual((exported(another), another.list_tasks()), (before, order))
            store_tasks(another, "goes on")
        self.assert_sound()

    def test_compacting_loses_nothing_whatever_happens(self) -> None:
        def delete_and_compact(db: OperatorDb) -> None:
            db.delete_task("large0")
            db.compact()

        self.fill_large(self.path, tasks=8)
        outcomes = self.assert_all_or_nothing(delete_and_compact, tries=6)
        self.assertGreater(outcomes["full disk: after"], 1)


class TransfersSpareOtherFiles(TransferTest):
    def test_the_files_of_a_database_that_is_open_here_are_refused(self) -> None:
        """To open and close one as a plain file would drop the locks that SQLite holds on it."""

        def identities() -> list[tuple[int, int]]:
            return [(found.st_ino, found.st_size) for found in map(os.stat, files)]

        db, other = self.open(), self.open(self.other)
        store_tasks(db, "in the log")
        files = [self.path + ending for ending in ("", "-wal", "-shm")]
        os.symlink(self.path, self.path + ".link")
        os.link(self.path, self.path + ".hard")
        roundabout = os.path.join(self.folder, "..", os.path.basename(self.folder), "operator.db")
        before = identities()
        for path in (*files, self.path + ".link", self.path + ".hard", roundabout):
            for verb in (
                db.restore,  # into another one is allowed: it goes through SQLite
                *(db.export, db.import_, db.write_metrics, partial(db.backup, overwrite=True)),
                *(other.export, other.import_, other.write_metrics),
                partial(other.backup, overwrite=True),
            ):
                with self.subTest(verb=verb, path=path):
                    self.assertRaises(OperatorDbError, verb, path)
                    self.assertEqual(identities(), before)
        self.assertIsNotNone(db.get_task("in the log"))
        try_to_lock = (
            "import fcntl; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        for path in (self.path, self.path + "-shm"):
            self.assertIn("BlockingIOError", run_program(try_to_lock, path).stderr)

    def test_a_database_that_was_closed_here_is_a_file_like_any_other(self) -> None:
        db = self.open()
        overwrite = partial(db.backup, overwrite=True)
        for number, verb in enumerate((db.export, overwrite, db.write_metrics, db.restore)):
            with self.subTest(verb=verb):
                closed = OperatorDb(self.beside(f"{number}.db"))
                closed.close()
                verb(closed.path)
        self.assertEqual(task_ids(db), [], "an empty one was restored")

    def transfers(self) -> Iterator[tuple[OperatorDb, Callable[..., object], float]]:
        """Yield transfers that write much, and the last part of their progress that can be lost."""
        self.fill_large(self.path, tasks=40)
        db, old, backup = self.open(), self.beside("old"), self.beside("backup.db")
        write_bytes(old, b"old")
        db.export(self.file, include_secrets=True)
        db.backup(backup)
        db.delete_task("large0")
        ((pages,),) = self.sql("PRAGMA page_count", path=backup)

        def restore_pages(progress: Callable[[int, int], None]) -> None:
            """Restore, and report no progress but of the pages, which are copied last."""
            db.restore(backup, progress=lambda done, of: of == pages and progress(done, of))

        yield db, partial(db.export, old), 1.0
        yield db, partial(db.backup, old, overwrite=True), 1.0
        yield db, partial(db.backup, self.other), 1.0
        yield db, partial(db.import_, self.file), 1.0
        yield db, partial(db.restore, backup), 1.0
        yield db, restore_pages, 0.5
        self.assertEqual((read_bytes(old), os.path.exists(self.other)), (b"old", False))

    def test_a_transfer_that_is_interrupted_or_killed_leaves_everything_as_it_was(self) -> None:
        for _, verb, last in self.transfers():
            for part in (0.01, last):
                with self.subTest(verb=verb, part=part):
                    before = content_of(self.path)
                    with self.assert_unchanged(), self.assertRaises(KeyboardInterrupt):
                        verb(progress=interrupt_when(part))
                    paused_at(verb, part).kill()  # it would wait for a lock that is still held
                    self.assertTrue(content_of(self.path) == before)

    def test_a_transfer_without_room_leaves_everything_as_it_was(self) -> None:
        def work(db: OperatorDb, verb: Callable[..., object]) -> None:
            with ExitStack() as stack:
                limit = partial(stack.enter_context, file_size_limit(100_000))
                run = partial(verb, progress=at_progress(0.01, limit))
                self.assert_refused(StorageError, run, self.folder)
            store_tasks(db, "room again")
            db.delete_task("room again")

        for db, verb, _ in self.transfers():
            with self.subTest(verb=verb), self.assert_unchanged():
                in_child(partial(work, db, verb))

    def test_progress_rises_to_its_total_and_an_error_of_its_function_is_passed_on(self) -> None:
        def report(part: float, done: int, total: int) -> None:
            calls.append((done, total))
            if not part or (total and done >= total * part):
                raise error

        error, calls = TimeoutError("mine"), list[tuple[int, int]]()
        db, other, backup = self.open(), self.open(self.other), self.beside("backup.db")
        db.export(self.file, include_secrets=True)
        db.backup(backup)
        for verb in (
            partial(db.export, self.beside("new")),
            partial(db.backup, self.beside("new.db")),
            partial(other.import_, self.file),
            partial(other.restore, backup),
        ):
            for part in (0.0, 1.0):
                with self.subTest(verb=verb, part=part), self.assert_unchanged(self.other):
                    with self.assertRaises(OSError) as caught:
                        verb(progress=partial(report, part))
                    self.assertIs(caught.exception, error)
            calls.clear()
            verb(progress=partial(report, 2.0))
            totals = {total for _, total in calls if total}  # of pages and of records
            for total in totals:
                done = [done for done, of in calls if of == total]
                with self.subTest(verb=verb, total=total):
                    self.assertEqual((done, done[-1]), (sorted(done), total))
            self.assertTrue(totals)

    def test_a_child_that_a_progress_function_forks_removes_no_file_of_its_parent(self) -> None:
        def fork_and_wait() -> None:
            if not (child := os.fork()):
                raise SystemExit
            os.waitpid(child, 0)

        parent, db = os.getpid(), self.open()
        for verb, part in itertools.product((db.export, db.backup), (0.0, 1.0)):
            target = f"{self.other}-{verb.__name__}-{part}"
            try:
                verb(target, progress=at_progress(part, fork_and_wait))
            finally:
                if os.getpid() != parent:
                    os._exit(0)
            with self.subTest(verb=verb, part=part):
                lines = content_of(target) if verb == db.backup else read_bytes(target).splitlines()
                wanted = exported(db, include_secrets=verb == db.backup)
                self.assertLessEqual(set(wanted), set(lines))
        self.assertEqual(len(self.names()), 5)


class MetricsCountEveryCall(DatabaseTest):
    def setUp(self) -> None:
        super().setUp()
        fill(self.path, tasks=10)

    def test_every_call_of_sixteen_threads_of_this_process_is_counted_and_its_error_by_name(
        self,
    ) -> None:
        db, tallies, other = self.db, tallies_of(self.db), proof("t1", b"different")
        calls: tuple[tuple[str, Callable[[], object], str], ...] = (
            ("store_task", lambda: store_tasks(db, "new"), ""),
            ("get_task", lambda: db.get_task("t1"), ""),
            ("update_task_status", lambda: db.update_task_status("?", "resolved"), "NotFoundError"),
            ("store_proof", lambda: db.store_proof(other), "ConflictError"),
            ("tallies.put", lambda: tallies.put(other), "InvalidRecordError"),
            ("tallies.get", lambda: tallies.get("one"), ""),
        )

        def work() -> None:
            for _, call, _ in calls * 6:
                with suppress(OperatorDbError):
                    call()

        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        began = time.perf_counter()
        run_in_threads(*[work] * 16)
        elapsed = time.perf_counter() - began
        operations = db.stats().operations
        counted = {name: (each.count, each.errors) for name, each in operations.items()}
        wanted = {name: (96, {error: 96} if error else {}) for name, _, error in calls}
        self.assertEqual({**counted, "stats": None}, {**wanted, "stats": None})
        for latency in operations.values():
            self.assertTrue(0 < latency.seconds < elapsed * 16)
        self.assertEqual(in_child(lambda: db.stats().operations), {})

    def test_a_latency_is_counted_in_its_bucket_in_fixed_memory(self) -> None:
        latency, bounds = operator_db.Latency(), operator_db.Latency.bounds
        self.assertEqual(bounds, tuple(sorted(bounds)))
        self.assertTrue(bounds[0] <= 1e-4 and bounds[-1] >= 1)
        before = sys.getallocatedblocks()
        for seconds in (0.0, *bounds, bounds[-1] * 2) * 1000:
            latency.add(seconds)
        self.assertLess(sys.getallocatedblocks() - before, 1000)
        self.assertEqual(latency.buckets, [2000, *[1000] * len(bounds)])
        self.assertEqual(latency.count, (len(bounds) + 2) * 1000)
        self.assertAlmostEqual(latency.seconds / 1000, sum(bounds) + bounds[-1] * 2)

    def test_statistics_are_true_of_records_files_and_free_space(self) -> None:
        connections = self.watch_connections()
        stats = self.db.stats()
        entries = sum(
            len(each.transcript) + len(each.command_history) for each in self.db.list_sessions()
        )
        records = {"tasks": 10, "sessions": 3, "session_log": entries, "proofs": 5}
        self.assertEqual(stats.records, {**records, "config": 1, "tallies": 1})
        self.assertEqual((stats.tasks, stats.unsubmitted_proofs), (self.db.count_tasks(), 2))
        for name, suffix in (("database", ""), ("wal", "-wal"), ("shm", "-shm")):
            self.assertEqual(stats.files[name], os.stat(self.path + suffix).st_size)
        self.assertEqual(stats.bytes.keys(), stats.records.keys())
        self.assertTrue(all(size >= 8192 for size in stats.bytes.values()), stats.bytes)
        self.assertLessEqual(sum(stats.bytes.values()) + stats.free, stats.files["database"])
        store_tasks(self.db, "large", payload=bytes(2_000_000))
        self.db.delete_task("large")
        pragmas = ("user_version", "freelist_count", "page_size")
        version, free, size = (self.sql(f"PRAGMA {name}")[0][0] for name in pragmas)
        self.assertEqual((stats.path, stats.schema_version), (self.path, version))
        self.assertEqual(self.db.stats().free, free * size)
        self.assertGreater(free * size, 10**6)

        def refuse_dbstat(action: int, table: str | None, *_: object) -> int:
            return sqlite3.SQLITE_DENY if table == "dbstat" else sqlite3.SQLITE_OK

        for connection in connections:
            with suppress(sqlite3.ProgrammingError, ClosedError):  # it is closed by now
                connection.set_authorizer(refuse_dbstat)
        stats = self.db.stats()  # as where SQLite cannot tell sizes by namespace
        self.assertEqual((stats.bytes, stats.records["tasks"]), ({}, 10))
        self.assertNotIn("operator_db_namespace_bytes{", self.db.prometheus())

    def test_the_prometheus_text_has_what_stats_returns_and_names_the_database(self) -> None:
        def sample(name: str, value: float, **labels: object) -> str:
            names = {"database": self.beside(r"a \"b\"\\\n.db"), **labels}
            text = ",".join(f'{label}="{each}"' for label, each in names.items())
            return f"operator_db_{name}{{{text}}} {value}"

        db = self.open(self.beside('a "b"\\\n.db'))
        store_tasks(db, "t")
        devices_of(db).put(PairedDevice(device_id="d"))
        with suppress(NotFoundError):
            db.update_task_status("nobody", "completed")
        text, stats = db.prometheus(), db.stats()
        failed = {"operation": "update_task_status", "error": "NotFoundError"}
        wanted = [
            sample("unsubmitted_proofs", stats.unsubmitted_proofs),
            sample("free_bytes", stats.free),
            sample("operation_errors_total", 1, **failed),
            *(sample("tasks", count, status=name) for name, count in stats.tasks.items()),
            *(sample("file_bytes", size, file=name) for name, size in stats.files.items()),
        ]
        for name in stats.records:
            wanted.append(sample("records", stats.records[name], namespace=name))
            wanted.append(sample("namespace_bytes", stats.bytes[name], namespace=name))
        for name in ("store_task", "devices.put", "update_task_status"):
            latency, duration = stats.operations[name], "operation_duration_seconds"
            wanted.append(sample(f"{duration}_sum", latency.seconds, operation=name))
            wanted.append(sample(f"{duration}_count", 1, operation=name))
            counts = itertools.accumulate(latency.buckets)
            for bound, count in zip((*latency.bounds, "+Inf"), counts, strict=True):
                wanted.append(sample(f"{duration}_bucket", count, operation=name, le=bound))
        samples = [line for line in text.splitlines() if line[0] != "#" and "_info{" not in line]
        self.assertEqual(sorted(samples), sorted(wanted))
        head = r"# HELP (\w+) \S.*\n# TYPE \2 (counter|gauge|histogram)\n"
        self.assertRegex(text, rf"\A({head}(\2\w*\{{.+\}} \S+\n)*)+\Z")

    def test_a_metrics_file_is_replaced_as_a_whole(self) -> None:
        target = self.beside("operator_db.prom")
        self.db.write_metrics(target)
        with open(target, encoding="utf-8") as old:  # who reads meanwhile goes on with it
            self.db.write_metrics(Path(target))
            self.assertNotEqual(os.stat(target).st_ino, os.fstat(old.fileno()).st_ino)
            for text in (old.read(), read_bytes(target).decode()):
                self.assertRegex(text, r"(?s)\A# HELP .*\noperator_db_tasks\{.*\n\Z")
        self.assertEqual(self.names(), {"operator.db", "operator_db.prom"})


# What takes over a terminal, moves its cursor, reverses its text or is invisible; then what is wide
STEERING = "\x1b]0;owned\x07\r\n\t\x9b31m\u202e\u200b é漢字\U0001f600"
OLD, WIDE = "é字\U0001f600", "漢字" * 12  # ids of tasks
INSPECTIONS = (
    "stats, stats --prometheus, list-tasks, list-proofs, list-sessions, get tasks:t1, "
    "get sessions:voice, get config:operator, get tallies:one, keys tasks, check, export, "
    "prune --dry-run, dispute t1"
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
        now = int(time.time())
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, OLD, claimed_at=now - 3 * DAY, description=STEERING)
            store_tasks(db, WIDE, description="漢字 é " * 30, reward_lamports=1_500_000_000)
            store_tasks(db, "odd", claimed_at=LAST_SECOND, reward_skr_tokens=7)
            store_tasks(db, "ที่นี่", description="combined")
            db.append_transcript("voice", "user", STEERING + "漢字" * 50)
            db.store_config(OperatorConfig(keypairs={"main": SECRET}, rpc_endpoints=[SECRET]))

    def run_command(
        self, *arguments: str, stdin: bytes = b"", encoding: str = "utf-8"
    ) -> tuple[int, str, str]:
        """Run a command in this process; return its status, what it printed, and its message.

        Fails when any of that would steer a terminal. The standard streams have this encoding.
        """
        out, err = BytesIO(), BytesIO()
        streams: dict[str, Any] = {
            name: TextIOWrapper(stream, encoding=encoding)
            for name, stream in {"stdin": BytesIO(stdin), "stdout": out, "stderr": err}.items()
        }
        with mock.patch.multiple(sys, **streams):
            try:
                status = operator_db.main(list(arguments))
            except SystemExit as ended:
                status = int(ended.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
        printed, message = out.getvalue().decode(), err.getvalue().decode()
        if "export" not in arguments:  # which is for programs, and in UTF-8
            self.assertTrue((printed + message).replace("\n", "").isprintable(), arguments)
        return status, printed, message

    def printed(self, *arguments: str, status: int = 0, **options: Any) -> str:
        """Return what a command prints; fail unless it ends with this status, and no message."""
        found, printed, message = self.run_command(*arguments, **options)
        self.assertEqual((found, message), (status, ""), arguments)
        return printed

    def facts(self, *arguments: str, status: int = 0, **options: Any) -> Any:
        """Return what a command prints with `--json`."""
        return json.loads(self.printed(*arguments, "--json", status=status, **options))

    def failure(self, *arguments: str, status: int = 1, **options: Any) -> str:
        """Return the last line of the message with which a command fails, as it must."""
        found, printed, message = self.run_command(*arguments, **options)
        self.assertEqual((found, printed), (status, ""), arguments)
        self.assertTrue(status == 2 or message.count("\n") == 1, message)
        self.assertRegex(message, r"(?m)^operator_db.*: .+\n\Z")
        return message.splitlines()[-1]

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
        records: dict[str, Any] = {}
        for line in lines:
            names = (line["record"].get(name) for name in ("task_id", "session_id", "name"))
            key = f"{line['namespace']}:{next(filter(None, names), 'operator')}"
            records[key] = line["record"]
        self.assertEqual(sum(header["records"].values()), len(records))
        self.assertEqual(records["config:operator"]["keypairs"], "***")

        def tasks(**options: Any) -> list[Any]:
            return [records[f"tasks:{task.task_id}"] for task in self.db.list_tasks(**options)]

        def proofs(**options: Any) -> list[Any]:
            return [records[f"proofs:{log.task_id}"] for log in self.db.list_proofs(**options)]

        sessions = [records[f"sessions:{each.session_id}"] for each in self.db.list_sessions()]
        bundle, stats = self.db.dispute_bundle("t1"), vars(self.db.stats()).copy()
        stats.pop("operations")
        write_bytes(self.file, json.dumps(bundle).encode())
        digest = bundle["evidence_hash"]
        by_hash = f"--evidence-hash {digest}"
        wanted: dict[str, Any] = {
            "stats": stats,
            "list-tasks": tasks(),
            "list-tasks --status InProgress": tasks(status="in_progress"),
            "list-tasks --limit 3 --newest-first": tasks(limit=3, newest_first=True),
            "list-proofs": proofs(),
            "list-proofs --unsubmitted": proofs(submitted=False),
            "list-sessions": sessions,
            "list-sessions --limit 2": sessions[:2],
            "prune --dry-run": vars(self.db.prune(dry_run=True)),
            "prune --dry-run --older-than 40000": vars(self.db.prune(40_000, dry_run=True)),
            "prune --dry-run --session-days 40000": vars(self.db.prune(30, 40_000, dry_run=True)),
            "prune --dry-run --proof-days 1": vars(self.db.prune(proof_days=1, dry_run=True)),
            "check": {"path": self.path, "problems": []},
            "dispute t1": bundle,
            f"verify {self.file}": {"problems": [], "evidence_hash": None},
            f"verify {self.file} {by_hash}": {"problems": [], "evidence_hash": digest},
            **{f"get {key}": record for key, record in records.items()},
        }
        for name in ("tasks", "proofs", "sessions", "tallies"):
            wanted[f"keys {name}"] = [key for key in records if key.startswith(f"{name}:")]
        for command, facts in wanted.items():
            with self.subTest(command=command):
                self.assertEqual(self.facts(*command.split()), json.loads(json.dumps(facts)))
        completed = f'status="completed"}} {stats["tasks"]["completed"]}\n'
        self.assertIn(completed, self.printed("stats", "--prometheus"))

    def test_each_change_is_made_and_its_result_reported(self) -> None:
        before = content_of(self.path)
        self.assertEqual(self.printed("export", "-o", self.file, "--include-secrets"), "")
        export = read_bytes(self.file)
        self.assertEqual(export.splitlines()[1:], before)
        copied = self.facts("backup", self.other)
        self.assertEqual(copied, {"path": self.other, "bytes": os.stat(self.other).st_size})
        self.assertEqual(self.facts("backup", self.other, "--overwrite"), copied)
        days = ("--older-than", "0", "--session-days", "1", "--proof-days", "1")
        removed = self.facts("prune", *days)
        self.assertEqual([removed[name] for name in ("tasks", "sessions", "proofs")], [2, 3, 1])
        self.assertEqual(self.facts("compact")["bytes"], os.stat(self.path).st_size)
        counts = self.facts("import", self.file)
        self.assertEqual(counts["tasks"], {"added": 2, "unchanged": 12})
        self.assertEqual(content_of(self.path), before)
        self.assertEqual(self.facts("import", "-", stdin=export)["tasks"], {"unchanged": 14})
        os.unlink(self.path)
        self.assertEqual(self.facts("restore", self.other)["records"]["tasks"], 14)
        self.assertEqual(content_of(self.path), before)
        self.printed("stats", "--prometheus", "-o", self.file)
        self.assertIn(b"\noperator_db_tasks{", read_bytes(self.file))
        self.assertEqual(self.facts("repair"), {"path": self.path, "done": []})
        self.assertIn("left as it is", self.printed("repair"))
        self.damage("tasks:t3")
        kept, line = self.facts("repair", "--from", self.other)["done"]
        self.assertRegex(kept + line, rf"{self.path}.*damaged.*tasks:t3.*{self.other}")
        self.assertEqual(content_of(self.path), before)
        self.damage("tasks:t3")
        self.assertRegex(self.printed("repair"), r"damaged\n.*tasks:t3.* lost\n.*sound")
        for command in ("prune", "compact", f"restore {self.other}", f"backup {self.file}2"):
            self.assertRegex(self.printed(*command.split()), r"\d")

    def test_an_import_names_the_fields_of_the_configuration_that_it_has_kept(self) -> None:
        os.environ["AGENC_DB_PATH"] = self.other
        write_bytes(self.file, PROTOTYPE_EXPORT.encode())
        with OperatorDb(self.other) as db:
            db.store_config(OperatorConfig(network="another", capabilities=["another"]))
        first, again = self.printed("import", self.file), self.facts("import", self.file)
        self.assertRegex(first, r"(?m)^config: 1 replaced$")
        self.assertRegex(first, r"(?m)^config: kept .*: capabilities, network$")
        self.assertEqual(
            again["config"], {"unchanged": 1, "kept_capabilities": 1, "kept_network": 1}
        )

    def test_an_import_from_the_prototype_reports_the_proofs_that_it_lacks(self) -> None:
        write_bytes(self.file, PROTOTYPE_EXPORT.encode())
        self.assertRegex(self.printed("import", self.file), r"(?mi)^(?=.*prototype).*proofs")
        self.assertIn("left_behind", self.facts("import", self.file)["proofs"])

    def test_the_path_comes_from_the_last_option_else_the_environment(self) -> None:
        wanted = [f"proofs:t{n}" for n in range(1, 10, 2)]
        self.assertEqual(self.facts("keys", "proofs"), wanted)
        os.environ["AGENC_DB_PATH"] = self.other
        for arguments in (
            ("--json", "--db-path", self.path, "keys", "proofs"),
            ("--db-path", self.path, "keys", "--json", "proofs"),
            ("--db-path", self.other, "keys", "proofs", "--json", f"--db-path={self.path}"),
        ):
            with self.subTest(arguments=arguments):
                self.assertEqual(json.loads(self.printed(*arguments)), wanted)

    def test_import_and_restore_make_a_private_database_of_what_is_good_alone(self) -> None:
        backup = self.beside("backup.db")
        self.printed("export", "-o", self.file, "--include-secrets")
        self.printed("backup", backup)
        self.addCleanup(os.umask, os.umask(0))
        for verb, source in (("import", self.file), ("restore", backup)):
            good = read_bytes(source)
            write_bytes(source, good.replace(b'"claimed_at"', b'"claimed_by"'))
            with self.assert_unchanged():
                self.failure("--db-path", self.other, verb, source)
            write_bytes(source, good)
            self.printed("--db-path", self.other, verb, source)
            self.assertEqual(content_of(self.other), content_of(self.path))
            self.assertEqual(stat.S_IMODE(os.stat(self.other).st_mode), 0o600)
            os.unlink(self.other)

    def test_an_import_reads_a_named_pipe(self) -> None:
        pipe = self.beside("pipe")
        os.mkfifo(pipe)
        export = self.printed("export", "--include-secrets").encode()
        send, receive = partial(Path(pipe).write_bytes, export), ("--db-path", self.other, "import")
        run_in_threads(send, lambda: self.printed(*receive, pipe))
        self.assertEqual(content_of(self.other), content_of(self.path))

    def test_the_help_lists_each_command_and_each_has_an_example_that_runs(self) -> None:
        self.assertIn(operator_db.__version__, self.printed("--version"))
        commands = re.findall(r"^ +([a-z][a-z-]*) {2,}\S", self.printed("--help"), re.MULTILINE)
        self.assertGreater(len(commands), 12)
        os.environ["AGENC_DB_PATH"] = missing = self.beside("missing.db")
        for command in commands:
            with self.subTest(command=command), self.assert_unchanged():
                text = self.printed(command, "--help")
                self.assertRegex(text, r"(?s)--db-path PATH.*--json")
                pattern = rf"^ +\S*python3? operator_db\.py ({command}.*)$"
                (example,) = re.findall(pattern, text, re.MULTILINE)
                arguments = shlex.split(example.partition(">")[0])
                # there is nothing to work on, and only that is wrong
                reason = arguments[1] if command in ("import", "restore", "verify") else missing
                self.assertIn(reason, self.failure(*arguments))

    def test_an_output_file_is_private_and_replaced_as_a_whole_wherever_it_is(self) -> None:
        name = f"operator_db-test-{os.getpid()}"
        self.addCleanup(os.umask, os.umask(0))
        for path in (
            f"/dev/shm/{name}",
            f"/dev/{name}",  # may be refused, unless one is root
            f"/dev/stdout-{name}",
            f"/proc/self/cwd/{name}",
        ):
            self.addCleanup(Path(path).unlink, missing_ok=True)
            with self.subTest(path):
                for _ in range(2):
                    self.run_command("export", "--include-secrets", "-o", path)
                if os.path.dirname(path) in ("/dev/shm", "/proc/self/cwd"):
                    if not os.access(os.path.dirname(path), os.W_OK):
                        self.skipTest(f"there is no {os.path.dirname(path)} that may be written")
                    self.assertTrue(os.path.exists(path))
                if os.path.exists(path):
                    self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
                    lines = read_bytes(path).splitlines()[1:]
                    self.assertTrue(lines == content_of(self.path))

    def test_a_memory_database_is_refused_and_no_file_of_that_name_made(self) -> None:
        with OperatorDb(self.path) as db:
            db.backup(self.other)
            db.export(self.file, include_secrets=True)
        commands = ("stats", "check", "prune", f"import {self.file}", f"restore {self.other}")
        for command in commands:
            with self.subTest(command=command), self.assert_unchanged():
                self.failure("--db-path", ":memory:", *command.split())
                with mock.patch.dict(os.environ, AGENC_DB_PATH=":memory:"):
                    self.failure(*command.split())

    def test_an_endless_input_without_lines_is_refused_at_once(self) -> None:
        def run(*arguments: str) -> str:
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = in_use + 200 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return self.failure(*arguments)

        for arguments in (("import", "/dev/zero"), ("verify", "/dev/zero")):
            with self.subTest(arguments=arguments), self.assert_unchanged():
                in_child(partial(run, "--db-path", self.other, *arguments), seconds=3)

    def test_a_database_that_another_program_made_meanwhile_is_kept_and_that_is_said(self) -> None:
        def make_another(*_: str) -> None:
            with mock.patch("os.link", link), OperatorDb(self.other) as db:
                store_tasks(db, "of the other program")
            raise error

        link, backup = os.link, self.beside("backup.db")
        self.printed("backup", backup)
        for error in (
            FileExistsError(errno.EEXIST, "it is there"),
            PermissionError(errno.EPERM, "no hard links here"),
        ):
            with self.subTest(error), mock.patch("os.link", make_another):
                message = self.failure("--db-path", self.other, "restore", backup)
                self.assertIn(self.other, message)
            with OperatorDb(self.other) as db:
                self.assertEqual(task_ids(db), ["of the other program"])
            os.unlink(self.other)


class OutputIsMadeForPeople(CommandLineTest):
    def test_nothing_printed_steers_the_terminal_and_all_fits_every_encoding(self) -> None:
        for command in INSPECTIONS.split(", "):
            with self.subTest(command=command):
                texts = [
                    self.printed(*command.split(), *flags, encoding=encoding)  # which looks at it
                    for flags, encoding in itertools.product(((), ("--json",)), ("utf-8", "ascii"))
                ]
                if command != "export" and "--prometheus" not in command:
                    self.assertEqual(json.loads(texts[2]), json.loads(texts[3]))
        environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = self.in_shell("list-tasks", env=environment)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, self.printed("list-tasks", encoding="ascii"))

    def test_a_table_in_a_pipe_is_whole_and_aligned_and_written_for_people(self) -> None:
        head, *lines = self.printed("list-tasks").splitlines()
        starts = [head.index(title) for title in ("task", "status", "since", "reward", "descr")]
        rows: dict[str, list[str]] = {}
        for task, line in zip(self.db.list_tasks(), lines, strict=True):
            columns = on_screen(line.ljust(200))
            ends = itertools.pairwise([*starts, None])
            row = rows[task.task_id] = ["".join(columns[slice(*each)]).rstrip() for each in ends]
            self.assertEqual(row[:2], [task.task_id, task.status])
            if task.description != STEERING:
                self.assertEqual(row[4], (task.description or "").rstrip())
        self.assertRegex(rows[OLD][2], r"^\d{4}-\d\d-\d\d \d\d:\d\d \(3 d ago\)$")
        self.assertIn("(now)", rows[WIDE][2])
        self.assertIn("1970-01-01 00:00", rows["t0"][2])
        self.assertEqual((rows[WIDE][3], rows["odd"][3]), ("1.5 SOL", "7 SKR units"))
        self.assertRegex(self.printed("stats"), r"\d\.\d KiB")

    def test_numbers_to_compare_are_drawn_as_bars(self) -> None:
        tasks = self.facts("stats")["tasks"]
        for encoding, block in (("utf-8", "█"), ("ascii", "#")):
            text = self.printed("stats", encoding=encoding)
            bars = dict(re.findall(rf"^(\w+) +\d+ *({block}*)$", text, re.MULTILINE))
            for one, other in itertools.product(tasks, tasks):
                self.assertEqual(tasks[one] > tasks[other], len(bars[one]) > len(bars[other]))
            self.assertIn(block * 20, text.partition("bytes")[2])

    def test_tables_and_help_fit_the_terminal_and_what_is_cut_is_marked(self) -> None:
        tables = ("stats", "list-tasks", "list-proofs", "list-sessions")
        helps = ("--help", "stats --help", "prune --help", "verify --help", "get --help")
        for columns, command in (
            *itertools.product((20, 40, 80, 132), tables),
            *itertools.product((60, 80, 132), helps),
        ):
            with self.subTest(columns=columns, command=command):
                text = self.on_terminal(columns, *command.split())
                lines = [line for line in text.splitlines() if " python " not in line]  # to copy
                self.assertLessEqual(max(len(on_screen(line)) for line in lines), columns)
                self.assertGreater(len(lines), 3)
                if columns == 20:
                    self.assertIn("…", text)

    def test_long_work_is_a_progress_bar_on_a_terminal_and_nothing_elsewhere(self) -> None:
        for columns in (20, 40, 80):
            sent = self.on_terminal(columns, "export", "-o", self.file)
            self.assertRegex(sent, r"^\rexport\b.*\d%")
            self.assertTrue(sent.endswith("\r\x1b[K"), sent)  # it is erased
            for part in re.split(r"\r|\x1b\[K", sent):
                self.assertLess(len(on_screen(part)), columns)
        self.assertEqual(self.printed("export", "-o", self.file), "")
        self.assertRegex(self.on_terminal(80, "backup", self.other), r"^\rbackup\b[^\n]*%[^\n]*\n")
        self.damage("tasks:t3")
        self.assertRegex(self.on_terminal(80, "repair"), r"(?s)^\rrepair\b.*\d.*damaged.*sound")


class InspectionChangesNothing(CommandLineTest):
    def test_an_inspection_neither_blocks_a_running_operator_nor_waits_for_it(self) -> None:
        def operate(say: Say) -> None:
            with OperatorDb(self.path, durable=False, timeout=0) as db:  # waiting is an error
                for n in itertools.count():
                    with db.transaction():
                        pair = f"a{n % 300}", f"z{n % 300}"
                        store_tasks(db, *pair, reward_lamports=n, claimed_at=1)
                    if n == 0:
                        say("working")

        operator = Child(operate)
        operator.line()
        for command in INSPECTIONS.split(", "):
            self.printed(*command.split())
        stats = self.facts("stats")
        self.assertEqual(stats["records"]["tasks"], sum(stats["tasks"].values()))
        stored = [(task["task_id"], task["reward_lamports"]) for task in self.facts("list-tasks")]
        a, z = ({(name[1:], n) for name, n in stored if name[0] == letter} for letter in "az")
        self.assertEqual((a, len(stored)), (z, 14 + 2 * len(a)))
        self.facts("backup", self.other)
        operator.kill()
        self.assertEqual(self.names(), {"operator.db", "other.db"})
        self.assert_sound()
        self.assert_sound(self.other)

    def test_what_cannot_be_used_is_named_and_left_alone(self) -> None:
        self.printed("export", "-o", self.file)
        self.printed("backup", self.other)
        self.printed("--db-path", self.other, "import", self.file)  # import what is imported late
        os.mkdir("locked")
        for name in ("unreadable", "locked/operator.db"):
            shutil.copy(self.path, name)
        write_bytes("text", b"some text " * 99)
        looks = ("stats", "list-tasks", "check", "export", "prune --dry-run")
        changes = ("prune", "compact", f"import {self.file}", f"restore {self.other}")
        files = ("text", "text/below", "unreadable", "locked", "missing", "missing/below")
        commands: dict[str, tuple[str, ...]] = {
            **dict.fromkeys(files, (*looks, "prune", "compact")),
            "locked/operator.db": (*looks, *changes),
            "operator.db": changes,
        }

        def state() -> dict[str, tuple[int, int]]:
            found = {name: os.stat(name) for name in (".", *os.listdir(self.folder))}
            return {name: (each.st_mtime_ns, each.st_size) for name, each in found.items()}

        def look() -> None:
            for name, mode in (("unreadable", 0), ("locked", 0), ("operator.db", 0o400)):
                os.chmod(name, mode)
            before = state()
            for name in commands:
                for command in commands[name]:
                    message = self.failure("--db-path", self.beside(name), *command.split())
                    self.assertIn(self.beside(name), message, command)
                    if name == "locked/operator.db":
                        self.assertIn(os.strerror(errno.EACCES), message, command)
            os.chmod(self.folder, 0o500)
            for command in INSPECTIONS.split(", "):  # for which nothing needs to be written
                self.printed(*command.split())
            self.assertEqual(state(), before)

        self.addCleanup(os.chmod, self.folder, 0o700)
        self.addCleanup(os.chmod, self.beside("locked"), 0o700)
        as_nobody(self.folder, look)


class ProgramsEndCleanly(CommandLineTest):
    def test_a_problem_found_is_status_1(self) -> None:
        bundle = self.facts("dispute", "t1")
        write_bytes(self.file, json.dumps(bundle).encode())
        other_hash = ("--evidence-hash", "ab" * 32)
        self.assertIn("evidence", self.printed("verify", self.file, *other_hash, status=1))
        write_bytes(self.file, json.dumps({**bundle, "evidence_hash": "00"}).encode())
        (problem,) = self.facts("verify", self.file, status=1)["problems"]
        self.assertIn("evidence_hash", problem)
        self.damage("tasks:t3")
        (problem,) = self.facts("check", status=1)["problems"]
        self.assertIn(problem, self.printed("check", status=1))
        self.assertIn("tasks:t3", problem)
        self.assertIn("tasks:t3", self.failure("list-tasks"))

    def test_a_command_that_fails_is_status_1_and_a_wrong_command_line_2(self) -> None:
        write_bytes(self.file, b'{"an export": false}')
        cases: dict[int, tuple[tuple[str, str], ...]] = {  # a command, a word of its message
            1: (
                ("get tasks:nobody", "tasks:nobody"),
                ("get tasks:\x1b[2J", "[2J"),
                ("get nothing:x", "nothing"),
                ("keys nothing", "nothing"),
                ("keys session_log", "session_log"),
                ("dispute t0", "t0"),
                ("import missing", "missing"),
                ("verify missing", "missing"),
                (f"import {self.path}", self.path),
                (f"import {self.file}", ""),
                (f"restore {self.file}", self.file),
                (f"backup {self.path}", self.path),
                (f"backup {self.file}", self.file),
                ("export -o missing/file", "missing/file"),
                ("stats --prometheus -o missing/file", "missing/file"),
            ),
            2: (
                ("nothing", "nothing"),
                ("stats --nothing", "--nothing"),
                ("stats more", "more"),
                (f"stats -o {self.file}", "--prometheus"),
                ("list-tasks --status lost", "lost"),
                ("list-tasks --limit -1", "-1"),
                ("list-tasks --stat claimed", "--stat"),
                ("get", "KEY"),
                ("get tasks", "tasks"),
                ("prune --older-than -1", "-1"),
                ("prune --session-days nan", "nan"),
                ("verify", "FILE"),
                ("verify x --evidence-hash abc", "abc"),
                ("--json=5 stats", "--json"),
            ),
        }
        with self.assert_unchanged():
            for status, commands in cases.items():
                for command, word in commands:
                    with self.subTest(command=command):
                        self.assertIn(word, self.failure(*command.split(), status=status))
            for command in ("", "stats", "get", "prune --older-than", "list-tasks --status"):
                with self.subTest(command=command, argument=STEERING):
                    self.assertIn("owned", self.failure(*command.split(), STEERING, status=2))

    def test_a_program_ends_cleanly_when_a_stream_is_closed_or_full(self) -> None:
        with OperatorDb(self.path, durable=False) as db, db.transaction():
            store_tasks(db, *(f"many{n}" for n in range(900)), description="x" * 200)
        no_room = os.strerror(errno.ENOSPC)
        for line, status, lines, word in (
            ("list-tasks | head -n 1", 0, 1, ""),
            ("export | head -n 1", 0, 1, ""),
            ("keys tasks --json | head -n 1", 0, 1, ""),
            ("list-tasks > /dev/full", 1, 0, no_room),
            ("export > /dev/full", 1, 0, no_room),
            ("stats --json > /dev/full", 1, 0, no_room),
            ("stats --help > /dev/full", 1, 0, no_room),
            ("list-tasks >&-", 0, 0, ""),
            ("export >&-", 0, 0, ""),
            (f"backup {self.other} >&-", 0, 0, ""),
            ("import - <&-", 1, 0, ""),
        ):
            with self.subTest(line=line):
                done = self.in_shell(line)
                found = done.returncode, done.stdout.count("\n"), done.stderr.count("\n")
                self.assertEqual(found, (status, lines, status), done.stderr)
                self.assertIn(word, done.stderr)
        self.assertEqual(content_of(self.other), content_of(self.path))

    def test_a_program_told_to_end_as_its_file_is_completed_leaves_nothing_behind(self) -> None:
        self.printed("export", "-o", self.file, "--include-secrets")
        names = ("link", "rename", "replace")
        for number, calls, command in (
            (signal.SIGTERM, ("fsync",), ("export", "-o", self.beside("new.jsonl"))),
            (signal.SIGHUP, names, ("backup", self.other)),
            (signal.SIGTERM, names, ("import", self.file, "--db-path", self.other)),
            (signal.SIGINT, names, ("import", self.file, "--db-path", self.other)),
        ):
            with self.subTest(number=number, command=command), self.assert_unchanged():
                done = run_program(
                    f"""if True:
                    import os, runpy, signal
                    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us
                    for name in {calls!r}:
                        setattr(os, name, lambda *_: os.kill(os.getpid(), {int(number)}))
                    runpy.run_module("operator_db", None, "__main__", alter_sys=True)""",
                    *command,
                )
                self.assertEqual(done.returncode, 128 + number)
                self.assertEqual(done.stderr.count("\n"), number == signal.SIGINT, done.stderr)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the module as a program that creates a database at the other path."""
        command = [sys.executable, "-m", "operator_db", "--db-path", self.other, *arguments]
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        self.addCleanup(program.kill)
        return program

    def test_a_report_that_cannot_be_printed_undoes_nothing(self) -> None:
        backup = self.beside("backup.db")
        self.printed("export", "-o", self.file, "--include-secrets")
        self.printed("backup", backup)
        wanted = content_of(self.path)
        reader, closed_pipe = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        os.environ["PYTHONUNBUFFERED"] = "1"
        for arguments, out in itertools.product(
            (("restore", backup), ("import", self.file)), (closed_pipe, full)
        ):
            with self.subTest(arguments=arguments, is_full=out == full):
                program = self.start(*arguments, stdout=out, stderr=subprocess.PIPE)
                _, message = program.communicate(timeout=10)
                self.assertEqual(program.returncode, 1)
                self.assertEqual(message.count(b"\n"), out == full, message)
                self.assertTrue(content_of(self.other) == wanted)
                os.unlink(self.other)
        os.close(closed_pipe)
        os.close(full)

    def test_a_progress_bar_that_cannot_be_drawn_undoes_nothing(self) -> None:
        """The terminal is gone, and the signal that says so is ignored."""
        backup = self.beside("backup.db")
        self.printed("backup", backup)
        controller, terminal = os.openpty()
        ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
        program = self.start(
            "restore", backup, stdout=subprocess.DEVNULL, stderr=terminal, preexec_fn=ignore
        )
        os.close(terminal)
        os.read(controller, 1)  # the bar is there
        os.close(controller)
        self.assertEqual(program.wait(10), 0)
        self.assertTrue(content_of(self.other) == content_of(self.path))

    def test_a_signal_that_nohup_ignores_does_not_end_a_program(self) -> None:
        pipe = self.beside("pipe")
        os.mkfifo(pipe)
        export = self.printed("export", "--include-secrets").encode()
        for handler, status in ((signal.SIG_IGN, 0), (signal.SIG_DFL, 128 + signal.SIGHUP)):
            with self.subTest(handler=handler):
                prepare = partial(signal.signal, signal.SIGHUP, handler)
                program = self.start("import", pipe, stdout=subprocess.DEVNULL, preexec_fn=prepare)
                with open(pipe, "wb", buffering=0) as file:  # opens once the program reads from it
                    program.send_signal(signal.SIGHUP)
                    if status == 0:
                        file.write(export)
                    else:
                        program.wait(10)
                self.assertEqual(program.wait(10), status)
                self.assertEqual(os.path.exists(self.other), status == 0)
                Path(self.other).unlink(missing_ok=True)


class TheSelfCheckShowsThePromises(CommandLineTest):
    def test_it_keeps_at_least_ten_promises_and_inspects_the_operators_own_database(self) -> None:
        module, environment = (str(HERE / "operator_db.py"),), {**os.environ, "TMPDIR": self.folder}
        with self.assert_unchanged():
            done = self.in_shell("", python=module, env=environment)
            facts = self.facts()
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        *promises, count, inspection = done.stdout.splitlines()
        self.assertEqual(promises, [f"ok    {promise}" for promise in facts["promises"]])
        self.assertGreaterEqual(len(set(promises)), 10)
        self.assertRegex(count, rf"^{len(promises)} .*promises.*{operator_db.__version__}")
        records = sum(self.facts("stats")["records"].values())
        self.assertRegex(inspection, rf"^{self.path}: .*\b{records}\b")
        self.assertEqual((facts["path"], facts["problems"]), (self.path, []))
        self.damage("tasks:t3")
        text = self.printed(status=1)
        self.assertNotIn("FAIL", text)
        self.assertIn("tasks:t3", text)

    def test_a_broken_promise_is_reported(self) -> None:
        for verb, returned in (("get_task", None), ("prune", mock.Mock(tasks=0))):
            broken = mock.patch.object(OperatorDb, verb, return_value=returned)
            with self.subTest(verb=verb), broken:
                text = self.printed(status=1)
                self.assertRegex(text, r"(?m)^FAIL  \S")
                kept = len(re.findall(r"(?m)^ok    ", text))
                self.assertRegex(text, rf"(?m)^{kept} .*promises")

    def test_it_creates_no_database_and_fails_where_one_was_asked_for_by_its_path(self) -> None:
        os.unlink(self.path)
        del os.environ["AGENC_DB_PATH"]
        default = self.beside(".agenc/operator.db")
        for path, options, environment, status in (
            (default, (), {}, 0),
            (default, (), {"AGENC_DB_PATH": ""}, 0),
            (self.path, (), {"AGENC_DB_PATH": self.path}, 1),
            (self.path, ("--db-path", self.path), {}, 1),
            (self.path, ("--db-path", self.path), {"AGENC_DB_PATH": self.other}, 1),
            (default, ("--db-path", default), {}, 1),
        ):
            with self.subTest(options, **environment), mock.patch.dict(os.environ, environment):
                promises, _, message = self.printed(*options, status=status).rpartition(f"{path}: ")
                self.assertGreaterEqual(len(re.findall(r"(?m)^ok    ", promises)), 10)
                self.assertRegex(message, "^there is no database" if status else "^no database yet")
                facts = self.facts(*options, status=status)
                self.assertEqual((facts["path"], len(facts["problems"])), (path, status))
                self.assertEqual(self.names(), set())


class TheReadmeIsTrue(CommandLineTest):
    def found(self, pattern: str) -> list[Any]:
        """Return what a pattern finds in the README."""
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        return re.findall(pattern, readme, re.MULTILINE | re.DOTALL)

    def test_each_example_prints_what_the_readme_says(self) -> None:
        del os.environ["AGENC_DB_PATH"]
        programs = self.found(r"^```python\n(.*?)^```")
        self.assertGreaterEqual(len(programs), 4)
        for program in programs:
            with self.subTest(program=program), tempfile.TemporaryDirectory() as folder:
                done = run_program(program, cwd=folder)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(done.stdout.splitlines(), re.findall(r"# prints: (.*)", program))

    def test_the_evidence_hash_made_by_the_shell_is_the_modules(self) -> None:
        pattern = r"^\$ (printf [^\n]* \| sha256sum)\n([0-9a-f]{64})  -$"
        ((command, digest),) = self.found(pattern)
        self.assertEqual(digest, VerificationLog(task_id="t1", outputs=b"hello").evidence_hash)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.split()[0], digest)

    def test_the_help_is_that_of_the_command_line(self) -> None:
        os.environ["COLUMNS"] = "100"
        shown = self.found(r"^```console\n\$ python operator_db\.py --help\n(.*?)^```")
        self.assertEqual(shown, [self.printed("--help")])

    def test_the_module_imports_the_standard_library_alone_and_little_of_it(self) -> None:
        command = [sys.executable, "-S", "-c", "import sys, operator_db; print(*sys.modules)"]
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

Key = tuple[str, str]  # namespace and id of a record
Facts = tuple[Any, ...]  # what a model knows of a record: its state, and its content
Model = dict[Key, Facts]  # the records of one worker, whose ids begin with its digit
Changes = dict[Key, Facts | None]  # None: the record is removed

LONG_AGO = 1  # when a task was completed that any prune removes
SHARED = ("prunable", "config")  # states of a record that another worker may remove or replace


def facts_of(record: Any) -> Facts:
    """Return what a model knows of a record."""
    match record:
        case TaskRecord():
            state = "prunable" if record.completed_at == LONG_AGO else record.status.value
            return state, record.payload
        case VerificationLog():
            return "proof", record.outputs
        case SessionState():
            return "transcript", *(entry.content for entry in record.transcript)
        case OperatorConfig():
            return "config", record.keypairs["main"]
        case _:
            return "tally", record.count


def ids_in(model: Model, *states: str) -> list[str]:
    """Return the ids of the records that are in one of these states."""
    return [record_id for (_, record_id), facts in model.items() if facts[0] in states]


class Step(NamedTuple):
    """What a worker does next: an operation, the record, and the size of its content."""

    operation: str
    id: str
    size: int

    @property
    def worker(self) -> str:
        return self.id[0]

    @property
    def content(self) -> bytes:
        return random.Random(self.id).randbytes(self.size)

    @property
    def parts(self) -> list[str]:
        return [f"{self.id}/{n}" for n in range(5)]


@dataclass(frozen=True)
class Operation:
    """What workers do to the database, and the changes that a model expects of it."""

    weight: float  # how often it is chosen, compared with the others
    perform: Callable[[OperatorDb, Step], object]
    changes: Callable[[Model, Step], Changes]
    ids: Callable[[Model], list[str]] | None = None  # those that it may be given; None: a new one


def store_parts(db: OperatorDb, step: Step) -> None:
    with db.transaction():
        store_tasks(db, *step.parts, payload=step.content)


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
        changes=lambda _, step: {("tasks", step.id): ("claimed", step.content)},
    ),
    "store five tasks": Operation(
        weight=2,
        perform=store_parts,
        changes=lambda _, step: {("tasks", part): ("claimed", step.content) for part in step.parts},
    ),
    "start a task": Operation(
        weight=3,
        ids=lambda model: ids_in(model, "claimed"),
        perform=lambda db, step: db.update_task_status(step.id, "in_progress", expected="claimed"),
        changes=lambda model, step: {
            ("tasks", step.id): ("in_progress", model["tasks", step.id][1])
        },
    ),
    "complete a task": Operation(
        weight=4,
        ids=lambda model: ids_in(model, "claimed", "in_progress"),
        perform=lambda db, step: db.complete_task(step.id, proof(step.id, step.content)),
        changes=lambda model, step: {
            ("tasks", step.id): ("completed", model["tasks", step.id][1]),
            ("proofs", step.id): ("proof", step.content),
        },
    ),
    "delete a task": Operation(
        weight=20,
        ids=lambda model: ids_in(model, "claimed", "in_progress", "completed")[:-60],
        perform=lambda db, step: db.delete_task(step.id),
        changes=lambda _, step: {("tasks", step.id): None},
    ),
    "delete a task and its proof": Operation(
        weight=3,
        ids=lambda model: ids_in(model, "proof"),
        perform=delete_task_and_proof,
        changes=lambda _, step: {("tasks", step.id): None, ("proofs", step.id): None},
    ),
    "store a task that can be pruned": Operation(
        weight=2,
        perform=lambda db, step: store_tasks(
            db, step.id, payload=step.content, status="completed", completed_at=LONG_AGO
        ),
        changes=lambda _, step: {("tasks", step.id): ("prunable", step.content)},
    ),
    "prune": Operation(
        weight=1,
        perform=lambda db, _: db.prune(session_days=None),
        changes=lambda model, _: {("tasks", each): None for each in ids_in(model, "prunable")},
    ),
    "append to a transcript": Operation(
        weight=6,
        perform=lambda db, step: db.append_transcript(step.worker, "user", step.id),
        changes=lambda model, step: {
            (key := ("sessions", step.worker)): (*model.get(key, ["transcript"]), step.id)
        },
    ),
    "delete a session": Operation(
        weight=0.1,
        ids=lambda model: ids_in(model, "transcript"),
        perform=lambda db, step: db.delete_session(step.id),
        changes=lambda _, step: {("sessions", step.id): None},
    ),
    "increment a tally": Operation(
        weight=4,
        perform=increment_tally,
        changes=lambda model, step: {
            (key := ("tallies", step.worker)): ("tally", model[key][1] + 1)
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
    ids = {name: each.ids(model) if each.ids else [new_id] for name, each in OPERATIONS.items()}
    possible = [name for name in ids if ids[name]]
    (name,) = rng.choices(possible, [OPERATIONS[each].weight for each in possible])
    return Step(name, rng.choice(ids[name]), rng.randrange(1, rng.choice((10, 3_000, 60_000))))


def after_step(model: Model, step: Step) -> Model:
    """Return the model after a step."""
    changed = {**model, **OPERATIONS[step.operation].changes(model, step)}
    return {key: facts for key, facts in changed.items() if facts is not None}


@dataclass(frozen=True)
class Fault:
    """What happens to a worker during a step."""

    weight: int  # how often it is chosen, compared with the others
    run: Callable[[Callable[[], object], str, random.Random], object]
    errors: tuple[type[OperatorDbError], ...] = ()  # after which nothing may have been stored


def run_without_room(perform: Callable[[], object], path: str, rng: random.Random) -> None:
    size = os.stat(path).st_size
    with file_size_limit(rng.choice((0, 30_000, size, 2 * size))):
        perform()


def run_with_alarm(perform: Callable[[], object], path: str, rng: random.Random) -> None:
    """Let the worker's signal handler interrupt a step at a random moment."""
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00001, 0.002))
    try:
        perform()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


FAULTS = (
    Fault(weight=74, run=lambda perform, *_: perform()),
    Fault(weight=4, run=run_without_room, errors=(StorageError,)),
    Fault(weight=2, run=lambda perform, *_: in_child(perform)),
    Fault(weight=20, run=run_with_alarm),
)


def handler_key(worker: str) -> Key:
    """Return the key of the record that a worker's signal handler writes to."""
    return "tallies", f"{worker} handler"


def work(path: str, prefix: str, model: Model, rng: random.Random, say: Say) -> None:
    """Do steps without end; say what begins, and whether it was acknowledged or refused."""
    db = OperatorDb(path, durable=rng.random() < 0.5)
    tallies, handled, (_, name) = tallies_of(db), [], handler_key(prefix[0])

    def handle(*_: object) -> None:
        """Read, and write what is then never lost, or refused at once."""
        db.get_session(prefix[0])
        with suppress(ConflictError):
            tallies.update(name, lambda tally: replace(tally, count=tally.count + 1))
            handled.append("handled")

    signal.signal(signal.SIGALRM, handle)
    for n in itertools.count():
        step = choose_step(model, f"{prefix}-{n}", rng)
        (fault,) = rng.choices(FAULTS, [each.weight for each in FAULTS])
        say(json.dumps(step))
        try:
            fault.run(partial(OPERATIONS[step.operation].perform, db, step), path, rng)
            outcome = "acknowledged"
        except fault.errors:
            outcome = "refused"
        for _ in range(len(handled)):  # first: while the step is pending, these may be untold
            say(handled.pop())
        say(outcome)
        if outcome == "acknowledged":
            model = after_step(model, step)


def expected_of(model: Model, found: Model) -> Model:
    """Return the model without what another worker may have removed or replaced."""
    return {key: facts for key, facts in model.items() if key in found or facts[0] not in SHARED}


class Soak:
    """Lets workers loose on one database, kills them, and compares what is stored, in rounds.

    Every step that was acknowledged must be there. The step during which a worker was killed may be
    there as a whole, or not at all.
    """

    def __init__(self, folder: str, seed: int) -> None:
        self.path, self.seed, self.rng = (
            os.path.join(folder, "operator.db"),
            seed,
            random.Random(seed),
        )
        self.models: dict[str, Model] = {
            worker: {("tallies", worker): ("tally", 0), handler_key(worker): ("tally", 0)}
            for worker in "012"
        }
        self.counts, self.failures = Counter[str](), list[str]()
        with OperatorDb(self.path) as db:
            db.store_config(OperatorConfig(keypairs={"main": "nobody's"}))
            for _, name in (key for model in self.models.values() for key in model):
                tallies_of(db).put(Tally(name=name))

    def run(self, minutes: float) -> None:
        """Go on for some minutes, or until something is wrong."""
        end = time.monotonic() + minutes * 60
        while not self.failures and (left := end - time.monotonic()) > 0:
            show_progress(f"{left:5.0f} s left {dict(self.counts)}")
            self.counts["rounds"] += 1
            try:
                pending = self.let_workers_work()
                with OperatorDb(self.path) as db:
                    self.failures += db.check()
                    stored = {key: facts_of(record) for key, record in every_record(db)}
                self.compare(stored, pending)
                self.flip_bits(stored)
                self.tamper()
            except (AssertionError, OperatorDbError) as error:  # of a worker, or of this process
                self.failures.append(str(error)[-3000:])  # the end of a traceback
                for pid in Child.alive:
                    os.kill(pid, signal.SIGKILL)
        show_progress("")

    def let_workers_work(self) -> dict[str, Step | None]:
        """Start the workers and kill them; return the step in which each was killed, if any."""
        children = {}
        for worker, model in self.models.items():
            prefix = f"{worker}-{self.counts['rounds']}"
            rng = random.Random(f"{self.seed} {prefix}")
            children[worker] = Child(partial(work, self.path, prefix, model, rng), seconds=120)
        return {worker: self.kill(worker, child) for worker, child in children.items()}

    def kill(self, worker: str, child: Child) -> Step | None:
        """Kill a worker after a while, and bring its model up to what it had said."""
        said = [child.line() for _ in range(self.rng.randrange(2, 200))]
        said += child.kill(after=self.rng.uniform(0, 0.01))  # and wait for a child of its own
        self.counts["kills"] += 1
        step = None
        for line in said:
            if line == "handled":
                _, count = self.models[worker][handler_key(worker)]
                self.models[worker][handler_key(worker)] = ("tally", count + 1)
                self.counts[line] += 1
                continue
            if step is None:
                step = Step(*json.loads(line))
                self.counts["operations"] += 1
                continue
            if line == "acknowledged":
                self.models[worker] = after_step(self.models[worker], step)
            self.counts[line] += 1
            step = None
        return step

    def compare(self, stored: Model, pending: dict[str, Step | None]) -> None:
        """Compare what is stored with each model, and with the model after a step that was cut."""
        for worker, model in self.models.items():
            found = {
                key: facts
                for key, facts in stored.items()
                # the configuration is the record of the worker that stored it last
                if worker == (facts[1] if key[0] == "config" else key[1])[0]
            }
            step = pending[worker]
            possible = [model] if step is None else [after_step(model, step), model]
            # the handler's writes of that step may have been acknowledged, and not yet told of
            found_count = found.get(handler_key(worker), ("tally", 0))[1]
            if step and found_count > model[handler_key(worker)][1]:
                possible = [{**m, handler_key(worker): ("tally", found_count)} for m in possible]
            fitting = [each for each in possible if expected_of(each, found) == found]
            if fitting:
                self.models[worker] = fitting[0]
            else:
                wrong = [
                    f"{':'.join(key)} is {found.get(key)!s:.90}, not {model.get(key)!s:.90}"
                    for key, _ in found.items() ^ expected_of(model, found).items()
                ]
                self.failures.append(f"worker {worker}, killed in {step}: {wrong[:5]}")

    def flip_bits(self, stored: Model) -> None:
        """Flip a bit in each of ten copies: a record may be refused then, but not be another."""
        image = read_bytes(self.path)
        for _ in range(10):
            self.counts["flips"] += 1
            with tempfile.TemporaryDirectory(prefix="operator-soak-") as folder:
                path = os.path.join(folder, "damaged.db")
                write_bytes(path, with_flipped_bit(image, self.rng))
                with suppress(OperatorDbError), OperatorDb(path, durable=False) as db:
                    db.check()
                    for key, record in every_record(db):
                        if facts_of(record) != stored.get(key):
                            self.failures.append(f"a flipped bit changed {':'.join(key)}")

    def tamper(self) -> None:
        """Leave, lose or change a part of a copy: it must be refused or reported, and not hang."""
        image, log = read_bytes(self.path), b"a log of a database that is gone" * 99
        pages = len(image) // 4096
        page = self.rng.randrange(1, pages - 1) * 4096

        def hide_a_trigger(path: str) -> None:
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                trigger = "CREATE TRIGGER t AFTER INSERT ON tasks BEGIN DELETE FROM proofs; END"
                other.execute(trigger)
                other.execute("PRAGMA writable_schema = ON")
                other.execute("UPDATE sqlite_master SET type = 'TRIGGER' WHERE name = 't'")

        def open_and_repair(path: str) -> tuple[list[str], list[bytes]]:
            """Return what check() finds, and every record that there is after repair()."""
            try:
                db = OperatorDb(path, durable=False)
            except OperatorDbError:
                return ["refused"], []
            with db:
                problems = db.check()
                try:
                    db.repair()
                    return problems, exported(db)  # raises if a record is damaged
                except OperatorDbError as error:
                    return problems, [f"repair ended by {error!r}".encode()]

        stored = {*in_child(partial(content_of, self.path), seconds=20)}

        cases: dict[str, tuple[bytes | None, bytes, Callable[[str], object]]] = {
            "a log without its database": (None, log, lambda path: None),
            "an empty database beside its log": (b"", log, lambda path: None),
            "a second name": (image, b"", lambda path: os.link(path, path + ".second")),
            "a hidden trigger": (image, b"", hide_a_trigger),
            "two pages of zeros": (
                image[:page] + bytes(8192) + image[page + 8192 :],
                b"",
                lambda path: None,
            ),
        }
        for label, (content, log, change) in cases.items():
            self.counts["tampered"] += 1
            with tempfile.TemporaryDirectory(prefix="operator-soak-") as folder:
                path = os.path.join(folder, "copy.db")
                if content is not None:
                    write_bytes(path, content)
                if log:
                    write_bytes(path + "-wal", log)
                change(path)
                problems, lines = in_child(partial(open_and_repair, path), seconds=60)
                wrong = [line for line in lines if line not in stored and b'"sessions"' not in line]
                if wrong:  # a session may be shorter than it was
                    self.failures.append(f"{label}: repair gave {wrong[0][:200]!r}")
                if not problems and label != "two pages of zeros":  # they may be unused ones
                    self.failures.append(f"{label} is not noticed")
                if log and read_bytes(path + "-wal") != log:
                    self.failures.append(f"{label}: the log was changed")


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
    counts = ", ".join(f"{name} {count}" for name, count in run.counts.items())
    print(f"seed {run.seed}, {options.minutes:g} minutes: {counts}, failures {len(run.failures)}")
    for failure in run.failures[:5]:
        print(f"FAIL (seed {run.seed}) {failure}")
    return 1 if run.failures else 0


# ==== Bench: each operation beside the same by hand, and as the database grows ====================


class ByHand:
    """What a careful person would write by hand with sqlite3, json, base64 and dicts.

    It has no checks and no threads, and trusts that the file is its own.
    """

    CREATE = "PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL"
    CREATE_TABLE = """
        CREATE TABLE {0}
            (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, status TEXT, at INTEGER);
        CREATE INDEX {0}_status_at ON {0}(status, at)"""
    OPEN = """
        PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON; PRAGMA secure_delete = ON;
        PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF;
        PRAGMA journal_size_limit = 16777216; PRAGMA synchronous = {}"""
    PUT = """
        INSERT INTO {} VALUES(?, ?, ?, ?) ON CONFLICT(key) DO UPDATE
        SET value = excluded.value, status = excluded.status, at = excluded.at"""
    GET = "SELECT value FROM {} WHERE key = ?"
    LATEST_OF_STATUS = """
        SELECT * FROM (SELECT value, at FROM tasks WHERE status = '{}' ORDER BY at DESC LIMIT 10)"""
    LATEST = "SELECT value FROM ({}) ORDER BY at DESC LIMIT 10".format(
        " UNION ALL ".join(map(LATEST_OF_STATUS.format, TaskStatus))
    )

    def __init__(self, path: str, *, durable: bool) -> None:
        new = not os.path.exists(path)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.execute, self.close = self.connection.execute, self.connection.close
        if new:
            tables = map(self.CREATE_TABLE.format, ("tasks", "sessions", "session_log"))
            self.connection.executescript(";".join((self.CREATE, *tables)))
        self.connection.executescript(self.OPEN.format("FULL" if durable else "NORMAL"))

    def tasks(self, query: str, *values: str) -> Iterator[dict[str, Any]]:
        for (value,) in self.execute(query, values):
            task: dict[str, Any] = json.loads(value)
            task["payload"] = b64decode(task["payload"])
            yield task

    def get_task(self, task_id: str) -> dict[str, Any]:
        return next(self.tasks(self.GET.format("tasks"), "tasks:" + task_id))

    def list_tasks_by_status(self, status: str) -> list[dict[str, Any]]:
        return [*self.tasks("SELECT value FROM tasks WHERE status = ? ORDER BY at", status)]

    def list_latest(self) -> list[dict[str, Any]]:
        return [*self.tasks(self.LATEST)]

    def iter_tasks(self) -> Iterator[dict[str, Any]]:
        return self.tasks("SELECT value FROM tasks ORDER BY key")

    def put(self, task: dict[str, Any]) -> None:
        value = json.dumps({**task, "payload": b64encode(task["payload"]).decode()})
        at = task["claimed_at"] if task["completed_at"] is None else task["completed_at"]
        row = ("tasks:" + task["task_id"], value, task["status"], at)
        self.execute(self.PUT.format("tasks"), row)

    def store(self, fields: dict[str, Any]) -> None:
        """Store a task of these fields, and of those that TaskRecord fills in."""
        status = fields["status"].value
        history = [{"status": status, "at": fields["claimed_at"], "signature": None}]
        absent = {"completed_at": None, "on_chain_signature": None, "reward_skr_tokens": None}
        self.put({**fields, **absent, "status": status, "history": history})

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        yield
        self.execute("COMMIT")

    def update_task_status(self, task_id: str, status: str) -> None:
        with self.transaction():
            task = self.get_task(task_id)
            task["history"].append({"status": status, "at": int(time.time()), "signature": None})
            self.put({**task, "status": status})

    def append_transcript(self, session_id: str, role: str, content: str) -> None:
        now, key = int(time.time()), "sessions:" + session_id
        with self.transaction():
            row = self.execute(self.GET.format("sessions"), (key,)).fetchone()
            session = {"id": session_id, "tasks": [], "created_at": now, "entries": 0}
            if row:
                session = json.loads(row[0])
            seq = session["entries"]
            entry = {"log": session_id, "seq": seq, "content": content, "role": role, "at": now}
            entry_row = (f"session_log:{session_id}:{seq}", json.dumps(entry), session_id, seq)
            self.execute(self.PUT.format("session_log"), entry_row)
            session |= {"entries": seq + 1, "last_active": now}
            self.execute(self.PUT.format("sessions"), (key, json.dumps(session), None, now))


class Ours(OperatorDb):
    """Our database, with the names of what is written otherwise by hand."""

    def store(self, fields: dict[str, Any]) -> None:
        self.store_task(TaskRecord(**fields))

    def list_latest(self) -> list[TaskRecord]:
        return self.list_tasks(limit=10, newest_first=True)


Sides = tuple[ByHand, Ours]


def fields_of_task(n: int, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a typical task: half are completed and old, a hundred are disputed."""
    name = hashlib.sha256(b"%d" % n).hexdigest()
    status = TaskStatus.COMPLETED if n // 1_000 % 2 else TaskStatus.CLAIMED
    return {
        "task_id": prefix + name[:44],
        "payload": json.dumps({"url": f"https://example.org/{n}", "body": name * 3}).encode(),
        "status": TaskStatus.DISPUTED if n % 100 == 7 and n < 10_000 else status,
        "claimed_at": 1_700_000_000 + n,
        "description": f"Summarise document {n}",
        "reward_lamports": 5_000_000 + n,
        "creator": DEVNET_CREATOR,
    }


class Bench:
    """Measures the same work by hand and ours in turn, round after round.

    So whatever else the machine does slows both. Time is the thread's CPU time, except where
    waiting is part of the work: for the disk, for processes, for other threads.
    """

    def __init__(self, folder: str, rows: int) -> None:
        self.folder, self.tasks = folder, 0  # so many are stored now
        self.ids: list[str] = []  # of tasks anywhere among them
        self.sizes = [size for size in (10_000, 100_000, 1_000_000) if size < rows] + [rows]
        self.measures: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}

    def run(self) -> None:
        self.measure_imports()
        self.measure_durable_stores()
        self.measure_threads()
        with self.both("long session ") as sides:
            self.measure_appends(sides, 50_000)
        for size in self.sizes:
            with self.both() as sides:
                self.measure_bulk_load(sides, size)
                self.measure_calls(sides)
            self.measure_opening()
            self.measure_memory()
        self.measure_prune()
        show_progress("")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @contextmanager
    def both(self, prefix: str = "", *, durable: bool = False) -> Iterator[Sides]:
        """Open a database by hand and one of ours."""
        with (
            closing(ByHand(self.path(f"{prefix}ByHand"), durable=durable)) as by_hand,
            Ours(self.path(f"{prefix}Ours"), durable=durable) as ours,
        ):
            yield by_hand, ours

    def compare(
        self,
        sides: tuple[Any, Any],
        operation: str,
        action: Callable[[Any, int], object],
        *,
        rounds: int = 15,
        calls: int = 100,
        each: int = 1,
        at_most: float | None = None,
        prepare: Callable[[int], object] = lambda turn: None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Call an action with either side and a growing number, in rounds of so many calls.

        Notes the medians of the microseconds that a call takes, or one of the `each` things that it
        does, and the median of the rounds' ratios. `prepare` is called before each round.
        """
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            show_progress(f"{operation}, {self.tasks:,} tasks, round {turn + 1} of {rounds}")
            prepare(turn)
            for which in (0, 1) if turn % 2 else (1, 0):
                side, began = sides[which], clock()
                for number in range(turn * calls, (turn + 1) * calls):
                    action(side, number)
                times[which].append((clock() - began) / calls / each * 1e6)
        measure = {
            "operation": operation,
            "tasks": self.tasks,
            "by_hand_us": statistics.median(times[0]),
            "ours_us": statistics.median(times[1]),
            "ratio": statistics.median(ours / hand for hand, ours in zip(*times, strict=True)),
            "at_most": at_most,
        }
        self.measures.append(measure)

    def measure_bulk_load(self, sides: Sides, size: int) -> None:
        before, self.tasks, batch = self.tasks, size, list[dict[str, Any]]()
        in_batch = min(2_500, size - before)

        def make_batch(turn: int) -> None:
            first = before + turn * in_batch
            batch[:] = map(fields_of_task, range(first, min(first + in_batch, size)))

        def load(by: ByHand | Ours, _: int) -> None:
            with by.transaction():
                for fields in batch:
                    by.store(fields)

        rng = random.Random(size)
        self.ids = [fields_of_task(rng.randrange(size))["task_id"] for _ in range(1_500)]
        compare = partial(self.compare, sides, at_most=1.7, prepare=make_batch)
        turns = -(-(size - before) // in_batch)
        compare("bulk load, each task", load, rounds=turns, calls=1, each=in_batch)

    def measure_calls(self, sides: Sides) -> None:
        """Compare what should not depend on how many tasks there are."""
        compare, ids = partial(self.compare, sides), self.ids
        new = [fields_of_task(n, f"new {self.tasks} ") for n in range(1_500)]

        def start(by: ByHand | Ours, n: int) -> None:
            by.update_task_status(new[n]["task_id"], "in_progress")

        def list_disputed(by: ByHand | Ours, _: int) -> None:
            by.list_tasks_by_status("disputed")

        def walk(by: ByHand | Ours, _: int) -> None:
            deque(by.iter_tasks(), 0)

        compare("get_task", lambda by, n: by.get_task(ids[n]), at_most=1.45)
        compare("list_tasks_by_status, 100 tasks", list_disputed, at_most=1.6, calls=10)
        compare("list_tasks, latest 10", lambda by, _: by.list_latest(), calls=20)
        compare("iter_tasks, each task", walk, rounds=3, calls=1, each=self.tasks)
        compare("store_task", lambda by, n: by.store(new[n]), at_most=1.8)
        compare("update_task_status", start, at_most=1.7)
        for entries in (10, 10_000):
            self.measure_appends(sides, entries)

    def measure_appends(self, sides: Sides, entries: int) -> None:
        """Compare appends to a transcript that has so many entries."""

        def append(by: ByHand | Ours, _: int) -> None:
            by.append_transcript(f"{entries} {self.tasks}", "user", "some words")

        for side, n in itertools.product(sides, range(entries)):
            append(side, n)
        self.compare(sides, f"append_transcript, entry {entries:,}", append, at_most=1.6, calls=5)

    def measure_opening(self) -> None:
        def open_and_get(kind: type[ByHand | Ours], n: int) -> None:
            with closing(kind(self.path(kind.__name__), durable=False)) as opened:
                opened.get_task(self.ids[n])

        self.compare((ByHand, Ours), "open, get_task, close", open_and_get, at_most=2.2, calls=5)

    def measure_durable_stores(self) -> None:
        """Compare stores that have reached the disk when they return: one by hand, one of ours."""
        new = [fields_of_task(n) for n in range(500)]
        with self.both("durable ", durable=True) as sides:
            compare = partial(self.compare, sides, at_most=1.15, clock=time.perf_counter)
            compare("store_task, durable", lambda by, n: by.store(new[n]), rounds=500, calls=1)

    def measure_imports(self) -> None:
        """Compare a process that imports the module with one that imports what it stands on."""
        # an empty variable is as none
        compiled = {"PYTHONPYCACHEPREFIX": self.path("compiled"), "PYTHONDONTWRITEBYTECODE": ""}

        def import_in_process(names: str, _: int) -> None:
            command = [sys.executable, "-c", f"import {names}"]
            subprocess.run(command, cwd=HERE, env={**os.environ, **compiled}, check=True)

        sides = ("sqlite3, json, dataclasses", "operator_db")
        for side in sides:
            import_in_process(side, 0)  # which compiles what is imported
        compare = partial(self.compare, sides, at_most=1.3, clock=time.perf_counter)
        compare("import in a new process", import_in_process, rounds=21, calls=1)

    def measure_threads(self) -> None:
        """Note how many tasks a second one thread stores, and sixteen through one handle."""
        tasks, speeds = 3_200, {1: list[float](), 16: list[float]()}
        for turn, count in itertools.product(range(5), speeds):
            show_progress(f"{count} threads store tasks, round {turn + 1} of 5")
            names = [f"{turn} {n}" for n in range(tasks)]
            with Ours(self.path(f"{count} threads"), durable=False) as db:
                began = time.perf_counter()
                run_in_threads(*(partial(store_tasks, db, *names[n::count]) for n in range(count)))
                speeds[count].append(tasks / (time.perf_counter() - began))
        shares = [many / one * 100 for one, many in zip(*speeds.values(), strict=True)]
        for name, values in (
            ("store_task, calls a second with 1 thread", speeds[1]),
            ("store_task, calls a second with 16 threads", speeds[16]),
            ("store_task, 16 threads in % of one thread (at least 80)", shares),
        ):
            self.figures[name] = round(statistics.median(values))

    def measure_memory(self) -> None:
        """Note the peak memory of new processes, each of which meets every task; on Linux alone."""
        if sys.platform != "linux":
            return
        program = """if True:
            from collections import deque
            with OperatorDb(sys.argv[1], durable=False) as db:
                {}
            status = open("/proc/self/status")
            print(*(line.split()[1] for line in status if line.startswith("VmHWM")))"""
        shutil.copy(self.path("Ours"), self.path("pruned"))
        for action, name in (
            ("pass", "Ours"),
            ("deque(db.iter_tasks(), 0)", "Ours"),
            ("db.export(sys.argv[2])", "Ours"),
            ("db.import_(sys.argv[2])", f"imported {self.tasks}"),
            ("db.prune()", "pruned"),
        ):
            show_progress(f"memory of {action}, {self.tasks:,} tasks")
            paths = self.path(name), self.path("export")
            done = run_program(program.format(action), *paths, timeout=None)
            figure = f"peak memory in MB of {action}, {self.tasks:,} tasks"
            self.figures[figure] = round(int(done.stdout) / 1024, 1)

    def measure_prune(self) -> None:
        """Prune half of the tasks in another thread, and note how long writes wait meanwhile."""
        show_progress("prune while another thread writes")
        waits = [0.0]
        with Ours(self.path("Ours"), durable=False) as db, ThreadPoolExecutor(1) as pool:
            pruning = pool.submit(db.prune)
            while not pruning.done():
                began = time.perf_counter()
                store_tasks(db, f"meanwhile {len(waits)}")
                waits.append(time.perf_counter() - began)
        self.figures |= {
            "prune, tasks": pruning.result().tasks,
            "prune, microseconds a task": round(sum(waits) / pruning.result().tasks * 1e6, 1),
            "prune, writes of another thread meanwhile": len(waits) - 1,
            "prune, longest of these writes in ms": round(max(waits) * 1e3, 1),
        }


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
        return 0
    columns = ("tasks", "by hand", "ours", "ratio", "at most")
    print("{:32}{:>10}{:>12}{:>12}{:>8}{:>9}".format("median microseconds", *columns))
    line = "{operation:32}{tasks:10,}{by_hand_us:12,.1f}{ours_us:12,.1f}{ratio:8.2f}{most:>9}"
    for measure in run.measures:
        print(line.format(**measure, most=measure["at_most"] or ""))
    for name, figure in run.figures.items():
        print(f"{name:62}{figure:12,}")
    return 0


# ==== Running =====================================================================================

LAST_LINE = re.compile(r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?\n\Z")


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
    result = unittest.TextTestRunner(warnings="error").run(suite)

    def tests(*outcomes: tuple[Any, str]) -> set[str]:
        """Return the ids of tests, where unittest counts each failure of a `subTest`."""
        return {getattr(test, "test_case", test).id() for test, _ in outcomes}

    failed = tests(*result.failures, *result.errors)
    skipped = tests(*result.skipped) - failed
    return result.testsRun - len(failed | skipped), len(failed), len(skipped)


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
        if names or sys.gettrace() or "coverage" in sys.modules:  # which follows one process
            counts = run_tests(names or classes_with_tests())
        else:
            counts = run_in_two_processes(classes_with_tests())
    passed, failed, skipped = counts
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not (passed or skipped) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
