"""The lock of a run folder: one job at a time writes to it. Light: standard library alone.

The file `.lock` says which process holds it. On the same machine its end shows at once, by its
number and the time at which it started. Of a process elsewhere only its heartbeat shows, a touch of
the file every few seconds; whoever wants the folder waits to see one.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vistok.core.errors import VistokError
from vistok.core.files import parse_json

LOCK = ".lock"

#: Seconds between two touches.
BEAT = 10.0

#: Seconds without a touch after which a process elsewhere counts as dead.
SILENCE = 60.0


class RunLock:
    """Holds a run folder for this process from `acquire` to `release`.

    Args:
        folder: of the run; it must exist.
        say: told in one line when acquiring takes long.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.path = folder / LOCK
        self.say = say
        self.owner = {**_machine(), "pid": os.getpid(), "started": start_of(os.getpid())}
        self.owner["token"] = f"{os.getpid()}-{time.time_ns()}"
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder, from a dead process too.

        Raises:
            VistokError: if a process trains in it, or it cannot be written to.
        """
        temporary = self.path.with_name(f"{LOCK}.{self.owner['token']}")
        try:
            temporary.write_text(json.dumps(self.owner) + "\n")
        except OSError as error:
            folder = self.path.parent
            raise VistokError(f"{folder}: cannot be written to ({error.strerror})") from error
        try:
            while not self._place(temporary, self.path):
                other = _read(self.path)
                if other is None:
                    continue
                if self._is_alive(other, self.path):
                    raise VistokError(
                        f"{self.path.parent}: process {other.get('pid')} on {other.get('host')} "
                        "trains in this folder; wait for its end, or choose another folder with "
                        "hydra.run.dir"
                    )
                if self._take_over(temporary, other):
                    break
                time.sleep(0.01)
        finally:
            temporary.unlink(missing_ok=True)
        self._beat = threading.Thread(target=self._keep_beating, daemon=True, name="run lock")
        self._beat.start()

    def release(self) -> None:
        """Give the folder back."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if self.is_held():
            with suppress(OSError):
                self.path.unlink()

    def is_held(self) -> bool:
        """Return whether the lock is still that of this process, and not of a forked copy."""
        other = _read(self.path)
        same = other is not None and other.get("token") == self.owner["token"]
        return same and os.getpid() == self.owner["pid"]

    def _place(self, temporary: Path, target: Path) -> bool:
        """Give a file a second name, unless there is one; no two processes both can."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w") as file:
                file.write(temporary.read_text())
        return True

    def _take_over(self, temporary: Path, stale: dict[str, Any]) -> bool:
        """Replace the lock of a dead process; False if another process is faster.

        Only who holds the claim, a file named after the dead lock, may replace it. The claim of a
        process that died with it is taken over in the same way.
        """
        claims: list[Path] = []
        dead = stale
        while True:
            named = hashlib.sha256(json.dumps(dead, sort_keys=True).encode()).hexdigest()[:16]
            claims.append(self.path.with_name(f"{LOCK}.{named}.claim"))
            if self._place(temporary, claims[-1]):
                break
            other = _read(claims[-1])
            if other is None or self._is_alive(other, claims[-1]):
                return False
            dead = other
        try:
            if _read(self.path) != stale:
                return False
            os.replace(temporary, self.path)
            return True
        finally:
            for claim in claims:
                claim.unlink(missing_ok=True)

    def _is_alive(self, other: dict[str, Any], path: Path) -> bool:
        if all(other.get(key) == self.owner[key] for key in ("host", "boot", "space")):
            pid = other.get("pid")
            if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
                return False
            return is_running(pid) and other.get("started") in (None, start_of(pid))
        before = _age_and_stamp(path)
        if before is None:
            return False
        if before[0] > 10 * SILENCE:  # no two clocks differ by that much
            return False
        self.say(
            f"{self.path.parent}: held by a process on {other.get('host')}; waiting up to "
            f"{SILENCE:.0f} seconds for a sign of life"
        )
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENCE / 10))
            now = _age_and_stamp(path)
            if now is None:
                return False
            if now[1] != before[1]:
                return True
        return False

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT):
            with suppress(OSError):
                if self.is_held():
                    os.utime(self.path)


def _age_and_stamp(path: Path) -> tuple[float, int] | None:
    try:
        with open(path) as file:  # network file systems look again when a file is opened
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return time.time() - status.st_mtime, status.st_mtime_ns


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a lock says; an empty one if it is torn, None if there is none."""
    try:
        with open(path, "rb") as file:
            found = parse_json(file.read(4096))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> dict[str, str]:
    """Identify the machine since it was started, and the container."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),  # process numbers mean the same within one
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def start_of(pid: int) -> str | None:
    """Return when a process started, since its number may be used again; None if unknown."""
    if not sys.platform.startswith("linux"):
        return None
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else None


def is_running(pid: int) -> bool:
    """Return whether there is a process of this number that has not ended."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields:
        return fields[0] not in ("Z", "X")  # ended, but not waited for
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not sys.platform.startswith("linux")
