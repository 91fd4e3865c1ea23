"""Requests that are none, or that can be read in more ways than one: from a seed, out of valid ones."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# The request hidden in a body: a server that answers it has taken the body for a request.
SMUGGLED = b"GET /adapters/smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"
GOOD = b"GET /backbones HTTP/1.1\r\nhost: localhost\r\n\r\n"

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes to send. doubtful: nothing behind its first answer may be answered. cut: it waits for more."""

    kind: str
    data: bytes
    doubtful: bool = False
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """A request before it is bytes."""

    method: bytes = b"GET"
    target: bytes = b"/backbones"
    version: bytes = b"HTTP/1.1"
    fields: Fields = ((b"host", b"localhost"),)
    body: bytes = b""

    def having(self, *fields: tuple[bytes, bytes]) -> Parts:
        """The request with more headers."""
        return replace(self, fields=(*self.fields, *fields))

    def render(self, end: bytes = b"\r\n", colon: bytes = b": ") -> bytes:
        """Its bytes."""
        lines = [self.method + b" " + self.target + b" " + self.version]
        lines += [name + colon + value for name, value in self.fields]
        return end.join(lines) + end + end + self.body


def posted(target: bytes, media: bytes, body: bytes) -> Parts:
    """A request with a body and its length."""
    return _posted(target, media, body).having((b"content-length", b"%d" % len(body)))


def _posted(target: bytes, media: bytes, body: bytes) -> Parts:
    return Parts(b"POST", target, body=body).having((b"content-type", media))


def chunked(*chunks: bytes) -> bytes:
    """A body in chunks."""
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"


def _form(*parts: bytes, boundary: bytes = b"x") -> bytes:
    return b"".join(b"--%s\r\n%s\r\n" % (boundary, part) for part in parts) + b"--%s--\r\n" % boundary


_FIELD = b'content-disposition: form-data; name="adapter"\r\n\r\nnone'
_FILE = b'content-disposition: form-data; name="f"; filename="a/b.txt"\r\ncontent-type: text/plain\r\n\r\nhi'
_TEXT = b"/predict?adapter=none"

VALID: Sequence[Parts] = (
    Parts(),
    Parts(target=b"/adapters/nothing?limit=3"),
    Parts(b"DELETE", b"/adapters/nothing"),
    Parts(b"OPTIONS", b"/predict"),
    posted(_TEXT, b"text/plain", SMUGGLED),
    posted(b"/adapt", b"application/json", b'{"adapter": "none", "examples": []}'),
    posted(b"/predict", b"multipart/form-data; boundary=x", _form(_FIELD, _FILE)),
    _posted(_TEXT, b"text/plain", chunked(b"hello", SMUGGLED)).having((b"transfer-encoding", b"chunked")),
)

_METHODS = (b"", b"get", b"GE T", b"G\tT", b"GET\0", b"FOO", b"PRI", b"TRACE", b"\xff\xfe", b"G" * 9_000,
            b"GET ",
            b" GET", b"CONNECT", b"SOURCE", b"M-SEARCH", b"GET\r\nGET", b"(", b"PROPFIND")  # fmt: skip
_VERSIONS = (b"", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1", b"http/1.1", b"HTTP/1.1 x",
             b"HTTP/1.10", b"HTTP/-1.1", b"HTTPS/1.1", b"RTSP/1.0", b"ICE/1.0", b"HTTP/1.1\0",
             b"\xc0\xaf")  # fmt: skip
_TARGETS = (
    b"", b"*", b"http://localhost/backbones", b"http://user:pass@evil.example/adapters", b"https://[::1",
    b"localhost:80", b"evil.example:443", b"//evil.example/adapters", b"///", b"/../../../etc/passwd",
    b"/docs/../../../../etc/passwd", b"/docs/..%2f..%2f..%2f..%2fetc%2fpasswd", b"/%2e%2e/%2e%2e/etc/passwd",
    b"/docs/%2e%2e%5c%2e%2e%5cetc", b"/docs/%252e%252e%252fetc", b"/adapters/%c0%ae%c0%ae/", b"/adapters/%",
    b"/adapters/%zz", b"/adapters/%00", b"/adapters/a%0d%0aset-cookie:%20a", b"/adapters/a\\b", b"/a b",
    b"/adapters/\xc3\xa4", b"/adapters/\xff", b"/adapters/a\0b", b"/adapters/a\tb", b"/adapters/a#b",
    b"/adapters/",
    b"/adapters//", b"?", b"/?" + b"a=b&" * 2_000, b"/" + b"a" * 9_000, b"/" + b"a/" * 4_000,
    b"/jobs/%00/events",
    b"/adapters/x/examples/..%2f..%2f%00", b"/adapters/x/versions/999999999999999999999", b"backbones", b";",
    b"/;a=b",
    b"/adapters?cursor=%ff%fe", b"/adapters?limit=1&limit=x", b"/jobs?adapter=%F0%9F%98%80",
    b"/predict?adapter=none&top_k=1e9",
    b"file:///etc/passwd", b"/metrics/../adapters", b"/livez/../adapters", b"/tenants/%00/keys/%00",
    b"/readyz?" + b"%" * 99,
)  # fmt: skip
_FIELDS: Sequence[bytes] = (
    b"x : a", b" x: a", b"x\0: a", b"x\x01y: a", b"x\xe4: a", b": a", b"x", b"x a", b"x: a\r\n folded",
    b"x: a\rb",
    b"x: a\0b", b"x: a\x07b", b"x: a\x7fb", b"x: \xff\xfe\x80", b"x: \xc3\xa4", b"x:" + b" " * 5_000,
    b"x(: a", b"x\t: a",
    b"x-tenant: \xff", b"x-tenant: ../..", b"x-tenant: a\tb", b"x-tenant: A", b"x-tenant: a\r\nx-tenant: b",
    b"authorization: Bearer \xff\xff", b"authorization: Basic \0",
    b"authorization: Bearer a\r\nauthorization: Bearer b",
    b"authorization: Bearer tw_0123456789abcdef_x", b"x-request-id: a\x80", b"x-request-id: " + b"a" * 5_000,
    b"accept: */*;q=\xff", b"cookie: " + b"a=b;" * 2_000, b"if-match: \xff",
    b'if-match: "' + b"1" * 5_000 + b'"',
    b"origin: null", b"origin: http://[", b"origin: \xff", b"range: bytes=0-", b"connection: close, \xff",
    b"content-type: " + b"a" * 9_000, b"content-type: text/plain; charset=\xff",
    b"te: trailers, chunked;q=0.1",
    b"x-forwarded-host: evil", b"forwarded: for=_x;host=evil", b"max-forwards: -1", b"x:a\nb:c",
    b"x: a\n\nGET / HTTP/1.1",
)  # fmt: skip
_HOSTS: Sequence[bytes] = (
    b"", b"host: \r\n", b"host: localhost\r\nhost: localhost\r\n",
    b"host: localhost\r\nhost: evil.example\r\n",
    b"host: evil.example\r\n", b"host: localhost, evil.example\r\n", b"host: [::1\r\n", b"host: ]\r\n",
    b"host: local host\r\n",
    b"host: localhost:99999\r\n", b"host: a@localhost\r\n", b"host: localhost/x\r\n",
    b"host: localhost#\r\n", b"host: \xff\r\n",
    b"host: localhost\0\r\n", b"host:localhost\r\n", b"HOST: localhost\r\nhOsT: evil\r\n",
    b"host: " + b"a" * 9_000 + b"\r\n",
    b"host: http://localhost\r\n", b"host: 127.0.0.1.evil.example\r\n", b"host: 2130706433\r\n",
    b"host: \xe2\x84\xaa\r\n",
)  # fmt: skip
# Lengths and encodings that contradict each other, or cannot be.
_FRAMES: Sequence[bytes] = (
    b"content-length: 0\r\ntransfer-encoding: chunked\r\n",
    b"transfer-encoding: chunked\r\ncontent-length: 6\r\n",
    b"content-length: 5\r\ncontent-length: 0\r\n", b"content-length: 0\r\ncontent-length: 5\r\n",
    b"content-length: 5, 0\r\n", b"content-length: -1\r\n", b"content-length: +5\r\n",
    b"content-length: 0x5\r\n",
    b"content-length: 5 0\r\n", b"content-length: 1e1\r\n", b"content-length: \xb2\r\n",
    b"content-length: 5\0\r\n",
    b"content-length: 99999999999999999999999999\r\n", b"content-length: 18446744073709551616\r\n",
    b"content-length:\r\n",
    b"content-length : 0\r\n", b"content_length: 0\r\ncontent-length: x\r\n", b"content-length: \x0b5\r\n",
    b"transfer-encoding: xchunked\r\n", b"transfer-encoding: chunked, identity\r\n",
    b"transfer-encoding: gzip\r\n",
    b"transfer-encoding: \x0bchunked\r\n", b"transfer-encoding:\r\n chunked\r\ncontent-length: 0\r\n",
    b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\ncontent-length: 0\r\n",
    b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", b'transfer-encoding: "chunked"\r\n',
    b"transfer-encoding : chunked\r\ncontent-length: 0\r\n", b"transfer-encoding: chunked;a=b\r\n",
    b"transfer-encoding: chunked\0\r\n", b"transfer-encoding: c\xc5\xbfhunked\r\n",
    b" transfer-encoding: chunked\r\n",
    b"x: a\rtransfer-encoding: chunked\r\ncontent-length: 0\r\n",
    b"x: a\ncontent-length: 0\r\ntransfer-encoding: chunked\r\n",
)  # fmt: skip
# Malformed chunks, each in front of a hidden request.
_CHUNKS: Sequence[bytes] = (
    b"-1\r\n", b"0x5\r\nhello\r\n", b"FFFFFFFFFFFFFFFFF\r\nhello\r\n", b"ffffffffffffffff\r\nhello\r\n",
    b"g\r\nhello\r\n",
    b"\r\nhello\r\n", b"5\r\nhelloX", b"5\r\nhell\r\n", b"5\rhello\r\n", b"5 \0\r\nhello\r\n",
    b"5;a=\0\r\nhello\r\n", b"+5\r\nhello\r\n",
    b"5_0\r\nhello\r\n", b"5\r\nhello\r\n0\r\ncontent\0: 5\r\n\r\n", b"5\r\nhello0\r\n\r\n", b";\r\n",
    b"\xb2\r\nhello\r\n",
    b"5\r\nhello\r\n0\r\n bad: x\r\n\r\n", b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
)  # fmt: skip
_FORMS: Sequence[tuple[bytes, bytes]] = (
    (b"multipart/form-data; boundary=y", _form(_FIELD, _FILE)), (b"multipart/form-data; boundary=",
     _form(_FIELD)),
    (b"multipart/form-data", _form(_FIELD)), (b"multipart/form-data; boundary=x", _form(*[_FILE] * 1_100)),
    (b"multipart/form-data; boundary=x", _form(*[_FIELD] * 200)), (b"multipart/form-data; boundary=x",
     b"--x\r\n" * 20_000),
    (b"multipart/form-data; boundary=x", _form(b"\r\nhello")), (b"multipart/form-data; boundary=x",
     _form(b"hello")),
    (b"multipart/form-data; boundary=x", _form(b"a" * 70_000)), (b"multipart/form-data; boundary=x",
     _form(_FIELD)[:-6]),
    (b"multipart/form-data; boundary=x",
     _form(b"content-type: multipart/mixed; boundary=y\r\n\r\n" + _form(_FILE, boundary=b"y"))),
    (b"multipart/form-data; boundary=x", _form(_FILE.replace(b"text/plain",
     b"text/plain; charset=utf-7") + b"\xff")),
    (b"multipart/form-data; boundary=x; charset=nothing", _form(_FIELD, _FILE)),
    (b"multipart/form-data; boundary=x; charset=utf-16", _form(_FIELD, _FILE)),
    (b"multipart/form-data; boundary=x; charset=rot13", _form(_FIELD, _FILE)),
    (b"multipart/form-data; boundary=x; charset=base64", _form(_FIELD, _FILE)),
    (b"multipart/form-data; boundary=x; charset=idna", _form(_FIELD, _FILE)),
    (b"multipart/form-data; boundary=x", _form(_FIELD.replace(b"none", b"\xff\xfe"))),
    (b"multipart/form-data; boundary=x", _form(_FIELD.replace(b"adapter", b"\xff\0"))),
    (b"multipart/form-data; boundary=x", _form(_FILE.replace(b"a/b.txt", b"\xff/\0"))),
    (b"multipart/form-data; boundary=x", _form(_FILE.replace(b'filename="a/b.txt"',
     b"filename*=utf-8''%ff%fe"))),
    (b"multipart/form-data; boundary=x", _form(_FILE.replace(b'filename="a/b.txt"', b"filename*=x'y'z"))),
    (b"multipart/form-data; boundary=x", _form(_FILE.replace(b"a/b.txt", b"../" * 5_000))),
    (b"multipart/form-data; boundary=x", _form(b'content-disposition: form-data\r\n\r\nx', _FILE)),
    (b"multipart/form-data; boundary=x", _form(b'content-disposition: attachment; name="f"\r\n\r\nx', _FILE)),
    (b"multipart/form-data; boundary=x", _form(b"x: y\r\n" * 5_000 + _FILE)),
    (b"multipart/form-data; boundary=" + b"x" * 5_000, _form(_FIELD)),
    (b"multipart/form-data; boundary=\xff", _form(_FIELD)),
    (b"multipart/mixed; boundary=x", _form(_FIELD)), (b"multipart/form-data; boundary=x; boundary=y",
     _form(_FIELD, _FILE)),
    (b"application/json; charset=utf-16", '{"adapter": "a"}'.encode("utf-16")), (b"application/json",
     b"\xef\xbb\xbf{}"),
    (b"application/json", b'{"adapter": "a", "adapter": "b"}'), (b"application/json", b"[" * 9_000),
    (b"application/json", b"\0"),
    (b"text/plain; charset=utf-16", "hello".encode("utf-16")), (b"text/plain; charset=nothing", b"\xff"),
    (b"application/x-ndjson", b"\0\n" * 100), (b"text/csv", b"\xff,\0\n" * 100), (b"application/zip",
     b"PK\3\4" + b"\xff" * 100),
    (b"image/png", b"\x89PNG\r\n\x1a\n"), (b"image/\xff", b"x"), (b",", b"x"),
)  # fmt: skip
_BYTES: Sequence[bytes] = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"SSH-2.0-x\r\n", b"\x04\x01\x00\x50\x7f\x00\x00\x01\0", b"QUIT\r\n", b"<xml/>\r\n\r\n", b"\0" * 200,
    b"\xff" * 200, b"\r\n" * 200,
    b"\n" * 200, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"GET", b"GET /\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n\r\n", b"PROXY TCP4 1 2 3 4\r\n",
)  # fmt: skip
_SOCKET_KEY = base64.b64encode(b"0123456789abcdef")
_WISHES: Sequence[Fields] = (
    ((b"expect", b"200-ok"),), ((b"expect", b"100-continue, x"),), ((b"expect", b"\xff"),),
    ((b"connection", b"upgrade, http2-settings"), (b"upgrade", b"h2c"), (b"http2-settings", b"AAMAAABk")),
    ((b"connection", b"upgrade"), (b"upgrade", b"foo")), ((b"connection", b"upgrade"),), ((b"upgrade",
     b"websocket"),),
    ((b"connection", b"upgrade"), (b"upgrade", b"websocket")),
    ((b"connection", b"upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-version", b"13"),
     (b"sec-websocket-key", _SOCKET_KEY)),
    ((b"connection", b"upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-version", b"99"),
     (b"sec-websocket-key", b"\xff")),
    ((b"content-encoding", b"gzip"),), ((b"content-encoding", b"br, gzip"),), ((b"content-encoding",
     b"\xff"),),
    ((b"content-encoding", b"identity"), (b"content-encoding", b"gzip")),
    ((b"content-type", b"application/json"), (b"content-type", b"application/x-ndjson")),
)  # fmt: skip

Maker = Callable[[random.Random, Parts], Message]


def _line(rng: random.Random, good: Parts) -> Message:
    which = rng.randrange(3)
    changed = (
        replace(good, method=rng.choice(_METHODS)),
        replace(good, version=rng.choice(_VERSIONS)),
        replace(good, target=rng.choice(_TARGETS)),
    )[which]
    return Message(("method", "version", "target")[which], changed.render() + rng.choice((b"", GOOD)))


def _field(rng: random.Random, good: Parts) -> Message:
    lines = good.render().split(b"\r\n", 2)
    return Message("field", b"\r\n".join((lines[0], rng.choice(_FIELDS), *lines[1:])))


def _host(rng: random.Random, good: Parts) -> Message:
    plain = replace(good, fields=good.fields[1:]).render()
    line, _, rest = plain.partition(b"\r\n")
    return Message("host", line + b"\r\n" + rng.choice(_HOSTS) + rest)


def _frame(rng: random.Random, good: Parts) -> Message:
    parts = _posted(rng.choice((_TEXT, b"/adapt", b"/embed?backbone=none")), b"text/plain", b"")
    body = rng.choice((SMUGGLED, b"0\r\n\r\n" + SMUGGLED, b"5\r\nhello\r\n0\r\n\r\n" + SMUGGLED))
    head = parts.render()[:-2]
    return Message("frame", head + rng.choice(_FRAMES) + b"\r\n" + body, doubtful=True)


def _chunk(rng: random.Random, good: Parts) -> Message:
    head = _posted(_TEXT, b"text/plain", b"").having((b"transfer-encoding", b"chunked")).render()
    before = rng.choice((b"", b"3\r\nabc\r\n"))
    return Message("chunk", head + before + rng.choice(_CHUNKS) + SMUGGLED, doubtful=True)


def _media(rng: random.Random, good: Parts) -> Message:
    media, body = rng.choice(_FORMS)
    target = rng.choice((b"/adapt", b"/predict", _TEXT, b"/embed?backbone=minilm-l6-v2", b"/v1/embeddings"))
    return Message("media", posted(target, media, body).render())


def _wish(rng: random.Random, good: Parts) -> Message:
    data = good.having(*rng.choice(_WISHES)).render()
    return Message("wish", data + rng.choice((b"", GOOD)))


def _cut(rng: random.Random, good: Parts) -> Message:
    data = good.render()
    return Message("cut", data[: rng.randrange(1, len(data))], cut=True)


def _ends(rng: random.Random, good: Parts) -> Message:
    return Message(
        "ends", good.render(rng.choice((b"\n", b"\r", b"\n\r", b"\r\r\n")), rng.choice((b": ", b":")))
    )


def _huge(rng: random.Random, good: Parts) -> Message:
    fields = rng.choice((((b"x", b"a" * 70_000),), ((b"x", b"a"),) * 9_000, ((b"x" * 70_000, b"a"),)))
    return Message("huge", good.having(*fields).render(), doubtful=True)


def _noise(rng: random.Random, good: Parts) -> Message:
    return Message("noise", rng.choice(_BYTES), cut=True)


def _flips(rng: random.Random, good: Parts) -> Message:
    data = bytearray(good.render())
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data))
        change = rng.randrange(4)
        if change == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[place]
        elif change == 2:
            data[place:place] = bytes([rng.randrange(256)])
        else:
            data[place:place] = data[rng.randrange(place + 1) : place]
    return Message("flips", bytes(data))


def _pipeline(rng: random.Random, good: Parts) -> Message:
    bad = rng.choice((_line, _field, _frame, _chunk, _flips))(rng, good)
    return Message(f"pipeline of {bad.kind}", GOOD * rng.randrange(1, 4) + bad.data + GOOD)


_MAKERS: Sequence[Maker] = (
    _line, _line, _field, _field, _host, _frame, _frame, _chunk, _media, _media, _wish, _cut, _ends, _huge,
    _noise,
    _flips, _flips, _pipeline, _pipeline,
)  # fmt: skip


def message(seed: int, fields: Fields = ()) -> Message:
    """The message of that number. fields: headers that the valid one has besides."""
    rng = random.Random(seed)
    return _MAKERS[seed % len(_MAKERS)](rng, rng.choice(VALID).having(*fields))
