"""A snapshot of the model ``mlp`` that acts: in numpy, because a few rows take less time than the way to a thread.

Knows matrices, no trainer. Read next: ``mlp.py``, whose weights these are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.types import Acted, Array, Float64Array
from crucible_kitchen.workers import run_sync

__all__ = ["Layer", "MlpPolicy", "MlpWeights"]

Layer: TypeAlias = tuple[Float64Array, Float64Array]
"""A matrix [in, out] and a bias [out]."""

AT_ONCE = 1 << 22
"""Multiplications that may be done on the event loop: about a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class MlpWeights:
    """Copied weights.

    Attributes:
        policy: hidden layers, then the one that scores actions.
        value: hidden layers, then the one that gives the value; None without a value network.
        relu: between the layers; else the hyperbolic tangent.
    """

    policy: Sequence[Layer]
    value: Sequence[Layer] | None
    relu: bool

    @property
    def features(self) -> int:
        """D, numbers of one observation."""
        return len(self.policy[0][0])

    @property
    def size(self) -> int:
        """Multiplications for one observation."""
        return sum(matrix.size for matrix, _ in self.policy)

    def run(self, layers: Sequence[Layer], observations: Array) -> Float64Array:
        """Map [G, D] to what the last layer gives, [G, out]."""
        found: Float64Array = np.asarray(observations, np.float64)
        for matrix, bias in layers[:-1]:
            found = found @ matrix + bias
            found = np.maximum(found, 0.0) if self.relu else np.tanh(found)
        matrix, bias = layers[-1]
        return found @ matrix + bias


class MlpPolicy:
    """See ``Policy``.

    Args:
        weights: nobody changes them.
        version: optimizer steps behind them.
    """

    def __init__(self, weights: MlpWeights, version: int) -> None:
        self._weights = weights
        self.version = version
        self.closed = False

    async def act(self, observations: Array, uniforms: Array | None = None) -> Acted:
        """See ``Policy``."""
        self._check(observations)
        if uniforms is not None and np.shape(uniforms) != (len(observations),):
            raise BackendUserError(f"{len(observations)} observations need as many random numbers")
        if len(observations) * self._weights.size > AT_ONCE:
            return await run_sync(self._act, observations, uniforms)
        return self._act(observations, uniforms)

    async def values(self, observations: Array) -> Array:
        """See ``Policy``."""
        self._check(observations)
        layers = self._weights.value
        if layers is None:
            raise CapabilityError("this model has no value head", hint="open the session with value_head=True")
        found = await run_sync(self._weights.run, layers, observations)
        return found[:, 0].astype(np.float32)

    def _act(self, observations: Array, uniforms: Array | None) -> Acted:
        scores = self._weights.run(self._weights.policy, observations)
        scores -= scores.max(axis=-1, keepdims=True)
        reached = np.exp(scores).cumsum(axis=-1)  # the last is the sum of all
        if uniforms is None:
            actions = scores.argmax(axis=-1)
        else:
            passed = reached <= np.asarray(uniforms, np.float64)[:, None] * reached[:, -1:]
            actions = np.minimum(passed.sum(axis=-1), scores.shape[-1] - 1)
        logprobs = scores[np.arange(len(scores)), actions] - np.log(reached[:, -1])
        return Acted(actions, logprobs.astype(np.float32), self.version)

    def _check(self, observations: Array) -> None:
        if self.closed:
            raise SessionLost("the policy is closed", hint="get a new one from the session")
        width, shape = self._weights.features, np.shape(observations)
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise BackendUserError(f"observations must have the shape [G, {width}], got {list(shape)}")
        if not np.isfinite(observations).all():
            raise BackendUserError("an observation is not finite")

    def close(self) -> None:
        """Act no more."""
        self.closed = True

    async def aclose(self) -> None:
        """See ``Policy``."""
        self.close()
