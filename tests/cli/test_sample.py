"""``sample``: what a name means, one reply or a chat, and bad input."""

import json
import os
import pty
import subprocess
import sys

import anyio
import pytest

from crucible_kitchen.types import ModelVersion, SessionSpec

SHORT = ("--max-tokens", 12, "--seed", 3)


@pytest.fixture
def tiny_export(tmp_path):
    """A directory with an exported model that is not the one named `tiny`."""
    from crucible_kitchen_torch import TorchTrainingClient

    directory = tmp_path / "exported"
    directory.mkdir()

    async def export():
        async with TorchTrainingClient(threads=1).open_session(SessionSpec("tiny", None, 5, str(tmp_path))) as session:
            await session.export(str(directory))

    anyio.run(export)
    return directory


def test_a_prompt_is_answered_and_the_same_seed_answers_the_same(cli):
    one, two = [cli("sample", "tiny", "--prompt", "hello", *SHORT) for _ in range(2)]
    other = cli("sample", "tiny", "--prompt", "hello", "--max-tokens", 12, "--seed", 4)
    assert one.code == two.code == 0
    assert one.out == two.out != other.out
    assert one.out.strip()


def test_json_states_the_reply_and_how_it_ended(cli):
    found = cli("sample", "tiny", "-p", "hello", *SHORT, "--json").json
    assert set(found) == {"text", "stop_reason", "tokens", "mean_logprob", "version"}
    assert found["tokens"] <= 12
    assert found["mean_logprob"] < 0


def test_a_directory_a_run_and_a_version_are_the_same_model(cli, home, tiny_export):
    from crucible_kitchen_files import FilesBlobStore
    from crucible_kitchen_sqlite import SqliteModelRegistry

    def reply(model):
        outcome = cli("sample", model, "-p", "hello", *SHORT)
        assert outcome.code == 0, outcome.err
        return outcome.out

    direct = reply(tiny_export)
    run = home / "runs" / "some-run"
    run.mkdir(parents=True)

    async def register():
        blobs, registry = FilesBlobStore(home=home), SqliteModelRegistry(home=home)
        stored = await blobs.put_tree(tiny_export, kind="weights", name="tiny")
        version = await registry.register(
            "cook", stored.uri, lineage={"run": "some-run"}, metrics={}, idempotency_key="one"
        )
        assert isinstance(version, ModelVersion)
        await registry.set_alias("cook", "best", version.version, expected=None)
        await registry.aclose()
        await blobs.aclose()

    anyio.run(register)
    tiny_export.rename(run / "export")
    assert reply("some-run") == reply("cook:1") == reply("cook:best") == direct
    assert reply("tiny") != direct


def test_standard_input_is_the_prompt_where_there_is_no_terminal(cli, monkeypatch, tmp_path):
    text = tmp_path / "prompt"
    text.write_text("hello\n")
    with text.open() as given:
        monkeypatch.setattr(sys, "stdin", given)
        piped = cli("sample", "tiny", *SHORT)
    assert piped.out == cli("sample", "tiny", "-p", "hello", *SHORT).out


def test_another_backend_answers_in_one_piece(cli):
    outcome = cli("sample", "tiny", "-p", "hello", *SHORT, "--adapter", "training_client=noop")
    assert outcome.code == 0
    assert outcome.out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nobody:1", "-p", "x"), 2, "not_found.version"),
        (("no/such/model/here", "-p", "x"), 2, "not_found.model"),
        (("empty-run", "-p", "x"), 2, "has exported no weights"),
        (("orphan-run", "-p", "x"), 2, "adapts the base model"),
        (("tiny", "-p", " "), 2, "the prompt is empty"),
        (("tiny", "-p", "x", "--max-tokens", "0"), 1, "max_tokens"),
        (("tiny", "-p", "x", "--temperature", "-1"), 1, "temperature"),
        (("tiny", "-p", "x" * 3000), 1, "a prompt has 1 to 2047 tokens"),
        (("tiny", "-p", "x", "--adapter", "evaluator=noop"), 2, "sample needs no evaluator"),
    ],
)
def test_bad_input_is_one_clear_error(cli, home, arguments, code, words):
    (home / "runs" / "empty-run").mkdir(parents=True)
    orphan = home / "runs" / "orphan-run" / "export"
    orphan.mkdir(parents=True)
    (orphan / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/away"}))
    outcome = cli("sample", *arguments)
    assert outcome.code == code
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert not outcome.out


def test_in_a_terminal_it_is_a_chat_that_survives_an_interrupted_reply(tmp_path):
    """Ctrl-C during an endless reply brings the next prompt; Ctrl-D ends the chat with success."""
    outside, inside = pty.openpty()
    terminal = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    command = f"{terminal}; from crucible_kitchen.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "sample", "tiny", "--max-tokens", "2000", "--temperature", "1"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(inside)
    seen = bytearray()

    def until(words, *, beyond=0):
        while seen.count(words) < 1 or len(seen) - seen.rindex(words) < beyond:
            seen.extend(os.read(outside, 1024))
        seen.clear()

    until(b"> ")
    os.write(outside, b"hello\n")
    until(b"hello", beyond=20)
    os.write(outside, b"\x03")
    until(b"\n> ")
    os.write(outside, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(outside)


def test_a_checkpoint_of_a_run_answers_by_its_step_and_a_run_without_export_by_its_newest(cli, home):
    import shutil

    trained = cli(
        "run", "supervised", "model=tiny", "dataset=sums", "max_steps=4", "save_every=2", "batch_size=8",
        "eval_size=2", "eval_max_tokens=2", "learning_rate=0.05", "--adapter=training_client=torch,threads=1", "--json",
    )  # fmt: skip
    run = trained.json["run_id"]
    final, two, four = [cli("sample", name, "-p", "1+1=", *SHORT) for name in (run, f"{run}@2", f"{run}@4")]
    assert final.code == two.code == four.code == 0, two.err
    assert four.out == final.out != two.out
    shutil.rmtree(home / "runs" / run / "export")
    assert cli("sample", run, "-p", "1+1=", *SHORT).out == four.out
    missing = cli("sample", f"{run}@3", "-p", "1+1=")
    assert missing.code == 2
    assert "has no checkpoint of step 3" in missing.err
    assert "steps 2, 4" in missing.err
