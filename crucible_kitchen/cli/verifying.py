"""The command that repeats a run and says whether it gives the same bits: ``verify``.

The run is executed again from its manifest in a home of its own, which is gone afterwards; nothing of the original is
touched. Read next: ``crucible_kitchen.cli.comparing``.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from crucible_kitchen.cli.comparing import Seen, comparison, seen
from crucible_kitchen.cli.console import FAILED, answer, answer_json, reporting, say
from crucible_kitchen.cli.options import DEFAULT_HOME, AdapterOption, HomeOption, JsonOption, QuietOption
from crucible_kitchen.cli.reading import read
from crucible_kitchen.cli.running import Ended, Start, chosen_sinks, to_its_end
from crucible_kitchen.errors import RunChanged, RunNotReproducible

if TYPE_CHECKING:
    from crucible_kitchen.types import JsonObject

__all__ = ["verify"]


@reporting
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or the beginning of it.")],
    adapter: AdapterOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Execute a finished run again and compare, bit for bit.

    It is started from its manifest. Weights, the losses of every step and the final measurements are compared. Exit
    codes: 0 the same, 1 not the same, 2 it cannot be repeated (not completed, not reproducible, other code or versions
    than it was made with).
    """
    from crucible_kitchen.cli import given
    from crucible_kitchen.kitchen import Kitchen
    from crucible_kitchen.plans import chosen_before
    from crucible_kitchen.registry import Registry

    original = read(home, partial(seen, run_id=run))
    manifest = repeatable(original)
    registry = Registry.discover()
    target = given.target(registry, str(manifest["target"]))
    adapters = {**chosen_before(dict(manifest)), **given.adapters(registry, adapter or [])}
    order = Start(target, dict(manifest["config"]), adapters, str(manifest["target"]))
    elsewhere = Path(tempfile.mkdtemp(prefix="crucible-verify-"))
    try:
        kitchen = Kitchen(home=elsewhere, sinks=chosen_sinks(None, None, quiet=quiet))
        ended = anyio.run(partial(again, kitchen, order, original.run_id, manifest))
        if ended.error is not None:
            raise ended.error
        repeated = read(elsewhere, partial(seen, run_id=str(ended.run_id)))
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
    facts = verdict(original, repeated)
    for line in facts["says"]:
        answer(line)
    if as_json:
        answer_json(facts)
    if not facts["same"]:
        raise typer.Exit(FAILED)


def repeatable(original: Seen) -> "JsonObject":
    """Return the manifest of a run that can be repeated.

    Raises:
        RunNotReproducible: it is not completed, or its manifest says that it cannot be repeated exactly.
    """
    if original.status != "completed":
        raise RunNotReproducible(
            f"the run {original.run_id} is {original.status}: only a completed run has a result to compare",
            hint=f"finish it first: crucible-kitchen resume {original.run_id}",
        )
    manifest = dict(original.manifest)
    if not manifest.get("reproducible"):
        why = manifest.get("reproducible_because", "its manifest does not say that it is reproducible")
        raise RunNotReproducible(f"the run {original.run_id} cannot be repeated exactly: {why}")
    return manifest


async def again(kitchen: Any, order: Start, run_id: str, manifest: "JsonObject") -> Ended:
    """Run the order, unless what it would run is not what was run.

    Raises:
        RunChanged: workflow, code, versions or adapters differ.
    """
    from crucible_kitchen.manifest import differences

    planned = kitchen.check(order.target, order.config, adapters=order.adapters).manifest
    if changed := differences(manifest, dict(planned)):
        raise RunChanged(run_id, changed)
    say(f"executing {run_id} again in a directory of its own")
    return await to_its_end(kitchen, order)


def verdict(original: Seen, repeated: Seen) -> dict[str, Any]:
    """Return whether two runs gave the same, and in what they differ."""
    found = comparison(original, repeated)
    measured = {name: pair for name, pair in found["metrics"].items() if pair[0] != pair[1]}
    same = found["same_weights"] is not False and found["same_steps"] is not False and not measured
    says = [f"run {original.run_id}: the repetition is " + ("the same, bit for bit" if same else "NOT the same")]
    if found["same_weights"] is not None:
        says.append(f"  weights  {'the same' if found['same_weights'] else 'differ'}")
    for name, course in found["steps"].items():
        where = "" if course["same"] else f", first at step {course['differs_at']}"
        says.append(f"  {name}  {'the same' if course['same'] else 'differs'}{where} ({course['steps'][0]} steps)")
    says += [f"  {name}  {before} / {after}" for name, (before, after) in measured.items()]
    return {"run_id": original.run_id, "same": same, "says": says, "differs": measured} | {
        key: found[key] for key in ("same_weights", "same_steps")
    }
