"""An environment of several turns: it says higher or lower, and counts the turns."""

import verifiers.v1 as vf

__all__ = ["Guessing", "Numbers"]


class Data(vf.TaskData):
    number: int


class TaskOf(vf.Task[Data]):
    @vf.reward
    async def found(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.number))


class Numbers(vf.Taskset[TaskOf, vf.TasksetConfig]):
    def load(self):
        return [TaskOf(Data(number=n, prompt="A number from 0 to 9:")) for n in range(10)]


class Guessing(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as policy:
            segment = await policy.turn()
            while not segment.terminated and segment.last_reply != str(task.data.number):
                below = segment.last_reply < str(task.data.number)
                segment = await policy.turn("higher:" if below else "lower:")

    async def finalize(self, task, episode):
        (trace,) = episode.traces
        trace.record_metric("turns", float(trace.num_turns))
