"""An interpreter that has imported what takes long, and forks for every program that it is asked to run.

The documents have a hundred commands and scripts, most of which run for less time than it takes to import torch. Each
runs in a process of its own, as it would by itself. A line of JSON asks for one, a line with its exit code answers.
Read next: ``conftest.py``.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys

import peft  # noqa: F401
import torch  # noqa: F401

import crucible_kitchen.cli.running
import crucible_kitchen.kitchen
import crucible_kitchen.workflows.distillation
import crucible_kitchen.workflows.reinforcement  # noqa: F401


def become(argv: list[str], directory: str, output: str, seconds: int) -> None:
    """Be a Python program: its arguments, its directory, nothing to read, one file for all that it writes."""
    signal.alarm(seconds)
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    written = os.open(output, os.O_WRONLY)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


gc.freeze()  # what is shared stays shared: a collection in a fork would copy it
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    program = fork.Process(target=become, kwargs=json.loads(line))
    program.start()
    program.join()
    print(program.exitcode, flush=True)
