"""The page of promises names tests that exist: a renamed or deleted test shows here."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]


def test_there_are_twenty_three_promises_each_with_its_tests():
    numbers = [int(section.partition(".")[0]) for section in SECTIONS]
    assert numbers == list(range(1, 24))
    without = [section.partition("\n")[0] for section in SECTIONS if not NAMED.search(section)]
    assert not without


def test_every_test_that_is_named_exists():
    absent = []
    for path, name in NAMED.findall(PAGE):
        file = ROOT / path
        defined = rf"^\s*(?:async )?(?:def|class) {name}\b"
        if not file.is_file() or not re.search(defined, file.read_text(encoding="utf-8"), re.MULTILINE):
            absent.append(f"{path}::{name}")
    assert not absent


def test_nothing_else_is_written_as_if_it_were_a_test():
    named = {f"{path}::{name}" for path, name in NAMED.findall(PAGE)}
    assert set(re.findall(r"`([^`]*::[^`]*)`", PAGE)) == named
