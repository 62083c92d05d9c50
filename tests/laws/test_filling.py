"""Text with gaps in, text out: what is kept, what streams when, how a recipe is read, and what is refused in one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fewstep import cli
from fewstep.core.mixer import Blocks, Full
from fewstep.core.recipe import parse
from fewstep.decode.filling import FillConfig, Filling, fill, gapped, manner_of
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model
from fewstep.training.data.bpe import BPEConfig

TEXT = "".join(f"def f_{i}(x):\n    return x * {i}\n" for i in range(60))
BLOCK = {"kind": "block", "size": 4}


def model(objective: dict[str, Any] | None = None, **fields: Any) -> Model:
    """Random weights, drawn wide enough that the most likely token changes from place to place."""
    tokenizer = BPEConfig(vocab=300).build([TEXT])
    sizes: dict[str, Any] = {"vocab": 301, "mask_token": 300, "width": 32, "depth": 2, "query_heads": 2, "hidden": 48}
    config = parse(DecoderConfig, {**sizes, "init_std": 0.3, "max_positions": 64, **fields})
    told = {"kind": "masked"} if objective is None else objective
    return Model(config.build(), tokenizer, {"objective": told} if told else {})


def asked(**fields: Any) -> FillConfig:
    return parse(FillConfig, fields)


def kind(order: str, temperature: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"kind": order, "temperature": temperature, **fields}


@pytest.mark.parametrize("objective", [{"kind": "masked"}, BLOCK, {"kind": "score_entropy", "corruption": "absorbing"}])
def test_what_was_given_stays_and_gaps_have_their_length(objective: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    made = model(objective, noisy=objective["kind"] == "score_entropy")
    text = "def f_1(<gap:3>):\n    return <gap>\n"
    row = gapped(made, text, 5)
    assert [token is None for token in row].count(True) == 8
    (result,) = fill(made, [text], asked(order=kind("random"), seed=seed), 5)
    assert [result.tokens[i] for i, token in enumerate(row) if token is not None] == [token for token in row if token is not None]
    assert result.filled == [token is None for token in row] and result.finish == "length" and 300 not in result.tokens
    assert made.tokenizer is not None and result.text == made.tokenizer.decode(result.tokens)
    assert result.cost.tokens == 8 and result.cost.calls >= 8


def test_a_text_without_a_gap_goes_on(seed: int) -> None:
    torch.manual_seed(seed)
    made = model(BLOCK)
    row = gapped(made, "def f", 6)
    assert row[-6:] == [None] * 6 and None not in row[:-6]
    everything = [None] * 9  # nothing is given
    (result,) = _run(made, [everything], asked(seed=seed, ignore_eos=True))
    assert len(result.tokens) == 9 and all(result.filled)


def test_blocks_stream_from_left_to_right(seed: int) -> None:
    torch.manual_seed(seed)
    made = model(BLOCK)
    row = [*gapped(made, "def f_1(x):", 1)[:3], None, None, None, *gapped(made, "return", 1)[:1], *[None] * 6]
    filling = Filling(made, [row], asked(seed=seed, ignore_eos=True, order=kind("random")))
    seen, texts = list[int](), list[str]()
    for patch in filling:
        seen.append(filling.cost.calls)
        texts.append(patch.text)
        assert patch.filled == (row[len(seen) - 1] is None)
    (result,) = filling.results()
    assert len(seen) == len(row) and "".join(texts) == result.text, "pieces join to the whole"
    assert seen == sorted(seen) and len(set(seen)) == 4, "as many moments as blocks"
    whole = Filling(made, [row], asked(seed=seed, ignore_eos=True, attends="all"))
    assert len({whole.cost.calls for patch in whole if patch.filled}) == 1, "all at once is certain at the end"


def test_a_row_is_the_same_alone_and_in_a_batch_and_with_a_cache(seed: int) -> None:
    torch.manual_seed(seed)
    made = model(BLOCK).network.double()
    both = Model(made, model().tokenizer, {"objective": BLOCK})
    rows = [gapped(both, text, 7) for text in ("def f_1(<gap:2>):", "x", "return x * <gap:11> * 4")]
    config = asked(order=kind("threshold", threshold=0.2), seed=seed, ignore_eos=True)
    together = _run(both, rows, config)
    uncached = _run(both, rows, config.model_copy(update={"cached": False}))
    assert [each.tokens for each in together] == [each.tokens for each in uncached]
    for i, row in enumerate(rows):
        assert _run(both, [row], config)[0].tokens == together[i].tokens
    several = _run(both, [rows[2]] * 3, config.model_copy(update={"seed": (seed, seed + 1, seed)}))
    assert several[0].tokens == several[2].tokens == together[2].tokens != several[1].tokens
    with pytest.raises(ValueError, match="seed: 2 values for 1 rows; give one, or one per row"):
        Filling(both, rows[:1], config.model_copy(update={"seed": (1, 2)}))


def test_an_approximate_cache_says_how_far_off_it_is(seed: int) -> None:
    torch.manual_seed(seed)
    made = model()
    row = gapped(made, "def f_1(x):\n    return<gap:9>x * <gap:5>", 1)
    for cached in ("prefix", "dual"):
        config = asked(order=kind("confidence"), seed=seed, block=4, cached=cached, compare=True)
        filling = Filling(made, [row], config)
        assert filling.deviation is not None
        for _ in filling.steps():
            pass
        assert 0 < filling.deviation < 1
        assert _run(made, [row], config.model_copy(update={"compare": False}))[0].tokens == filling.results()[0].tokens
    assert Filling(made, [row], asked(compare=True)).deviation is None, "nothing is approximate"


def test_an_end_ends_a_row_and_costs_no_more(seed: int) -> None:
    """A network that says end-of-text and nothing else."""
    torch.manual_seed(seed)
    made = model(BLOCK)
    (eos,) = made.eos_ids
    with torch.no_grad():
        made.network.head.weight.zero_()
        made.network.head.weight[eos] = 1.0
        made.network.norm.weight.zero_()
        made.network.norm.weight[0] = 1.0
        made.network.embedding.weight[:, 0] = 40.0
    row = [1, 2, 3, None, 5, *[None] * 15]
    greedy = kind("confidence", 0.0)
    (result,) = _run(made, [row], asked(order=greedy))
    assert result.tokens == [1, 2, 3, eos, 5, eos] and result.finish == "eos", "an end inside of given text is no end"
    (on,) = _run(made, [row], asked(ignore_eos=True, order=greedy))
    assert len(on.tokens) == len(row) and on.finish == "length" and on.cost.calls > result.cost.calls


def test_how_a_recipe_is_read() -> None:
    made = model(BLOCK)
    assert manner_of(made).mask == Blocks(4) and manner_of(made, "all").mask == Full() and manner_of(made, 8).mask == Blocks(8)
    assert not manner_of(made).scored and int(manner_of(made).corruption.prior.argmax()) == 300
    uniform = manner_of(model({"kind": "score_entropy", "corruption": {"kind": "uniform", "noise": "geometric"}}))
    assert uniform.scored and float(uniform.corruption.prior[300]) == 0
    assert manner_of(model({})).mask == Full(), "a mask token is enough"


def test_bad_input_is_refused_in_one_line() -> None:
    made = model(BLOCK)
    nan = model()
    with torch.no_grad():
        nan.network.head.weight[:3] = torch.nan
    cases: list[tuple[Model, Any, dict[str, Any], str]] = [
        (made, [1, 300, None], {}, "rows[0]: holds the mask token 300"),
        (made, [1, *[None] * 80], {}, "rows[0]: 81 positions exceed the context of 64; shorten the text or the gaps"),
        (made, [1, None], {"block": 6}, "block=6: the model attends in blocks of 4; choose a multiple of it"),
        (made, [1, 999, None], {}, "rows[0]: token 999 is outside 0..300"),
        (made, [], {}, "rows[0]=[]: empty"),
        (made, [1, None], {"attends": 0}, "attends=0: below 1"),
        (nan, [1, None], {}, "logits: not a number at row 0, position 0"),
        (model(mixers=["mamba2"]), [1, None], {}, "mask=Full"),
        (model({"kind": "next_token"}, mask_token=None), [1, None], {}, "objective.kind='next_token', which fills no gaps"),
        (model({}, mask_token=None), [1, None], {}, "no mask token, which fills no gaps"),
        (model({"kind": "d3pm", "corruption": "uniform"}), [1, None], {}, "order='confidence': reveals masks"),
    ]
    for broken, row, fields, told in cases:
        with pytest.raises(ValueError, match=re.escape(told)) as caught:
            _run(broken, [row], asked(**fields))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="gap=0: below 1"):
        gapped(made, "a<gap:0>b", 4)
    with pytest.raises(ValueError, match="text: the model has no tokenizer"):
        gapped(Model(made.network, None, {}), "a", 4)


def test_the_command(tmp_path: Any, seed: int) -> None:
    torch.manual_seed(seed)
    made = model(BLOCK)
    made.save(tmp_path / "model")
    run = CliRunner()
    given = ["fill", str(tmp_path / "model"), "def f_1(<gap:4>):", "--temperature", "1", "--seed", str(seed), "--stats"]
    result = run.invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    (wanted,) = fill(made, ["def f_1(<gap:4>):"], asked(order=kind("confidence"), seed=seed))
    assert result.stdout == wanted.text + "\n"
    assert f"4 tokens in {wanted.cost.calls} calls" in result.stderr and "ended by length" in result.stderr
    several = run.invoke(cli.app, ["fill", str(tmp_path / "model"), "a", "b", "--length", "3", "--set", "order.top_p=0.5"])
    assert several.exit_code == 0 and several.stdout.startswith("[0] a") and "\n[1] b" in several.stdout
    wrong = run.invoke(cli.app, ["fill", str(tmp_path / "model"), "a", "--order", "confidense"])
    assert wrong.exit_code != 0 and "did you mean 'confidence'?" in str(wrong.exception)


def _run(made: Model, rows: list[Any], config: FillConfig) -> list[Any]:
    filling = Filling(made, rows, config)
    for _ in filling.steps():
        pass
    return filling.results()
