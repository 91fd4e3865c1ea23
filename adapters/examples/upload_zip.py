"""Bulk uploads as a zip of folders, named by label. The directory is checked before the zip is opened."""

from __future__ import annotations

import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from adapters.examples.charset import decoded, encoding_of
from adapters.examples.upload import BadUpload, Found, Record, UploadLimits, bounded, cut, too_long
from adapters.examples.validation import PostedExample
from models.preprocess.limits import InputError, InputLimits
from models.spec import Kind

_INFLATION = 10  # largest decompressed size, as a multiple of the zip's own, above UploadLimits.zip_bytes
_SLICE = 1 << 16  # bytes decompressed at a time
_DIRECTORY_ENTRY = 1 << 8  # largest average size of a directory entry, in bytes
# Entries allowed besides two for each example: macOS gives every file a twin.
_ENTRIES_BESIDES = 1_000
# Names of files that operating systems leave behind, in lower case. Names that begin with a dot count too.
_LEFT_BEHIND = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"})
_ENCRYPTED, _UTF8 = 0x1, 0x800  # general purpose bit flags
_UNICODE_PATH = 0x7075  # header id of the extra field with the name in UTF-8
_LOCAL_HEADER = b"PK\x03\x04"
_UNKNOWN_SIZE = 0xFFFFFFFF
_ZIP64_END = b"PK\x06\x06"
_ZIP64_BYTES = 56 + 20  # the zip64 end of the directory, and its locator
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
    """The kind of a zip's files, from the first file that is in a folder, or else from the first file.

    `beginning`: the first 64 KiB of the zip. Raises BadUpload.
    """
    if not beginning.startswith(_LOCAL_HEADER):
        raise BadUpload("invalid_zip", "The upload is not a zip file, or is empty.")
    paths = [path for path in map(_path, _names(beginning)) if path]
    if not paths:
        raise BadUpload("no_examples", "The zip file does not begin with a file.")
    first = next((path for path in paths if len(path) > 1), paths[0])
    return "text" if first[-1].lower().endswith(".txt") else "image"


def _names(beginning: bytes) -> Iterator[str]:
    """Yield the names of a zip's first files from their local headers (APPNOTE.TXT, 4.3.7)."""
    place = 0
    while (place := beginning.find(_LOCAL_HEADER, place)) >= 0 and place + 30 <= len(beginning):
        size, _, name, extra = struct.unpack_from("<IIHH", beginning, place + 18)
        if place + 30 + name <= len(beginning):
            yield beginning[place + 30 : place + 30 + name].decode("utf-8", "replace")
        # A size that was unknown when the header was written is 0; the search then finds the next header.
        place += 30 + name + extra + (0 if size == _UNKNOWN_SIZE else size)


def _path(name: str) -> list[str]:
    """Folders and file name of an entry; empty for a folder and for what operating systems leave behind."""
    parts = name.replace("\\", "/").split("/")
    path = [part for part in parts if part not in ("", ".")]
    left_behind = any(part.startswith(".") or part.lower() in _LEFT_BEHIND for part in path)
    return [] if left_behind or not parts[-1] else path


def _name(info: zipfile.ZipInfo) -> str:
    """The intended name of an entry, in Unicode NFC. Raises InputError (invalid_name).

    Without the UTF-8 flag, ZipFile decodes names as CP437, in which every byte is a character. Most programs
    write UTF-8 all the same, or add the name in an extra field (APPNOTE.TXT, 4.6.9). No other code page is
    guessed.
    """
    name = info.orig_filename
    if not info.flag_bits & _UTF8:
        raw = name.encode("cp437")
        told = _unicode_path(info.extra, zlib.crc32(raw))
        try:
            name = (told or raw).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                "invalid_name", "The name of the file is not UTF-8. Pack the folder with names in UTF-8."
            ) from error
    return unicodedata.normalize("NFC", name.split("\0")[0])


def _unicode_path(extra: bytes, checksum: int) -> bytes | None:
    """The UTF-8 name in an entry's extra field, if its checksum matches the name in the header."""
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, place)
        field = extra[place + 4 : place + 4 + size]
        if kind == _UNICODE_PATH and len(field) > 5 and struct.unpack_from("<BL", field) == (1, checksum):
            return field[5:]
        place += 4 + size
    return None


class _Room:
    """The number of bytes that may still be decompressed from a zip."""

    def __init__(self, size: int, always: int) -> None:
        self._always = always
        self._left = max(always, _INFLATION * size)

    def take(self, count: int) -> None:
        """Deduct `count` decompressed bytes, whether or not they can be used. Raises BadUpload."""
        self._left -= count
        if self._left < 0:
            raise BadUpload(
                "invalid_zip",
                f"The zip file holds more than {self._always:,} bytes, and {_INFLATION} times its own. "
                "Send it in several parts.",
            )


def files(file: BinaryIO, limits: UploadLimits, found: Found) -> Iterator[Record]:
    """Yield the files of a zip, labelled by their folders. `file`: seekable. Raises BadUpload."""
    room = _Room(file.seek(0, io.SEEK_END), limits.zip_bytes)
    try:
        _check_directory(file, 2 * limits.max_examples + _ENTRIES_BESIDES)
        archive = zipfile.ZipFile(file)
    except BadUpload:
        raise
    except _BROKEN as error:
        raise BadUpload("invalid_zip", f"The zip file cannot be read: {error}.") from error
    with archive:
        for info in archive.infolist():
            try:
                name = _name(info)
            except InputError as error:
                raw = info.orig_filename.encode("cp437")
                yield Record(raw.decode(errors="backslashreplace"), PostedExample(error))
                continue
            path = _path(name)
            if path:
                label = path[-2] if len(path) > 1 else None
                content = _content(archive, info, limits.inputs, room, found)
                yield Record(name, PostedExample(content, label))
            elif not name.endswith(("/", "\\")):
                found.skipped += 1


def _check_directory(file: BinaryIO, most: int) -> None:
    """Raise BadUpload for a directory of more than `most` entries, before ZipFile creates an object for each.

    The directory is located and its entries are counted as ZipFile does; the number stated at the end of the
    zip is ignored.
    """
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise zipfile.BadZipFile("its directory is missing")
    size, begin = end[zipfile._ECD_SIZE], end[zipfile._ECD_LOCATION]  # type: ignore[attr-defined]
    too_many = BadUpload("too_many_examples", f"The zip file has more than {most:,} files and folders.")
    if size > most * _DIRECTORY_ENTRY:
        raise too_many
    file.seek(begin - size - (_ZIP64_BYTES if end[0] == _ZIP64_END else 0))
    directory = file.read(size)
    place = count = 0
    while place + 46 <= len(directory):
        (flags,) = struct.unpack_from("<H", directory, place + 8)
        sizes = struct.unpack_from("<HHH", directory, place + 28)
        if flags & _UTF8:
            _check_name(directory[place + 46 : place + 46 + sizes[0]])
        place += 46 + sum(sizes)
        count += 1
        if count > most:
            raise too_many


def _check_name(name: bytes) -> None:
    """Raise BadUpload for a name that is marked as UTF-8 and is not; ZipFile would fail on it."""
    try:
        name.decode()
    except UnicodeDecodeError as error:
        shown = cut(name.decode(errors="backslashreplace"))
        raise BadUpload(
            "invalid_zip", f"The name {shown} is marked as UTF-8 but is not UTF-8. Pack the folder again."
        ) from error


def _content(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: InputLimits, room: _Room, found: Found
) -> bytes | str | InputError:
    is_text = info.filename.lower().endswith(".txt")
    most = 4 * limits.max_text_chars if is_text else limits.max_image_bytes
    refusal = _refusal(info)
    if refusal is not None:
        return InputError("invalid_zip", refusal)
    content = bytearray()
    try:
        with archive.open(info) as member:
            # The size in the header may be wrong, so bytes are counted as they are read.
            while len(content) <= most and (some := member.read(min(_SLICE, most + 1 - len(content)))):
                content += some
                room.take(len(some))
    except BadUpload:
        raise
    except _BROKEN as error:
        return InputError("invalid_zip", f"The file cannot be read: {error}.")
    if len(content) > most:
        too_large = InputError("image_too_large", f"An image has at most {most:,} bytes.")
        return too_long(limits) if is_text else too_large
    if not is_text:
        return bytes(content)
    encoding = encoding_of(io.BytesIO(content))
    try:
        text = decoded(bytes(content), encoding)
    except InputError as error:
        return error
    found.encodings[encoding] += 1
    return bounded(text, limits)


def _refusal(info: zipfile.ZipInfo) -> str | None:
    """The reason not to open a file, or None."""
    if info.flag_bits & _ENCRYPTED:
        return "The file is encrypted. Pack it without a password."
    # A few bytes packed by another method may decompress to gigabytes in one read.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = zipfile.compressor_names.get(info.compress_type, f"method {info.compress_type}")  # type: ignore[attr-defined]
        return f"The file is packed by {method}. Pack it by deflate, or store it."
    if stat.S_ISLNK(info.external_attr >> 16):
        return "The file is a link. Pack what it leads to."
    return None
