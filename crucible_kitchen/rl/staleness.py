"""What is done so that what is trained was not sampled too long ago, and which problem is drawn when.

Names and pure functions. Read next: ``crucible_kitchen.rl.pipeline``.

========= ================================================== ====================================================
policy    what it does                                       price
========= ================================================== ====================================================
aggregate at most K + 1 batches are drawn and not trained    single groups may be older than K
block     also, no update leaves a group behind that would   the learner waits for stragglers
          then be older than K
discard   groups older than K are given up when their turn   waste, and shorter rollouts are preferred
          comes
cancel    they are cancelled as soon as they are too old     as discard, with less waste
========= ================================================== ====================================================
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

from crucible_kitchen.tasks import permuted

__all__ = ["StalenessPolicy", "problem_order"]

StalenessPolicy: TypeAlias = Literal["aggregate", "block", "discard", "cancel"]


def problem_order(problems: int, seed: int, *, shuffle: bool = True) -> Callable[[int], int]:
    """Return which problem is drawn at an index: passes over all problems, each in an order of its own."""

    def order(index: int) -> int:
        epoch, place = divmod(index, problems)
        return permuted(place, problems, f"rollouts/{seed}/{epoch}") if shuffle else place

    return order
