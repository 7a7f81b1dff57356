"""Workflows as values: changed copies, found by name or by path; and how they are drawn."""

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from crucible_kitchen.config import OptimConfig, RunConfig
from crucible_kitchen.workflow.describe import describe_step, mermaid, text
from crucible_kitchen.workflow.nodes import Loop, Parallel, When, Workflow, steps, walk
from crucible_kitchen.workflow.run import Run
from crucible_kitchen.workflow.stage import stage


def named(name: str) -> Any:
    async def body() -> None: ...

    return stage(name=name)(body)


def flag() -> bool:
    return True


def items() -> list[int]:
    return []


evaluate, step, log, save = named("evaluate"), named("step"), named("log"), named("save")
inner = Workflow("inner", evaluate)
tree = Workflow(
    "w",
    Loop("epoch", items, Loop("batch", items, step, When(flag, evaluate, otherwise=[log]))),
    Parallel([save, inner], step),
    evaluate,
    description="a tree",
)


def paths(workflow: Workflow) -> list[str]:
    return [path.removeprefix("w/") for path, _ in steps(workflow)]


ALL = ["epoch/batch/step", "epoch/batch/evaluate", "epoch/batch/log", "save", "inner/evaluate", "step", "evaluate"]


def test_the_tree_is_walked_in_order() -> None:
    assert paths(tree) == ALL
    assert [path for path, _ in walk(tree)][:3] == ["w", "w/epoch", "w/epoch/batch"]


def test_a_name_means_every_node_of_it_and_a_path_means_one() -> None:
    other = named("other")
    assert paths(tree.replace("evaluate", other)) == [p.replace("evaluate", "other") for p in ALL]
    assert paths(tree.replace("epoch/batch/evaluate", other)) == [
        "epoch/batch/other" if p == "epoch/batch/evaluate" else p for p in ALL
    ]
    assert paths(tree.without("inner/evaluate")) == [p for p in ALL if p != "inner/evaluate"]
    assert paths(tree.insert_after("save", other, log)) == [*ALL[:4], "other", "log", *ALL[4:]]
    assert paths(tree) == ALL


def test_loops_and_nested_workflows_are_nodes_with_names_too() -> None:
    assert paths(tree.without("batch")) == ALL[3:]
    assert paths(tree.replace("epoch", save.with_(name="x"), log)) == ["x", "log", *ALL[3:]]
    assert paths(tree.without("inner")) == [p for p in ALL if p != "inner/evaluate"]


def test_the_rest_of_a_workflow_stays_as_it_is() -> None:
    nested = tree.at("field")
    changed = nested.without("save")
    assert (changed.name, changed.description, changed.config_field) == ("w", "a tree", "field")
    assert tree.with_(name="v").name == "v"
    assert changed.body[1].limit is None  # type: ignore[union-attr]


def test_a_branch_that_becomes_empty_is_gone() -> None:
    assert len(tree.without("step").body[1].branches) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["nothing", "epoch/evaluate", "w/epoch", ""])
def test_a_target_that_matches_nothing_is_an_error_that_lists_names(target: str) -> None:
    for edit in (tree.without, tree.replace, tree.insert_after):
        with pytest.raises(LookupError) as caught:
            edit(target)
        assert str(caught.value) == (
            f"nothing in 'w' is called {target!r}; there are epoch, epoch/batch, epoch/batch/evaluate, "
            "epoch/batch/log, epoch/batch/step, evaluate, inner, inner/evaluate, save, step"
        )


def test_equal_trees_are_equal() -> None:
    assert tree.without("save").insert_after("inner", save) != tree
    assert tree.replace("save", save) == tree


# -- drawings -------------------------------------------------------------------------------------------------------


class Config(OptimConfig):
    size: int = 1


@stage(writes="session")
async def open_session(config: Config, training_client: Any, run: Run) -> AsyncIterator[int]:
    """Open it."""
    yield 1


@stage(writes="loss", timeout=5)
async def train(session: int, batch: int, loss: float = 0.0) -> float:
    """Train.

    More.
    """
    return 0.0


def good_enough() -> bool:
    return True


drawn = Workflow(
    "drawn",
    open_session,
    Loop("batch", items, train, When(flag, save, otherwise=log), until=good_enough),
    Parallel([evaluate], [inner.with_(name="nested")], limit=2, on_error="skip"),
    Workflow("sub", step.with_(writes="n"), returns=["n"]),
    When(lambda: True, evaluate.with_(name="again")),
    config=Config,
    description="for the eye",
)


def test_a_workflow_as_text() -> None:
    assert text(drawn) == (
        "drawn(Config): for the eye\n"
        "  open_session(training_client) -> session  [Config] (open until the block ends)\n"
        "  for batch in items, until good_enough\n"
        "    train(session, batch, loss) -> loss\n"
        "    when flag\n"
        "      save()\n"
        "    otherwise\n"
        "      log()\n"
        "  in parallel, 2 at a time, skipping what fails\n"
        "    branch 1\n"
        "      evaluate()\n"
        "    branch 2\n"
        "      workflow nested\n"
        "        evaluate()\n"
        "  workflow sub -> n\n"
        "    step() -> n\n"
        "  when (expression)\n"
        "    again()"
    )


def test_a_workflow_as_a_flowchart() -> None:
    assert mermaid(drawn) == (
        "flowchart TD\n"
        '  n1(["open_session(training_client)<br/>→ session<br/>config: Config"])\n'
        '  subgraph n2["for batch in items, until good_enough"]\n'
        '    n3["train(session, batch, loss)<br/>→ loss"]\n'
        "    n1 --> n3\n"
        '    n4{"flag"}\n'
        "    n3 --> n4\n"
        '    n5["save()"]\n'
        "    n4 -->|yes| n5\n"
        '    n6["log()"]\n'
        "    n4 -->|no| n6\n"
        "  end\n"
        '  n7["evaluate()"]\n'
        "  n5 --> n7\n"
        "  n6 --> n7\n"
        '  subgraph n8["nested"]\n'
        '    n9["evaluate()"]\n'
        "    n5 --> n9\n"
        "    n6 --> n9\n"
        "  end\n"
        '  subgraph n10["sub"]\n'
        '    n11["step()<br/>→ n"]\n'
        "    n7 --> n11\n"
        "    n9 --> n11\n"
        "  end\n"
        '  n12{"(expression)"}\n'
        "  n11 --> n12\n"
        '  n13["again()"]\n'
        "  n12 -->|yes| n13"
    )


def test_every_flowchart_is_sound() -> None:
    odd = Workflow("odd", Loop("i", list, When(flag), Parallel()), named('say "hi"'), Workflow("empty"))
    for workflow in (tree, drawn, odd, Workflow("nothing")):
        head, *lines = mermaid(workflow).splitlines()
        assert head == "flowchart TD"
        open_subgraphs, defined = 0, set()
        for line in lines:
            body = line.strip()
            if body == "end":
                open_subgraphs -= 1
            elif match := re.fullmatch(r'(?:subgraph )?(n\d+)(?:\["|\(\["|\{")[^"]*(?:"\]|"\]\)|"\})', body):
                assert match[1] not in defined
                defined.add(match[1])
                open_subgraphs += body.startswith("subgraph")
            else:
                edge = re.fullmatch(r"(n\d+) -->(?:\|(?:yes|no)\|)? (n\d+)", body)
                assert edge is not None, line
                assert {edge[1], edge[2]} <= defined
            assert open_subgraphs >= 0
        assert open_subgraphs == 0


def test_a_stage_is_described_with_what_it_reads_writes_and_is_configured_by() -> None:
    facts = describe_step(open_session)
    assert {k: facts[k] for k in ("name", "kind", "doc", "reads", "ports", "writes")} == {
        "name": "open_session",
        "kind": "resource",
        "doc": "Open it.",
        "reads": {},
        "ports": ["training_client"],
        "writes": {"session": "int"},
    }
    assert {"size", "epochs"} <= set(facts["config"])
    assert not set(facts["config"]) & set(RunConfig.model_fields)
    assert describe_step(train)["reads"] == {"session": "int", "batch": "int", "loss": "float (optional)"}
