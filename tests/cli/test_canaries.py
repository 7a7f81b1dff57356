"""Secrets and dataset rows are nowhere but where they belong: planted, run through everything, searched for everywhere.

The secret goes to real adapters that send it over HTTP to a service that tells it back in its errors. Rows go through
every workflow and through runs that fail. Then every byte below ``--home`` and all output is searched.
"""

import json
import os
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen import Kitchen, Workflow, stage
from crucible_kitchen.errors import TransientBackendError
from crucible_kitchen.ports import SamplingClient
from crucible_kitchen.redaction import redacted, remember_secret, without_values
from crucible_kitchen_noop.tokenizer import ByteTokenizer
from crucible_kitchen_openai import OpenAISamplingClient

SECRET = "sk-canary-0451-do-not-tell"
ROW = "the canary pelican sings"
WORD = "pelican"

FLOWS = '''
"""A user's stages that fail in the worst way: with what they know in the message."""

import os

from crucible_kitchen import RunConfig, Workflow, stage
from crucible_kitchen.errors import BackendError
from crucible_kitchen.ports import LLMClient
from crucible_kitchen.types import Message

ROW = "the canary pelican sings"


@stage()
async def ask(llm_client: LLMClient) -> None:
    await llm_client.chat([Message("user", ROW)])


@stage()
async def tell_the_key(llm_client: LLMClient) -> None:
    raise RuntimeError("refused with the key " + os.environ["CANARY_KEY"])


@stage()
async def tell_the_key_as_ours(llm_client: LLMClient) -> None:
    raise BackendError("refused the key " + os.environ["CANARY_KEY"], hint="not " + os.environ["CANARY_KEY"])


@stage()
async def warn_the_key(llm_client: LLMClient, run: "Run") -> None:
    run.warn("key", "the key is " + os.environ["CANARY_KEY"])


@stage()
async def read_a_number() -> None:
    float(ROW)


@stage()
async def look_up() -> None:
    {}[ROW]


@stage()
async def validate_a_row() -> None:
    RunConfig(seed=ROW)


@stage()
async def complain() -> None:
    try:
        int(ROW)
    except ValueError as error:
        raise RuntimeError(f"row {[ROW]!r} is bad") from error


@stage()
async def tell_it_plainly() -> None:
    raise RuntimeError(f"the row {ROW} is bad")


@stage()
async def read_a_word() -> None:
    float(ROW.split()[2])


@stage()
async def say_it_all() -> None:
    raise LookupError(ROW)


@stage()
async def fail_in_company() -> None:
    raise ExceptionGroup("two rows", [RuntimeError(ROW), ValueError(f"and {ROW}")])


from crucible_kitchen import Run  # noqa: E402
from crucible_kitchen.workflows.reinforcement import reinforcement  # noqa: E402
from crucible_kitchen.workflows.supervised import supervised  # noqa: E402


@stage()
async def stumble(run: Run) -> None:
    """Fail once, over a row."""
    fell = run.directory / "fell"
    if max(run.turns.values()) == 2 and not fell.exists():
        fell.touch()
        raise RuntimeError(f"stumbled over {ROW}")


stumbling = supervised.insert_after("log_step", stumble)
learning = reinforcement.insert_after("log_rl_metrics", stumble)
for _stage in (ask, tell_the_key, tell_the_key_as_ours, warn_the_key, read_a_number, look_up, validate_a_row,
               complain, tell_it_plainly, read_a_word, say_it_all, fail_in_company):
    globals()["w_" + _stage.name] = Workflow("w_" + _stage.name, _stage)
'''

TELLING = ["read_a_number", "look_up", "validate_a_row", "complain", "tell_it_plainly", "read_a_word", "say_it_all"]


class Echo(BaseHTTPRequestHandler):
    """Tells back the key and the question, in whatever shape and status is asked for."""

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        told = {"message": f"{self.headers.get('authorization')} {body}", "code": self.headers.get("authorization")}
        status, answer = self.server.script  # type: ignore[attr-defined]
        data = (answer or json.dumps({"error": told})).encode()
        self.send_response(status, f"{SECRET}")
        for name, value in (("content-length", str(len(data))), ("x-key", SECRET)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def service() -> Any:
    """An HTTP service on the loopback interface that tells secrets back."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.script = (200, None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def canaries(cli: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs commands and afterwards searches all they wrote."""
    monkeypatch.setenv("CANARY_KEY", SECRET)
    (tmp_path / "flows.py").write_text(FLOWS, encoding="utf-8")
    rows = [{"prompt": f"{ROW} question {i}", "completion": f"{ROW} answer {i}"} for i in range(24)]
    pairs = [{"prompt": f"{ROW} {i}", "chosen": f"{ROW} good {i}", "rejected": f"{ROW} bad {i}"} for i in range(24)]
    sums = [{"problem": f"{ROW} {i}", "answer": f"{ROW} {i}"} for i in range(24)]
    for name, made in (("rows", rows), ("pairs", pairs), ("broken", [*rows, {"prompt": ROW}]), ("sums", sums)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    (tmp_path / "torn.jsonl").write_text(json.dumps(rows[0]) + '\n{"prompt": "' + ROW + "\n", encoding="utf-8")
    (tmp_path / "kinds.jsonl").write_text(json.dumps({"prompt": {"a": [ROW]}, "completion": ROW}) + "\n", "utf-8")
    said: list[str] = []

    def call(*arguments: Any, code: int = 0) -> Any:
        ended = cli(*arguments)
        assert ended.code == code, ended.err
        said.append(ended.out + ended.err)
        return ended

    yield call
    told = "".join(said)
    told += "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("events.jsonl"))
    for canary in (SECRET, ROW, WORD):
        assert canary not in told
        shapes = [canary.encode(form) for form in ("utf-8", "utf-16-le")]
        for path in home.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not any(shape in content for shape in shapes), f"{canary!r} is in {path.relative_to(home)}"
    assert any(home.rglob("runs.db")), "nothing ran"


def judged(service: Any, **options: str) -> list[str]:
    given = {"base_url": f"http://127.0.0.1:{service.server_port}/v1", "model": "m", "max_delay": "0"} | options
    text = ",".join(f"{key}={value}" for key, value in given.items())
    return ["--adapter", f"llm_client=openai,{text},api_key=env:CANARY_KEY"]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_a_service_that_tells_the_key_and_the_question_back_is_not_quoted(
    canaries: Any, service: Any, status: int
) -> None:
    service.script = (status, None)
    canaries("run", "flows.py:w_ask", *judged(service), "--json", "--jsonl", "events.jsonl", "--debug", code=1)
    canaries("show", canaries("runs", "--json").json[0]["run_id"])
    canaries("events")


@pytest.mark.parametrize("answer", [SECRET, json.dumps([SECRET]), json.dumps({"choices": SECRET})])
def test_an_answer_of_another_shape_is_not_quoted(canaries: Any, service: Any, answer: str) -> None:
    service.script = (200, answer)
    canaries("run", "flows.py:w_ask", *judged(service), code=1)


def test_a_sampling_service_that_tells_the_key_back_is_not_quoted(canaries: Any, service: Any) -> None:
    service.script = (500, None)
    url = f"http://127.0.0.1:{service.server_port}/v1"
    client = OpenAISamplingClient(
        base_url=url, tokenizer=ByteTokenizer(), max_delay=0, retries=0, api_key=os.environ["CANARY_KEY"]
    )

    @stage()
    async def sample(sampling_client: SamplingClient) -> None:
        async with sampling_client.open_sampler("toy") as sampler:
            await sampler.compute_logprobs([[1, 2, 3]])

    with pytest.raises(TransientBackendError) as raised:
        anyio.run(Kitchen({"sampling_client": client}).run, Workflow("w", sample))
    shown = "".join(traceback.format_exception(raised.value))
    assert SECRET not in shown
    canaries("show", canaries("runs", "--json").json[0]["run_id"])


@pytest.mark.parametrize(("name", "hidden"), [("tell_the_key", "..."), ("tell_the_key_as_ours", "***")])
def test_a_stage_that_tells_the_key_of_an_adapter_does_not(canaries: Any, service: Any, name: str, hidden: str) -> None:
    ended = canaries("run", f"flows.py:w_{name}", *judged(service), "--debug", code=1)
    assert f"key {hidden}" in ended.err
    canaries("show", canaries("runs", "--json").json[0]["run_id"])


def test_a_warning_that_tells_the_key_tells_stars(canaries: Any, service: Any) -> None:
    canaries("run", "flows.py:w_warn_the_key", *judged(service))
    assert "the key is ***" in canaries("events").out


def test_an_option_that_an_adapter_refuses_is_not_quoted(canaries: Any, service: Any) -> None:
    canaries("run", "flows.py:w_ask", *judged(service, timeout="env:CANARY_KEY"), code=2)
    canaries("run", "flows.py:w_ask", *judged(service, unknown="env:CANARY_KEY"), code=2)
    canaries("validate", "flows.py:w_ask", *judged(service))
    canaries("run", "flows.py:w_ask", *judged(service), code=1)


@pytest.mark.parametrize("name", [*TELLING, "fail_in_company"])
def test_a_message_that_tells_a_row_is_told_without_it_and_with_its_place(canaries: Any, name: str) -> None:
    ended = canaries("run", f"flows.py:w_{name}", "--json", "--debug", "--jsonl", "events.jsonl", code=1)
    assert f", in {name}" in ended.err
    assert "..." in ended.json["error"]["message"]
    (error,) = [row for row in canaries("events", "--json").json if row["event"] == "stage.error"]
    assert any(f":{name}:" in line for line in error["traceback"])


@pytest.mark.parametrize(
    ("workflow", "dataset", "options"),
    [
        ("supervised", "rows", ["save_every=2", "eval_every=2"]),
        ("preference", "pairs", ["save_every=2"]),
        ("distillation", "rows", ["teacher=any", "max_steps=2"]),
        ("distillation", "rows", ["teacher=any", "max_steps=2", "method=off_policy"]),
    ],
)
def test_a_run_over_rows_keeps_none_of_them(canaries: Any, workflow: str, dataset: str, options: list[str]) -> None:
    noop = ["--adapter", "training_client=noop", "--jsonl", "events.jsonl"]
    small = ["batch_size=8", *([] if workflow == "preference" else ["eval_size=4"])]
    run = canaries("run", workflow, "model=any", f"dataset={dataset}.jsonl", *small, *options, *noop, "--json").json
    canaries("show", run["run_id"])
    canaries("compare", run["run_id"], run["run_id"])


@pytest.mark.parametrize(
    ("workflow", "options"),
    [
        ("stumbling", ["dataset=rows.jsonl", "batch_size=4", "epochs=2", "save_every=2", "eval_size=4"]),
        ("learning", ["env=math:sums.jsonl", "group_size=2", "groups_per_batch=2", "num_rollouts=4", "save_every=1"]),
    ],
)
def test_a_run_that_stumbles_over_a_row_and_goes_on_keeps_none(
    canaries: Any, workflow: str, options: list[str]
) -> None:
    told = ["--json", "--debug", "--jsonl", "events.jsonl"]
    noop = ["--adapter", "training_client=noop"]
    failed = canaries("run", f"flows.py:{workflow}", "model=any", *options, *noop, *told, code=1)
    assert failed.json["error"]["message"].startswith("RuntimeError: stumbled over ")
    done = canaries("resume", failed.json["run_id"], *told)
    assert done.json["status"] == "completed"
    for look in (["show"], ["show", "--json"], ["events"], ["events", "--json"]):
        canaries(look[0], done.json["run_id"], *look[1:])


def test_the_torch_executor_keeps_no_row(canaries: Any) -> None:
    canaries("run", "supervised", "model=tiny", "dataset=rows.jsonl", "batch_size=8", "max_steps=1", "eval_size=2")


@pytest.mark.parametrize(
    ("dataset", "option"),
    [
        ("broken", "seed=0"),
        ("torn", "seed=0"),
        ("kinds", "seed=0"),
        ("pairs", "seed=0"),
        ("rows", "on_too_long=error"),
        ("rows", 'fields={"completion": "nothing"}'),
    ],
)
def test_rows_that_cannot_be_used_are_told_by_their_place(canaries: Any, dataset: str, option: str) -> None:
    noop = ["--adapter", "training_client=noop"]
    canaries("run", "supervised", "model=any", f"dataset={dataset}.jsonl", "max_length=8", option, *noop, code=1)
    canaries("events")


def test_a_text_about_options_is_told_without_what_it_quotes_but_with_names() -> None:
    assert (
        without_values("could not convert string to float: 'two words'") == "could not convert string to float: '...'"
    )
    assert without_values("No module named 'foo.bar'") == "No module named 'foo.bar'"
    assert without_values("\"it's a row\" and 'x y'") == "\"...\" and '...'"
    assert without_values("the stove is cold") == "the stove is cold"
    assert without_values("x [type=int, input_value='a b', input_type=str]") == (
        "x [type=int, input_value=..., input_type=str]"
    )


def test_a_word_too_short_to_be_a_secret_is_left_alone() -> None:
    remember_secret("abc")
    remember_secret(None)
    assert redacted("abcdef") == "abcdef"
