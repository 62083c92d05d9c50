"""The laws of configs and recipes: what is written reads back equal, and what is wrong is refused by name, on one line."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from fewstep.core.recipe import Config, Recipe, choice, lookup, parse, resolve
from fewstep.recipes import SECTIONS


class Leaf(Config):
    kind: ClassVar[str] = "leaf"

    size: int = Field(default=2, ge=1, le=9)
    rate: float = Field(default=0.5, gt=0)


class Bough(Config):
    kind: ClassVar[str] = "bough"

    leaves: tuple[choice(lambda: PARTS, "leaves"), ...] = (Leaf(),)  # type: ignore[valid-type]
    tip: choice(lambda: PARTS, "tip") = Leaf(size=3)  # type: ignore[valid-type]


class Needy(Config):
    kind: ClassVar[str] = "needy"

    path: str
    mode: Literal["fast", "slow"] = "fast"


PARTS: dict[str, type[Config]] = {"leaf": Leaf, "bough": Bough, "needy": Needy}
REGISTRIES: dict[str, dict[str, type[Config]]] = {"tree": {"bough": Bough, "leaf": Leaf}, "other": {"leaf": Leaf, "needy": Needy}}

TREE = """
name = "oak"
[tree]
kind = "bough"
leaves = ["leaf", {kind = "leaf", size = 4}, {kind = "bough", leaves = [{kind = "leaf", rate = 0.25}]}]
tip = {kind = "bough", tip = {kind = "leaf", size = 7}}
[other]
kind = "needy"
path = "somewhere"
"""


def written(tmp_path: Path, text: str, suffix: str = ".toml") -> Path:
    path = tmp_path / f"recipe{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, overrides: dict[str, object] | None = None) -> Recipe:
    return Recipe.load(path, overrides, registries=REGISTRIES)


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_nested_choices_and_tuples(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, TREE))
    leaf = Leaf(rate=0.25)
    assert recipe.name == "oak"
    assert recipe["tree"] == Bough(leaves=(Leaf(), Leaf(size=4), Bough(leaves=(leaf,))), tip=Bough(tip=Leaf(size=7)))
    assert recipe["other"] == Needy(path="somewhere")


def test_round_trip(tmp_path: Path) -> None:
    """What is dumped is read back equal, with the classes it had, and dumped again the same."""
    recipe = load(written(tmp_path, TREE), {"tree.tip.tip.size": 9})
    again = load(written(tmp_path, recipe.dump(), ".json"))
    assert again == recipe
    assert type(again["tree"].leaves[2].leaves[0]) is Leaf  # type: ignore[attr-defined]
    assert again.dump() == recipe.dump()


@pytest.mark.parametrize(("section", "kind"), [(section, kind) for section in SECTIONS for kind in SECTIONS[section]])
def test_every_registered_config_round_trips_from_its_defaults(section: str, kind: str, tmp_path: Path) -> None:
    config = SECTIONS[section][kind]
    needed = {name: "x" for name, field in config.model_fields.items() if field.is_required()}
    recipe = Recipe.from_values("r", {section: {"kind": kind, **needed}}, registries=SECTIONS)
    assert type(recipe[section]) is config and config.kind == kind
    assert Recipe.load(written(tmp_path, recipe.dump(), ".json"), registries=SECTIONS) == recipe


def test_a_section_left_out_takes_the_first_entry(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, "[other]\nsize = 5"))
    assert recipe.name == "recipe"
    assert recipe["tree"] == Bough()
    assert recipe["other"] == Leaf(size=5)
    assert load(written(tmp_path, 'tree = "leaf"'))["tree"] == Leaf()


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, TREE)
    assert load(path, {"tree.tip.tip.size": 1})["tree"].tip.tip.size == 1  # type: ignore[attr-defined]
    assert load(path, {"tree.leaves": ["leaf", {"kind": "leaf", "size": 5}]})["tree"].leaves == (Leaf(), Leaf(size=5))  # type: ignore[attr-defined]
    assert load(path, {"other.mode": "slow"})["other"] == Needy(path="somewhere", mode="slow")
    assert load(written(tmp_path, 'tree = "leaf"'), {"tree.size": 6})["tree"] == Leaf(size=6)
    assert load(written(tmp_path, ""), {"other.rate": 3})["other"] == Leaf(rate=3.0)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"tree.leavs": []}, ["tree.leavs", "did you mean 'leaves'?"]),
        ({"tere.size": 1}, ["section='tere'", "did you mean 'tree'?"]),
        ({"tree.tip.tip.siz": 1}, ["tree.tip.tip.siz", "did you mean 'size'?"]),
        ({"tree.tip.tip.size": 10}, ["tree.tip.tip.size=10", "less than or equal to 9"]),
        ({"tree.leaves.0.size": 1}, ["tree.leaves.0.size", "'leaves' is not a table", "set the whole of it"]),
        ({"other.mode": "fats"}, ["other.mode='fats'", "'fast' or 'slow'"]),
        ({"other.mode.x": 1}, ["other.mode"]),
        ({"size": 1}, ["'size'", "section.field"]),
    ],
)
def test_bad_overrides(overrides: dict[str, object], parts: list[str], tmp_path: Path) -> None:
    refused(lambda: load(written(tmp_path, TREE), overrides), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[tree]\nsiez = 3\nkind = 'leaf'", ["tree.siez: no such field", "did you mean 'size'?"]),
        ("[tree]\nzzzzz = 3\nkind = 'leaf'", ["tree.zzzzz: no such field", "rate", "size"]),
        ("[tree]\nkind = 'leef'", ["tree.kind='leef'", "did you mean 'leaf'?"]),
        ("tree = 'leef'", ["tree='leef'", "did you mean 'leaf'?"]),
        ("tree = 3", ["tree=3", "bough, leaf"]),
        ("tree = [1]", ["tree=[1]", "bough, leaf"]),
        ("[tree]\nkind = 3", ["tree=", "bough, leaf"]),
        ("[tree]\nkind = 'leaf'\nsize = 0", ["tree.size=0", "greater than or equal to 1"]),
        ("[tree]\nkind = 'leaf'\nsize = 'many'", ["tree.size='many'", "integer"]),
        ("[tree]\nkind = 'leaf'\nsize = 2.5", ["tree.size=2.5", "integer"]),
        ("[tree]\nkind = 'leaf'\nrate = nan", ["tree.rate=nan", "finite"]),
        ("[tree]\nkind = 'leaf'\nrate = inf", ["tree.rate=inf", "finite"]),
        ("[tree]\nkind = 'leaf'\nrate = 0", ["tree.rate=0", "greater than 0"]),
        ("[other]\nkind = 'needy'", ["other.path: missing", "give it a value"]),
        ("[other]\nkind = 'needy'\npath = 'x'\nmode = \"a\\nb\"", ["other.mode='a\\nb'"]),
        ("[[tree.leaves]]\nkind = 'leaf'\nsize = 99", ["tree.leaves.0.size=99", "less than or equal to 9"]),
        ("[[tree.leaves]]\nkind = 'leef'", ["tree.leaves.0.kind='leef'", "did you mean 'leaf'?"]),
        ("[tree]\nleaves = ['leaf', 'lef']", ["tree.leaves.1='lef'", "did you mean 'leaf'?"]),
        ("[tree]\nleaves = 'leaf'", ["tree.leaves='leaf'", "tuple"]),
        ("[tree.tip]\nkind = 'needy'", ["tree.tip.path: missing"]),
        ("[tree.tip]\nsize = 3", ["tree.tip={'size': 3}", "`kind`", "leaf"]),
        ("[branch]\nsize = 3", ["section='branch'", "tree"]),
        ("size = 3", ["section='size'"]),
    ],
)
def test_what_is_wrong_is_named(text: str, parts: list[str], tmp_path: Path) -> None:
    refused(lambda: load(written(tmp_path, text)), *parts)


@pytest.mark.parametrize(
    ("content", "suffix", "parts"),
    [
        (b"[tree\nsize = 3", ".toml", ["not valid toml", "line 1"]),
        (b"def f():\n    return 3\n", ".py", ["not valid py"]),
        (b'{"tree": ', ".json", ["not valid json"]),
        (b"[1, 2]", ".json", ["expected a table", "list"]),
        (b"\xff\xfe\x00\x01", ".toml", ["not valid toml"]),
        (b"\x89PNG\r\n\x1a\n\x00", ".json", ["not valid json"]),
        (b"[" * 100_000, ".json", ["not valid json"]),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, suffix: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(content)
    refused(lambda: load(path), f"recipe={str(path)!r}", *parts)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        refused(lambda path=path: load(path), f"recipe={str(path)!r}", "no such file")  # type: ignore[misc]


def test_configs_are_frozen_keyword_only_and_know_their_kind() -> None:
    leaf = Leaf(size=3)
    with pytest.raises(ValueError, match=r"frozen"):
        leaf.size = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Leaf(3)  # type: ignore[call-arg]
    assert leaf == Leaf(size=3) and hash(leaf) == hash(Leaf(size=3)) and leaf != Leaf()
    assert leaf.model_dump() == {"kind": "leaf", "size": 3, "rate": 0.5}
    assert json.loads(leaf.model_dump_json()) == leaf.model_dump()
    assert parse(Leaf, leaf.model_dump()) == leaf
    refused(lambda: parse(Leaf, {"kind": "bough"}, "tree"), "tree.kind='bough'", "'leaf'")


def test_resolve_and_lookup() -> None:
    leaf = Leaf(size=3)
    assert resolve(leaf, PARTS, "part") is leaf
    assert resolve("leaf", PARTS, "part") == Leaf()
    assert resolve({"kind": "leaf", "size": 3}, PARTS, "part") == leaf
    assert lookup(PARTS, "leaf", "part") is Leaf
    refused(lambda: lookup(PARTS, "needle", "part"), "part='needle'", "did you mean 'needy'?")
    refused(lambda: resolve(None, PARTS, "part"), "part=None", "bough, leaf, needy")
