"""Answers say of which texts only the start was read, wherever texts are sent."""

from __future__ import annotations

from service.payloads.responses.adaptation import AdaptResponse
from service.payloads.responses.openai import OpenAIResponse
from service.payloads.responses.predictions import EmbedResponse, PredictResponse
from tests.support.service.client import Caller, Json, reviews
from tests.support.service.document import exactly

LETTER = "I loved the film, and here is why: " + "the story moved me. " * 400
TEXT = {"Content-Type": "text/plain; charset=utf-8"}


def marks(items: list[Json]) -> list[bool]:
    """The items that report a truncated text; no other has the field."""
    assert all(one["truncated"] is True for one in items if "truncated" in one)
    return ["truncated" in one for one in items]


def test_predictions_and_embeddings_name_the_texts_that_were_cut(caller: Caller) -> None:
    caller.adapt("films", reviews())
    inputs = [
        {"text": "Short."},
        {"text": LETTER},
        {"text": " "},
        {"text": LETTER[:900]},
        {"text": LETTER[:9000]},
    ]
    found = caller.predict("films", inputs, explain=1)
    assert marks(found["predictions"]) == [False, True, False, False, True]
    exactly(PredictResponse, found)
    raw = caller.call("POST", "/predict?adapter=films", content=LETTER.encode(), headers=TEXT)
    assert marks(raw["predictions"]) == [True]
    embedded = caller.call("POST", "/embed", json={"backbone": "minilm-l6-v2", "inputs": inputs})
    assert marks(embedded["embeddings"]) == [False, True, False, False, True]
    exactly(EmbedResponse, embedded)


def test_openai_s_form_marks_the_embeddings_and_counts_what_was_read(caller: Caller) -> None:
    body = {"model": "minilm-l6-v2", "input": ["hello world", LETTER]}
    found = caller.call("POST", "/v1/embeddings", json=body)
    assert marks(found["data"]) == [False, True]
    assert found["usage"] == {"prompt_tokens": 4 + 256, "total_tokens": 4 + 256}
    exactly(OpenAIResponse, found)


def test_teaching_counts_the_texts_that_were_cut(caller: Caller) -> None:
    """New ones, and those whose embedding is known already, of this adapter and of another one."""
    long = [{"id": f"l{place}", "text": f"{place} {LETTER}", "label": "good"} for place in range(2)]
    assert "truncated" not in caller.adapt("films", reviews())["examples"]
    for adapter in ("films", "films", "other"):
        found = caller.adapt(adapter, [*reviews(), *long])
        assert found["examples"]["truncated"] == 2
        exactly(AdaptResponse, found)
    said = {"text": LETTER, "label": "good"}
    assert caller.call("POST", "/adapters/films/feedback", json=said)["examples"]["truncated"] == 1
    said = {"text": "Short.", "label": "good"}
    assert "truncated" not in caller.call("POST", "/adapters/films/feedback", json=said)["examples"]
