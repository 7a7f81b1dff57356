"""What a server is sent by mistake or malice: an error of the wire's shape, nothing lost, others undisturbed."""

import json
import subprocess
import sys

import httpx
import pytest

from crucible_kitchen.errors import (
    BackendUserError,
    CapabilityError,
    ConfigError,
    ModelNotFound,
    NotFoundError,
    SessionLost,
    TransientBackendError,
)
from crucible_kitchen.service.models import Limits
from crucible_kitchen.service.run import check_reach
from crucible_kitchen.testing.contracts.training_case import batch, datum, look
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SessionSpec
from crucible_kitchen.wire.messages import PREFIX
from crucible_kitchen_http import HttpSamplingClient, HttpTrainingClient

pytestmark = pytest.mark.anyio

LIMITS = Limits(gap=0.3, body=200_000, open_calls=40)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server with small limits; the toy executor, so that only the wire costs time."""
    with RunningServer("toy", tmp_path_factory.mktemp("strict"), "a-key", limits=LIMITS, adapter="noop") as running:
        yield running


class Raw:
    """A client of bytes: sends what it is told and returns what it gets."""

    def __init__(self, url, http):
        self.url = url
        self.http = http

    async def post(self, path, body):
        data = body if isinstance(body, (bytes, str)) else json.dumps(body)
        answer = await self.http.post(f"{self.url}{PREFIX}{path}", content=data, headers={"X-API-Key": "a-key"})
        return answer.status_code, answer.json()

    async def result(self, taken):
        return (await self.post("retrieve_future", {"request_id": taken["request_id"]}))[1]

    async def model(self):
        session = (await self.post("create_session", {}))[1]["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "toy", "lora_config": {"rank": 2}}
        return (await self.result((await self.post("create_model", body))[1]))["model_id"]

    async def call(self, verb, model, number, **body):
        """Submit a call that is taken, and return its result."""
        status, taken = await self.post(verb, {"model_id": model, "seq_id": number, **body})
        assert status == 200, taken
        return await self.result(taken)


@pytest.fixture
async def raw(strict):
    async with httpx.AsyncClient(timeout=10) as http:
        yield Raw(strict.url, http)


@pytest.fixture
async def neighbour(strict, tmp_path):
    """Another session, which must notice nothing: it is looked at before and trained after."""
    client = HttpTrainingClient(base_url=strict.url, api_key="a-key")
    async with client.open_session(SessionSpec("toy", LoraSpec(2), 5, str(tmp_path))) as session:
        before = await look(session)
        yield session
        assert [a.tobytes() for a in await look(session)] == [b.tobytes() for b in before]
        async with session.step(0) as step:
            await step.forward_backward(batch(session))
            assert (await (await step.apply(AdamParams(0.1)))).step == 1
    await client.aclose()


def told(answer):
    """Check the shape of an error and return its code."""
    assert isinstance(answer["error"], str)
    assert answer["error"]
    assert answer["category"] in ("user", "server", "unknown")
    return answer["error_class"]


def data(tokens=(1, 2, 3), **inputs):
    tensor = {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]}
    targets = {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}
    chunk = {"type": "encoded_text", "tokens": list(tokens)}
    return {
        "model_input": {"chunks": [chunk]},
        "loss_fn_inputs": {"target_tokens": targets, "weights": tensor} | inputs,
    }


def gradient(*rows, loss="cross_entropy", **more):
    return {"forward_backward_input": {"data": list(rows), "loss_fn": loss, **more}}


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff\xfe", b'{"a":' * 5000, b"null"])
async def test_a_body_that_is_no_json_object_is_refused(body, raw, neighbour):
    for path in ("create_session", "forward_backward", "retrieve_future", "asample"):
        status, answer = await raw.post(path, body)
        assert status == 400
        assert told(answer) == "backend.user"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model_id": 3},
        {"model_id": "m", "seq_id": "one"},
        {"model_id": ["m"]},
    ],
)
async def test_an_envelope_that_cannot_be_read_is_refused(body, raw, neighbour):
    status, answer = await raw.post("optim_step", body)
    assert status in (400, 404)
    told(answer)


TENSORS = {
    "a dtype that is not known": {"weights": {"data": [1, 1, 1], "dtype": "float8"}},
    "texts for numbers": {"weights": {"data": ["a", "b", "c"], "dtype": "float32"}},
    "nested numbers": {"weights": {"data": [[1, 1, 1]], "dtype": "float32"}},
    "ragged numbers": {"weights": {"data": [[1], 1, 1], "dtype": "float32"}},
    "nothing for a number": {"weights": {"data": [None, 1, 1], "dtype": "float32"}},
    "fractions for ids": {"target_tokens": {"data": [1.5, 2, 3], "dtype": "int64"}},
    "an id beyond 64 bits": {"target_tokens": {"data": [2**70, 2, 3], "dtype": "int64"}},
    "a shape of another size": {"weights": {"data": [1, 1, 1], "dtype": "float32", "shape": [4]}},
    "a negative shape": {"weights": {"data": [1, 1, 1], "dtype": "float32", "shape": [-1, -3]}},
    "a tensor of another length": {"weights": {"data": [1.0], "dtype": "float32", "shape": [1]}},
    "a sparse tensor": {"weights": {"data": [1.0], "dtype": "float32", "shape": [3], "sparse_crow_indices": [0, 1]}},
    "no targets": {"target_tokens": None},
}


@pytest.mark.parametrize("what", TENSORS)
async def test_a_malformed_tensor_is_an_error_of_its_own_call(what, raw, neighbour):
    model = await raw.model()
    row = data(**TENSORS[what])
    if what == "no targets":
        del row["loss_fn_inputs"]["target_tokens"]
    assert told(await raw.call("forward_backward", model, 1, **gradient(row))) == "backend.user"
    assert "metrics" in await raw.call("forward_backward", model, 2, **gradient(data()))


async def test_what_a_model_cannot_take_is_an_error_of_its_own_call(raw, neighbour):
    model = await raw.model()
    image = data()
    image["model_input"]["chunks"] = [{"type": "image", "data": "", "format": "png"}]
    wrong = [
        gradient(data(tokens=(1, 2, 10**6))),
        gradient(data(tokens=(1, -2, 3))),
        gradient(data(tokens=("a", "b", "c"))),
        gradient(image),
        gradient(data(), loss="no_such_loss"),
        gradient(data(), loss_fn_config={"beta": 1.0}),
        {"forward_backward_input": {"loss_fn": "cross_entropy"}},
    ]
    codes = [told(await raw.call("forward_backward", model, n, **body)) for n, body in enumerate(wrong, 1)]
    assert set(codes) == {"backend.user", "adapter.capability"}
    number = len(wrong)
    for adam in ({"learning_rate": -1.0}, {"learning_rate": "fast"}, {"beta1": 1.5}):
        number += 1
        assert told(await raw.call("optim_step", model, number, adam_params=adam)) == "backend.user"
    assert "metrics" in await raw.call("forward_backward", model, number + 1, **gradient(data()))
    assert "metrics" in await raw.call("optim_step", model, number + 2, adam_params={})


async def test_unknown_names_are_not_found_and_gone_ones_are_lost(raw, neighbour):
    model = await raw.model()
    other = model.replace(model[:6], "ffffff")
    for path, body in {
        "optim_step": {"model_id": "no-such-model"},
        "retrieve_future": {"request_id": "no-such-request"},
        "asample": {"sampling_session_id": "none", "prompt": {"chunks": []}},
        "session_heartbeat": {"session_id": "none"},
    }.items():
        status, answer = await raw.post(path, body)
        assert (status, told(answer)) == (404, "not_found")
    for path, body in {"optim_step": {"model_id": other}, "retrieve_future": {"request_id": "0123456789ab-7"}}.items():
        status, answer = await raw.post(path, body)
        assert (status, told(answer)) == (410, "backend.session_lost")
    session = model.partition(":")[0]
    body = {"session_id": session, "model_seq_id": 1, "base_model": "other"}
    status, answer = await raw.post("create_model", body)
    assert (status, told(answer)) == (404, "not_found.model")


@pytest.mark.parametrize("name", ["../../escape", "a/b", "/etc/passwd", "..", "", "a" * 200, "nul\0", ".hidden"])
async def test_a_name_of_weights_cannot_leave_its_directory(name, raw, neighbour, strict):
    model = await raw.model()
    assert told(await raw.call("save_weights", model, 1, path=name)) == "backend.user"
    assert told(await raw.call("save_weights_for_sampler", model, 2, path=name)) == "backend.user"
    path = f"tinker://{model}/weights/{name}"
    assert told(await raw.call("load_weights", model, 3, path=path, optimizer=True)) in ("backend.user", "not_found")
    outside = [p for p in strict.core.index._home.parent.rglob("*escape*") if p.is_file()]
    assert not outside


async def test_weights_are_not_overwritten_unless_asked(raw):
    model = await raw.model()
    assert "path" in await raw.call("save_weights", model, 1, path="once")
    assert told(await raw.call("save_weights", model, 2, path="once")) == "store.conflict"
    assert "path" in await raw.call("save_weights", model, 3, path="once", overwrite=True)
    missing = f"tinker://{model}/weights/absent"
    assert told(await raw.call("load_weights", model, 4, path=missing, optimizer=True)) == "not_found"
    without = await raw.call("load_weights", model, 5, path=f"tinker://{model}/weights/once", optimizer=False)
    assert without["crucible"]["step"] == 0


async def test_a_gap_that_never_closes_fails_what_waits_behind_it_and_keeps_the_rest(raw, neighbour):
    model = await raw.model()
    assert "metrics" in await raw.call("forward_backward", model, 1, **gradient(data()))
    late = await raw.call("optim_step", model, 3, adam_params={})
    assert told(late) == "backend.session_lost"
    assert "2" in late["error"]
    assert "metrics" in await raw.call("forward_backward", model, 2, **gradient(data()))
    assert (await raw.call("optim_step", model, 3, adam_params={}))["crucible"]["step"] == 1


async def test_requests_run_in_the_order_of_their_numbers_once_each(raw):
    model = await raw.model()
    taken = {}
    for number in (3, 2, 4, 1):
        path = "optim_step" if number in (2, 4) else "forward_backward"
        body = {"adam_params": {}} if path == "optim_step" else gradient(data())
        asked = {"model_id": model, "seq_id": number, **body}
        taken[number] = (await raw.post(path, asked))[1]
        assert (await raw.post(path, asked))[1] == taken[number], "a repeated request is the same request"
    steps = [(await raw.result(taken[number]))["crucible"]["step"] for number in (2, 4)]
    assert steps == [1, 2]


async def test_a_model_that_is_still_being_opened_is_waited_for(raw):
    session = (await raw.post("create_session", {}))[1]["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "toy", "lora_config": {"rank": 2}}
    await raw.post("create_model", body)
    status, told_of = await raw.post("get_info", {"model_id": f"{session}:train:0"})
    assert (status, told_of["lora_rank"]) == (200, 2)


async def test_a_question_for_a_result_is_held_and_then_to_be_asked_again(tmp_path):
    assert Limits().hold <= 35
    patient = Limits(gap=600.0, hold=0.05)
    with RunningServer("toy", tmp_path / "patient", "a-key", limits=patient, adapter="noop") as running:
        async with httpx.AsyncClient(timeout=10) as http:
            raw = Raw(running.url, http)
            model = await raw.model()
            early = {"model_id": model, "seq_id": 2, "adam_params": {}}
            taken = (await raw.post("optim_step", early))[1]
            for _ in range(2):
                status, answer = await raw.post("retrieve_future", {"request_id": taken["request_id"]})
                assert (status, answer["type"], answer["request_id"]) == (408, "try_again", taken["request_id"])
            assert "metrics" in await raw.call("forward_backward", model, 1, **gradient(data()))
            assert (await raw.result(taken))["crucible"]["step"] == 1


async def test_samples_without_numbers_are_requests_of_their_own(raw):
    session = (await raw.post("create_session", {}))[1]["session_id"]
    opening = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "toy"}
    name = (await raw.post("create_sampling_session", opening))[1]["sampling_session_id"]
    body = {
        "sampling_session_id": name,
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 2, "seed": 1},
    }
    taken = [(await raw.post("asample", body))[1] for _ in range(3)]
    assert len({each["request_id"] for each in taken}) == 3
    answers = [(await raw.result(each))["sequences"][0]["tokens"] for each in taken]
    assert answers == [answers[0]] * 3


async def test_a_body_over_the_limit_is_refused_whether_its_length_is_told_or_not(raw, neighbour):
    large = b'{"a": "' + b"x" * LIMITS.body + b'"}'
    status, answer = await raw.post("create_session", large)
    assert (status, told(answer)) == (413, "backend.user")

    async def parts():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    answer = await raw.http.post(f"{raw.url}{PREFIX}create_session", content=parts(), headers={"X-API-Key": "a-key"})
    assert answer.status_code == 413


async def test_results_that_nobody_fetches_are_bounded(raw, neighbour):
    model = await raw.model()
    statuses = []
    for number in range(1, LIMITS.open_calls + 3):
        body = {"model_id": model, "seq_id": number, "forward_input": {"data": [], "loss_fn": "cross_entropy"}}
        statuses.append((await raw.post("forward", body))[0])
    assert statuses == [200] * LIMITS.open_calls + [429] * 2


@pytest.mark.parametrize("key", [None, "", "another"])
async def test_without_the_key_nothing_is_answered(key, strict):
    headers = {} if key is None else {"X-API-Key": key}
    async with httpx.AsyncClient() as http:
        for method, path in (("POST", "create_session"), ("GET", "get_server_capabilities"), ("GET", "exports/x")):
            answer = await http.request(method, f"{strict.url}{PREFIX}{path}", headers=headers)
            assert answer.status_code == 401
            told(answer.json())
        assert (await http.get(f"{strict.url}{PREFIX}healthz")).status_code == 200


def test_a_server_without_a_key_is_not_reached_from_other_machines():
    check_reach("127.0.0.1", None)
    check_reach("0.0.0.0", "a-key")
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ConfigError):
            check_reach(host, None)


async def opened(client, model="toy"):
    try:
        async with client.open_session(SessionSpec(model, LoraSpec(2), 0, "")):
            pass
    finally:
        await client.aclose()


async def test_the_client_tells_a_wrong_key_url_model_and_server_apart(strict, raw):
    wrong_key = HttpTrainingClient(base_url=strict.url, api_key="sk-canary")
    with pytest.raises(BackendUserError, match="key") as refusal:
        await opened(wrong_key)
    assert "canary" not in f"{refusal.value} {refusal.value.hint} {wrong_key.public_options()}"
    with pytest.raises(ModelNotFound):
        await opened(HttpTrainingClient(base_url=strict.url, api_key="a-key"), "other")
    with pytest.raises(BackendUserError, match="no training server"):
        await opened(HttpTrainingClient(base_url=f"{strict.url}/elsewhere", api_key="a-key"))
    with pytest.raises(TransientBackendError, match="cannot be reached"):
        await opened(HttpTrainingClient(base_url="http://127.0.0.1:9", patience=0.1))
    for url in ("127.0.0.1:1", "ftp://x", "http://user:pw@host", "http://host/?key=1"):
        with pytest.raises(ConfigError):
            HttpTrainingClient(base_url=url)
    sampling = HttpSamplingClient(base_url=strict.url, api_key="a-key")
    with pytest.raises(NotFoundError):
        async with sampling.open_sampler("tinker://a/weights/b"):
            pass
    await sampling.aclose()


async def test_a_client_says_once_that_it_waits_for_its_server(strict, caplog, monkeypatch):
    monkeypatch.setattr("crucible_kitchen_http.endpoint._SILENT", 0.0)
    client = HttpTrainingClient(base_url="http://127.0.0.1:9", patience=0.3)
    with pytest.raises(TransientBackendError):
        await opened(client)
    await client.aclose()
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "the training server at http://127.0.0.1:9 cannot be reached"
    ]


async def test_what_the_wire_cannot_say_is_refused_before_a_call(strict):
    client = HttpTrainingClient(base_url=strict.url, api_key="a-key")
    with pytest.raises(CapabilityError):
        async with client.open_session(SessionSpec("toy", None, 0, "", value_head=True)):
            pass
    await client.aclose()


async def test_a_call_that_cannot_be_submitted_poisons_the_session(strict, tmp_path):
    client = HttpTrainingClient(base_url=strict.url, api_key="a-key", patience=0.2)
    async with client.open_session(SessionSpec("toy", LoraSpec(2), 0, str(tmp_path))) as session:
        real = client._endpoint._connections.base_url
        client._endpoint._connections.base_url = "http://127.0.0.1:9"
        with pytest.raises(TransientBackendError):
            await (await session.forward([datum(session, 1)]))
        client._endpoint._connections.base_url = real
        with pytest.raises(SessionLost, match="could not be submitted"):
            await (await session.forward([datum(session, 1)]))
    await client.aclose()


FULL = """
import anyio, subprocess, sys
from pathlib import Path
home = Path(sys.argv[1])
home.mkdir()
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(home)]).returncode:
    sys.exit(77)
from crucible_kitchen.errors import StorageFull
from crucible_kitchen.testing.contracts.training_case import batch, look
from crucible_kitchen.testing.training_server import RunningServer
from crucible_kitchen.types import AdamParams, LoraSpec, SessionSpec
from crucible_kitchen_http import HttpTrainingClient

async def main(url):
    client = HttpTrainingClient(base_url=url)
    spec = SessionSpec("toy", None, 0, "")
    async with client.open_session(spec) as session, client.open_session(spec) as other:
        kept, before = await (await session.save_state("kept")), await look(session)
        saved = 0
        while True:
            try:
                await (await session.save_state(f"more-{saved}"))
                saved += 1
            except StorageFull:
                break
        for each in (session, other):
            async with each.step(0) as step:
                await step.forward_backward(batch(each))
                assert (await (await step.apply(AdamParams(0.1)))).step == 1
        await session.load_state(kept)
        assert [a.tobytes() for a in await look(session)] == [b.tobytes() for b in before]
        await session.delete_state(kept)
    await client.aclose()

with RunningServer("toy", home / "server", adapter="noop") as server:
    anyio.run(main, server.url)
subprocess.run(["umount", "-l", str(home)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a full disk is made with a small tmpfs")
def test_a_disk_that_is_full_is_told_and_loses_nothing(tmp_path):
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL, tmp_path / "full"],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 77 or "unshare" in ran.stderr.partition("\n")[0]:
        pytest.skip("mounting is not allowed here")
    assert ran.returncode == 0, ran.stderr[-3000:]
