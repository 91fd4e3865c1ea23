"""JSON bodies: what is taken out before parsing is what a parser would have found."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.examples.base64_images import decode_base64
from models.preprocess.limits import InputError
from service.payloads.lifting import NotJson, TooIntricate, parse

MOST = 1 << 20


def resolve(body: bytes) -> object:
    """The parsed body with every placeholder of "text" resolved."""
    lifted = parse(body, max_rest=MOST)

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: lifted.text(item, 1 << 30) if key == "text" and isinstance(item, str) else walk(item)
                for key, item in value.items()
            }
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(lifted.value)


long_texts = st.one_of(
    st.text(max_size=20),
    st.text(min_size=1, max_size=30).map(lambda part: part * 600),
    st.sampled_from(['"', "\\", '\\"', '"text":"', "\\\\\\", "é", "𝄞", "\u0000"]).map(
        lambda part: part * 3000
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.integers(-5, 5), long_texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["text", "label", 'a "text', "text\\", "x"]), inner, max_size=4),
    ),
    max_leaves=8,
)


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_it_reads_what_json_says(value: object, ascii_only: bool, indent: int | None) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert resolve(body) == value


@given(st.binary(max_size=5_000), st.booleans())
def test_images_come_back(data: bytes, safe: bool) -> None:
    encoded = (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()
    for text in (
        encoded,
        encoded.rstrip("="),
        "data:image/png;base64," + encoded,
        encoded[:7] + "\n " + encoded[7:],
    ):
        lifted = parse(json.dumps({"image": text}).encode(), max_rest=MOST)
        assert lifted.image(lifted.value["image"]) == data


@pytest.mark.parametrize("spaces", [1, 30, 100, 10_000])
def test_white_space_around_the_colon(spaces: int) -> None:
    body = b'{"text"' + b" " * spaces + b":" + b"\n" * spaces + b'"' + b"a" * 5_000 + b'"}'
    assert resolve(body) == {"text": "a" * 5_000}


def test_slashes_may_be_escaped() -> None:
    data = bytes(range(256)) * 20
    body = b'{"image": "' + base64.b64encode(data).replace(b"/", b"\\/") + b'"}'
    lifted = parse(body, max_rest=MOST)
    assert lifted.image(lifted.value["image"]) == data


def test_an_image_larger_than_a_slice_comes_back() -> None:
    data = random.Random(0).randbytes(3_000_001)
    lifted = parse(json.dumps({"image": base64.b64encode(data).decode()}).encode(), max_rest=MOST)
    assert lifted.image(lifted.value["image"]) == data


@pytest.mark.parametrize(
    "text", ["a", "ab=c", "????", "é" * 2_000, "data:image/png,abc", "AAA" * 1_000 + "*"]
)
def test_what_is_not_base64_is_an_error_of_its_own(text: str) -> None:
    lifted = parse(json.dumps({"image": text}).encode(), max_rest=MOST)
    with pytest.raises(InputError) as caught:
        lifted.image(lifted.value["image"])
    assert caught.value.code == "invalid_base64"
    with pytest.raises(InputError):
        decode_base64(text.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"text": "abc',
        b'{"text": "' + b"a" * 5_000,
        b'{"text": "' + b"\\" * 5_000,
        b'{"text": "' + b"a" * 5_000 + b"\\",
        b'{"text": "' + b"a" * 5_000 + b'"',
        b'x "text": "' + b"a" * 5_000 + b'"',
        b"[" * 100_000,
        b'{"a": "\xff"}',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(NotJson):
        parse(body, max_rest=MOST)


@pytest.mark.parametrize("broken", [b"\xff", b"\\x", b"\n", b"\\ud800"])
def test_a_lifted_text_that_is_not_json_is_refused(broken: bytes) -> None:
    lifted = parse(b'{"text": "' + b"a" * 5_000 + broken + b'"}', max_rest=MOST)
    with pytest.raises(NotJson):
        lifted.text(lifted.value["text"], 1 << 20)


def test_a_text_far_too_long_is_not_decoded() -> None:
    lifted = parse(json.dumps({"text": "a" * 5_000}).encode(), max_rest=MOST)
    with pytest.raises(InputError) as caught:
        lifted.text(lifted.value["text"], 100)
    assert caught.value.code == "text_too_long"


@pytest.mark.parametrize(
    "body",
    [
        b'{"x": "' + b"a" * MOST + b'"}',
        b"[" + b"1," * 600_000 + b"1]",
        b"{" + b'"text":"",' * 80_000 + b'"text":""}',
        b"{" + b'"text"' * 80_000 + b"}",
        b'{"x": "'
        + b"a" * (MOST // 2)
        + b'", "text": "'
        + b"a" * 5_000
        + b'", "y": "'
        + b"a" * (MOST // 2)
        + b'"}',
    ],
)
def test_what_would_take_a_parser_long_is_refused(body: bytes) -> None:
    with pytest.raises(TooIntricate):
        parse(body, max_rest=MOST)
