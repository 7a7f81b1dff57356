"""The toy model's tokenizer: UTF-8 bytes and two special tokens.

It knows no model. Read next: ``crucible_kitchen_noop.model``.
"""

import re
from collections.abc import Sequence

from crucible_kitchen.types import Message

__all__ = ["ByteTokenizer"]

_SPECIALS = {"<|end|>": 256, "<|begin|>": 257}
_SPECIAL = re.compile("(" + "|".join(re.escape(text) for text in _SPECIALS) + ")")


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a sequence, 257 begins one."""

    vocab_size = 258
    eos_id = 256
    prefix_ids = (257,)
    chat = False

    def encode(self, text: str) -> list[int]:
        """Encode text; ``<|begin|>`` and ``<|end|>`` in it become their ids."""
        ids: list[int] = []
        for piece in _SPECIAL.split(text):
            ids.extend([_SPECIALS[piece]] if piece in _SPECIALS else piece.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special tokens are left out, broken UTF-8 becomes replacement characters."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        """Encode a conversation, one ``role: content<|end|>`` per turn."""
        ids = list(self.prefix_ids)
        for message in messages:
            ids += self.encode(f"{message.role}: {message.content}")
            ids.append(self.eos_id)
        return ids + self.encode("assistant: ") if generation_prompt else ids
