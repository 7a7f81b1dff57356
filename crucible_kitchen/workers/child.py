"""What a worker process runs: one function at a time, named by its import path, JSON in and JSON out.

It is run by its file path and imports as little as it can, so that it starts fast. The first line says where modules
are found; each further line is one call, answered by one line. What the function prints goes to standard error. Read
next: ``processes.py``, which speaks to it.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any


def main() -> None:
    """Answer calls until standard input ends."""
    calls = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)  # a print in user code must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it decides what ends
    opening = json.loads(calls.readline())
    sys.path[:] = opening["path"]
    _belong_to(opening["parent"])
    _answer(answers, {"ready": os.getpid()})
    functions: dict[str, Callable[..., Any]] = {}
    for line in calls:
        call = json.loads(line)
        _answer(answers, _outcome(functions, call["function"], call["arguments"]))


def _belong_to(parent: int) -> None:
    """Die with the parent, and take in orphans, so that the parent finds all it has to kill."""
    from crucible_kitchen.workers.tree import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl

    with contextlib.suppress(OSError):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        os._exit(1)


def _outcome(functions: dict[str, Callable[..., Any]], path: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        function = functions.get(path) or functions.setdefault(path, resolve(path))
        return {"result": function(*arguments)}
    except BaseException as error:  # noqa: BLE001 - SystemExit too: the process is the parent's to end
        return _failure(error)


def _failure(error: BaseException) -> dict[str, Any]:
    from crucible_kitchen.redaction import message_of

    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return {"error": type(error).__name__, "message": message_of(error)[:300], "place": place}


def resolve(path: str) -> Callable[..., Any]:
    """Return the function behind ``module:function``.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such name.
    """
    module, _, name = path.partition(":")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]


def _answer(answers: IO[str], value: dict[str, Any]) -> None:
    try:
        line = json.dumps(value)
    except (TypeError, ValueError) as error:
        line = json.dumps(_failure(error))
    answers.write(line + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
