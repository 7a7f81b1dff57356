"""Kill a real run again and again, resume it each time, and look at what it becomes.

Runs the real command line in child processes and ends them with signals at seeded places: after a random line of their
progress, or in the middle of writing a checkpoint. Read next: ``docs/promises.md``.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from crucible_kitchen.store import SqliteRunStore

__all__ = ["Chaos", "Outcome"]

_SECONDS = 300.0
"""A child that neither progresses nor ends for so long has hung."""

_LOOK = 0.004
"""Seconds between two looks at a child."""


_AGAIN = 0.25
"""Seconds until a signal is sent again: sooner it would count as the same."""


@dataclass(frozen=True)
class Outcome:
    """What a run became.

    Attributes:
        run_id: the run.
        weights: sha256 of the exported weights.
        losses: each step's loss, of the attempt that counts.
        groups: each update's groups of rollouts, of the attempt that counts.
        ledger: the last ledger of rollouts.
        result: what ``--json`` printed.
        kills: how often it was killed.
    """

    run_id: str
    weights: str
    losses: dict[int, float]
    result: dict[str, Any] = field(repr=False)
    kills: int = 0
    groups: dict[int, list[int]] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)


class Chaos:
    """One workflow, run in a home of its own.

    Args:
        arguments: of ``crucible-kitchen run``: the workflow, its config, adapters.
        home: a directory of this run's own.
        cwd: where the program runs.
        events: a child is killed at most so many events after its first.

    Example::

        calm = Chaos(["supervised", "model=tiny", "dataset=sums"], tmp / "calm").undisturbed()
        wild = Chaos(["supervised", "model=tiny", "dataset=sums"], tmp / "wild").disturbed(seed=1, kills=5)
        assert wild.weights == calm.weights
    """

    def __init__(self, arguments: Sequence[str], home: Path, cwd: Path | None = None, events: int = 60) -> None:
        self._arguments = list(arguments)
        self._home = home
        self._cwd = cwd
        self._told = home / "events.jsonl"
        self._events = events

    def undisturbed(self) -> Outcome:
        """Run to the end."""
        return self._outcome(self._ended(self._start("run", *self._arguments)), 0)

    def disturbed(self, seed: int, kills: int, signals: Sequence[signal.Signals] = (signal.SIGKILL,)) -> Outcome:
        """Run, kill and resume until it has been killed so often or is completed, then let it end.

        Args:
            seed: of the places and of the signals.
            kills: how often.
            signals: what a child is sent: SIGKILL; SIGTERM (it stops at a checkpoint) or SIGINT (it is cancelled), half
                of the time twice; SIGSTOP (it is stopped for a moment, and killed later).

        Raises:
            AssertionError: an attempt failed by itself.
        """
        draw = random.Random(seed)
        done, run_id = 0, ""
        while done < kills:
            child = self._start("resume", run_id) if run_id else self._start("run", *self._arguments)
            killed = self._killed(child, draw, draw.choice(signals))
            run_id = self._newest() or run_id
            if not killed:
                return self._outcome(self._ended(child), done)
            done += 1
        child = self._start("resume", run_id) if run_id else self._start("run", *self._arguments)
        return self._outcome(self._ended(child), done)

    def _start(self, *arguments: str) -> "subprocess.Popen[str]":
        self._told.parent.mkdir(parents=True, exist_ok=True)
        program = [
            sys.executable,
            "-m",
            "crucible_kitchen",
            *arguments,
            "--json",
            "--quiet",
            "--jsonl",
            str(self._told),
        ]
        environment = os.environ | {"CRUCIBLE_HOME": str(self._home)}
        return subprocess.Popen(
            program, cwd=self._cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def _killed(self, child: "subprocess.Popen[str]", draw: random.Random, number: signal.Signals) -> bool:
        """Kill a child at a random place; False if it ended before.

        One place in four is the first moment in which a checkpoint is being written, one in eight somewhere in the
        start (imports, opening the store, recovery), the others are so many events after the attempt's first.
        """
        kind, events, pause = draw.random(), draw.randrange(1, self._events), draw.random()
        if kind < 0.125:
            ended = _ends_within(child, 2 * pause)
        else:
            before, waited = self._events_told(), 0.0
            ended = False
            while not ended and self._events_told() - before < events and not (kind < 0.375 and self._writing()):
                ended = _ends_within(child, _LOOK)
                waited += _LOOK
                assert waited < _SECONDS, "an attempt neither progresses nor ends"
            ended = ended or _ends_within(child, pause * _LOOK)
        if not ended and number is signal.SIGSTOP:
            child.send_signal(number)
            _ends_within(child, pause)
            child.send_signal(signal.SIGCONT)
            return self._killed(child, draw, signal.SIGKILL)
        if not ended:
            child.send_signal(number)
            if number is not signal.SIGKILL and draw.random() < 0.5 and not _ends_within(child, _AGAIN):
                child.send_signal(number)
            child.wait(_SECONDS)
            ended = child.returncode == 0  # it was about to complete
            if not ended:
                child.communicate()
        return not ended

    def _events_told(self) -> int:
        return self._told.read_bytes().count(b"\n") if self._told.exists() else 0

    def _writing(self) -> bool:
        return next(self._home.glob("runs/*/.*.partial"), None) is not None

    def _newest(self) -> str:
        """Return the run's id, or nothing where its process was killed before there was one."""

        async def look() -> str:
            async with SqliteRunStore(self._home / "runs.db") as store:
                found = await store.runs(1)
                return found[0].run_id if found else ""

        return anyio.run(look)

    def _ended(self, child: "subprocess.Popen[str]") -> dict[str, Any]:
        out, err = child.communicate(timeout=_SECONDS)
        if child.returncode and "[run.ended]" in err:  # the kill came after the run's end, before the process's
            return dict(self._told_by("show", self._newest()))
        assert child.returncode == 0, f"exit code {child.returncode}: {err[-2000:]}"
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def _outcome(self, result: dict[str, Any], kills: int) -> Outcome:
        weights = [artifact["sha256"] for artifact in result["artifacts"] if artifact["kind"] == "weights"]
        told = self._told_by("events", result["run_id"])
        return Outcome(
            result["run_id"],
            weights[-1] if weights else "",
            {record["step"]: record["loss"] for record in told if record["event"] == "training.step"},
            result,
            kills,
            {r["rollout_index"]: r["groups"] for r in told if r["event"] == "rl.rollout_complete"},
            next((r["ledger"] for r in reversed(told) if r["event"] == "rl.pipeline"), {}),
        )

    def _told_by(self, command: str, run_id: str) -> Any:
        program = [sys.executable, "-m", "crucible_kitchen", command, run_id, "--json"]
        environment = os.environ | {"CRUCIBLE_HOME": str(self._home)}
        told = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=_SECONDS)
        return json.loads(told.stdout.splitlines()[-1])


def _ends_within(child: "subprocess.Popen[str]", seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
