"""A real HTTP service on the loopback interface that speaks the OpenAI shapes, in a thread of its own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import numpy as np
import pytest

from crucible_kitchen.types import SamplingParams
from crucible_kitchen_noop import NoopLLMClient, NoopSamplingClient

SECRET = "sk-canary-7f3a"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class Service(ThreadingHTTPServer):
    """Answers with the toy models unless told otherwise.

    Attributes:
        script: statuses to answer with first, each with headers and body.
        seen: the requests, as (path, headers, body).
        hold: while set, requests are read and then wait for their client to leave.
        left: set when a client left while its request was held.
        peak: most requests at once.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = []
        self.seen = []
        self.hold = False
        self.left = threading.Event()
        self.lock = threading.Lock()
        self.active = self.peak = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "toy"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        service = self.server
        with service.lock:
            service.seen.append((self.path, dict(self.headers), body))
            service.active += 1
            service.peak = max(service.peak, service.active)
        try:
            if service.hold:
                self.connection.recv(1)
                service.left.set()
                self.close_connection = True
                return
            status, headers, answer = service.script.pop(0) if service.script else (200, {}, None)
            if answer is None:
                answer = completion(body) if self.path == "/v1/completions" else chat(body)
        finally:
            with service.lock:
                service.active -= 1
        self.answer(answer, status, headers)

    def answer(self, answer, status=200, headers=None):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def chat(body):
    from crucible_kitchen.types import Message

    messages = [Message(**message) for message in body["messages"]]
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    reply = anyio.run(lambda: NoopLLMClient().chat(messages, seed=body.get("seed"), schema=schema))
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    return {"choices": [{"message": {"content": reply.text}, "finish_reason": "stop"}], "usage": usage}


def completion(body):
    async def run():
        async with NoopSamplingClient().open_sampler(body["model"]) as sampler:
            if body.get("echo"):
                (logprobs,) = await sampler.compute_logprobs([body["prompt"]])
                return {"text": "", "logprobs": {"token_logprobs": [None, *map(float, logprobs)]}}
            keys = ("max_tokens", "temperature", "top_p", "top_k", "seed")
            options = {key: body[key] for key in keys if key in body}
            params = SamplingParams(**options, stop=tuple(body.get("stop", ())))
            (sample,) = await sampler.sample(body["prompt"], params)
            raw = (await sampler.compute_logprobs([[*body["prompt"], *sample.tokens.tolist()]]))[0]
            stated = np.asarray(raw)[len(body["prompt"]) - 1 :].tolist()
            return {
                "text": sample.text,
                "token_ids": sample.tokens.tolist(),
                "logprobs": {"token_logprobs": stated},
                "finish_reason": sample.stop_reason,
            }

    return {"choices": [anyio.run(run)]}


@pytest.fixture
def service():
    with Service() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
