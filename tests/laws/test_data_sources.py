"""Sources of documents: what is read, what is refused, and that near-duplicates never straddle the split."""

import json
import random
from pathlib import Path

import pytest

from fewstep.training.data import DATA, TOKENIZERS, Corpus, StdlibConfig, TextConfig
from fewstep.training.data.grouping import Document, hold_out, near_duplicates, xz_bits_per_byte
from fewstep.training.data.sources import PARTS


def prose(rng: random.Random, lines: int = 30) -> str:
    return "".join(" ".join(f"word{rng.randrange(10_000)}" for _ in range(6)) + "\n" for _ in range(lines))


def corpus(texts: dict[str, str], held_out: float = 0.3) -> Corpus:
    return Corpus(lambda: (Document(name, text) for name, text in texts.items()), held_out)


def test_registries_build_with_their_defaults() -> None:
    assert all(config.kind == name for registry in (DATA, TOKENIZERS) for name, config in registry.items())
    assert isinstance(DATA["stdlib"]().build(), Corpus)
    with pytest.raises(TypeError):
        DATA["other"] = TextConfig  # type: ignore[index]


def test_every_source_yields_its_documents_unchanged(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    texts = ["one\r\ntwo\n", "naïve ☃ 𝄞", "\ufeff# mark"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ["", *texts]))
    parquet.write_table(arrow.table({"body": [None, *texts]}), tmp_path / "d.parquet")
    for path in (tmp_path, tmp_path / "d.jsonl", tmp_path / "d.parquet"):
        config = TextConfig(paths=(path,), field="body", column="body")
        found = list(config.documents())
        assert [document.text for document in found] == texts
        assert len({document.name for document in found}) == len(texts)
        assert all(str(tmp_path.parent) not in document.name for document in found), "names do not say where the corpus lies"


def test_a_file_named_twice_counts_once_and_another_of_its_name_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    a, b = tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"
    assert [document.text for document in TextConfig(paths=(a, tmp_path / "b" / ".." / "a" / "x.txt")).documents()] == ["a"]
    assert [document.name for document in TextConfig(paths=(a.parent, b.parent)).documents()] == ["a/x.txt", "b/x.txt"]
    with pytest.raises(ValueError, match=r"a second file named 'x\.txt'"):
        list(TextConfig(paths=(a, b)).documents())


@pytest.mark.parametrize(
    ("content", "name", "fields", "words"),
    [
        (b"\xff\xfe", "a.txt", {}, ("a.txt", "UTF-8")),
        (b'{"text": "a"}\n{oops\n', "a.jsonl", {}, ("a.jsonl:2", "JSON")),
        (b'{"txt": "a"}\n', "a.jsonl", {}, ("data.field='text'", "txt")),
        (b'{"text": "\\ud800"}\n', "a.jsonl", {}, ("a.jsonl:1", "surrogate")),
        (b"[1]\n", "a.jsonl", {}, ("data.field='text'", "list")),
        (b"no parquet", "a.parquet", {}, ("a.parquet", "Parquet")),
        (b"x", "a.txt", {"paths": ("missing.txt",)}, ("missing.txt", "no such file")),
        (b"x", "a.txt", {"paths": ()}, ("data.paths=()",)),
        (b"x", "a.txt", {"pattern": "*.py"}, ("data.pattern='*.py'",)),
        (b"  \n", "a.txt", {}, ("no text",)),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, content: bytes, name: str, fields: dict, words: tuple) -> None:
    (tmp_path / name).write_bytes(content)
    paths = (tmp_path,) if name.endswith("txt") else (tmp_path / name,)
    with pytest.raises(ValueError) as caught:
        _ = TextConfig(**{"paths": paths, **fields}).build().held_out
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_parquet_column_is_named(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"body": ["a"], "count": [3]}), tmp_path / "d.parquet")
    for column, word in (("text", "body"), ("count", "int")):
        with pytest.raises(ValueError, match=word):
            list(TextConfig(paths=(tmp_path / "d.parquet",), column=column).documents())


def test_near_duplicates_share_a_side_and_others_do_not_group(seed: int) -> None:
    rng = random.Random(seed)
    texts = {f"{number:03d}": prose(rng) for number in range(40)}
    for number in range(0, 40, 4):  # half of the lines copied, as in a vendored and edited file; then a copy of the copy
        half = "".join(texts[f"{number:03d}"].splitlines(keepends=True)[:15])
        texts[f"{number:03d}-copy"] = prose(rng, 10) + half
        texts[f"{number:03d}-copy-copy"] = prose(rng, 10) + half[-400:]
    groups = near_duplicates(Document(name, text) for name, text in texts.items())
    assert groups == {name: name.split("-")[0] for name in texts}
    held = corpus(texts).held_out
    assert held and all((name in held) == (groups[name] in held) for name in texts)


def test_boilerplate_links_nothing(seed: int) -> None:
    rng = random.Random(seed)
    licence = prose(rng, 12)
    texts = {f"{number:03d}": licence + prose(rng) for number in range(40)}
    assert len(set(near_duplicates(Document(name, text) for name, text in texts.items()).values())) == 40


def test_the_split_is_stable_and_both_parts_exist(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"{rng.random():.12f}" for _ in range(4000)]
    held = hold_out({name: name for name in names}, 0.1)
    assert abs(len(held) - 400) < 6 * 19, "six standard deviations of a binomial with 4000 draws"
    assert hold_out({name: name for name in names[:1000]}, 0.1) == held & set(names[:1000]), "a document's side is its own"
    for fraction in (1e-9, 1 - 1e-9):
        assert len(hold_out({"a": "a", "b": "b"}, fraction)) == 1
    with pytest.raises(ValueError, match="none can be held out"):
        hold_out({"a": "a", "b": "a"}, 0.5)


def test_one_document_holds_out_its_tail(seed: int) -> None:
    text = prose(random.Random(seed), 100)
    parts = [[document.text for document in corpus({"only": text}, 0.2).documents(part)] for part in PARTS]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0][0] + parts[1][0] == text
    assert parts[0][0].endswith("\n") and 0.18 < len(parts[1][0]) / len(text) < 0.24


def test_corpus_hash_sees_names_texts_and_the_share(seed: int) -> None:
    text = prose(random.Random(seed))
    same = corpus({"a": text, "b": "x"})
    assert same.hash == corpus({"a": text, "b": "x"}).hash
    others = [corpus({"a": text, "c": "x"}), corpus({"a": text + "x", "b": "x"}), corpus({"a": text, "b": "x"}, 0.31)]
    assert len({same.hash, *(other.hash for other in others)}) == 4


def test_xz_measures_a_leak(seed: int) -> None:
    rng = random.Random(seed)
    text, other = prose(rng).encode(), prose(rng).encode()
    alone, leaked, clean = (xz_bits_per_byte(text, primer, preset=1) for primer in (b"", other + text, other))
    assert leaked < 0.2 * clean < clean < alone


def test_stdlib_takes_code_and_leaves_tables() -> None:
    config = StdlibConfig(packages=("json", "argparse"))
    names = {document.name for document in config.documents()}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert all(name == "argparse.py" or name.startswith("json/") for name in names)
    built = config.build()
    hashes = [built.hashes(part) for part in PARTS]
    assert not hashes[0].keys() & hashes[1].keys() and hashes[0].keys() | hashes[1].keys() == names
    assert all(len(digest) == 64 for digest in hashes[0].values())
    for package in ("encodings", "site-packages", "jsn"):
        with pytest.raises(ValueError, match=package):
            list(StdlibConfig(packages=(package,)).documents())
