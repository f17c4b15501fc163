"""Mutants of a file of kernels: every change of one place that a test should see."""

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence

OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.FloorDiv: (ast.Mod,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
COMMUTATIVE = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)
CASTS_AND_HINTS = ("tl.cast", "tl.multiple_of", "tl.max_contiguous", "tl.max_constancy")
MASK_POSITION = {"tl.load": 1, "tl.store": 2, "tl.atomic_add": 2}
MASK_NAMES = ("mask", "exists")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    function: str
    line: int
    text: str
    """The line, as it was."""
    change: str
    """Numbered where the same change can be made to the same line again."""
    source: str
    """The whole file, changed."""

    @property
    def key(self) -> str:
        """Names the mutant whatever its line's number is."""
        return f"{self.path}:{self.function}: {self.text}: {self.change}"


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of the functions in a file, in the order of its lines."""
    data, lines, starts = source.encode(), source.splitlines(), [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(node: ast.AST) -> tuple[int, int]:
        begin, end = starts[node.lineno - 1], starts[node.end_lineno - 1]
        return begin + node.col_offset, end + node.end_col_offset

    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        bound = {argument.arg for argument in function.args.args}
        seen = {ast.dump(ast.parse(source))}
        again: Counter[tuple[str, str]] = Counter()
        for node, parent in nodes_of(function):
            begin, end = place(node)
            # A number or a name says little by itself.
            alone = isinstance(node, ast.Constant | ast.Name)
            wide = alone and isinstance(parent, ast.expr | ast.keyword)
            left, right = place(parent) if wide else (begin, end)
            for new in changes(node, parent, bound):
                whole = isinstance(node, ast.stmt) or re.fullmatch(r"[\w.]+", new)
                spliced = (new if whole else f"({new})").encode()
                mutated = (data[:begin] + spliced + data[end:]).decode()
                tree = ast.dump(ast.parse(mutated))
                if tree in seen:
                    continue
                seen.add(tree)
                shown = (data[left:end], data[left:begin] + new.encode())
                text = lines[node.lineno - 1].strip()
                change = " -> ".join(
                    " ".join((part + data[end:right]).decode().split()) for part in shown
                )
                again[text, change] += 1
                if again[text, change] > 1:
                    change += f" ({again[text, change]})"
                yield Mutant(path, function.name, node.lineno, text, change, mutated)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)


def nodes_of(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST]]:
    """The statements and expressions of a function's body, each with its parent."""

    def walk(node: ast.AST, parent: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        if isinstance(node, ast.stmt | ast.expr):
            yield node, parent
        for name, field in ast.iter_fields(node):
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST) and name != "annotation":
                    yield from walk(child, node)

    for statement in function.body:
        yield from walk(statement, function)


def changes(node: ast.AST, parent: ast.AST, bound: set[str]) -> Iterator[str]:
    """What a statement or an expression is replaced by."""
    if isinstance(parent, ast.If | ast.IfExp) and node is parent.test:
        yield from (f"not ({ast.unparse(node)})", "True", "False")
    if isinstance(parent, ast.Call) and isinstance(node, ast.Name) and node.id in MASK_NAMES:
        yield "None"
    match node:
        case ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in bound:
            yield "pass"
        case ast.AugAssign(target=target, op=op, value=value):
            yield "pass"
            yield f"{ast.unparse(target)} = {ast.unparse(value)}"
            for other in OPERATORS.get(type(op), ()):
                yield ast.unparse(ast.AugAssign(target, other(), value))
        case ast.Constant(value=bool() | None):
            pass
        case ast.Constant(value=int() | float() as number):
            yield repr(0 if is_axis(parent) and number else number + 1)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield ast.unparse(operand)
        case ast.BoolOp(op=op, values=values):
            yield ast.unparse(
                ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            )
            yield from map(ast.unparse, values)
        case ast.Compare(left=left, ops=[op], comparators=[_]) if type(op) in OPERATORS:
            for other in OPERATORS[type(op)]:
                yield ast.unparse(ast.Compare(left, [other()], node.comparators))
            if not isinstance(parent, ast.If | ast.IfExp):
                yield from (f"({ast.unparse(node)}) | True", f"({ast.unparse(node)}) & False")
        case ast.BinOp(left=left, op=op, right=right):
            for other in OPERATORS.get(type(op), ()):
                yield ast.unparse(ast.BinOp(left, other(), right))
            yield ast.unparse(left)
            if isinstance(op, COMMUTATIVE):
                yield ast.unparse(right)
        case ast.Call():
            yield from map(ast.unparse, changed_calls(node))


def changed_calls(call: ast.Call) -> Iterator[ast.expr]:
    """What a call is replaced by."""
    name, args = ast.unparse(call.func), call.args

    def called(*new: ast.expr, leave: Sequence[str] = (), function: str = name) -> ast.Call:
        keywords = [keyword for keyword in call.keywords if keyword.arg not in leave]
        return ast.Call(ast.Name(function), list(new), keywords)

    keywords = {keyword.arg for keyword in call.keywords}
    if isinstance(call.func, ast.Attribute) and call.func.attr == "to":
        yield call.func.value
    elif name in CASTS_AND_HINTS:
        yield args[0]
    elif name in ("tl.maximum", "tl.minimum"):
        other = "tl.minimum" if name == "tl.maximum" else "tl.maximum"
        yield from (*args[:2], called(*args, function=other))
    elif name == "tl.where" and len(args) == 3:
        yield from (args[1], args[2], called(args[0], args[2], args[1]))
    elif name == "tl.zeros":
        yield called(args[0], ast.Constant(1), *args[1:], function="tl.full")
    elif name == "tl.full":
        yield called(args[0], *args[2:], function="tl.zeros")
    elif name == "range":
        if len(args) > 1:
            yield called(ast.Constant(0), *args[1:])
        if len(args) > 2:
            yield called(*args[:2])
    elif name in MASK_POSITION and (len(args) > MASK_POSITION[name] or "mask" in keywords):
        yield called(*args[: MASK_POSITION[name]], leave=("mask", "other"))


def is_axis(parent: ast.AST) -> bool:
    """Whether a number is an axis: of a sum, or of the grid."""
    if isinstance(parent, ast.keyword):
        return parent.arg == "axis"
    return isinstance(parent, ast.Call) and ast.unparse(parent.func) in (
        "tl.program_id",
        "tl.num_programs",
    )
