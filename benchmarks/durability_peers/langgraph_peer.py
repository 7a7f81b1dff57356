"""LangGraph with its SQLite saver: a graph whose one node leads back to itself; ``how`` is its durability."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from _work import main, pause, through
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    step: int


async def through_graph(body: Callable[[int], object], steps: int, directory: Path, how: str, thread: str) -> float:
    async def node(state: State) -> State:
        body(state["step"])
        return {"step": state["step"] + 1}

    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_conditional_edges("node", lambda state: "node" if state["step"] < steps else END)
    config = {"configurable": {"thread_id": thread}, "recursion_limit": steps + 10}
    async with AsyncSqliteSaver.from_conn_string(str(directory / "langgraph.db")) as saver:
        compiled = graph.compile(checkpointer=saver)
        known = (await compiled.aget_state(config)).values
        if known.get("step", 0) >= steps:
            return 0.0
        began = time.perf_counter()
        await compiled.ainvoke(None if known else {"step": 0}, config, durability=how)
        return time.perf_counter() - began


def cost(steps: int, directory: Path) -> list[tuple[str, float]]:
    rows = []
    for how in ("sync", "async", "exit"):
        asyncio.run(through_graph(lambda _: None, 10, directory, how, f"warm {how}"))
        took = asyncio.run(through_graph(lambda _: None, steps, directory, how, how))
        rows.append((f"SQLite saver, `{how}`", took / steps))
    return rows


def run(steps: int, directory: Path, how: str) -> None:
    def body(step: int) -> None:
        pause()
        through(directory, step)

    asyncio.run(through_graph(body, steps, directory, how or "sync", "forty"))


if __name__ == "__main__":
    main(cost, run)
