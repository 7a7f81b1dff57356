r"""Answers to mathematical problems: found in a text, brought into one form, compared.

Pure functions of text. Symbolic equality is ``math-verify``'s, a package of its own: :func:`equal` runs in a worker
process, because a term may take for ever. Read next: ``math_problems.py``.
"""

import re
from fractions import Fraction

__all__ = ["boxed", "equal", "normalised", "same"]

_SPACING = re.compile(r"\\[,;:!]|\\ |\\left|\\right|\\displaystyle|\\mathrm|\$|~")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_RATIO = re.compile(
    rf"(?P<minus>-(?=\())?(?:\((?P<above>{_NUMBER})\)|(?P<whole>{_NUMBER}))"
    rf"(?:/(?:\((?P<below>{_NUMBER})\)|(?P<bare>{_NUMBER})))?"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(\D|$))")


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` whose braces balance; None if there is none.

    An escaped brace (``\{``) is a character, not a brace.
    """
    at = len(text)
    while (at := text.rfind("\\boxed", 0, at)) >= 0:
        begin = at + len("\\boxed")
        while begin < len(text) and text[begin].isspace():
            begin += 1
        if begin < len(text) and text[begin] == "{" and (end := _closing(text, begin)) is not None:
            return text[begin + 1 : end].strip()
    return None


def _closing(text: str, begin: int) -> int | None:
    depth = 0
    i = begin
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def normalised(answer: str) -> str:
    r"""Return an answer in one form: without spacing commands, dollar signs and units of text, ``\frac{a}{b}`` as a/b.

    Numbers become exact fractions in lowest terms, so that ``0.50``, ``1/2`` and ``\frac{2}{4}`` are one.
    """
    text = _TEXT.sub(r"\1", _SPACING.sub("", answer.strip()))
    text = _FRACTION.sub(r"(\1)/(\2)", text).replace("\\%", "%").rstrip(".").strip()
    plain = _THOUSANDS.sub("", re.sub(r"\s+", "", text))
    number = _number(plain)
    return str(number) if number is not None else plain.lower()


def _number(text: str) -> Fraction | None:
    found = _RATIO.fullmatch(text) if len(text) < 200 else None
    if found is None:
        return None
    divisor = Fraction(found["below"] or found["bare"] or 1)
    above = Fraction(found["above"] or found["whole"])
    above = -above if found["minus"] else above
    return above / divisor if divisor else None


def same(answer: str, reference: str) -> bool:
    """Tell whether two answers are equal in their normal form."""
    return normalised(answer) == normalised(reference)


def equal(answer: str, reference: str) -> bool:
    """Tell whether two answers are symbolically equal, by math-verify, without its own time limits.

    Those are signals, which work in a main thread only; the limit of time is the worker's.
    """
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    wanted, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    return bool(verify(wanted, given, timeout_seconds=None))
