"""A lock that a program holds while it writes what others may want to write at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from config import tell


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[str]:
    """Holds a lock: the file `path`, which is removed at the end; a process that dies frees it.

    Where the file system has no locks, this is said, and nothing is locked.

    Args:
        busy: called with the holder's name where another process has the lock. If it returns, we
            wait for the lock.

    Yields:
        The name of a holder that died; empty if there was none.
    """
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            held = _lock(file, busy)
            if not _is_at(file, path):
                continue  # who held it removed it: whoever comes now makes another
            file.seek(0)
            died = file.read() if held else ""
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                yield died
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: TextIO, busy: Callable[[str], None]) -> bool:
    """Locks an open file; False where the file system can't."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy(file.read() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        tell(f"{file.name}: this file system has no locks; start one program at a time on it")
        return False
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
