"""A filter of system calls for programs that nobody trusts, installed just before they start.

It denies what a program that reads standard input and prints an answer never needs, and what would get around the
limits: sockets (some families, such as vsock, know no network namespace), memory that no process's limit counts, new
namespaces, mounts, tracing, kernel interfaces with a history. Linux on x86-64 and AArch64. Read next: ``confine.py``.
"""

import ctypes
import errno
import platform
import struct

from crucible_kitchen.workers.tree import prctl

__all__ = ["deny_system_calls", "supported"]

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF, absolute word loads
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_NR, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of argument 0
_X32 = 0x40000000
_NAMESPACES = 0x7E020000  # CLONE_NEW*
_THREAD = 0x00010000  # CLONE_THREAD

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column below

_DENIED = {  # name: numbers on x86-64 and AArch64
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_settime": (227, 112),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_FORKS = ((57,), (58,))  # fork, vfork: x86-64 only


def supported() -> bool:
    """Tell whether there is a filter for this machine."""
    return platform.system() == "Linux" and platform.machine() in _ARCHITECTURES


def deny_system_calls(*, forks: bool) -> None:
    """Install the filter in this process, for itself and all it will start; there is no way back.

    Args:
        forks: whether new processes are allowed; threads always are.

    Raises:
        OSError: the kernel refused.
    """
    program = b"".join(struct.pack("HBBI", *line) for line in _filter(*_ARCHITECTURES[platform.machine()], forks))
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(header))


def _filter(architecture: int, column: int, forks: bool) -> list[tuple[int, int, int, int]]:
    """Return the filter's lines: (operation, jump if true, jump if false, constant)."""
    denied = [numbers[column] for numbers in _DENIED.values()]
    if not forks:
        denied += [numbers[column] for numbers in _FORKS if column < len(numbers)]
    lines = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, architecture), (_RET, 0, 0, _KILL), (_LD, 0, 0, _NR)]
    lines += [(_JGE, 0, 1, _X32), (_RET, 0, 0, _KILL)]
    for number in denied:
        lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    # clone3 hides its flags in memory, where no filter can look; told that there is none, libc uses clone.
    lines += [(_JEQ, 0, 1, _CLONE3[column]), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    lines += [(_JEQ, 1, 0, _CLONE[column]), (_RET, 0, 0, _ALLOW), (_LD, 0, 0, _ARGUMENT)]
    lines += [(_JSET, 0, 1, _NAMESPACES), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    if not forks:
        lines += [(_JSET, 1, 0, _THREAD), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    return [*lines, (_RET, 0, 0, _ALLOW)]
