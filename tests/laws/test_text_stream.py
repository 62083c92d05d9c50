"""Tokenizers, streaming and stop strings: nothing lost, nothing broken, nothing emitted too early."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fewstep.text.stop import StopScanner
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import BPEConfig


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return BPEConfig(vocab=300).build(["the cat sat on the mat\n" * 20])


def sentencepiece_like() -> Tokenizer:
    """A Llama-style tokenizer: word marks whose first is dropped when decoding, and bytes for what it does not know."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, "▁", "a", "b", "▁a", "▁b"])}
    core = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core, bos="<s>", eos="</s>")


TEXT = "the cat ☃☃ naïve 𝄞 e\u0301 \ufffd\n  mat 👩‍👩‍👧"


@pytest.mark.parametrize("like", ["bytes", "sentencepiece"])
def test_streamed_pieces_join_to_the_text_and_never_break_a_character(like: str, tokenizer: Tokenizer) -> None:
    chosen, text = (tokenizer, TEXT) if like == "bytes" else (sentencepiece_like(), "a b☃a 𝄞")
    ids = chosen.encode(text)
    stream, pieces = chosen.stream(), []
    for position, token in enumerate(ids):
        pieces.append(stream.push(token))
        assert text.startswith("".join(pieces)), position
    assert len([piece for piece in pieces if piece]) > 4, "text arrives as it is decided, not at the end"
    assert "".join(pieces) + stream.flush() == chosen.decode(ids) == text


def test_streaming_any_ids_equals_decoding_them(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab) for _ in range(60)]  # mostly malformed UTF-8
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in ids) + stream.flush()
        assert text == tokenizer.decode(ids)
        assert stream.push(tokenizer.encode("a")[0]) == "a", "a flushed stream starts anew"


def test_an_incomplete_character_waits_and_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("☃")
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"


def test_saved_tokenizers_come_back_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, original in enumerate((tokenizer, sentencepiece_like())):
        original.save(tmp_path / str(number))
        for path in (tmp_path / str(number), tmp_path / str(number) / "tokenizer.json"):
            again = Tokenizer.load(path)
            assert (again.hash, again.vocab, again.bos, again.eos) == (original.hash, original.vocab, original.bos, original.eos)
            assert again.encode("a b a") == original.encode("a b a")
    assert tokenizer.hash != sentencepiece_like().hash


def test_special_tokens_count_only_where_they_are_wanted(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert tokenizer.eos in tokenizer.encode(text)
    assert tokenizer.encode_batch([text, "a"]) == [tokenizer.encode(text), tokenizer.encode("a")]
    assert tokenizer.decode(tokenizer.encode(text)) == "ab"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.eos not in tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.token_id("<|endoftext|>") == tokenizer.eos and tokenizer.token_id("<none>") is None


def test_a_published_length_limit_does_not_lose_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=16)
    core.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "tokenizer.eos='<none>'"),
        ("tokenizer.json", None, "no such file"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | None, word: str
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(tmp_path)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_special_tokens_may_be_named_in_the_older_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}}))
    assert Tokenizer.load(tmp_path).eos == tokenizer.eos


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read characters until some stop string ends; cut before the longest of those that end there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_strings_cut_as_defined_however_the_text_arrives(seed: int) -> None:
    rng = random.Random(seed)
    stopped = 0
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(0, 4))]
        text = "".join(rng.choices("abc", weights=[4, 4, 2], k=rng.randrange(0, 20)))
        expected, found = reference(text, stops)
        scanner, emitted, rest = StopScanner(stops), "", text
        while rest:
            size = rng.randrange(1, 5)
            emitted += scanner.push(rest[:size])
            rest = rest[size:]
            assert expected.startswith(emitted), "nothing that may belong to a stop string goes out"
        assert (emitted + scanner.flush(), scanner.found) == (expected, found)
        stopped += found is not None
    assert stopped > 200


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    scanner = StopScanner(["\n\ndef", "###"])
    assert [scanner.push(piece) for piece in ("a", "\n", "b\n\n", "de", "x", "#", "##", "y")] == [
        "a",
        "",
        "\nb",
        "",
        "\n\ndex",
        "",
        "",
        "",
    ]
    assert scanner.found == "###" and scanner.flush() == ""
    with pytest.raises(ValueError, match="stop=''"):
        StopScanner(["a", ""])
