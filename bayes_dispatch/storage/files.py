"""One file, which has the old content or the new one, whole, whatever stops its writer."""

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from bayes_dispatch.errors import BundleError

__all__ = [
    "TEMPORARY",
    "alone_in",
    "check_replaceable",
    "keep_file",
    "read_bytes",
    "replace_file",
    "sync",
    "write_output",
]

TEMPORARY = ".bayes-dispatch-temporary"
WITHOUT_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # some network file systems


def write_output(path: Path, data: bytes) -> None:
    """Have ``path`` hold ``data``; afterwards it survives a crash.

    A file gets its content at once, and keeps mode and owner. A link stays one: its target is written. A pipe or a
    device is written to, and so is what standard output goes to. A file that cannot be replaced without loss (one of
    several names, or in a directory that takes no new files, or none of its owner and mode) is overwritten where it is.

    Args:
        path: the file; missing directories are made. data: its bytes.

    Raises:
        BundleError: ``path`` is a directory. OSError: the disk is full, or refuses.
    """
    old = path.stat() if path.exists() else None
    if old is not None and not stat.S_ISDIR(old.st_mode):
        if (handle := _standard_stream(old)) is not None:
            return _write(handle, data)
        if not stat.S_ISREG(old.st_mode):
            return _write(os.open(path, os.O_WRONLY), data)
    path = _target(path)
    with alone_in(path.parent) as alone:
        if (old is not None and old.st_nlink > 1) or not _replace(path, data, alone):
            _write(os.open(path, os.O_WRONLY | os.O_TRUNC), data)


def replace_file(path: Path, data: bytes | Callable[[], bytes], check: Callable[[], object] | None = None) -> None:
    """Have ``path`` hold ``data`` at once, or stay as it is: for what no crash and no full disk may take.

    A file keeps mode and owner. A link stays one: its target is replaced. Other names of the same file, such as those
    that backups give it, keep the old content.

    Args:
        path: the file; missing directories are made. data: its bytes, or a function that makes them from what is there:
            it is called when no other writer can come between. check: raises where what is there is not to be replaced;
            likewise, or as shortly before as can be where the disk has no locks.

    Raises:
        BundleError: ``path`` is no file, or one that may only be overwritten where it is.
        OSError: the disk is full, refuses, or has no locks that a function takes.
    """
    path = _own_target(path)
    with alone_in(path.parent) as alone:
        if check is not None:
            check()
        if callable(data):
            if not alone:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
            data = data()
        if not _replace(path, data, alone):
            raise _irreplaceable(path)


def check_replaceable(path: Path) -> None:
    """Refuse, before any work, a file that :func:`replace_file` could not replace later, be it there yet or not.

    Raises:
        BundleError, OSError: as there, but for a full disk.
    """
    path = _own_target(path)
    mark = f"{TEMPORARY}-{os.getpid()}-{os.urandom(4).hex()}"
    first, second = (path.with_name(f".{path.name}{mark}-{number}") for number in (1, 2))
    try:
        if not path.exists():
            os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if not _replaceable(second, (path if path.exists() else first).stat()):
            raise _irreplaceable(path)
    except PermissionError:
        raise _irreplaceable(path) from None
    finally:
        for made in (first, second):
            made.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """The bytes of ``path``.

    Raises:
        BundleError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"expected a readable file {path}, got: {error.strerror}") from None


def keep_file(old: Path, new: Path) -> None:
    """The same file under a second name, or a copy of it where the file system has no links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(directory: Path) -> Iterator[bool]:
    """Wait until nobody else writes in this directory, and keep others out; false where its disk has no locks.

    Raises:
        FileNotFoundError: it is not there, or no longer.
    """
    while True:
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                locked = lock_descriptor(handle, poll_interval=0.005)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                locked = False
            if os.path.samestat(os.fstat(handle), os.stat(directory)):  # else another one has taken its place
                yield locked
                return
        finally:
            os.close(handle)


def _own_target(path: Path) -> Path:
    """As :func:`_target`, of what is a file if it is there."""
    path = _target(path)
    if path.exists() and not path.is_file():
        raise BundleError(f"expected a file at {path}, got a pipe or a device")
    return path


def _irreplaceable(path: Path) -> BundleError:
    return BundleError(
        f"expected a file that another can take the place of, got {path}: its directory takes no new files, or none of "
        "its owner and mode"
    )


def _target(path: Path) -> Path:
    """The file that a path leads to, whose directory is made; it may be written."""
    path = Path(os.path.realpath(path))
    if path.is_dir() or path.is_symlink():
        found = "a directory" if path.is_dir() else "a link to itself"
        raise BundleError(f"expected a file at {path}, got {found}")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _replace(path: Path, data: bytes, alone: bool) -> bool:
    """Put a new file in the place of the old one, if there is one; false where it would have another owner or mode."""
    mark = "" if alone else f"-{os.getpid()}-{os.urandom(4).hex()}"
    temporary = path.with_name(f".{path.name}{TEMPORARY}{mark}")
    if path.exists() and not _replaceable(temporary, path.stat()):
        return False
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _write(handle, data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)
    return True


def _write(handle: int, data: bytes) -> None:
    """All bytes, down to the disk where there is one."""
    with os.fdopen(handle, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.fsync(handle)


def _standard_stream(file: os.stat_result) -> int | None:
    """A handle of standard output or error, where that is this file."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or no file of this system
            if os.path.samestat(file, os.fstat(stream.fileno())):
                stream.flush()
                return os.dup(stream.fileno())
    return None


def _replaceable(temporary: Path, old: os.stat_result) -> bool:
    """Make a temporary file of the old one's owner and mode; false where that is not allowed."""
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except PermissionError:
        return False
    try:
        made = os.fstat(handle)
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(handle, old.st_uid, old.st_gid)
        if stat.S_IMODE(made.st_mode) != stat.S_IMODE(old.st_mode):  # else a disk may have no modes to set
            os.fchmod(handle, stat.S_IMODE(old.st_mode))
    except OSError:  # not allowed, or unknown to the file system
        os.unlink(temporary)
        return False
    finally:
        os.close(handle)
    return True
