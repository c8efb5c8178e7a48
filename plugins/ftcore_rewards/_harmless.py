"""Which answers may be handed to scorers that evaluate them: some of reasoning-gym's call `eval` on what a model wrote.

sympy's `parse_expr` is one of those calls. An answer that is no plain literal or formula is not handed on.
"""

from __future__ import annotations

import ast
import re

LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks that evaluate an answer as a Python list."""
ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Tasks that evaluate an answer as sums and products of numbers."""
FORMULAS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""Tasks that evaluate an answer as a formula."""
VARIABLES = frozenset("xyzuvwabcXYZCeE")
FUNCTIONS = frozenset({"pi", "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"})
NAMES = VARIABLES | FUNCTIONS | {"exp", "log", "ln", "sqrt", "Abs"}
LONGEST = 400
"""Characters of an answer that is evaluated."""
TOKENS = re.compile(r"\s+|[A-Za-z_]\w*|\d{1,12}(\.\d{0,12})?|\*\*|[-+*/^(),=]")
POWER = re.compile(r"(\*\*|\^)\s*(\d{1,2}(?!\d)|[A-Za-z]|\()")


def harmless(answer: str, task: str) -> bool:
    """Whether the scorer of the task may see the answer."""
    if task in LITERALS:
        return len(answer) <= LONGEST and (_is_literal(answer) or re.fullmatch(r"[\w\s.?-]*", answer) is not None)
    if task in ARITHMETIC:
        return _is_formula(answer, frozenset()) and "**" not in answer and "^" not in answer
    return task not in FORMULAS or _is_formula(answer, NAMES)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _is_formula(text: str, names: frozenset[str]) -> bool:
    """Numbers, operators and known names, and no tower of powers, which would take all memory."""
    if len(text) > LONGEST or "(" * 20 in text:
        return False
    place = 0
    while place < len(text):
        token = TOKENS.match(text, place)
        if token is None or (token[0][0].isalpha() and token[0] not in names) or token[0][0] == "_":
            return False
        place = token.end()
    powers = re.findall(r"\*\*|\^", text)
    of_brackets = re.findall(r"\)\s*(?:\*\*|\^)", text)
    in_exponents = re.findall(r"(?:\*\*|\^)\s*\([^()]*(?:\*\*|\^|\()", text)
    chained = re.findall(r"(?:\*\*|\^)\s*\w+\s*(?:\*\*|\^)", text)
    return len(POWER.findall(text)) == len(powers) and len(of_brackets) <= 3 and not (in_exponents or chained)
