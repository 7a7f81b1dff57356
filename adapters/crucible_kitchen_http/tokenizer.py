"""The tokenizer of a model on a server: made here from the files that the server gives.

Knows no HTTP. Read next: ``crucible_kitchen.ports.tokenizer``.
"""

import base64
import binascii
import tempfile
from pathlib import Path

from crucible_kitchen.byte_tokenizer import FILE, ByteTokenizer
from crucible_kitchen.errors import BackendError
from crucible_kitchen.hub_tokenizer import load_tokenizer
from crucible_kitchen.ports import Tokenizer
from crucible_kitchen.types import JsonObject

__all__ = ["tokenizer_from_files"]


def tokenizer_from_files(answer: JsonObject, vocab_size: int | None = None) -> Tokenizer:
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
