"""The model ``mlp``: a policy over observations with a value network of its own, and a snapshot of it that acts.

Knows observations and discrete actions, no tokens. Read next: ``trainer.py``, and ``crucible_kitchen.ports.Policy``.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from crucible_kitchen.errors import BackendUserError, CapabilityError, SessionLost
from crucible_kitchen.types import Acted, Array, ExportedModel, MlpSpec, SessionSpec
from crucible_kitchen_torch.faults import storage_errors
from crucible_kitchen_torch.models import ModelFacts
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.unpadded import Joins

if TYPE_CHECKING:
    from crucible_kitchen.ports.tokenizer import Tokenizer
    from crucible_kitchen_torch.trainer import Snapshot, Trainer
    from crucible_kitchen_torch.turns import Turns

__all__ = ["MlpModel", "TorchPolicy"]

STEPS = 1 << 20
"""Positions of one datum: there is no context to run out of."""


class _Networks(nn.Module):
    """Policy and value network side by side, each of its own layers, as CleanRL and Stable-Baselines3 have them."""

    def __init__(self, spec: MlpSpec, *, valued: bool) -> None:
        super().__init__()
        self.policy = _layers(spec)
        self.value = _layers(spec) if valued else None
        width = spec.hidden[-1] if spec.hidden else spec.observation_size
        self.actions = _linear(width, spec.actions, 0.01)

    def forward(self, observations: Tensor) -> Tensor:
        """Map [N, D] to [N, H], or [N, 2 H] with a value network."""
        hidden = self.policy(observations)
        return hidden if self.value is None else torch.cat([hidden, self.value(observations)], dim=-1)


def _layers(spec: MlpSpec) -> nn.Sequential:
    widths = [spec.observation_size, *spec.hidden]
    kind = nn.Tanh if spec.activation == "tanh" else nn.ReLU
    made: list[nn.Module] = []
    for before, after in pairwise(widths):
        made += [_linear(before, after, 2**0.5), kind()]
    return nn.Sequential(*made)


def _linear(before: int, after: int, gain: float) -> nn.Linear:
    """Return a layer with orthogonal weights (Engstrom et al. 2020, section 3: it matters for PPO) and no bias yet."""
    layer = nn.Linear(before, after)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MlpModel:
    """``CausalModel`` of a policy over observations: each observation is a position that sees no other."""

    module: nn.Module
    pads = False
    shares = False
    from_seed = True

    def __init__(self, networks: _Networks, spec: MlpSpec) -> None:
        self._networks = networks
        self._spec = spec
        self._width = spec.hidden[-1] if spec.hidden else spec.observation_size
        self.module = networks
        self.facts = ModelFacts("mlp", STEPS, spec.actions, self._width, frozenset(), spec.observation_size)

    @classmethod
    def open(cls, spec: SessionSpec, place: Placement) -> "MlpModel":
        """Build a new policy.

        Raises:
            CapabilityError: its shape is not given, or adapters are asked for.
        """
        if spec.mlp is None:
            raise CapabilityError(
                "the model mlp needs the sizes of observations and actions", hint="use an environment that gives them"
            )
        if spec.lora is not None:
            raise CapabilityError("the model mlp is trained whole", hint="set lora_rank=0")
        networks = _Networks(spec.mlp, valued=spec.value_head)
        return cls(networks.to(device=place.device, dtype=place.weights), spec.mlp)

    @property
    def tokenizer(self) -> "Tokenizer":
        """See ``TrainingSession``; there is none."""
        raise CapabilityError("this model takes observations, not tokens", hint="use session.policy()")

    def hidden(self, observations: Tensor, lengths: Sequence[int], joins: Joins | None = None) -> Tensor:
        """See ``CausalModel``."""
        del lengths, joins
        return self._networks(observations)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``."""
        return self._networks.actions(hidden[:, : self._width])  # type: ignore[no-any-return]

    @property
    def value_width(self) -> int:
        """See ``CausalModel``."""
        return self._width

    def valued(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``: the value network's half."""
        return hidden[:, self._width :]

    def next_scores(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> NoReturn:
        """See ``CausalModel``; nothing is generated."""
        del tokens, positions, mask, cache
        raise CapabilityError("this model takes observations, not tokens", hint="use session.policy()")

    def export(self, directory: Path) -> ExportedModel:
        """Write shape and weights."""
        from safetensors.torch import save_file

        spec = self._spec
        config = {
            "model_type": "crucible-mlp",
            "observation_size": spec.observation_size,
            "actions": spec.actions,
            "hidden": list(spec.hidden),
            "activation": spec.activation,
        }
        weights = {name: p.detach().cpu().contiguous() for name, p in self._networks.named_parameters()}
        with storage_errors("the exported model"):
            save_file(weights, directory / "model.safetensors")
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return ExportedModel(str(directory), "mlp", ("config.json", "model.safetensors"))


class TorchPolicy:
    """See ``Policy``. One call is one turn of the session's lane."""

    def __init__(self, trainer: "Trainer", snapshot: "Snapshot", turns: "Turns") -> None:
        self._trainer = trainer
        self._snapshot = snapshot
        self._turns = turns
        self.closed = False

    @property
    def version(self) -> int:
        """See ``Policy``."""
        return self._snapshot.version

    async def act(self, observations: Array, uniforms: Array | None = None) -> Acted:
        """See ``Policy``."""
        self._check(observations)
        if uniforms is not None and np.shape(uniforms) != (len(observations),):
            raise BackendUserError(f"{len(observations)} observations need as many random numbers")
        return await self._turns.one(self._act, np.asarray(observations), uniforms)

    async def values(self, observations: Array) -> Array:
        """See ``Policy``."""
        self._check(observations)
        if self._trainer.value is None:
            raise CapabilityError("this model has no value head", hint="open the session with value_head=True")
        return await self._turns.one(self._values, np.asarray(observations))

    @torch.no_grad()
    def _act(self, observations: Array, uniforms: Array | None) -> Acted:
        with self._trainer.weights(self._snapshot):
            hidden = self._hidden(observations)
            logprobs = torch.log_softmax(self._trainer.model.head(hidden).double(), dim=-1)
            if uniforms is None:
                actions = logprobs.argmax(dim=-1)
            else:
                reached = logprobs.exp().cumsum(dim=-1) <= torch.from_numpy(np.asarray(uniforms, np.float64))[:, None]
                actions = reached.sum(dim=-1).clamp(max=logprobs.shape[-1] - 1)
            chosen = logprobs.gather(-1, actions[:, None])[:, 0]
            values = None if self._trainer.value is None else self._said(hidden)
        return Acted(actions.numpy(), chosen.float().numpy(), values, self.version)

    @torch.no_grad()
    def _values(self, observations: Array) -> Array:
        with self._trainer.weights(self._snapshot):
            return self._said(self._hidden(observations))

    def _hidden(self, observations: Array) -> Tensor:
        weight = next(self._trainer.model.module.parameters())
        given = torch.from_numpy(observations).to(weight.device, weight.dtype)
        return self._trainer.model.hidden(given, [len(observations)])

    def _said(self, hidden: Tensor) -> Array:
        assert self._trainer.value is not None
        found: Array = self._trainer.value(self._trainer.model.valued(hidden)).float().cpu().numpy()
        return found

    def _check(self, observations: Array) -> None:
        if self.closed:
            raise SessionLost("the policy is closed", hint="get a new one from the session")
        width = self._trainer.model.facts.observation_size
        shape = np.shape(observations)
        if len(shape) != 2 or shape[1] != width or not shape[0]:
            raise BackendUserError(f"observations must have the shape [G, {width}], got {list(shape)}")
        if not np.isfinite(observations).all():
            raise BackendUserError("an observation is not finite")

    def close(self) -> None:
        """Release the weights."""
        if not self.closed:
            self.closed = True
            self._snapshot.release()

    async def aclose(self) -> None:
        """See ``Policy``."""
        self.close()
