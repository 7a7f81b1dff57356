"""The guard that every test stands under bites: whatever a test leaves behind fails it by name."""

import re
import subprocess
import sys
from pathlib import Path

GUARD = Path(__file__).with_name("conftest.py")
LEAVES = """
import asyncio, socket, subprocess, tempfile, threading, time

import anyio
import pytest

kept = []


def test_leaves_a_process():
    kept.append(subprocess.Popen(["sleep", "5"]))


def test_leaves_a_socket():
    kept.append(socket.socket())


def test_leaves_a_folder():
    tempfile.mkdtemp()


def test_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(5,), daemon=True).start()


@pytest.mark.anyio
async def test_leaves_a_pool_s_thread_at_work():
    with anyio.move_on_after(0.01):
        await anyio.to_thread.run_sync(lambda: time.sleep(2), abandon_on_cancel=True)


@pytest.mark.anyio
async def test_leaves_a_task():
    kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(60)))


@pytest.mark.anyio
async def test_leaves_a_pool_s_idle_thread():
    await anyio.to_thread.run_sync(int)
    with socket.socket(), tempfile.TemporaryDirectory():
        subprocess.run(["true"], check=True)
"""


def test_what_a_test_leaves_behind_fails_it_by_name(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(GUARD.read_text().replace("PATIENCE = 5.0", "PATIENCE = 0.1"))
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--basetemp", str(tmp_path / "base")]
    program = [sys.executable, "-m", "pytest", *options, "test_leaves.py"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    told = re.findall(r"(?m)^E +AssertionError: (.*) left behind", done.stdout)
    assert told == ["processes", "sockets", "temporary folders", "threads", "threads", "tasks"], done.stdout
    assert "1 failed, 6 passed, 5 errors" in done.stdout
