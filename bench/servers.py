"""The servers that are compared: how each is configured, started on loopback, and ended by its own pid."""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import machine

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
NAMES = {
    "ours": "artifact-cache",
    "ours-s0": "artifact-cache, stream at once",
    "sf": "nginx sf",
    "npoff": "nginx npoff",
    "nosf": "nginx nosf",
    "ofc": "nginx ofc",
    "pc": "nginx pc",
    "pc-npoff": "nginx pc, npoff",
    "varnish": "Varnish mem",
    "varnish-file": "Varnish file",
    "ats": "Traffic Server",
    "squid": "Squid",
    "caddy": "Caddy",
    "curl": "curl",
}
START_SECONDS = 30
STOP_SECONDS = 15


class CannotStart(Exception):
    """Why a server isn't there; the run goes on without it."""


class Process:
    """One program on one core, in a directory of its own."""

    def __init__(self, directory, side="server"):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.side = side
        self.process = None

    def render(self, name, to=None, **values):
        """A configuration from configs/ with its @NAMES@ filled in."""
        text = (CONFIGS / name).read_text()
        for key, value in {"DIR": self.directory, "CONFIGS": CONFIGS, **values}.items():
            text = text.replace(f"@{key}@", str(value))
        path = self.directory / (to or name)
        path.write_text(text)
        return path

    def start(self, command, port, env=None, ready="/"):
        """Starts it and waits until it answers anything at all."""
        program = machine.which(command[0])
        if not program:
            raise CannotStart(f"{command[0]} is not installed")
        with (self.directory / "output.log").open("ab") as output:
            self.process = subprocess.Popen(
                machine.pinned(self.side, [program, *map(str, command[1:])]), cwd=self.directory, stdout=output,
                stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", ready)
                connection.getresponse().read()
                machine.pin(self.pid, self.side)
                return
            time.sleep(0.002)
        self.stop()
        raise CannotStart(f"{command[0]} does not answer: {self.last_words()}")

    def last_words(self):
        """The end of what it wrote."""
        text = (self.directory / "output.log").read_text(errors="replace").strip()
        return " / ".join(text.splitlines()[-3:]) or "it said nothing"

    @property
    def pid(self):
        return self.process.pid

    def stop(self):
        """Ends it and its children; those that don't go in time are killed, one by one."""
        if not self.process:
            return
        pids = machine.family(self.pid)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process = None


class Server:
    """What is measured: a process, the port it answers on, and how it spells a path of the origin."""

    def __init__(self, key, process, port, path, data):
        self.key = key
        self.name = NAMES[key]
        self.process = process
        self.port = port
        self.path = path
        self.data = Path(data)

    @property
    def pid(self):
        return self.process.pid

    def url(self, name):
        return f"http://127.0.0.1:{self.port}{self.path(name)}"


class Origin(Process):
    """The upstream: nginx on the clients' core, which counts who asked for what."""

    def __init__(self, directory, files):
        super().__init__(directory, side="client")
        self.port = machine.free_port()
        config = self.render("origin.conf", PORT=self.port, FILES=files)
        self.start(["nginx", "-p", self.directory, "-c", config], self.port)

    def requests(self, path):
        """For each request of a path so far, the moment its answer ended, in seconds since 1970."""
        time.sleep(0.05)
        lines = (self.directory / "access.log").read_text().splitlines()
        return [float(line.split()[0]) for line in lines if line.split()[3:] == [path]]


class Fleet:
    """All servers of one run, started when first asked for, ended together."""

    def __init__(self, work, files, binary, wanted):
        self.work, self.files, self.binary, self.wanted = Path(work), files, binary, wanted
        self.origin = Origin(self.work / "origin", files)
        self.started = {}
        self.failed = {}
        self.shared = {}

    def get(self, keys):
        """Those of `keys` that were asked for and can be started."""
        return [server for key in keys if key.removesuffix("-s0") in self.wanted
                and (server := self.started.get(key) or self._try(key))]

    def _try(self, key):
        if key in self.failed:
            return None
        try:
            start = getattr(self, "_" + key.replace("-", "_"), None) or self._nginx
            self.started[key] = start(key)
        except CannotStart as why:
            self.failed[key] = str(why)
            print(f"  {NAMES[key]} can't be started and is left out: {why}", flush=True)
        return self.started.get(key)

    def stop(self):
        """Ends every process of the run."""
        for server in self.started.values():
            server.process.stop()
        self.origin.stop()

    def service(self, key, directory, wrap=(), **settings):
        """One artifact-cache as shipped (log to a file, metrics, look-up), but for `settings`; `wrap` runs it."""
        process = Process(directory)
        port = machine.free_port()
        env = {"SERVER__PORT": port, "SERVER__METRICS_PORT": 0, "STORAGE__BASE_PATH": directory / "data/cache",
               "STORAGE__DATABASE": directory / "data/metadata.db",
               "UPSTREAM__ALLOW_PRIVATE_NETWORKS": "127.0.0.0/8", **settings}
        env = {f"ARTIFACT_CACHE__{name}": str(value) for name, value in env.items()}
        process.start([*wrap, str(self.binary), "serve"], port, env=env, ready="/health")
        base = f"http://127.0.0.1:{self.origin.port}"
        return Server(key, process, port, lambda name: "/fetch?url=" + quote(f"{base}/{name}", safe=""),
                      directory / "data")

    def _ours(self, key):
        return self.service(key, self.work / key)

    def _ours_s0(self, key):
        return self.service(key, self.work / key, FETCH__STREAM_AFTER_SECONDS=0)

    def _nginx(self, key):
        """One nginx serves all four settings, each on a port of its own."""
        ports = {name: machine.free_port() for name in ("sf", "npoff", "nosf", "ofc")}
        return self._one_of("nginx", key, ports, "nginx-static.conf", data=self.files, FILES=self.files,
                            **{f"PORT_{name.upper()}": port for name, port in ports.items()})

    def _pc(self, key):
        ports = {name: machine.free_port() for name in ("pc", "pc-npoff")}
        directory = self.work / "pc"
        Process(directory).render("nginx-cache-site.conf", ORIGIN=self.origin.port)
        return self._one_of("pc", key, ports, "nginx-cache.conf", data=directory, PORT=ports["pc"],
                            PORT_NPOFF=ports["pc-npoff"])

    _pc_npoff = _pc

    def _one_of(self, name, key, ports, config, data, **values):
        """A setting of an nginx that has several; started with the first of them."""
        if name not in self.shared:
            process = Process(self.work / name)
            path = process.render(config, **values)
            process.start(["nginx", "-p", process.directory, "-c", path], next(iter(ports.values())))
            self.shared[name] = process, ports
        process, ports = self.shared[name]
        return Server(key, process, ports[key], lambda path: f"/{path}", data)

    def _plain(self, key, process, port, command, data=None, **options):
        process.start(command, port, **options)
        return Server(key, process, port, lambda name: f"/{name}", data or process.directory)

    def _caddy(self, key):
        process, port = Process(self.work / key), machine.free_port()
        config = process.render("Caddyfile", PORT=port, FILES=self.files)
        home = {"HOME": str(process.directory), "XDG_DATA_HOME": str(process.directory)}
        return self._plain(key, process, port, ["caddy", "run", "--config", config, "--adapter", "caddyfile"],
                           data=self.files, env=home)

    def _varnish(self, key, storage="malloc,6G"):
        process, port = Process(self.work / key), machine.free_port()
        vcl = process.render("varnish.vcl", ORIGIN=self.origin.port)
        jail = ["-j", "none"] if os.geteuid() == 0 else []
        return self._plain(key, process, port,
                           ["varnishd", *jail, "-F", "-f", vcl, "-a", f"127.0.0.1:{port}", "-s", storage,
                            "-s", "Transient=malloc,64M", "-n", process.directory / "work"])

    def _varnish_file(self, key):
        # Room for all that five rounds bring: making room by eviction takes it ten times as long as a download.
        return self._varnish(key, storage=f"file,{self.work / key / 'store'},14G")

    def _squid(self, key):
        process, port = Process(self.work / key), machine.free_port()
        config = process.render("squid.conf", PORT=port, ORIGIN=self.origin.port)
        if os.geteuid() == 0:
            # It refuses to stay root.
            shutil.chown(process.directory, "proxy", "proxy")
        if program := machine.which("squid"):
            subprocess.run([program, "-N", "-z", "-f", config], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=False)
        return self._plain(key, process, port, ["squid", "-N", "-f", config])

    def _ats(self, key):
        process, port = Process(self.work / key), machine.free_port()
        for below in ("run", "log"):
            (process.directory / below).mkdir(exist_ok=True)
        process.render("records.config", PORT=port)
        here = process.directory
        (here / "remap.config").write_text(f"map / http://127.0.0.1:{self.origin.port}/\n")
        (here / "storage.config").write_text(f"{here}/run 6G\n")
        (here / "ip_allow.yaml").write_text(
            "ip_allow:\n  - {apply: in, ip_addrs: 127.0.0.1, action: allow, methods: ALL}\n")
        for name in ("cache", "hosting", "parent", "plugin", "socks", "splitdns", "ssl_multicert", "volume"):
            (here / f"{name}.config").write_text("")
        (here / "logging.yaml").write_text((CONFIGS / "logging.yaml").read_text())
        return self._plain(key, process, port, ["traffic_server"],
                           env={"PROXY_CONFIG_CONFIG_DIR": str(here), "TS_ROOT": str(here)})
