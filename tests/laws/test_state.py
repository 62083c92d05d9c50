"""The laws of the state that a causal mixer, a block or a decoder keeps: trees, commit, rollback, fork, join, capacity.

Every `Book.extend` checks each node against the parallel form over the node's own history.
"""

from collections.abc import Iterator

import pytest
import torch
from sequences import FAST_SUBJECTS, SUBJECTS, Book, Sublayer, names, path_to, random_parents

from fewstep.core.mixer import Tree, ancestors, depths

EVERY = {**SUBJECTS, **FAST_SUBJECTS}
BRANCHES = torch.tensor([[-1, 0, 0, 1, -2, 2], [-1, -1, 1, -2, 1, 0]])


@pytest.fixture(autouse=True)
def _as_decoding_does() -> Iterator[None]:
    """In place, since nothing is recorded; `test_mixer.py` has the laws of a state under grad."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=names(EVERY, "causal"))
def subject(request: pytest.FixtureRequest, _reproducible: None) -> Sublayer:
    return EVERY[request.param]()


def chained(lengths: torch.Tensor) -> torch.Tensor:
    """[B,max] the parents of one padded chain per row."""
    order = torch.arange(int(lengths.max()))
    return torch.where(order < lengths[:, None], order - 1, -2)


def ragged(subject: Sublayer, capacity: int, lengths: tuple[int, ...] = (5, 2, 0)) -> Book:
    """Prompts of several lengths, one of them empty, fed as one padded chain and committed."""
    book = Book.open(subject, len(lengths), capacity)
    book.extend(subject.inputs(len(lengths), max(lengths)), chained(torch.tensor(lengths)))
    book.commit([list(range(length)) for length in lengths])
    return book


def test_tree_nodes_equal_their_own_chains(subject: Sublayer) -> None:
    book = ragged(subject, 40)
    for count in (1, 6, 3):
        book.extend(subject.inputs(3, count), random_parents(3, count, book.parents()))


def test_a_tree_before_anything_is_committed(subject: Sublayer) -> None:
    book = Book.open(subject, 2, 16)
    book.extend(subject.inputs(2, 6), BRANCHES)
    book.extend(subject.inputs(2, 2), torch.tensor([[5, 5], [4, -1]]))
    book.commit([[0, 2, 5, 6], [1, 4]])
    book.extend(subject.inputs(2, 3))


def test_tree_over_several_extends_counts_all_pending_nodes(subject: Sublayer) -> None:
    book = Book.open(subject, 2, 16)
    book.extend(subject.inputs(2, 3))
    book.commit([[0, 1, 2], [0]])
    book.extend(subject.inputs(2, 6), BRANCHES)
    book.extend(subject.inputs(2, 3), torch.tensor([[3, 6, -1], [4, -2, 6]]))
    book.extend(subject.inputs(2, 2))  # a chain on the last of them
    book.commit([[0, 1, 3, 6, 7], [1, 4]])
    book.extend(subject.inputs(2, 2))


def test_commit_equals_feeding_the_kept_nodes_again(subject: Sublayer) -> None:
    """Paths that are not contiguous, of different lengths, and nothing kept in one row."""
    book = ragged(subject, 32)
    nodes = subject.inputs(3, 6)
    book.extend(nodes, torch.cat([BRANCHES, BRANCHES[:1]]))
    paths = [[0, 2, 5], [1, 4], []]
    book.commit(paths)
    again = ragged_like(book, subject, 32)
    x = subject.inputs(3, 4)
    torch.testing.assert_close(book.extend(x), again.extend(x), **subject.close)


def ragged_like(book: Book, subject: Sublayer, capacity: int) -> Book:
    """A fresh state fed with what `book` holds as committed."""
    lengths = torch.tensor([len(row) for row in book.committed])
    x = subject.inputs(book.batch, int(lengths.max()))
    for row, values in enumerate(book.committed):
        if values:
            x[row, : len(values)] = torch.stack(values)
    fresh = Book.open(subject, book.batch, capacity)
    fresh.extend(x, chained(lengths))
    fresh.commit([list(range(length)) for length in lengths.tolist()])
    return fresh


def test_keeping_nothing_is_rolling_back(subject: Sublayer) -> None:
    book = ragged(subject, 24)
    book.extend(subject.inputs(3, 3))
    twin = book.fork([0, 1, 2])
    book.commit([[], [], []])
    twin.rollback()
    x = subject.inputs(3, 2)
    torch.testing.assert_close(book.extend(x), twin.extend(x), **subject.close)


def test_rollback_is_exact(subject: Sublayer) -> None:
    """Whatever was drafted and dropped, the same step gives the same bits."""
    book = ragged(subject, 24)
    twin = book.fork([0, 1, 2])
    for count in (6, 2):
        book.extend(subject.inputs(3, count), random_parents(3, count, book.parents()))
        book.rollback()
    x = subject.inputs(3, 4)
    parent = random_parents(3, 4, [[], [], []])
    valid = parent != -2
    torch.testing.assert_close(book.extend(x, parent)[valid], twin.extend(x, parent)[valid], rtol=0, atol=0)


def test_forks_diverge(subject: Sublayer) -> None:
    """Copies with repeats, in the middle of a tree; then each writes what the other must not see."""
    book = ragged(subject, 40)
    book.extend(subject.inputs(3, 4), torch.tensor([[-1, 0, 0, 1]] * 3))
    fork, same = book.fork([2, 0, 0, 1]), book.fork([0, 1, 2])
    book.commit([[0, 2], [0, 1, 3], []])
    fork.extend(subject.inputs(4, 2), torch.tensor([[3, 0]] * 4))
    book.extend(subject.inputs(3, 3))
    fork.commit([[0], [0, 1, 3, 4], [0, 5], []])
    again = fork.fork([3, 3])
    for turn in range(2):
        for each in (book, fork, same, again):
            each.extend(subject.inputs(each.batch, 2), random_parents(each.batch, 2, each.parents(), padding=0.1))
            if turn:
                each.rollback()
            else:
                each.commit_any()


def test_join_equals_separate_rows(subject: Sublayer) -> None:
    """Different lengths and capacities; the larger capacity wins, whichever side it is on."""
    for capacities in ((9, 30), (30, 9)):
        one, other = ragged(subject, capacities[0]), ragged(subject, capacities[1], (0, 7))
        x, more = subject.inputs(5, 4), subject.inputs(5, 16)
        alone = torch.cat(
            [book.fork(list(range(book.batch))).extend(part) for book, part in ((one, x[:3, :2]), (other, x[3:, :2]))]
        )
        both = one.join(other)
        torch.testing.assert_close(both.extend(x[:, :2]), alone, **subject.close)
        both.commit([[0, 1], [0], [], [0], [0, 1]])
        both.extend(more)


def test_join_of_even_batches(subject: Sublayer) -> None:
    """Each batch has rows of one length, and the joined one has not; nor when the lengths meet again."""
    one, other = ragged(subject, 20, (5, 5)), ragged(subject, 20, (3,))
    both = one.join(other)
    both.extend(subject.inputs(3, 1))
    both.commit([[], [], [0]])
    both.extend(subject.inputs(3, 1))
    both.commit([[], [], [0]])
    both.extend(subject.inputs(3, 2))


def test_join_refuses_pending_nodes(subject: Sublayer) -> None:
    one, other = ragged(subject, 20), ragged(subject, 20)
    other.extend(subject.inputs(3, 1))
    with pytest.raises(ValueError, match=r"^pending=[^\n]*commit or roll back[^\n]*$"):
        one.join(other)
    other.rollback()
    one.join(other).extend(subject.inputs(6, 2))


def test_joined_forks_are_any_batch(subject: Sublayer) -> None:
    """Continuous batching: rows leave and others come, and a row is what it was."""
    book = ragged(subject, 24)
    left = book.fork([1])
    came = ragged(subject, 24, (3, 6))
    now = left.join(came).fork([2, 0])
    now.extend(subject.inputs(2, 3), torch.tensor([[-1, 0, -1], [-1, -2, 0]]))
    now.commit([[0, 1], [0, 2]])
    now.extend(subject.inputs(2, 2))


def test_padding_never_touches_a_state(subject: Sublayer) -> None:
    """Bit for bit, whatever stands in the padding, then and later."""
    parent = torch.tensor([[-1, 0, -2, 1], [-2, -1, 1, -2]])
    real = parent != -2
    x, noise = subject.inputs(2, 4), subject.inputs(2, 4)
    after = subject.inputs(2, 3)
    outputs = []
    for filled in (x, torch.where(real if x.dim() == 2 else real.unsqueeze(-1), x, noise)):
        book = Book.open(subject, 2, 12)
        book.extend(x[:, :2])
        book.commit([[0, 1], [0]])
        now = book.extend(filled, parent)[real]
        book.commit([[0, 1, 3], [1, 2]])
        outputs.append(torch.cat([now, book.extend(after).flatten(0, 1)]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_over_capacity_is_an_error_before_any_write(subject: Sublayer) -> None:
    book = ragged(subject, 10)
    book.extend(subject.inputs(3, 2))
    for count in (4, 9):
        parent = torch.arange(1, count + 1).expand(3, -1)
        with pytest.raises(ValueError, match=r"^capacity=10: [^\n]*larger capacity$"):
            subject.step(subject.inputs(3, count), parent, parent + 5, book.state)
    book.extend(subject.inputs(3, 3))  # exactly full
    book.commit([[0, 1, 2, 3, 4]] * 3)
    with pytest.raises(ValueError, match=r"^capacity=10"):
        subject.step(subject.inputs(3, 1), torch.full((3, 1), -1), torch.tensor([[10], [7], [5]]), book.state)


def test_a_row_that_rests_costs_no_capacity(subject: Sublayer) -> None:
    """Capacity is counted in the tokens of the longest row, however unevenly the rows came to theirs."""
    book = Book.open(subject, 2, 8)
    for turn in range(6):
        book.extend(subject.inputs(2, 2))
        book.commit([[0], []] if turn % 2 else [[], [0]])
    book.extend(subject.inputs(2, 5))


def test_bytes_held(subject: Sublayer) -> None:
    small, large = subject.start(2, 8), subject.start(4, 32)
    assert 0 < small.nbytes() <= large.nbytes()
    assert small.fork(torch.tensor([0, 1, 1, 0])).nbytes() == 2 * small.nbytes()


def test_any_history(subject: Sublayer) -> None:
    """Random trees, commits, rollbacks, forks and joins of several states at once."""
    books = [ragged(subject, 64, (4, 1)), ragged(subject, 48, (0, 2, 3))]
    for _ in range(24):
        book = books[int(torch.randint(len(books), ()))]
        move = float(torch.rand(()))
        if move < 0.45 and book.size < 24:
            count = int(torch.randint(1, 6, ()))
            book.extend(subject.inputs(book.batch, count), random_parents(book.batch, count, book.parents()))
        elif move < 0.7 and book.pending[0]:
            book.commit_any()
        elif move < 0.8:
            book.rollback()
        elif move < 0.9 and len(books) < 4:
            books.append(book.fork(torch.randint(book.batch, (int(torch.randint(1, 4, ())),)).tolist()))
        elif len(books) > 1 and sum(each.batch for each in books) < 9:
            books.remove(book)
            other = books.pop()
            for each in (book, other):
                each.commit_any()
            books.append(book.join(other))
    for book in books:
        book.extend(subject.inputs(book.batch, 2), random_parents(book.batch, 2, book.parents()))


def test_ancestors_and_depths_by_walking_up() -> None:
    for batch, count in ((3, 1), (4, 9), (2, 17)):
        shapes = [random_parents(batch, count, [[]] * batch), Tree.chain(torch.zeros(batch, count)).parent]
        shapes.append(Tree.chain(torch.zeros(batch, count), torch.randint(count + 1, (batch,))).parent)
        for parent in shapes:
            reach, depth = ancestors(parent), depths(parent)
            for row, nodes in enumerate(parent.tolist()):
                for node in range(count):
                    path = path_to(nodes, node) if nodes[node] != -2 else [node]
                    assert reach[row, node].nonzero().flatten().tolist() == path
                    assert depth[row, node] == len(path) - 1


def test_chain_of_ragged_rows() -> None:
    tree = Tree.chain(torch.arange(8).reshape(2, 4), torch.tensor([4, 1]), start=3)
    assert tree.parent.tolist() == [[2, 3, 4, 5], [2, -2, -2, -2]]
    assert tree.valid.tolist() == [[True] * 4, [True, False, False, False]]
    assert (tree.batch, tree.size) == (2, 4)
