"""The open accumulation of a session on a server: gradients are added to it until it is applied or left.

Read next: ``crucible_kitchen_http.session``, ``crucible_kitchen_http.gradients``.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from crucible_kitchen.errors import BackendUserError, CapabilityError
from crucible_kitchen.ports.training_client import require_outputs
from crucible_kitchen.types import AdamParams, Datum, ForwardBackwardResult, Loss, OptimResult, OutputsLoss, reads
from crucible_kitchen.workers import PendingResult
from crucible_kitchen_http import gradients
from crucible_kitchen_http.remote import Place

if TYPE_CHECKING:
    from crucible_kitchen_http.session import HttpSession

__all__ = ["StepScope"]

R = TypeVar("R")


class StepScope:
    """See ``TrainingStepScope``."""

    def __init__(self, session: "HttpSession", place: Place) -> None:
        self._session = session
        self._pending: list[PendingResult[Any]] = []
        self._dropped = False
        self._ordered: bool | None = None
        self.place = place
        self.applied = False

    @property
    def index(self) -> int:
        """See ``TrainingStepScope``."""
        return self.place[0]

    @property
    def sent(self) -> bool:
        """Whether anything was submitted."""
        return bool(self._pending)

    def drop(self) -> None:
        """Take no more calls, and let nobody fail for those that were not awaited."""
        self._dropped = True
        for pending in self._pending:
            pending.excuse()

    async def forward_backward(
        self, datums: Sequence[Datum], loss: str | Loss | OutputsLoss = "cross_entropy", *, order: int | None = None
    ) -> PendingResult[ForwardBackwardResult]:
        """See ``TrainingStepScope``."""
        self._check()
        can = self._session.capabilities
        if order is not None and not can.ordered_accumulation:
            raise CapabilityError("the server adds gradients in the order of arrival", hint="leave out order=")
        require_outputs(can, reads(loss))
        work = gradients.Gradient(self._session.remote, tuple(datums), self.place, order)
        if isinstance(loss, str):
            if loss not in can.losses:
                raise CapabilityError(
                    f"the server has no loss {loss!r}", hint=f"it has {', '.join(sorted(can.losses))}"
                )
            return await self._submit(lambda: work.built_in(loss))
        return await self._submit(lambda: work.emulated(gradients.plain(loss)))

    async def apply(self, params: AdamParams, *, scale: float = 1.0) -> PendingResult[OptimResult]:
        """See ``TrainingStepScope``."""
        self._check()
        await anyio.lowlevel.checkpoint()
        pending = await self._session.apply(self.place, params, scale)
        self.applied = True
        return pending

    async def _submit(self, call: Callable[[], Awaitable[Awaitable[R]]]) -> PendingResult[R]:
        await anyio.lowlevel.checkpoint()
        pending = self._session.submit(call)
        self._pending.append(pending)
        return pending

    def _check(self) -> None:
        if self.applied or self._dropped:
            raise BackendUserError(f"step {self.index} is over", hint="open the next step with session.step()")
