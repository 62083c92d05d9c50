"""Heads in other projects' layouts compute what those projects compute, and come back bit for bit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_heads import (
    DEPTH,
    DRAFTED,
    EDGE,
    GROUPS,
    MADE,
    D,
    Draw,
    V,
    drafted,
    eagle,
    expected,
    made,
    medusa,
    medusa_vllm,
    mtp,
    put,
    target,
)
from safetensors.torch import load_file, save_file

from fewstep import cli
from fewstep.core.mixer import Context
from fewstep.decode.generate import decode
from fewstep.decode.stream import Settings
from fewstep.decode.text import pick_drafter
from fewstep.hub.convert import convert
from fewstep.hub.drafters import read_drafter, save_drafter
from fewstep.hub.head_configs import GRANTED
from fewstep.hub.heads import companion
from fewstep.hub.layouts import LAYOUTS
from fewstep.hub.save import save_hf
from fewstep.models.decoder import Decoder
from fewstep.models.model import Model
from fewstep.nn.eagle import Eagle3Heads


@pytest.mark.parametrize("name", MADE)
def test_a_foreign_checkpoint_computes_what_its_project_computes(name: str, tmp_path: Path, seed: int) -> None:
    source, weights = made(name, tmp_path / "theirs", seed)
    own, tokens = target(), torch.tensor([3, 1, 20, 7, 7, 11, 2, 19])
    (heads,) = read_drafter(source, own).heads.values()
    with torch.no_grad():
        ours, theirs = drafted(heads, own, tokens), expected(name, weights, own, tokens)
    assert len(ours) == len(theirs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", MADE)
def test_a_foreign_checkpoint_round_trips_bit_for_bit(name: str, tmp_path: Path, seed: int) -> None:
    source, weights = made(name, tmp_path / "theirs", seed)
    own, layout = target(), LAYOUTS[MADE[name][1]]
    shell = read_drafter(source, own)
    save_drafter(shell, layout.name, tmp_path / "again", own, name="toy")
    written = load_file(tmp_path / "again" / layout.file)
    assert written.keys() == weights.keys()
    for key, tensor in weights.items():
        assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key
    again = read_drafter(tmp_path / "again", own)
    assert again.config.heads == shell.config.heads and again.config.hidden == shell.config.hidden
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    given = json.loads((source / "config.json").read_text())
    differing = {key for key, value in given.items() if key in values and values[key] != value}
    assert differing <= {"architectures", "transformer_layer_config", "speculators_config", "eagle_config"}


KINDS: dict[str, dict[str, Any]] = {
    "medusa": {"kind": "medusa", "depth": 3, "layers": 2, "accuracies": [[0.5, 0.2], [0.3, 0.1]]},
    "medusa-vllm": {"kind": "medusa", "depth": 2, "unembedding": "shared"},
    "eagle": {"kind": "eagle", "bias": False},
    "eagle3": {"kind": "eagle3", "layers": [1, 2, 4], "draft_vocab": DRAFTED, "accuracies": [[0.5, 0.25]]},
    "speculators": {"kind": "eagle3", "layers": [0, 2, 3], "norm_before_residual": True},
    "mtp": {"kind": "mtp_sequential", "depth": 2},
    "mtp-qwen": {"kind": "mtp_sequential", "depth": 1},
}


def test_every_layout_is_tried() -> None:
    assert KINDS.keys() == LAYOUTS.keys() == {layout for _, layout in MADE.values()}


def grown(kind: dict[str, Any], **fields: Any) -> Decoder:
    """A target with heads of this kind, none of their weights neutral."""
    own = target(heads=[kind], **fields)
    (heads,) = own.heads.values()
    if isinstance(heads, Eagle3Heads):
        heads.restrict(torch.randint(0, 99, (V,), generator=torch.Generator().manual_seed(1)), own.head.weight)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return own


def trunk(own: Decoder) -> Decoder:
    """The same target without its heads."""
    bare = own.config.model_copy(update={"heads": ()}).build().eval()
    bare.load_state_dict({key: tensor for key, tensor in own.state_dict().items() if not key.startswith("extra.")})
    return bare


@pytest.mark.parametrize("layout", KINDS)
@pytest.mark.parametrize(
    "mixer", [{}, {"kv_heads": 1}, {"qk_norm": True, "bias": True, "out_bias": True}], ids=["plain", "grouped", "qwen"]
)
def test_heads_made_here_are_written_and_drafted_with(layout: str, mixer: dict[str, Any], tmp_path: Path) -> None:
    own = grown(KINDS[layout], mixers=[{"kind": "attention", **mixer}])
    (drafter,) = own.heads
    if "qk_norm" in mixer and layout in ("eagle", "eagle3"):
        with pytest.raises(ValueError, match=rf"^to='{layout}': llama cannot say [^\n]*; choose another layout$"):
            save_drafter(own, layout, tmp_path / "heads", own, name="toy")
        assert not [*tmp_path.iterdir()]
        return
    save_drafter(own, layout, tmp_path / "heads", own, name="toy")
    bare = trunk(own)
    shell = read_drafter(tmp_path / "heads", bare)
    assert shell.config.heads == own.config.heads
    for key, tensor in own.heads[drafter].state_dict().items():
        assert torch.equal(shell.heads[drafter].state_dict()[key], tensor), key
    if drafter == "mtp":  # which drafts with a checkpoint's own heads alone
        return
    model, prompts = Model(bare, None), [[1, 2, 3, 4], [5, 6]]
    chosen = pick_drafter(model, f"{drafter}={tmp_path / 'heads'}", companion(model))
    plain = decode(bare, pick_drafter(model, "silent", companion(model)), prompts, Settings(12))
    assert [row.tokens for row in decode(bare, chosen, prompts, Settings(12))] == [row.tokens for row in plain]


def test_variants_of_the_same_layouts(tmp_path: Path) -> None:
    """A prefix, a trunk in the same files, repeated blocks, no bias, and copies of the target's own tensors."""
    own = target()
    weights, values = medusa(Draw(1))
    plain = read_drafter(put(tmp_path / "plain", weights, values, "medusa_lm_head.safetensors"), own).heads["medusa"].state_dict()
    rest = {"model.norm.weight": torch.ones(D), "lm_head.weight": torch.ones(V, D)}
    merged = {f"medusa_head.{name}": tensor for name, tensor in weights.items()} | rest
    loaded = read_drafter(put(tmp_path / "merged", merged, values, "model.safetensors"), own).heads["medusa"].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())
    few = {**values, "medusa_num_heads": 2}  # as in the first released heads, whose files hold five
    with pytest.warns(RuntimeWarning, match="medusa_num_heads=2: the weights hold 3 heads, all are taken"):
        assert read_drafter(put(tmp_path / "few", weights, few, "medusa_lm_head.safetensors"), own).heads["medusa"].depth == 3

    weights, values = medusa_vllm(Draw(2))
    bare = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    source = put(tmp_path / "bare", bare, {**values, "medusa_fc_bias": False}, "model.safetensors")
    heads: Any = read_drafter(source, own).heads["medusa"]
    assert not any(tensor.any() for name, tensor in heads.state_dict().items() if name.endswith(".bias"))
    shared = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_heads.")}
    shared["lm_heads.0.weight"] = own.head.weight.detach().to(torch.bfloat16)
    source = put(tmp_path / "shared", shared, {**values, "original_lm_head": True}, "model.safetensors")
    assert not len(read_drafter(source, own).heads["medusa"].unembeddings)  # type: ignore[arg-type]

    weights, values = eagle(Draw(3))
    weights |= {"lm_head.weight": own.head.weight.detach().half(), "layers.0.self_attn.q_proj.bias": torch.ones(D)}
    weights |= {f"layers.0.self_attn.{part}_proj.bias": torch.ones(GROUPS * EDGE) for part in "kv"}
    heads = read_drafter(put(tmp_path / "biased", weights, {**values, "qkv_bias": True}, "model.safetensors"), own).heads["eagle"]
    assert heads.attention.qkv.bias is not None and heads.attention.out.bias is None

    weights, values = mtp(Draw(4))
    source = put(tmp_path / "whole", {**weights, "model.layers.0.mlp.x.weight": torch.ones(3)}, values, "model.safetensors")
    assert read_drafter(source, own).heads["mtp"].depth == 2


def pickled(held: object, file: Path) -> Path:
    torch.save(held, file)
    return file


def test_a_pickle_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    weights, values = medusa(Draw(0))
    weights["0.1.linear.weight"] = weights["0.0.linear.weight"]  # repeated blocks share their memory
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))
    file = pickled(weights, tmp_path / "theirs" / "medusa_lm_head.pt")
    own = target()
    fetch = companion(Model(own, None))
    for path in (file, file.parent):
        with pytest.raises(ValueError, match=r"^[^\n]*never loaded; convert it: fewstep convert [^\n]*$") as refusal:
            fetch(str(path))
    command = re.search(r"fewstep (convert .*)$", str(refusal.value))
    assert command is not None
    monkeypatch.setattr(sys, "argv", ["fewstep", *command[1].split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = Path(capsys.readouterr().out.strip())
    heads: Any = fetch(str(out)).heads["medusa"]
    assert torch.equal(heads.unembeddings[1].weight, weights["1.2.weight"])
    assert torch.equal(heads.deeper[0][0].weight, weights["0.0.linear.weight"])


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    for held, message in (
        ({"0.0.linear.weight": torch.ones(2, 2), "x": Trap(tmp_path / "trace")}, "not a file of tensors alone"),
        ({"model": {"a": torch.ones(2)}}, "expected a table of tensors by name"),
        ([torch.ones(2)], "expected a table of tensors by name"),
    ):
        file = pickled(held, tmp_path / "heads.pt")
        with pytest.raises(ValueError, match=message) as refusal:
            convert(str(file), "safetensors", tmp_path / "out")
        assert "\n" not in str(refusal.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        convert(str(file), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "trace").exists()


def test_heads_are_converted_from_layout_to_layout(tmp_path: Path) -> None:
    own = grown(KINDS["eagle3"])
    Model(own, None, {"name": "toy"}).save(tmp_path / "model")
    model = str(tmp_path / "model")
    convert(model, "eagle3", tmp_path / "a")
    convert(str(tmp_path / "a"), "speculators", tmp_path / "b", target=model)
    convert(str(tmp_path / "b"), "fewstep", tmp_path / "c", target=model)
    convert(str(tmp_path / "c"), "eagle3", tmp_path / "d")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in "ad")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    for arguments, message in (
        ((str(tmp_path / "a"), "eagle3", tmp_path / "x"), "target: [^\n]*does not say which model"),
        ((model, "medusa", tmp_path / "x"), "to='medusa': holds medusa heads, there are eagle3"),
        ((model, "eagle4", tmp_path / "x"), "to='eagle4': not known; did you mean"),
        ((model, "safetensors", tmp_path / "x"), "to='safetensors': not what"),
        ((str(tmp_path / "c"), "hf", tmp_path / "x"), "to='hf': for whole models"),
        ((model, "eagle3", tmp_path / "a"), "in use"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            convert(*arguments)
        assert "\n" not in str(refusal.value) and not (tmp_path / "x").exists()
    source, _ = made("eagle3", tmp_path / "theirs")
    with pytest.raises(ValueError, match="takes heads whose block is like the model's last one"):
        convert(str(source), "fewstep", tmp_path / "x", target=model)


def test_heads_keep_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    own = grown(KINDS["eagle"])
    Model(trunk(own), None, {"name": "toy"}).save(tmp_path / "model", "bfloat16")
    save_drafter(own, "eagle", tmp_path / "heads", own, name="toy")
    convert(str(tmp_path / "heads"), "eagle", tmp_path / "again", target=str(tmp_path / "model"))
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("heads", "again"))
    assert all(torch.equal(first[key], last[key]) for key in first if key != "embed_tokens.weight")


@pytest.mark.claims
def test_transformers_accepts_our_prediction_modules(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    own = grown({"kind": "mtp_sequential", "depth": 1})
    tokens = torch.tensor([[3, 1, 20, 7, 7, 11, 2, 19]])
    for layout in ("mtp", "mtp-qwen"):
        folder = tmp_path / layout
        bare = trunk(own)
        save_hf(Model(bare, None), folder)
        save_drafter(own, layout, tmp_path / f"{layout}-heads", own, name="toy")
        heads = load_file(tmp_path / f"{layout}-heads" / "model.safetensors")
        save_file(load_file(folder / "model.safetensors") | heads, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "num_mtp_layers": 1}))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{DEPTH}\.", r"^mtp\."]
        peer = MtpModel.from_pretrained(model)
        with torch.no_grad():
            hidden = bare(tokens, taps=("final",)).final
            (ours,) = own.heads["mtp"](hidden, tokens, own.embed, Context(torch.arange(8)[None]))
            positions = torch.arange(7)[None]
            cache = MtpCache(config=model.config.get_mtp_config())
            theirs = peer.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=tokens[:, 1:])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.claims
def test_what_speculators_leaves_out_is_what_transformers_takes_for_granted() -> None:
    transformers = pytest.importorskip("transformers")
    for kind, values in GRANTED.items():
        granted = transformers.AutoConfig.for_model(kind).to_dict()
        assert {key: granted[key] for key in values} == dict(values), kind
