"""The program that plays a seat: a conversation with tools, in this process.

The package's own chat program is a script in a process of its own for every episode. This one says the same to the same
address, and starts nothing. Read next: ``worker.py``, which answers it.
"""

import json
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import MCPConnection, call_mcp, connect_mcp

__all__ = ["ChatHarness"]

Wire = dict[str, Any]


class ChatHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]  # the package is optional, and Any without
    """Asks the model until it answers without calling a tool."""

    APPENDS_SYSTEM_PROMPT: ClassVar[bool] = True
    SUPPORTS_MCP: ClassVar[bool] = True
    SUPPORTS_RESUME: ClassVar[bool] = True
    EXECUTES_CODE: ClassVar[bool] = False
    NEEDS_CONTAINER: ClassVar[bool] = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: "vf.Trace",  # noqa: ARG002 - the package's signature
        runtime: vf.Runtime,  # noqa: ARG002
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """Hold the conversation to its end; the package says when an answer that was refused is a failure."""
        system, prompt = self.resolve_prompt(data)
        messages: list[Wire] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages.extend(message_to_wire(message) for message in prompt or [])
        named = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            tools, dispatch, servers = await connect_mcp({"mcpServers": named}, stack)
            headers = {"Authorization": f"Bearer {secret}"}
            client = httpx.AsyncClient(headers=headers, timeout=None)  # noqa: S113 - who asked for the turn has a limit
            await stack.enter_async_context(client)
            body: Wire = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
            while True:
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                if answer.status_code != httpx.codes.OK:
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=f"status {answer.status_code}")
                said = answer.json()["choices"][0]["message"]
                messages.append(said)
                if not said.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                messages.extend([await _result(call, dispatch, servers) for call in said["tool_calls"]])


async def _result(call: Wire, dispatch: dict[str, tuple[str, str]], servers: dict[str, MCPConnection]) -> Wire:
    """Return the message that answers one call; a call that is wrong is told so, as any tool would."""
    name = call["function"]["name"]
    if name not in dispatch:
        content: Any = f"error: there is no tool {name!r}; tools: {', '.join(dispatch)}"
    else:
        content = await call_mcp(servers, dispatch, name, json.loads(call["function"]["arguments"]))
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}
