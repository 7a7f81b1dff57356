"""Real processes over one store: races for a run, a stopped owner, kills at any moment.

Processes are driven through pipes, so that nothing depends on time: a process has done what it answered for.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from crucible_kitchen.events import EventRecord, WarningRaised
from crucible_kitchen.store import SqliteRunStore

pytestmark = pytest.mark.anyio

CREW = Path(__file__).parent / "crew.py"


class Worker:
    """A process that does what it is told (``crew.py``)."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, str(CREW), str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.read() == "ready"

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.send(line)
        return self.read()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and return once the process stands still."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def kill(self) -> list[str]:
        """SIGKILL, and return what it still said."""
        self.process.kill()
        out, _ = self.process.communicate()
        return out.split("\n")[:-1]  # the last line may be torn


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Starts processes over one store, and ends them."""
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(tmp_path / "runs.db"))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


async def look(path: Path, ask: Callable[[SqliteRunStore], Any]) -> Any:
    async with SqliteRunStore(path) as store:
        return await ask(store)


def races(workers: list[Worker], path: Path, rounds: int) -> None:
    """Let processes race for a run, again and again; each time one of them gets it, under the next epoch."""
    owner = workers[0]
    assert owner.ask("create r") == "1"
    assert owner.ask("finish paused") == "paused"
    wins = [0] * len(workers)
    for number in range(rounds):
        for one in workers:
            one.send("open r")
        answers = [one.read() for one in workers]
        epoch = str(number + 2)
        assert sorted(answers) == sorted([epoch, *["run.live"] * (len(workers) - 1)]), f"round {number}"
        winner = answers.index(epoch)
        wins[winner] += 1
        for one in workers:  # those that lost cannot write, whatever they had before
            one.send("append")
        told = [one.read() for one in workers]
        assert told[winner] == str(number + 1)
        assert all(answer.startswith(("run.ended", "not_found")) for i, answer in enumerate(told) if i != winner)
        assert workers[winner].ask("finish failed") == "failed"
    assert all(wins), f"no race: {wins}"


def test_of_two_processes_that_open_a_run_at_once_exactly_one_gets_it(worker: Any, tmp_path: Path) -> None:
    races([worker(), worker()], tmp_path / "runs.db", 50)
    records = anyio.run(look, tmp_path / "runs.db", lambda store: store.read("r", 0, 1000))
    assert [r.seq for r in records] == list(range(1, 51))
    assert [r.event.message for r in records] == [f"attempt {n}" for n in range(2, 52)]


@pytest.mark.e2e
def test_a_thousand_races_have_one_winner_each(worker: Any, tmp_path: Path) -> None:
    races([worker(), worker(), worker()], tmp_path / "runs.db", 1000)


def test_processes_that_look_for_orphans_at_once_find_each_once(worker: Any, tmp_path: Path) -> None:
    victim = worker()
    names = [f"r{i}" for i in range(8)]
    for name in names:
        assert victim.ask(f"create {name}") == "1"
    assert worker().ask("reconcile") == "none"
    victim.kill()
    lookers = [worker() for _ in range(3)]
    for one in lookers:
        one.send("reconcile")
    found = [name for one in lookers for name in one.read().split() if name != "none"]
    assert sorted(found) == names


def test_an_owner_that_is_stopped_past_its_lease_writes_nothing_when_it_wakes(worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    owner = worker()
    assert owner.ask("create r") == "1"
    assert owner.ask("append 3") == "3"
    owner.stop()
    for line in ("append", "record", "checkpoint 1", "artifact", "renew", "finish completed"):
        owner.send(line)  # asked before, done when it wakes

    async def take_over() -> int:
        async with SqliteRunStore(path, clock=lambda: time.time() + 3600.0) as store:
            lease = await store.open_attempt("r")
            store.append([EventRecord("r", lease.seq + 1, 0.0, WarningRaised(code="c", message="attempt 2"))])
            await store.flush("r", lease.seq + 1)
            owner.signal(signal.SIGCONT)
            answers = [await anyio.to_thread.run_sync(owner.read) for _ in range(6)]
            assert answers == ["run.lease_lost"] * 6
            assert [r.event.message for r in await store.read("r", 0, 99)] == ["attempt 1"] * 3 + ["attempt 2"]
            assert (await store.records("r"), await store.checkpoints("r"), await store.artifacts("r")) == ([], [], [])
            assert (await store.run("r")).status == "running"
            await store.finish_run("r", "completed", {})
            return lease.epoch

    assert anyio.run(take_over) == 2


def test_an_owner_that_is_stopped_keeps_its_run_until_its_lease_ends(worker: Any) -> None:
    owner, other = worker(), worker()
    assert owner.ask("create r 3600") == "1"
    owner.stop()
    assert other.ask("open r") == "run.live"
    assert other.ask("reconcile") == "none"
    owner.signal(signal.SIGCONT)
    assert owner.ask("append") == "1"


def kills(worker: Callable[[], Worker], path: Path, rounds: int, seed: int) -> None:
    """Kill the writer again and again; whatever it said is durable is there, and nothing is torn."""
    chance = random.Random(seed)
    first = worker()
    assert first.ask("create r") == "1"
    first.kill()
    promised: set[int] = set()
    for number in range(rounds):
        hand = worker()
        assert hand.ask("open r") == str(number + 2)
        hand.send("on")
        promised |= {int(hand.read()) for _ in range(chance.randrange(1, 40))}
        promised |= {int(line) for line in hand.kill()}
        anyio.run(_intact, path, promised, number + 2)


async def _intact(path: Path, promised: set[int], attempts: int) -> None:
    async with SqliteRunStore(path) as store:
        events = [record.seq for record in await store.read("r", 0, 1_000_000)]
        assert events == list(range(1, len(events) + 1))
        assert promised <= set(events)
        stages = {record.value for record in await store.records("r")}
        assert promised <= stages <= set(events)
        saved = await store.checkpoints("r")
        assert not any(checkpoint.damaged for checkpoint in saved)
        assert {checkpoint.number for checkpoint in saved} >= {seq // 10 for seq in promised if seq % 10 == 0}
        assert len(await store.attempts("r")) == attempts


def test_what_was_promised_survives_kills_at_any_moment(worker: Any, tmp_path: Path) -> None:
    kills(worker, tmp_path / "runs.db", 5, seed=1)


def test_a_process_that_is_killed_before_any_statement_leaves_a_whole_store(tmp_path: Path) -> None:
    command = [sys.executable, str(CREW.with_name("dying.py")), str(tmp_path / "runs.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    *deaths, last = done.stdout.splitlines()
    assert (last, done.stderr) == ("lived", ""), done.stderr
    assert deaths == [f"died at {n}" for n in range(1, len(deaths) + 1)]
    assert len(deaths) > 40


@pytest.mark.e2e
def test_what_was_promised_survives_many_kills(worker: Any, tmp_path: Path) -> None:
    kills(worker, tmp_path / "runs.db", 40, seed=2)
