"""Move what was made in a folder to beside it, all of it or nothing, and never in the place of others.

Owns the marks by which a file is known again where it was moved to. Never knows what is moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

#: Device and inode, which a file or folder keeps when it is moved.
Mark = list[int]


def marks(folder: Path, names: Iterable[str]) -> dict[str, Mark]:
    """What is in a folder by these names, with the marks by which `take_back` knows it."""
    return {name: _mark(folder / name) for name in names if (folder / name).exists()}


def move_out(folder: Path, moved: Mapping[str, Mark]) -> None:
    """Move these to beside the folder, in order.

    Raises:
        OSError: a name is taken there, or the file system does not take one; all is back in the folder.
    """
    try:
        for name in moved:
            _move(folder / name, folder.with_name(name))
    except OSError:
        take_back(folder, moved)
        raise


def take_back(folder: Path, moved: Mapping[str, Mark]) -> None:
    """Put back into the folder what of these lies beside it."""
    for name, mark in moved.items():
        here, there = folder / name, folder.with_name(name)
        if there.exists() and _mark(there) == mark:
            if here.exists():  # stopped between its two names
                there.unlink()
            else:
                there.rename(here)


def _mark(path: Path) -> Mark:
    stat = path.stat(follow_symlinks=False)
    return [stat.st_dev, stat.st_ino]


def _move(source: Path, target: Path) -> None:
    if source.is_dir():
        source.rename(target)  # takes the place of an empty folder at most
        return
    try:
        os.link(source, target)  # unlike a rename, never in the place of another file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise
        source.rename(target)
    else:
        source.unlink()
