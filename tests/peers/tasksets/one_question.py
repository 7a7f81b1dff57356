"""A taskset of single questions, one of whose rewards can break, hang or be no number."""

import verifiers.v1 as vf

__all__ = ["OneQuestion"]


class Data(vf.TaskData):
    answer: str


class Config(vf.TasksetConfig):
    how: str = "right"
    count: int = 40


class TaskOf(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class Strange(TaskOf):
    def __init__(self, data, config=None, how="right"):
        super().__init__(data, config)
        self.how = how

    @vf.reward
    async def strange(self, trace: vf.Trace) -> float:
        if self.how == "raises":
            raise ValueError("a row of data")
        if self.how == "hangs":
            while True:
                pass
        return float("nan") if self.how == "nan" else 0.0


class OneQuestion(vf.Taskset[Strange, Config]):
    def load(self):
        for i in range(self.config.count):
            prompt = f"What is {i}+{i}?"
            data = Data(prompt=prompt, system_prompt="Answer with a number.", answer=str(2 * i))
            yield Strange(data, how=self.config.how)
