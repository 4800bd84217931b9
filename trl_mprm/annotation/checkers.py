"""
Check whether a solution reaches the right answer.

    solution  "The sides add up.\\n\\nFinal answer: $\\\\frac{1}{2}$"     answer  "0.5"
    math      0.5 = 1/2: right           exact    other characters: wrong
    numeric   the number 1/2 is not written as one: wrong

A checker is a function that takes the text of a whole solution and the right answer. It compares the last answer that
the text states (`final_answer`) as a whole: an answer of 5 is not found in "15".
"""

import re
from collections.abc import Callable


Checker = Callable[[str, str], bool]

STATED = re.compile(r"(?:final answer|answer)(?:\s+is)?\s*[:=]?\s*([^\n]+)", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    """
    Find the last answer that a text states, in `\\boxed{}` or after "answer"; None if it states none.

    Examples:
    ```python
    >>> from trl_mprm.annotation.checkers import final_answer
    >>> final_answer("So **Final answer: 12**."), final_answer("It is \\\\boxed{\\\\frac{1}{2}}."), final_answer("Hm.")
    ('12', '\\\\frac{1}{2}', None)

    ```
    """
    boxed = text.rfind("\\boxed{")
    stated = [match for match in STATED.finditer(text) if match.start() > boxed]
    if stated:
        return stated[-1].group(1).strip().strip("*$` ").rstrip(".").strip("*$` ") or None
    if boxed < 0:
        return None
    depth, start = 0, boxed + len("\\boxed")
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + 1 : place].strip()
    return None  # cut short


def exact(text: str, answer: str) -> bool:
    """
    Check that the stated answer equals the right one, apart from case and white space.

    Examples:
    ```python
    >>> from trl_mprm.annotation.checkers import exact
    >>> exact("Answer: Blue", "blue"), exact("Answer: 15", "5")
    (True, False)

    ```
    """
    stated = final_answer(text)
    return stated is not None and " ".join(stated.split()).casefold() == " ".join(answer.split()).casefold()


def choice(text: str, answer: str) -> bool:
    """
    Check that the letter of the stated option is that of the answer.

    Examples:
    ```python
    >>> from trl_mprm.annotation.checkers import choice
    >>> choice("The answer is (B) 12 cm.", "B"), choice("Answer: C", "B. 12 cm"), choice("Answer: a bee", "B")
    (True, False, False)

    ```
    """
    stated, expected = (_letter(value) for value in (final_answer(text), answer))
    return stated is not None and stated == expected


def _letter(text: str | None) -> str | None:
    found = re.match(r"(?:option\s+)?[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)", text or "", re.IGNORECASE)
    return found.group(1).upper() if found else None


def numeric(text: str, answer: str, tolerance: float = 1e-6) -> bool:
    """
    Check that the stated number equals the answer, up to a relative tolerance.

    Examples:
    ```python
    >>> from trl_mprm.annotation.checkers import numeric
    >>> numeric("Answer: 1,200.0 cm", "1200"), numeric("Answer: 12", "1200"), numeric("Answer: 3.1", "3.0", 0.05)
    (True, False, True)

    ```
    """
    stated, expected = (_number(value) for value in (final_answer(text), answer))
    if stated is None or expected is None:
        return False
    return abs(stated - expected) <= tolerance * max(1.0, abs(expected))


def _number(text: str | None) -> float | None:
    found = re.match(r"[^\d+\-.]{0,3}([+-]?(?:\d[\d,]*)?\.?\d+(?:[eE][+-]?\d+)?)(?![\d/])", text or "")
    return float(found.group(1).replace(",", "")) if found else None


def math(text: str, answer: str) -> bool:
    """
    Check with `math-verify` that the stated answer is mathematically equal to the right one; letters are compared as options.

    Examples:
    ```python
    >>> from trl_mprm.annotation.checkers import math
    >>> math("Final answer: \\\\frac{1}{2}", "0.5"), math("Final answer: 2x", "3x"), math("Answer: B", "B")
    (True, False, True)

    ```
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError('the checker "math" needs math-verify: pip install "trl-mprm[annotate]"') from error

    stated = final_answer(text)
    if stated is None:
        return False
    if exact(text, answer) or choice(text, answer):
        return True
    # Its own time limit is an alarm signal, which only the main thread may set.
    gold, given = (parse(f"${value}$", parsing_timeout=None) for value in (answer, stated))
    return verify(gold, given, timeout_seconds=None)


CHECKERS: dict[str, Checker] = {"math": math, "exact": exact, "choice": choice, "numeric": numeric}


def find_checker(checker: str | Checker | None) -> tuple[str, Checker]:
    """Return the name and the function of a checker, given one of `CHECKERS` or a callable; None is `"math"`."""
    if callable(checker):
        return getattr(checker, "__name__", type(checker).__name__), checker
    if (checker or "math") not in CHECKERS:
        raise ValueError(f"checker must be one of {', '.join(CHECKERS)}, or a callable, got {checker!r}")
    return checker or "math", CHECKERS[checker or "math"]
