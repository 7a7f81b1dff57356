"""Tools in plain text, as the Hermes models write them: the tools stand in the system message, calls in the answer.

Knows no environment. Read next: ``worker.py``.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["described", "spoken"]

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def described(tools: Sequence[dict[str, Any]]) -> str:
    """Return what a policy is told of its tools, given as OpenAI's API has them."""
    listed = "\n".join(json.dumps(tool["function"]) for tool in tools)
    return (
        f"You may call these tools:\n<tools>\n{listed}\n</tools>\n"
        'To call one, write <tool_call>{"name": NAME, "arguments": {...}}</tool_call>.\n'
    )


def spoken(text: str, first: int) -> dict[str, Any]:
    """Return an answer as a message of OpenAI's API; what is no call stays text.

    Args:
        text: what the policy wrote.
        first: number of the answer's first call, so that ids differ within an episode.
    """
    calls: list[dict[str, Any]] = []
    rest, end = [], 0
    for found in _CALL.finditer(text):
        if (call := _call(found.group(1))) is not None:
            calls.append({"id": f"call_{first + len(calls)}", "type": "function", "function": call})
            rest.append(text[end : found.start()])
            end = found.end()
    content = "".join([*rest, text[end:]]).strip() if calls else text
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def _call(text: str) -> dict[str, str] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        return None
    arguments = call.get("arguments", {})
    return {"name": call["name"], "arguments": json.dumps(arguments)} if isinstance(arguments, dict) else None
