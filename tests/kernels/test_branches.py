"""Branches behind shared beginnings: attention in two parts is that of a dense mask."""

from __future__ import annotations

from itertools import accumulate, chain

import pytest
import torch
import torch.nn.functional as F

from ftcore.testing import maths
from ftcore_kernels.layers.decoder.attention.branches import Branched, Branches, FlashVarlen, PlainVarlen

TREES = [([3], [[2, 1, 4]]), ([1, 7, 2], [[1], [3, 3], [5, 1, 1, 2]]), ([64, 65], [[128, 1], [63]])]


def dense(beginnings, branches) -> torch.Tensor:
    """Written down token by token."""
    lengths = [(tree, True, n) for tree, n in enumerate(beginnings)]
    lengths += [(tree, False, n) for tree, group in enumerate(branches) for n in group]
    of = [(tree, number, shared) for number, (tree, shared, n) in enumerate(lengths) for _ in range(n)]
    sees = torch.zeros(len(of), len(of), dtype=torch.bool)
    for q, (tree, number, _) in enumerate(of):
        for k, (other, own, shared) in enumerate(of):
            sees[q, k] = (own == number and k <= q) or (other == tree and shared and k < q)
    return sees


def inputs(total: int, heads: int, kv: int, dtype, device) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(total)
    made = [torch.randn(1, n, total, 16, generator=drawn, dtype=torch.float64) for n in (heads, kv, kv)]
    made.append(torch.randn(1, total, heads, 16, generator=drawn, dtype=torch.float64))
    return [tensor.to(device, dtype) for tensor in made]


def truth(sees: torch.Tensor, q, k, v, dout) -> list[torch.Tensor]:
    """In float64, by autograd."""
    q, k, v, dout = (tensor.detach().double().cpu() for tensor in (q, k, v, dout))
    given = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = F.scaled_dot_product_attention(*given, attn_mask=sees, scale=0.3, enable_gqa=True).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


def found(attention: Branched, q, k, v, dout) -> list[torch.Tensor]:
    out, rest = attention.forward(q, k, v)
    return [out, *attention.backward(dout, q, k, v, out, rest)]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_mask_says_the_same(tree) -> None:
    branches = Branches.of(*tree, "cpu")
    assert torch.equal(branches.sees(torch.device("cpu")), dense(*tree))
    assert branches.offsets.tolist() == [0, *accumulate([*tree[0], *chain(*tree[1])])]
    assert (branches.shared, branches.total) == (sum(tree[0]), sum(tree[0]) + sum(map(sum, tree[1])))


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_two_parts_are_one_softmax(tree, kv) -> None:
    branches = Branches.of(*tree, "cpu")
    given = inputs(branches.total, 4, kv, torch.float64, "cpu")
    exact = truth(dense(*tree), *given)
    ours = found(Branched(0.3, branches, PlainVarlen()), *given)
    assert max(maths.apart(one, other) for one, other in zip(ours, exact, strict=True)) <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("tree", [*TREES, ([700, 33], [[300, 5, 129], [64, 1]])], ids=str)
def test_flash_is_its_twin(tree, dtype, kv) -> None:
    branches = Branches.of(*tree, "cuda")
    given = inputs(branches.total, 4, kv, dtype, "cuda")
    exact = truth(dense(*tree), *given)
    with_mask = F.scaled_dot_product_attention(
        *given[:3], attn_mask=dense(*tree).cuda(), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    ours = found(Branched(0.3, branches, FlashVarlen()), *given)
    eps = torch.finfo(dtype).eps
    assert maths.apart(ours[0].cpu(), exact[0]) <= 1.1 * maths.apart(with_mask.cpu(), exact[0]) + eps / 2
    assert max(maths.apart(one.cpu(), other) for one, other in zip(ours[1:], exact[1:], strict=True)) <= 2 * eps


@pytest.mark.parametrize("tree", [([], []), ([2, 0], [[1], [1]]), ([2], [[]]), ([2], [[0]]), ([2, 3], [[1]])])
def test_nothing_is_no_branch(tree) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Branches.of(*tree, "cpu")


def test_they_stand_in_one_row() -> None:
    branches = Branches.of([2], [[1]], "cpu")
    two = torch.zeros(2, 1, 3, 16)
    with pytest.raises(ValueError, match="one row"):
        Branched(1.0, branches, PlainVarlen()).forward(two, two, two)
