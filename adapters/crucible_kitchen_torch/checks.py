"""Whether a model can take the data of a call.

Knows datums and a model's facts, no tensor. Read next: ``accumulate.py``.
"""

from collections.abc import Sequence

import numpy as np

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.types import Array, Datum
from crucible_kitchen_torch.models import ModelFacts

__all__ = ["check_datums", "check_top"]


def check_datums(datums: Sequence[Datum], needed: Sequence[str], facts: ModelFacts) -> None:
    """Check that the model can take these datums.

    Args:
        datums: of one call.
        needed: the loss inputs that the call needs, each as long as the datum.
        facts: of the model.

    Raises:
        BackendUserError: an input is missing or of the wrong shape, a sequence is empty or longer than the context, or
            a token is outside the vocabulary.
    """
    for datum in datums:
        problem = _problem(datum, needed, facts)
        if problem:
            raise BackendUserError(f"datum {datum.key!r} {problem}")
    _check_vocabulary(datums, needed, facts)
    if "teacher_tokens" in needed and len({d.loss_inputs["teacher_tokens"].shape[1] for d in datums}) > 1:
        raise BackendUserError("the datums of one call need equally many teacher_tokens per position")


def check_top(top: int, facts: ModelFacts) -> None:
    """Check a number of likeliest tokens.

    Raises:
        BackendUserError: it is not from 1 to the size of the vocabulary.
    """
    if not 1 <= top <= facts.vocab_size:
        raise BackendUserError(f"top must be from 1 to {facts.vocab_size}, got {top}")


def _problem(datum: Datum, needed: Sequence[str], facts: ModelFacts) -> str:
    inputs = datum.inputs.get(facts.reads)
    problem = _bad_observations(inputs, facts) if facts.observation_size else _bad_tokens(inputs, facts)
    if problem or inputs is None:
        return problem
    for name in needed:
        if name not in datum.loss_inputs:
            return f"lacks the loss input {name!r}"
        shape = datum.loss_inputs[name].shape
        if len(shape) != (2 if name == "teacher_tokens" else 1) or shape[0] != len(inputs):
            return f"has {name!r} of another shape than `{facts.reads}`"
    return ""


def _check_vocabulary(datums: Sequence[Datum], needed: Sequence[str], facts: ModelFacts) -> None:
    """Check all tokens of a call at once, which is much cheaper than one datum after the other.

    Raises:
        BackendUserError: one is outside the vocabulary.
    """
    if _outside([ids for datum in datums for ids in _ids(datum, needed, facts)], facts):
        first = next(datum for datum in datums if _outside(_ids(datum, needed, facts), facts))
        raise BackendUserError(f"datum {first.key!r} has a token outside the vocabulary of {facts.vocab_size}")


def _ids(datum: Datum, needed: Sequence[str], facts: ModelFacts) -> list[Array]:
    read = [] if facts.observation_size else [datum.inputs[facts.reads]]
    return read + [datum.loss_inputs[name].ravel() for name in needed if name.endswith("_tokens")]


def _bad_tokens(tokens: Array | None, facts: ModelFacts) -> str:
    if tokens is None or tokens.ndim != 1 or not len(tokens):
        return "needs a non-empty input `tokens` of shape [T]"
    if len(tokens) > facts.context_length:
        return f"has {len(tokens)} tokens, but the model's context is {facts.context_length}"
    return ""


def _bad_observations(observations: Array | None, facts: ModelFacts) -> str:
    width = facts.observation_size
    if observations is None or observations.ndim != 2 or observations.shape[1] != width or not len(observations):
        return f"needs a non-empty input `observations` of shape [T, {width}]"
    return "" if np.isfinite(observations).all() else "has an observation that is not finite"


def _outside(ids: Sequence[Array], facts: ModelFacts) -> bool:
    together = np.concatenate(ids) if ids else np.zeros(0)
    return bool(together.size) and (int(together.min()) < 0 or int(together.max()) >= facts.vocab_size)
