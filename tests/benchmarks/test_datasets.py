from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data import datasets
from benchmarks.data.archives import Archive, FetchError, fetch, unpack
from benchmarks.data.datasets import Sample

# Labels, samples, and what de-duplication dropped.
PUBLISHED_TEXTS = {
    "reviews-nl": (2, 2969, 31),
    "reviews-fr": (2, 1284, 216),
    "reviews-de": (2, 155, 45),
    "hedges": (2, 2957, 43),
    "chatter-nl": (7, 181, 14),
    "chatter-en": (9, 550, 66),
    "emoji-words-de": (9, 1914, 0),
    "emoji-words-nl": (9, 1914, 0),
    "sayings-de": (8, 2398, 7),
}


def _sample(text: str, label: str, key: str = "") -> Sample:
    return Sample(text, label, key or text, "", datasets.text_digest(text))


def _archive(path: Path, sha256: str | None = None) -> Archive:
    """An archive that is "fetched" by copying a file that the test made."""
    digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive(path.name, digest, ("cp", str(path), "."), re.compile(r"data/.*\.txt"))


def _tgz(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in ("./data/a.txt", "data/b.png", "other/c.txt", "data/../../escape.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    return path


def _wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name in ("data/a.txt", "data/b.png", "other/c.txt"):
            wheel.writestr(name, "hello")
    return path


def _deb(path: Path) -> Path:
    root = path.with_suffix("")
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nDescription: files\n"
        "Maintainer: A Test <test@example.org>\n"
    )
    (root / "data").mkdir()
    (root / "data/a.txt").write_text("hello")
    (root / "data/b.png").write_text("hello")
    subprocess.run(["dpkg-deb", "--build", str(root), str(path)], check=True, capture_output=True)
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_tgz, "tiny.tgz"),
        (_wheel, "tiny.whl"),
        pytest.param(
            _deb,
            "tiny.deb",
            marks=pytest.mark.skipif(
                shutil.which("dpkg-deb") is None, reason="only Debian packs Debian packages"
            ),
        ),
    ],
)
def test_only_wanted_members_are_unpacked_and_only_once(
    make: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    archive = _archive(make(tmp_path / name))
    folder = unpack(archive, tmp_path / "cache")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == ["data/a.txt"]
    assert not list(tmp_path.rglob("escape.txt"))
    (tmp_path / name).unlink()
    assert unpack(archive, tmp_path / "cache") == folder


def test_an_archive_with_another_digest_is_refused_and_not_kept(tmp_path: Path) -> None:
    archive = _archive(_wheel(tmp_path / "tiny.whl"), sha256="0" * 64)
    with pytest.raises(FetchError, match="pinned is 0000"):
        fetch(archive, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_client_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no-such-client is needed"):
        fetch(Archive("x", "0", ("no-such-client",), re.compile("")), tmp_path)
    failing = (sys.executable, "-c", "raise SystemExit('no network')")
    with pytest.raises(FetchError, match="no network"):
        fetch(Archive("x", "0", failing, re.compile("")), tmp_path)


def test_equal_contents_count_once_and_contradicting_labels_not_at_all() -> None:
    samples = [
        _sample("Hello  you", "a"),
        _sample("hello you", "a"),
        _sample("yes", "a"),
        _sample("Yes", "b"),
    ]
    kept, dropped = datasets.deduplicate(samples)
    assert [sample.input for sample in kept] == ["Hello  you"]
    assert dropped == 3


def test_a_picture_has_one_digest_in_every_lossless_encoding() -> None:
    picture = Image.effect_noise((9, 7), 80).convert("RGB")
    encoded = []
    for kind in ("PNG", "BMP"):
        file = io.BytesIO()
        picture.save(file, kind)
        encoded.append(file.getvalue())
    assert datasets.image_digest(encoded[0]) == datasets.image_digest(encoded[1])
    cow = Path(__file__).parents[2] / "examples/unseen/cow.png"
    assert datasets.image_digest(encoded[0]) != datasets.image_digest(cow.read_bytes())


def test_every_prefix_is_stratified_and_the_order_of_files_does_not_matter() -> None:
    samples = [_sample(f"a{n}", "a") for n in range(60)] + [_sample(f"b{n}", "b") for n in range(30)]
    ordered = datasets.stratified_order(samples, 1)
    assert Counter(sample.label for sample in ordered[:30]) == {"a": 20, "b": 10}
    assert datasets.stratified_order(reversed(samples), 1) == ordered
    assert datasets.stratified_order(samples, 2) != ordered


def test_shots_take_as_many_of_each_label() -> None:
    samples = [_sample(f"a{n}", "a") for n in range(60)] + [_sample(f"b{n}", "b") for n in range(30)]
    train, rest = datasets.shots(samples, 5, 0)
    assert Counter(sample.label for sample in train) == {"a": 5, "b": 5}
    assert len(rest) == 80
    assert not {sample.key for sample in train} & {sample.key for sample in rest}


def test_unseen_leaves_no_key_on_both_sides() -> None:
    one = [_sample(f"one {n}", "a", key=str(n)) for n in range(40)]
    other = [_sample(f"other {n}", "a", key=str(n)) for n in range(50)]
    train, test = datasets.unseen(one, other, 0.5, 0)
    assert len(train) == 20
    assert len(test) == 30
    assert not {sample.key for sample in train} & {sample.key for sample in test}


def test_the_published_texts_are_as_pinned() -> None:
    trec = datasets.load("trec-coarse")
    assert Counter(sample.label for sample in trec.samples).keys() == {
        "ABBR",
        "DESC",
        "ENTY",
        "HUM",
        "LOC",
        "NUM",
    }
    assert (len(trec.samples), trec.dropped) == (5380, 10072)
    assert len(datasets.load("trec-fine").labels) == 50
    spam = datasets.load("sms-spam")
    assert Counter(sample.label for sample in spam.samples) == {"ham": 3954, "spam": 557}


def test_the_published_sets_of_texts_are_as_pinned() -> None:
    """Labels, samples and what was dropped, and signs that the columns were read rightly."""
    found = {name: datasets.load(name) for name in PUBLISHED_TEXTS}
    assert {name: (len(data.labels), len(data.samples), data.dropped) for name, data in found.items()} == (
        PUBLISHED_TEXTS
    )
    dutch = Counter(sample.label for sample in found["reviews-nl"].samples)
    assert dutch == {"positive": 1500, "negative": 1469}
    reviews = [str(sample.input) for sample in found["reviews-fr"].samples if sample.label == "negative"]
    assert sum("ennui" in review for review in reviews) > sum("magnifique" in review for review in reviews)
    assert not any("Sprichwort" in str(sample.input) for sample in found["sayings-de"].samples)


def test_an_archive_of_sources_is_unpacked(tmp_path: Path) -> None:
    archive = _archive(_tgz(tmp_path / "tiny.tar.gz"))
    folder = unpack(archive, tmp_path / "cache")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.txt")] == ["data/a.txt"]
