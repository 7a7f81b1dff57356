"""``runs`` with filters, and ``runs prune``: what is deleted is said first, and only that is deleted."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen.cli.listing import moment
from crucible_kitchen.errors import ConfigError
from crucible_kitchen.store import Owner, RunRecord, SqliteRunStore

pytestmark = pytest.mark.usefixtures("flows")


def ran(cli: Any, name: str) -> str:
    return str(cli("run", f"flows.py:{name}", "--json").json["run_id"])


def listed(cli: Any, *options: str) -> list[str]:
    return [row["run_id"] for row in cli("runs", *options, "--json").json]


def test_runs_are_filtered_by_status_workflow_and_time(cli: Any) -> None:
    cooked, spoilt = ran(cli, "cook"), ran(cli, "spoil")
    assert listed(cli, "--status", "failed") == [spoilt]
    assert listed(cli, "--workflow", "cook") == [cooked]
    assert listed(cli, "--status", "failed", "--workflow", "cook") == []
    assert listed(cli, "--since", "1h") == [spoilt, cooked]
    assert listed(cli, "--since", "2999-01-01") == []


@pytest.mark.parametrize("options", [("--status", "done"), ("--since", "yesterday")])
def test_a_filter_that_means_nothing_exits_2(cli: Any, options: tuple[str, ...]) -> None:
    assert cli("runs", *options).code == 2


def test_an_age_is_a_time_before_now_and_a_date_is_itself() -> None:
    assert moment("2h", "--since") - moment("1h", "--since") == pytest.approx(-3600, abs=5)
    assert moment("2026-11-25T00:00:00+00:00", "--since") == 1795564800
    with pytest.raises(ConfigError):
        moment("1 fortnight", "--since")


def test_prune_says_what_it_would_delete_and_deletes_nothing_unless_told(cli: Any, home: Path) -> None:
    spoilt = ran(cli, "spoil")
    told = cli("runs", "prune", "--status", "failed")
    assert told.code == 0
    assert f"delete: {spoilt}" in told.out
    assert "say --yes" in told.err
    assert listed(cli) == [spoilt]
    assert (home / "runs" / spoilt).is_dir()


def test_prune_deletes_the_rows_and_the_directories_of_what_was_asked_for(cli: Any, home: Path) -> None:
    cooked, spoilt = ran(cli, "cook"), ran(cli, "spoil")
    (home / "runs" / spoilt / "state.bin").write_bytes(b"x" * 1000)
    told = cli("runs", "prune", "--status", "failed", "--yes")
    assert "1 runs, 1,000 bytes" in told.out
    assert listed(cli) == [cooked]
    assert not (home / "runs" / spoilt).exists()
    assert (home / "runs" / cooked).is_dir()
    assert cli("events", spoilt).code == 2
    assert cli("events", cooked).code == 0


def test_prune_by_name_deletes_that_run_alone(cli: Any) -> None:
    first, second = ran(cli, "cook"), ran(cli, "cook")
    assert cli("runs", "prune", first, "--yes", "--json").json == {"deleted": [first], "kept": []}
    assert listed(cli) == [second]
    assert cli("runs", "prune", first, "--yes").code == 2


def test_prune_by_age_keeps_what_is_younger(cli: Any) -> None:
    young = ran(cli, "cook")
    assert cli("runs", "prune", "--older-than", "1d", "--yes", "--json").json == {"deleted": [], "kept": []}
    assert listed(cli) == [young]


def test_prune_keeps_a_run_that_somebody_has(cli: Any, home: Path) -> None:
    async def begin() -> None:
        async with SqliteRunStore(home / "runs.db") as store:
            await store.create_run(RunRecord("living", "cook", created_at=1.0), Owner.here())
            told = await anyio.to_thread.run_sync(lambda: cli("runs", "prune", "--older-than", "1d", "--yes"))
            assert "keep, it runs: living" in told.out
            assert (await store.run("living")).status == "running"

    anyio.run(begin)


def test_prune_needs_to_be_told_which_runs(cli: Any) -> None:
    ran(cli, "cook")
    assert cli("runs", "prune", "--yes").code == 2
    assert len(listed(cli)) == 1
