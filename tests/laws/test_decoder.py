"""The decoder as a target: taps, the nodes asked for, early exit, its context, recomputation, tying, and its directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sequences import TIGHT, VOCAB, decoder
from torch import Tensor

from fewstep.core.mixer import Full, Tree, Window
from fewstep.core.recipe import parse
from fewstep.decode.drafters.silent import Nothing
from fewstep.models.decoder import Decoder, DecoderConfig
from fewstep.models.model import Model
from fewstep.nn.heads import ParallelHeadsConfig, SequentialHeadsConfig
from fewstep.nn.mixers.attention import AttentionConfig
from fewstep.nn.position import NoPositionConfig
from fewstep.nn.stack import StackState

WINDOWED = AttentionConfig(window=3)
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "hybrid": {"mixers": (WINDOWED, AttentionConfig(kv_heads=2, qk_norm=True)), "depth": 3, "tied": False},
    "layer-norm": {"norm": "layer", "activation": "gelu", "mlp_bias": True, "position": NoPositionConfig()},
    "sequential-heads": {"heads": (SequentialHeadsConfig(depth=2),)},
    "parallel-heads": {"heads": (ParallelHeadsConfig(depth=2),), "tied": False},
}
TREE = torch.tensor([[-1, 0, 0, 1, -2, 2], [-1, -1, 1, -2, 1, 0]])


def prompted(network: Decoder, lengths: tuple[int, ...] = (5, 2), capacity: int = 40) -> Any:
    """A state with ragged prompts committed."""
    chain = Tree.chain(torch.randint(VOCAB, (len(lengths), max(lengths))), torch.tensor(lengths))
    state = network.extend(chain, network.init_state(len(lengths), capacity, device="cpu", dtype=torch.float64)).state
    return state.commit(torch.arange(max(lengths)).expand(len(lengths), -1), torch.tensor(lengths))  # type: ignore[attr-defined]


def names(depth: int) -> tuple[str, ...]:
    return ("embed", *(f"layer.{i}" for i in range(depth)), "hidden", "final")


@pytest.mark.parametrize("variant", VARIANTS)
def test_taps_are_what_their_names_say(variant: str) -> None:
    network = decoder(**VARIANTS[variant])
    tokens, taps = torch.randint(VOCAB, (2, 7)), names(network.depth)
    encoded = network(tokens, taps=taps)
    h = encoded.hidden
    assert set(h) == set(taps)
    torch.testing.assert_close(h["embed"], network.embedding.weight[tokens], **TIGHT)
    torch.testing.assert_close(h["hidden"], h[f"layer.{network.depth - 1}"], **TIGHT)
    torch.testing.assert_close(h["final"], network.norm(h["hidden"]), **TIGHT)
    torch.testing.assert_close(encoded.final, h["final"], **TIGHT)
    below = h["embed"]
    for i, block in enumerate(network.blocks):
        torch.testing.assert_close(h[f"layer.{i}"], block(below, encoded.context)[0], **TIGHT)
        below = h[f"layer.{i}"]
    stepped = network.extend(
        Tree.chain(tokens), network.init_state(2, 7, device="cpu", dtype=torch.float64), taps=(*taps, "logits")
    )
    for name in taps:
        torch.testing.assert_close(stepped.hidden[name], h[name], **TIGHT)
    assert stepped.hidden["logits"] is stepped.logits
    torch.testing.assert_close(stepped.logits, h["final"] @ network.head.weight.T, **TIGHT)


def test_taps_change_nothing_and_unknown_ones_are_refused() -> None:
    network = decoder()
    state = prompted(network)
    tree = Tree(torch.randint(VOCAB, (2, 6)), TREE)
    plain = network.extend(tree, state.fork(torch.arange(2))).logits
    for taps in ((), ("final",), ("embed", "layer.0", "hidden"), names(2)):
        output = network.extend(tree, state.fork(torch.arange(2)), taps=taps)
        torch.testing.assert_close(output.logits, plain, **TIGHT)
        assert set(output.hidden) == set(taps)
    for call in (lambda: network.extend(tree, state, taps=("layer.2",)), lambda: network(tree.tokens, taps=("layer.-1",))):
        with pytest.raises(ValueError, match=r"^taps='layer[^\n]*choose from embed, layer\.0 \.\. layer\.1[^\n]*$"):
            call()


@pytest.mark.parametrize("taps", [(), ("final",)])
def test_need_picks_logits(taps: tuple[str, ...]) -> None:
    network = decoder()
    state = prompted(network)
    tree = Tree(torch.randint(VOCAB, (2, 6)), TREE)
    whole = network.extend(tree, state.fork(torch.arange(2))).logits
    for need in ([[5, 0], [2, 2]], [[3], [4]]):
        picked = network.extend(tree, state.fork(torch.arange(2)), need=torch.tensor(need), taps=taps).logits
        wanted = torch.stack([whole[row, nodes] for row, nodes in enumerate(need)])  # type: ignore[index]
        torch.testing.assert_close(picked, wanted, **TIGHT)


def test_inputs_replace_tokens_and_positions_replace_places() -> None:
    network = decoder()
    state = prompted(network)
    tree = Tree(torch.randint(VOCAB, (2, 6)), TREE)
    plain = network.extend(tree, state.fork(torch.arange(2))).logits
    other = Tree(torch.zeros_like(tree.tokens), TREE)
    fed = network.extend(other, state.fork(torch.arange(2)), inputs=network.embed(tree.tokens)).logits
    torch.testing.assert_close(fed, plain, **TIGHT)
    depth = torch.tensor([[0, 1, 1, 2, 0, 2], [0, 0, 1, 0, 1, 1]])
    placed = torch.tensor([[5], [2]]) + depth
    valid = tree.valid
    said = network.extend(tree, state.fork(torch.arange(2)), positions=placed).logits
    torch.testing.assert_close(said[valid], plain[valid], **TIGHT)  # type: ignore[index]
    moved = network.extend(tree, state.fork(torch.arange(2)), positions=placed + 3).logits
    assert (moved - plain).abs().max() > 1e-4  # type: ignore[operator]


def test_positions_restart_with_each_segment() -> None:
    network, tokens = decoder(), torch.randint(VOCAB, (1, 8))
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    assert network(tokens, segments).context.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert network(tokens).context.positions.tolist() == [list(range(8))]


def test_unembed_of_a_reduced_vocabulary() -> None:
    for network in (decoder(), decoder(tied=False)):
        h, ids = torch.randn(2, 3, network.width, dtype=torch.float64), torch.tensor([7, 0, 7])
        torch.testing.assert_close(network.unembed(h, ids), network.unembed(h)[..., ids], **TIGHT)


@pytest.mark.parametrize("variant", ["tied", "hybrid"])
def test_early_exit_then_rollback(variant: str) -> None:
    """Drafting with the first layers, level by level, leaves no trace; other ranges of layers run those alone."""
    network = decoder(**VARIANTS[variant])
    state = prompted(network)
    twin = state.fork(torch.arange(2))
    first, second = torch.randint(VOCAB, (2, 2)), torch.randint(VOCAB, (2, 3))
    parents = torch.tensor([[-1, 0]] * 2), torch.tensor([[1, 1, 0], [0, -2, 1]])
    probe = network.extend(Tree(first, parents[0]), twin.fork(torch.arange(2)), taps=("layer.0",))
    drafts = network.extend(Tree(first, parents[0]), state, layers=range(1), taps=("hidden",))
    torch.testing.assert_close(drafts.hidden["hidden"], probe.hidden["layer.0"], **TIGHT)
    torch.testing.assert_close(drafts.logits, network.unembed(network.norm(probe.hidden["layer.0"])), **TIGHT)
    deeper = network.extend(Tree(second, parents[1]), drafts.state, layers=range(1), taps=("hidden",))
    probe = network.extend(Tree(second, parents[1]), probe.state, taps=("layer.0",))
    valid = parents[1] != -2
    torch.testing.assert_close(deeper.hidden["hidden"][valid], probe.hidden["layer.0"][valid], **TIGHT)
    tree = Tree(torch.randint(VOCAB, (2, 6)), TREE)
    after = network.extend(tree, deeper.state.rollback())
    torch.testing.assert_close(after.logits, network.extend(tree, twin).logits, **TIGHT)
    nothing = network.extend(Tree(first, parents[0]), after.state.rollback(), layers=range(0))
    torch.testing.assert_close(nothing.logits, network.unembed(network.norm(network.embed(first))), **TIGHT)


@pytest.mark.parametrize("variant", ["tied", "hybrid", "placed"])
def test_early_exit_then_the_other_layers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first layers ran, level by level, the others take up: logits and what is committed are a whole call's."""
    network = decoder(**VARIANTS.get(variant, {}))
    if variant == "placed":  # positions enter beside the tokens, once
        monkeypatch.setattr(network.position, "parts", frozenset({"embed"}))
        monkeypatch.setattr(network.position, "embed", lambda x, positions: x + positions.unsqueeze(-1).sin())
    state = prompted(network)
    twin = state.fork(torch.arange(2))
    tree = Tree(torch.randint(VOCAB, (2, 6)), TREE)
    ran = []
    for nodes in (slice(0, 2), slice(2, 6)):
        level = network.extend(Tree(tree.tokens[:, nodes], TREE[:, nodes]), state, layers=range(1), taps=("layer.0",))
        ran.append(level.hidden["layer.0"])
        state = level.state
    rest = network.extend(tree, state.rollback(), layers=range(1, network.depth), inputs=torch.cat(ran, 1))
    whole = network.extend(tree, twin)
    torch.testing.assert_close(rest.logits[tree.valid], whole.logits[tree.valid], **TIGHT)  # type: ignore[index]
    path, keep = torch.tensor([[0, 2, 5, 0, 0, 0], [1, 2, 4, 0, 0, 0]]), torch.tensor([3, 2])
    after = [out.state.commit(path, keep) for out in (rest, whole)]
    following = Tree(torch.randint(VOCAB, (2, 1)), torch.full((2, 1), -1))
    logits = [network.extend(following, kept).logits for kept in after]
    torch.testing.assert_close(*logits, **TIGHT)


def test_layers_that_keep_no_slots_are_not_taken_up() -> None:
    network = decoder()
    state = network.init_state(1, 8, device="cpu", dtype=torch.float64)
    mixed = StackState([Nothing(), *(state.layer(i) for i in range(1, network.depth))], state.slots)
    tree = Tree.chain(torch.randint(VOCAB, (1, 3)))
    with pytest.raises(ValueError, match=r"^layers=range\(1, 2\): [^\n]*reuse=false[^\n]*$"):
        network.extend(tree, mixed, layers=range(1, network.depth), inputs=network.embed(tree.tokens))


def test_the_context_ends_at_max_positions() -> None:
    """The last position is usable, the one after is refused and costs nothing; padding beyond it and other rows do not count."""
    network = decoder(max_positions=8)
    state = prompted(network, (7, 2))
    bare = decoder(max_positions=None)
    bare.load_state_dict(network.state_dict())
    longer = Tree.chain(torch.randint(VOCAB, (2, 5)), torch.tensor([1, 5]))  # 7 + 1 and 2 + 5 positions
    assert network.extend(longer, state.fork(torch.arange(2))).logits is not None
    wide = Tree(torch.randint(VOCAB, (2, 4)), torch.full((2, 4), -1))  # four alternatives for position 7
    assert network.extend(wide, state.fork(torch.arange(2))).logits is not None
    with pytest.raises(ValueError, match=r"^max_positions=8: 9 [^\n]*shorten[^\n]*$"):
        network.extend(Tree.chain(torch.randint(VOCAB, (2, 2))), state)
    again = network.extend(longer, state)
    state = again.state.commit(torch.arange(5).expand(2, -1), torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"^max_positions=8: 9 "):
        network.extend(Tree.chain(torch.randint(VOCAB, (2, 1))), state)
    last = Tree(torch.randint(VOCAB, (2, 1)), torch.tensor([[-2], [-1]]))  # row 0 is full and rests
    assert network.extend(last, state).logits is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_gives_equal_gradients(variant: str) -> None:
    network = decoder(**VARIANTS[variant])
    tokens, segments = torch.randint(VOCAB, (2, 9)), torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [-1] * 2])
    gradients = []
    for network.recompute in (False, True):
        for mask in (None, Window(2), Full()):
            network.zero_grad()
            encoded = network(tokens, segments, mask=mask, taps=("layer.0",))
            (encoded.final[segments >= 0].square().sum() + encoded.hidden["layer.0"].sum()).backward()
            gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    plain, again = gradients[:3], gradients[3:]
    for mine, theirs in zip(plain, again, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def test_recomputation_holds_less() -> None:
    """What autograd keeps between forward and backward shrinks: the reason to recompute at all."""
    network = decoder(depth=6)
    held = []
    for network.recompute in (False, True):
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = network(torch.randint(VOCAB, (4, 32))).final
        held.append(sum(seen.values()))
        del kept
    assert held[1] < held[0] / 2


def test_tied_and_untied() -> None:
    tied, untied = decoder(), decoder(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == VOCAB * tied.width
    tokens = torch.randint(VOCAB, (2, 5))
    for network in (tied, untied):
        network.unembed(network(tokens).final).square().sum().backward()
    assert untied.head.weight.grad is not None
    assert not torch.equal(untied.head.weight.grad, untied.embedding.weight.grad)
    tied.load_state_dict(tied.state_dict())
    assert tied.double().head.weight is tied.embedding.weight


def test_mixers_repeat_over_the_depth() -> None:
    network = decoder(mixers=(WINDOWED, AttentionConfig()), depth=5)
    assert [block.mixer.config.window for block in network.blocks] == [3, None, 3, None, 3]


def test_the_start_keeps_the_scale_of_the_residual() -> None:
    """The stated standard deviations, on enough weights that 5% off is many standard errors."""
    network = DecoderConfig(width=128, depth=2, hidden=256, vocab=512, init_std=0.05, embed_std=0.7, tied=False).build()
    block = network.blocks[1]
    for weight, std in (
        (network.embedding.weight, 0.7),
        (network.head.weight, 0.05),
        (block.mixer.qkv.weight, 0.05),
        (block.mixer.out.weight, 0.025),
        (block.mlp.up.weight, 0.05),
        (block.mlp.down.weight, 0.025),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert abs(weight.mean()) < std / 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": ()}, r"model\.mixers=\(\): empty; [^\n]+"),
        ({"heads": ("mtp_parallel", "mtp_sequential")}, r"model\.heads=.*two serve the drafter 'mtp'; [^\n]+"),
        ({"embed_std": 1.0}, r"model\.embed_std=1\.0: [^\n]*tied=false[^\n]*"),
        ({"depth": 0}, r"model\.depth=0: [^\n]*1"),
        ({"position": {"kind": "rope", "low_frequency": 4.0}}, r"model\.position\.low_frequency=4\.0: [^\n]*below[^\n]*"),
        ({"hidden": -1}, r"model\.hidden=-1: [^\n]*0"),
        ({"eps": -1e-6}, r"model\.eps=-1e-06: [^\n]*0"),
        ({"mixers": [{"kind": "attention", "windw": 3}]}, r"model\.mixers\.0\.windw: no such field; did you mean 'window'\?"),
    ],
)
def test_a_bad_config_names_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse(DecoderConfig, fields, "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 1, "heads": (ParallelHeadsConfig(),)}, "depth=1: [^\n]*at least 2"),
        ({"query_heads": 3}, "heads=3: must divide width=16; [^\n]*"),
        ({"mixers": (AttentionConfig(kv_heads=3),)}, "kv_heads=3: must divide heads=4; [^\n]*"),
        ({"mixers": (AttentionConfig(head_width=5),)}, "head_width=5: [^\n]*even[^\n]*"),
        ({"mixers": (AttentionConfig(), AttentionConfig(head_width=6))}, r"mixers: head widths \[4, 6\]; [^\n]*one width"),
    ],
)
def test_parts_that_do_not_fit_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        decoder(**fields)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_directory_brings_back_every_bit(variant: str, dtype: str, tmp_path: Path) -> None:
    network = decoder(**VARIANTS[variant]).to(getattr(torch, dtype))
    model = Model(network, None, {"objective": {"kind": "mtp"}, "note": "ours"})
    model.save(tmp_path / "m")
    back = Model.load(tmp_path / "m", dtype=dtype)
    assert back.network.config == network.config
    assert back.recipe == model.recipe
    mine, theirs = network.state_dict(), back.network.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
        assert theirs[name].dtype == tensor.dtype
    assert (back.network.head.weight is back.network.embedding.weight) == network.config.tied
    tokens = torch.randint(VOCAB, (2, 6))
    assert torch.equal(back.logits(tokens), model.logits(tokens))
    back.save(tmp_path / "again")
    for name in ("weights.safetensors", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_saving_narrower_rounds_once(tmp_path: Path) -> None:
    network = decoder().float()
    Model(network, None).save(tmp_path, dtype="bfloat16")
    back = Model.load(tmp_path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], tensor.bfloat16().float())
    assert network.embedding.weight.dtype == torch.float32


@pytest.fixture
def directory(tmp_path: Path, _reproducible: None) -> Path:
    Model(decoder(tied=False), None).save(tmp_path / "model")
    return tmp_path / "model"


def _recipe(directory: Path, change: Any) -> None:
    recipe = json.loads((directory / "recipe.json").read_text())
    (directory / "recipe.json").write_text(json.dumps(change(recipe)))


def _weights(directory: Path, change: Any) -> None:
    path = directory / "weights.safetensors"
    save_file(change(load_file(path)), path)


def _cut(directory: Path, keep: float) -> None:
    path = directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


DAMAGE: dict[str, tuple[Any, str]] = {
    "no recipe": (lambda d: (d / "recipe.json").unlink(), "recipe.json"),
    "recipe cut": (lambda d: (d / "recipe.json").write_text('{"model": {'), "recipe.json: not valid JSON"),
    "recipe a list": (lambda d: (d / "recipe.json").write_text("[1]"), "expected a JSON object"),
    "recipe nested": (lambda d: (d / "recipe.json").write_text("[" * 100_000), "recipe.json"),
    "no model section": (lambda d: _recipe(d, lambda r: {"optim": {}}), "no section 'model'"),
    "misspelt field": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "dept": 2}}), "model.dept: no such field"),
    "unknown kind": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "kind": "decodr"}}), "did you mean 'decoder'"),
    "other shape": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "hidden": 25}}), "mlp"),
    "deeper": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "depth": 3}}), "blocks.2"),
    "shallower": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "depth": 1}}), "blocks.1"),
    "endless": (lambda d: _recipe(d, lambda r: {"model": {**r["model"], "depth": 10**9}}), "layers"),
    "tensor missing": (lambda d: _weights(d, lambda w: {k: v for k, v in w.items() if k != "norm.weight"}), "norm.weight"),
    "tensor too many": (lambda d: _weights(d, lambda w: {**w, "extra": torch.ones(2)}), "extra"),
    "tensor reshaped": (lambda d: _weights(d, lambda w: {**w, "head.weight": w["head.weight"].T.contiguous()}), "head.weight"),
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), "no safetensors file"),
    "weights cut in half": (lambda d: _cut(d, 0.5), "weights.safetensors"),
    "weights cut in the header": (lambda d: _cut(d, 0.01), "weights.safetensors"),
    "weights empty": (lambda d: _cut(d, 0), "weights.safetensors"),
    "weights are text": (lambda d: (d / "weights.safetensors").write_text("weights " * 100), "weights.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_line(case: str, directory: Path) -> None:
    damage, names = DAMAGE[case]
    damage(directory)
    with pytest.raises(ValueError, match=r".") as caught:
        Model.load(directory)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_save_that_fails_keeps_the_weights_that_were_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (directory / "weights.safetensors").read_bytes()

    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.models.weights.save_file", full)
    with pytest.raises(ValueError, match=r"^[^\n]*No space left[^\n]*$"):
        Model(decoder(), None).save(directory)
    assert (directory / "weights.safetensors").read_bytes() == before
    assert not list(directory.glob(".*"))
