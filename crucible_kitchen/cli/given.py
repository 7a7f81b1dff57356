"""What a person gave on the command line, as config values, adapters and workflows.

It checks the shape only; whether a value fits is the config's business, whether an adapter does the check's. Read
next: ``crucible_kitchen.cli.running``.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from crucible_kitchen.errors import AdapterError, ConfigError, CrucibleError, NotFoundError, WorkflowError

if TYPE_CHECKING:
    from crucible_kitchen.config import RunConfig
    from crucible_kitchen.registry import Registry
    from crucible_kitchen.workflow.nodes import Workflow
    from crucible_kitchen.workflow.recipe import Recipe

__all__ = ["adapters", "config_class", "config_values", "target"]

_NEXT_OPTION = re.compile(r",(?=[A-Za-z_]\w*=)")


def config_values(config: "type[RunConfig]", pairs: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Return the config's values: those of the file, and over them those given as ``key=value``.

    Raises:
        ConfigError: a pair or the file is malformed, or a key is given twice.
    """
    values = _file_values(file) if file else {}
    seen: set[str] = set()
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"{pair!r} is not KEY=VALUE", hint="config values are written like epochs=3")
        if key in seen:
            raise ConfigError(f"config key {key!r} is given twice")
        seen.add(key)
        _put(values, key, _value(config, key, text))
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; one with dots is a key of an object."""
    first, dot, rest = key.partition(".")
    if not dot:
        values[key] = value
        return
    inner = values.get(first)
    values[first] = dict(inner) if isinstance(inner, dict) else {}
    _put(values[first], rest, value)


def _value(config: "type[RunConfig]", key: str, text: str) -> Any:
    """Return a value as text, for the config to make a number or a name of it, or as the JSON it is."""
    if text == "null":
        return None
    if text.startswith("env:"):
        raise ConfigError(
            f"config key {key!r}: a config is written into the run's manifest and takes no secret",
            hint="secrets are options of adapters: --adapter PORT=NAME,KEY=env:VARIABLE",
        )
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text  # a chat template, for instance, also begins with a brace
    field = config.model_fields.get(key)
    if field is not None and get_origin(field.annotation) in (tuple, list):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _file_values(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path} is neither a .toml nor a .json file")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of both parsers and of the encoding; they say line and column
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no object of config values")
    return values


def adapters(registry: "Registry", given: Sequence[str]) -> dict[str, Any]:
    """Return adapter by port as ``Kitchen`` takes it: None, a name, or a name with options.

    Raises:
        AdapterError: one is malformed, unknown, or an option does not fit its type; a secret's variable is not set.
    """
    chosen: dict[str, Any] = {}
    for one in given:
        port, equals, rest = one.partition("=")
        name, *pairs = _NEXT_OPTION.split(rest)
        if not (port and equals and name) or "," in name:
            raise AdapterError(f"{one!r} is not PORT=NAME[,KEY=VALUE...]", hint="for instance training_client=noop")
        if port in chosen:
            raise AdapterError(f"the port {port!r} is given two adapters")
        if name == "none":
            chosen[port] = None
            continue
        types = _option_types(registry.adapter_class(port, name))
        options = dict(_adapter_option(f"{port}.{name}", types, *pair.split("=", 1)) for pair in pairs)
        chosen[port] = (name, options) if options else name
    return chosen


def _option_types(adapter: Any) -> dict[str, Any]:
    """Return the types of an adapter's options, as far as its constructor declares them."""
    try:
        return get_type_hints(adapter.__init__)
    except (NameError, TypeError, AttributeError):  # a third party's, imported for its type checker only
        return {}


def _adapter_option(adapter: str, types: Mapping[str, Any], key: str, text: str) -> tuple[str, Any]:
    """Return an adapter's option as the type that its constructor declares."""
    from pydantic import PydanticSchemaGenerationError, SecretStr, TypeAdapter, ValidationError
    from pydantic_core import SchemaError

    value: Any = text
    if text.startswith("env:"):
        value = SecretStr(_environment(adapter, key, text.removeprefix("env:")))
    elif text == "null":
        value = None
    elif text[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except ValueError:
            value = text
    if key not in types:
        return key, value
    if isinstance(value, SecretStr) and SecretStr not in (types[key], *get_args(types[key])):
        raise AdapterError(f"the option {key!r} of {adapter} takes no secret", hint="write its value without env:")
    try:
        return key, TypeAdapter(types[key], config={"arbitrary_types_allowed": True}).validate_python(value)
    except (PydanticSchemaGenerationError, SchemaError):  # a type that only the adapter itself can judge
        return key, value
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise AdapterError(f"the option {key!r} of {adapter}: {problem}") from None


def _environment(adapter: str, key: str, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise AdapterError(
            f"the environment variable {variable!r} is not set, which {adapter} takes its {key!r} from",
            hint=f"export {variable}=...",
        )
    return value


def target(registry: "Registry", name: str) -> "Workflow | Recipe":
    """Return a workflow or recipe by name, or from ``package.module:attribute`` or ``path/to/file.py:attribute``.

    Raises:
        NotFoundError: there is none.
        WorkflowError: its file or module cannot be imported, or holds something else under this name.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        return _named(registry, name)
    from crucible_kitchen.workflow.nodes import Workflow
    from crucible_kitchen.workflow.recipe import Recipe

    module = _imported(name, place)
    found = getattr(module, attribute, None)
    if isinstance(found, (Workflow, Recipe)):
        return found
    offered = sorted(key for key, value in vars(module).items() if isinstance(value, (Workflow, Recipe)))
    hint = f"it holds: {', '.join(offered)}" if offered else "it holds no workflow and no recipe"
    raise NotFoundError(f"there is no workflow or recipe {attribute!r} in {place}", hint=hint)


def _named(registry: "Registry", name: str) -> "Workflow | Recipe":
    try:
        return registry.target(name)
    except CrucibleError:
        raise
    except Exception as error:
        raise WorkflowError(name, [f"it cannot be imported: {type(error).__name__}: {error}"]) from error


def _imported(name: str, place: str) -> Any:
    """Import a module by its name, also one below the current directory, or a file by its path."""
    path = Path(place)
    try:
        if path.suffix != ".py":
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(place)
        sys.path.insert(0, str(path.absolute().parent))  # as Python does for a script
        return _loaded(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {place}") from error
    except ModuleNotFoundError as error:
        hint = "is it installed, or below this directory?"
        raise NotFoundError(f"cannot import {place}: {error}", hint=hint) from error
    except CrucibleError:
        raise
    except Exception as error:
        raise WorkflowError(name, [f"{place} cannot be imported: {type(error).__name__}: {error}"]) from error


class _Script(SourceFileLoader):
    """Loads a file as Python loads a script: always from its source.

    What is kept compiled is told apart by whole seconds and its size, and a file may be changed faster than that.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _loaded(path: Path) -> Any:
    name = f"_workflow_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Script(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # type hints of its stages are looked up there
    spec.loader.exec_module(module)
    return module


def config_class(found: "Workflow | Recipe") -> "type[RunConfig]":
    """Return the config class of a workflow, or of a recipe's."""
    from crucible_kitchen.workflow.recipe import Recipe

    return found.workflow.config if isinstance(found, Recipe) else found.config
