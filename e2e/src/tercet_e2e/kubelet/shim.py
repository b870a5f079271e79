"""Runs one container: `python -I -S shim.py SPEC.json`. Outlives the kubelet that started it.

Two processes of this file and the container's own:

    shim   on the machine; writes who runs, waits, writes how it ended
    init   first process of a new PID namespace; makes the container's view of the file system,
           passes SIGTERM on, reaps. When it ends, the kernel kills all that the container left.

The view is an overlay: the machine's root file system below, a bounded tmpfs on top, so that mount
points can be made that the machine does not have and nothing written stays. Then volumes are bound
at their paths, and the old root is let go: a container that lives on must not hold the mounts of
other pods' volumes, which it saw when it started.

Standard library only, one file, no imports of the package: it starts in 20 ms.
"""

# pathlib would cost as much time as all the rest:
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH120, PTH123, PTH208, PTH211

import ctypes
import json
import os
import signal
import stat
import sys
import time
from typing import Any

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SCRATCH_BYTES_MAX = 256 << 20
DEVICES = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "fuse"}
CANNOT_START = 128  # exit code, as container runtimes have it

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises the error of a C call."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """The system call, with an error that says what."""
    answer = libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    check(answer, f"mount {source} at {target}")


def write_json(path: str, value: object) -> None:
    """Readers see the old file or the new one."""
    with open(path + ".partial", "w") as handle:
        json.dump(value, handle)
    os.rename(path + ".partial", path)


def start_ticks(pid: int) -> int:
    """When a process started."""
    with open(f"/proc/{pid}/stat") as handle:
        return int(handle.read().rpartition(")")[2].split()[19])


def make_point(target: str, directory: bool) -> None:
    """A mount point in the overlay: its top takes the new name."""
    if os.path.lexists(target):
        return
    os.makedirs(target if directory else os.path.dirname(target), exist_ok=True)
    if not directory:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def make_dev(dev: str, privileged: bool) -> None:
    """A /dev of the container's own: what is made there must not appear on the machine."""
    mount("tmpfs", dev, "tmpfs", 0, "size=1m,mode=0755")
    for name in sorted(os.listdir("/dev")):
        if name not in DEVICES and not privileged:
            continue
        info = os.lstat(f"/dev/{name}")
        if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            os.mknod(f"{dev}/{name}", info.st_mode, info.st_rdev)
            os.chmod(f"{dev}/{name}", stat.S_IMODE(info.st_mode))
    for name in ("shm", "pts"):
        os.mkdir(f"{dev}/{name}")
        mount(f"/dev/{name}", f"{dev}/{name}", None, MS_BIND)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{dev}/{name}")
    os.symlink("/proc/self/fd", f"{dev}/fd")


def bind(entry: dict[str, Any], source: int) -> None:
    """Puts what a descriptor stands for at a path of the container."""
    target = entry["target"]
    info = os.fstat(source)
    if stat.S_ISBLK(info.st_mode):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.mknod(target, stat.S_IFBLK | 0o660, info.st_rdev)
        return
    make_point(target, stat.S_ISDIR(info.st_mode))
    mount(f"/proc/self/fd/{source}", target, None, MS_BIND)
    if entry.get("read_only"):
        mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY)


def make_root(spec: dict[str, Any]) -> None:
    """Leaves the calling process in the container's view, with nothing else of the machine's."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    scratch = spec["scratch"]
    mount("tmpfs", scratch, "tmpfs", 0, f"size={SCRATCH_BYTES_MAX},mode=0755")
    for name in ("upper", "work", "root"):
        os.mkdir(f"{scratch}/{name}")
    root = f"{scratch}/root"
    layers = f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work"
    mount("overlay", root, "overlay", 0, layers)
    mount("/sys", f"{root}/sys", None, MS_BIND | MS_REC)
    make_dev(f"{root}/dev", spec["privileged"])
    mount("proc", f"{root}/proc", "proc", 0)
    # Sources are named before the change of root, targets after it: a link such as /var/run must
    # lead to the container's own /run.
    sources = [(entry, os.open(entry["source"], os.O_PATH)) for entry in spec["binds"]]
    os.chdir(root)
    # The new root goes on top of the old one at the same place; then the old one is taken away.
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    for entry, source in sources:
        bind(entry, source)
        os.close(source)
    check(libc.umount2(b".", MNT_DETACH), "umount of the machine's root")
    os.chdir("/")


def code_of(status: int) -> int:
    """The exit code as shells and container runtimes tell it."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def run_main(spec: dict[str, Any], report: int) -> None:
    """The container's own process: never returns."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.setsid()
        os.makedirs(spec["cwd"], exist_ok=True)
        os.chdir(spec["cwd"])
        os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
    except OSError as error:
        os.write(report, f"cannot start {spec['argv'][0]!r}: {error}".encode())
    os._exit(CANNOT_START)


def run_init(spec: dict[str, Any], report: int) -> None:
    """Process 1 of the container: never returns."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        check(libc.unshare(CLONE_NEWNS), "unshare")
        make_root(spec)
    except OSError as error:
        os.write(report, f"cannot make the container's root: {error}".encode())
        os._exit(CANNOT_START)
    main = os.fork()
    if main == 0:
        run_main(spec, report)
    os.close(report)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda sent, _: os.kill(main, sent))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    while True:
        pid, status = os.wait()
        if pid == main:
            os._exit(code_of(status))


def main() -> int:
    """Runs; returns the exit code."""
    with open(sys.argv[1]) as handle:
        spec = json.load(handle)
    # Held back until both processes can pass it on: a stop right after the start is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    check(libc.unshare(CLONE_NEWPID), "unshare")
    reader, writer = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(reader)
        run_init(spec, writer)
    os.close(writer)
    write_json(
        spec["run_file"],
        {
            "attempt": spec["attempt"],
            "shim_pid": os.getpid(),
            "shim_start_ticks": start_ticks(os.getpid()),
            "init_pid": init,
            "init_start_ticks": start_ticks(init),
            "started_s": time.time(),
        },
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda sent, _: os.kill(init, sent))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    problem = b""
    while chunk := os.read(reader, 4096):
        problem += chunk
    code = code_of(os.waitpid(init, 0)[1])
    ended = {"attempt": spec["attempt"], "code": code, "finished_s": time.time()}
    write_json(spec["exit_file"], ended | {"message": problem.decode(errors="replace")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
