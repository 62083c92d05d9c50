"""Which documents are held out: whole groups of near-duplicates, chosen by a hash, so that validation measures generalisation.

This file knows no file system and no tokenizer.
"""

import hashlib
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import final

SHINGLE = 3
"""Consecutive lines (or sentences) in a shingle."""
SHARED = 3
"""Shingles that two documents must share to be near-duplicates..."""
OVERLAP = 0.05
"""...and the share of the smaller document's shingles that they must be."""
OWNERS = 16
"""A shingle in more documents than this is boilerplate (licences, test runners), which links nothing."""

_UNIT = re.compile(r"\n|(?<=[.!?])\s")


@final
@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name that identifies it in its corpus (a relative path, or a path and a record number)."""

    name: str
    text: str


def shingles(text: str) -> frozenset[int]:
    """64-bit hashes of every run of `SHINGLE` consecutive lines or sentences, blank and one-symbol ones left out."""
    units = [unit for unit in (part.strip() for part in _UNIT.split(text)) if len(unit) > 2]
    runs = ("\n".join(units[start : start + SHINGLE]) for start in range(max(1, len(units) - SHINGLE + 1)))
    return frozenset(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs)


def near_duplicates(documents: Iterable[Document]) -> dict[str, str]:
    """Each document's name mapped to its group: the smallest name among the documents it is linked to, however indirectly.

    Two documents are linked when they share at least `SHARED` shingles (all, if one has fewer) and at least the share
    `OVERLAP` of the smaller document's.
    Cost: about 100 bytes of memory per line of the corpus.
    """
    found = {document.name: shingles(document.text) for document in documents}
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name in sorted(found):
        for shingle in found[name]:
            owners[shingle].append(name)
    shared = Counter(pair for names in owners.values() if 1 < len(names) <= OWNERS for pair in combinations(names, 2))
    parent = {name: name for name in found}
    for (a, b), count in shared.items():
        smaller = min(len(found[a]), len(found[b]))
        if count >= max(min(SHARED, smaller), OVERLAP * smaller):
            first, second = sorted((_root(parent, a), _root(parent, b)))
            parent[second] = first
    return {name: _root(parent, name) for name in found}


def _root(parent: dict[str, str], name: str) -> str:
    while parent[name] != name:
        parent[name] = parent[parent[name]]
        name = parent[name]
    return name


def hold_out(groups: Mapping[str, str], fraction: float) -> frozenset[str]:
    """The names of the held-out documents: those whose group's hash falls below `fraction` (0..1) of the hash's range.

    A group's side depends on its own name alone, except that at least one group is held out and one is not.
    Raises ValueError if there are fewer than two groups.
    """
    ranked = sorted(set(groups.values()), key=_place)
    if len(ranked) < 2:
        raise ValueError(f"data: {len(groups)} documents, none unlike the others, so none can be held out; add different ones")
    below = sum(_place(group) < fraction for group in ranked)
    chosen = frozenset(ranked[: min(max(below, 1), len(ranked) - 1)])
    return frozenset(name for name, group in groups.items() if group in chosen)


def _place(name: str) -> float:
    return float(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64)


def xz_bits_per_byte(text: bytes, primer: bytes = b"", *, preset: int = 9) -> float:
    """Bits that xz spends on each byte of `text` after having seen `primer`: the gap to `primer=b""` measures the leak.

    The window holds both. Cost: compresses the primer twice, about a second per megabyte at preset 9.
    """
    if not text:
        raise ValueError("text='': nothing to compress; give at least one byte")
    window = max(1 << 20, len(primer) + len(text))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]
    before, after = (len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters)) for data in (primer, primer + text))
    return 8 * (after - before) / len(text)
