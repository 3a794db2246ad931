"""The measurements. Each takes the bench, asks the servers in turn (A B C A B C …), and records what it saw."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine
from servers import NAMES

HERE = Path(__file__).resolve().parent
FILES = {"1k": 1 << 10, "64k": 64 << 10, "1m": 1 << 20, "100m": 100 << 20, "1g": 1 << 30, "1g-b": 1 << 30}
LABEL = {"1k": "1 KiB", "64k": "64 KiB", "1m": "1 MiB"}
GB = 1e9
ALL = ["ours", "sf", "npoff", "nosf", "ofc", "pc", "pc-npoff", "varnish", "varnish-file", "ats", "squid",
       "caddy"]
MISSERS = ["ours", "ours-s0", "pc", "pc-npoff", "varnish", "varnish-file", "ats", "squid"]
_unique = itertools.count(os.getpid() * 100_000)


def fresh(name, speed=""):
    """A name for a file of the origin that nobody has asked for yet; `speed` is slow/ or crawl/."""
    return f"{speed}u/{next(_unique)}/{name}"


class Bench:
    """One run: the fleet, how long and how often to measure, and all results.

    `results[cell][server]` is a list with a dictionary of figures a round.
    """

    def __init__(self, fleet, options):
        self.fleet, self.options = fleet, options
        self.results = {}

    def interleaved(self, cell, keys, measure, rounds=None):
        """Measures each server once a round; a failure is recorded as such, and the run goes on."""
        servers = self.fleet.get(keys)
        for _ in range(rounds or self.options.rounds):
            for server in servers:
                try:
                    figures = measure(server)
                except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                    figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
                self.results.setdefault(cell, {}).setdefault(server.key, []).append(figures)
        self.show(cell)

    def wrk(self, server, name, connections, script=(), seconds=None):
        """Requests a second and latencies of one closed-loop load."""
        limit = seconds or self.options.seconds
        command = ["wrk", "-t1", f"-c{connections}", f"-d{limit}", "--timeout", "30", "-s", HERE / "load.lua",
                   server.url(name), *(["--", *script] if script else [])]
        done = subprocess.run(machine.pinned("client", list(map(str, command))), capture_output=True, text=True,
                              timeout=limit + 60, check=True)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), "no result")
        seen = json.loads(line.removeprefix("RESULT "))
        if seen["errors"] or not seen["requests"]:
            raise ValueError(f"wrk saw {seen['errors']} errors in {seen['requests']} requests")
        return {"rps": seen["requests"] / seen["seconds"], "p50_ms": seen["p50_us"] / 1e3,
                "p99_ms": seen["p99_us"] / 1e3, "gbps": seen["bytes"] / seen["seconds"] / GB}

    def begin(self, server, how, paths, seconds=300):
        """A client at work."""
        process = subprocess.Popen(machine.pinned("client", [sys.executable, str(HERE / "client.py")]),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        json.dump({"how": how, "port": server.port, "paths": paths, "seconds": seconds}, process.stdin)
        process.stdin.close()
        return process

    @staticmethod
    def end(process):
        """What it saw, once it is done."""
        said = process.stdout.read()
        process.stdout.close()
        if process.wait() != 0:
            raise ValueError("the client failed")
        return json.loads(said)

    def get(self, server, how, names, seconds=300):
        return self.end(self.begin(server, how, [server.path(name) for name in names], seconds))

    def whole(self, server, how, names, seconds=300):
        """The same, when every body must come whole."""
        seen = self.get(server, how, names, seconds)
        broken = [each for each in seen if not each["complete"]]
        if broken or len(seen) < len(names):
            status = broken[0]["status"] if broken else None
            raise ValueError(f"{len(broken)} of {len(names)} bodies not whole (status {status})")
        return seen

    def warm(self, keys, names):
        """Makes hits of hits: each server is asked until it has the whole."""
        for server in self.fleet.get(keys):
            for name in names:
                seen = self.get(server, "sequence", [name])[0]
                if not seen["complete"] or seen["bytes"] != FILES[name]:
                    print(f"  {server.name} gave {seen['status']} and {seen['bytes']} bytes for {name}", flush=True)

    def show(self, cell):
        """The cell as a table on the terminal: medians, lowest and highest, and the ratio to nginx."""
        servers = self.results.get(cell, {})
        print(f"\n{cell}", flush=True)
        for key, rounds in servers.items():
            good = [figures for figures in rounds if "failed" not in figures]
            if not good:
                print(f"  {NAMES[key]:30} failed: {rounds[-1]['failed']}")
                continue
            texts = []
            for figure in columns(good):
                low, mid, high = spread(servers, key, figure)
                texts.append(f"{figure} {short(mid)} ({short(low)}–{short(high)})")
            ratio = ratios(servers, key, next(iter(good[0])), base(servers))
            texts[0] += f" ×{ratio:.2f}" if ratio else ""
            lost = f"; {len(rounds) - len(good)} failed" if len(good) < len(rounds) else ""
            print(f"  {NAMES[key]:30} {'; '.join(texts)}{lost}", flush=True)


def columns(rounds):
    """Every figure that any of these rounds has, in their order."""
    return list(dict.fromkeys(figure for figures in rounds for figure in figures))


def spread(servers, key, figure):
    """Lowest, median and highest of one figure of one server; None when there is none."""
    values = [f[figure] for f in servers.get(key, []) if f.get(figure) is not None]
    return (min(values), statistics.median(values), max(values)) if values else None


def ratios(servers, key, figure, to):
    """The median of the ratios to another server within the same round."""
    pairs = [(a[figure], b[figure]) for a, b in zip(servers.get(key, []), servers.get(to, []))
             if a.get(figure) is not None and b.get(figure)]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def base(servers):
    """The nginx that tables compare with: the file server, or the cache in the setting that doesn't stall."""
    return next((key for key in ("sf", "pc-npoff", "pc") if key in servers), None)


def short(value):
    if value is None:
        return "–"
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g} k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def hit(bench):
    """Hits of three sizes."""
    sizes = {"1k": (1, 64, 256), "64k": (1, 64, 256), "1m": (1, 64, 256)}
    if bench.options.quick:
        sizes = {"1k": (1, 64), "64k": (1, 64), "1m": (64,)}
    bench.warm(ALL, sizes)
    for name, counts in sizes.items():
        for count in counts:
            bench.interleaved(f"hit {LABEL[name]} c{count}", ALL, lambda s: bench.wrk(s, name, count))


def large(bench):
    """Hits of 1 GiB, alone and eight at once."""
    bench.warm(ALL, ["1g"])
    bench.interleaved("hit 1 GiB ×1", ALL, lambda s: big(bench, s, 1))
    eight = [key for key in ALL if key != "squid"]  # 20 s a round, for a figure that its ×1 already tells
    bench.interleaved("hit 1 GiB ×8", eight, lambda s: big(bench, s, 8), rounds=1 if bench.options.quick else None)


def recall(bench, server):
    """Has the large file in memory, read from the disk just before. Some kernels drop what nobody has asked for in a
    minute; and a file as it was written is in larger or smaller folios than one that was read, which is worth a tenth."""
    machine.forget_pages(machine.files_below(server.data, at_least=FILES["1g"]))
    bench.whole(server, "sequence", ["1g"])


def big(bench, server, count):
    """One transfer alone is over in a tenth of a second: several, one after the other, for as long as a round takes."""
    recall(bench, server)
    with machine.Watch(server.pid) as watch:
        seen = bench.end(bench.begin(server, "again", [server.path("1g")] * count, bench.options.seconds))
    if not all(each["complete"] for together in seen for each in together):
        raise ValueError("not every body was whole")
    seconds = sum(max(each["last"] for each in together) for together in seen)
    size = len(seen) * count * FILES["1g"] / GB
    return {"gbps": size / seconds, "cpu_s_per_gb": watch.cpu / size, "machine_cpu_s_per_gb": watch.machine_cpu / size,
            "anon_mib": watch.anon}


def ranges(bench):
    """Random 64 KiB ranges of a file of 1 GiB."""
    bench.warm(ALL, ["1g"])

    def measure(server, count):
        recall(bench, server)
        return bench.wrk(server, "1g", count, ["range", server.path("1g"), FILES["1g"], 64 << 10])

    for count in (1, 64):
        bench.interleaved(f"range 64 KiB c{count}", ALL, lambda s: measure(s, count))


def cold(bench):
    """Big files that are not in memory, and how others fare meanwhile."""
    keys = ["ours", "sf", "nosf", "pc", "caddy"]
    bench.warm(keys, ["1k", "1g", "1g-b"])

    def measure(server):
        machine.forget_pages(machine.files_below(server.data, at_least=FILES["1g"]))
        began = time.time()
        reading = bench.begin(server, "together", [server.path(name) for name in ("1g", "1g-b")], 60)
        probing = bench.begin(server, "probe", ["/health" if server.key == "ours" else server.path("1k")], 2)
        latencies = sorted(each["last"] * 1e3 for each in bench.end(probing))
        seen = bench.end(reading)
        finished = max(each["ended_at"] or time.time() for each in seen)
        return {"gbps": 2 * FILES["1g"] / GB / (finished - began), "probe_p50_ms": statistics.median(latencies),
                "probe_p99_ms": latencies[int(len(latencies) * 0.99)], "probe_max_ms": latencies[-1]}

    bench.interleaved("cold 1 GiB ×2", keys, measure)


def miss(bench):
    """What isn't there yet: large, small, and from a slow origin."""
    rounds = 2 if bench.options.quick else min(bench.options.rounds, 5)
    alone = [curl(bench) for _ in range(rounds)]
    for cell, took in zip(("miss 1 GiB, curl -o", "miss 1 GiB, curl -o and fdatasync"), zip(*alone)):
        bench.results[cell] = {"curl": [{"wall_s": seconds} for seconds in took]}
        bench.show(cell)

    def both_cores(server):
        with machine.on_all_cores(server.pid):
            return one_miss(bench, server, "1g")

    bench.interleaved("miss 1 GiB", MISSERS, both_cores, rounds)
    bench.interleaved("miss 1 GiB, one core", MISSERS, lambda s: one_miss(bench, s, "1g"), rounds)
    count = 50 if bench.options.quick else 300

    def small(server):
        seen = bench.whole(server, "sequence", [fresh("64k") for _ in range(count)])
        times = sorted(each["last"] * 1e3 for each in seen)
        return {"mean_ms": statistics.mean(times), "p50_ms": statistics.median(times), "p99_ms": times[-count // 100]}

    bench.interleaved("miss 64 KiB", MISSERS, small, rounds)
    bench.interleaved("slow miss 100 MiB", MISSERS, lambda s: one_miss(bench, s, "100m", "slow/"),
                      1 if bench.options.quick else 3)


def settle():
    """No server pays for what another left to be written."""
    os.sync()


def curl(bench):
    """How long a client alone takes, without and with what the disk needs until it has it for good."""
    settle()
    target = bench.fleet.work / "curl.out"
    url = f"http://127.0.0.1:{bench.fleet.origin.port}/1g"
    began = time.time()
    subprocess.run(machine.pinned("server", ["curl", "-s", "-o", str(target), url]), check=True, timeout=120)
    took = time.time() - began
    with target.open("rb") as file:
        os.fdatasync(file.fileno())
    durable = time.time() - began
    target.unlink()
    return took, durable


def one_miss(bench, server, file, speed=""):
    name = fresh(file, speed)
    settle()
    # Once is not enough: others take of it meanwhile.
    machine.claim_memory(2 * FILES[file])
    with machine.Watch(server.pid) as watch:
        seen = bench.whole(server, "sequence", [name])[0]
    size = seen["bytes"] / GB
    upstream = bench.fleet.origin.requests("/" + name)
    return {"wall_s": seen["last"], "first_byte_ms": seen["first"] * 1e3, "cpu_s_per_gb": watch.cpu / size,
            "anon_mib": watch.anon, "after_upstream_s": seen["ended_at"] - max(upstream)}


def stampede(bench):
    """Many clients, one cold URL, a fast and a slow origin."""
    keys = [key for key in MISSERS if key != "squid" or not bench.options.quick]
    for speed, text in (("", "fast"), ("slow/", "50 MB/s")):
        def measure(server):
            settle()
            name = fresh("100m", speed)
            with machine.Watch(server.pid) as watch:
                seen = bench.get(server, "together", [name] * bench.options.clients)
            whole = [each for each in seen if each["complete"] and each["bytes"] >= FILES["100m"]]
            firsts = [each["first"] for each in seen if each["first"] is not None]
            if not firsts:
                raise ValueError("nobody got anything")
            return {"wall_s": max(each["last"] or 300 for each in seen), "first_p50_s": statistics.median(firsts),
                    "upstream_requests": len(bench.fleet.origin.requests("/" + name)), "complete": len(whole),
                    "anon_mib": watch.anon}

        bench.interleaved(f"stampede {bench.options.clients}, {text} origin", keys, measure,
                          1 if bench.options.quick else min(bench.options.rounds, 3))


def memory(bench):
    """256 large hits and 64 downloads at once."""
    bench.warm(["ours", "ours-s0"], ["1g"])
    seconds = 5 if bench.options.quick else 15

    def measure(server):
        settle()
        with machine.Watch(server.pid) as watch:
            hits = bench.begin(server, "together", [server.path("1g")] * 256, seconds)
            downloads = bench.begin(server, "together",
                                    [server.path(fresh("100m", "crawl/")) for _ in range(64)], seconds)
            served = sum(each["bytes"] for each in bench.end(hits))
            bench.end(downloads)
        return {"anon_mib": watch.anon, "gbps": served / seconds / GB}

    bench.interleaved("256 hits of 1 GiB and 64 downloads", ["ours", "ours-s0"], measure, 1)
