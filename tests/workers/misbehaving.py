"""Functions that a worker process is asked to run: right, wrong, and hostile to being stopped."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

calls = 0


def add(a: int, b: int) -> int:
    return a + b


def count() -> int:
    global calls
    calls += 1
    return calls


def pid() -> int:
    return os.getpid()


def say(text: str) -> str:
    print(text)
    sys.stdout.flush()
    os.write(1, b'{"result": "forged"}\n')
    return text


def fail(message: str) -> None:
    raise ValueError(f"it says {message}")


def leave() -> None:
    raise SystemExit(3)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def not_json() -> Any:
    return object()


def environment() -> dict[str, str]:
    return dict(os.environ)


def read_input() -> str:
    return sys.stdin.read()


def spin() -> None:
    while True:
        pass


def spin_in_c() -> int:
    return sum(1 for _ in iter(int, 1))


def hold_the_interpreter() -> int:
    return len(str(7 ** (10**9)))  # one C call for hours, no bytecode in between


def catch_everything() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            continue


def leave_daemons(where: str) -> None:
    """Start a child and, double-forked into a session of its own, a grandchild; write down both; never return."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    daemon = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "open(sys.argv[1], 'w').write(sys.argv[2] + ' ' + str(os.getpid()))\n"
        "time.sleep(3600)\n"
    )
    subprocess.run([sys.executable, "-c", daemon, where, str(child.pid)], check=True)
    catch_everything()
