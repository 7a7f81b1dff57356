"""Tokenizers of transformers: from a directory or the hub, as a model or a service needs them.

The one file of the core that imports transformers, and only when asked for a tokenizer. Read next:
``crucible_kitchen.ports.tokenizer``.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crucible_kitchen.errors import ConfigError, MissingExtra, ModelNotFound
from crucible_kitchen.types import Message

__all__ = ["HubTokenizer", "load_tokenizer"]


def load_tokenizer(name: str, vocab_size: int | None = None) -> "HubTokenizer":
    """Load a tokenizer by directory or hub id. Blocks.

    Args:
        name: the directory or id.
        vocab_size: number of ids that the model scores; None: as many as the tokenizer knows.

    Raises:
        MissingExtra: transformers is not installed.
        ModelNotFound: there is no such tokenizer.
        ConfigError: it names no end token.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "torch") from error
    try:
        inner = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"there is no tokenizer {name!r}", hint="give the option tokenizer= a directory or a hub id"
        ) from error
    return HubTokenizer(inner, vocab_size)


class HubTokenizer:
    """A tokenizer of transformers.

    Args:
        inner: what ``AutoTokenizer`` gave.
        vocab_size: number of ids that the *model* scores, which can be more than the tokenizer knows; None: as many.
        chat_template: a Jinja template or the path of a file with one, in place of the tokenizer's own.
        eos_id: used where the tokenizer names no end token.

    Raises:
        ConfigError: no end token is named.
    """

    def __init__(
        self, inner: Any, vocab_size: int | None = None, chat_template: str | None = None, eos_id: int | None = None
    ) -> None:
        self.inner = inner
        self.vocab_size = len(inner) if vocab_size is None else vocab_size
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
