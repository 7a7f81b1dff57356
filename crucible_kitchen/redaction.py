"""What must not be told: known secrets, and the values that an error message of somebody else's code quotes.

Pure functions over text, and the set of this process's secrets. It knows no adapter and no event. Read next:
``crucible_kitchen.workflow.failures``.
"""

import re
from typing import Any

__all__ = ["redacted", "remember_secret", "without_values"]

HIDDEN = "***"
_SHORTEST = 6
"""A shorter secret is no secret, and blacking it out would garble words."""

_secrets: set[str] = set()

_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
_NAME = re.compile(r"[\w./:\-\[\]]{0,80}")
_PYDANTIC = re.compile(r"input_value=.*?, input_type=")


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
    """Return another code's error message without the values that it quotes, and without known secrets.

    ``could not convert string to float: 'a row of data'`` is how such messages quote a dataset's rows. A quoted name, a
    path, a number (one word) stays: it says what is wrong.
    """
    text = _PYDANTIC.sub("input_value=..., input_type=", text)

    def shown(match: re.Match[str]) -> str:
        inner = match[1] if match[1] is not None else match[2]
        return match[0] if _NAME.fullmatch(inner) else f"{match[0][0]}...{match[0][0]}"

    return redacted(_QUOTED.sub(shown, text))
