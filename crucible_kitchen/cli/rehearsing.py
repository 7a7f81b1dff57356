"""The command ``rehearse``: how a reinforcement run would go, in simulated time, before anything is paid.

It reads a run's events or takes latencies as given; no adapter is called. Read next:
``crucible_kitchen.rl.rehearsal``.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crucible_kitchen.cli.console import answer_json, block, reporting
from crucible_kitchen.cli.options import (
    DEFAULT_HOME,
    ConfigOption,
    DebugOption,
    HomeOption,
    JsonOption,
    TargetArgument,
    Values,
)
from crucible_kitchen.errors import ConfigError

if TYPE_CHECKING:
    from crucible_kitchen.rl.rehearsal import Latencies, Rehearsal, RehearsalConfig
    from crucible_kitchen.store import RunStore

__all__ = ["rehearse"]


@reporting
def rehearse(
    target: TargetArgument,
    values: Values = None,
    config: ConfigOption = None,
    recorded: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Take the latencies from a run, by its id or the beginning of it."),
    ] = None,
    rollout_seconds: Annotated[
        float, typer.Option("--rollout-seconds", metavar="S", min=0.0, help="Mean time of a group's rollout.")
    ] = 1.0,
    rollout_sigma: Annotated[
        float, typer.Option("--rollout-sigma", metavar="X", min=0.0, help="Sigma of its log-normal.")
    ] = 0.5,
    update_seconds: Annotated[
        float, typer.Option("--update-seconds", metavar="S", min=0.0, help="Time of learning from one batch.")
    ] = 1.0,
    publish_seconds: Annotated[
        float, typer.Option("--publish-seconds", metavar="S", min=0.0, help="Time of publishing new weights.")
    ] = 0.0,
    hour_price: Annotated[
        float, typer.Option("--price-hour", metavar="PRICE", min=0.0, help="Price of an hour of the machines.")
    ] = 0.0,
    token_price: Annotated[
        float, typer.Option("--price-tokens", metavar="PRICE", min=0.0, help="Price of a million sampled tokens.")
    ] = 0.0,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001 - read by the decorator
) -> None:
    """Predict the speed and cost of a reinforcement run. Step time, overlap and staleness, in simulated time."""
    from crucible_kitchen.rl import rehearsal

    settings = _settings(target, values or [], config)
    if recorded is not None:
        latencies = _recorded(home, recorded)
    else:
        latencies = rehearsal.Latencies((), rollout_seconds, rollout_sigma, update_seconds, publish_seconds)
    prices = rehearsal.Prices(hour_price, token_price) if hour_price or token_price else None
    found = rehearsal.rehearse(settings, latencies, prices)
    if as_json:
        answer_json(found.to_json())
    else:
        _show(found)


def _settings(target: str, values: list[str], file: Path | None) -> "RehearsalConfig":
    from crucible_kitchen.cli import given
    from crucible_kitchen.config import build_config
    from crucible_kitchen.registry import Registry
    from crucible_kitchen.rl.config import LearnerConfig, RolloutConfig
    from crucible_kitchen.rl.rehearsal import RehearsalConfig
    from crucible_kitchen.workflow.recipe import Recipe

    found = given.target(Registry.discover(), target)
    cls = given.config_class(found)
    if not (issubclass(cls, RolloutConfig) and issubclass(cls, LearnerConfig)):
        raise ConfigError(f"{target!r} rolls nothing out, so there is nothing to rehearse", hint="try reinforcement")
    pairs = given.config_values(cls, values, file)
    whole: Any = found.config(pairs) if isinstance(found, Recipe) else build_config(cls, pairs)
    kept = {key: getattr(whole, key) for key in RehearsalConfig.model_fields if key in whole.model_fields_set}
    return build_config(RehearsalConfig, kept)


def _recorded(home: Path, run: str) -> "Latencies":
    from crucible_kitchen.cli.reading import read

    return read(home, partial(_latencies, run=run))


async def _latencies(store: "RunStore", *, run: str) -> "Latencies":
    """Return what a run measured.

    Raises:
        ConfigError: it rolled nothing out.
    """
    from crucible_kitchen.cli.reading import pages
    from crucible_kitchen.events import PipelineMeasured, RolloutComplete
    from crucible_kitchen.rl.rehearsal import Latencies

    rollouts: list[float] = []
    tokens, groups = 0.0, 0
    measured: PipelineMeasured | None = None
    record = await store.run(run)
    async for found in pages(store, record.run_id, 0):
        if isinstance(found.event, RolloutComplete):
            rollouts += found.event.seconds
            tokens += found.event.tokens_mean * found.event.num_trajectories
            groups += len(found.event.groups)
        elif isinstance(found.event, PipelineMeasured):
            measured = found.event
    if measured is None or not rollouts:
        raise ConfigError(f"the run {record.run_id} rolled nothing out", hint="take one of the workflow reinforcement")
    spent, steps = measured.learner_seconds, measured.step
    return Latencies(
        tuple(rollouts),
        update=spent.get("compute", 0.0) / steps,
        publish=(spent.get("publish", 0.0) + spent.get("between", 0.0)) / steps,
        tokens=tokens / groups,
    )


def _show(found: "Rehearsal") -> None:
    facts = found.to_json()
    ages = facts.pop("staleness")
    spent = facts.pop("learner_seconds")
    dropped = facts.pop("dropped")
    block("rehearsal", ((key, value) for key, value in facts.items() if value is not None))
    block("seconds of the learner", spent.items())
    block("groups by staleness", ages.items())
    if dropped:
        block("groups given up", dropped.items())
