"""The default corpus: the source of the running interpreter's own standard library, which every Python carries.

This file knows which of its files are code that people wrote. It knows no tokenizer.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, final

from fewstep.training.data.grouping import Document
from fewstep.training.data.sources import DataConfig

_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_GENERATED = frozenset({"encodings", "pydoc_data"})  # tables: primed xz needs 0.12 bits per byte of `encodings`
_MALFORMED = ("bad", "_sysconfigdata")  # test data with wrong syntax or coding, and build settings
_MALFORMED_FOLDERS = ("lib2to3/tests/data", "test/tokenizedata", "test/encoded_modules")


@final
class StdlibConfig(DataConfig):
    """The `.py` files of the standard library, tests included, without installed packages, generated tables and malformed data.

    `packages` keeps only those top-level modules and packages (e.g. "json", "argparse"); () keeps all. A file's name is its
    path relative to the library, so that the same version of Python gives the same split everywhere.
    Raises ValueError for a name that the library does not have.
    """

    kind: ClassVar[str] = "stdlib"

    packages: tuple[str, ...] = ()

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        tops = {path.name.removesuffix(".py"): path for path in sorted(root.iterdir()) if _written(path.relative_to(root))}
        for package in self.packages:
            if package not in tops:
                raise ValueError(f"data.packages={package!r}: not in the library at {str(root)!r}; name a module such as 'json'")
        for top in tops.values() if not self.packages else [tops[package] for package in sorted(set(self.packages))]:
            for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
                name = path.relative_to(root)
                if path.suffix == ".py" and _written(name) and (text := _text(path)).strip():
                    yield Document(name.as_posix(), text)


def _written(name: Path) -> bool:
    """Whether people wrote the file or folder `name` (relative to the library) as code."""
    return not (
        _FOLDERS.intersection(name.parts)
        or name.parts[0] in _GENERATED
        or name.parts[0].startswith("config-")
        or name.name.startswith(_MALFORMED)
        or name.as_posix().startswith(_MALFORMED_FOLDERS)
    )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:  # the few files that test other source codings
        return ""
