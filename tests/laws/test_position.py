"""The laws of position encodings with every mixer that takes them, and what happens where one does not.

`test_mixer.py` and `test_state.py` hold attention with encodings that bias its scores; here is every pair, in brief.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import ENCODINGS, HEADS, SUBJECTS, TIGHT, VOCAB, WIDTH, Book, Sublayer, decoder, placed
from torch import Tensor, nn

from fewstep.core.mixer import Causal, Context, Full, Tree
from fewstep.core.position import NEEDS, NoPosition, fitted
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.models.weights import distinct
from fewstep.nn import kernels
from fewstep.nn.heads import SequentialHeadsConfig
from fewstep.nn.mixers import MIXERS
from fewstep.nn.packed import pack
from fewstep.nn.position import POSITIONS
from fewstep.report.matrix import TESTED, UNUSED, encoding_matrix, markdown

MATRIX = encoding_matrix()
CELLS = [f"{mixer} {encoding}" for encoding, row in MATRIX.items() for mixer, cell in row.items() if cell == TESTED]
ATTENTION = [f"attention {encoding}" for encoding in POSITIONS]
OTHERS = ["sparse alibi", "sparse shaw", "mla t5", "mla deberta", "diag_attention transformer_xl", "diag_attention shaw"]


def subject_of(cell: str) -> Sublayer:
    mixer, encoding = cell.split()
    return placed(MIXERS[mixer](), ENCODINGS[encoding])()


def test_every_pair_works_or_says_why_not() -> None:
    assert set(MATRIX) == set(POSITIONS) and all(set(row) == set(MIXERS) for row in MATRIX.values())
    assert set(ATTENTION) <= set(CELLS)
    for encoding, row in MATRIX.items():
        for mixer, cell in row.items():
            if cell in (TESTED, UNUSED):
                subject_of(f"{mixer} {encoding}")
            else:
                assert "\n" not in cell and "; " in cell and mixer in cell
    table = markdown(MATRIX)
    assert all(f"\n| {encoding} | ✓ |" in table for encoding in POSITIONS)


@pytest.mark.parametrize("cell", CELLS)
def test_all_forms_agree(cell: str) -> None:
    """Ragged prompts, trees over two calls, a commit of other nodes in each row, and on; each node as its own whole text."""
    subject = subject_of(cell)
    if "causal" not in subject.modes:
        pytest.skip("has no stepwise form")
    with torch.inference_mode():
        book = Book.open(subject, 2, 24)
        book.extend(subject.inputs(2, 5), torch.tensor([[-1, 0, 1, 2, 3], [-1, 0, -2, -2, -2]]))
        book.commit([[0, 1, 2, 3, 4], [0, 1]])
        book.extend(subject.inputs(2, 5), torch.tensor([[-1, 0, 0, 2, -1], [-1, -1, 1, 1, -2]]))
        book.extend(subject.inputs(2, 2), torch.tensor([[3, 3], [2, -1]]))
        book.commit([[0, 2, 3, 6], [1, 2, 5]])
        book.extend(subject.inputs(2, 4))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.endswith(" none")])
def test_positions_matter(cell: str) -> None:
    """The same tokens twice as far apart are something else; without that the other laws would hold for no encoding at all."""

    def difference() -> Tensor:
        subject = subject_of(cell)
        x, places = subject.inputs(1, 7), torch.arange(7).unsqueeze(0)
        mask = Causal() if Causal in subject.masks else Full()
        near, far = (subject.module(x, Context(positions, mask=mask))[0] for positions in (places, 2 * places))
        return (near - far).abs().max()

    assert any(difference() > 1e-6 for _ in range(40))  # the weights of a squared ReLU may all be 0, about every other draw


@pytest.mark.parametrize("cell", [*ATTENTION, *OTHERS])
def test_packed_texts_are_separate_and_padding_is_inert(cell: str) -> None:
    subject = subject_of(cell)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [0, -1, 1, 1, 1, 1, 2, -1]])
    x = subject.inputs(2, 8)
    for mask in (mask for mask in (Causal(), Full()) if type(mask) in subject.masks):
        together = subject.parallel(x, segments, mask)
        for row, segment in ((i, s) for i in range(2) for s in range(int(segments[i].max()) + 1)):
            own = segments[row] == segment
            torch.testing.assert_close(together[row, own], subject.parallel(x[row : row + 1, own], mask=mask)[0], **TIGHT)
        noisy = torch.where((segments >= 0).unsqueeze(-1), x, subject.inputs(2, 8))
        real = segments >= 0
        torch.testing.assert_close(subject.parallel(noisy, segments, mask)[real], together[real], rtol=0, atol=0)


@pytest.mark.parametrize("cell", [cell for cell in [*ATTENTION, *OTHERS] if cell.replace(" ", "-") not in SUBJECTS])
def test_gradcheck(cell: str) -> None:
    """Of what has no place among the subjects of `test_mixer.py`; a cached call's gradients through its own state."""
    subject = subject_of(cell)
    x = subject.inputs(2, 4).requires_grad_()
    parameters = list(subject.module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: subject.parallel(x), (x, *parameters), fast_mode=True)
    if "causal" not in subject.modes:
        return

    def extend(x: Tensor, *_: Tensor) -> Tensor:
        parent, places = torch.tensor([[-1, 0, 0, 1], [-1, -1, 1, 2]]), torch.tensor([[0, 1, 1, 2], [0, 0, 1, 2]])
        return subject.step(x, parent, places, subject.start(2, 6))[0]

    assert torch.autograd.gradcheck(extend, (x, *parameters), fast_mode=True)


def test_what_a_mixer_lacks_is_named() -> None:
    parts = {"rotate": "rope", "bias": "alibi", "value": "shaw"}
    for part, lacks in NEEDS.items():
        position: Any = ENCODINGS[parts[part]].build(head_width=4, width=WIDTH, heads=HEADS)
        others = frozenset(NEEDS) - {part}
        with pytest.raises(ValueError, match=rf"^position='{parts[part]}': some_mixer has no {lacks}; choose [^\n]*$"):
            fitted(position, "some_mixer", others)
        assert fitted(position, "some_mixer", position.parts) is position
        assert type(fitted(position, "some_mixer", frozenset())) is NoPosition  # it orders tokens by itself
    embeds: Any = ENCODINGS["trainable"].build(head_width=4, width=WIDTH, heads=HEADS)
    assert fitted(embeds, "some_mixer", frozenset({"rotate"})) is embeds
    assert type(fitted(None, "some_mixer", frozenset({"rotate"}))) is NoPosition


def test_one_layer_that_lacks_what_an_encoding_needs_refuses_the_decoder() -> None:
    with pytest.raises(
        ValueError, match=r"^position='alibi': gau has no softmax scores [^\n]*; choose another encoding or mixer$"
    ):
        decoder(position=ENCODINGS["alibi"], mixers=(MIXERS["attention"](), MIXERS["gau"]()))
    hybrid = decoder(position=ENCODINGS["alibi"], mixers=(MIXERS["attention"](), MIXERS["mamba2"]()))
    assert hybrid.blocks[0].mixer.position is hybrid.position  # the layer that orders tokens by itself leaves it to the other


def test_layers_share_an_encoding_or_have_their_own() -> None:
    shared, own = decoder(position=ENCODINGS["t5"]), decoder(position=ENCODINGS["shaw"])
    assert shared.blocks[0].mixer.position is shared.blocks[1].mixer.position is shared.position
    assert own.blocks[0].mixer.position is not own.blocks[1].mixer.position
    names = [[name for name in distinct(network.state_dict(keep_vars=True)) if "position" in name] for network in (shared, own)]
    assert names == [["position.embedding"], [f"blocks.{i}.mixer.position.embedding" for i in range(2)]]
    counted = sum(parameter.numel() for parameter in decoder(position=ENCODINGS["none"]).parameters())
    assert sum(parameter.numel() for parameter in shared.parameters()) == counted + 8 * HEADS


@pytest.mark.parametrize("mixer", ["attention", "sparse", "mla"])
def test_positions_of_the_callers_own_are_refused_where_keys_are_scored_by_distance(mixer: str) -> None:
    network = decoder(position=ENCODINGS["alibi"], mixers=(MIXERS[mixer](),))
    tree = Tree(torch.randint(VOCAB, (2, 3)), torch.tensor([[-1, 0, 1], [-1, 0, -2]]))
    places = torch.tensor([[0, 1, 2], [0, 1, 77]])  # padding stands anywhere
    wanted = network.extend(tree, network.init_state(2, 8, device="cpu", dtype=torch.float64)).logits
    state = network.init_state(2, 8, device="cpu", dtype=torch.float64)
    torch.testing.assert_close(network.extend(tree, state, positions=places).logits[tree.valid], wanted[tree.valid], **TIGHT)
    for other in (places + 1, torch.stack([places, places], -1)):
        with pytest.raises(ValueError, match=r"^positions: [^\n]*; leave them out$"):
            network.extend(tree, network.init_state(2, 8, device="cpu", dtype=torch.float64), positions=other)


def test_a_convolution_refuses_cached_calls() -> None:
    network = decoder(position=ENCODINGS["convolution"])
    assert network(torch.randint(VOCAB, (1, 5))).final.shape == (1, 5, WIDTH)
    with pytest.raises(ValueError, match=r"^position='convolution': [^\n]*neighbours[^\n]*; choose another to decode$"):
        network.extend(Tree.chain(torch.tensor([[1, 2]])), network.init_state(1, 4, device="cpu", dtype=torch.float64))


@pytest.mark.parametrize("longest", [None, 81])
def test_a_table_shorter_than_the_context_is_refused(longest: int | None) -> None:
    with pytest.raises(ValueError, match=rf"^max_positions={longest}: trainable positions end at length=80; [^\n]*$"):
        DecoderConfig(position=ENCODINGS["trainable"], max_positions=longest).build()


@pytest.mark.parametrize("kind", ["trainable", "multiplicative"])
def test_a_position_beyond_the_table_is_refused(kind: str) -> None:
    table: Any = ENCODINGS[kind].build(head_width=4, width=4)
    with pytest.raises(ValueError, match=r"^positions: 80 is beyond the table of length=80; [^\n]*$"):
        table.embed(torch.randn(1, 2, 4), torch.tensor([[0, 80]]))


@pytest.mark.parametrize("kind", [kind for kind in POSITIONS if kind not in ("none", "rope_2d", "rope_mixed")])
def test_several_axes_are_refused_by_encodings_of_one(kind: str) -> None:
    encoding: Any = ENCODINGS[kind].build(head_width=8, width=8)
    x, q, places = torch.randn(1, 3, 8), torch.randn(1, 1, 3, 8), torch.zeros(1, 3, 2, dtype=torch.int64)
    uses = {
        "embed": lambda: encoding.embed(x, places),
        "rotate": lambda: encoding.rotate(q, q, places, places, {}),
        "bias": lambda: encoding.bias(q, q, places, places),
        "value": lambda: encoding.value(q @ q.mT, places, places),
    }
    for part in encoding.parts - ({"rotate"} if kind == "deberta" else set()):  # DeBERTa's turns by no position
        with pytest.raises(ValueError, match=r"^positions: [^\n]*several axes; [^\n]*$"):
            uses[part]()


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_directory_brings_back_every_bit(kind: str, tmp_path: Path) -> None:
    """Shared tables once, and shared again when they come back."""
    model = Model(decoder(position=ENCODINGS[kind], max_positions=80).float(), None)
    model.save(tmp_path)
    back = Model.load(tmp_path, dtype="float32")
    assert back.network.config == model.network.config
    assert len(list(back.network.parameters())) == len(list(model.network.parameters()))
    tokens = torch.randint(VOCAB, (2, 6))
    assert torch.equal(back.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize("kind", ["alibi", "t5", "shaw", "transformer_xl", "deberta", "rope_mixed", "recursive"])
def test_recomputation_gives_equal_gradients(kind: str) -> None:
    network = decoder(position=ENCODINGS[kind])
    tokens, segments = torch.randint(VOCAB, (2, 9)), torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2])
    gradients = []
    for network.recompute in (False, True):
        network.zero_grad()
        network(tokens, segments).final[segments >= 0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients, **TIGHT)


def test_new_heads_leave_a_shared_encoding_as_it_is() -> None:
    network = decoder(position=ENCODINGS["t5"])
    before = network.position.embedding.clone()
    network.attach(SequentialHeadsConfig(depth=1))
    assert torch.equal(network.position.embedding, before)
    assert network.heads["mtp"].module(1).block.mixer.position is network.position  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["deberta", "shaw", "trainable", "transformer_xl", "yarn"])
@pytest.mark.skipif(not kernels.available(), reason="no kernels here")
def test_packed_models_decode_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What biases scores never meets a kernel, which knows no bias; what only embeds or turns does."""
    network = decoder(position=ENCODINGS[kind], max_positions=80).float().requires_grad_(False)
    packed: Any = pack(copy.deepcopy(network))
    assert (packed.blocks.packed is None) == (kind not in ("trainable", "yarn"))
    if packed.blocks.packed is None:
        monkeypatch.setattr(kernels, "attend", None)
    tokens = torch.randint(VOCAB, (2, 9))
    wanted = network.unembed(network(tokens).final)
    with torch.inference_mode():
        state, parts = packed.init_state(2, 16, device="cpu", dtype=torch.float32), []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            output = packed.extend(Tree.chain(tokens[:, start:end]), state)
            parts.append(output.logits)
            state = output.state.commit(torch.arange(end - start).expand(2, -1), torch.full((2,), end - start))
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["recursive", "deberta"])
def test_what_is_kept_of_weights_follows_the_weights(kind: str) -> None:
    """Through optimizers that step in place, new dtypes and copied weights, in decoding and outside."""
    encoding: Any = ENCODINGS[kind].build(head_width=4, width=WIDTH, heads=HEADS)
    q, places = torch.randn(1, HEADS, 5, 4), torch.arange(5).unsqueeze(0)

    def now() -> Tensor:
        dtype = next(encoding.parameters()).dtype
        x = encoding.embed(torch.zeros(1, 5, WIDTH, dtype=dtype), places)
        return x if kind == "recursive" else encoding.bias(q.to(dtype), q.to(dtype), places, places)

    def fresh() -> Tensor:
        return now().detach()  # outside of decoding nothing is kept

    def changed() -> None:
        with torch.inference_mode():
            assert torch.equal(now(), now())
            torch.testing.assert_close(now(), wanted)
            assert not torch.equal(wanted, before)

    before = torch.zeros_like(now())
    wanted = fresh()
    changed()
    for optimizer in (
        torch.optim.AdamW(encoding.parameters(), lr=0.1, fused=True),
        torch.optim.SGD(encoding.parameters(), lr=1.0),
    ):
        now().square().sum().backward()
        optimizer.step()
        before, wanted = wanted, fresh()
        changed()
    with torch.no_grad():
        torch._foreach_mul_(list(encoding.parameters()), 1.5)
    before, wanted = wanted, fresh()
    changed()
    encoding.load_state_dict({name: value * 0.5 for name, value in encoding.state_dict().items()}, assign=True)
    before, wanted = wanted, fresh()
    changed()
    encoding.double()
    assert now().dtype == torch.float64


def test_rows_of_equal_places_give_what_separate_rows_give() -> None:
    """Attention hands one row of positions for a batch whose rows have the same; an encoding must not tell the difference."""
    for kind, config in ENCODINGS.items():
        encoding: Any = config.build(head_width=4, width=WIDTH, heads=HEADS).double()
        if encoding.parts.isdisjoint({"bias", "value"}):
            continue
        q, k = torch.randn(2, HEADS, 3, 4, dtype=torch.float64), torch.randn(2, 2, 9, 4, dtype=torch.float64)
        q_pos, k_pos = torch.tensor([[6, 7, 8]]), torch.arange(9).unsqueeze(0)
        each = encoding.bias(q, k, q_pos.expand(2, -1), k_pos.expand(2, -1))
        torch.testing.assert_close(encoding.bias(q, k, q_pos, k_pos).expand_as(each), each, msg=kind, **TIGHT)


def test_grouped_keys_are_those_of_their_heads() -> None:
    for kind, config in ENCODINGS.items():
        encoding: Any = config.build(head_width=4, width=WIDTH, heads=HEADS).double()
        q, k = torch.randn(2, HEADS, 3, 4, dtype=torch.float64), torch.randn(2, 2, 9, 4, dtype=torch.float64)
        q_pos, k_pos = torch.tensor([[6, 7, 8]]).expand(2, -1), torch.arange(9).expand(2, -1)
        if "bias" in encoding.parts:
            wanted = encoding.bias(q, k.repeat_interleave(2, 1), q_pos, k_pos)
            torch.testing.assert_close(encoding.bias(q, k, q_pos, k_pos), wanted, msg=kind, **TIGHT)


def test_training_moves_every_parameter_of_an_encoding() -> None:
    """None is registered and left out of the sum."""
    for kind, config in ENCODINGS.items():
        encoding: nn.Module = config.build(head_width=4, width=WIDTH, heads=HEADS)
        if not list(encoding.parameters()):
            continue
        network = decoder(position=config, max_positions=80)
        network(torch.randint(VOCAB, (2, 9))).final.square().sum().backward()
        names = [name for name, parameter in network.named_parameters() if "position" in name and parameter.grad is None]
        assert not names, f"{kind}: {names}"
