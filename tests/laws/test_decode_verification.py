"""Ways to judge drafts, through the whole loop: blocks keep the target's law, and typical acceptance says that it does not."""

import pytest
import torch
from exactness import cells, chi_square, draws, joint_law
from toys import TableModel

from fewstep.core.draft import Verify
from fewstep.core.recipe import parse
from fewstep.decode.drafters.config import DrafterConfig
from fewstep.decode.drafters.draft_model import DraftModelConfig
from fewstep.decode.drafters.early_exit import EarlyExitConfig
from fewstep.decode.drafters.ngram import NgramConfig
from fewstep.decode.drafters.silent import SilentConfig
from fewstep.decode.generate import decode
from fewstep.decode.laws import SamplingConfig
from fewstep.decode.stream import Settings
from fewstep.decode.text import GenerationConfig
from fewstep.decode.typical import verify_typical
from fewstep.decode.verification import VERIFICATIONS, VerificationConfig
from fewstep.decode.verify import verify

VOCAB, LENGTH, FALSE_ALARM = 5, 4, 1e-6
PROMPT = (1, 2, 3, 1, 2, 4, 1, 2)
CHAINS: dict[str, DrafterConfig] = {
    "drawn": DraftModelConfig(path="toy", branching=(1, 1, 1)),
    "chosen": DraftModelConfig(path="toy", branching=(1, 1, 1), mode="chosen"),
    "stopped": EarlyExitConfig(branching=(1, 1, 1), confidence=0.4),
    "ngram": NgramConfig(min_ngram=1, depth=3),
}
LAWS = {
    "warm": SamplingConfig(temperature=1.0),
    "everything": SamplingConfig(temperature=0.9, top_k=4, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
}


def models(seed: int) -> tuple[TableModel, TableModel]:
    target = TableModel(VOCAB, seed)
    return target, TableModel(VOCAB, seed + 1, like=target, near=0.5)


def p_value(verdicts: Verify, chain: str, law: str, seed: int, count: int = 20_000) -> float:
    target, draft = models(seed)
    drafter = CHAINS[chain].build(target, lambda path: draft)
    tokens = draws(target, drafter, PROMPT, LAWS[law], range(seed, seed + count), LENGTH, budget=4, verify=verdicts)
    return chi_square(cells(tokens, VOCAB), joint_law(target.after, PROMPT, VOCAB, LENGTH, LAWS[law]))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("chain", CHAINS)
def test_blocks_have_the_law_of_the_target(chain: str, law: str, seed: int) -> None:
    assert p_value(VERIFICATIONS["block"]().build(), chain, law, seed) > FALSE_ALARM


def test_typical_acceptance_would_be_seen(seed: int) -> None:
    assert p_value(VERIFICATIONS["typical"]().build(), "drawn", "warm", seed) < FALSE_ALARM


def test_blocks_keep_no_fewer(seed: int) -> None:
    target, draft = models(seed)
    drafter = CHAINS["drawn"].build(target, lambda path: draft)
    kept = []
    for verdicts in (verify, VERIFICATIONS["block"]().exact()):
        settings = Settings(60, budget=4, verify=verdicts)
        rows = decode(target, drafter, [PROMPT], settings, sampling=LAWS["warm"], seed=seed, samples=400)
        kept.append(torch.tensor([sum(row.accepted) / len(row.accepted) for row in rows]).double())
    few, more = kept
    error = float((few.var() / len(few) + more.var() / len(more)).sqrt())
    assert float(more.mean() - few.mean()) > -4.5 * error  # a one-sided false alarm of 3e-6


@pytest.mark.parametrize("kind", VERIFICATIONS)
def test_greedy_output_is_plain_decoding(kind: str, seed: int) -> None:
    target, draft = models(seed)
    plain = decode(target, SilentConfig().build(target, lambda path: draft), [PROMPT], Settings(20))[0]
    for config in CHAINS.values():
        drafter = config.build(target, lambda path: draft)
        settings = Settings(20, budget=4, verify=VERIFICATIONS[kind]().build())
        assert decode(target, drafter, [PROMPT], settings)[0].tokens == plain.tokens


def test_a_tree_is_refused_by_the_block(seed: int) -> None:
    target, draft = models(seed)
    drafter = DraftModelConfig(path="toy", branching=(2, 1)).build(target, lambda path: draft)
    with pytest.raises(ValueError, match=r"^tree\.parent: branches; [^\n]*verification='token'[^\n]*$"):
        decode(target, drafter, [PROMPT], Settings(9, verify=VERIFICATIONS["block"]().build()), sampling=LAWS["warm"])


def test_what_is_lossy_is_refused_where_exactness_is_asked() -> None:
    assert verify in {kind().exact() for kind in VERIFICATIONS.values() if kind.lossless}
    lossy = [kind() for kind in VERIFICATIONS.values() if not kind.lossless]
    assert lossy and all("lossy" in config.label for config in lossy)
    for config in lossy:
        with pytest.raises(ValueError, match=r"^verification='typical': lossy[^\n]*; [^\n]*$"):
            config.exact()


def test_options_reach_the_function() -> None:
    config = parse(GenerationConfig, {"verification": {"kind": "typical", "epsilon": 0.5}})
    built = config.judged.build()
    assert (built.func, built.keywords) == (verify_typical, {"epsilon": 0.5, "delta": 0.3})  # type: ignore[attr-defined]
    assert isinstance(parse(GenerationConfig, {}).judged, VerificationConfig) and parse(GenerationConfig, {}).judged.lossless
    for bad, needle in (({"kind": "typical", "epsilon": 0}, "epsilon=0"), ("tokn", "did you mean 'token'")):
        with pytest.raises(ValueError, match=rf"^verification[^\n]*{needle}[^\n]*$"):
            parse(GenerationConfig, {"verification": bad})
