"""The tokenizer of a model on a server: made here from the files that the server gives.

Knows no HTTP. Read next: ``crucible_kitchen.ports.tokenizer``.
"""

import base64
import binascii
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crucible_kitchen.byte_tokenizer import FILE, ByteTokenizer
from crucible_kitchen.errors import BackendError, ConfigError, MissingExtra, ModelNotFound
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.types import JsonObject, Message

__all__ = ["load_tokenizer", "tokenizer_from_files"]


def tokenizer_from_files(answer: JsonObject, vocab_size: int) -> Tokenizer:
    """Make the tokenizer whose files a server gave. Blocks.

    Raises:
        MissingExtra: transformers is needed for it and is not installed.
        BackendError: they are not the files of a tokenizer.
    """
    try:
        files = {str(name): base64.b64decode(data, validate=True) for name, data in answer["files"].items()}
    except (KeyError, AttributeError, TypeError, binascii.Error) as error:
        raise BackendError("the server's answer holds no files of a tokenizer") from error
    if FILE in files:
        return ByteTokenizer.load(files)
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            if Path(name).name != name or name.startswith("."):
                raise BackendError("the server names a tokenizer's file outside its directory")
            (Path(directory) / name).write_bytes(data)
        return load_tokenizer(directory, vocab_size)


def load_tokenizer(name: str, vocab_size: int = 0) -> Tokenizer:
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
            f"there is no tokenizer {name!r}", hint="give the option tokenizer= a directory or a hub id"
        ) from error
    if inner.eos_token_id is None:
        raise ConfigError(f"the tokenizer {name!r} names no end token", hint="set eos_token in its configuration")
    return _Tokenizer(inner, vocab_size or len(inner))


class _Tokenizer:
    """A transformers tokenizer as ``Tokenizer``."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner = inner
        self.vocab_size = vocab_size
        self.eos_id = int(inner.eos_token_id)
        self.chat = bool(inner.chat_template)
        plain, whole = (self._ids("a", special=special) for special in (False, True))
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        self.prefix_ids = tuple(whole[: starts[0]]) if starts else ()

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._inner(text, add_special_tokens=special, verbose=False)["input_ids"])

    def files(self) -> Mapping[str, bytes]:
        with tempfile.TemporaryDirectory() as directory:
            self._inner.save_pretrained(directory)
            return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}

    def encode(self, text: str) -> list[int]:
        return self._ids(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        if not self.chat:
            raise ConfigError("the tokenizer has no chat template", hint="train on plain text with template=plain")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return list(
            self._inner.apply_chat_template(
                turns, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
            )
        )
