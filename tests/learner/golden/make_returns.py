"""Writes returns.json: advantages as torchrl 0.14.1 computes them, with its inputs.

Run: python tests/learner/golden/make_returns.py (torchrl and tensordict importable).
"""

import json
from pathlib import Path

import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate


def main() -> None:
    torch.manual_seed(0)
    shape = (3, 12, 1)
    rewards, values, following = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    terminated, truncated = torch.rand(shape) < 0.15, torch.rand(shape) < 0.15
    done = terminated | truncated
    for t in range(shape[1] - 1):  # inside a trajectory the next value is the next step's
        following[:, t] = torch.where(done[:, t], following[:, t], values[:, t + 1])
    cases = []
    for gamma, lam in ((0.99, 0.95), (1.0, 1.0), (0.9, 0.0)):
        advantages, targets = generalized_advantage_estimate(
            number(gamma), number(lam), values, following, rewards, done=done, terminated=terminated
        )
        cases.append({"gamma": gamma, "lam": lam, "advantages": rows(advantages), "returns": rows(targets)})
    names = ("rewards", "values", "bootstrap", "terminated", "truncated")
    arrays = (rewards, values, following, terminated, truncated)
    inputs = {name: rows(x) for name, x in zip(names, arrays, strict=True)}
    path = Path(__file__).with_name("returns.json")
    path.write_text(json.dumps({"torchrl": "0.14.1", "inputs": inputs, "cases": cases}) + "\n", encoding="utf-8")


def number(x: float) -> torch.Tensor:
    """A float becomes float32 in torchrl, 0.99 another number; a tensor stays what it is."""
    return torch.tensor(x, dtype=torch.float64)


def rows(x: torch.Tensor) -> list[list[float]]:
    return x[..., 0].tolist()


if __name__ == "__main__":
    main()
