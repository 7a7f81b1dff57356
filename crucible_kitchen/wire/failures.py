"""Errors as the wire has them: a sentence, whose fault it is, and our stable code for those who know it.

Knows the error tree, no HTTP. Read next: ``crucible_kitchen.errors``.
"""

from collections.abc import Mapping
from typing import Any

from crucible_kitchen.errors import (
    BackendError,
    BackendUserError,
    CapabilityError,
    CapacityError,
    ConfigError,
    Conflict,
    CrucibleError,
    IntegrityError,
    MissingExtra,
    ModelNotFound,
    NonFiniteLoss,
    NotFoundError,
    OutOfMemory,
    SessionLost,
    StorageFull,
    TrainingError,
    TransientBackendError,
)
from crucible_kitchen.types import JsonObject

__all__ = ["failure_from_wire", "failure_to_wire"]

_PLAIN: tuple[type[CrucibleError], ...] = (
    BackendUserError,
    CapabilityError,
    CapacityError,
    ConfigError,
    Conflict,
    IntegrityError,
    ModelNotFound,
    NotFoundError,
    OutOfMemory,
    SessionLost,
    StorageFull,
    TrainingError,
    TransientBackendError,
)
_BY_CODE = {kind.code: kind for kind in _PLAIN}
_USERS = (BackendUserError, CapabilityError, ConfigError, Conflict, IntegrityError, NotFoundError, TrainingError)


def failure_to_wire(error: Exception) -> JsonObject:
    """Return an error as the object that stands in its result's place.

    What is not of our tree is told by its kind only: its text may hold anything.
    """
    if isinstance(error, MissingExtra):
        error = CapabilityError(f"the server lacks an optional package: {error.message}", hint=error.hint)
    if not isinstance(error, CrucibleError):
        return {"error": f"the server failed ({type(error).__name__})", "category": "server", "error_class": "internal"}
    told: JsonObject = {
        "error": error.message,
        "category": "user" if isinstance(error, _USERS) else "server",
        "error_class": error.code,
    }
    if error.hint:
        told["hint"] = error.hint
    if isinstance(error, NonFiniteLoss):
        what = error.message.partition(" is not finite")[0]
        told["detail"] = {"what": what, "step": error.step, "keys": list(error.keys)}
    return told


def failure_from_wire(told: Mapping[str, Any]) -> CrucibleError:
    """Return the error that an object tells, of another server's too: those have a category only."""
    message, hint = str(told.get("error") or "the server gave no reason"), told.get("hint")
    code = told.get("error_class")
    detail = told.get("detail")
    if code == NonFiniteLoss.code and isinstance(detail, Mapping):
        return NonFiniteLoss(
            str(detail.get("what")), int(detail.get("step", 0)), [str(k) for k in detail.get("keys", ())]
        )
    hint = hint if isinstance(hint, str) else None
    kind = _BY_CODE.get(code) if isinstance(code, str) else None
    if kind is not None:
        return kind(message[:500], hint=hint)
    if str(told.get("category", "")).lower() == "user":
        return BackendUserError(message[:500], hint=hint)
    return BackendError(message[:500], hint=hint or "the server's own log says more")
