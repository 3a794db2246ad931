"""A catalogue of millions: what start, look-up and sums cost when the database is large."""

import hashlib
import random
import sqlite3
import statistics
import subprocess
import time

import machine

REAL = 20_000


def catalogue(bench):
    """Fills one service's database, and compares it with an empty one."""
    if "ours" not in bench.options.servers:
        return
    fleet, rows = bench.fleet, bench.options.catalogue
    full, empty = fleet.work / "catalogue", fleet.work / "catalogue-empty"
    service = fleet.service("ours", full)
    service.process.stop()
    began = time.time()
    paths = fill(service, rows, f"http://127.0.0.1:{fleet.origin.port}")
    print(f"\ncatalogue of {rows:,} rows made in {time.time() - began:.0f} s", flush=True)
    starts = {"warm": [], "cold": []}
    for kind in ("cold", "warm") * 2:
        if kind == "cold":
            machine.forget_pages(machine.files_below(service.data, at_least=1 << 20))
        began = time.monotonic()
        service = fleet.service("ours", full)
        starts[kind].append(time.monotonic() - began)
        service.process.stop()
    small = fleet.service("ours-s0", empty)
    service = fleet.service("ours", full)
    cell = f"catalogue of {rows:,}"
    try:
        first_hits(bench, cell, service, paths)
        figures = measure(bench, service, small, paths)
    finally:
        service.process.stop()
        small.process.stop()
    figures |= {"start_s": max(starts["warm"]), "start_disk_cold_s": max(starts["cold"])}
    bench.results[cell].setdefault("ours", []).append(figures)
    bench.show(cell)


def first_hits(bench, cell, service, paths):
    """URLs that the service has not been asked for since its start, and as many of the same store's files from nginx,
    which has nothing to look up: what the machine and the client cost is in both. In turn, each URL and file once."""
    shared = bench.fleet.files / "store"
    shared.symlink_to(service.data / "cache")
    make_readable(service.data)
    nginx = bench.fleet.get(["sf"])
    asked = {server.key: (server, ["/store/" + path for _, path in paths]) for server in nginx}
    asked["ours"] = (service, [path for path, _ in paths])
    order = list(range(len(paths)))
    random.Random(1).shuffle(order)
    rounds = max(bench.options.rounds, 3)
    size = min(len(order) // (2 * rounds * len(asked)), 1000)
    for kind, forget in (("cold", False), ("disk_cold", True)):
        for _ in range(rounds):
            for key, (server, names) in asked.items():
                if forget:
                    machine.forget_pages(machine.files_below(service.data))
                chosen, order = [names[i] for i in order[:size]], order[size:]
                seen = bench.end(bench.begin(server, "sequence", chosen, 60))
                if not all(each["complete"] for each in seen):
                    raise ValueError("a known artifact was not served")
                latencies = sorted(each["last"] * 1e3 for each in seen)
                figures = {f"{kind}_p50_ms": statistics.median(latencies),
                           f"{kind}_p99_ms": latencies[int(len(latencies) * 0.99)]}
                bench.results.setdefault(cell, {}).setdefault(key, []).append(figures)
    shared.unlink()


def make_readable(data):
    """nginx' workers are not who the store belongs to."""
    for path in (data, data / "cache", *(data / "cache").glob("*"), *(data / "cache").glob("??/??")):
        path.chmod(path.stat().st_mode | 0o055)
    for path in (data / "cache").glob("??/??/*"):
        path.chmod(0o644)


def measure(bench, service, small, paths):
    """Hot look-ups, and the sums."""
    list_file = bench.fleet.work / "paths.txt"
    list_file.write_text("\n".join(path for path, _ in paths[:1000]))
    bench.get(small, "sequence", ["1k"])
    figures = hot(bench, service, small, ["list", list_file])
    stats = bench.end(bench.begin(service, "probe", ["/api/stats"], 2))
    latencies = sorted(each["last"] * 1e3 for each in stats)
    figures["stats_p99_ms"] = latencies[int(len(latencies) * 0.99)]
    figures["anon_mib"] = machine.anonymous_mib(service.pid)
    return figures


def hot(bench, service, small, script):
    """What a hit pays more than it does with an empty catalogue: the same URL all the time, and 1,000 in turn."""
    bench.get(service, "sequence", ["1k"])
    bench.wrk(service, "1k", 64, script)  # brings back what was dropped from memory
    seen = []
    for _ in range(max(bench.options.rounds, 3)):
        empty, same, many = (1e6 / bench.wrk(server, "1k", 64, asked)["rps"] for server, asked in
                             ((small, ()), (service, ()), (service, script)))
        seen.append((1e6 / same, same - empty, many - empty))
    rps, same, many = (statistics.median(column) for column in zip(*seen))
    return {"hot_rps": rps, "hot_extra_us": same, "hot_1000_extra_us": many}


def fill(service, rows, base):
    """Rows straight into the database that the service made; 20,000 of them have real, tiny files. Returns where those
    are asked for, and where they lie below the store."""
    database = sqlite3.connect(service.data / "metadata.db", isolation_level=None)
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-1500000;")
    # Triggers and indexes are put back at the end, which is much faster than to keep them up to date.
    kept = database.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL").fetchall()
    database.execute("BEGIN")
    for kind, name, _ in kept:
        database.execute(f"DROP {kind} {name}")
    real = [(f"{base}/tiny/{i}", hashlib.sha256(b"%d\n" % i).hexdigest(), len(b"%d\n" % i)) for i in range(REAL)]
    insert = "INSERT INTO artifacts (source_url, content_hash, file_size, content_type) "
    database.executemany(insert + "VALUES (?, ?, ?, 'application/octet-stream')", real)
    database.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) " + insert +
        "SELECT ? || '/made/up/path/of/usual/length/' || i || '/package-1.0.' || i || '.tar.gz', "
        "lower(hex(randomblob(32))), 1000000 + i, 'application/gzip' FROM n", (max(rows - REAL, 1), base))
    database.execute("INSERT INTO versions (source_url, content_hash, file_size, content_type, file_name) "
                     "SELECT source_url, content_hash, file_size, content_type, 'package.tar.gz' FROM artifacts")
    database.execute("INSERT INTO blobs (content_hash, file_size) "
                     "SELECT content_hash, file_size FROM artifacts ORDER BY content_hash")
    database.execute("UPDATE totals SET items = (SELECT count(*) FROM artifacts), "
                     "size_bytes = (SELECT sum(file_size) FROM artifacts), "
                     "blobs = (SELECT count(*) FROM blobs), stored_bytes = (SELECT sum(file_size) FROM blobs)")
    for _, _, sql in kept:
        database.execute(sql)
    database.execute("COMMIT")
    database.close()
    for i, (_, digest, _) in enumerate(real):
        directory = service.data / "cache" / digest[:2] / digest[2:4]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / digest).write_bytes(b"%d\n" % i)
    subprocess.run(["sync"], check=True)
    return [(service.path(url.removeprefix(base + "/")), f"{digest[:2]}/{digest[2:4]}/{digest}")
            for url, digest, _ in real]
