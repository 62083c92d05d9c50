"""Chat templates and tokenizers agree with `transformers`: recorded by `record_text.py`, and live in the claims."""

import json
from pathlib import Path

import pytest

from fewstep.text.chat import ChatTemplate
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import BPEConfig

RECORDED = json.loads(Path(__file__).with_name("text_recorded.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["template"])
def test_chats_render_as_recorded(case: dict) -> None:
    template = ChatTemplate(RECORDED["templates"], RECORDED["tokens"])
    given = {key: case[key] for key in ("tools", "documents", "add_generation_prompt", "values") if key in case}
    if "error" in case:
        with pytest.raises(ValueError, match=case["error"]):
            template.render(case["messages"], name=case["template"], **given)
    else:
        assert template.render(case["messages"], name=case["template"], **given) == case["text"]


@pytest.mark.claims
def test_a_saved_tokenizer_is_read_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["def f(x):\n    return x + 12\n" * 9, "naïve ☃ 𝄞  \t\r\n e\u0301", "a<|endoftext|>b", ""]
    ours = BPEConfig(vocab=300).build(texts)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos and len(theirs) == ours.vocab
    for text in texts:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode_batch(texts) == ours.encode_batch(texts)
