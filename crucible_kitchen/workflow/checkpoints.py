"""Checkpoints: the place in the tree, the state folded so far, and the sessions' saved states, as one thing.

A checkpoint belongs to the outermost open session that recovers by rollback, and covers the block that opened it. It is
taken between two stages and written beside what follows. Read next: ``crucible_kitchen.workflow.forward``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import anyio
import anyio.abc

from crucible_kitchen.errors import IntegrityError, StageFailed, StageTimeout
from crucible_kitchen.events import TrainingCheckpoint, WarningRaised, WorkflowRolledBack
from crucible_kitchen.ports import Pending
from crucible_kitchen.types import BlobRef, JsonObject, StateRef
from crucible_kitchen.workflow.failures import as_ours
from crucible_kitchen.workflow.forward import Forward
from crucible_kitchen.workflow.frame import Block, Frame, OpenSession
from crucible_kitchen.workflow.memory import Keep, Memory, Saved
from crucible_kitchen.workflow.records import entry
from crucible_kitchen.workflow.run import RunContext
from crucible_kitchen.workflow.values import to_json

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run, as the engine asks for them.

    Args:
        context: what the run's stages share.
        memory: where checkpoints are kept.
        group: in which they are written.
        failed: told of a checkpoint that could not be written, with the frame and block it belongs to.
    """

    def __init__(
        self,
        context: RunContext,
        memory: Memory,
        group: anyio.abc.TaskGroup,
        failed: Callable[[Frame, Block, Exception], None],
    ) -> None:
        self._context = context
        self._memory = memory
        self._group = group
        self._failed = failed
        self._numbers = max((saved.number for saved in memory.checkpoints()), default=0)

    # -- taking ---------------------------------------------------------------------------------------------------

    async def take(self, frame: Frame, place: str, keep: Keep) -> None:
        """Save where the walk is: returns once training may go on; at most one is being written at a time.

        Raises:
            StageFailed: an open session is used by other branches too, or a value of the state cannot be recorded.
            StageTimeout: a session did not take the order to save within ``stage_timeout``.
        """
        first = frame.sessions[0]
        if frame.fenced:
            raise StageFailed(
                f"a session that was opened outside a Parallel ({first.path}) cannot be saved inside it",
                hint="open it in the branch, or take the checkpoint outside",
                where=place,
            )
        await self.settle(first)
        self._numbers += 1
        number, step = self._numbers, first.session.position
        data = self._folded(frame, first) | {"score": keep.score, "keep": asdict(keep)}
        pendings: dict[str, Pending[StateRef]] = {}
        with _in_time(frame, "the checkpoint was not begun", place):
            for index, opened in enumerate(frame.sessions):
                if opened.session.position != opened.opened_at:
                    name = f"checkpoint-{number:06d}" + (f"-{index}" if index else "")
                    pendings[opened.path] = await opened.session.save_state(name)
        first.written = anyio.Event()
        begun = Saved(number, first.path, place, step, data, {}, self._memory.seq)
        self._group.start_soon(self._write, frame, begun, pendings, keep)

    async def settle(self, session: OpenSession) -> None:
        """Return once no checkpoint of a session is being written."""
        if session.written is not None:
            await session.written.wait()

    async def _write(self, frame: Frame, begun: Saved, pendings: Mapping[str, Pending[StateRef]], keep: Keep) -> None:
        first = frame.sessions[0]
        try:
            with _in_time(frame, "the checkpoint was not saved", begun.place):
                states = {path: await pending for path, pending in pendings.items()}
            saved = replace(begun, states=states)
            await self._memory.keep(saved)
            self._tell(saved)
            await self._drop_old(frame, keep)
        except Exception as error:  # noqa: BLE001 - raised by the block that the checkpoint belongs to
            self._failed(frame, first.block, as_ours(error, begun.place))
        finally:
            assert first.written is not None
            first.written.set()

    def _tell(self, saved: Saved) -> None:
        uri = next((state.uri for state in saved.states.values()), "")
        for artifact in artifacts_of(saved):
            self._context.add_artifact(artifact)
        self._context.emit(TrainingCheckpoint(step=saved.step, path=uri))

    # -- keeping --------------------------------------------------------------------------------------------------

    async def _drop_old(self, frame: Frame, keep: Keep) -> None:
        """Forget the checkpoints that need not be kept: first the record, then the states, so that none dangles."""
        sessions = {opened.path: opened.session for opened in frame.sessions}
        for saved in superfluous(self._memory.checkpoints(frame.sessions[0].path), keep):
            await self._memory.forget(saved)
            with _in_time(frame, "an old checkpoint was not deleted", saved.place):
                for path, state in saved.states.items():
                    holder = sessions.get(path)
                    if holder is not None:
                        await holder.delete_state(state)
            for artifact in artifacts_of(saved):
                self._context.drop_artifact(artifact)

    # -- folding --------------------------------------------------------------------------------------------------

    def _folded(self, frame: Frame, first: OpenSession) -> JsonObject:
        """Return everything but the sessions' own states, as JSON."""
        frames, blocks = list(_frames(frame, first)), list(_blocks(frame, first))
        values = {
            f.base: {n: entry(n, f.values[n], o, f.prefix) for n, o in f.origins.items() if o.writer is not None}
            for f in frames
        }
        entered = [(loop.path, loop.reads) for loop in frame.loops]
        entered += [(live.path, live.reads) for block in blocks for live in block.live]
        return {
            "values": values,
            "live": [live.path for block in blocks for live in block.live],
            "loops": {loop.path: {"index": loop.index, "position": to_json(loop.now())} for loop in frame.loops},
            "reads": {path: changed for path, reads in entered if (changed := _changed(frame, reads, path))},
            "metrics": dict(self._context.metrics),
            "artifacts": [to_json(a) for a in self._context.artifacts if a.kind != "checkpoint"],
        }

    # -- returning ------------------------------------------------------------------------------------------------

    async def restore(self, opened: OpenSession, types: Mapping[str, Any]) -> Forward | None:
        """Load a session's newest checkpoint that is whole; None where there is none.

        What came after it in the log is superseded, and the log says so.
        """
        if self._memory.attempt == 1 and not self._memory.checkpoints(opened.path):
            return None
        for saved in self._memory.checkpoints(opened.path):
            forward = Forward(saved, types)
            try:
                await self.load(opened, forward)
            except IntegrityError as error:
                text = f"the checkpoint of step {saved.step} cannot be used: {error.message}"
                self._context.emit(WarningRaised(code="checkpoint.damaged", message=text, path=opened.path))
                await self._memory.forget(saved)
                continue
            forward.restore(opened.frame)
            self._context.made(saved.data["metrics"], saved.data["artifacts"])
            for kept in reversed(self._memory.checkpoints(opened.path)):
                for artifact in artifacts_of(kept):
                    self._context.add_artifact(artifact)
            await self._drop_old(opened.frame, Keep(**saved.data["keep"]))  # in case it died before it could
            self._roll_back(opened, saved.place, saved.step, saved.seq)
            return forward
        self._roll_back(opened, "", opened.opened_at, 0)
        return None

    async def load(self, opened: OpenSession, forward: Forward) -> None:
        """Load a session's state of a checkpoint, if it had moved by then.

        Raises:
            IntegrityError: the state is damaged or gone.
            StageTimeout: it was not loaded within ``stage_timeout``.
        """
        state = forward.saved.states.get(opened.path)
        if state is not None:
            with _in_time(opened.frame, "the checkpoint was not loaded", forward.saved.place):
                await opened.session.load_state(state)

    def _roll_back(self, opened: OpenSession, place: str, step: int, after: int) -> None:
        self._context.emit(WorkflowRolledBack(session=opened.path, place=place, step=step, after=after))


@contextmanager
def _in_time(frame: Frame, otherwise: str, place: str) -> Iterator[None]:
    """Give a backend as long as a stage has.

    Raises:
        StageTimeout: that was too short.
    """
    seconds = frame.config.stage_timeout
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        hint = "raise the config key stage_timeout, if the backend needs longer"
        raise StageTimeout(f"{otherwise} within {seconds:g} s", hint=hint, where=place)


def superfluous(newest_first: Sequence[Saved], keep: Keep) -> list[Saved]:
    """Return the checkpoints that a policy does not keep, the oldest first."""
    kept = {saved.number for saved in newest_first[: max(1, keep.last)]}
    if keep.every:
        kept |= {saved.number for saved in newest_first if saved.step % keep.every == 0}
    scored = [saved for saved in newest_first if saved.data["score"] is not None]
    scored.sort(key=lambda saved: saved.data["score"], reverse=True)
    kept |= {saved.number for saved in scored[: keep.best]}
    return [saved for saved in reversed(newest_first) if saved.number not in kept]


def artifacts_of(saved: Saved) -> list[BlobRef]:
    """Return a checkpoint's states as a run lists them among its artifacts."""
    name = f"step-{saved.step}"
    return [BlobRef(state.uri, state.sha256, state.size, "checkpoint", name) for state in saved.states.values()]


def _frames(frame: Frame, first: OpenSession) -> Iterator[Frame]:
    """Yield the frames from here out to the one that opened a session."""
    at: Frame | None = frame
    while at is not None:
        yield at
        at = None if at is first.frame else at.outer


def _blocks(frame: Frame, first: OpenSession) -> Iterator[Block]:
    """Yield the blocks from here out to the one that opened a session."""
    at = frame.block
    while at is not None:
        yield at
        at = None if at is first.block else at.outer


def _changed(frame: Frame, reads: Mapping[str, Any], where: str) -> JsonObject:
    """Return what was read when something was entered and is something else by now."""
    return {
        name: entry(name, value, frame.origins[name], where)
        for name, value in reads.items()
        if name in frame.origins and frame.values[name] is not value
    }
