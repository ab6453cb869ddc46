"""Small Python functions, after HumanEval: the checker runs the answer on test inputs."""

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from vllm_osdt.mini.tasks.base import Parts, Problem, draw_parts, render

FUNCTIONS = ("f", "g", "h")
# Name of the local variable, free but used throughout, and its chance.
VARIABLES = {"y": 0.55, "z": 0.2, "w": 0.15, "t": 0.1}
OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", lambda left, right: left + right),
    "subtract": ("-", lambda left, right: left - right),
    "times": ("*", lambda left, right: left * right),
}
TEST_INPUTS = (-7, -1, 0, 1, 2, 5, 19)
MAX_CODE_CHARS = 1000
MAX_CONSTANT = 1000
ALLOWED_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Name, ast.Load, ast.Store),
    *(ast.Constant, ast.BinOp, ast.UnaryOp, ast.USub, ast.Add, ast.Sub, ast.Mult),
)


@dataclass(frozen=True)
class CodeProblem(Problem):
    """A function that adds a total in parts, then applies a few operations."""

    task: ClassVar[str] = "code"
    function: str
    parts: Parts
    operations: tuple[tuple[str, int], ...]

    def expected(self, value: int) -> int:
        """What the function must return."""
        value += self.parts.total
        for operation, operand in self.operations:
            value = OPERATIONS[operation][1](value, operand)
        return value

    def sample_answer(self, rng: random.Random) -> str:
        """See the base class."""
        variable = rng.choices(list(VARIABLES), list(VARIABLES.values()))[0]
        lines = [f"def {self.function} ( x ) :", *(f"x = x + {part}" for part in rng.choice(self.parts.splits()))]
        source = "x"
        for operation, operand in self.operations:
            lines.append(f"{variable} = {source} {OPERATIONS[operation][0]} {operand}")
            source = variable
        lines.append(
            "# this|the|our short|small|simple|tiny code|routine|helper|recipe returns|yields|gives|outputs"
            " the|one|a changed|shifted|updated|new number|value|result|integer"
        )
        return render(" \n ".join((*lines, f"return {variable}")), rng)

    def accepts(self, answer: str) -> bool:
        """See the base class."""
        function = compile_function(answer, self.function)
        return function is not None and all(function(value) == self.expected(value) for value in TEST_INPUTS)


def compile_function(source: str, name: str) -> Callable[[int], int | None] | None:
    """Turns an answer into a function of one integer, or None where it is not one; it returns None where it fails.

    Only assignments and returns of sums, differences and products of names and small constants pass: no loop, call,
    attribute or import, so what runs ends after at most MAX_CODE_CHARS operations.
    """
    try:
        if len(source) > MAX_CODE_CHARS:
            return None
        module = ast.parse(source)
        if not all(is_allowed(node) for node in ast.walk(module)):
            return None
        namespace: dict[str, Callable[[int], int]] = {}
        exec(compile(module, "answer", "exec"), {"__builtins__": {}}, namespace)
    except (SyntaxError, ValueError, NameError, TypeError, MemoryError, RecursionError):
        return None
    if not callable(namespace.get(name)):
        return None

    def run(value: int) -> int | None:
        try:
            return namespace[name](value)
        except (NameError, TypeError):
            return None

    return run


def is_allowed(node: ast.AST) -> bool:
    """Whether a syntax node is on the list; constants must be small integers and products must have one."""
    if isinstance(node, ast.Constant):
        return type(node.value) is int and abs(node.value) <= MAX_CONSTANT
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant)
    return isinstance(node, ALLOWED_NODES)


def draw(rng: random.Random, free: bool) -> CodeProblem:
    """Draws a problem; `free` ones leave open which part is the odd one."""
    parts, function = draw_parts(rng, free, (1, 2, 3)), rng.choice(FUNCTIONS)
    operations = tuple((rng.choice(list(OPERATIONS)), rng.randint(2, 9)) for _ in range(rng.choice((1, 2, 3))))
    steps = " , ".join(f"then {operation} {operand}" for operation, operand in operations)
    prompt = (
        f"code : write {function} ( x ) , add {parts.total} in {parts.count} parts of {parts.low} or {parts.low + 1} ,"
        f" {steps} . Answer:"
    )
    return CodeProblem(prompt, function, parts, operations)
