"""Every block of code in the documents does what it says, in small sizes."""

import json
import re
import tomllib

from crucible_kitchen.config import build_config
from crucible_kitchen.rows import read_row
from crucible_kitchen.workflows.supervised import SupervisedConfig

LANGUAGES = {"python", "console", "text", "toml", "json", "jsonl", "mermaid", "yaml"}


def test_every_block_says_what_it_is(block):
    assert block.language in LANGUAGES, f"{block.id}: a block of the language {block.language!r}"
    for reason in ("not run", "example"):
        assert len(block.said.get(reason, "a reason given").split()) >= 3, f"{block.id}: `{reason}` without a reason"
    if block.language == "text":
        assert {"prints", "example", "picture"} & set(block.said), f"{block.id}: what is this text?"
        measured = re.search(r"\d\.\d{2,}", block.text) and "picture" not in block.said
        assert not measured or "machine" in block.said.get("example", "machine"), f"{block.id}: whose numbers?"


def test_a_script_runs_and_prints_what_the_document_says(script, place, says):
    place.furnish(script.document, script.line)
    (place.directory / "script.py").write_text(script.content(), encoding="utf-8")
    code, output = place.run("python script.py")
    assert code == 0, output
    assert not re.search(r"Traceback|Warning|^error", output, re.MULTILINE), output
    says(output, script.prints, script.id)


def test_commands_end_and_answer_as_the_document_says(talking_document, place, says):
    document, blocks = talking_document
    for block in blocks:
        place.furnish(document, block.line)
        for command in block.commands():
            code, output = place.run(command.run)
            assert code == command.code, f"{block.id}: {command.shown}\nexit {code}\n{output}"
            assert "Traceback" not in output, output
            says(output, command.output, f"{block.id}: {command.shown}")


def test_data_and_configs_are_valid(block):
    if block.language == "toml" and block.runs:
        build_config(SupervisedConfig, tomllib.loads(block.text))
    if block.language == "json" and block.runs:
        json.loads(block.text)
    if block.language == "jsonl" and block.runs:
        for index, line in enumerate(block.text.splitlines()):
            read_row(json.loads(line), {}, index)
