"""Reads request bodies (JSON, multipart, or one raw input) into the domain's commands and queries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException

from adapters.adaptation.commands import AdaptCommand
from adapters.adaptation.example_editor import Amendment, Feedback
from adapters.examples.target import ExampleError
from adapters.examples.upload_forms import Form
from adapters.examples.validation import PostedExample
from adapters.jobs.submission import FINE_TUNE
from adapters.prediction.predictor import Input, PredictQuery
from models.preprocess.limits import InputError
from service.errors import Problem
from service.payloads.commands import adapt_command, faulty_example, posted_example, target_of
from service.payloads.content import (
    AT_ONCE,
    NotJson,
    TooIntricate,
    chunks_of,
    content_of,
    decoded_text,
    folder_of,
    form_of,
    input_of,
    joined,
    parse,
)
from service.payloads.requests import (
    AdaptForm,
    AdaptRequest,
    AmendRequest,
    EmbedRequest,
    ExampleIn,
    FeedbackRequest,
    InputIn,
    OpenAIRequest,
    PredictRequest,
    TargetIn,
    UploadRequest,
)
from service.payloads.validation import apart, lax, refuse_parameters, strict

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Asking = TypeVar("Asking", PredictRequest, EmbedRequest)

_ITEMS_AT_ONCE = 200
_ALL_IN_BODY = "With a JSON body all fields are in the body. Leave the query string out."
_SHORT_QUERY = 256  # bytes; longer query strings are not cached


@dataclass(frozen=True, slots=True)
class ParsedPredict:
    """A prediction query and the form of its body."""

    query: PredictQuery
    raw: bool  # the body was one raw input, so an error of that input is the error of the request


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reads request bodies within the limits of one request. Every method may raise Problem."""

    max_examples: int
    max_labels: int
    max_inputs: int
    max_openai_inputs: int

    async def adapt(self, request: Request) -> AdaptCommand:
        """Read examples as JSON or multipart."""
        media = media_type(request)
        if media == "multipart/form-data":
            return await self._adapt_form(request)
        if media != "application/json":
            raise unsupported(media, "application/json, multipart/form-data, NDJSON, CSV or a zip")
        return await self._json(request, self._adapt_command)

    def bulk(self, request: Request, form: Form) -> tuple[AdaptCommand, AsyncIterator[bytes]]:
        """Return the command of a bulk upload, which is in the query string, and the stream of its bytes."""
        body = lax(UploadRequest, dict(request.query_params))
        columns = body.columns()
        if columns and form != "csv":
            named = ", ".join(f"`{field}_column`" for field in columns)
            raise Problem(422, "invalid_request", f"Only a CSV table has columns. Leave out {named}.")
        if body.method == FINE_TUNE or body.strict:
            raise Problem(
                422,
                "invalid_request",
                f"A bulk upload ({form}) is fitted with linear_probe and cannot be strict.",
            )
        return replace(adapt_command(body, (), job=True), columns=columns), request.stream()

    def adapter(self, request: Request) -> str | None:
        """Return the adapter that a raw input is for, before its body is read; None for other bodies."""
        return _asked(request).adapter if _is_raw(media_type(request)) else None

    async def predict(self, request: Request) -> ParsedPredict:
        """Read inputs as JSON or multipart, or one raw image or text with the rest in the query string."""
        media = media_type(request)
        if media == "application/json":
            return await self._json(request, self._predict_query)
        raw = media != "multipart/form-data"
        inputs, fields = await self._inputs(request, media)
        body = _asked(request) if raw else lax(PredictRequest, dict(request.query_params), fields)
        return ParsedPredict(_query(body, inputs), raw=raw)

    async def embed(self, request: Request) -> tuple[str, Sequence[Input], bool]:
        """Return a backbone's name, the inputs (in any form of `predict`), and whether the body was raw."""
        media = media_type(request)
        if media == "application/json":
            return await self._json(request, self._embed_query)
        inputs, fields = await self._inputs(request, media)
        body = lax(EmbedRequest, dict(request.query_params), fields)
        return body.backbone, inputs, media != "multipart/form-data"

    async def openai(self, request: Request) -> OpenAIRequest:
        """Read a request to OpenAI's embeddings endpoint."""
        _want_json(request)

        def build(value: Any) -> OpenAIRequest:
            # A list of token ids is longer than one of texts; validation refuses it, whatever its length.
            texts = value.get("input") if isinstance(value, dict) else None
            if isinstance(texts, list) and isinstance(next(iter(texts), None), str):
                self._count(texts, self.max_openai_inputs, "texts")
            return strict(OpenAIRequest, value)

        return await self._json(request, build)

    async def feedback(self, request: Request) -> Feedback:
        """Read an input or an example's id, with the right label."""
        _want_json(request)
        return await self._json(request, self._feedback)

    async def amendment(self, request: Request) -> Amendment:
        """Read the changes to a kept example."""
        body = await self.model(request, AmendRequest)
        target = _target(body)
        if target is None and body.excluded is None and body.group is None:
            raise Problem(
                422,
                "invalid_request",
                "Send a field to change: `label`, `labels`, `target`, `excluded` or `group`.",
            )
        return Amendment(
            target=target,
            excluded=body.excluded,
            group=body.group,
            promote=body.promote,
            fit=body.fit,
        )

    async def nothing(self, request: Request) -> None:
        """Require an empty body or an empty JSON object."""
        if (await request.body()).strip() not in (b"", b"{}"):
            raise Problem(422, "invalid_request", "This request takes no body. Leave it out.")

    async def model(self, request: Request, model: type[M]) -> M:
        """Read a small JSON body."""
        _want_json(request)
        return await self._json(request, lambda value: strict(model, value))

    async def _json(self, request: Request, build: Callable[[Any], T]) -> T:
        refuse_parameters(request.query_params, (), why=_ALL_IN_BODY)
        chunks = await chunks_of(request)

        def read() -> T:
            try:
                return build(parse(joined(chunks)))
            except TooIntricate as error:
                raise Problem(413, error.code, str(error)) from error
            except NotJson as error:
                raise Problem(400, error.code, str(error)) from error

        at_once = (
            sum(map(len, chunks)) <= AT_ONCE and sum(chunk.count(b",") for chunk in chunks) <= _ITEMS_AT_ONCE
        )
        return read() if at_once else await asyncio.to_thread(read)

    def _adapt_command(self, value: Any) -> AdaptCommand:
        self._count_in(value, "examples", self.max_examples)
        for field in ("labels", "weights"):
            self._count_in(value, field, self.max_labels)
        body, faults = apart(AdaptRequest, value, "examples", ExampleIn)
        good = (posted_example(example) for example in body.examples)
        return adapt_command(
            body, _merged(good, {at: faulty_example(value, at, one) for at, one in faults.items()})
        )

    def _predict_query(self, value: Any) -> ParsedPredict:
        self._count_in(value, "inputs", self.max_inputs)
        body, inputs = self._items(PredictRequest, value)
        return ParsedPredict(_query(body, inputs), raw=False)

    def _embed_query(self, value: Any) -> tuple[str, Sequence[Input], bool]:
        self._count_in(value, "inputs", self.max_inputs)
        body, inputs = self._items(EmbedRequest, value)
        return body.backbone, inputs, False

    def _items(self, model: type[Asking], value: Any) -> tuple[Asking, Sequence[Input]]:
        """Return a request and its inputs, with an error in the place of each malformed one."""
        body, faults = apart(model, value, "inputs", InputIn)
        good = (input_of(one) for one in body.inputs)
        errors = {at: InputError(one.code, one.detail) for at, one in faults.items()}
        inputs = _merged(good, errors)
        _some(inputs)
        return body, inputs

    async def _adapt_form(self, request: Request) -> AdaptCommand:
        files, fields = await _form(request, self.max_examples)
        body = lax(AdaptForm, dict(request.query_params), fields)
        return adapt_command(
            body, [PostedExample(await content_of(file), folder_of(file.filename)) for file in files]
        )

    async def _inputs(self, request: Request, media: str) -> tuple[Sequence[Input], dict[str, str]]:
        if media == "multipart/form-data":
            files, fields = await _form(request, self.max_inputs)
            inputs = [await content_of(file) for file in files]
            _some(inputs)
            return inputs, fields
        if not _is_raw(media):
            raise unsupported(media, "application/json, multipart/form-data, image/* or text/plain")
        body = await request.body()
        return [decoded_text(body) if media == "text/plain" else body], {}

    def _feedback(self, value: Any) -> Feedback:
        body = strict(FeedbackRequest, value)
        if (body.id is None) == (body.image is None and body.text is None):
            raise Problem(422, "invalid_request", "Send either an input or the id of an example.")
        return Feedback(
            target=_target(body),
            input=None if body.id is not None else input_of(body),
            id=body.id,
            promote=body.promote,
            fit=body.fit,
            group=body.group,
            sampled=body.sampled,
        )

    def _count_in(self, value: Any, key: str, most: int) -> None:
        if isinstance(value, dict):
            self._count(value.get(key), most, key)

    @staticmethod
    def _count(items: Any, most: int, what: str) -> None:
        # Items are counted before validation, which would make an error object of each wrong one of millions.
        if isinstance(items, list | dict) and len(items) > most:
            raise too_many(most, what)


def media_type(request: Request) -> str:
    """Return the body's media type, lower case, without parameters. Raises a 415 Problem if compressed."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Problem(
            415,
            "unsupported_encoding",
            f"A body with Content-Encoding {encoding} is not supported. Send it uncompressed.",
        )
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _is_raw(media: str) -> bool:
    return media.startswith("image/") or media in ("text/plain", "application/octet-stream")


def unsupported(media: str, wanted: str) -> Problem:
    """Return the refusal of a media type. `wanted`: those that are read."""
    return Problem(
        415,
        "unsupported_media_type",
        f"A body of {media or 'no media type'} is not supported here. Send {wanted}.",
    )


def too_many(most: int, what: str) -> Problem:
    """Return the refusal of more than `most` items in one request."""
    return Problem(413, "too_many_items", f"A request has at most {most:,} {what}. Send several requests.")


def _want_json(request: Request) -> None:
    media = media_type(request)
    if media != "application/json":
        raise unsupported(media, "application/json")


def _asked(request: Request) -> PredictRequest:
    query: bytes = request.scope["query_string"]
    return (_parsed_query if len(query) <= _SHORT_QUERY else _parsed_query.__wrapped__)(query)


@lru_cache(1024)
def _parsed_query(query: bytes) -> PredictRequest:
    """Parse a query string; cached, because callers send many inputs with the same one."""
    return lax(PredictRequest, dict(QueryParams(query)))


async def _form(request: Request, most: int) -> tuple[list[UploadFile], dict[str, str]]:
    """Return the files of a multipart body, of which `most` are allowed, and its other fields."""
    try:
        return await form_of(request, most)
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many(most, "files") from error
        raise Problem(
            400, "invalid_multipart", f"The multipart body cannot be read: {error.message}"
        ) from error


def _some(inputs: Sequence[object]) -> None:
    if not inputs:
        raise Problem(422, "no_inputs", "There are no inputs. Send at least one.")


def _target(body: TargetIn) -> object:
    """Return the one target of a request, or None. Raises the ExampleError of several."""
    target = target_of(body)
    if isinstance(target, ExampleError):
        raise target
    return target


def _query(body: PredictRequest, inputs: Sequence[Input]) -> PredictQuery:
    return PredictQuery(inputs=inputs, **body.model_dump(exclude={"inputs"}))


def _merged(good: Iterable[T], others: Mapping[int, T]) -> list[T]:
    """Merge items in their original order. `others`: those missing from `good`, by position."""
    rest = list(good)
    following = iter(rest)
    return [others[at] if at in others else next(following) for at in range(len(rest) + len(others))]
