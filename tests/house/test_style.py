"""The style of the house, as far as a program can see it: sizes, names, what is never called, what every test must have."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from codebase import ROOT, Module, dotted, enclosing, everything, functions, modules, parents, report

LINES, FUNCTION_LINES, ARGUMENTS, README_LINES = 400, 60, 8, 150
FILE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "v2", "legacy"}
NAMES = FILE_NAMES - {"common"}  # a longest_common_prefix is a fine thing to define
FORBIDDEN_CALLS = {"hasattr", "globals", "eval", "exec", "compile", "__import__"}
FORBIDDEN_NAMES = {"torch.load", "torch.save", "trust_remote_code", "allow_pickle"}
PICKLES = {  # the one place that reads pickles, the one way, and the test that needs some
    ("fewstep/hub/pickles.py", "torch.load(file, weights_only=True, map_location='cpu')"),
    ("tests/parity/test_drafter_formats.py", "torch.save(held, file)"),
}
FORBIDDEN_PACKAGES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MUTABLE_CALLS = {"dict", "list", "set", "bytearray", "defaultdict", "Counter", "deque", "OrderedDict"}
MUTABLE = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
FROZEN_ANNOTATIONS = ("Mapping[", "Final", "tuple[", "Sequence[", "MappingProxyType[")
CLOCKS = {"time.time", "time.perf_counter", "time.monotonic", "time.process_time", "time.time_ns", "time.perf_counter_ns"}
TEXT = {".py", ".c", ".md", ".toml", ".txt", ".html", ".css", ".js", ".json", ".cfg", ".yml", ""}
MARKS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
MACHINE = re.compile(r"(?<![\w.:~/}])/(home|root|Users|mnt|opt|srv|tmp|var|work|workspace)/\w")


def size_violations(module: Module) -> list[str]:
    lines = module.text.count("\n")
    found = [f"{module.path}: {lines} lines, more than {LINES}; split it"] if lines > LINES else []
    for function in functions(module.tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"{module.at(function)}: {function.name} has {length} lines, more than {FUNCTION_LINES}; split it")
    return found


def argument_violations(module: Module) -> list[str]:
    """At most eight arguments beside `self`. The commands of cli are a list of options, not a call."""
    found = []
    for function in functions(module.tree):
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
        count = len([name for name in names if name.lstrip("_") not in ("self", "cls")])
        if count > ARGUMENTS and not command(function):
            found.append(f"{module.at(function)}: {function.name} takes {count} arguments, more than {ARGUMENTS}; group them")
    return found


def keyword_violations(module: Module) -> list[str]:
    """No public function takes `**kwargs`: what it accepts is written down."""
    above = parents(module.tree)
    taking = [function for function in functions(module.tree) if function.args.kwarg and public(function, above)]
    return [
        f"{module.at(function)}: {function.name} takes **{function.args.kwarg.arg}; name the arguments" for function in taking
    ]


def command(function: ast.AST) -> bool:
    """Whether a function is a command of a typer application."""
    return any(isinstance(mark, ast.Call) and dotted(mark.func).endswith(".command") for mark in function.decorator_list)


def public(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether callers can reach a definition: no private name on the way to it, and no function around it."""
    scopes = list(enclosing(node, above))
    private = (scope.name.startswith("_") and not scope.name.startswith("__") for scope in (node, *scopes))
    return not any(private) and all(isinstance(scope, ast.ClassDef) for scope in scopes)


def name_violations(module: Module) -> list[str]:
    parts = Path(module.path).with_suffix("").parts
    found = [f"{module.path}: {part!r} says nothing; name it after what it does" for part in parts if part in FILE_NAMES]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name).lower().split("_")
            if NAMES & set(words):
                found.append(f"{module.at(node)}: {node.name!r} says nothing; name it after what it does")
    return found


def forbidden_violations(module: Module) -> list[str]:
    """What asks an object what it is, reaches around the language, or runs code from a file."""
    found = []
    allowed = {
        id(call.func)
        for call in ast.walk(module.tree)
        if isinstance(call, ast.Call) and (module.path, ast.unparse(call)) in PICKLES
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{module.at(node)}: {node.func.id}() is not used in this house")
        if isinstance(node, ast.Import | ast.ImportFrom):
            taken = [alias.name for alias in node.names]
            roots = taken if isinstance(node, ast.Import) else [node.module or ""]
            whole = [f"{roots[0]}.{name}" for name in taken]
            if FORBIDDEN_PACKAGES & {name.split(".")[0] for name in roots} or FORBIDDEN_NAMES & set(whole):
                found.append(f"{module.at(node)}: {', '.join(taken)} runs code from files; use safetensors and JSON")
        name = node.arg if isinstance(node, ast.keyword) else dotted(node)
        if name in FORBIDDEN_NAMES and id(node) not in allowed:
            found.append(f"{module.at(node)}: {name} runs code from files; use safetensors and JSON")
    return found


def state_violations(module: Module) -> list[str]:
    """No mutable value at module level unless its type forbids to change it, and no `global`."""
    found = [f"{module.at(node)}: `global`; hand the value in" for node in ast.walk(module.tree) if isinstance(node, ast.Global)]
    for node in module.tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        names = [dotted(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
        declared = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        called = last(node.value) if isinstance(node.value, ast.Call) else ""
        mutable = isinstance(node.value, MUTABLE) or called in MUTABLE_CALLS
        if mutable and names != ["__all__"] and not declared.startswith(FROZEN_ANNOTATIONS):
            found.append(f"{module.at(node)}: {names[0]} is mutable; make it a tuple, a frozenset or a MappingProxyType")
    return found


def docstring_violations(module: Module) -> list[str]:
    """Modules, public classes and public functions say what they are; a method may rely on its contract."""
    found = [] if ast.get_docstring(module.tree) else [f"{module.path}: no docstring"]
    above = parents(module.tree)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or not public(node, above):
            continue
        method = not isinstance(node, ast.ClassDef) and isinstance(above[node], ast.ClassDef)
        if not method and not node.name.startswith("__") and not ast.get_docstring(node):
            found.append(f"{module.at(node)}: {node.name} has no docstring")
    return found


def openness_violations(package: tuple[Module, ...]) -> list[str]:
    """A class is a contract, a base of others, or final."""
    classes = {node: module for module in package for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
    bases = {node: {last(base) for base in node.bases} for node in classes}
    open_ends = {"Protocol", "ABC", "Enum", "IntEnum", "StrEnum", "NamedTuple", "TypedDict"}
    extended = set().union(*bases.values())
    return [
        f"{module.at(node)}: {node.name} has no subclass; mark it @final"
        for node, module in classes.items()
        if node.name not in extended and not open_ends & bases[node] and "final" not in map(last, node.decorator_list)
    ]


def last(node: ast.AST) -> str:
    """The last name of `a.b.Name`, `Name[T]` or `Name(...)`."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return dotted(node).split(".")[-1]


def cases_in(module: Module) -> Iterator[ast.FunctionDef]:
    return (node for node in functions(module.tree) if node.name.startswith("test_"))


def asserting(tests: tuple[Module, ...]) -> set[str]:
    """The names of all functions in the tests that assert something, themselves or through one another."""
    checks = {"raises", "warns", "fail"}
    calls: dict[str, set[str]] = {}
    found = {"assert_close", "gradcheck"}
    for function in (function for module in tests for function in functions(module.tree)):
        inside = list(ast.walk(function))
        names = {last(node) for node in inside if isinstance(node, ast.Call)}
        calls.setdefault(function.name, set()).update(names)
        if any(isinstance(node, ast.Assert) for node in inside) or checks & names:
            found.add(function.name)
    while new := {name for name, called in calls.items() if called & found} - found:
        found |= new
    return found


def assertion_violations(tests: tuple[Module, ...]) -> list[str]:
    known = asserting(tests)
    return [f"{m.at(test)}: {test.name} asserts nothing" for m in tests for test in cases_in(m) if test.name not in known]


def clock_violations(module: Module) -> list[str]:
    """No test asserts a wall time: neither what was measured with a clock nor an upper bound on seconds."""
    found = []
    for test in cases_in(module):
        timed: set[str] = set()
        assigned = [node for node in ast.walk(test) if isinstance(node, ast.Assign)]
        while new := {dotted(t) for node in assigned if reads_clock(node.value, timed) for t in node.targets} - timed:
            timed |= new
        for check in (node for node in ast.walk(test) if isinstance(node, ast.Assert)):
            if reads_clock(check.test, timed) or any(bounds_seconds(node) for node in ast.walk(check.test)):
                found.append(f"{module.at(check)}: {test.name} asserts a wall time; measure it in a benchmark")
    return found


def reads_clock(expression: ast.AST, timed: set[str]) -> bool:
    return any(dotted(node) in CLOCKS | timed for node in ast.walk(expression))


def bounds_seconds(node: ast.AST) -> bool:
    """Whether `node` is a comparison such as `cost.seconds < 2`."""
    if not isinstance(node, ast.Compare) or not isinstance(node.comparators[0], ast.Constant):
        return False
    return dotted(node.left).endswith(("seconds", "elapsed")) and isinstance(node.ops[0], ast.Lt | ast.LtE)


def text_violations(path: str, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if mark := MARKS.search(line):
            found.append(f"{path}:{number}: {mark.group()}; do it, or say it in an issue")
        if MACHINE.search(line):
            found.append(f"{path}:{number}: a path of one machine")
    return found


def texts() -> Iterator[tuple[str, str]]:
    """The text files of the repository by path, without what is built, downloaded or hidden."""
    folders = ("fewstep", "tests", "benchmarks", "docs", ".ci")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*"))] + sorted(ROOT.glob("*"))
    for file in files:
        if file.is_file() and file.suffix in TEXT and "__pycache__" not in file.parts:
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", [size_violations, argument_violations, name_violations])
def test_everything_is_small_and_well_named(rule):
    violations = [line for module in everything() for line in rule(module)]
    assert not violations, report(violations)


@pytest.mark.parametrize("rule", [keyword_violations, forbidden_violations, state_violations, docstring_violations])
def test_the_package_keeps_the_rules(rule):
    violations = [line for module in modules("fewstep") + modules("benchmarks") for line in rule(module)]
    assert not violations, report(violations)


def test_classes_are_contracts_bases_or_final():
    violations = openness_violations(modules("fewstep"))
    assert not violations, report(violations)


def test_every_test_asserts_something_and_no_wall_time():
    tests = modules("tests")
    violations = assertion_violations(tests) + [line for module in tests for line in clock_violations(module)]
    assert not violations, report(violations)


def test_test_files_have_names_of_their_own():
    counts = Counter(Path(module.path).name for module in modules("tests"))
    violations = [f"{name}: {count} files of this name" for name, count in counts.items() if count > 1]
    assert not violations + [name for name in counts if name == "__init__.py"], report(violations)


def test_texts_hold_no_mark_and_no_machine():
    violations = [line for path, text in texts() for line in text_violations(path, text)]
    assert not violations, report(violations)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def body(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (size_violations, "x = 1\n" * (LINES + 1)),
        (size_violations, body(FUNCTION_LINES + 1)),
        (argument_violations, "class A:\n    def f(self, a, b, c, d, /, e, f, *, g, h, i): ..."),
        (keyword_violations, "class A:\n    def __init__(self, **options): ..."),
        (name_violations, "def load_v2(): ..."),
        (name_violations, "class TensorUtils: ..."),
        (forbidden_violations, "hasattr(x, 'y')"),
        (forbidden_violations, "y = eval(x)"),
        (forbidden_violations, "import pickle"),
        (forbidden_violations, "from torch import load"),
        (forbidden_violations, "torch.load(path, weights_only=True)"),
        (forbidden_violations, "AutoModel.from_pretrained(path, trust_remote_code=True)"),
        (state_violations, "CACHE = {}"),
        (state_violations, "SEEN: dict[str, int] = dict()"),
        (state_violations, "def f():\n    global x\n    x = 1"),
        (docstring_violations, '"""Doc."""\ndef f(): ...'),
        (docstring_violations, '"""Doc."""\nclass A: ...'),
        (docstring_violations, "x = 1"),
        (clock_violations, "def test_a():\n    start = time.time()\n    took = time.time() - start\n    assert took < 3"),
        (clock_violations, "def test_a():\n    assert out.cost.seconds < 2"),
    ],
)
def test_a_planted_fault_is_found(rule, text):
    assert len(rule(Module.of("fewstep/x.py", text))) == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (size_violations, body(FUNCTION_LINES)),
        (argument_violations, "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
        (keyword_violations, "def _f(**options): ..."),
        (forbidden_violations, "model.eval()\nmodel.compile()\nre.compile('a')"),
        (state_violations, "TABLE: Mapping[str, int] = {}\nNAMES = ('a',)\n__all__ = ['NAMES']"),
        (docstring_violations, '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...\ndef _g(): ...'),
        (clock_violations, "def test_a():\n    start = time.time()\n    assert out.seconds > 0"),
    ],
)
def test_what_is_allowed_is_not(rule, text):
    assert not rule(Module.of("fewstep/x.py", text))


def test_planted_faults_between_files_are_found():
    silent = Module.of("tests/test_x.py", "def check(): run()\ndef test_a(): check()")
    heard = Module.of("tests/test_y.py", "def prove():\n    assert run()\ndef test_b(): prove()")
    assert assertion_violations((silent, heard)) == ["tests/test_x.py:2: test_a asserts nothing"]
    classes = Module.of("fewstep/x.py", "class A(Protocol): ...\nclass B: ...\n@final\nclass C(B): ...\nclass D(B): ...")
    assert openness_violations((classes,)) == ["fewstep/x.py:5: D has no subclass; mark it @final"]


def test_planted_words_are_found():
    assert len(text_violations("x.md", "see /" + "home/someone/model and https://example.org/home/page\n# TO" + "DO later")) == 2
