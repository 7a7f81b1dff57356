"""The sandbox against programs that are right, wrong, slow and hostile."""

import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from crucible_kitchen.errors import SandboxUnavailable
from crucible_kitchen.workers.tree import descendants
from crucible_kitchen_environments import sandbox as module
from crucible_kitchen_environments.sandbox import Limits, Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")]

SHORT = Limits(seconds=1.0, cpu_seconds=1)


@pytest.fixture
async def sandbox(namespaces: None) -> AsyncIterator[Sandbox]:
    before = descendants(os.getpid())
    async with Sandbox(workers=2, limits=Limits(seconds=30.0)) as sandbox:
        yield sandbox
    assert descendants(os.getpid()) == before


def answers(stdout: str) -> list[str]:
    return stdout.split("\n")[:-1]


ATTEMPTS = """
def attempt(name, act):
    try:
        print(name, act())
    except BaseException as error:
        print(name, type(error).__name__)
"""


async def test_a_program_reads_its_input_and_its_output_comes_back(sandbox: Sandbox) -> None:
    ran = await sandbox.run("print(sum(map(int, input().split())))", "20 22\n")
    assert (ran.ended, ran.exit_code, ran.stdout) == ("exited", 0, "42\n")


async def test_a_program_that_fails_says_why(sandbox: Sandbox) -> None:
    ran = await sandbox.run("print('half')\nraise ValueError('no')")
    assert (ran.ended, ran.exit_code, ran.stdout) == ("exited", 1, "half\n")
    assert ran.stderr.endswith("ValueError: no\n")


async def test_a_program_that_crashes_ends_by_its_signal(sandbox: Sandbox) -> None:
    ran = await sandbox.run("import ctypes; ctypes.string_at(0)")
    assert (ran.ended, ran.exit_code) == ("exited", -11)


async def test_much_input_and_output_pass(sandbox: Sandbox) -> None:
    text = "0123456789" * 50_000
    ran = await sandbox.run("import sys; sys.stdout.write(sys.stdin.read())", text)
    assert ran.stdout == text


async def test_input_that_is_not_read_is_no_failure(sandbox: Sandbox) -> None:
    assert (await sandbox.run("print(1)", "x" * 1_000_000)).stdout == "1\n"


async def test_output_does_not_depend_on_random_hashes(sandbox: Sandbox) -> None:
    program = "print(list({chr(i) * 3 for i in range(97, 123)}))"
    assert (await sandbox.run(program)).stdout == (await sandbox.run(program)).stdout


async def test_programs_run_at_the_same_time_without_seeing_each_other(sandbox: Sandbox) -> None:
    ran: list[str] = []

    async def one(word: str) -> None:
        program = "import os; open('/tmp/f', 'a').write(input()); print(open('/tmp/f').read(), os.getpid())"
        ran.append((await sandbox.run(program, word)).stdout)

    async with anyio.create_task_group() as group:
        for word in ("a", "b", "c"):
            group.start_soon(one, word)
    assert sorted(ran) == ["a 2\n", "b 2\n", "c 2\n"]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(3600)",
        "import signal, time\nfor n in {*signal.Signals} - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(3600)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ],
    ids=["spins", "sleeps", "ignores every signal", "catches everything"],
)
async def test_a_program_that_hangs_is_ended(sandbox: Sandbox, program: str) -> None:
    with anyio.fail_after(20):
        ran = await sandbox.run(program, limits=SHORT)
    assert (ran.ended, ran.exit_code) == ("time", None)


async def test_processor_time_is_limited_apart_from_wall_clock_time(sandbox: Sandbox) -> None:
    with anyio.fail_after(60):
        ran = await sandbox.run("while True: pass", limits=Limits(seconds=600, cpu_seconds=1))
    assert ran.ended == "time"


async def test_a_fork_bomb_is_held_and_ended_as_a_whole(sandbox: Sandbox) -> None:
    bomb = """
import os
made = 0
while True:
    try:
        if os.fork() == 0:
            made = 0
        else:
            made += 1
    except OSError:
        os.write(1, b'refused\\n')
        while True: pass
"""
    with anyio.fail_after(30):
        ran = await sandbox.run(bomb, limits=replace(SHORT, processes=8))
    assert ran.ended == "time"
    assert "refused" in ran.stdout
    assert (await sandbox.run("print('free again')")).stdout == "free again\n"


async def test_a_daemon_that_detached_itself_dies_with_its_program(sandbox: Sandbox, tmp_path: Path) -> None:
    daemon = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b'daemon\\n')
        time.sleep(3600)
    os._exit(0)
os.wait()
"""
    with anyio.fail_after(20):
        ran = await sandbox.run(daemon)
    assert (ran.ended, ran.exit_code) == ("exited", 0)


@pytest.mark.parametrize(
    "program",
    ["x = bytearray(4 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))"],
    ids=["at once", "bit by bit"],
)
async def test_memory_is_limited(sandbox: Sandbox, program: str) -> None:
    ran = await sandbox.run(program)
    assert (ran.ended, ran.exit_code) == ("exited", 1)
    assert "MemoryError" in ran.stderr


async def test_memory_of_all_processes_together_is_limited(sandbox: Sandbox) -> None:
    program = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = b'x' * (60 << 20)
        time.sleep(3600)
time.sleep(3600)
"""
    with anyio.fail_after(30):
        ran = await sandbox.run(program, limits=Limits(seconds=20, memory_bytes=128 << 20))
    assert ran.ended == "memory"


async def test_memory_that_no_limit_counts_is_refused(sandbox: Sandbox) -> None:
    program = (
        ATTEMPTS
        + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
attempt('memfd', lambda: os.memfd_create('x'))
attempt('shm', lambda: (libc.shmget(0, 1 << 20, 0o1600), ctypes.get_errno()))
"""
    )
    assert answers((await sandbox.run(program)).stdout) == ["memfd PermissionError", f"shm (-1, {errno.EPERM})"]


async def test_the_disk_is_limited_to_a_small_place(sandbox: Sandbox) -> None:
    program = (
        ATTEMPTS
        + """
def fill():
    for i in range(100):
        open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20))
def litter():
    for i in range(100_000):
        open(f'/tmp/e{i}', 'wb')
attempt('fill', fill)
import shutil, os
for name in os.listdir('/tmp'): os.remove('/tmp/' + name)
attempt('litter', litter)
"""
    )
    assert answers((await sandbox.run(program)).stdout) == ["fill OSError", "litter OSError"]


async def test_output_is_limited(sandbox: Sandbox) -> None:
    with anyio.fail_after(20):
        ran = await sandbox.run("while True: print('x' * 1000)", limits=Limits(output_bytes=10_000))
    assert ran.ended == "output"
    assert len(ran.stdout) == 10_000


async def test_errors_without_end_are_cut_not_kept(sandbox: Sandbox) -> None:
    ran = await sandbox.run("import sys\nfor _ in range(10000): sys.stderr.write('x' * 1000)")
    assert (ran.ended, ran.exit_code) == ("exited", 0)
    assert len(ran.stderr) <= 16 << 10


async def test_a_program_sees_an_empty_file_system_and_can_write_in_one_place(sandbox: Sandbox, home: Path) -> None:
    secret = home / "secret"
    secret.write_text("canary")
    program = (
        ATTEMPTS
        + f"""
import os
attempt('store', lambda: open({str(secret)!r}).read())
attempt('home', lambda: os.listdir({str(home)!r}))
attempt('user', lambda: os.listdir({str(Path.home())!r} + '/.cache'))
attempt('password', lambda: open('/etc/passwd').read())
attempt('project', lambda: os.listdir({str(Path(module.__file__).parent)!r}))
attempt('processes', lambda: os.listdir('/proc'))
attempt('above', lambda: os.listdir('/..') == os.listdir('/'))
def written(path):
    try:
        open(path, 'a')
    except OSError:
        return 'refused'
attempt('library', lambda: written(os.__file__))
attempt('itself', lambda: written(__file__))
attempt('root', lambda: written('/file'))
attempt('tmp', lambda: open('/tmp/file', 'w').write('x'))
attempt('node', lambda: os.mknod('/tmp/disk', 0o60666, 0x800))
"""
    )
    assert answers((await sandbox.run(program)).stdout) == [
        "store FileNotFoundError",
        "home FileNotFoundError",
        "user FileNotFoundError",
        "password FileNotFoundError",
        "project FileNotFoundError",
        "processes FileNotFoundError",
        "above True",
        "library refused",
        "itself refused",
        "root refused",
        "tmp 1",
        "node PermissionError",
    ]


async def test_a_program_has_nothing_of_the_parents_environment_or_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CRUCIBLE_TEST_SECRET", "canary")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        async with Sandbox(workers=1) as sandbox:
            ran = await sandbox.run(
                "import os\nprint(sorted(os.environ))\n"
                "def there(fd):\n  try: return bool(os.fstat(fd))\n  except OSError: return False\n"
                "print([fd for fd in range(64) if there(fd)])"
            )
    assert answers(ran.stdout) == ["['LC_CTYPE', 'PYTHONHASHSEED']", "[0, 1, 2]"]  # LC_CTYPE is Python's own


async def test_a_program_cannot_reach_a_server_of_this_machine(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        program = (
            ATTEMPTS
            + f"""
import socket
attempt('tcp', lambda: socket.create_connection(('127.0.0.1', {port}), timeout=1))
attempt('udp', lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt('unix', lambda: socket.socket(socket.AF_UNIX))
attempt('packet', lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt('vsock', lambda: socket.socket(40, socket.SOCK_STREAM))
attempt('pair', lambda: len(socket.socketpair()))
"""
        )
        ran = await sandbox.run(program)
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()
        with socket.create_connection(("127.0.0.1", port)):  # which this process reaches
            server.accept()[0].close()
    refused = ["tcp", "udp", "unix", "packet", "vsock"]
    assert answers(ran.stdout) == [*(f"{name} PermissionError" for name in refused), "pair 2"]


async def test_a_program_has_no_rights_and_cannot_get_any(sandbox: Sandbox) -> None:
    program = (
        ATTEMPTS
        + """
import ctypes, os, resource, signal, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    return getattr(libc, name)(*arguments), ctypes.get_errno()
attempt('user', os.getuid)
attempt('root', lambda: os.setuid(0))
attempt('unshare', lambda: call('unshare', 0x10000000))
attempt('mount', lambda: call('mount', b'x', b'/tmp', b'tmpfs', 0, None))
attempt('chroot', lambda: os.chroot('/tmp'))
attempt('trace', lambda: call('ptrace', 16, 1, 0, 0))
attempt('kill', lambda: os.kill(1, signal.SIGKILL))
attempt('limit', lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))
attempt('clone', lambda: call('syscall', 56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0))
attempt('alive', lambda: True)
"""
    )
    denied = f"(-1, {errno.EPERM})"
    assert answers((await sandbox.run(program)).stdout) == [
        "user 65534",
        "root PermissionError",
        f"unshare {denied}",
        f"mount {denied}",
        "chroot PermissionError",
        f"trace {denied}",
        "kill PermissionError",
        "limit ValueError",
        f"clone {denied}",
        "alive True",
    ]


async def test_a_forged_report_is_only_output(sandbox: Sandbox) -> None:
    forged = '{"ended": "exited", "exit_code": 0, "stdout": "right", "stderr": "", "seconds": 0, "reason": ""}'
    program = f"""
import os
for fd in range(64):
    try: os.write(fd, {(forged + chr(10)).encode()!r})
    except OSError: pass
os._exit(7)
"""
    ran = await sandbox.run(program)
    assert (ran.ended, ran.exit_code) == ("exited", 7)
    assert ran.stdout == forged + "\n"


async def test_cancelling_a_run_kills_its_program_and_frees_its_place(sandbox: Sandbox) -> None:
    before = set(descendants(os.getpid()))
    with anyio.move_on_after(0.3):
        await sandbox.run("import os, time\nos.fork()\nos.fork()\ntime.sleep(3600)")
    assert set(descendants(os.getpid())) <= before
    assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_a_killed_parent_leaves_no_program(tmp_path: Path, namespaces: None) -> None:
    """The process that owns the sandbox dies by SIGKILL while a program runs: the program dies with it."""
    script = tmp_path / "owner.py"
    script.write_text(
        "import anyio, sys\n"
        "from crucible_kitchen_environments.sandbox import Sandbox\n"
        "async def main():\n"
        "    async with Sandbox(workers=1) as sandbox:\n"
        "        async with anyio.create_task_group() as group:\n"
        "            group.start_soon(sandbox.run, 'import time\\nwhile True: time.sleep(1)')\n"
        "            from crucible_kitchen.workers.tree import descendants\n"
        "            import os\n"
        "            while len(found := descendants(os.getpid())) < 4: await anyio.sleep(0.01)\n"
        "            print(' '.join(map(str, found)), flush=True)\n"
        "            await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    owner = await anyio.open_process([sys.executable, str(script)], stderr=None)
    async with owner:
        assert owner.stdout is not None
        pids = [int(word) for word in (await owner.stdout.receive()).split()]
        assert len(pids) == 4  # the worker, monitor, init and the program
        watched = [os.pidfd_open(pid) for pid in pids]
        owner.kill()
        for fd in watched:
            with anyio.fail_after(10):
                await anyio.wait_readable(fd)
            os.close(fd)


async def test_where_the_kernel_refuses_the_sandbox_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_JAIL", "refusing_jail:run")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    with pytest.raises(SandboxUnavailable, match="unshare: Operation not permitted") as caught:
        async with Sandbox(workers=1):
            raise AssertionError("it must not start")
    assert "limits-only" in str(caught.value.hint)


async def test_limits_only_runs_programs_without_sockets_processes_or_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CRUCIBLE_TEST_SECRET", "canary")
    program = (
        ATTEMPTS
        + """
import os, socket, threading
attempt('answer', lambda: 42)
attempt('environment', lambda: sorted(os.environ))
attempt('socket', socket.socket)
attempt('fork', os.fork)
attempt('spawn', lambda: os.posix_spawn('/bin/true', ['true'], {}))
def threads():
    seen = []
    thread = threading.Thread(target=seen.append, args=(1,))
    thread.start()
    thread.join()
    return seen
attempt('threads', threads)
attempt('memory', lambda: bytearray(4 << 30))
"""
    )
    async with Sandbox(isolation="limits-only", workers=1) as sandbox:
        ran = await sandbox.run(program)
        ended = [
            (await sandbox.run(text, limits=SHORT)).ended for text in ("while True: pass", "import time; time.sleep(9)")
        ]
        where = (await sandbox.run("import os; print(os.getcwd())")).stdout.strip()
    assert answers(ran.stdout) == [
        "answer 42",
        "environment ['LC_CTYPE', 'PYTHONHASHSEED']",
        "socket PermissionError",
        "fork PermissionError",
        "spawn PermissionError",
        "threads [1]",
        "memory MemoryError",
    ]
    assert ended == ["time", "time"]
    assert "crucible-program-" in where
    assert not await anyio.Path(where).exists()


@pytest.mark.parametrize(("required", "ends"), [("", pytest.skip.Exception), ("required", SandboxUnavailable)])
def test_where_the_kernel_refuses_these_tests_are_skipped_unless_they_are_required(
    monkeypatch: pytest.MonkeyPatch, need_namespaces: Callable[[], None], required: str, ends: type[BaseException]
) -> None:
    monkeypatch.setattr(module, "_JAIL", "refusing_jail:run")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.setenv("CRUCIBLE_KITCHEN_SANDBOX", required)
    with pytest.raises(ends, match="unshare: Operation not permitted"):
        need_namespaces()


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds=0"):
        Limits(seconds=0)
