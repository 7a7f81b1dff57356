"""What importing costs: the package's face, the command line's help, the adapters' classes; what loading may bring."""

import ast
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeGuard

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "sklearn", "tensorboard")
ROOT = Path(__file__).parents[1]
TRUSTS = {"trust_remote_code", "allow_pickle"}
MEASURE = """
import json, sys, time
began = time.process_time()
{code}
print(json.dumps([time.process_time() - began, time.process_time(), sorted(sys.modules)]))
"""


def imported(code: str) -> tuple[float, float, set[str]]:
    """Run code in a new interpreter; return the seconds of CPU it took, those with the interpreter's, the modules."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE.format(code=code)], capture_output=True, text=True, check=True
    )
    took, altogether, modules = json.loads(process.stdout.splitlines()[-1])
    return took, altogether, {name.partition(".")[0] for name in modules}


def least_cpu(code: str, times: int = 5) -> float:
    """Return the least CPU seconds of several new interpreters, start included: others may share the machine."""
    return min(imported(code)[1] for _ in range(times))


def test_the_package_imports_nothing_that_is_slow_to_import() -> None:
    _, _, modules = imported("import crucible_kitchen")
    assert not modules & {*HEAVY, "numpy", "sqlalchemy", "httpx", "typer", "pydantic", "anyio", "rich"}


def test_importing_the_package_takes_less_than_400_ms_of_cpu() -> None:
    assert least_cpu("import crucible_kitchen") < 0.4


def test_the_help_takes_less_than_600_ms_of_cpu_and_imports_no_engine() -> None:
    code = "from crucible_kitchen.cli import main; main(['--help'])"
    assert least_cpu(code) < 0.6
    _, _, modules = imported(code)
    assert not modules & {*HEAVY, "numpy", "sqlalchemy", "httpx", "pydantic"}


def test_the_kitchen_imports_no_optional_package() -> None:
    _, _, modules = imported("from crucible_kitchen import Kitchen")
    assert not modules & {*HEAVY, "typer"}


def test_every_public_name_resolves_and_an_unknown_one_is_an_attribute_error() -> None:
    import crucible_kitchen

    for name in crucible_kitchen.__all__:
        assert getattr(crucible_kitchen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Oven'"):
        _ = crucible_kitchen.Oven  # type: ignore[attr-defined]


def test_no_adapter_of_ours_imports_a_heavy_package_when_its_class_is_loaded() -> None:
    ours = [e.value for e in entry_points(group="crucible_kitchen.adapters") if e.value.startswith("crucible_kitchen_")]
    lines = (f"from {value.replace(':', ' import ')}" for value in ours)
    _, _, modules = imported("; ".join(lines))
    assert not modules & set(HEAVY)


def trusting(code: str) -> list[int]:
    """Return the lines that let somebody else's code run, or a pickle be read, with what they load."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        given = [(node.arg, node.value)] if isinstance(node, ast.keyword) else []
        if isinstance(node, ast.Dict):
            given = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if _is_text(key)]
        lines += [value.lineno for name, value in given if name in TRUSTS and ast.unparse(value) != "False"]
    return lines


def _is_text(node: ast.expr | None) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_nothing_that_is_loaded_may_bring_code_along() -> None:
    assert trusting("f(trust_remote_code=True)\n{'allow_pickle': x}\nf(allow_pickle=False)") == [2, 1]
    for path in (*ROOT.glob("crucible_kitchen/**/*.py"), *ROOT.glob("adapters/**/*.py")):
        assert not trusting(path.read_text(encoding="utf-8")), path
