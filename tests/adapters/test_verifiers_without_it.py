"""Environments of the package verifiers, as far as it is not needed for them."""

import json

import pytest

from crucible_kitchen.errors import MissingExtra
from crucible_kitchen.rl.environments import open_environment
from crucible_kitchen_environments import verifiers
from crucible_kitchen_verifiers.hermes import described, spoken


def test_without_the_package_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra) as caught:
        open_environment("verifiers:gsm8k")
    assert "crucible-kitchen[verifiers]" in str(caught.value.hint)


def test_tools_are_described_with_their_arguments() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    text = described([tool])
    assert json.dumps(tool["function"]) in text
    assert "<tool_call>" in text


def call(name: str, arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_calls_are_read_with_ids_of_their_own_and_the_rest_is_text() -> None:
    said = spoken(f"First {call('a', {'x': 1})}\n{call('b', {})} done", first=3)
    assert said["content"].split() == ["First", "done"]
    assert said["tool_calls"] == [
        {"id": "call_3", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
        {"id": "call_4", "type": "function", "function": {"name": "b", "arguments": "{}"}},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "plain  text ",
        "<tool_call>no json</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
        call("a", [1]),
        '<tool_call>{"name": "a"',
    ],
)
def test_what_is_no_call_stays_text_to_the_letter(text: str) -> None:
    assert spoken(text, first=0) == {"role": "assistant", "content": text}
