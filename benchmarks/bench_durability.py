"""What durability costs, and what it is worth: a step in each engine, then kill -9 in the middle of forty steps.

The peers (DBOS, LangGraph with its SQLite saver, Flyte, Temporal's local activities, Prefect) are installed by
``make peers-durability``, each into a virtual environment of its own below ``.peers/durability``; one that is not there
is left out, and said to be. A row is the median of the repetitions, ``best`` the lowest.

    python benchmarks/bench_durability.py [--steps 300] [--repetitions 5] [--kills 12] [--seeds 1 2 3] [--only NAME ...]
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from _table import machine, print_table

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".peers" / "durability"
SCRIPTS = Path(__file__).parent / "durability_peers"
PATIENCE = 300.0
"""Seconds for one process; a peer that needs longer has hung."""


@dataclass(frozen=True)
class Engine:
    """One engine and how it is asked to keep its steps.

    Attributes:
        package: whose version is shown.
        how: the modes in which forty steps are killed; none: it is not killed.
        share: of the steps asked for; the slow ones get fewer.
    """

    name: str
    script: str
    package: str
    how: tuple[str, ...] = ("",)
    share: float = 1.0

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.script == "ours" else PEERS / self.script / "bin" / "python"

    @property
    def there(self) -> bool:
        return self.python.exists()

    def command(self, what: str, directory: Path, steps: int, how: str = "") -> list[str]:
        name = f"{self.script}.py" if self.script == "ours" else f"{self.script}_peer.py"
        options = ["--directory", str(directory), "--steps", str(steps), *(["--how", how] if how else [])]
        return [str(self.python), str(SCRIPTS / name), what, *options]

    def version(self) -> str:
        asked = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        done = subprocess.run([self.python, "-c", asked], capture_output=True, text=True, check=True)
        return done.stdout.strip()


ENGINES = [
    Engine("Crucible Kitchen", "ours", "crucible-kitchen", ("sync", "behind")),
    Engine("DBOS", "dbos", "dbos"),
    Engine("LangGraph", "langgraph", "langgraph", ("sync", "async", "exit")),
    Engine("Flyte", "flyte", "flyte"),
    Engine("Temporal", "temporal", "temporalio", ()),
    Engine("Prefect", "prefect", "prefect", share=0.2),
]


# -- costs --------------------------------------------------------------------------------------------------------


def costs(engines: list[Engine], steps: int, repetitions: int) -> None:
    """Print what a step costs; engines take turns, so that a busy machine changes all of them."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(repetitions):
        for engine in engines:
            for how, micros in cost(engine, max(10, int(steps * engine.share))):
                found.setdefault((f"{engine.name} {engine.version()}", how), []).append(micros)
    ours = next((statistics.median(times) for (_, how), times in found.items() if how == "SQLite, `sync`, one lane"), 0)
    rows = [
        [name, how, statistics.median(times), min(times), statistics.median(times) / ours if ours else ""]
        for (name, how), times in found.items()
    ]
    print_table(f"A step that does nothing ({machine()})", ["engine", "kept", "µs", "best", "times our `sync`"], rows)


def cost(engine: Engine, steps: int) -> list[tuple[str, float]]:
    """Return rows of (how, microseconds) that an engine measured of itself; none if it failed, which is said."""
    with tempfile.TemporaryDirectory() as folder:
        command = engine.command("cost", Path(folder), steps)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        print(f"{engine.name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}\n", file=sys.stderr)
        return []
    return [(how, micros) for how, micros in json.loads(done.stdout.strip().splitlines()[-1])]


# -- kill -9 ------------------------------------------------------------------------------------------------------


def killed(engines: list[Engine], kills: int, seeds: list[int], steps: int) -> None:
    """Print how often steps ran that were killed in the middle of a run, again and again; a run for each seed."""
    rows = []
    for engine in engines:
        for how in engine.how:
            found = [ordeal(engine, how, kills, seed, steps) for seed in seeds]
            again = ", ".join(str(sum(1 for count in times.values() if count > 1)) for times, _ in found)
            worst = max(count for times, _ in found for count in times.values())
            ended = [end if len(times) == steps else f"{end}, {len(times)} steps" for times, end in found]
            rows.append([f"{engine.name} {how}".strip(), again, f"{worst}x", "yes" if set(ended) == {"0"} else ended])
    if rows:
        seeded = ", ".join(map(str, seeds))
        title = f"{kills} times kill -9 in a run of {steps} steps (seeds {seeded})"
        print_table(title, ["engine", "steps that ran more than once", "worst", "all steps through"], rows)


def ordeal(engine: Engine, how: str, kills: int, seed: int, steps: int) -> tuple[Counter[str], str]:
    """Start a run, kill it after one to three more steps are through, start it again, and so on; then let it end.

    Returns:
        how often the body of each step was through, and the exit code of the last process, or why it has none.
    """
    draw = random.Random(f"{seed}:{engine.name}:{how}")
    with tempfile.TemporaryDirectory() as folder:
        lines, command = Path(folder) / "through.txt", engine.command("run", Path(folder), steps, how)
        for _ in range(kills):
            with started(command) as process:
                if not reached(lines, counted(lines) + draw.randint(1, 3), process):
                    return Counter(lines.read_text().split()), "it ended before it was killed"
                time.sleep(draw.uniform(0, 0.012))  # anywhere in the next step, or in the record of the last one
                process.kill()
        with started(command) as process:
            try:
                ended = str(process.wait(PATIENCE))
            except subprocess.TimeoutExpired:
                ended = "it hung"
        return Counter(lines.read_text().split()), ended


def reached(lines: Path, wanted: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait until so many bodies were through; False if the process ended before, or hangs."""
    began = time.monotonic()
    while counted(lines) < wanted:
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            return False
        time.sleep(0.001)
    return True


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own; what it started (Prefect's server) ends with the block, like itself."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", default=[engine.script for engine in ENGINES])
    args = parser.parse_args()
    asked = [engine for engine in ENGINES if engine.script in args.only]
    there = [engine for engine in asked if engine.there]
    for engine in asked:
        if not engine.there:
            print(f"{engine.name} is not installed: make peers-durability\n")
    if args.repetitions:
        costs(there, args.steps, args.repetitions)
    if args.kills:
        killed(there, args.kills, args.seeds, 40)


if __name__ == "__main__":
    main()
