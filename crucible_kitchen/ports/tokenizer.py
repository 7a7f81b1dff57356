"""Text to tokens and back. A tokenizer is part of a session, not a port of its own."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from crucible_kitchen.types import Message

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """A model's tokenizer. All methods are pure and safe in any thread."""

    @property
    def vocab_size(self) -> int:
        """Number of ids the model scores."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""
        ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that open every plain (not chat) sequence, for instance a BOS token."""
        ...

    @property
    def chat(self) -> bool:
        """Whether prompts are meant to be wrapped in the chat template (an instruction-tuned model)."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Return the files, by name, that the tokenizer is made from again elsewhere. Blocks."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode text without adding special tokens; special tokens written in the text are recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, special tokens left out."""
        ...

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        """Encode a conversation with the chat template.

        Args:
            messages: the turns.
            generation_prompt: end with the tokens that open the assistant's next turn.

        Raises:
            ConfigError: the tokenizer has no chat template; the hint says how to give one.
        """
        ...
