"""Bulk uploads as a zip of folders: the folder of a file is its label. Bounded before it is opened."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from adapters.admission import Posted
from adapters.records import Kind
from adapters.uploaded import BadUpload, Record, UploadLimits, bounded
from models.preprocess import InputError, InputLimits

# How much more than its own bytes a zip may hold, and how much of it is inflated at a time.
_INFLATION = 4
_SLICE = 1 << 16
# What a zip's directory may take for each file, and files and folders besides the examples: macOS gives every
# file a twin.
_DIRECTORY_ENTRY = 1 << 8
_ENTRIES_BESIDES = 1_000
_LOCAL_HEADER = b"PK\x03\x04"
_UNKNOWN_SIZE = 0xFFFFFFFF
_ZIP64_END = b"PK\x06\x06"
_ZIP64_BYTES = 56 + 20
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    OSError,
)


def kind_of_files(beginning: bytes) -> Kind:
    """Of what kind a zip's files are: by the first file that has a folder for its label, else by the first.

    beginning: of the zip, 64 KiB. Raises BadUpload.
    """
    if not beginning.startswith(_LOCAL_HEADER):
        raise BadUpload("invalid_zip", "This is no zip file with anything in it.")
    paths = [path for path in map(_path, _names(beginning)) if path]
    if not paths:
        raise BadUpload("no_examples", "There is no file at the beginning of the zip.")
    first = next((path for path in paths if len(path) > 1), paths[0])
    return "text" if first[-1].lower().endswith(".txt") else "image"


def _names(beginning: bytes) -> Iterator[str]:
    """The names of a zip's first files, by the headers in front of them (APPNOTE.TXT, 4.3.7)."""
    place = 0
    while (place := beginning.find(_LOCAL_HEADER, place)) >= 0 and place + 30 <= len(beginning):
        size, _, name, extra = struct.unpack_from("<IIHH", beginning, place + 18)
        if place + 30 + name <= len(beginning):
            yield beginning[place + 30 : place + 30 + name].decode("utf-8", "replace")
        # A size that was not known yet when the header was written is 0: the next header is searched for.
        place += 30 + name + extra + (0 if size == _UNKNOWN_SIZE else size)


def _path(name: str) -> list[str]:
    """The folders and the file of a name in a zip; empty for a folder, and for what systems leave behind."""
    parts = name.replace("\\", "/").split("/")
    path = [part for part in parts if part not in ("", ".")]
    left_behind = any(part == "__MACOSX" or part.startswith(".") for part in path)
    return [] if left_behind or not parts[-1] else path


class _Room:
    """What the files of a zip may still hold."""

    def __init__(self, size: int) -> None:
        self._left = _INFLATION * size

    def take(self, count: int) -> None:
        """So much was inflated, whether or not it can be used. Raises BadUpload."""
        self._left -= count
        if self._left < 0:
            raise BadUpload("invalid_zip", f"The zip file holds more than {_INFLATION} times its bytes.")


def files(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    """The files of a zip with a folder each for their labels. file: seekable. Raises BadUpload."""
    room = _Room(file.seek(0, io.SEEK_END))
    try:
        _check_directory(file, 2 * limits.max_examples + _ENTRIES_BESIDES)
        archive = zipfile.ZipFile(file)
    except BadUpload:
        raise
    except _BROKEN as error:
        raise BadUpload("invalid_zip", f"The zip file cannot be read: {error}.") from error
    with archive:
        for info in archive.infolist():
            path = _path(info.filename)
            if path:
                label = path[-2] if len(path) > 1 else None
                yield Record(info.filename, Posted(_content(archive, info, limits.inputs, room), label))


def _check_directory(file: BinaryIO, most: int) -> None:
    """Raises BadUpload for a directory of more entries, before ZipFile makes an object of each.

    The directory is found as ZipFile finds it, and its entries are counted as ZipFile does: what the end of
    the zip says of their number is never looked at.
    """
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise zipfile.BadZipFile("it has no directory at its end")
    size, begin = end[zipfile._ECD_SIZE], end[zipfile._ECD_LOCATION]  # type: ignore[attr-defined]
    too_many = BadUpload("too_many_examples", f"The zip file has more than {most:,} files and folders.")
    if size > most * _DIRECTORY_ENTRY:
        raise too_many
    file.seek(begin - size - (_ZIP64_BYTES if end[0] == _ZIP64_END else 0))
    directory = file.read(size)
    place = count = 0
    while place + 46 <= len(directory):
        place += 46 + sum(struct.unpack_from("<HHH", directory, place + 28))
        count += 1
        if count > most:
            raise too_many


def _content(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: InputLimits, room: _Room
) -> bytes | str | InputError:
    is_text = info.filename.lower().endswith(".txt")
    most = 4 * limits.max_text_chars if is_text else limits.max_image_bytes
    # A few bytes of another method may inflate to gigabytes in one read.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return InputError("invalid_zip", "The file is neither stored nor deflated; pack it so.")
    content = bytearray()
    try:
        with archive.open(info) as member:
            # What a header says of the size need not be true.
            while len(content) <= most and (some := member.read(min(_SLICE, most + 1 - len(content)))):
                content += some
                room.take(len(some))
    except BadUpload:
        raise
    except _BROKEN as error:
        return InputError("invalid_zip", f"The file cannot be read: {error}.")
    if not is_text:
        if len(content) > most:
            return InputError("image_too_large", f"An image has at most {most:,} bytes.")
        return bytes(content)
    try:
        return bounded(content.decode("utf-8-sig"), limits)
    except UnicodeDecodeError as error:
        return InputError("invalid_text", f"The text is not UTF-8: {error.reason} at byte {error.start}.")
