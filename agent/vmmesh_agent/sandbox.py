"""What the network child gives up for good before it reads a byte: what a server that takes it over could use.

It does so itself, by what the kernel lets any process give up, so it is the same under systemd and by hand, and costs
no second process. What it may read is left: the files of name resolution and of trust are replaced at any time.
Each kind has what the next lacks; where a kernel has no Landlock, or a machine no libseccomp, the others stand.
"""

import ctypes
import errno
import os
import resource
import socket

_LIBC = ctypes.CDLL(None, use_errno=True)

# linux/prctl.h, linux/landlock.h, seccomp.h
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_VERSION = 1
_FILE_ACCESSES = (13, 14, 15, 15, 16)  # how many of them each version of Landlock knows
_READING = 0b1100  # LANDLOCK_ACCESS_FS_READ_FILE and _READ_DIR
_BIND_TCP, _SCOPES = 0b01, 0b11  # abstract sockets and signals, to processes outside
_SCMP_ALLOW, _SCMP_ERRNO, _SCMP_EQ, _SCMP_GE = 0x7FFF0000, 0x00050000, 4, 5

_FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}  # getaddrinfo(3) uses all of them
_LAST_FAMILY = 64  # more than Linux has
_FORBIDDEN = (
    "execve execveat ptrace process_vm_readv process_vm_writev kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo"
    " pidfd_send_signal pidfd_getfd unshare setns mount umount2 bpf perf_event_open userfaultfd io_uring_setup"
    " add_key keyctl request_key"
    # Landlock keeps no owner from these.
    " chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown setxattr fsetxattr lsetxattr removexattr"
    " fremovexattr lremovexattr utime utimes utimensat futimesat"
).split()


class _Comparison(ctypes.Structure):  # struct scmp_arg_cmp
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def enter(uid: int, gid: int) -> None:
    """Become the user, and a process that can start, write and change nothing. There is no way back."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the credential
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no other process
    if os.geteuid() == 0:
        _drop_bounding_set()
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _close_files()
    _close_calls()


def _drop_bounding_set() -> None:
    capability = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1


def _close_files() -> None:
    """Landlock: nothing is written, made, removed or run, nothing listens; no rule makes an exception."""
    version = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return
    files = (1 << _FILE_ACCESSES[min(version, len(_FILE_ACCESSES)) - 1]) - 1
    rules = (ctypes.c_uint64 * 3)(
        files & ~_READING, _BIND_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )  # fmt: skip
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    _LIBC.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _close_calls() -> None:
    """seccomp: what is forbidden fails, so that an honest mistake is an error with a place."""
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return
    seccomp.seccomp_init.restype = ctypes.c_void_p
    refusal = _SCMP_ERRNO | errno.EPERM
    context = ctypes.c_void_p(seccomp.seccomp_init(_SCMP_ALLOW))

    def forbid(call: str, *comparisons: _Comparison) -> None:
        # A name that this library or this architecture does not have makes no rule.
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        conditions = (_Comparison * len(comparisons))(*comparisons)
        seccomp.seccomp_rule_add_array(context, refusal, number, len(comparisons), conditions)

    for call in _FORBIDDEN:
        forbid(call)
    for family in sorted(set(range(_LAST_FAMILY)) - _FAMILIES):
        forbid("socket", _Comparison(0, _SCMP_EQ, family, 0))
    forbid("socket", _Comparison(0, _SCMP_GE, _LAST_FAMILY, 0))
    seccomp.seccomp_load(context)
    seccomp.seccomp_release(context)
