"""``rehearse`` and ``environments``: what a reinforcement run would be like, and where it could be."""

from typing import Any

RUN = ("reinforcement", "model=tiny", "env=sums", "advantage=grpo", "num_rollouts=3", "groups_per_batch=2")


def test_a_rehearsal_answers_with_one_json_object(cli: Any) -> None:
    found = cli(
        "rehearse",
        *RUN,
        "max_staleness=1",
        "--rollout-seconds",
        30,
        "--update-seconds",
        20,
        "--price-hour",
        6,
        "--json",
    )
    assert found.code == 0
    facts = found.json
    assert facts["steps"] == 3
    assert facts["seconds"] > 60
    assert facts["cost"] == facts["seconds"] / 600
    assert sum(facts["staleness"].values()) == 6


def test_latencies_can_be_those_of_a_run(cli: Any) -> None:
    ran = cli("run", *RUN, "eval_size=2", "lora_rank=0", "--adapter", "training_client=noop", "--json", "--quiet")
    assert ran.code == 0
    found = cli("rehearse", *RUN, "--from", ran.json["run_id"])
    assert found.code == 0
    assert "overlap_efficiency" in found.out


def test_what_cannot_be_rehearsed_says_so(cli: Any) -> None:
    found = cli("rehearse", "supervised", "model=tiny", "dataset=sums")
    assert found.code == 2
    assert "rolls nothing out" in found.err
    assert cli("rehearse", *RUN, "group_sise=2").code == 2
    assert cli("rehearse", *RUN, "--from", "nobody").code != 0


def test_environments_are_listed_with_whether_they_can_be_used(cli: Any) -> None:
    rows = {row["name"]: row for row in cli("environments", "--json").json}
    assert rows["sums"]["usable"]
    assert "sums" in cli("environments").out


def test_a_run_s_summary_tells_its_reward(cli: Any) -> None:
    ran = cli("run", *RUN, "eval_size=2", "eval_at_start=true", "lora_rank=0", "--adapter", "training_client=noop")
    assert ran.code == 0
    assert "before, " in ran.out
    assert "2 held-out problems; synthetic" in ran.out
