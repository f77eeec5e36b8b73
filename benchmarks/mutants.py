"""What a small bug looks like: every change of one node that `mutation.py` may plant, and the source with it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Mutant", "mutants_of", "planted"]

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file: which node, what is done to it, and the outermost function that it lies in (its first line)."""

    path: str
    place: int
    kind: str
    line: int
    change: str
    context: str
    function: int | None

    @property
    def name(self) -> str:
        """What `mutation.py --only` takes: it tells this mutant of this source from all others."""
        return f"{self.path}:{self.place}:{self.kind}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.change}    in: {self.context}"


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST | None]]]:
    """What can be done to a node: a name, and a function that changes a copy of it; None removes a statement."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", lambda n: _with(n, ops=[COMPARISONS[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and/or", lambda n: _with(n, op=ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield "condition", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number + 1", lambda n: ast.Constant(n.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "not", lambda n: ast.Constant(not n.value)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.step is not None:
        yield "not reversed", lambda n: _with(n, slice=ast.Slice(n.slice.lower, n.slice.upper, None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", lambda _: ast.Pass()
    if isinstance(node, ast.Assign | ast.AugAssign) and isinstance(_target(node), ast.Attribute | ast.Subscript):
        yield "assignment left out", lambda _: ast.Pass()
    if isinstance(node, ast.Delete):
        yield "del left out", lambda _: ast.Pass()
    if isinstance(node, ast.Break | ast.Continue):
        yield "loop", lambda _: ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _target(node: ast.Assign | ast.AugAssign) -> ast.expr:
    return node.target if isinstance(node, ast.AugAssign) else node.targets[0]


def places(tree: ast.Module) -> list[ast.AST]:
    """Nodes of code that runs, in the order of the source: no docstrings, annotations, messages or checks of types."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            return
        found.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            if (
                name == "value"
                and isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) in ("__slots__", "__all__")
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(tree)
    return found


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its source."""
    lines = source.splitlines()
    tree = ast.parse(source)
    functions = _outermost_functions(tree)
    found = []
    for place, node in enumerate(places(tree)):
        for kind, change in changes(node):
            before = ast.unparse(node).splitlines()[0]
            changed = change(node)
            after = ast.unparse(ast.fix_missing_locations(changed)).splitlines()[0] if changed is not None else ""
            line = getattr(node, "lineno", 0)
            context = lines[line - 1].strip() if line else ""
            found.append(Mutant(path, place, kind, line, f"{before} -> {after}", context, functions.get(node)))
    return found


def planted(source: str, mutant: Mutant) -> ast.Module:
    """The module of a source with one mutant in it; lines keep their numbers."""
    tree = ast.parse(source)
    wanted = places(tree)[mutant.place]
    change = dict(changes(wanted))[mutant.kind]

    class Planter(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST | None:
            return change(node) if node is wanted else self.generic_visit(node)

    changed: ast.Module = ast.fix_missing_locations(Planter().visit(tree))
    return changed


def _outermost_functions(tree: ast.Module) -> dict[ast.AST, int]:
    """For each node in the body of a function, the line at which the outermost such function's code begins.

    That is the line of its first decorator, as in `co_firstlineno`. Defaults of arguments run when the function is made,
    with the class or module around it, so they belong to none.
    """
    inside: dict[ast.AST, int] = {}

    def visit(node: ast.AST, first_line: int | None) -> None:
        if first_line is not None:
            inside[node] = first_line
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        own = first_line
        if is_function and first_line is None:
            own = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        for name, value in ast.iter_fields(node):
            line = own if is_function and name == "body" else first_line
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, line)

    visit(tree, None)
    return inside
