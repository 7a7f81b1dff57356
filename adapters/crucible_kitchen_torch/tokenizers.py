"""Tokenizers: bytes for the built-in model, the model's own for those of transformers.

Knows text and ids, not models. Read next: ``crucible_kitchen.ports.tokenizer``, the protocol both fulfil.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crucible_kitchen import byte_tokenizer
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.types import Message

__all__ = ["ByteTokenizer", "HFTokenizer"]

END = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")


class ByteTokenizer(byte_tokenizer.ByteTokenizer):
    """One id per byte of UTF-8, an end token, and one token per role that opens a turn.

    A conversation is ``<|user|>question<|end|><|assistant|>answer<|end|>``.
    """

    def __init__(self) -> None:
        specials = [END, *(f"<|{role}|>" for role in ROLES)]
        super().__init__(specials, end=END, opening="<|{role}|>", roles=ROLES)


class HFTokenizer:
    """A tokenizer of transformers.

    Args:
        inner: what ``AutoTokenizer`` gave.
        vocab_size: number of ids the *model* scores, which can be more than the tokenizer knows.
        chat_template: a Jinja template or the path of a file with one, in place of the tokenizer's own.
        eos_id: used where the tokenizer names no end token.

    Raises:
        ConfigError: neither the tokenizer nor the model names an end token.
    """

    def __init__(self, inner: Any, vocab_size: int, chat_template: str | None, eos_id: int | None) -> None:
        self.inner = inner
        self.vocab_size = vocab_size
        end = inner.eos_token_id if inner.eos_token_id is not None else eos_id
        if end is None:
            raise ConfigError("the model names no end token", hint="set eos_token in its tokenizer_config.json")
        self.eos_id: int = int(end)
        if chat_template is not None:
            inner.chat_template = _template(chat_template)
        self.prefix_ids = self._prefix()

    def _prefix(self) -> tuple[int, ...]:
        """Return what the tokenizer itself puts before plain text."""
        plain: list[int] = self.inner("a", add_special_tokens=False)["input_ids"]
        whole: list[int] = self.inner("a", add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        return ()

    @property
    def chat(self) -> bool:
        """See ``Tokenizer``."""
        return bool(self.inner.chat_template)

    def files(self) -> dict[str, bytes]:
        """See ``Tokenizer``."""
        with tempfile.TemporaryDirectory() as directory:
            self.inner.save_pretrained(directory)
            return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer``."""
        ids: list[int] = self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``."""
        text: str = self.inner.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        """See ``Tokenizer``.

        Raises:
            ConfigError: there is no chat template, or it refuses this conversation.
        """
        from jinja2 import TemplateError

        if not self.chat:
            raise ConfigError(
                "the tokenizer has no chat template",
                hint="give one with chat_template=FILE, or train on plain text with template=plain",
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            ids: list[int] = self.inner.apply_chat_template(
                turns, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template refuses this conversation: {type(error).__name__}",
                hint="check the roles and their order, or give another template with chat_template=FILE",
            ) from error
        return list(ids)


def _template(text: str) -> str:
    """Return the template that ``chat_template`` means: itself, or the content of the file it names."""
    if "{" in text or "\n" in text:
        return text
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template names a file that cannot be read: {path.name}", hint="give a Jinja template or its path"
        ) from error
