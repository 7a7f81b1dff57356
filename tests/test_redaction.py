"""What another code's error may say: the words of that code, and nothing that was put into them."""

import asyncio
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.redaction import message_of


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def fail(error: BaseException) -> None:
    raise error


def plainly(row: str) -> None:
    raise ValueError(f"the row {row!r} is bad: loss={0.25:.2f} at step 12, isn't it? (see {row})")


def awaited(row: str) -> None:
    async def wait() -> None:
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(ValueError(f"about {row}"))
        await answer

    asyncio.run(wait())


class Unfit(Exception):
    def __str__(self) -> str:
        return f"unfit: {self.args[0]}"


ROW, SUM, SNOWMAN = " ".join(["pelican", "sings"]), "+".join(["12", "34="]), chr(0x2603)
"""Rows: the functions that raise do not hold them."""


SAYS = [
    (lambda: plainly(ROW), "the row ... is bad: loss=0.25 at step 12, isn't it? (see ..."),
    (lambda: awaited(ROW), "about ..."),
    (lambda: fail(Unfit(ROW)), "unfit: ..."),
    (lambda: fail(ValueError(ROW)), "..."),
    (lambda: fail(ValueError(SUM)), "..."),
    (lambda: fail(ValueError(12)), "12"),
    (lambda: fail(ValueError(SNOWMAN)), "..."),
    (lambda: fail(ValueError()), ""),
    (lambda: float(ROW), "could not convert string to float: ..."),
    (lambda: int(ROW.encode()), "invalid literal for int() with base 10: b..."),
    (lambda: {}[ROW], "..."),
    (lambda: {}["promt"], "'promt'"),
    (lambda: ROW.encode().undefined, "'bytes' object has no attribute 'undefined'"),  # type: ignore[attr-defined]
    (lambda: 1 + ROW, "unsupported operand type(s) for +: 'int' and 'str'"),  # type: ignore[operator]
    (lambda: json.loads("{" + ROW), "Expecting ... line 1 column 2 (char 1)"),
]


@pytest.mark.parametrize(("act", "says"), SAYS)
def test_an_error_says_what_its_code_says_and_not_what_was_put_into_it(act: Callable[[], object], says: str) -> None:
    assert message_of(raised(act)) == says


@given(st.text())
def test_no_row_whatever_it_looks_like_is_told(row: str) -> None:
    for act in (plainly, awaited, float, {}.__getitem__, lambda row: fail(Unfit(row))):
        said = message_of(raised(lambda act=act: act(f"{ROW}{row} {ROW}")))
        assert "pelican" not in said
        assert "sings" not in said
