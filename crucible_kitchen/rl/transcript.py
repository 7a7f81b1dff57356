"""A conversation as tokens, extended turn by turn: what was sampled is never tokenized again.

Knows a tokenizer, no sampler. Read next: ``crucible_kitchen.rl.rollout``.
"""

from collections.abc import Sequence

import numpy as np

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.ports.tokenizer import Tokenizer
from crucible_kitchen.rl.trajectories import Trajectory
from crucible_kitchen.types import Array, Message

__all__ = ["Transcript"]

_BEFORE = (Message("user", "."), Message("assistant", "."))
"""A conversation that stands for what has been said, to see what the chat template puts before a further message."""


class Transcript:
    """The tokens of one episode, with what is known of each.

    Args:
        tokenizer: the model's.
        chat: wrap messages in the chat template; else their contents are joined as they are.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self.tokens: list[int] = []
        self._sampled: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._rewards: list[float] = []

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def tell(self, messages: Sequence[Message]) -> None:
        """Add what the policy is told: the prompt at first, then what is new."""
        self._extend(self._opening(messages) if not self.tokens else self._further(messages))

    def said(self, tokens: Array, logprobs: Array, version: int) -> None:
        """Add what the policy sampled."""
        n = len(tokens)
        self.tokens.extend(tokens.tolist())
        self._sampled.extend([True] * n)
        self._logprobs.extend(logprobs.tolist())
        self._versions.extend([version] * n)
        self._rewards.extend([0.0] * n)

    def reward(self, value: float) -> None:
        """Put a reward on the last token that was sampled."""
        place = len(self._sampled) - 1
        while place and not self._sampled[place]:
            place -= 1
        self._rewards[place] += value

    def trajectory(self, *, terminated: bool, metrics: dict[str, float]) -> Trajectory:
        """Return the episode in the positions of a datum."""
        tokens = np.array(self.tokens, dtype=np.int64)
        return Trajectory(
            inputs={"tokens": tokens[:-1]},
            after={"tokens": tokens[-1:]},
            targets=tokens[1:],
            mask=np.array(self._sampled[1:], dtype=bool),
            logprobs=np.array(self._logprobs[1:], dtype=np.float32),
            versions=np.array(self._versions[1:], dtype=np.int32),
            rewards=np.array(self._rewards[1:], dtype=np.float64),
            terminated=terminated,
            metrics=metrics,
        )

    def _extend(self, tokens: Sequence[int]) -> None:
        n = len(tokens)
        self.tokens.extend(tokens)
        self._sampled.extend([False] * n)
        self._logprobs.extend([0.0] * n)
        self._versions.extend([-1] * n)
        self._rewards.extend([0.0] * n)

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        if self._chat:
            return self._tokenizer.render_chat(messages, generation_prompt=True)
        text = "".join(message.content for message in messages)
        return [*self._tokenizer.prefix_ids, *self._tokenizer.encode(text)]

    def _further(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of further messages, with what the template puts between the last turn and them."""
        if not self._chat:
            return self._tokenizer.encode("".join(message.content for message in messages))
        before = self._tokenizer.render_chat(_BEFORE, generation_prompt=False)
        whole = self._tokenizer.render_chat([*_BEFORE, *messages], generation_prompt=True)
        if whole[: len(before)] != before:
            raise ConfigError(
                "the chat template renders a conversation differently once it goes on, so turns cannot be added",
                hint="give another one: chat_template=FILE",
            )
        end = self._tokenizer.eos_id
        ended = bool(self.tokens) and self.tokens[-1] == end
        last = len(before) - 1 - before[::-1].index(end) if end in before else len(before) - 1
        return ([] if ended or end not in before else [end]) + before[last + 1 :] + whole[len(before) :]
