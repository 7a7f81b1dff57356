"""Records of what is done: a stage outside a session's block, or a session's whole block, runs once in a run's life.

Inside a session's block the record is the checkpoint. Knows the run's memory, not where it is kept. Read next:
``crucible_kitchen.workflow.checkpoints``.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from crucible_kitchen.config import RunConfig
from crucible_kitchen.errors import ReplayMismatch, StageFailed
from crucible_kitchen.types import JsonObject
from crucible_kitchen.workflow.binding import binder_of
from crucible_kitchen.workflow.forward import decoded, static
from crucible_kitchen.workflow.frame import Frame, Origin
from crucible_kitchen.workflow.memory import Made, Recorded
from crucible_kitchen.workflow.nodes import Workflow, steps
from crucible_kitchen.workflow.run import RunContext
from crucible_kitchen.workflow.stage import Step, signature_of
from crucible_kitchen.workflow.values import digest, to_json

__all__ = ["Records", "entry"]


def entry(name: str, value: Any, origin: Origin, where: str) -> JsonObject:
    """Return a value of the state as it is kept.

    Raises:
        StageFailed: it cannot be kept; says who wrote it.
    """
    try:
        return {"writer": origin.writer, "hash": origin.hash, "value": to_json(value)}
    except TypeError as error:
        raise StageFailed(
            f"{name!r} cannot be recorded: {error}",
            hint="make its stage a resource, or return a reference",
            where=where,
        ) from None


class Records:
    """The records of one run, as the engine asks for them."""

    def __init__(self, workflow: Workflow, context: RunContext) -> None:
        self._workflow = workflow
        self._context = context
        self._memory = context.memory
        self._configs: dict[tuple[int, Any], str] = {}

    @cached_property
    def types(self) -> Mapping[str, Any]:
        """The declared type of what each stage writes, by its path without turns."""
        return {path: step.write_type for path, step in steps(self._workflow)}

    def kept(self, frame: Frame) -> bool:
        """Return whether stages are recorded here."""
        return self._memory is not None and not frame.sessions

    def input_hash(self, fn: Callable[..., Any], frame: Frame, path: str) -> str:
        """Return the hash of everything a function reads at a place: of its config part, and of its state."""
        state = hashlib.sha256(path.encode())
        for name in binder_of(fn).names:
            origin = frame.origins.get(name)
            state.update(f"\0{name}\0{origin.hash if origin else ''}".encode())
        return f"{self._config_hash(fn, frame.config)}:{state.hexdigest()}"

    def _config_hash(self, fn: Callable[..., Any], config: RunConfig) -> str:
        kinds = [p.type for p in signature_of(fn).parameters if p.name == "config"]
        if not kinds:
            return ""
        kind = kinds[0] if isinstance(kinds[0], type) and issubclass(kinds[0], RunConfig) else type(config)
        known = self._configs.get((id(config), kind))
        if known is None:
            known = digest(config.model_dump(mode="json", include=set(kind.model_fields)))
            self._configs[id(config), kind] = known
        return known

    # -- stages ---------------------------------------------------------------------------------------------------

    def replay(self, step: Step, frame: Frame, path: str) -> bool:
        """Put what a stage wrote in an earlier attempt into the state; False if there is no record of it.

        Raises:
            ReplayMismatch: it would read something else today.
        """
        recorded = self._memory.recall(path) if self._memory is not None else None
        if recorded is None:
            return False
        self._compare(recorded, self.input_hash(step.fn, frame, path))
        if step.writes is not None and "value" in recorded.value:
            kept = {"writer": static(path), "hash": recorded.output_hash, "value": recorded.value["value"]}
            for name, (value, origin) in decoded({step.writes: kept}, self.types).items():
                frame.write(name, value, origin)
        self._context.made(recorded.value.get("metrics", {}), recorded.value.get("artifacts", ()))
        return True

    def keep(self, step: Step, frame: Frame, path: str, value: Any, made: Made) -> None:
        """Record what a stage wrote, and put it into the state.

        Raises:
            StageFailed: it cannot be recorded.
        """
        written: JsonObject = {"value": None}
        if step.writes is not None:
            written = {"value": entry(step.writes, value, Origin("", static(path)), path)["value"]}
        output = digest(written["value"])
        self._record(step, frame, path, written, output, made)
        if step.writes is not None:
            frame.write(step.writes, value, Origin(output, static(path)))

    def keep_skipped(self, step: Step, frame: Frame, path: str) -> None:
        """Record that a stage failed and was skipped, so that it is skipped in every later attempt too."""
        self._record(step, frame, path, {"skipped": True}, "", Made())

    def _record(self, step: Step, frame: Frame, path: str, written: JsonObject, output: str, made: Made) -> None:
        assert self._memory is not None
        if made.metrics:
            written["metrics"] = made.metrics
        if made.artifacts:
            written["artifacts"] = made.artifacts
        self._memory.record(Recorded(path, self.input_hash(step.fn, frame, path), output, written))

    def _compare(self, recorded: Recorded, now: str) -> None:
        (config, state), (config_now, state_now) = recorded.input_hash.split(":"), now.split(":")
        if state != state_now or (config != config_now and not self._context.allowed):
            what = "the state it reads" if state != state_now else "its config"
            raise ReplayMismatch(
                f"{recorded.path} is recorded, but {what} is not what it was: recorded {recorded.input_hash[:8]}, "
                f"now {now[:8]}",
                hint="the workflow or its code has changed: start a new run",
                where=recorded.path,
            )

    # -- blocks ---------------------------------------------------------------------------------------------------

    def replay_block(self, frame: Frame, path: str) -> bool:
        """Put what a session's block wrote in an earlier attempt into the state; False if it was not done."""
        recorded = self._memory.recall(path) if self._memory is not None and not frame.sessions else None
        if recorded is None or "block" not in recorded.value:
            return False
        for name, (value, origin) in decoded(recorded.value["block"], self.types).items():
            frame.write(name, value, origin)
        self._context.made(recorded.value["metrics"], recorded.value["artifacts"])
        return True

    def keep_block(self, frame: Frame, path: str, before: Mapping[str, Origin]) -> None:
        """Record that the block of a session is done, with what it wrote.

        What it wrote is told by where it came from: a stage may write the very value that it found.
        """
        if self._memory is None:
            return
        block: JsonObject = {}
        for name, origin in list(frame.origins.items()):
            if origin.writer is None or before.get(name) is origin:
                continue
            kept = entry(name, frame.values[name], origin, path)
            block[name] = kept | {"hash": digest(kept["value"])}
            frame.origins[name] = Origin(block[name]["hash"], origin.writer)
        context = self._context
        made = {"metrics": dict(context.metrics), "artifacts": [to_json(a) for a in context.artifacts]}
        self._memory.record(Recorded(path, ":", digest(block), {"block": block} | made))
