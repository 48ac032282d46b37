"""Copy files and ranges of them, and make sure that they are on disk.

Owns what the kernel does best: copying without passing bytes through this process, and allocating disk. Never knows
what is in a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from abliterate.checkpoint.matrix import write_all
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import ResourceError, VerifyError

_CHUNK = 4 << 20
#: Most bytes of one call to the kernel, so that an interrupt is not kept waiting.
_RANGE = 256 << 20
#: What the kernel says where two files cannot be copied between in it.
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


def create(target: Path, size: int) -> None:
    """Make a file of `size` bytes, its disk space taken where the file system can; what was there is replaced.

    Raises:
        ResourceError: the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with target.open("xb") as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise ResourceError(f"{target}: cannot write {size:,} bytes ({error.strerror})") from None


def copy_range(source: int, target: int, start: int, stop: int, file: str, to: int | None = None) -> None:
    """Copy bytes `[start, stop)` to place `to` (the same), by the kernel where it can: on shared blocks if possible.

    Raises:
        VerifyError: the source ends before `stop`.
        ResourceError: the disk is full.
    """
    shift = 0 if to is None else to - start
    by_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        done = 0
        if by_kernel:
            try:
                done = os.copy_file_range(source, target, min(stop - start, _RANGE), start, start + shift)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise ResourceError(f"{file}: cannot write ({error.strerror}); free some disk space") from None
                by_kernel = False
                continue
        else:
            data = os.pread(source, min(stop - start, _CHUNK), start)
            write_all(target, memoryview(data), start + shift, file)
            done = len(data)
        if not done:
            raise VerifyError(f"{file}: ended at byte {start:,} while it was copied; did the file change meanwhile?")
        start += done


def gaps(taken: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What the half-open ranges `taken`, in any order, leave of `[0, size)`."""
    found, at = [], 0
    for start, stop in sorted(taken):
        if start > at:
            found.append((at, start))
        at = max(at, stop)
    return [*found, (at, size)] if at < size else found


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes (through symbolic links) to a new file.

    Raises:
        ResourceError: the disk is full.
        VerifyError: the source shrinks meanwhile.
    """
    create(target, source.stat().st_size)
    with source.open("rb") as old, target.open("r+b") as new:
        copy_range(old.fileno(), new.fileno(), 0, os.fstat(new.fileno()).st_size, source.name)


def tensor_sha256(fd: int, tensor: TensorInfo) -> str:
    """Hash of a tensor's stored bytes in its open file.

    Raises:
        VerifyError: the file ends before them.
    """
    digest, at, end = hashlib.sha256(), tensor.offset, tensor.offset + tensor.nbytes
    while at < end:
        block = os.pread(fd, min(end - at, _CHUNK), at)
        if not block:
            raise VerifyError(f"{tensor.file}: ended while '{tensor.name}' was read; did the file change meanwhile?")
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's or folder's data to disk.

    Raises:
        ResourceError: the disk does not take it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise ResourceError(f"{path}: cannot write ({error.strerror})") from None
    finally:
        os.close(fd)


def require_disk(folder: Path, nbytes: int) -> None:
    """Check that `folder` (or its nearest existing parent) has room for `nbytes` more.

    Raises:
        ResourceError: it has not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"{folder}: the result needs {nbytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "free some space or choose another output"
        )
