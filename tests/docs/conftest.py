"""How the documents are read and run: their fenced blocks, what a comment before a block says, a place to run it in.

A comment before a block speaks to these tests. ``small: key=value ...`` are config keys (or another training client)
that make its runs short; ``file: NAME`` stores it for the blocks that follow; ``prints``: the script above prints it;
``picture``, ``example: OF WHAT`` and ``not run: REASON`` are not run. Read next: ``test_blocks.py``.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
MODEL = "SmolLM2-135M-Instruct"
SECONDS = 240
PROGRAMS = Path(sys.executable).parent
SHELL = re.compile(r"[|<>&;$`]")
RUN_ID = re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{6}\b")
FENCE = re.compile(r"^( *)```(\w*)\s*$")
COMMENT = re.compile(r"^\s*<!--\s*(small|file|prints|not run|example|picture)\s*:?\s*(.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Command:
    """One command of a console block: as the document has it, as it is run, and what should come of it."""

    shown: str
    run: str
    code: int
    output: list[str]


@dataclass
class Block:
    """A fenced block of a document, with what the comments before it say."""

    document: Path
    line: int
    language: str
    text: str
    said: dict[str, str]
    prints: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return not {"not run", "example", "picture"} & set(self.said)

    @property
    def small(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in shlex.split(self.said.get("small", "")))

    def content(self) -> str:
        """Return the block as it is run: a script with the small values in its config, where it has that key,
        or beside its dataset or model."""
        text = self.text
        for key, value in self.small.items() if self.language == "python" else ():
            written = value if re.fullmatch(r"[\d.]+|True|False|None", value) else repr(value)
            text, hits = re.subn(rf'("{key}": )[^,}}\n]+', rf"\g<1>{written}", text)
            if not hits:
                anchor = r'("dataset": "[^"]*")' if '"dataset": "' in text else r'("model": "[^"]*")'
                text, hits = re.subn(anchor, rf'\1, "{key}": {written}', text)
            assert hits, f"{self.id}: there is no config to put {key}={value} into"
        return text

    def commands(self) -> list[Command]:
        """Return a console block's commands: lines that begin with ``$ ``; what follows is their output."""
        found: list[Command] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                shown, _, code = line[2:].partition("  # exit ")
                found.append(Command(shown, self._smaller(" ".join(shown.split())), int(code or 0), []))
            else:
                assert found, f"{self.id} begins with output: commands begin with `$ `"
                found[-1].output.append(line)
        return found

    def _smaller(self, command: str) -> str:
        """Return a command with the small values at its end, a free port, and what ``make`` would call."""
        if command == "make demo":
            command = recipe_of("demo")
        if command.startswith("crucible-kitchen run "):
            for key, value in self.small.items():
                given = f" {key}={shlex.quote(value)}"
                command = (
                    re.sub(rf" {key}=\S+", "", command) + (" --adapter" if key == "training_client" else "") + given
                )
        return re.sub(r"(--metrics-port) \d+", r"\1 0", command)


def recipe_of(target: str) -> str:
    """Return the last command of a target of the Makefile, as a person would type it."""
    (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return str(recipe).splitlines()[-1].strip().replace("$(BIN)/", "")


def blocks_of(document: Path) -> Iterator[Block]:
    """Yield a document's fenced blocks, in order."""
    said: dict[str, str] = {}
    block: Block | None = None
    indent = 0
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if block is not None:
            if fence and not fence[2]:
                yield block
                block = None
            else:
                block.text += line[indent:] + "\n"
        elif fence:
            block, said, indent = Block(document, number, fence[2], "", said), {}, len(fence[1])
        elif comment := COMMENT.match(line):
            said[comment[1]] = comment[2]
        elif line.strip():
            said = {}
    assert block is None, f"{document}: a block that does not end"


def all_blocks() -> list[Block]:
    found: list[Block] = []
    for document in DOCUMENTS:
        for block in blocks_of(document):
            if "prints" in block.said:
                found[-1].prints = block.text.splitlines()
            found.append(block)
    return found


BLOCKS = all_blocks()
SETS = {
    "document": DOCUMENTS,
    "talking_document": [
        (d, talk)
        for d in DOCUMENTS
        if (talk := [b for b in BLOCKS if b.document == d and b.language == "console" and b.runs])
    ],
    "block": BLOCKS,
    "script": [block for block in BLOCKS if block.language == "python" and block.runs],
}


def name_of(value: Block | Path | tuple[Path, list[Block]]) -> str:
    """Return the id of a test's parameter."""
    document = value[0] if isinstance(value, tuple) else value
    return document.id if isinstance(document, Block) else str(document.relative_to(ROOT))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test every document, every block, or every block of a kind."""
    for name, values in SETS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[name_of(value) for value in values])


def environment() -> dict[str, str]:
    """Return the environment that blocks run in: this one without what would show, with the programs on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CRUCIBLE_", "PYTHON"))}
    path = f"{PROGRAMS}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


class Warm:
    """Runs Python programs in forks of an interpreter that has imported what takes long."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self._process = process
        self._output = output

    def run(self, argv: list[str], directory: Path) -> tuple[int, str]:
        """Run a program; return its exit code and all that it wrote, in order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._output.write_bytes(b"")
        asked = {"argv": argv, "directory": str(directory), "output": str(self._output), "seconds": SECONDS}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, self._output.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """See ``warm.py``."""
    command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        yield Warm(process, tmp_path_factory.mktemp("warm") / "output")


@dataclass(frozen=True)
class Place:
    """A directory that blocks run in."""

    directory: Path
    warm: Warm

    def furnish(self, document: Path, through: int) -> None:
        """Write the files that a document defines down to a line."""
        for block in BLOCKS:
            if block.document == document and block.line <= through and "file" in block.said:
                path = self.directory / block.said["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.content(), encoding="utf-8")

    def run(self, command: str) -> tuple[int, str]:
        """Run a command here; return its exit code and all that it wrote, in order.

        The id of a run in it means the newest one here. What only a shell can do goes to one, all else is run warm.
        """
        command = RUN_ID.sub(lambda _: self.newest_run(), command)
        program, *arguments = shlex.split(command)
        if SHELL.search(command) or program not in ("crucible-kitchen", "python") or arguments[0] in ("-c", "-m"):
            return self._in_a_shell(command)
        argv = arguments if program == "python" else [str(PROGRAMS / program), *arguments]
        return self.warm.run(argv, self.directory)

    def _in_a_shell(self, command: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=environment() | {"PYTEST_DEBUG_TEMPROOT": str(self.directory)},  # where a reader's pytest leaves things
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    def newest_run(self) -> str:
        """Return the id of the newest run here."""
        _, told = self.run("crucible-kitchen runs --json --limit 1")  # ids of the same second are in no order
        return str(json.loads(told)[0]["run_id"])


def pattern(line: str) -> str:
    """Return what is compared of a line of output: all but numbers, ids, hashes and the width of columns."""
    line = RUN_ID.sub("ID", line)
    line = re.sub(r"\b[0-9a-f]{40,}\b", "HASH", line)
    line = re.sub(r"\d[\d.,:]*(?:e-?\d+)?", "N", line)
    return " ".join(line.split())


@pytest.fixture
def says():
    """Assert that an output has the lines that a document shows, in order.

    ``...`` stands for any lines, and at the end of a line for the rest of it.
    """

    def check(output: str, expected: list[str], what: str) -> None:
        actual = iter([pattern(line) for line in output.splitlines()])
        for line in expected:
            wanted = pattern(line.removesuffix("..."))
            same = wanted.__eq__ if wanted == pattern(line) else re.compile(re.escape(wanted)).match
            assert not wanted or any(same(said) for said in actual), f"{what}: no line\n    {line}\nin\n{output}"

    return check


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer and a chat template, where the documents have a real model."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("documents") / MODEL
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*specials, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(specials) + len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def place(tmp_path: Path, language_model: Path, warm: Warm) -> Place:
    """A fresh directory to run blocks in, with the model that the documents speak of."""
    (tmp_path / MODEL).symlink_to(language_model, target_is_directory=True)
    return Place(tmp_path, warm)
