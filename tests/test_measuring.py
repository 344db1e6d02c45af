"""Lookups of sharded tables while gradients are measured: what the plain modules look up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mec_embed.measuring import Lookups, asking_forward, lookups_of
from mec_embed.ranks import ALONE
from mec_embed.shards import Shard
from mec_embed.tables import Table


def _asking(module: nn.Module) -> tuple[Any, list[Lookups]]:
    """Its lookups as a table of which this one rank holds the only part, and what is told."""
    told: list[Lookups] = []

    def watch(output: Tensor, made_of: Lookups) -> Tensor:
        told.append(made_of)
        return output

    rows = module.weight.detach()
    table = Table(module, (), ranks=ALONE, shard=Shard(rows, ((0, len(rows)),)))
    object.__setattr__(table, "aliases", (_Named(),))
    return asking_forward(table, watch), told


def _is_told(told: list[Lookups], module: nn.Module, *call: Tensor) -> None:
    (found,), expected = told, lookups_of(module, *call)
    assert torch.equal(found.squares, expected.squares) and found.number == expected.number


class _Named:
    name = "items"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (2, 0), ()])
def test_rows_are_those_of_the_module(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(20, 6, padding_idx=3)
    asking, told = _asking(module)
    ids = torch.randint(20, shape).to(dtype)
    torch.testing.assert_close(asking(ids), module(ids).detach(), rtol=0, atol=0)
    _is_told(told, module, ids)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 3, 19])
@pytest.mark.parametrize("kind", ["matrix", "offsets", "last offset", "empty bags", "no ids"])
def test_bags_are_those_of_the_module(mode: str, padding_idx: int | None, kind: str) -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingBag(
        20, 6, mode=mode, padding_idx=padding_idx, include_last_offset=kind == "last offset"
    )
    asking, told = _asking(module)
    ids = torch.randint(20, (24,))
    ids[::4] = 3
    call: dict[str, tuple[Tensor, ...]] = {
        "matrix": (ids.view(6, 4),),
        "offsets": (ids, torch.tensor([0, 3, 10])),
        "last offset": (ids, torch.tensor([0, 3, 10, 24])),
        "empty bags": (ids, torch.tensor([0, 0, 10, 24])),
        "no ids": (ids[:0], torch.tensor([0, 0])),
    }
    expected = module(*call[kind]).detach()
    torch.testing.assert_close(asking(*call[kind]), expected)
    assert len(told[0].squares) == len(expected)
    _is_told(told, module, *call[kind])


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_are_no_longer_than_max_norm(kind: Any, norm_type: float) -> None:
    torch.manual_seed(0)
    module = kind(20, 6, max_norm=1.5, norm_type=norm_type, padding_idx=3)
    asking, _ = _asking(module)
    before, ids = module.weight.detach().clone(), torch.randint(20, (4, 5))
    found = asking(ids)
    assert torch.equal(module.weight, before)
    torch.testing.assert_close(found, module(ids).detach())
    assert not torch.equal(module.weight, before), "no row is too long"


def test_weights_of_samples() -> None:
    module = nn.EmbeddingBag(20, 6, mode="sum")
    asking, _ = _asking(module)
    ids, weights = torch.randint(20, (4, 5)), torch.rand(4, 5, requires_grad=True)
    expected = F.embedding_bag(ids, module.weight, mode="sum", per_sample_weights=weights)
    found = asking(input=ids, per_sample_weights=weights)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


@pytest.mark.parametrize(("ids", "seen"), [([2, 20], "2 and 20"), ([-1, 5], "-1 and 5")])
def test_ids_out_of_range(ids: list[int], seen: str) -> None:
    asking, _ = _asking(nn.Embedding(20, 6))
    with pytest.raises(
        IndexError, match=f"table 'items': ids lie between {seen}, expected 0 to 19"
    ):
        asking(torch.tensor(ids))


OFFSETS = torch.tensor([0, 2, 2, 7])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("ids", "offsets", "last"),
    [
        (torch.arange(12).view(3, 4), None, False),
        (torch.arange(1, 13).view(4, 3).int(), None, False),
        (torch.arange(10), OFFSETS, False),
        (torch.arange(10), torch.tensor([0, 2, 2, 7, 10]), True),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_shares_of_ids_are_those_of_autograd(
    mode: str, ids: Tensor, offsets: Tensor | None, last: bool, weighted: bool
) -> None:
    if weighted and mode != "sum":
        pytest.skip("torch takes weights with sums only")
    bag = nn.EmbeddingBag(13, 1, mode=mode, padding_idx=0, include_last_offset=last)
    weights = torch.rand(ids.shape) if weighted else None
    shares = []
    for out in bag(ids, offsets, weights)[:, 0]:
        (gradient,) = torch.autograd.grad(out, bag.weight, retain_graph=True)
        shares.append(gradient.double().square().sum())
    found = lookups_of(bag, ids, offsets, weights)
    torch.testing.assert_close(found.squares, torch.stack(shares))
    assert found.number == int((ids != 0).sum())


def test_each_row_is_made_of_its_id_but_padding() -> None:
    found = lookups_of(nn.Embedding(20, 6, padding_idx=3), torch.tensor([[3, 5], [7, 3]]))
    assert found.squares.tolist() == [0, 1, 1, 0] and found.number == 2
