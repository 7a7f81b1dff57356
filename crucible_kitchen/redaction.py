"""What must not be told: known secrets, and the data that an error message of somebody else's code quotes.

Pure functions over text and exceptions, and the set of this process's secrets. It knows no adapter and no event. Read
next: ``crucible_kitchen.workflow.failures``.
"""

import builtins
import dis
import re
import string
from collections.abc import Iterator
from traceback import walk_tb
from types import FunctionType
from typing import Any

__all__ = ["message_of", "redacted", "remember_secret", "without_values"]

HIDDEN = "***"
_SHORTEST = 6
"""A shorter secret is no secret, and blacking it out would garble words."""

_secrets: set[str] = set()

_QUOTED = re.compile(r"(?<![^\W\d_]{2})'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
"""An apostrophe within a word begins no quotation, but the one of ``b'bytes'`` does."""
_NAME = re.compile(r"[\w./:\-\[\]]{0,80}")
_PYDANTIC = re.compile(r"input_value=.*?, input_type=")

_FROM_ELSEWHERE = {"RAISE_VARARGS", "RERAISE", "SEND", "YIELD_VALUE", "RESUME"}
"""Instructions at which an error arrives that somebody else made."""
_KINDS = frozenset(name for name, value in vars(builtins).items() if isinstance(value, type)) | {"NoneType"}
_PART = re.compile(r"[^\W\d]+|\d[\d.,]*(?:e[-+]?\d+)?")
"""A word or a number."""
_BARE = re.compile(f"[{re.escape(string.punctuation)}]*")
_ELLIPSES = re.compile(r"\.\.\.(?:\s+\.\.\.)+")


def remember_secret(secret: Any) -> None:
    """Hide a secret, given as text or as a pydantic ``SecretStr``, in whatever is told from now on; None is none."""
    text = secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret
    if isinstance(text, str) and len(text) >= _SHORTEST:
        _secrets.add(text)


def redacted(text: str) -> str:
    """Return a text with every known secret in it blacked out."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def without_values(text: str) -> str:
    """Return a message about options and config without the values that it quotes, and without known secrets.

    A quoted name, a path, a number (one word) stays: it says what is wrong.
    """
    text = _PYDANTIC.sub("input_value=..., input_type=", text)

    def shown(match: re.Match[str]) -> str:
        inner = match[1] if match[1] is not None else match[2]
        return match[0] if _NAME.fullmatch(inner) else f"{match[0][0]}...{match[0][0]}"

    return redacted(_QUOTED.sub(shown, text))


def message_of(error: BaseException) -> str:
    """Return what another code's error says, as far as it stands in that code: what was put in may be a dataset's row.

    Words stay that are written in the functions the error came through, and numbers that stand alone; anything else
    becomes ``...``. Where the interpreter itself raised (``could not convert string to float: 'a row'``), only what it
    quotes is looked at, because the rest is its own wording.
    """
    known = frozenset(_words_of(error))
    text = str(error)
    if _by_the_interpreter(error):
        shown = _QUOTED.sub(lambda match: _known_only(match[0], known | _KINDS), text)
    else:
        shown = _known_only(text, known)
    return redacted(_ELLIPSES.sub("...", shown))


def _known_only(text: str, known: frozenset[str]) -> str:
    return re.sub(r"\S+", lambda match: match[0] if _is_known(match[0], known) else "...", text)


def _is_known(token: str, known: frozenset[str]) -> bool:
    if token.strip(string.punctuation) in known:
        return True
    numbers = [part for part in _PART.findall(token) if part[0].isdigit()]
    words = [part for part in _PART.findall(token) if not part[0].isdigit()]
    return len(numbers) < 2 and known.issuperset(words) and _BARE.fullmatch(_PART.sub("", token)) is not None


def _words_of(error: BaseException) -> Iterator[str]:
    """Yield the words of the code that an error came through, and of its own class."""
    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    makers = [vars(kind).get(name) for kind in type(error).__mro__ for name in ("__init__", "__str__")]
    for code in (*codes, *(maker.__code__ for maker in makers if isinstance(maker, FunctionType))):
        yield from (*code.co_names, *code.co_varnames)
        for literal in _literals(code.co_consts[1:]):  # the first is the docstring's
            yield from (token.strip(string.punctuation) for token in literal.split())
            yield from _PART.findall(literal)


def _literals(constants: tuple[Any, ...] | frozenset[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _literals(constant)


def _by_the_interpreter(error: BaseException) -> bool:
    """Return whether an operation or a built-in function raised an error of a built-in kind, and not a ``raise``."""
    at = error.__traceback__
    if at is None or type(error).__module__ != "builtins":
        return False
    while at.tb_next is not None:
        at = at.tb_next
    return dis.opname[at.tb_frame.f_code.co_code[at.tb_lasti]] not in _FROM_ELSEWHERE
