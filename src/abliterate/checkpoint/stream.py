"""Copy files and ranges of them, and make sure that they are on disk.

Owns what the kernel does best: sharing blocks, copying past its cache, and allocating disk. Never knows what is in a
file.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from abliterate.checkpoint.matrix import write_all
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import ResourceError, VerifyError

_CHUNK = 4 << 20
#: Most bytes of one call to the kernel, so that an interrupt is not kept waiting.
_RANGE = 256 << 20
#: What is copied past the kernel's cache begins and ends at its largest page, so that no page holds such bytes and
#: others, which go through it.
_ALIGNED = 2 << 20
#: Bytes of one copy past the cache: enough for the disk, few beside what an edit holds.
_DIRECT = 8 << 20
#: What the kernel says where two files cannot be copied between in it, share blocks or go past its cache.
_NOT_HERE = (
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTTY, errno.ENOENT,
)  # fmt: skip
#: Linux: the number of its call that lets a file share blocks of another (ioctl_ficlonerange(2)).
_SHARE = 0x4020940D


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
    """Copy bytes `[start, stop)` to place `to` (the same).

    Where the file system can, large ranges at the same place become shared blocks, or go past the page cache: that
    takes a twentieth of the time of a core, and leaves what others have in the cache.

    Raises:
        VerifyError: the source ends before `stop`.
        ResourceError: the disk is full.
    """
    first, last = -(-start // _ALIGNED) * _ALIGNED, stop // _ALIGNED * _ALIGNED
    shift = 0 if to is None else to - start
    if not shift and first < last and sys.platform == "linux":
        try:
            past = _shared(source, target, first, last) or _copied_directly(source, target, first, last, file)
        except OSError as error:
            raise _cannot_write(file, error) from None
        if past:
            _copy_cached(source, target, start, first, 0, file)
            start = last
    _copy_cached(source, target, start, stop, shift, file)


def _shared(source: int, target: int, start: int, stop: int) -> bool:
    """Whether the range of `target` could be made the same blocks as that of `source`."""
    import fcntl

    try:
        fcntl.ioctl(target, _SHARE, struct.pack("=qQQQ", source, start, stop - start, start))
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    return True


def _copied_directly(source: int, target: int, start: int, stop: int, file: str) -> bool:
    """Whether the aligned range could be copied past the page cache; where not, part of it may be."""
    opened: list[int] = []
    try:
        for fd, mode in ((source, os.O_RDONLY), (target, os.O_WRONLY)):
            opened.append(os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT))
        with mmap.mmap(-1, _DIRECT) as memory, memoryview(memory) as buffer:
            for at in range(start, stop, _DIRECT):
                with buffer[: min(stop - at, _DIRECT)] as piece:
                    if os.preadv(opened[0], [piece], at) != len(piece):
                        raise _ended(file, at)
                    if os.pwritev(opened[1], [piece], at) != len(piece):
                        return False
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    finally:
        for fd in opened:
            os.close(fd)
    return True


def _copy_cached(source: int, target: int, start: int, stop: int, shift: int, file: str) -> None:
    """Copy bytes `[start, stop)` to a place `shift` on, by the kernel where it can."""
    by_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        done = 0
        if by_kernel:
            try:
                done = os.copy_file_range(source, target, min(stop - start, _RANGE), start, start + shift)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _cannot_write(file, error) from None
                by_kernel = False
                continue
        else:
            data = os.pread(source, min(stop - start, _CHUNK), start)
            write_all(target, memoryview(data), start + shift, file)
            done = len(data)
        if not done:
            raise _ended(file, start)
        start += done


def _ended(file: str, at: int) -> VerifyError:
    return VerifyError(f"{file}: ended at byte {at:,} while it was copied; did the file change meanwhile?")


def _cannot_write(file: str, error: OSError) -> ResourceError:
    return ResourceError(f"{file}: cannot write ({error.strerror}); free some disk space")


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


def forget(fd: int, offset: int = 0, nbytes: int = 0) -> None:
    """Tell the kernel that a range (to the end where `nbytes` is 0) will not be read again.

    Pages that go early are used again early; that halves what an edit costs the kernel, and leaves others what they
    have in its cache. What is not on disk yet stays.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


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
