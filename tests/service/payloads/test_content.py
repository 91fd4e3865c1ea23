"""JSON bodies: they are read as the standard library reads them, and refused if they are too intricate."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.examples.base64_images import decode_base64
from models.preprocess.limits import InputError
from service.payloads.content import NotJson, TooIntricate, parse

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=30)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(values, st.booleans(), st.sampled_from([None, 1]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_it_reads_what_json_says(value: object, ascii_only: bool, indent: int | None, mark: bytes) -> None:
    body = mark + json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse(body) == parse(bytearray(body)) == value


@given(st.binary(max_size=5_000), st.booleans())
def test_images_come_back(data: bytes, safe: bool) -> None:
    encoded = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    for text in (
        encoded,
        encoded.rstrip("="),
        "data:image/png;base64," + encoded,
        encoded[:7] + "\n " + encoded[7:],
    ):
        assert decode_base64(text) == data


def test_an_image_larger_than_a_slice_comes_back() -> None:
    data = random.Random(0).randbytes(3_000_001)
    lines = base64.encodebytes(data).decode()
    for text in (base64.b64encode(data).decode(), lines, "data:image/png;base64," + lines, " " + lines):
        assert decode_base64(text) == data


@pytest.mark.parametrize(
    "text", ["a", "ab=c", "????", "é" * 2_000, "data:image/png,abc", "AAA" * 1_000 + "*"]
)
def test_what_is_not_base64_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_base64(text)
    assert caught.value.code == "invalid_base64"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"text": "abc',
        b'{"text": "' + b"\\" * 5_000,
        b'{"text": "' + b"a" * 5_000 + b"\xff" + b'"}',
        b'{"text": "' + b"a" * 5_000 + b"\\ud800" + b'"}',
        b"[" * 100_000,
        b'{"a": "\xff"}',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        parse(body)


@pytest.mark.parametrize(("item", "count"), [(b"1,", 2_000_001), (b"[],", 500_000), (b"{},", 500_000)])
def test_what_would_take_a_parser_long_is_refused(item: bytes, count: int) -> None:
    with pytest.raises(TooIntricate):
        parse(b"[" + item * count + b"1]")


def test_a_long_text_may_have_as_many_commas_as_prose_has() -> None:
    text = "one, two, three, and a sentence without any more of them. " * 500_000
    assert parse(json.dumps({"text": text}).encode()) == {"text": text}
