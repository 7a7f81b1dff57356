"""The tokenizer of a served model, read from a directory or the hub, because the HTTP shape has none.

Knows no HTTP. Read next: ``crucible_kitchen_openai.sampling``.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crucible_kitchen.errors import ConfigError, MissingExtra, ModelNotFound
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.types import Message

__all__ = ["load_tokenizer"]


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer of transformers by directory or hub id. Blocks.

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
            f"there is no tokenizer {name!r}", hint="give tokenizer= a directory or a hub id"
        ) from error
    if inner.eos_token_id is None:
        raise ConfigError(f"the tokenizer {name!r} names no end token", hint="set eos_token in its configuration")
    return _ServedTokenizer(inner)


class _ServedTokenizer:
    """A transformers tokenizer as ``Tokenizer``."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size = len(inner)
        self.eos_id = int(inner.eos_token_id)
        self.chat = bool(inner.chat_template)
        opening = inner.build_inputs_with_special_tokens([]) if inner.bos_token_id is not None else []
        self.prefix_ids = tuple(opening[:1]) if opening[:1] == [inner.bos_token_id] else ()

    def files(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as directory:
            self._inner.save_pretrained(directory)
            return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}

    def encode(self, text: str) -> list[int]:
        return list(self._inner(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        if not self.chat:
            raise ConfigError("the tokenizer has no chat template", hint="use plain prompts: template=plain")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return list(
            self._inner.apply_chat_template(
                turns, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
            )
        )
