"""The toy model's tokenizer: UTF-8 bytes and two special tokens.

It knows no model. Read next: ``crucible_kitchen_noop.model``.
"""

from crucible_kitchen import byte_tokenizer

__all__ = ["VOCAB_SIZE", "ByteTokenizer"]

VOCAB_SIZE = 258


class ByteTokenizer(byte_tokenizer.ByteTokenizer):
    """Ids 0 to 255 are bytes, 256 ends a sequence, 257 begins one; a turn is ``role: content<|end|>``."""

    def __init__(self) -> None:
        super().__init__(["<|end|>", "<|begin|>"], end="<|end|>", prefix=["<|begin|>"], opening="{role}: ")
