"""The tokenizer of the built-in model: bytes, an end token, and tokens that open a turn.

Read next: ``crucible_kitchen.byte_tokenizer``; models of transformers have a ``crucible_kitchen.hub_tokenizer``.
"""

from crucible_kitchen import byte_tokenizer

__all__ = ["ByteTokenizer"]

END = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")


class ByteTokenizer(byte_tokenizer.ByteTokenizer):
    """One id per byte of UTF-8, an end token, and one token per role that opens a turn.

    A conversation is ``<|user|>question<|end|><|assistant|>answer<|end|>``.
    """

    def __init__(self) -> None:
        specials = [END, *(f"<|{role}|>" for role in ROLES)]
        super().__init__(specials, end=END, opening="<|{role}|>", roles=ROLES)
