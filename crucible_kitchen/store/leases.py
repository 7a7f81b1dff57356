"""The rule of one owner per run, and the errors of those who break it. Both stores decide by it.

It knows no store. Read next: ``crucible_kitchen.store.base``.
"""

from datetime import UTC, datetime

from crucible_kitchen.errors import LeaseLost, RunEnded, RunLive
from crucible_kitchen.store.owner import Owner

__all__ = ["GIVEN_UP", "held", "lease_lost", "orphaned", "run_ended", "run_live"]

GIVEN_UP = float("-inf")
"""The end of a lease whose owner will not write again."""


def held(owner: Owner, until: float, now: float) -> bool:
    """Return whether a lease still keeps others off.

    The end of a lease decides alone where the owner cannot be seen. An owner known to be dead has lost it before; one
    that is stopped, or whose machine is slow, keeps it until then, and its writes are refused after somebody took over.
    """
    return now < until and owner.alive() is not False


def orphaned(owner: Owner, until: float, now: float) -> bool:
    """Return whether nobody is there who could go on.

    A lease may be taken as soon as it is not held; but a living owner that was only late (its machine slept, its loop
    was busy) is no orphan: it goes on unless somebody asked for its run.
    """
    return until == GIVEN_UP or (not held(owner, until, now) and owner.alive() is not True)


def lease_lost(run_id: str, epoch: int | None) -> LeaseLost:
    """Return the error of a write by an attempt that no longer has its run, or that was never opened here."""
    if epoch is None:
        return LeaseLost(
            f"the run {run_id!r} is not open for writing here", hint="another process has it; resume it when it ended"
        )
    return LeaseLost(
        f"attempt {epoch} no longer has the run {run_id!r}: it was taken over, or found without an owner",
        hint=f"see who has it: `crucible-kitchen show {run_id}`",
    )


def run_live(run_id: str, owner: Owner, since: float, until: float) -> RunLive:
    """Return the error of taking a run that somebody has."""
    return RunLive(
        f"{owner} has the run {run_id!r} since {_moment(since)}",
        hint=f"wait until it ends; unless renewed, its lease ends {_moment(until)}",
    )


def run_ended(run_id: str, status: str) -> RunEnded:
    """Return the error of going on with a run that has ended."""
    return RunEnded(f"the run {run_id!r} has already ended: {status}", hint="start a new one")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
