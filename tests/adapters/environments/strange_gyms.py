"""Gymnasium environments that misbehave; importing this registers them (an id may name its module: ``module:Id``)."""

from typing import Any

import gymnasium
import numpy as np


class Strange(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def __init__(self, how: str = "") -> None:
        self.how = how
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if self.how == "reset raises":
            raise RuntimeError("a row of data")
        return np.full(3, self.np_random.random(), dtype=np.float32), {}

    def step(self, action: int) -> Any:
        self.steps += 1
        assert action in (5, 6)
        if self.how == "hangs":
            while True:
                pass
        if self.how == "dies":
            import os

            os._exit(4)
        observed = np.full(3, self.steps, dtype=np.float32)
        if self.how == "nan":
            observed[1] = np.nan
        if self.how == "shape":
            observed = np.zeros((2, 2), dtype=np.float32)
        reward = float("inf") if self.how == "infinite reward" else 1.0
        over = self.steps == 2 and self.how != "never ends"
        return observed, reward, over and self.how != "cut", over and self.how in ("cut", "both"), {}


gymnasium.register("Strange-v0", Strange, disable_env_checker=True, order_enforce=False)
gymnasium.register(
    "Continuous-v0", "gymnasium.envs.classic_control:PendulumEnv", disable_env_checker=True, order_enforce=False
)
