"""A tokenizer of bytes: one id per byte of UTF-8, and special tokens behind them.

The small built-in models use it. It is described by one small file, from which it is made again elsewhere. Knows no
model. Read next: ``crucible_kitchen.ports.tokenizer``.
"""

import json
import re
from collections.abc import Mapping, Sequence

from crucible_kitchen.errors import ConfigError
from crucible_kitchen.types import Message

__all__ = ["FILE", "ByteTokenizer"]

FILE = "byte_tokenizer.json"
"""The file that describes one."""


class ByteTokenizer:
    """Ids 0 to 255 are bytes; ids from 256 on are special tokens.

    Args:
        specials: the texts of the special tokens, in the order of their ids.
        end: the one that ends a sequence.
        prefix: those that open every plain sequence.
        opening: what opens a turn of a conversation, with ``{role}`` in it; ``end`` closes it.
        roles: the roles that turns may have; empty: all.
    """

    chat = False

    def __init__(
        self,
        specials: Sequence[str],
        *,
        end: str,
        prefix: Sequence[str] = (),
        opening: str,
        roles: Sequence[str] = (),
    ) -> None:
        self._specials = {text: 256 + i for i, text in enumerate(specials)}
        self._pattern = re.compile("(" + "|".join(re.escape(text) for text in specials) + ")")
        self._opening = opening
        self._roles = tuple(roles)
        self._end = end
        self.vocab_size = 256 + len(specials)
        self.eos_id = self._specials[end]
        self.prefix_ids = tuple(self._specials[text] for text in prefix)

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> "ByteTokenizer":
        """Make the tokenizer that ``files`` of another describe.

        Raises:
            ConfigError: they describe none.
        """
        try:
            facts = json.loads(files[FILE])
            return ByteTokenizer(
                [str(text) for text in facts["specials"]],
                end=str(facts["end"]),
                prefix=[str(text) for text in facts["prefix"]],
                opening=str(facts["opening"]),
                roles=[str(role) for role in facts["roles"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("the files describe no tokenizer of bytes") from error

    def files(self) -> dict[str, bytes]:
        """See ``Tokenizer``."""
        prefix = [text for text, i in self._specials.items() if i in self.prefix_ids]
        facts = {"specials": list(self._specials), "end": self._end, "prefix": prefix}
        facts |= {"opening": self._opening, "roles": list(self._roles)}
        return {FILE: json.dumps(facts, indent=1).encode()}

    def encode(self, text: str) -> list[int]:
        """See ``Tokenizer``."""
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
            else:
                ids.extend(part.encode("utf-8", errors="replace"))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``; bytes that are not UTF-8 become replacement characters."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        """See ``Tokenizer``; special tokens in a message are plain text."""
        ids = list(self.prefix_ids)
        for message in messages:
            if self._roles and message.role not in self._roles:
                raise ConfigError(f"the model has no role {message.role!r}", hint=f"roles: {', '.join(self._roles)}")
            ids += [*self.encode(self._opening.format(role=message.role)), *message.content.encode(errors="replace")]
            ids.append(self.eos_id)
        return [*ids, *self.encode(self._opening.format(role="assistant"))] if generation_prompt else ids
