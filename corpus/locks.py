"""A lock for programs that would otherwise write the same files at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from config import print_error

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[str]:
    """Holds a lock on the file `path`, which is removed at the end; a process that dies frees it.

    If another process has the lock, `busy` is called with its name; if it returns, we wait. Yields
    the name of a holder that died without removing the file, else "". On a file system without
    locks nothing is locked, and a line on standard error says so.
    """
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            held = _lock(file, busy)
            try:
                current = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            except FileNotFoundError:
                current = False
            if not current:
                continue  # the holder has removed the file, so others lock a new one
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
    """Locks an open file; False if the file system has no locks."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy(file.read() or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print_error(f"{file.name}: no locks on this file system; start one program at a time on it")
        return False
    return True
