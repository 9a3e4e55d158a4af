"""Break the losses in every small way and see that a test notices: `python scripts/mutants.py [FILE ...]`.

A mutant is one change of one expression in src/accord/losses: a flipped sign, a dropped mask, chosen for rejected, a
forgotten shift, min for max, a mean for a sum. Each runs against those fast tests that reach the changed function, the
fastest first, and dies with the first test that fails. Nothing is written to the checkout: one process imports what all
need, and each mutant is a fork of it that loads the changed module. Survivors are printed, and make the exit code 1.

Mutants that no test can kill, because the changed code computes the same, stand with a reason in
scripts/mutants_equivalent.txt.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ROOT / "src" / "accord" / "losses"
EQUIVALENT = ROOT / "scripts" / "mutants_equivalent.txt"
MODULES = sorted(LOSSES.glob("[!_]*.py"))
TESTS = [*sorted((ROOT / "tests/golden").glob("test_*.py")), *sorted((ROOT / "tests/property").glob("test_losses*.py"))]


# ---- what may be changed: from a node of the syntax tree to its replacements, each of them one mutant ----------------

_OPPOSITE_OPERATOR: dict[type, ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Div(),
    ast.Div: ast.Mult(),
}
_OTHER_COMPARISONS: dict[type, list[ast.cmpop]] = {
    ast.Gt: [ast.Lt(), ast.GtE()],
    ast.GtE: [ast.LtE(), ast.Gt()],
    ast.Lt: [ast.Gt(), ast.LtE()],
    ast.LtE: [ast.GtE(), ast.Lt()],
    ast.Eq: [ast.NotEq()],
    ast.NotEq: [ast.Eq()],
    ast.Is: [ast.IsNot()],
    ast.IsNot: [ast.Is()],
}
_OPPOSITE_CALL = {"min": "max", "minimum": "maximum", "clamp_min": "clamp_max", "amin": "amax", "argmin": "argmax"}
_OPPOSITE_CALL |= {value: key for key, value in _OPPOSITE_CALL.items()} | {"sum": "mean", "mean": "sum"}
_NAIVE = {
    "full_precision": "{0}",
    "logsigmoid": "{0}.sigmoid().log()",
    "log_softmax": "{0}.softmax(-1).log()",
    "expm1": "({0}.exp() - 1)",
    "log1p": "(1 + {0}).log()",
    "softplus": "(1 + {0}.exp()).log()",
}
_DROPPED = {"detach", "clamp", "clamp_min", "clamp_max", "exp", "square", "abs", "reversed", "flip", "relu", "log"}
_MASKED = {"counted", "masked_sum", "masked_mean", "whiten", "sequence_logprobs", "mean_logprobs"}
_OPTIONAL = {"soft_labels", "margins", "num_pairs", "num_groups", "num_tokens", "num_completions"}
_SIDES = [("chosen", "rejected"), ("better", "worse"), ("policy", "ref"), ("desirable", "undesirable"), ("new", "old")]


def binary(node: ast.BinOp) -> Iterator[ast.AST]:
    """- for +, / for *, b - a for a - b; a shift by a constant forgotten; one of two conditions dropped."""
    if type(node.op) in _OPPOSITE_OPERATOR:
        yield ast.BinOp(node.left, _OPPOSITE_OPERATOR[type(node.op)], node.right)
    if isinstance(node.op, ast.Sub | ast.Div):
        yield ast.BinOp(node.right, node.op, node.left)
    if isinstance(node.op, ast.Add | ast.Sub) and isinstance(node.right, ast.Constant):
        yield node.left
    if isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield from (node.left, node.right)


def unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    """A minus, a `not` or a ~ dropped."""
    yield node.operand


def compare(node: ast.Compare) -> Iterator[ast.AST]:
    """The direction turned round, the boundary moved."""
    for op in _OTHER_COMPARISONS.get(type(node.ops[0]), []):
        yield ast.Compare(node.left, [op, *node.ops[1:]], node.comparators)


def boolean(node: ast.BoolOp) -> Iterator[ast.AST]:
    """`or` for `and`."""
    yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def conditional(node: ast.IfExp) -> Iterator[ast.AST]:
    """The branches swapped."""
    yield ast.IfExp(node.test, node.orelse, node.body)


def constant(node: ast.Constant) -> Iterator[ast.AST]:
    """0 for 1, 1 for 0 and for 0.5, twice any other number; True for False."""
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int | float):
        yield ast.Constant({0: 1, 1: 0, 0.5: 1}.get(node.value, 2 * node.value))


def sliced(node: ast.Slice) -> Iterator[ast.AST]:
    """A shift forgotten ([:] for [1:] or [:-1]) or made to the other side."""
    if isinstance(node.lower, ast.Constant) and node.upper is None:
        yield ast.Slice(None, None, node.step)
        yield ast.Slice(None, ast.UnaryOp(ast.USub(), node.lower), node.step)
    if node.lower is None and isinstance(node.upper, ast.UnaryOp):
        yield ast.Slice(None, None, node.step)
        yield ast.Slice(node.upper.operand, None, node.step)


def called_otherwise(node: ast.Call) -> Iterator[ast.AST]:
    """min for max, mean for sum, a dropped detach or clamp, an operation in its naive form that loses digits."""
    name = _name_of(node.func)
    if name in _OPPOSITE_CALL:
        other = _OPPOSITE_CALL[name]
        func: ast.expr = ast.Name(other, ast.Load())
        if isinstance(node.func, ast.Attribute):
            func = ast.Attribute(node.func.value, other, ast.Load())
        yield ast.Call(func, node.args, node.keywords)
    if name in _DROPPED and _is_function(node.func):
        yield node.args[0]
    elif name in _DROPPED and isinstance(node.func, ast.Attribute):
        yield node.func.value
    if name in _NAIVE and _is_function(node.func):
        yield ast.parse(_NAIVE[name].format(f"({ast.unparse(node.args[0])})"), mode="eval").body


def with_other_arguments(node: ast.Call) -> Iterator[ast.AST]:
    """A mask or an option left out; neighbouring arguments swapped; one branch of a `where` taken always."""
    name, arguments = _name_of(node.func), node.args
    if name == "where":
        yield from arguments[1:]
    if name in _MASKED and len(arguments) > 1:
        everything = ast.BinOp(arguments[1], ast.BitOr(), ast.Constant(True))
        yield ast.Call(node.func, [arguments[0], everything, *arguments[2:]], node.keywords)
    for i, argument in enumerate(arguments):
        if isinstance(argument, ast.Name) and argument.id in _OPTIONAL:
            yield ast.Call(node.func, [*arguments[:i], ast.Constant(None), *arguments[i + 1 :]], node.keywords)
        if i and name not in _OPPOSITE_CALL:
            swapped = [*arguments[: i - 1], argument, arguments[i - 1], *arguments[i + 1 :]]
            yield ast.Call(node.func, swapped, node.keywords)


def keyword(node: ast.keyword) -> Iterator[ast.AST]:
    """An option left out, so that its default is used."""
    if node.arg in _OPTIONAL:
        yield ast.keyword(node.arg, ast.Constant(None))


def statement(node: ast.Expr) -> Iterator[ast.AST]:
    """A check left out."""
    if _is_check(node):
        yield ast.Pass()


def decorated(node: ast.FunctionDef) -> Iterator[ast.AST]:
    """no_grad left out."""
    if node.decorator_list:
        bare = copy.copy(node)
        bare.decorator_list = []
        yield bare


def _other_side(name: str) -> Iterator[str]:
    for pair in _SIDES:
        for here, there in (pair, pair[::-1]):
            changed = re.sub(rf"(?<![a-z]){here}(?![a-z])", there, name)
            if changed != name:
                yield changed


def _name_of(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def _is_function(func: ast.expr) -> bool:
    """f(x) or torch.f(x), not x.f()."""
    return isinstance(func, ast.Name) or (isinstance(func, ast.Attribute) and _name_of(func.value) == "torch")


OPERATORS: dict[type, list[Callable[..., Iterator[ast.AST]]]] = {
    ast.BinOp: [binary],
    ast.UnaryOp: [unary],
    ast.Compare: [compare],
    ast.BoolOp: [boolean],
    ast.IfExp: [conditional],
    ast.Constant: [constant],
    ast.Slice: [sliced],
    ast.Call: [called_otherwise, with_other_arguments],
    ast.keyword: [keyword],
    ast.Expr: [statement],
    ast.FunctionDef: [decorated],
}


# ---- finding them ----------------------------------------------------------------------------------------------------


MODULE = "(module)"


@dataclass(frozen=True)
class Mutant:
    """`parent`.`field`, or `parent`.`field`[`index`], becomes `replacement` in the syntax tree of a module.

    `key` names it in the list of equivalent ones: file, function, line, change. It has no line number, so that it
    lasts; of equal ones the second ends with (2).
    """

    key: str
    path: Path
    tree: ast.Module
    line: int
    function: str
    parent: ast.AST
    field: str
    index: int | None
    replacement: ast.AST

    def compiled(self) -> CodeType:
        """The changed module. The tree is changed for good: each mutant lives in a process of its own."""
        if self.index is None:
            setattr(self.parent, self.field, self.replacement)
        else:
            getattr(self.parent, self.field)[self.index] = self.replacement
        return compile(ast.fix_missing_locations(self.tree), str(self.path), "exec")


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of one file, in the order of its lines; types, docstrings and error messages are left alone."""
    source = path.read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    found: list[Mutant] = []
    times: Counter[str] = Counter()

    def visit(parent: ast.AST, function: str, names: frozenset[str]) -> None:
        for field, value in ast.iter_fields(parent):
            if field in {"returns", "annotation", "decorator_list"} or isinstance(parent, ast.Raise | ast.ClassDef):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or (parent is tree and not _has_arithmetic(node)):
                    continue
                inside = (function, names)
                if isinstance(node, ast.FunctionDef):
                    inside = (node.name if parent is tree else function, names | _names_in(node))
                for new in _replacements(node, names):
                    if _shown(new) != _shown(node):
                        line = getattr(node, "lineno", 0)
                        key = f"{path.name} | {inside[0]} | {lines[line - 1].strip()} | {_shown(node)} -> {_shown(new)}"
                        times[key] += 1
                        key += f" ({times[key]})" if times[key] > 1 else ""
                        found.append(Mutant(key, path, tree, line, inside[0], parent, field, index, new))
                if not _is_check(node):
                    visit(node, *inside)

    visit(tree, MODULE, frozenset())
    return sorted(found, key=lambda mutant: mutant.line)


def _has_arithmetic(top: ast.AST) -> bool:
    """Functions, and constants that are numbers: not imports, __all__, or aliases of types."""
    if isinstance(top, ast.Assign):
        return all(
            isinstance(node, ast.Constant | ast.UnaryOp | ast.BinOp | ast.operator | ast.unaryop | ast.Load)
            for node in ast.walk(top.value)
        ) and not isinstance(getattr(top.value, "value", 0), str)
    return isinstance(top, ast.FunctionDef)


def _is_check(node: ast.AST) -> bool:
    """A call for its exception only: it is left out as a whole, or not at all."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _names_in(node: ast.FunctionDef) -> frozenset[str]:
    """What the function calls its arguments and variables."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(stored | {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]})


def _replacements(node: ast.AST, names: frozenset[str]) -> Iterator[ast.AST]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from (ast.Name(other, node.ctx) for other in _other_side(node.id) if other in names)
    for operator in OPERATORS.get(type(node), []):
        yield from operator(node)


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef):
        return " ".join([*(f"@{ast.unparse(decorator)}" for decorator in node.decorator_list), f"def {node.name}"])
    return f"{node.arg}={ast.unparse(node.value)}" if isinstance(node, ast.keyword) else ast.unparse(node)


# ---- running them ----------------------------------------------------------------------------------------------------


class ChangedModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `import accord.losses.<name>` run this code."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = f"accord.losses.{name}", code

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


@dataclass(frozen=True)
class Reach:
    """What one test does with the losses as they are: the functions it runs, as "module.function", and its seconds."""

    functions: frozenset[str]
    seconds: float


class Recorder:
    """A pytest plugin that notes the reach of every test; the functions report themselves to `running`."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.found: dict[str, Reach] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.running.clear()
        start = time.monotonic()
        result = yield
        self.found[item.nodeid] = Reach(frozenset(self.running), time.monotonic() - start)
        return result

    def instrumented(self, path: Path) -> CodeType:
        """The module, with a line in each function that reports it."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                node.body[:0] = ast.parse(f"import sys; sys.reached.add('{path.stem}.{node.name}')").body
        sys.reached = self.running  # pyright: ignore[reportAttributeAccessIssue]
        return compile(ast.fix_missing_locations(tree), str(path), "exec")


class Selection:
    """A pytest plugin that runs these tests only, the fastest first."""

    def __init__(self, tests: dict[str, Reach]) -> None:
        self.tests = tests

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.tests]
        items.sort(key=lambda item: self.tests[item.nodeid].seconds)


def preload() -> None:
    """Imports what tests import, except the losses, and makes hypothesis report the first failure as it is."""
    import hypothesis
    import torch.optim
    import transformers.loss.loss_utils  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, deadline=None)
    hypothesis.settings.load_profile("mutants")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()


def run_pytest(files: Iterable[str], plugin: object) -> int:
    """pytest's exit code. Everything that costs time at its start and end is off: no plugin of another package, no
    rewriting of asserts, no search for garbage."""
    left_out = [option for name in ("cacheprovider", "unraisableexception") for option in ("-p", f"no:{name}")]
    return int(
        pytest.main(["-x", "--assert=plain", "--tb=no", *left_out, "--rootdir", str(ROOT), *files], plugins=[plugin])
    )


def in_a_fork(work: Callable[[], int], timeout: float) -> int | None:
    """What `work` returns, run silently in a process of its own; None when it took too long."""
    child = os.fork()
    if not child:
        code = 70
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            code = work()
        finally:
            os._exit(code)
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def reach_of_all_tests() -> dict[str, Reach]:
    """By the tests' ids. Exits when a test fails on the losses as they are."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "reach.pickle"

        def work() -> int:
            recorder = Recorder()
            sys.meta_path[:0] = [ChangedModule(path.stem, recorder.instrumented(path)) for path in MODULES]
            code = run_pytest(map(str, TESTS), recorder)
            answer.write_bytes(pickle.dumps(recorder.found))
            return code

        if in_a_fork(work, timeout=1800) != 0:
            sys.exit("The tests fail on the losses as they are. Make them pass first.")
        return pickle.loads(answer.read_bytes())


def outcome(mutant: Mutant, reach: dict[str, Reach]) -> str:
    """ "killed", "survived", "hung" (killed too) or "broken" (this script is wrong)."""
    functions = {f"{mutant.path.stem}.{mutant.function}"}
    if mutant.function == MODULE:
        functions = {name for r in reach.values() for name in r.functions if name.startswith(f"{mutant.path.stem}.")}
    tests = {name: r for name, r in reach.items() if functions & r.functions}
    files = {name.split("::")[0] for name in tests}

    def work() -> int:
        sys.meta_path.insert(0, ChangedModule(mutant.path.stem, mutant.compiled()))
        return run_pytest((str(ROOT / file) for file in sorted(files)), Selection(tests))

    if not tests:
        return "survived"
    code = in_a_fork(work, timeout=30 + 10 * sum(r.seconds for r in tests.values()))
    # pytest: 1 a test failed; 2 a test module could not even be imported.
    return {None: "hung", 0: "survived", 1: "killed", 2: "killed"}.get(code, "broken")


def equivalent_mutants() -> dict[str, str]:
    """Reason by key. A paragraph of the file is a reason and, indented, the mutants it holds for."""
    reasons: dict[str, str] = {}
    for paragraph in EQUIVALENT.read_text(encoding="utf-8").split("\n\n"):
        lines = paragraph.splitlines()
        reason = " ".join(line for line in lines if not line.startswith("    "))
        reasons |= {line.strip(): reason for line in lines if line.startswith("    ")}
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the losses in every small way and see that a test notices.")
    parser.add_argument("modules", nargs="*", help="only these modules of losses, e.g. kto; all when none is named")
    names = parser.parse_args().modules
    unknown = sorted(set(names) - {path.stem for path in MODULES})
    if unknown:
        parser.error(f"no module of losses: {', '.join(unknown)}; there are {', '.join(p.stem for p in MODULES)}")
    paths = [path for path in MODULES if not names or path.stem in names]
    start = time.monotonic()
    preload()
    reach = reach_of_all_tests()
    known = equivalent_mutants()
    unused = {key for key in known if any(key.startswith(f"{path.name} ") for path in paths)}
    counts: Counter[str] = Counter()
    for path in paths:
        for mutant in mutants_of(path):
            result = "equivalent" if mutant.key in known else outcome(mutant, reach)
            unused.discard(mutant.key)
            counts[result] += 1
            if result in ("survived", "broken"):
                print(f"{result}: {path.relative_to(ROOT)}:{mutant.line}  {mutant.key}", flush=True)
        print(f"{path.name} done after {time.monotonic() - start:.0f} s", flush=True)
    for key in sorted(unused):
        print(f"no such mutant any more: {key}")
    print(f"{counts.total()} mutants: " + ", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    return 1 if unused or counts["survived"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    sys.exit(main())
