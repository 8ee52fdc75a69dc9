"""One driver a study. Its lock says who holds it, and is free again when its owner is gone.

On a folder the system's file lock is held, which ends with its process. On object storage it is an object that is made
only if there is none, and that its owner writes again every `BEAT_S` seconds, on condition that it is still its own.
Somebody else may take it over

- when its owner ran on this machine and has ended (by process id and start, in the same boot and process namespace),
- when it has not been written for `STALE_S` seconds, by the storage's own clock,
- when told to by the user, whatever its age.

A driver that finds its lock taken ends without touching the study any more. Each takeover is recorded by its taker.

Holding the lock once is a session, and has an id. Jobs carry it to the workers, some of which may outlive their driver.
"""

import json
import logging
import os
import platform
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import psutil

from bert_encoding.core.errors import InputError
from bert_encoding.core.files import write_json
from bert_encoding.core.storage import ObjectPath, Place
from study.cluster.conditional_write import Conditional, Found, conditional

LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"
BEAT_S, STALE_S = 30.0, 300.0

logger = logging.getLogger(__name__)
_held: ContextVar[str] = ContextVar("session", default="")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes
    ----------
    since : when it took it, by its own clock
    machine : boot and process namespace, within which a process id means something; None if not known
    process_start_s : tells a process from a later one with the same id
    token : id of the session, which tells two locks of one process apart
    """

    host: str = "?"
    pid: int = 0
    since: str = "?"
    machine: str | None = None
    process_start_s: float = 0.0
    token: str = ""

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


@dataclass
class Hold:
    """A lock that is asked for, and then held.

    Attributes
    ----------
    may_force : take it from another run that is at work
    takeover : what to record, if it was another run's
    lost_to : who took it over meanwhile; then nothing may be written any more
    """

    may_force: bool = False
    takeover: dict[str, Any] | None = None
    lost_to: Owner | None = None
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def holding(folder: Place, hold: Hold) -> Iterator[None]:
    """Hold a study's lock.

    Raises
    ------
    InputError
        if another run holds it, or has taken it over by the end.
    """
    mine = this_process()
    if isinstance(folder, Path):
        with _holding_file(folder, mine), _in_session(mine.token):
            yield
        return
    lock = conditional(folder / LOCK_FILE)
    tag, hold.takeover = _acquire(lock, folder, mine, hold.may_force)
    beating = threading.Thread(target=_beat, args=(lock, mine, tag, hold), daemon=True)
    beating.start()
    try:
        with _in_session(mine.token):
            yield
    except KeyboardInterrupt:
        if hold.lost_to is None:
            raise
    finally:
        hold.ended.set()
        beating.join()
    if hold.lost_to is not None:
        raise InputError(f"{folder}: another run took this study over ({hold.lost_to}); this one has ended")


def this_process() -> Owner:
    """Return this process as the owner of a new lock."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = psutil.Process().create_time()
    return Owner(platform.node(), os.getpid(), now, _machine(), start, uuid.uuid4().hex)


def session_id() -> str:
    """Return the id of the session in which a study is held here, ``""`` where none is."""
    return _held.get()


def is_held_by(folder: Place, session: str) -> bool:
    """Whether a session still holds a study; whoever works for it can ask, on any machine.

    Raises
    ------
    InputError
        if object storage cannot be asked.
    """
    try:
        return _parse((folder / (OWNER_FILE if isinstance(folder, Path) else LOCK_FILE)).read_bytes()).token == session
    except FileNotFoundError:
        return False


@contextmanager
def _in_session(token: str) -> Iterator[None]:
    before = _held.set(token)
    try:
        yield
    finally:
        _held.reset(before)


@contextmanager
def _holding_file(folder: Path, mine: Owner) -> Iterator[None]:
    lock, owner = filelock.FileLock(folder / LOCK_FILE, blocking=False), folder / OWNER_FILE
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _refusal(folder, _read_owner_file(owner), "wait for it or end it") from None
    try:
        write_json(owner, asdict(mine))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read_owner_file(file: Path) -> Owner:
    try:
        return _parse(file.read_bytes())
    except FileNotFoundError:
        return Owner()


def _refusal(folder: Place, owner: Owner, advice: str) -> InputError:
    who = f" ({owner})" if owner != Owner() else ""
    return InputError(f"{folder}: another run is at work on this study{who}; {advice}")


def _acquire(lock: Conditional, folder: ObjectPath, mine: Owner, may_force: bool) -> tuple[str, dict[str, Any] | None]:
    """Return the tag of the lock that is now ours, and the takeover if it was another's."""
    tag = lock.write(_content(mine, 0), None)
    if tag is not None:
        _check_conditions(lock, folder, mine, tag)
        return tag, None
    found = lock.read()
    if found is None:  # given back this moment
        return _acquire(lock, folder, mine, may_force)
    owner = _parse(found.content)
    is_gone = has_ended(owner) or found.age_s > STALE_S
    if not (is_gone or may_force):
        sign = f"last sign of life {found.age_s:.0f} s ago"
        raise _refusal(folder, owner, f"wait for it, end it, or take the study from it with --take-over ({sign})")
    tag = lock.write(_content(mine, 0), found.tag)
    if tag is None:
        raise InputError(f"{folder}: another run takes this study over at this moment; wait for it")
    return tag, _takeover(owner, mine, found, forced=not is_gone)


def _check_conditions(lock: Conditional, folder: ObjectPath, mine: Owner, tag: str) -> None:
    """Refuse a service that writes whatever the condition: two runs would both believe they hold the lock."""
    if lock.write(_content(mine, 1), None) is not None:
        lock.delete(tag)
        raise InputError(f"{folder}: this storage ignores If-None-Match, which the lock needs; choose another --out")


def _takeover(owner: Owner, mine: Owner, found: Found, forced: bool) -> dict[str, Any]:
    taken_from = {"host": owner.host, "pid": owner.pid, "since": owner.since}
    by = {"host": mine.host, "pid": mine.pid}
    silent_s = round(found.age_s, 1)
    return {"at": mine.since, "from": taken_from, "by": by, "silent_s": silent_s, "forced": forced}


def has_ended(owner: Owner) -> bool:
    """Return whether a process of this machine has ended; False of another machine's, which nobody here can tell."""
    if owner.machine is None or owner.machine != _machine():
        return False
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.process_start_s) > 2
    except psutil.NoSuchProcess:
        return True


def _beat(lock: Conditional, mine: Owner, tag: str, hold: Hold) -> None:
    """Write the lock again and again until the study ends, then delete it; if it was taken, end the study."""
    n_beats = 0
    while not hold.ended.wait(BEAT_S):
        n_beats += 1
        try:
            written = lock.write(_content(mine, n_beats), tag)
            found = lock.read() if written is None else None
        except InputError as error:  # perhaps it passes; nobody takes the lock for some time
            logger.warning("the lock could not be renewed: %s", error)
            continue
        if written is None and found is not None and (owner := _parse(found.content)) == mine:
            written = found.tag  # an earlier beat came through though its answer was lost
        if written is None:
            hold.lost_to = owner if found is not None else Owner()
            _interrupt()
            return
        tag = written
    try:
        lock.delete(tag)
    except InputError as error:
        logger.warning("the lock stays for some minutes: %s", error)


def _interrupt() -> None:
    """End the main thread's work as Ctrl-C does, or where that is ignored, as behind nohup, by being asked to."""
    listens = callable(signal.getsignal(signal.SIGINT))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT if listens else signal.SIGTERM)


def _content(owner: Owner, n_beats: int) -> bytes:
    """Return a content that no earlier beat had: S3's tag is a hash of it."""
    return json.dumps(asdict(owner) | {"n_beats": n_beats}).encode()


def _parse(content: bytes) -> Owner:
    """Return the owner; one about whom nothing is known if the content is damaged."""
    try:
        told = json.loads(content)
        return Owner(**{name: told[name] for name in Owner.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return Owner()


def _machine() -> str | None:
    """Return what names this boot of this machine and this process namespace, None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
