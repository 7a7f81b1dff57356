"""Returns: generalised advantage estimation, discounted returns, the KL penalty as a reward. Float64 throughout.

Knows rewards, values and where trajectories end, not who made them. Read next:
``crucible_kitchen.learner.advantages``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from crucible_kitchen.types import Float64Array, IntArray

__all__ = ["AdvantageEstimate", "discounted_returns", "gae", "kl_shaped_advantages", "kl_shaped_rewards"]

Flags: TypeAlias = ArrayLike

CHUNK = 8
"""Steps of one chunk of the scan; of 8, 16, 32 and 64 the fastest for 64 rows of 512 steps."""
SHORT = 128
"""So many steps are faster in a plain loop."""


class AdvantageEstimate(NamedTuple):
    """Advantages and the value targets ``advantages + values``, float64, shaped as the rewards."""

    advantages: Float64Array
    returns: Float64Array


# What is not finite is found in the result, and refused there.
_quiet = np.errstate(invalid="ignore", over="ignore")


@_quiet
def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    *,
    gamma: float,
    lam: float,
    terminated: Flags,
    truncated: Flags | None = None,
    bootstrap: ArrayLike | None = None,
    mask: Flags | None = None,
) -> AdvantageEstimate:
    """Estimate advantages by GAE (Schulman et al. 2016, eq. 11 to 16), with termination and truncation told apart.

    With ``next_t = V(s_{t+1})`` inside a trajectory, 0 after a termination, ``bootstrap_t`` after a truncation::

        delta_t = r_t + gamma * next_t - V(s_t)
        A_t     = delta_t + gamma * lam * (1 - ended_t) * A_{t+1}

    The last axis is time. Trajectories may follow each other in it, each closed by a flag at its last step; the end
    of the array ends the last one, as a truncation unless ``terminated`` says otherwise. Trajectories of unlike
    lengths are best joined in one array [T].

    Positions outside ``mask`` (tokens that the policy did not sample: tool output, templates) are removed first: the
    token before a hole is followed by the token after it. An end inside a hole ends the trajectory at the last sampled
    token before it. There advantages are 0 and returns equal the values, so that neither trains.

    Known divergences: CleanRL treats a truncation as a termination; OpenRLHF and SkyRL let holes take part, with
    zeroed or with their own values (verl removes them, as here). Nothing is whitened here.

    Args:
        rewards: [..., T].
        values: [..., T], V(s_t) before each step.
        gamma: discount, 0 to 1.
        lam: lambda, 0 (one-step errors) to 1 (returns minus values).
        terminated: bool [..., T], the step led to a final state. Wins over ``truncated``.
        truncated: bool [..., T], the trajectory was cut after the step. None: nowhere but at the end of the array.
        bootstrap: [..., T] or a scalar, the value of the state that the step led to (before any reset); read only
            where a trajectory is cut.
        mask: bool [..., T], True where the policy acted. None: everywhere.

    Returns:
        Advantages and returns, exact to rounding, shaped as ``rewards``.

    Raises:
        ValueError: shapes differ, gamma or lam is outside [0, 1], a trajectory is cut and there is no ``bootstrap``, a
            reward lies in a hole, or a number that is read is not finite.
    """
    _check_share("lam", lam)
    path = _Path.of(rewards, gamma, terminated, truncated, bootstrap, mask)
    v_all = _array(values, path.shape, "values")
    v = path.kept(v_all)
    errors = np.empty_like(v)
    np.multiply(v[1:], gamma, out=errors[:-1])
    errors[path.ends] = gamma * path.after
    errors += path.rewards
    errors -= v
    found = _scan(errors, path.decay(gamma * lam))
    _check_finite(found, "rewards, values or bootstrap")
    advantages = path.spread(found)
    return AdvantageEstimate(advantages, advantages + v_all)


@_quiet
def discounted_returns(
    rewards: ArrayLike,
    *,
    gamma: float,
    terminated: Flags,
    truncated: Flags | None = None,
    bootstrap: ArrayLike | None = None,
    mask: Flags | None = None,
) -> Float64Array:
    """Sum discounted rewards to the end of each trajectory: ``G_t = r_t + gamma * G_{t+1}`` (Sutton & Barto, eq. 3.9).

    After a termination ``G`` is 0, after a truncation ``bootstrap``. Flags, holes and errors are those of
    :func:`gae`; positions in holes are 0, and take no step of discount.

    Returns:
        Float64, shaped as ``rewards``.
    """
    path = _Path.of(rewards, gamma, terminated, truncated, bootstrap, mask)
    steps = path.rewards.copy()
    steps[path.ends] += gamma * path.after
    found = _scan(steps, path.decay(gamma))
    _check_finite(found, "rewards or bootstrap")
    return path.spread(found)


def kl_shaped_rewards(
    rewards: ArrayLike,
    logprobs: ArrayLike,
    reference_logprobs: ArrayLike,
    *,
    coefficient: float,
    mask: Flags | None = None,
) -> Float64Array:
    """Subtract the KL penalty from the rewards, token by token: ``r_t - c * (log p_t - log ref_t)``.

    This is estimator k1, whose place is the reward: as a loss its gradient is zero in expectation (see
    ``crucible_kitchen.learner.policy``). Used before :func:`gae` (Ouyang et al. 2022, eq. 2), or summed over a
    sequence into its one reward (as RLOO does, Ahmadian et al. 2024). Holes keep their reward.

    Args:
        rewards: [..., T].
        logprobs: [..., T], nats, of the sampled tokens under the policy that sampled them.
        reference_logprobs: [..., T], nats, of the same tokens under the reference.
        coefficient: c, reward per nat.
        mask: bool [..., T], True where the policy acted. None: everywhere.

    Raises:
        ValueError: shapes differ.
    """
    r = _array(rewards, None, "rewards")
    return r - coefficient * _log_ratio(logprobs, reference_logprobs, r.shape, mask)


def kl_shaped_advantages(
    advantages: ArrayLike,
    logprobs: ArrayLike,
    reference_logprobs: ArrayLike,
    *,
    coefficient: float,
    mask: Flags | None = None,
    discount: float = 0.0,
) -> Float64Array:
    """Add the centred KL penalty to advantages that are one number per sequence: ``A_t + c * (mean(d) - d_t)``.

    ``d_t = log p_t - log ref_t``; the mean goes over all positions of ``mask``, so give whole batches (as the Tinker
    cookbook's ``incorporate_kl_penalty`` does). What is added sums to 0 without ``discount``. With it, each sequence's
    additions are replaced by their discounted sums to its end, holes taking no step.

    Args:
        advantages: [..., T], time in the last axis, one sequence per row.
        logprobs: [..., T], nats.
        reference_logprobs: [..., T], nats.
        coefficient: c, advantage per nat.
        mask: bool [..., T], True where the policy acted. None: everywhere. Holes keep their advantage.
        discount: of later tokens' penalties, 0 (each token pays its own) to 1.

    Raises:
        ValueError: shapes differ, or the discount is outside [0, 1].
    """
    a = _array(advantages, None, "advantages")
    chosen = np.ones(a.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    d = _log_ratio(logprobs, reference_logprobs, a.shape, mask)
    added = coefficient * np.where(chosen, d.sum() / max(1, int(chosen.sum())) - d, 0.0)
    if discount:
        over = np.zeros(a.shape, dtype=bool)
        over[..., -1:] = True
        added = discounted_returns(added, gamma=discount, terminated=over, mask=chosen)
    return a + added


class _Path(NamedTuple):
    """All steps of all trajectories in one row, without holes."""

    shape: tuple[int, ...]
    rewards: Float64Array
    ends: IntArray  # the last step of each trajectory, ascending
    after: Float64Array  # the value of what follows each end
    places: IntArray | None  # where the steps stood before the holes were removed

    @classmethod
    def of(
        cls,
        rewards: ArrayLike,
        gamma: float,
        terminated: Flags,
        truncated: Flags | None,
        bootstrap: ArrayLike | None,
        mask: Flags | None,
    ) -> "_Path":
        """Check the inputs and lay them out."""
        _check_share("gamma", gamma)
        r = np.asarray(rewards, dtype=np.float64)
        if not r.ndim:
            raise ValueError("rewards have no axis of time")
        ends, after = _ends(r.shape, terminated, truncated, bootstrap)
        path = cls(r.shape, r.reshape(-1), ends, after, None)
        if mask is None:
            return path
        chosen = _flags(mask, r.shape, "mask").reshape(-1)
        return path if chosen.all() else path.without_holes(chosen)

    def without_holes(self, chosen: Any) -> "_Path":
        """Return the path of the chosen steps only."""
        if np.any((self.rewards != 0) & ~chosen):
            raise ValueError("a reward lies where the mask is False: put it on the last sampled token before")
        places = np.flatnonzero(chosen)
        last = np.searchsorted(places, self.ends, side="right") - 1
        own = np.diff(last, prepend=-1) > 0  # a trajectory of holes only has no step of its own
        return _Path(self.shape, self.rewards.take(places), last[own], self.after[own], places)

    def kept(self, x: Float64Array) -> Float64Array:
        """Return an array's steps in one row, without holes."""
        return x.reshape(-1) if self.places is None else x.reshape(-1).take(self.places)

    def decay(self, factor: float) -> Float64Array:
        """Return what each step takes of the next one's sum: a factor, 0 at ends."""
        found = np.full(len(self.rewards), factor)
        found[self.ends] = 0.0
        return found

    def spread(self, x: Float64Array) -> Float64Array:
        """Return the steps at their places in the first shape, 0 in holes."""
        if self.places is not None:
            whole = np.zeros(int(np.prod(self.shape)))
            whole[self.places] = x
            x = whole
        return x.reshape(self.shape)


def _ends(
    shape: tuple[int, ...], terminated: Flags, truncated: Flags | None, bootstrap: ArrayLike | None
) -> tuple[IntArray, Float64Array]:
    """Return the last step of each trajectory, and the value of what follows it."""
    final = _flags(terminated, shape, "terminated")
    stop = final.copy() if truncated is None else final | _flags(truncated, shape, "truncated")
    stop[..., -1:] = True
    ends = np.flatnonzero(stop)
    cut = np.flatnonzero(~final.reshape(-1)[ends])
    after = np.zeros(len(ends))
    if len(cut):
        if bootstrap is None:
            raise ValueError("a trajectory is cut and not terminated: give the value of the state after it (bootstrap)")
        given = np.asarray(bootstrap, dtype=np.float64)
        if given.ndim and given.shape != shape:
            raise ValueError(f"bootstrap has shape {given.shape}, the rewards have {shape}")
        after[cut] = given.reshape(-1)[ends[cut]] if given.ndim else given
    return ends, after


def _scan(x: Float64Array, decay: Float64Array) -> Float64Array:
    """Solve ``y_t = x_t + decay_t * y_{t+1}`` from the end.

    Chunks are solved side by side as if nothing followed them, and beside each step stands what it would take from
    the next chunk's first; the chunks' firsts are the same problem, an eighth as long.
    """
    n = len(x)
    if n <= SHORT:
        return _loop(x.tolist(), decay.tolist())
    chunks = -(-n // CHUNK)
    y, share = np.zeros((CHUNK, chunks)), np.zeros((CHUNK, chunks))
    for given, into in ((x, y), (decay, share)):
        whole = n // CHUNK
        into[:, :whole] = given[: whole * CHUNK].reshape(whole, CHUNK).T
        into[: n - whole * CHUNK, whole:] = given[whole * CHUNK :, None]
    rows, shares, taken = list(y), list(share), np.empty(chunks)
    for k in range(CHUNK - 2, -1, -1):
        np.multiply(shares[k], rows[k + 1], out=taken)
        np.add(rows[k], taken, out=rows[k])
        np.multiply(shares[k], shares[k + 1], out=shares[k])
    share[:, :-1] *= _scan(y[0], share[0])[1:]
    y[:, :-1] += share[:, :-1]
    return y.T.reshape(-1)[:n]


def _loop(x: list[float], decay: Sequence[float]) -> Float64Array:
    """Solve the recursion step by step."""
    y = 0.0
    for t in range(len(x) - 1, -1, -1):
        x[t] = y = x[t] + decay[t] * y
    return np.asarray(x, dtype=np.float64)


def _log_ratio(p: ArrayLike, q: ArrayLike, shape: tuple[int, ...], mask: Flags | None) -> Float64Array:
    """Return log p - log q, 0 outside the mask."""
    found = _array(p, shape, "logprobs") - _array(q, shape, "reference_logprobs")
    return found if mask is None else np.where(_flags(mask, shape, "mask"), found, 0.0)


def _array(x: ArrayLike, shape: tuple[int, ...] | None, name: str) -> Float64Array:
    found = np.asarray(x, dtype=np.float64)
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} have shape {found.shape}, not {shape}")
    return found


def _flags(x: Flags, shape: tuple[int, ...], name: str) -> Any:
    found = np.asarray(x, dtype=bool)
    if found.shape != shape:
        raise ValueError(f"{name} has shape {found.shape}, the rewards have {shape}")
    return found


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, is {value}")


def _check_finite(found: Float64Array, names: str) -> None:
    if not np.isfinite(found.sum()):
        raise ValueError(f"{names} hold a number that is not finite")
