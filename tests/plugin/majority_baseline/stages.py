"""The stages: find the commonest answer, measure it. They know ports, no adapter."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from crucible_kitchen import DataConfig, EvalConfig, stage
from crucible_kitchen.ports import DatasetSpec, DatasetStore, EvalExample, Evaluator, Prediction


class BaselineConfig(DataConfig, EvalConfig):
    """Which rows; the answer is the field ``completion``."""


@stage(writes="answer")
async def commonest_answer(dataset_store: DatasetStore, config: BaselineConfig) -> str:
    """Return the answer that the training rows give most often."""
    dataset = await dataset_store.load(DatasetSpec(config.dataset, config.split, config.dataset_size))
    rows = await dataset.rows(range(len(dataset)))
    return Counter(str(row["completion"]) for row in rows).most_common(1)[0][0]


@stage(writes="eval_results")
async def measure_answer(
    dataset_store: DatasetStore, evaluator: Evaluator, answer: str, config: BaselineConfig
) -> dict[str, Any]:
    """Return what it scores on rows that it was not counted on."""
    spec = DatasetSpec(config.dataset, config.eval_split or "test", config.eval_size, holdout=config.holdout)
    dataset = await dataset_store.load(spec)
    rows = await dataset.rows(range(len(dataset)))
    examples = [EvalExample(str(i), (), str(row["completion"])) for i, row in enumerate(rows)]

    async def predict(examples: Sequence[EvalExample]) -> list[Prediction]:
        return [Prediction(example.key, answer) for example in examples]

    report = await evaluator.evaluate(predict, examples, average=config.eval_average, seed=config.seed)
    return {"n": report.n, **report.metrics}
