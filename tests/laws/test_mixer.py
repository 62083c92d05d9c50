"""The laws of a mixer's parallel form, and how chunks add up to it; every registered mixer, blocks and decoders too."""

from itertools import pairwise

import pytest
import torch
from sequences import MIXER_SUBJECTS, SUBJECTS, TIGHT, Book, Sublayer, names
from torch import Tensor

from fewstep.core.mixer import Causal, Context, Dense, Full, Mask, Window
from fewstep.nn.mixers import MIXERS
from fewstep.nn.mixers.attention import AttentionConfig

CAUSAL = names(SUBJECTS, "causal")
MASKS: dict[type, Mask] = {Causal: Causal(), Window: Window(2), Full: Full()}


def masks_of(subject: Sublayer) -> list[Mask]:
    return [mask for kind, mask in MASKS.items() if kind in subject.masks]


def packed(lengths: list[list[int]], count: int) -> Tensor:
    """[B,count] segment ids of sequences one after another, -1 behind them and in one gap."""
    rows = []
    for row in lengths:
        ids = [i for i, length in enumerate(row) for _ in range(length)]
        rows.append([*ids[: row[0]], -1, *ids[row[0] :]] + [-1] * (count - 1 - len(ids)))
    return torch.tensor(rows)


@pytest.mark.parametrize("name", CAUSAL)
def test_parallel_equals_random_chunks_equals_token_by_token(name: str) -> None:
    subject = SUBJECTS[name]()
    batch, count = 2, 11
    x = subject.inputs(batch, count)
    whole = subject.parallel(x)
    cuts = sorted({0, count, *torch.randint(1, count, (3,)).tolist()})
    for bounds in (cuts, list(range(count + 1))):
        book, parts = Book.open(subject, batch, count), []
        for start, end in pairwise(bounds):
            parts.append(book.extend(x[:, start:end]))
            book.commit([list(range(end - start))] * batch)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **TIGHT)


@pytest.mark.parametrize("name", CAUSAL)
def test_chunks_without_commits(name: str) -> None:
    """Pending nodes see one another over several extends."""
    subject = SUBJECTS[name]()
    x = subject.inputs(2, 9)
    book = Book.open(subject, 2, 9)
    parts = [book.extend(part) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), subject.parallel(x), **TIGHT)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_past_matters_and_the_future_does_not(name: str) -> None:
    """Without this the laws would hold for a mixer that mixes nothing, or everything."""

    def notice() -> tuple[bool, bool]:
        """Whether a token does, and the one after it."""
        subject = SUBJECTS[name]()
        x = subject.inputs(1, 8)
        other = x.clone()
        other[:, 4] = subject.inputs(1, 1)[:, 0] if subject.takes_activations else (x[:, 4] + 1) % 11
        change = (subject.parallel(x) - subject.parallel(other)).abs().amax((0, 2))
        assert change[:4].max() < 1e-12
        return bool(change[4] > 1e-6), bool(change[5] > 1e-6)

    # the weights of a squared ReLU may all be 0, about every other draw: one of forty shows both
    assert any(notice() == (True, name != "attention-window-1") for _ in range(40))


@pytest.mark.parametrize("name", SUBJECTS)
def test_packed_segments_equal_separate_sequences_and_padding_is_inert(name: str) -> None:
    subject = SUBJECTS[name]()
    lengths = [[4, 1, 3], [2, 6], [7]]
    segments = packed(lengths, 11)
    x = subject.inputs(3, 11)
    for mask in masks_of(subject):
        together = subject.parallel(x, segments, mask)
        for row, sequence in ((row, i) for row, sizes in enumerate(lengths) for i in range(len(sizes))):
            own = segments[row] == sequence
            alone = subject.parallel(x[row : row + 1, own], mask=mask)
            torch.testing.assert_close(together[row : row + 1, own], alone, **TIGHT)
        real = segments >= 0
        noise = subject.inputs(3, 11)
        noisy = torch.where(real if x.dim() == 2 else real.unsqueeze(-1), x, noise)
        torch.testing.assert_close(subject.parallel(noisy, segments, mask)[real], together[real], rtol=0, atol=0)


@pytest.mark.parametrize(("own", "asked", "narrowest"), [(5, 3, 3), (2, 4, 2), (None, 3, 3)])
def test_a_mask_narrows_a_layer_and_never_widens_it(own: int | None, asked: int, narrowest: int) -> None:
    layers = [AttentionConfig(window=window).build(width=16, heads=4).double() for window in (own, narrowest)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, positions = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9).expand(2, -1)
    mine, _ = layers[0](x, Context(positions, mask=Window(asked)))
    wanted, _ = layers[1](x, Context(positions))
    torch.testing.assert_close(mine, wanted, **TIGHT)


@pytest.mark.parametrize("name", names(SUBJECTS, "bidirectional"))
def test_bidirectional_sees_every_token_of_its_sequence(name: str) -> None:
    if Full not in SUBJECTS[name]().masks:
        pytest.skip("takes no full mask")

    def first_notices_last() -> bool:
        subject = SUBJECTS[name]()
        x, order = subject.inputs(1, 6), torch.randperm(6)
        y = subject.parallel(x, mask=Full())
        if name == "attention-none":  # without positions a set is a set
            torch.testing.assert_close(subject.parallel(x[:, order], mask=Full()), y[:, order], **TIGHT)
        return bool((y[:, 0] - subject.parallel(x[:, :5], mask=Full())[:, 0]).abs().max() > 1e-6)

    assert any(first_notices_last() for _ in range(40))  # as above


@pytest.mark.parametrize("name", CAUSAL)
def test_extend_refuses_a_bidirectional_mask(name: str) -> None:
    subject = SUBJECTS[name]()
    book = Book.open(subject, 2, 8)
    book.extend(subject.inputs(2, 3))
    for mask in (Full(), Dense(torch.ones(2, 2, 5, dtype=torch.bool))):
        with pytest.raises(ValueError, match=r"^mask=.*causal"):
            subject.step(subject.inputs(2, 2), torch.tensor([[2, 3]] * 2), torch.tensor([[3, 4]] * 2), book.state, mask)
    book.extend(subject.inputs(2, 2))  # and the state is what it was


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_that_only_looks_both_ways_has_no_stepwise_form(kind: str) -> None:
    subject = SUBJECTS[f"{kind}-rope"]()
    assert subject.modes and subject.modes <= {"causal", "bidirectional"}
    if "causal" not in subject.modes:
        refusal = rf"^mixer='{kind}': [^\n]*; choose a causal mixer to decode$"
        with pytest.raises(ValueError, match=refusal):
            subject.step(subject.inputs(1, 1), torch.tensor([[-1]]), torch.tensor([[0]]), None)
        with pytest.raises(ValueError, match=refusal):
            subject.start(1, 8)


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_undeclared_mask_is_refused_in_one_line(name: str) -> None:
    subject = SUBJECTS[name]()
    x = subject.inputs(1, 4)
    for mask in (object(), *(mask for kind, mask in MASKS.items() if kind not in subject.masks)):
        with pytest.raises(ValueError, match=r"^mask=[^\n]*choose one of[^\n]*$"):
            subject.parallel(x, mask=mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MIXER_SUBJECTS)
def test_gradcheck_of_the_parallel_form(name: str) -> None:
    subject = MIXER_SUBJECTS[name]()
    x = subject.inputs(2, 5).requires_grad_()
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, -1]])
    for mask in masks_of(subject):

        def forward(x: Tensor, *_: Tensor, mask: Mask = mask) -> tuple[Tensor, Tensor]:
            return subject.parallel(x, mask=mask), subject.parallel(x, segments, mask)[segments >= 0]

        assert torch.autograd.gradcheck(forward, (x, *subject.module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", names(MIXER_SUBJECTS, "causal"))
def test_gradcheck_of_extend_through_a_state_built_under_grad(name: str) -> None:
    subject = MIXER_SUBJECTS[name]()
    first, second = subject.inputs(2, 4).requires_grad_(), subject.inputs(2, 3).requires_grad_()
    parent = torch.tensor([[-1, 0, 0, 2], [-1, -1, 1, 2]])
    path, keep = torch.tensor([[0, 2, 3, 0], [1, 2, 0, 0]]), torch.tensor([3, 2])

    def forward(first: Tensor, second: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 2]])
        y, state = subject.step(first, parent, positions, subject.start(2, 12))
        state = state.commit(path, keep)
        positions = keep.unsqueeze(1) + torch.tensor([[0, 1, 1]])
        z, _ = subject.step(second, torch.tensor([[-1, 0, 0]] * 2), positions, state)
        return y, z

    assert torch.autograd.gradcheck(forward, (first, second, *subject.module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", CAUSAL)
def test_stepwise_gradients_equal_parallel_gradients(name: str) -> None:
    """A fork that goes its own way without grad in between does not spoil what backward needs."""
    subject = SUBJECTS[name]()
    x, weight = subject.inputs(2, 8), torch.randn(8, 1, dtype=torch.float64)
    parameters = list(subject.module.parameters())
    wanted = torch.autograd.grad((subject.parallel(x) * weight).sum(), parameters)
    book, total = Book.open(subject, 2, 16), torch.zeros((), dtype=torch.float64)
    for start, end in ((0, 3), (3, 4), (4, 8)):
        total = total + (book.extend(x[:, start:end]) * weight[start:end]).sum()
        book.commit([list(range(end - start))] * 2)
        with torch.no_grad():
            fork = book.fork([1, 0])
            fork.extend(subject.inputs(2, 3), torch.tensor([[-1, -1, 0]] * 2))
            fork.commit([[0, 2], [1]])
    torch.testing.assert_close(torch.autograd.grad(total, parameters), wanted, **TIGHT)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_step_without_grad_leaves_the_graph_before_it_whole(name: str) -> None:
    subject = SUBJECTS[name]()
    parameters = list(subject.module.parameters())
    x = subject.inputs(2, 4)
    wanted = torch.autograd.grad(subject.parallel(x).square().sum(), parameters)
    book = Book.open(subject, 2, 8)
    y = book.extend(x)
    with torch.no_grad():
        book.commit([[0, 1, 2, 3], [0, 1]])
        book.extend(subject.inputs(2, 3), torch.tensor([[-1, -1, 1]] * 2))
        book.commit([[1, 2]] * 2)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), wanted, **TIGHT)
