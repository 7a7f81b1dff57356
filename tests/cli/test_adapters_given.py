"""``--adapter``: names, options with their types, secrets, none."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from crucible_kitchen.cli.given import adapters
from crucible_kitchen.errors import AdapterError
from crucible_kitchen.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    """The installed adapters."""
    return Registry.discover()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("evaluator=none", {"evaluator": None}),
        ("evaluator=noop", {"evaluator": "noop"}),
        ("training_client=torch,threads=2", {"training_client": ("torch", {"threads": 2})}),
        ("training_client=torch,threads=null", {"training_client": ("torch", {"threads": None})}),
        ("training_client=torch,deterministic=yes", {"training_client": ("torch", {"deterministic": True})}),
        (
            "llm_client=openai,base_url=http://h/v1,model=a,b,timeout=2.5",
            {"llm_client": ("openai", {"base_url": "http://h/v1", "model": "a,b", "timeout": 2.5})},
        ),
    ],
)
def test_an_option_has_the_type_that_the_adapter_declares(
    registry: Registry, given: str, expected: dict[str, Any]
) -> None:
    assert adapters(registry, [given]) == expected


def test_a_secret_comes_from_the_environment_as_a_secret(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "canary-31")
    chosen = adapters(registry, ["llm_client=openai,base_url=http://h/v1,model=m,api_key=env:THE_KEY"])
    _, options = chosen["llm_client"]
    assert options["api_key"] == SecretStr("canary-31")
    assert "canary-31" not in repr(chosen)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("llm_client=openai,base_url=http://h/v1,model=m,api_key=env:NOT_SET", "'NOT_SET' is not set"),
        ("llm_client=openai,base_url=env:HOME,model=m", "takes no secret"),
        ("training_client=torch,threads=many", "the option 'threads' of training_client.torch"),
        ("training_client=,threads=2", "is not PORT=NAME"),
        ("training_client=torch,threads", "is not PORT=NAME"),
    ],
)
def test_what_does_not_fit_is_told_by_name(registry: Registry, given: str, told: str) -> None:
    with pytest.raises(AdapterError) as caught:
        adapters(registry, [given])
    assert told in caught.value.message


def test_a_port_takes_one_adapter(registry: Registry) -> None:
    with pytest.raises(AdapterError, match="two adapters"):
        adapters(registry, ["evaluator=noop", "evaluator=none"])


def test_a_secret_stands_nowhere_below_the_home_nor_in_the_output(
    cli: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ask.py").write_text(
        "from crucible_kitchen import Workflow, stage\n"
        "from crucible_kitchen.ports import LLMClient\n"
        "@stage()\nasync def ask(llm_client: LLMClient) -> None:\n"
        "    assert llm_client is not None\n"
        "    raise RuntimeError('no')\n"
        "flow = Workflow('flow', ask)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("THE_KEY", "canary-31")
    option = "llm_client=openai,base_url=http://127.0.0.1:9/v1,model=m,api_key=env:THE_KEY"
    ended = cli("run", "ask.py:flow", "--adapter", option, "--json", "--debug")
    assert ended.code == 1
    shown = ended.out + ended.err + cli("show", ended.json["run_id"], "--json").out
    assert "canary-31" not in shown
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if b"canary-31" in path.read_bytes()]
