"""Functions that stay finite where their formulas overflow, and how a loss reads its inputs. Float64.

Knows no algorithm. Read next: ``crucible_kitchen.learner.policy``.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.types import Array, Float64Array, IntArray

__all__ = ["log1mexp", "log_sigmoid", "log_softmax", "loss_input", "sigmoid", "spread", "trained"]


def sigmoid(x: float) -> float:
    """Return ``1 / (1 + exp(-x))``."""
    return float(np.exp(log_sigmoid(x)))


def log_sigmoid(x: float) -> float:
    """Return ``log(sigmoid(x))``, which is about ``x`` far below 0."""
    return -float(np.logaddexp(0.0, -x))


def log1mexp(x: ArrayLike) -> Float64Array:
    """Return ``log(1 - exp(x))`` for ``x < 0`` (Mächler 2012); values nearer to 0 than 1e-12 count as -1e-12."""
    below = np.minimum(np.asarray(x, dtype=np.float64), -1e-12)
    near = below > -np.log(2.0)
    return np.where(near, np.log(-np.expm1(np.where(near, below, -1.0))), np.log1p(-np.exp(below)))


def log_softmax(logits: ArrayLike) -> Float64Array:
    """Return log-probabilities along the last axis."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    found: Float64Array = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return found


def loss_input(loss: str, inputs: Mapping[str, Array], name: str, shape: int | tuple[int, ...]) -> Float64Array:
    """Return one input of a loss: [T] for a number T, else of the shape given.

    Raises:
        ValueError: it is not there, or of another shape.
    """
    if name not in inputs:
        raise ValueError(f"the loss {loss!r} needs the input {name!r}; given: {', '.join(sorted(inputs))}")
    found = np.asarray(inputs[name], dtype=np.float64)
    if found.shape != (shape if isinstance(shape, tuple) else (shape,)):
        wanted = f"shape {shape}" if isinstance(shape, tuple) else f"{shape} positions"
        raise ValueError(f"the loss {loss!r} needs {name!r} of {wanted}, its shape is {found.shape}")
    return found


def trained(loss: str, inputs: Mapping[str, Array], length: int) -> tuple[IntArray, Float64Array]:
    """Return the n positions whose weight is not zero, and their weights [n].

    Raises:
        ValueError: there are no weights, or not as many as positions.
    """
    weights = loss_input(loss, inputs, "weights", length)
    places = np.flatnonzero(weights)
    return places, weights[places]


def spread(values: ArrayLike, places: IntArray, shape: tuple[int, ...]) -> Float64Array:
    """Return zeros of a shape with the values at these positions of the first axis."""
    found = np.zeros(shape)
    found[places] = values
    return found
