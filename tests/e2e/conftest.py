"""The command line in a process of its own, and a small real model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crucible_kitchen.errors import ModelNotFound
from crucible_kitchen.testing.models import small_instruct_model

MAKEFILE = Path(__file__).parents[2] / "Makefile"
PROGRAM = Path(sys.executable).with_name("crucible-kitchen")
CONVERT = """
import sys
import torch, transformers
source, name, target = sys.argv[1:]
options = {"gguf_file": name, "local_files_only": True}
whole = transformers.GgufConfig(dequantize=True)  # otherwise it counts as quantized and cannot be saved
model = transformers.AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.float32, quantization_config=whole, **options
)
model.save_pretrained(target)
transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(target)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output, as JSON."""
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs ``crucible-kitchen`` as a person does."""

    def call(*arguments: object, home: Path, cwd: Path | None = None, timeout: float = 900) -> Ended:
        done = subprocess.run(
            [PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or home,
            timeout=timeout,
            env={**os.environ, "CRUCIBLE_HOME": str(home)},
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the demo, in which nothing ran before it."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def demo(command: Command, demo_home: Path) -> Ended:
    """What ``make demo`` does, to its end: it takes a minute, so whoever needs a model that can add takes this one."""
    (line,) = (line for line in MAKEFILE.read_text(encoding="utf-8").splitlines() if "run sums_demo" in line)
    arguments = line.partition("crucible-kitchen ")[2].split()
    ended = command(*arguments, "--jsonl=events.jsonl", home=demo_home)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="session")
def demo_run(command: Command, demo: Ended, demo_home: Path) -> Any:
    """What the demo's run gave, as JSON."""
    return command("show", demo.out.split()[1], "--json", home=demo_home).json


@pytest.fixture(scope="session")
def gguf_model() -> Path:
    """A pretrained instruct model of 135M parameters as a .gguf file."""
    try:
        return small_instruct_model()
    except ModelNotFound as error:
        pytest.skip(f"no model: {error}")


@pytest.fixture(scope="session")
def model_directory(gguf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a directory, as transformers saves one: weights, config, tokenizer with its chat template."""
    directory = tmp_path_factory.mktemp("real-model") / "smollm2-135m-instruct"
    arguments = [sys.executable, "-c", CONVERT, gguf_model.parent, gguf_model.name, directory]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return directory
