"""Prepared data: lossless tokenizer, shards that cannot be mistaken, and batches that are a function of seed and step alone."""

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.recipes.run import data_directory
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import BPEConfig, Dataset, Loader, StdlibConfig, TextConfig, prepare
from fewstep.training.data.loader import validation_batches
from fewstep.training.data.shards import PartEntry, Shard, ShardWriter, open_part, token_dtype

CODE = "def name{0}(self, value{1}):\n    if value{1} > {2}:\n        return self.name{0}\n    return '<|endoftext|>'\n\n\n"


def write_corpus(folder: Path, seed: int, files: int = 24) -> TextConfig:
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(files):
        text = "".join(CODE.format(*(rng.randrange(999) for _ in range(3))) for _ in range(rng.randrange(1, 12)))
        (folder / f"{number:02d}.txt").write_text(text)
    return TextConfig(paths=(folder,), held_out=0.3)


@pytest.fixture
def prepared(tmp_path: Path, seed: int) -> tuple[TextConfig, Path, Dataset]:
    data = write_corpus(tmp_path / "text", seed)
    return data, tmp_path / "cache", prepare(data, BPEConfig(vocab=320), tmp_path / "cache")


def shards_of(folder: Path, rng: random.Random, limit: int = 200) -> tuple[tuple[Shard, ...], list[list[int]]]:
    """Documents of distinct positive tokens, each ended by 0, over several shards."""
    fresh = iter(range(1, 10_000))
    documents = [[*(next(fresh) for _ in range(rng.randrange(0, 60))), 0] for _ in range(40)]
    writer = ShardWriter(folder, "train", "uint16", limit=limit)
    for document in documents:
        writer.add(document, len(document))
    return open_part(folder, writer.finish(), "uint16"), documents


@pytest.mark.parametrize("vocab", [257, 400])
def test_bpe_returns_any_text_unchanged(vocab: int, seed: int) -> None:
    rng = random.Random(seed)
    tokenizer = BPEConfig(vocab=vocab).build([CODE * 20])
    assert tokenizer.vocab <= vocab and tokenizer.eos is not None
    anything = "".join(chr(rng.choice([rng.randrange(0, 0xD800), rng.randrange(0xE000, 0x110000), 10, 32])) for _ in range(2000))
    for text in (anything, CODE, "", " ", "\r\n\t \n", "<|endoftext|> is a word here", "𝄞e\u0301"):
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert tokenizer.eos not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_documents([text]) == [ids]


def test_bpe_is_deterministic_and_cuts_python_at_its_joints() -> None:
    texts = [CODE.format(a, b, a * b) for a in range(12) for b in range(12)]
    tokenizer = BPEConfig(vocab=400).build(texts)
    assert tokenizer.hash == BPEConfig(vocab=400).build(texts).hash != BPEConfig(vocab=300).build(texts).hash
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("        return self.name12\n    return 7")]
    assert pieces[0] == " " * 8 and "    " in pieces
    assert all(len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))
    line, indent, rest = "    if value0 > 1:\n", "        ", "return self"
    whole = tokenizer.encode(line + indent + rest)
    for cut in (len(line), len(line + indent)):  # a prompt that begins or ends at a line or an indent is cut as in training
        first, second = tokenizer.encode((line + indent + rest)[:cut]), tokenizer.encode((line + indent + rest)[cut:])
        assert first + second == whole


def test_prepare_holds_every_document_once_and_is_opened_again(prepared: tuple[TextConfig, Path, Dataset]) -> None:
    data, cache, dataset = prepared
    corpus, tokenizer = data.build(), dataset.tokenizer
    for part, entry in (("train", dataset.index.train), ("validation", dataset.index.validation)):
        (shard,) = open_part(cache, entry, dataset.index.dtype)
        stored = [tokens.tolist() for tokens in np.split(shard.tokens, shard.ends[:-1])]
        texts = [document.text for document in corpus.documents(part)]
        assert all(document[-1] == tokenizer.eos and tokenizer.eos not in document[:-1] for document in stored)
        assert [tokenizer.decode(document) for document in stored] == texts
        assert entry.bytes == sum(len(text.encode()) for text in texts)
    validation = dataset.index.validation
    assert dataset.bytes_per_token == validation.bytes / sum(sum(shard.documents) for shard in validation.shards)

    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    lines: list[str] = []
    again = prepare(data, BPEConfig(vocab=320), cache, lines.append)
    assert again.hash == dataset.hash == Dataset(cache).hash
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before and not lines


def test_prepare_refuses_a_directory_of_other_text_or_tokenizer(prepared: tuple[TextConfig, Path, Dataset]) -> None:
    data, cache, _ = prepared
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(data, BPEConfig(vocab=321), cache)
    with pytest.raises(ValueError, match="another text"):
        prepare(data.model_copy(update={"held_out": 0.4}), BPEConfig(vocab=320), cache)
    (data.paths[0] / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="another text"):
        prepare(data, BPEConfig(vocab=320), cache)


def test_an_interrupted_preparation_counts_for_nothing(tmp_path: Path, seed: int) -> None:
    data = write_corpus(tmp_path / "text", seed)
    cache = tmp_path / "cache"

    def stop(line: str) -> None:
        if line.startswith("validation"):
            (cache / "train-00009.bin").write_bytes(b"left by a longer corpus")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, BPEConfig(vocab=300), cache, stop)
    with pytest.raises(ValueError, match="prepare the data first"):
        Dataset(cache)
    prepare(data, BPEConfig(vocab=300), cache)
    assert sorted(file.name for file in cache.iterdir()) == ["index.json", "tokenizer", "train-00000.bin", "validation-00000.bin"]


def test_prepare_takes_a_tokenizer_as_it_is(prepared: tuple[TextConfig, Path, Dataset], tmp_path: Path) -> None:
    data, cache, dataset = prepared
    tokenizer = Tokenizer.load(cache / "tokenizer")
    again = prepare(data, tokenizer, tmp_path / "other")
    assert again.index.train == dataset.index.train
    nameless = json.loads((cache / "tokenizer" / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (cache / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match="end-of-text"):
        prepare(data, Tokenizer.load(cache / "tokenizer"), tmp_path / "third")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "swap", "index", "field", "tokenizer", "escape"])
def test_damage_is_refused_in_one_line(prepared: tuple[TextConfig, Path, Dataset], damage: str) -> None:
    _, cache, _ = prepared
    shard, index = cache / "train-00000.bin", cache / "index.json"
    content = shard.read_bytes()
    match damage:
        case "truncate":
            shard.write_bytes(content[:-2])
        case "flip":
            shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "remove":
            shard.unlink()
        case "swap":
            shutil.copy(cache / "validation-00000.bin", shard)
        case "index":
            index.write_bytes(index.read_bytes()[:-20])
        case "field":
            index.write_text(index.read_text().replace('"uint16"', '"float32"'))
        case "tokenizer":
            BPEConfig(vocab=300).build([CODE]).save(cache / "tokenizer")
        case "escape":
            index.write_text(index.read_text().replace('"train-00000.bin"', '"../cache/train-00000.bin"'))
    with pytest.raises(ValueError) as caught:
        Dataset(cache)
    assert "prepare" in str(caught.value) and "\n" not in str(caught.value)


def test_shards_start_anew_at_the_limit_and_widen_with_the_vocabulary(tmp_path: Path, seed: int) -> None:
    assert [token_dtype(vocab) for vocab in (2048, 1 << 16, (1 << 16) + 1)] == ["uint16", "uint16", "uint32"]
    shards, documents = shards_of(tmp_path, random.Random(seed))
    assert len(shards) > 1 and all(len(shard) <= 200 for shard in shards)
    assert [token for shard in shards for token in shard.tokens.tolist()] == [
        token for document in documents for token in document
    ]
    with pytest.raises(OverflowError):
        ShardWriter(tmp_path, "wide", "uint16").add([1 << 16], 1)
    assert ShardWriter(tmp_path, "none", "uint16").finish() == PartEntry(bytes=0, shards=())


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path, seed: int) -> None:
    shards, _ = shards_of(tmp_path, random.Random(seed))
    first, second = (Loader(shards, batch=3, length=16, seed=seed) for _ in range(2))
    steps = list(range(3 * first.steps_per_epoch))
    straight = [first.batch(step) for step in steps]
    random.Random(seed).shuffle(steps)
    for step in steps:  # any order, across epochs: resuming needs the step alone
        again = second.batch(step)
        assert torch.equal(again.tokens, straight[step].tokens) and again.segments is not None
        assert torch.equal(again.segments, straight[step].segments)
    other = Loader(shards, batch=3, length=16, seed=seed + 1)
    assert any(not torch.equal(other.batch(step).tokens, straight[step].tokens) for step in range(first.steps_per_epoch))


def test_windows_are_stretches_of_the_stream_with_its_documents_as_segments(tmp_path: Path, seed: int) -> None:
    shards, documents = shards_of(tmp_path, random.Random(seed))
    owner = {token: number for number, document in enumerate(documents) for token in document if token}
    streams = [shard.tokens.tolist() for shard in shards]
    loader = Loader(shards, batch=3, length=16, seed=seed)
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for step in range(loader.steps_per_epoch):
            batch = loader.batch(epoch * loader.steps_per_epoch + step)
            assert batch.segments is not None and batch.tokens.shape == batch.segments.shape == (3, 16)
            for tokens, segments in zip(batch.tokens.tolist(), batch.segments.tolist(), strict=True):
                assert any(tokens == stream[at : at + 16] for stream in streams for at in range(len(stream)))
                ends = np.cumsum([0, *(token == 0 for token in tokens[:-1])])
                assert segments == ends.tolist(), "a segment ends with its end-of-text"
                assert all(owner[a] == owner[b] for a, b in itertools.pairwise(tokens) if a and b)
                seen.update(token for token in tokens if token)
        assert max(seen.values()) == 1, "a token comes at most once in an epoch"
        left_out = sum(map(len, shards)) - loader.steps_per_epoch * loader.tokens_per_batch
        assert left_out < len(shards) * 2 * 16 + loader.tokens_per_batch


def test_epochs_differ_in_order_and_in_cuts(tmp_path: Path, seed: int) -> None:
    shards, _ = shards_of(tmp_path, random.Random(seed))
    loader = Loader(shards, batch=2, length=16, seed=seed)
    count = loader.steps_per_epoch
    batches = [[loader.batch(epoch * count + step) for step in range(count)] for epoch in range(12)]
    starts = [[row[0] for batch in epoch for row in batch.tokens.tolist()] for epoch in batches]
    assert len({tuple(epoch) for epoch in starts}) == 12
    assert len({tuple(sorted(epoch)) for epoch in starts}) > 2, "with one offset in sixteen all twelve agree once in 1e13"


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (4, 16), (64, 500)])
def test_validation_covers_every_token_exactly_once(tmp_path: Path, seed: int, batch: int, length: int) -> None:
    shards, documents = shards_of(tmp_path, random.Random(seed))
    tokens: list[int] = []
    for found in validation_batches(shards, batch=batch, length=length, eos=0):
        assert found.segments is not None and found.tokens.shape == (batch, length)
        kept = found.segments >= 0
        assert torch.equal(found.tokens[~kept], torch.zeros_like(found.tokens[~kept]))
        tokens += found.tokens[kept].tolist()
    assert tokens == [token for document in documents for token in document]


def test_loader_refuses_what_it_cannot_fill(tmp_path: Path, seed: int) -> None:
    shards, _ = shards_of(tmp_path, random.Random(seed))
    for batch, length, word in ((0, 8, "batch=0"), (8, 0, "length=0"), (8, 4000, "do not fill")):
        with pytest.raises(ValueError, match=word):
            Loader(shards, batch=batch, length=length, seed=seed)
    with pytest.raises(ValueError, match="step=-1"):
        Loader(shards, batch=1, length=8, seed=seed).batch(-1)


def test_text_that_is_cut_otherwise_is_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier version kept under its own way of cutting must not be taken for what this one would make."""
    before = data_directory(StdlibConfig(), BPEConfig())
    assert data_directory(StdlibConfig(), BPEConfig()) == before != data_directory(StdlibConfig(), BPEConfig(vocab=300))
    monkeypatch.setattr("fewstep.training.data.bpe._SPLIT", r"\s+")
    assert data_directory(StdlibConfig(), BPEConfig()) != before
