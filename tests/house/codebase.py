"""The source of the package, its tests and its benchmarks, parsed once for the rules of the house."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file: its path relative to the repository, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, path: str, text: str) -> "Module":
        return cls(path, text, ast.parse(text, path))

    @property
    def name(self) -> str:
        """The dotted name it is imported by; a package is named without `__init__`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


@cache
def modules(folder: str) -> tuple[Module, ...]:
    """Every Python file of a folder of the repository."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return tuple(Module.of(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files)


def everything() -> tuple[Module, ...]:
    return modules("fewstep") + modules("tests") + modules("benchmarks")


def parents(tree: ast.AST) -> Mapping[ast.AST, ast.AST]:
    """Each node's parent."""
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def enclosing(node: ast.AST, above: Mapping[ast.AST, ast.AST]) -> Iterator[Function | ast.ClassDef]:
    """The functions and classes around `node`, innermost first."""
    while node in above:
        node = above[node]
        if isinstance(node, Function | ast.ClassDef):
            yield node


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, "" for anything else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def report(violations: list[str]) -> str:
    """What a failed rule prints: one violation a line."""
    return "\n".join(["", *violations])
