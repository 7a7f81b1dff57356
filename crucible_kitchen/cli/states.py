"""A run's checkpoint as something to talk with: ``RUN@STEP``, or a run that has exported nothing yet.

It reads the run store. Read next: ``crucible_kitchen.cli.sample``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crucible_kitchen.errors import ModelNotFound

if TYPE_CHECKING:
    from crucible_kitchen.store import Checkpoint
    from crucible_kitchen.types import SessionSpec, StateRef

__all__ = ["SavedModel", "saved_model"]


@dataclass(frozen=True)
class SavedModel:
    """The session a checkpoint was taken of, and its state; None before the first step."""

    spec: "SessionSpec"
    state: "StateRef | None"


async def saved_model(name: str, home: Path, directory: Path) -> SavedModel | None:
    """Return what ``RUN@STEP``, or a run without an export, means; None for every other name.

    Args:
        name: as given on the command line.
        home: where runs are.
        directory: for the session's own files.

    Raises:
        RunNotFound: there is no such run.
        ModelNotFound: the run has no checkpoint, or none of this step.
    """
    from crucible_kitchen.config import ModelConfig
    from crucible_kitchen.store import SqliteRunStore
    from crucible_kitchen.types import SessionSpec, StateRef

    run, at, step = name.partition("@")
    path = home / "runs" / run
    known_run = path.is_dir() and (home / "runs.db").is_file()
    if "/" in name or not known_run or (not at and (path / "export").is_dir()):
        return None
    async with SqliteRunStore(home / "runs.db") as store:
        record = await store.run(run)
        kept = _chosen(run, step, [c for c in await store.checkpoints(record.run_id) if not c.damaged])
    values = {key: record.config[key] for key in ModelConfig.model_fields if key in record.config}
    config = ModelConfig.model_validate(values)
    spec = SessionSpec(
        config.model,
        config.lora(),
        config.seed,
        str(directory),
        chat_template=config.chat_template,
        value_head=record.config.get("advantage") == "gae",
    )
    found = kept.states.get(kept.session) or next(iter(kept.states.values()), None)
    return SavedModel(spec, StateRef(**found) if found else None)


def _chosen(run: str, step: str, checkpoints: "list[Checkpoint]") -> "Checkpoint":
    """Return the newest checkpoint, or the one of a step."""
    wanted = [c for c in checkpoints if not step or str(c.step) == step]
    if wanted:
        return wanted[0]
    steps = ", ".join(str(c.step) for c in reversed(checkpoints))
    raise ModelNotFound(
        f"the run {run} has no checkpoint of step {step}"
        if step
        else f"the run {run} has neither export nor checkpoint",
        hint=f"it has checkpoints of the steps {steps}"
        if steps
        else f"`crucible-kitchen show {run}` shows how it went",
    )
