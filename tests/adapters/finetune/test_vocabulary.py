"""A narrowed table gives the same embeddings and gradients, and is whole again with what was learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapters.finetune.data import Texts
from adapters.finetune.vocabulary import restricted_vocabulary

IDS = torch.tensor([0, 3, 5, 8])


def table(padding: int | None = 0) -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(10, 4, padding_idx=padding)


def test_the_same_rows_under_the_same_ids() -> None:
    own = table()
    asked = torch.tensor([[3, 8, 0], [5, 5, 3]])
    expected = own(asked)
    with restricted_vocabulary(own, IDS):
        assert own.weight.shape == (4, 4)
        assert torch.equal(own(asked), expected)
        with pytest.raises(IndexError):
            own(torch.tensor([4]))
    assert torch.equal(own(asked), expected)
    assert own.weight.shape == (10, 4)


def test_what_is_learned_stays_and_the_rest_is_as_it_was() -> None:
    own, other = table(), table()
    before = own.weight.detach().clone()
    parameter = own.weight
    asked, wanted = torch.tensor([3, 8, 8, 0]), torch.ones(4, 4)

    def train(one: torch.nn.Embedding) -> None:
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (one(asked) - wanted).square().sum().backward()
            optimizer.step()

    with restricted_vocabulary(own, IDS):
        train(own)
    train(other)
    assert own.weight is parameter
    assert torch.equal(own.weight, other.weight)
    assert not torch.equal(own.weight[[3, 8]], before[[3, 8]])
    # Padding learns nothing, wherever its row is meanwhile.
    assert torch.equal(own.weight[0], before[0])
    assert (own.padding_idx, len(own._forward_pre_hooks)) == (0, 0)


def test_a_table_that_was_frozen_meanwhile_stays_frozen() -> None:
    own = table()
    with restricted_vocabulary(own, IDS):
        own.requires_grad_(False)
    assert not own.weight.requires_grad


def test_a_table_whose_padding_never_comes_up() -> None:
    own = table(padding=9)
    with restricted_vocabulary(own, IDS):
        own(torch.tensor([3])).sum().backward()
        assert own.padding_idx is None
    assert own.padding_idx == 9


def test_it_is_whole_again_after_an_error() -> None:
    own = table()
    with pytest.raises(ZeroDivisionError), restricted_vocabulary(own, IDS):
        raise ZeroDivisionError
    assert own.weight.shape == (10, 4)


def test_a_network_without_a_table_stays_as_it_is() -> None:
    own = table()
    with restricted_vocabulary(None, IDS), restricted_vocabulary(own, None):
        assert own.weight.shape == (10, 4)


def test_the_vocabulary_is_what_may_come_up() -> None:
    texts = Texts([np.array([1, 30, 7]), np.array([1, 12, 7])], pad_id=0, mask_id=99)
    assert texts.vocabulary.tolist() == [0, 1, 7, 12, 30, 99]
    assert Texts([np.array([4, 2])], pad_id=0, mask_id=None).vocabulary.tolist() == [0, 2, 4]
