"""The documents' tables list what the code has: config keys, events, metrics, commands, options of adapters, files.

Each is computed from the code and must stand in its document word for word, between two marks. Run as a script, this
file writes them all.
"""

import inspect
import json
import re
from functools import partial
from pathlib import Path

import pytest
import typer.main

from crucible_kitchen.cli.app import app
from crucible_kitchen.events import event_schema
from crucible_kitchen.learner import hyperparams
from crucible_kitchen.registry import Registry
from crucible_kitchen.telemetry import PrometheusSink
from crucible_kitchen.workflow.typing import type_name
from crucible_kitchen.workflows.distillation import DistillationConfig
from crucible_kitchen.workflows.preference import PreferenceConfig
from crucible_kitchen.workflows.reinforcement import ReinforcementConfig
from crucible_kitchen.workflows.reward_model import RewardModelConfig
from crucible_kitchen.workflows.supervised import SupervisedConfig

ROOT = Path(__file__).parents[2]


def cell(text):
    """Return a text as a cell: one line, code in single quotes, no bar that would end the cell."""
    return " ".join(str(text).split()).replace("``", "`").replace("|", "\\|")


def row(*cells):
    return "| " + " | ".join(cell(c) for c in cells) + " |"


def shown(value):
    """Return a default as it is written on the command line."""
    if value is None or value in ("", (), {}, []):
        return ""
    return f"`{json.dumps(value) if isinstance(value, bool) else value}`"


def config_table(config):
    lines = [row("key", "type", "default", "meaning"), "|---|---|---|---|"]
    fields = config.model_fields.items()
    for key, field in sorted(fields, key=lambda item: not item[1].is_required()):  # those that must be given come first
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        kind = type_name(field.annotation).removeprefix("Literal").strip("[]").replace(" | None", "")
        lines.append(row(f"`{key}`", kind, default, field.description))
    return "\n".join(lines)


def event_table():
    lines = [row("event", "measurements", "metadata", "meaning"), "|---|---|---|---|"]
    for event in event_schema():
        names = (", ".join(f"`{name}`" for name in event[kind]) for kind in ("measurements", "metadata"))
        lines.append(row(f"`{event['event']}`", *names, event["doc"]))
    return "\n".join(lines)


def metric_table():
    lines = [row("metric", "kind", "labels", "meaning"), "|---|---|---|---|"]
    for collector in PrometheusSink().registry._collector_to_names:
        name = collector._name + ("_total" if collector._type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        lines.append(row(f"`{name}`", collector._type, labels, collector._documentation))
    return "\n".join(lines)


def commands(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def command_table(path, command):
    usage = [f"### `{' '.join(('crucible-kitchen', *path))}`", "", cell((command.help or "").partition("\n\n")[0])]
    lines = [*usage, "", row("argument or option", "meaning"), "|---|---|"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            lines.append(row(f"`{parameter.metavar}`", parameter.help))
        elif "--help" not in parameter.opts:
            names = ", ".join(f"`{name}`" for name in parameter.opts)
            value = f" `{parameter.metavar}`" if parameter.metavar else ""
            lines.append(row(names + value, parameter.help))
    return "\n".join(lines)


def command_tables():
    found = [(path, command) for path, command in commands(typer.main.get_command(app)) if command.params]
    return "\n\n".join(command_table(path, command) for path, command in found)


def option_table(adapter):
    """Return an adapter's options from its constructor and what its docstring says of them."""
    port, name = adapter.split(".")
    cls = Registry.discover().adapter_class(port, name)
    said = inspect.getdoc(cls).partition("Args:\n")[2].partition("\n\n")[0]
    meanings = dict(re.findall(r"^ {4}(\w+): ((?:.|\n {8})+)", said, re.MULTILINE))
    lines = [row("option", "default", "meaning"), "|---|---|---|"]
    for option, parameter in inspect.signature(cls).parameters.items():
        if option != "home":
            default = "required" if parameter.default is parameter.empty else shown(parameter.default)
            lines.append(row(f"`{option}`", default, meanings[option]))
    return "\n".join(lines)


WITH_OPTIONS = (
    "training_client.torch",
    "training_client.noop",
    "training_client.http",
    "sampling_client.http",
    "dataset_store.files",
    "dataset_store.huggingface",
    "evaluator.metrics",
    "sampling_client.openai",
    "llm_client.openai",
)

TABLES = {
    "config keys": ("docs/supervised.md", partial(config_table, SupervisedConfig)),
    "reward model keys": ("docs/preference.md", partial(config_table, RewardModelConfig)),
    "distillation keys": ("docs/distillation.md", partial(config_table, DistillationConfig)),
    "preference keys": ("docs/preference.md", partial(config_table, PreferenceConfig)),
    "reinforcement keys": ("docs/reinforcement.md", partial(config_table, ReinforcementConfig)),
    "events": ("docs/telemetry.md", event_table),
    "metrics": ("docs/telemetry.md", metric_table),
    "commands": ("docs/cli.md", command_tables),
    **{adapter: ("docs/backends.md", partial(option_table, adapter)) for adapter in WITH_OPTIONS},
}


def place_of(name):
    """Return a pattern of what stands between a table's marks."""
    return re.compile(rf"(?<=<!-- table: {re.escape(name)} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


def write_tables():
    """Bring every table of the documents up to date."""
    for name, (page, table) in TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(place_of(name).sub(lambda _, table=table: table(), text), encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_code_s(name):
    page, table = TABLES[name]
    (found,) = place_of(name).findall((ROOT / page).read_text(encoding="utf-8"))
    assert found == table(), f"bring {page} up to date: python tests/docs/test_tables.py"


def test_every_adapter_is_described():
    text = (ROOT / "docs/backends.md").read_text(encoding="utf-8")
    for adapter in Registry.discover().adapters:
        port, name = adapter.split(".")
        (line,) = re.findall(rf"^\| `{port}` \|.*", text, re.MULTILINE)
        assert f"`{name}`" in line, adapter


def test_the_map_of_files_names_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictured = readme.partition("## Files")[2]
    present = [p for folder in ("crucible_kitchen", "adapters") for p in (ROOT / folder).iterdir()]
    for path in present:
        if path.name[0] not in "._" and path.name != "py.typed":
            assert re.search(rf"^\s+{re.escape(path.name)}/?\s", pictured, re.MULTILINE), (
                f"{path.name} is not in the map"
            )
    for name in re.findall(r"^  (\w[\w.]*)", pictured, re.MULTILINE):
        assert any(path.name == name for path in present), f"the map names {name}, which is not there"
    for name in re.findall(r"^(\w[\w./-]*)/? {2,}", pictured, re.MULTILINE):
        assert (ROOT / name).exists(), f"the map names {name}, which is not there"


def test_the_recommended_learning_rate_is_the_code_s():
    text = " ".join((ROOT / "docs/supervised.md").read_text(encoding="utf-8").split())
    h = hyperparams
    tiny, full = f"{h.TINY_RATE:.0e}".replace("e-0", "e-"), f"{h.FULL_RATE:.0e}".replace("e-0", "e-")
    assert f"{tiny} for models narrower than {h.TINY_WIDTH}, else `{full} * {h.REFERENCE_WIDTH} / width`" in text
    assert f"{tiny} at most" in text


if __name__ == "__main__":
    write_tables()
