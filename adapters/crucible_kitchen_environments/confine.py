"""What a program's process does to itself before it becomes the program: namespaces, an empty root, limits, no rights.

Everything here runs in forked children of a worker process and ends in ``exec`` or ``_exit``. A step that the kernel
refuses ends the program before it began. Linux only. Read next: ``jail.py``, the parent of these processes.

The chain is *monitor* (in the new user namespace, still in the old pid namespace) → *init* (pid 1, builds the root,
reaps) → *program*. Each dies with its parent, and a pid namespace dies with its pid 1.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from crucible_kitchen.workers.tree import PR_SET_PDEATHSIG, prctl
from crucible_kitchen_environments.seccomp import deny_system_calls, supported

__all__ = ["NOBODY", "Ends", "become_monitor", "become_program"]

NOBODY = 65534
_NAMESPACES = 0x7E020000  # CLONE_NEWUSER | NEWPID | NEWNET | NEWNS | NEWIPC | NEWUTS | NEWCGROUP
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 4, 24
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000  # MS_*
_DETACH = 2
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC = 1, 2, 4, 8  # MS_* and MOUNT_ATTR_* alike
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_MAIN = "/program/main.py"

_PYTHON = str(Path(sys.executable).resolve())  # resolved now: later there is another root

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Ends:
    """The child's ends of its pipes, by file descriptor.

    Attributes:
        stdin: read by the program.
        stdout: written by the program.
        stderr: written by the program.
        status: one JSON object a line, from monitor and init to the jail; the program never has it.
        go: the jail says here that the identities are mapped; it ends when the jail's process does.
    """

    stdin: int
    stdout: int
    stderr: int
    status: int
    go: int

    def tell(self, **facts: Any) -> None:
        """Tell the jail something."""
        os.write(self.status, json.dumps(facts).encode() + b"\n")


def become_monitor(ends: Ends, parent: int, program: str, limits: dict[str, Any]) -> NoReturn:
    """Enter new namespaces, start their init, wait for it. Runs in a new child of ``parent``."""
    _end_in_exit(ends, _monitor, ends, parent, program, limits)


def become_program(ends: Ends, parent: int, program: str, limits: dict[str, Any], directory: str) -> NoReturn:
    """Become the program without namespaces: limits and the filter of system calls only."""
    _end_in_exit(ends, _bare_program, ends, parent, program, limits, directory)


def _end_in_exit(ends: Ends, work: Callable[..., None], *arguments: Any) -> NoReturn:
    """Do a forked child's work, report what it could not do, and leave: it must not run on as its parent."""
    try:
        work(*arguments)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it ends here
        with contextlib.suppress(OSError):
            ends.tell(refused=str(error) or type(error).__name__)
    os._exit(1)


def _monitor(ends: Ends, parent: int, program: str, limits: dict[str, Any]) -> None:
    os.setsid()
    _die_with(parent)
    _check(_libc.unshare(_NAMESPACES), "unshare")
    ends.tell(unshared=True)
    if os.read(ends.go, 1) != b"g":
        return
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(0, 0, 0)
    _die_with(parent)  # entering a user namespace made it forget
    init = os.fork()
    if init == 0:
        _end_in_exit(ends, _init, ends, program, limits)
    ends.tell(init=init)
    _close_pipes(ends)
    os.waitpid(init, 0)


def _init(ends: Ends, program: str, limits: dict[str, Any]) -> None:
    """Be pid 1: build the root, start the program, reap, report how it ended. All that is left dies with it."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([ends.go], [], [], 0)[0]:  # its other end is closed: the jail died before we listened
        return
    _forbid_user_namespaces()
    _build_root(program, limits)
    prctl(_PR_SET_DUMPABLE, 0)
    child = os.fork()
    if child == 0:
        _end_in_exit(ends, _jailed_program, ends, limits)
    _close_pipes(ends)
    while True:
        pid, status, used = os.wait4(-1, 0)
        if pid == child:
            ends.tell(exit_code=os.waitstatus_to_exitcode(status), cpu=used.ru_utime + used.ru_stime)
            return


def _jailed_program(ends: Ends, limits: dict[str, Any]) -> None:
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one
            break
    _limit(limits)
    # Without a root to begin with, monitor and init are of the same user as the program.
    resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"] + 2,) * 2)
    if os.geteuid() == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _execute(ends, _MAIN, forks=True)


def _bare_program(ends: Ends, parent: int, program: str, limits: dict[str, Any], directory: str) -> None:
    os.setsid()
    _die_with(parent)
    main = Path(directory) / "main.py"
    main.write_text(program, encoding="utf-8")
    _limit(limits)
    os.chdir(directory)
    _execute(ends, str(main), forks=False)


def _close_pipes(ends: Ends) -> None:
    for end in (ends.stdin, ends.stdout, ends.stderr):
        os.close(end)


def _die_with(parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _forbid_user_namespaces() -> None:
    """Take away the way back to rights over namespaces; the filter of system calls denies it as well."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    source_, target_, kind_, data_ = encoded
    _check(_libc.mount(source_, target_, kind_, ctypes.c_ulong(flags), data_), f"mount {target}")


def _restrict(target: str, flags: int, reach: int = _AT_RECURSIVE) -> None:
    """Add flags to a mount and, unless ``reach`` is 0, to all that is mounted below it."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    arguments = (_AT_FDCWD, target.encode(), reach, ctypes.byref(attributes), ctypes.sizeof(attributes))
    _check(_libc.syscall(_MOUNT_SETATTR, *arguments), f"mount_setattr {target}")


def _visible() -> list[str]:
    """Return what a program sees of this machine: the interpreter, its library, the system's shared libraries."""
    wanted = [*_LIBRARIES, f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", _PYTHON]
    found: list[str] = []
    for path in sorted({path for path in wanted if os.path.lexists(path)}):
        if not any(Path(path).is_relative_to(parent) and not Path(parent).is_symlink() for parent in found):
            found.append(path)
    return found


def _build_root(program: str, limits: dict[str, Any]) -> None:
    """Replace the file system by an empty one with a read-only view of the interpreter and a small ``/tmp``."""
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    opened = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in [*_visible(), *_DEVICES]}
    root = "/tmp" if Path("/tmp").is_dir() else "/usr"  # noqa: S108 - any directory will do; the mount hides it
    _mount("sandbox", root, "tmpfs", _NO_SUID | _NO_DEV, "size=4m,nr_inodes=4096,mode=0755")
    for path, source in opened.items():
        _show(path, source, root + path)
    main = Path(root + _MAIN)
    main.parent.mkdir()
    main.write_text(program, encoding="utf-8")
    scratch = f"{root}/tmp"  # noqa: S108 - the program's own
    Path(scratch).mkdir()
    _restrict(root, _READ_ONLY, 0)  # what is mounted on it keeps its own flags
    _mount("scratch", scratch, "tmpfs", _NO_SUID | _NO_DEV, f"size={limits['disk']},nr_inodes=1024,mode=1777")
    os.chdir(root)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/tmp")  # noqa: S108 - the program's own


def _show(path: str, source: int, target: str) -> None:
    """Let the new root have a file, a directory or a link of the old one, read-only."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        Path(target).symlink_to(Path(path).readlink())
        return
    if Path(path).is_dir():
        Path(target).mkdir(exist_ok=True)
    else:
        Path(target).touch()
    _mount(f"/proc/self/fd/{source}", target, None, _BIND | _RECURSIVE)
    device = path in _DEVICES
    _restrict(target, _NO_SUID | (_NO_EXEC if device else _NO_DEV | _READ_ONLY))


def _limit(limits: dict[str, Any]) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, int(limits["cpu"])),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (most, most))


def _execute(ends: Ends, main: str, *, forks: bool) -> None:
    """Take the pipes, install the filter, become Python. The environment holds one fixed word and nothing of ours."""
    for end, number in ((ends.stdin, 0), (ends.stdout, 1), (ends.stderr, 2)):
        os.dup2(end, number)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(ignored, signal.SIG_DFL)
    os.umask(0o077)
    if supported():
        deny_system_calls(forks=forks)
    # A fixed seed of hashes: a program's output, and with it a run, must not depend on the order of a set.
    arguments = [_PYTHON, "-P", "-s", "-S", "-B", "-X", "utf8", main]
    os.execve(arguments[0], arguments, {"PYTHONHASHSEED": "0"})  # noqa: S606 - there must be no shell
