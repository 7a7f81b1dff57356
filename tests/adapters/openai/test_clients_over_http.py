"""The OpenAI-compatible clients keep their contracts and meet failures as they should, over real HTTP."""

import threading
import traceback

import anyio
import anyio.to_thread
import pytest
from pydantic import SecretStr

from crucible_kitchen.errors import (
    BackendError,
    BackendUserError,
    CapabilityError,
    CapacityError,
    ConfigError,
    ModelNotFound,
    SessionLost,
    TransientBackendError,
)
from crucible_kitchen.testing import contracts
from crucible_kitchen.types import Message, SamplingParams
from crucible_kitchen_noop.tokenizer import ByteTokenizer
from crucible_kitchen_openai import OpenAILLMClient, OpenAISamplingClient

pytestmark = pytest.mark.anyio

SECRET = "sk-canary-7f3a"
ROW = "a private row"
QUESTION = [Message("user", ROW)]


@pytest.fixture
async def judge(service):
    """Make chat clients that are closed when the test is over."""
    made = []

    def make(**options):
        defaults = {"base_url": service.url, "model": "toy", "api_key": SECRET, "max_delay": 0.0}
        made.append(OpenAILLMClient(**(defaults | options)))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


@pytest.fixture
async def teacher(service):
    """A sampling client that is closed when the test is over."""
    client = OpenAISamplingClient(base_url=service.url, tokenizer=ByteTokenizer(), max_delay=0.0)
    yield client
    await client.aclose()


def refused(status, headers=None, code="some_code"):
    return status, headers or {}, {"error": {"message": f"{ROW} {SECRET}", "code": code}}


def shown(error):
    """All that a log of the error could hold."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(error.hint)


@pytest.mark.parametrize("check", contracts.LLM_CLIENT, ids=contracts.name)
async def test_llm_client(judge, check, service):
    client = judge(api_key=SecretStr(SECRET))
    await check(contracts.LLMClientCase(client, secret=SECRET))


@pytest.mark.parametrize("check", contracts.SAMPLING_CLIENT, ids=contracts.name)
async def test_sampling_client(check, teacher):
    await check(contracts.SamplingClientCase(teacher, "toy", "other"))


async def test_the_request_has_the_shape_that_services_read(judge, service):
    client = judge()
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    await client.chat(QUESTION, max_tokens=7, temperature=0.5, seed=3, schema=schema)
    path, headers, body = service.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body["messages"] == [{"role": "user", "content": ROW}]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("toy", 7, 0.5, 3)
    assert body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("status", "error", "hint"),
    [
        (400, BackendUserError, "request"),
        (401, BackendUserError, "api_key"),
        (403, BackendUserError, "api_key"),
        (404, BackendUserError, "model"),
        (422, BackendUserError, "request"),
        (302, BackendUserError, "request"),
    ],
)
async def test_a_refused_request_is_not_repeated_and_shows_neither_row_nor_secret(judge, service, status, error, hint):
    client = judge()
    service.script = [refused(status)]
    with pytest.raises(error) as caught:
        await client.chat(QUESTION)
    assert len(service.seen) == 1
    assert hint in caught.value.hint
    assert "some_code" in str(caught.value)
    assert ROW not in shown(caught.value)
    assert SECRET not in shown(caught.value)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_may_pass_is_tried_again(judge, service, status):
    client = judge()
    service.script = [refused(status)] * 3
    assert (await client.chat(QUESTION)).text
    assert len(service.seen) == 4


@pytest.mark.parametrize(("status", "error"), [(429, CapacityError), (500, TransientBackendError)])
async def test_attempts_are_capped(judge, service, status, error):
    client = judge(retries=2)
    service.script = [refused(status)] * 9
    with pytest.raises(error) as caught:
        await client.chat(QUESTION)
    assert caught.value.retryable
    assert len(service.seen) == 3


@pytest.mark.parametrize("header", ["0.25", "Thu, 01 Jan 2099 00:00:00 GMT", "soon"])
async def test_a_service_that_asks_to_wait_is_obeyed_up_to_the_cap(judge, service, header, monkeypatch):
    waits = []
    sleep = anyio.sleep

    async def noted(seconds):
        waits.extend([seconds] if seconds else [])
        await sleep(0)

    monkeypatch.setattr(anyio, "sleep", noted)
    client = judge(max_delay=3.0)
    service.script = [refused(429, {"retry-after": header})]
    await client.chat(QUESTION)
    (wait,) = waits
    assert wait == {"0.25": 0.25, "soon": wait}.get(header, 3.0)
    assert 0.25 <= wait <= 3.0


async def test_a_service_that_is_not_there_is_a_transient_error(judge, service):
    client = judge(base_url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(TransientBackendError, match="cannot be reached") as caught:
        await client.chat(QUESTION)
    assert SECRET not in shown(caught.value)


async def test_an_attempt_that_takes_too_long_is_broken_off(judge, service):
    client = judge(timeout=0.05, retries=0)
    service.hold = True
    with pytest.raises(TransientBackendError, match="in time"):
        await client.chat(QUESTION)


async def test_cancelling_a_call_closes_its_connection(judge, service):
    client = judge()
    service.hold = True

    async def received():
        while not service.seen:
            await anyio.to_thread.run_sync(threading.Event().wait, 0.005)

    async with anyio.create_task_group() as group:
        group.start_soon(client.chat, QUESTION)
        await received()
        group.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(service.left.wait, 5)
    service.hold = False
    assert (await client.chat(QUESTION)).text


async def test_no_more_requests_are_under_way_than_allowed(judge, service):
    client = judge(max_concurrency=3)
    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(client.chat, QUESTION)
    assert len(service.seen) == 12
    assert service.peak <= 3


@pytest.mark.parametrize(
    "answer", [b"<html>", [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": None}]}]
)
async def test_an_answer_of_another_shape_is_an_error_that_names_the_address(judge, service, answer):
    client = judge()
    service.script = [(200, {}, answer)]
    with pytest.raises(BackendError) as caught:
        await client.chat(QUESTION)
    assert "base_url" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "problem"), [("not json", "not JSON"), ('{"ok": 3}', "does not fulfil"), (None, "no text")]
)
async def test_a_reply_that_does_not_fulfil_the_schema_is_refused(judge, service, text, problem):
    client = judge()
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    service.script = [(200, {}, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})]
    with pytest.raises(BackendUserError, match=problem):
        await client.chat(QUESTION, schema=schema)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/schema.json"}])
async def test_a_schema_that_is_none_or_leads_outside_is_refused(judge, service, schema):
    client = judge()
    service.script = [(200, {}, {"choices": [{"message": {"content": "{}"}}]})]
    with pytest.raises(BackendUserError, match=r"schema|Schema"):
        await client.chat(QUESTION, schema=schema)


async def test_a_sampler_needs_a_tokenizer(service):
    client = OpenAISamplingClient(base_url=service.url)
    with pytest.raises(CapabilityError) as caught:
        async with client.open_sampler("toy"):
            pass
    assert "tokenizer=" in caught.value.hint


@pytest.mark.parametrize("choice", [{"text": "x"}, {"text": "x", "token_ids": None}])
async def test_a_service_without_token_ids_is_refused(service, teacher, choice):
    service.script = [(200, {}, {"choices": [choice]})] * 2
    async with teacher.open_sampler("toy") as sampler:
        with pytest.raises(CapabilityError, match="token ids"):
            await sampler.sample([1], SamplingParams())
        with pytest.raises(CapabilityError, match="echo"):
            await sampler.compute_logprobs([[1, 2, 3]])
    with pytest.raises(SessionLost):
        await sampler.sample([1], SamplingParams())


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "ftp://host/v1"},
        {"base_url": f"http://user:{SECRET}@host/v1"},
        {"base_url": f"http://host/v1?key={SECRET}"},
        {"timeout": 0},
        {"max_concurrency": 0},
        {"retries": -1},
    ],
)
def test_an_option_that_cannot_be_is_refused_without_showing_a_credential(options):
    with pytest.raises(ConfigError) as caught:
        OpenAILLMClient(**({"base_url": "http://host/v1", "model": "toy"} | options))
    assert SECRET not in shown(caught.value)


def test_options_may_be_texts_as_a_command_line_gives_them():
    client = OpenAILLMClient(base_url="http://host/v1/", model="toy", timeout="5", retries="2", max_concurrency="1")
    options = client.public_options()
    assert options["base_url"] == "http://host/v1"
    assert (options["timeout"], options["retries"], options["max_concurrency"]) == (5.0, 2, 1)


async def test_a_tokenizer_is_loaded_from_a_directory(service, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<end>": 0, "<begin>": 1, "one": 2, "two": 3, "<unk>": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    saved.chat_template = "{% for m in messages %}{{ m.content }} <end> {% endfor %}"
    saved.save_pretrained(tmp_path)
    client = OpenAISamplingClient(base_url=service.url, tokenizer=str(tmp_path))
    assert client.public_options()["tokenizer"] == str(tmp_path)
    async with client.open_sampler("toy") as sampler:
        tokenizer = sampler.tokenizer
        assert tokenizer.encode("one two <end>") == [2, 3, 0]
        assert tokenizer.decode([2, 3, 0]) == "one two"
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.chat) == (5, 0, True)
        assert tokenizer.render_chat([Message("user", "two")], generation_prompt=False) == [3, 0]
        assert len(await sampler.sample(tokenizer.encode("one"), SamplingParams(max_tokens=2))) == 1
    await client.aclose()


async def test_a_tokenizer_that_does_not_exist_is_not_found(service, tmp_path):
    pytest.importorskip("transformers")
    client = OpenAISamplingClient(base_url=service.url, tokenizer=str(tmp_path / "absent"))
    with pytest.raises(ModelNotFound):
        async with client.open_sampler("toy"):
            pass
    await client.aclose()
