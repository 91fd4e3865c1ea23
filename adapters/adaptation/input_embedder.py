"""Embeds inputs for training: those that no adapter of the tenant has yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from adapters.adaptation.commands import FingerprintMismatch
from adapters.adaptation.repository import AdapterRepository
from adapters.examples.validation import RejectedExample, ValidExample
from adapters.registry.records import AdapterRecord, Creation
from adapters.turns import Gate
from models.arrays import Floats
from models.backbone import Backbone, Embedded
from models.preprocess.limits import InputError
from models.priority import lower_thread_priority
from models.spec import BackboneSpec, UnknownBackbone

# Characters tokenized per call when texts are checked for truncation or for unknown tokens.
_CHARACTERS_AT_ONCE = 50_000


class BatchEmbedder(Protocol):
    """Embeds batches of inputs with one backbone: a Batcher, or something that also uses other machines."""

    @property
    def backbone(self) -> Backbone:
        """The backbone, as it is loaded here."""
        ...

    async def embed(
        self, inputs: Sequence[bytes | str], *, bulk: bool = False, source: Hashable = None
    ) -> Embedded:
        """Embed the inputs, in their order. See Batcher.embed."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedInputs:
    """The result of embedding inputs that the adapter does not have."""

    vectors: dict[str, Floats]  # embeddings, float32 (dim,), by digest
    rejected: Sequence[RejectedExample]  # examples whose input failed
    timings: Mapping[str, float]  # seconds by stage
    truncated: frozenset[str]  # digests of texts of which the backbone reads only the start
    embedded: AbstractSet[str]  # digests of all inputs that were embedded for this result


class InputEmbedder:
    """Embeds the inputs of examples with the served backbones. For one event loop."""

    def __init__(self, repository: AdapterRepository, batchers: Mapping[str, BatchEmbedder]) -> None:
        self.batchers = batchers
        self._repository = repository
        self._looking = ThreadPoolExecutor(1, "look", initializer=lower_thread_priority)
        self._looking_gate = Gate(1)

    async def embed_new(
        self, tenant: str, terms: Creation, admitted: Sequence[ValidExample], known: AbstractSet[str]
    ) -> EmbeddedInputs:
        """Embed the inputs whose digests are not in `known`.

        Embeddings of the tenant's other adapters are reused. A text without a token that the backbone knows
        has failed too, although it has an embedding. Raises what Batcher.embed and AdapterRepository.known
        raise.
        """
        # The order is independent of the request: neighbours in a batch move an embedding's last digits.
        ordered = sorted(admitted, key=lambda one: one.digest)
        new = {one.digest: one.input for one in ordered if one.digest not in known and one.input is not None}
        vectors = await self._repository.known(tenant, terms.fingerprint, new)
        found = {digest: new.pop(digest) for digest in vectors}
        batcher = self.batchers[terms.backbone]
        unknown = no_known_tokens(terms.backbone)
        errors: dict[str, InputError] = {}
        if found and terms.kind == "text":
            places = await self._look(tenant, batcher.backbone.unknown, list(found.values()))
            errors = {digest: unknown for place, digest in enumerate(found) if place in places}
        timings: dict[str, float] = {}
        truncated: set[str] = set()
        if new:
            embedded = await batcher.embed(list(new.values()), bulk=True, source=tenant)
            timings = dict(embedded.timings)
            for place, digest in enumerate(new):
                if place in embedded.errors:
                    errors[digest] = embedded.errors[place]
                    continue
                vectors[digest] = embedded.embeddings[place]
                if place in embedded.unknown:
                    errors[digest] = unknown
                elif place in embedded.truncated:
                    truncated.add(digest)
        rejected = [
            RejectedExample(one.index, one.id, errors[one.digest].code, errors[one.digest].detail, terms.kind)
            for one in admitted
            if one.index is not None and one.digest in errors
        ]
        return EmbeddedInputs(vectors, rejected, timings, frozenset(truncated), new.keys())

    async def count_truncated(
        self, tenant: str, terms: Creation, usable: Sequence[ValidExample], new: EmbeddedInputs
    ) -> int:
        """Count the examples that are texts of which the backbone reads only the start."""
        known = [one.input for one in usable if isinstance(one.input, str) and one.digest not in new.embedded]
        count = sum(one.digest in new.truncated for one in usable)
        if known:
            backbone = self.batchers[terms.backbone].backbone
            count += len(await self._look(tenant, backbone.truncated, known))
        return count

    async def _look(
        self,
        tenant: str,
        look: Callable[[Sequence[bytes | str]], AbstractSet[int]],
        texts: Sequence[bytes | str],
    ) -> set[int]:
        """Return the positions that `look` finds. Tenants take turns on one low-priority thread."""
        loop = asyncio.get_running_loop()
        found: set[int] = set()
        begin = 0
        while begin < len(texts):
            end, size = begin + 1, len(texts[begin])
            while end < len(texts) and size + len(texts[end]) <= _CHARACTERS_AT_ONCE:
                size += len(texts[end])
                end += 1
            async with self._looking_gate.passed(tenant):
                places = await loop.run_in_executor(self._looking, look, texts[begin:end])
            found |= {begin + place for place in places}
            begin = end
        return found

    def check_served(self, terms: Creation | AdapterRecord) -> None:
        """Raise FingerprintMismatch unless the adapter's own backbone is served."""
        batcher = self.batchers.get(terms.backbone)
        if batcher is None or batcher.backbone.fingerprint != terms.fingerprint:
            raise FingerprintMismatch(terms.backbone)

    def spec(self, name: str) -> BackboneSpec:
        """Return the spec of a served backbone. Raises UnknownBackbone."""
        if name not in self.batchers:
            raise UnknownBackbone(
                f"The service does not serve the backbone {name!r}. GET /backbones lists those that it "
                "serves."
            )
        return self.batchers[name].backbone.spec


def no_known_tokens(backbone: str, text: str = "this text") -> InputError:
    """Return the error for a text of which the backbone's tokenizer knows no token."""
    return InputError(
        "no_known_tokens",
        f"The backbone {backbone!r} knows no word of {text}, so its embedding says nothing. "
        "Leave the text out, or use a backbone for its language.",
    )
