"""The model ``mlp``: a policy over observations with a value network of its own.

Knows observations and discrete actions, no tokens. Read next: ``trainer.py``, and ``acting.py``, which acts by it.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from crucible_kitchen.errors import CapabilityError
from crucible_kitchen.types import ExportedModel, MlpSpec, SessionSpec
from crucible_kitchen_torch.acting import Layer, MlpWeights
from crucible_kitchen_torch.faults import storage_errors
from crucible_kitchen_torch.heads import ValueHead
from crucible_kitchen_torch.models import ModelFacts
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.unpadded import Joins

if TYPE_CHECKING:
    from crucible_kitchen.ports.tokenizer import Tokenizer

__all__ = ["MlpModel"]

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


def _linears(network: nn.Sequential) -> list[Layer]:
    return [_layer(part.weight, part.bias) for part in network if isinstance(part, nn.Linear)]


def _layer(weight: Tensor, bias: Tensor) -> Layer:
    """Copy a layer; the matrix maps from the left."""
    return weight.detach().double().cpu().numpy().T.copy(), bias.detach().double().cpu().numpy().copy()


class MlpModel:
    """``CausalModel`` of a policy over observations: each observation is a position that sees no other."""

    module: nn.Module
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

    def copied(self, value: ValueHead | None) -> MlpWeights:
        """Return a copy of the weights as they are, with those of the value network if it has this head."""
        networks = self._networks
        valued = None
        if value is not None and networks.value is not None:
            valued = [*_linears(networks.value), _layer(value.weight[None], value.bias[None])]
        policy = [*_linears(networks.policy), _layer(networks.actions.weight, networks.actions.bias)]
        return MlpWeights(policy, valued, relu=self._spec.activation == "relu")

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
