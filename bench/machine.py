"""The machine under the benchmark: installing what is missing, pinning, and what processes cost."""

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

PACKAGES = {
    "nginx": "nginx",
    "varnishd": "varnish",
    "squid": "squid",
    "caddy": "caddy",
    "traffic_server": "trafficserver",
    "wrk": "wrk",
    "ip": "iproute2",
}
VERSION_OF = {
    "nginx": ["nginx", "-v"],
    "Varnish": ["varnishd", "-V"],
    "Squid": ["squid", "-v"],
    "Traffic Server": ["traffic_server", "--version"],
    "Caddy": ["caddy", "version"],
    "wrk": ["wrk", "-v"],
    "curl": ["curl", "--version"],
}
CLONE_NEWNET = 0x40000000  # linux/sched.h
POLICY = Path("/usr/sbin/policy-rc.d")
PAGE = os.sysconf("SC_PAGE_SIZE")
LIBC = ctypes.CDLL(None, use_errno=True)


def which(program):
    """The program's path; Debian keeps servers where an ordinary user's PATH doesn't look."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def install_missing():
    """Installs what is missing by apt, without starting any service; names it when that isn't possible."""
    missing = [package for program, package in PACKAGES.items() if not which(program)]
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print("missing:", " ".join(missing), "; as root:", " ".join(command))
        return
    print("installing:", " ".join(missing), flush=True)
    ours = not POLICY.exists()
    if ours:
        # Debian's way to say that packages must not start their services.
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run(["apt-get", "update"], check=False, **quiet)
        subprocess.run(command, check=False, **quiet)
    finally:
        if ours:
            POLICY.unlink()


def build(project):
    """The service as it is shipped, built if it must be."""
    subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=project, check=True)
    return Path(os.environ.get("CARGO_TARGET_DIR", project / "target")) / "release" / "artifact-cache"


def enter_network(congestion_control=None):
    """Goes on in a network of its own that has loopback only, this process and all that it starts, and says what it is like.

    Who may not make one stays in the machine's. The algorithm is the machine's, or the one named: as the network's default where
    this kernel lets a namespace have another than the machine, else by the route, which also overrules a server's own
    choice."""
    of_namespace = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    usual = of_namespace.read_text().strip()
    wanted = congestion_control or usual
    # os.unshare is of Python 3.12.
    if LIBC.unshare(CLONE_NEWNET):
        if wanted == usual:
            return f"the machine's, {usual}"
        why = os.strerror(ctypes.get_errno())
        raise SystemExit(f"--congestion-control {wanted}: no network of its own: {why}; run as root")
    ip = which("ip") or "ip"
    subprocess.run([ip, "link", "set", "lo", "up"], check=True)
    try:
        of_namespace.write_text(wanted)
    except OSError:
        route = "local 127.0.0.1 dev lo proto kernel scope host src 127.0.0.1 table local congctl".split()
        if subprocess.run([ip, "route", "replace", *route, wanted], check=False).returncode:
            known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().strip()
            raise SystemExit(f"--congestion-control {wanted}: this kernel has {known}") from None
    return f"loopback in a namespace of its own, {wanted}"


def claim_memory(size):
    """Takes memory and frees it, so that the next to need `size` bytes gets them from what was in use just now.

    On a virtual machine whose host takes free memory back, pages that were long free would cost their next user more, as his own
    processor time. That this is why downloads scatter is a guess that fits: they do so less with it, not never."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def describe():
    """The machine and the versions, as a list of (name, text)."""
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30
    facts = [("Processor", f"{cpu}, {os.cpu_count()} cores"), ("Memory", f"{memory:.0f} GiB"),
             ("Kernel", platform.release()), ("Date", time.strftime("%Y-%m-%d"))]
    for name, command in VERSION_OF.items():
        program = which(command[0])
        if program:
            said = subprocess.run([program, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, check=False).stdout.strip()
            facts.append((name, said.splitlines()[0][:60] if said else "?"))
    return facts


CORES = {"server": 0, "client": 1}
HAS_CORES = (os.cpu_count() or 1) >= len(CORES)


def pinned(side, command):
    """The command on the core of its side: servers on 0, clients and the origin on 1."""
    return ["taskset", "-c", str(CORES[side]), *command] if HAS_CORES else list(command)


def pin(pid, side):
    """Puts every thread back on its core: Traffic Server's spread themselves over all there are."""
    for each in family(pid) if HAS_CORES else ():
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{each}/task"):
                os.sched_setaffinity(int(task), {CORES[side]})


@contextlib.contextmanager
def on_all_cores(pid):
    """Lets a server's threads run on the clients' core too, for once."""
    cores = set(CORES.values())
    for each in family(pid) if HAS_CORES else ():
        for task in os.listdir(f"/proc/{each}/task"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task), cores)
    try:
        yield
    finally:
        pin(pid, "server")


def free_port():
    """A port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """The process and all below it."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                pids += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return pids


def cpu_seconds(pid):
    """User and system time of the process and all below it, with what threads used that have ended, in seconds."""
    total = 0
    for each in family(pid):
        clock = ctypes.c_int()
        # /proc has it in ticks of 10 ms, a fifth of what nginx needs to send 1 GiB.
        if LIBC.clock_getcpuclockid(each, ctypes.byref(clock)) == 0:
            with contextlib.suppress(OSError):
                total += time.clock_gettime(clock.value)
    return total


def anonymous_mib(pid):
    """Resident anonymous memory of the process and all below it."""
    kib = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    kib += int(line.split()[1])
    return kib / 1024


def busy_seconds():
    """Processor time of the whole machine, from the start on, that was neither idle nor waiting for a disk."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Watch:
    """What a server costs while the `with` block runs: `cpu` seconds and `anon` MiB at the peak (every 50 ms), and
    `machine_cpu`, the seconds of everybody on this machine."""

    def __init__(self, pid):
        self.pid = pid

    def __enter__(self):
        self.anon = anonymous_mib(self.pid)
        self._cpu, self._machine_cpu = cpu_seconds(self.pid), busy_seconds()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self):
        while not self._over.wait(0.05):
            self.anon = max(self.anon, anonymous_mib(self.pid))

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self.cpu, self.machine_cpu = cpu_seconds(self.pid) - self._cpu, busy_seconds() - self._machine_cpu
        self.anon = max(self.anon, anonymous_mib(self.pid))


def forget_pages(paths):
    """Drops files from the page cache, as far as the kernel agrees; what is dirty is written first."""
    for path in paths:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def files_below(directory, at_least=0):
    """Every file below a directory that has at least so many bytes."""
    for path in Path(directory).rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size >= at_least:
                yield path
