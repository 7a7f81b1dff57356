"""A taskset with a tool, served by the package in a process of its own."""

import verifiers.v1 as vf

__all__ = ["Secrets"]


class Safe(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    async def open_safe(self, code: int) -> str:
        """Open the safe."""
        return f"gold{code}"


class TaskOf(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config):
        return [Safe(vf.ToolsetConfig())]

    @vf.reward
    async def told(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == "gold7")

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))


class Secrets(vf.Taskset[TaskOf, vf.TasksetConfig]):
    def load(self):
        return [TaskOf(vf.TaskData(prompt=f"What is in safe {i}?")) for i in range(30)]


if __name__ == "__main__":  # the package starts a tool's server so
    Safe.run()
