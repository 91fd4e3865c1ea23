"""Durable writes, and listing and removal of folders that others change meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from adapters.storage.artifact import Buffer

_DELETIONS = 100  # attempts to delete a folder


def remove_folder(folder: Path) -> None:
    """Remove the folder with all its contents, if it exists."""
    for attempt in range(1, _DELETIONS + 1):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if not folder.exists():
                return
            # A publication or another deletion changed the folder while its files were removed.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or attempt == _DELETIONS:
                raise


def write_synced(path: Path, data: Buffer) -> None:
    """Write a new file, and wait until its content is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none if the folder does not exist."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def folders_in(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder; none if it does not exist."""
    for entry in entries_of(folder):
        if entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
