"""TransNormer (arXiv 2210.10340): both of its attentions by the book, and the blocks of one of them under every law of states."""

import pytest
import torch
from sequences import TIGHT, Book, Sublayer, positions_of, random_parents, shaken
from torch import Tensor
from torch.nn.functional import elu

from fewstep.core.mixer import Context
from fewstep.nn.mixers.transnormer import DiagAttentionConfig, TransNormerConfig
from fewstep.nn.position import RopeConfig

WIDTH, HEADS = 16, 4


def heads_of(x: Tensor) -> tuple[Tensor, ...]:
    """[T,3 D] -> three of [H,T,E]."""
    return tuple(part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in x.chunk(3, -1))


def test_norm_attention_by_the_book() -> None:
    """RMSNorm over Q (K^T V), without a denominator."""
    layer = shaken(TransNormerConfig().build(width=WIDTH, heads=HEADS))
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    q, k, v = heads_of(layer.qkv(x))
    y = torch.tril((1 + elu(q)) @ (1 + elu(k)).mT) @ v
    y = y.transpose(0, 1).flatten(1)
    y = y / (y.square().mean(-1, keepdim=True) + layer.config.eps).sqrt() * layer.norm.weight
    mine, _ = layer(x[None], Context(torch.arange(9)[None]))
    torch.testing.assert_close(mine[0], layer.out(y), **TIGHT)


def blocked(block: int, chunk: int) -> Sublayer:
    """DiagAttention with blocks so short that every sequence has several."""
    position = RopeConfig(base=100.0).build(head_width=WIDTH // HEADS)
    module = shaken(DiagAttentionConfig(block=block).build(width=WIDTH, heads=HEADS, position=position))
    module.chunk = chunk
    return Sublayer(module, module.masks, module.modes)


@pytest.mark.parametrize("block", [1, 3, 4, 16])
def test_diag_attention_by_the_book(block: int) -> None:
    """Softmax within each block of tokens, block after block."""
    subject = blocked(block, chunk=5)
    layer, x = subject.module, torch.randn(1, 11, WIDTH, dtype=torch.float64)
    q, k, v = heads_of(layer.qkv(x[0]))
    place = torch.arange(11)
    q, k = (each[0] for each in layer.position.rotate(q[None], k[None], place[None], place[None], {}))
    parts = []
    for start in range(0, 11, block):
        own = slice(start, start + block)
        scores = q[:, own] @ k[:, own].mT / 2  # heads of 4 channels
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, own])
    wanted = layer.out(torch.cat(parts, 1).transpose(0, 1).flatten(1))
    torch.testing.assert_close(subject.parallel(x)[0], wanted, **TIGHT)


@pytest.mark.parametrize(("block", "chunk"), [(3, 4), (4, 3), (1, 2), (5, 64)])
def test_blocks_in_trees_commits_and_packs(block: int, chunk: int) -> None:
    """`Book` compares every node with the parallel form over its own history."""
    subject = blocked(block, chunk)
    book = Book.open(subject, 3, 64)
    for count in (7, 6, 1, 5):
        book.extend(subject.inputs(3, count), random_parents(3, count, book.parents()))
        if count % 2:
            book.commit_any()
    fork = book.fork([2, 2, 0])
    fork.rollback()
    fork.extend(subject.inputs(3, 4), torch.tensor([[-1, 0, 0, 2]] * 3))
    segments = torch.tensor([[0] * 5 + [1] * 4 + [-1], [0] * 2 + [-1] + [1] * 7])
    x = subject.inputs(2, 10)
    together = subject.parallel(x, segments)
    for row in range(2):
        for sequence in (0, 1):
            own = segments[row] == sequence
            alone = subject.parallel(x[row : row + 1, own])
            torch.testing.assert_close(together[row : row + 1, own], alone, **TIGHT)
    assert positions_of(segments)[0, 5] == 0


def test_a_state_holds_one_block_whatever_was_read() -> None:
    subject = blocked(4, 8)
    book = Book.open(subject, 2, 64)
    empty = book.state.nbytes()
    for _ in range(3):
        book.extend(subject.inputs(2, 7))
        book.commit([list(range(7))] * 2)
    assert book.state.nbytes() == empty
