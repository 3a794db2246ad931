"""docs/performance.md and docs/throughput.svg from the results of a run. The text around the tables is in
performance.md.in, so that a new run changes figures and nothing else."""

from pathlib import Path

import goals
import plot
from rows import base, columns, ratios, short, spread
from servers import NAMES

TEMPLATE = Path(__file__).resolve().parent / "performance.md.in"
TITLES = {"rps": "req/s", "p50_ms": "p50, ms", "p99_ms": "p99, ms", "max_ms": "longest, ms", "gbps": "GB/s",
          "cpu_s_per_gb": "CPU, s/GB", "anon_mib": "anonymous memory, MiB", "wall_s": "whole, s",
          "machine_cpu_s_per_gb": "the machine's CPU, s/GB",
          "first_byte_ms": "first body byte, ms", "after_upstream_s": "last byte after upstream's, s",
          "mean_ms": "mean, ms", "probe_p50_ms": "small request p50, ms", "probe_p99_ms": "p99, ms",
          "probe_max_ms": "longest, ms", "upstream_requests": "upstream requests", "complete": "complete bodies",
          "first_p50_s": "first body byte p50, s", "start_s": "start, s", "start_disk_cold_s": "start, disk cold, s",
          "cold_p50_ms": "first hit p50, ms", "cold_p99_ms": "first hit p99, ms",
          "disk_cold_p50_ms": "disk cold p50, ms", "disk_cold_p99_ms": "disk cold p99, ms",
          "hot_rps": "hot, req/s", "hot_extra_us": "hot, µs beyond an empty catalogue's",
          "hot_1000_extra_us": "1,000 URLs in turn, µs beyond", "stats_p99_ms": "/api/stats p99, ms"}
SECTIONS = {"HITS": "hit", "RANGES": "range", "COLD": "cold", "MISSES": ("miss", "slow miss"), "STAMPEDE": "stampede",
            "MEMORY": "256 hits", "CATALOGUE": "catalogue"}


def table(header, lines):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def figure_text(servers, key, figure):
    seen = spread(servers, key, figure)
    if not seen:
        return "–"
    low, mid, high = map(short, seen)
    return mid if low == high else f"{mid} ({low}–{high})"


def cell_table(cell, servers):
    """One measurement: a line a server, a column a figure, and the ratio of the first figure to nginx's."""
    good = [seen for rounds in servers.values() for seen in rounds if "failed" not in seen]
    if not good:
        return f"**{cell}**: nothing could be measured.\n"
    figures = columns(good)
    nginx = base(servers)
    header = ["", *(TITLES.get(figure, figure) for figure in figures), *([f"to {NAMES[nginx]}"] if nginx else [])]
    lines = []
    for key in servers:
        if not spread(servers, key, figures[0]):
            lines.append([NAMES.get(key, key), "failed", *[""] * (len(header) - 2)])
            continue
        line = [NAMES.get(key, key), *(figure_text(servers, key, figure) for figure in figures)]
        if nginx:
            ratio = ratios(servers, key, figures[0], nginx)
            line.append(f"{ratio:.2f}" if ratio else "–")
        lines.append(line)
    return f"**{cell}**\n\n{table(header, lines)}\n"


def section(results, prefixes):
    """The tables of all measurements whose names begin so."""
    chosen = [cell_table(cell, servers) for cell, servers in results.items() if cell.startswith(prefixes)]
    return "\n".join(chosen) or "Not measured in this run.\n"


def goal_table(results, beside):
    """A line for each goal; with the verdict of another run in a column of its own, if there is one."""
    lines = [[row.text, row.figure, *(text or "–" for text in row.levels), f"**{row.verdict}**"]
             for row in goals.verdicts(results)]
    header = ["row", "artifact-cache", "must", "goal", "stretch", "verdict"]
    if beside:
        header.append(f"with {network(beside)}")
        others = {row.text: row for row in goals.verdicts(beside["results"])}
        for line in lines:
            other = others.get(line[0])
            if other is None:
                line.append("–")
                continue
            lowest = next(text for text in other.levels if text)
            said = lowest.split(" (")[0] if " of " in lowest else other.figure
            line.append(f"{said}: **{other.verdict}**")
    return table(header, lines) + "\n"


def network(run):
    """How the run's machine controls congestion."""
    return dict(run["machine"])["Network"].split()[-1].upper()


def write(run, docs, beside=None):
    """Writes both files; `beside` is a run with another congestion control."""
    results, chosen = run["results"], run["options"]
    text = TEMPLATE.read_text()
    facts = [[name, said] for name, said in run["machine"]]
    facts.append(["Rounds", f"{chosen['rounds']} of {chosen['seconds']} s" + (", quick" if chosen["quick"] else "")])
    facts += [[name, f"left out: {why}"] for name, why in run["left_out"].items()]
    values = {"MACHINE": table(["", ""], facts) + "\n", "GOALS": goal_table(results, beside)}
    values |= {name: section(results, prefixes) for name, prefixes in SECTIONS.items()}
    values["BESIDE"] = section(beside["results"], "hit 1 GiB") if beside else "Not measured with another.\n"
    drawing = plot.svg(results)
    values["PLOT"] = "![Throughput of hits by size](throughput.svg)\n" if drawing else ""
    for name, value in values.items():
        text = text.replace(f"@{name}@\n", value)
    docs.mkdir(exist_ok=True)
    (docs / "performance.md").write_text(text)
    if drawing:
        (docs / "throughput.svg").write_text(drawing)
    print(f"wrote {docs / 'performance.md'}")
