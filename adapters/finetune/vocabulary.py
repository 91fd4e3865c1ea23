"""Restriction of a text network's embedding table to the word pieces in use. Requires torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def restricted_vocabulary(table: Any, ids: torch.Tensor | None) -> Iterator[None]:
    """Reduce the table to the rows of these ids; on exit it has all rows again, with what these learned.

    Rows that no input uses have no gradient, yet cost an optimizer as much as the others; they are half of
    MiniLM-L6's 23 million weights. `table`: a torch.nn.Embedding, or None for a network without one. `ids`:
    int64 (n,), sorted and unique; None for all. Other ids raise IndexError meanwhile.
    """
    if table is None or ids is None:
        yield
        return
    whole, padding = table.weight, table.padding_idx
    places = torch.full((len(whole),), len(ids))
    places[ids] = torch.arange(len(ids))

    def translate(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (places.to(inputs[0].device)[inputs[0]],)

    table.weight = torch.nn.Parameter(whole.detach()[ids], whole.requires_grad)
    if padding is not None:
        # The padding row is left out if no input is padded.
        table.padding_idx = places[padding].item() if places[padding] < len(ids) else None
    hook = table.register_forward_pre_hook(translate)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            whole[ids] = table.weight.detach().to(whole.device)
        table.weight, table.padding_idx = whole.requires_grad_(table.weight.requires_grad), padding
