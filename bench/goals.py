"""The goals, each a ratio to another server in the same run or a plain limit, and what became of each."""

import dataclasses

from rows import ratios, short, spread
from servers import NAMES

UNITS = {"rps": "req/s", "p99_ms": "ms", "gbps": "GB/s", "cpu_s_per_gb": "s/GB", "anon_mib": "MiB", "wall_s": "s",
         "machine_cpu_s_per_gb": "s/GB", "first_byte_ms": "ms", "mean_ms": "ms", "after_upstream_s": "s", "first_p50_s": "s", "probe_p99_ms": "ms",
         "start_s": "s", "hot_extra_us": "µs", "cold_p99_ms": "ms", "stats_p99_ms": "ms"}
LEVELS = ("must", "goal", "stretch")
MORE = {"rps", "gbps", "complete"}


@dataclasses.dataclass
class Goal:
    """`levels` are must, goal and stretch: None, a limit, or (factor, server) or (factor, server, other cell)."""

    text: str
    cell: str
    figure: str
    levels: tuple
    server: str = "ours"


@dataclasses.dataclass
class Verdict:
    """The best level that was met (or what was missed), and the figures it follows from."""

    text: str
    verdict: str
    detail: str
    figure: str
    levels: list


def goals(clients):
    """All of them; `clients` is the size of the stampede that was run."""
    fast, slow = f"stampede {clients}, fast origin", f"stampede {clients}, 50 MB/s origin"
    rate = lambda size, count, *levels: Goal(f"{size} c{count}", f"hit {size} c{count}", "rps", levels)
    nginx = ((1, "pc"), (1, "sf"), (1, "ofc"))
    yield from (rate("1 KiB", count, *nginx) for count in (1, 64, 256))
    yield Goal("1 KiB c64, p99", "hit 1 KiB c64", "p99_ms", ((1, "pc"), (0.5, "sf"), 1))
    yield rate("64 KiB", 1, (0.9, "npoff"), (1, "npoff"), (1, "ats"))
    yield rate("64 KiB", 64, (0.9, "npoff"), (1, "npoff"), (1, "ofc"))
    yield Goal("64 KiB c1, p99", "hit 64 KiB c1", "p99_ms", (None, 1, None))
    yield Goal("64 KiB c64, p99", "hit 64 KiB c64", "p99_ms", (None, 2, None))
    yield rate("1 MiB", 1, (1, "sf"), (1.5, "sf"), (1, "nosf"))
    yield rate("1 MiB", 64, (1, "sf"), (1.2, "sf"), (1, "varnish"))
    yield rate("1 MiB", 256, (1, "sf"), (1.4, "sf"), (1, "varnish"))
    for times, factor in (("×1", 1.2), ("×8", 1.3)):
        cell = f"hit 1 GiB {times}"
        yield Goal(f"1 GiB {times}", cell, "gbps", ((1, "sf"), (factor, "sf"), (1, "varnish")))
        yield Goal(f"1 GiB {times}, anonymous memory", cell, "anon_mib", (None, None, 32))
        # Whoever is at hand does the sending on loopback, often the client: only what the whole machine spends tells what
        # a hit costs. The server's own account is there as well.
        for what, figure in (("CPU of the machine", "machine_cpu_s_per_gb"), ("CPU of the server", "cpu_s_per_gb")):
            yield Goal(f"1 GiB {times}, {what}", cell, figure, ((1, "sf"), (0.8, "sf"), (1, "varnish")))
    yield Goal("random 64 KiB ranges c1", "range 64 KiB c1", "rps", ((0.9, "npoff"), (1, "npoff"), (1, "nosf")))
    yield Goal("random 64 KiB ranges c64", "range 64 KiB c64", "rps", ((0.8, "npoff"), (1, "nosf"), (1, "npoff")))
    yield Goal("/health p99 during cold reads", "cold 1 GiB ×2", "probe_p99_ms", ((2, "sf"), (1, "sf"), None))
    yield Goal("miss 1 GiB", "miss 1 GiB", "wall_s", ((1.25, "pc"), (1, "pc"), (1, "varnish-file")))
    # There the digest stands in line with everything else, and is a third of it.
    yield Goal("miss 1 GiB, one core", "miss 1 GiB, one core", "wall_s", (None, (1, "pc"), (1, "varnish-file")))
    # curl has one core; with fdatasync it has the disk's share too, which nobody else here waits for.
    yield Goal("miss 1 GiB, one core, against curl -o", "miss 1 GiB, one core", "wall_s",
               (None, (1 / 0.9, "curl", "miss 1 GiB, curl -o"), None))
    yield Goal("miss 1 GiB, one core, against curl -o and fdatasync", "miss 1 GiB, one core", "wall_s",
               (None, None, (1, "curl", "miss 1 GiB, curl -o and fdatasync")))
    for cell in ("miss 1 GiB", "miss 1 GiB, one core"):
        yield Goal(f"{cell}, CPU", cell, "cpu_s_per_gb", ((1.7, "pc"), (1.45, "pc"), (1.1, "pc")))
    yield Goal("miss 1 GiB, anonymous memory", "miss 1 GiB", "anon_mib", (64, 32, None))
    yield Goal("miss, first body byte at once", "slow miss 100 MiB", "first_byte_ms", (10, 5, (1, "pc")), "ours-s0")
    # nginx' usual setting stalls 40 ms at this size on loopback, which flatters everybody else: both are told.
    for name in ("pc", "pc-npoff"):
        text = f"miss 64 KiB, durable, against {NAMES[name]}"
        yield Goal(text, "miss 64 KiB", "mean_ms", ((3, name), (2, name), (1, name)))
    yield Goal("last byte of 1 GiB after upstream's", "miss 1 GiB", "after_upstream_s", (1, 0.3, 0.1), "ours-s0")
    for cell, server in ((fast, "ours"), (slow, "ours-s0")):
        yield Goal(f"{cell}: upstream requests", cell, "upstream_requests", (1, None, None), server)
        yield Goal(f"{cell}: complete bodies", cell, "complete", (clients, None, None), server)
    yield Goal(f"{fast}: wall", fast, "wall_s", ((1.25, "pc"), (1, "pc"), (1, "varnish")))
    yield Goal(f"{slow}: wall", slow, "wall_s", ((0.8, "pc"), (0.65, "pc"), (1, "varnish")), "ours-s0")
    yield Goal(f"{slow}: first body byte p50", slow, "first_p50_s", (0.25, 0.1, (1, "varnish-file")), "ours-s0")
    yield Goal(f"{slow}: anonymous memory", slow, "anon_mib", (128, 64, None), "ours-s0")
    mixed = "256 hits of 1 GiB and 64 downloads"
    yield Goal(f"{mixed}: anonymous memory", mixed, "anon_mib", (96, 64, None))


def catalogue_goals(cell):
    yield Goal(f"{cell}: start", cell, "start_s", (3, 1, None))
    yield Goal(f"{cell}: hot look-up, beyond an empty one's", cell, "hot_extra_us", (5, 1, None))
    yield Goal(f"{cell}: first hit p99", cell, "cold_p99_ms", (1, 0.15, (1, "sf")))
    yield Goal(f"{cell}: /api/stats p99", cell, "stats_p99_ms", (5, 1, None))


def verdicts(results, clients=None):
    """A verdict for each goal whose figures were measured in this run."""
    stampedes = [int(cell.split()[1].rstrip(",")) for cell in results if cell.startswith("stampede")]
    chosen = list(goals(clients or (stampedes or [200])[0]))
    chosen += [goal for cell in results if cell.startswith("catalogue") for goal in catalogue_goals(cell)]
    return [verdict for goal in chosen if (verdict := judge(goal, results))]


def judge(goal, results):
    """Whether each level is met; a level whose reference was not measured is left open."""
    cell = results.get(goal.cell, {})
    own = spread(cell, goal.server, goal.figure)
    if not own:
        return None
    judged = [judge_level(goal, level, results, own[1]) for level in goal.levels]
    met = [name for name, (is_met, _) in zip(LEVELS, judged) if is_met]
    must, goal_met = judged[0][0], judged[1][0]
    if must is False:
        verdict = "MISSES must"
    elif goal_met is False:
        verdict = "must" if must else "misses goal"
    else:
        verdict = met[-1] if met else ("misses stretch" if judged[2][0] is False else "no reference")
    unit = UNITS.get(goal.figure, "")
    figure = f"{short(own[1])} {unit}".strip()
    levels = [text for _, text in judged]
    said = "; ".join(f"{name} {text}" for name, text in zip(LEVELS, levels) if text)
    return Verdict(goal.text, verdict, f"{figure}; {said}", figure, levels)


def judge_level(goal, level, results, own):
    """(met or not or unknown, the text that says so)."""
    if level is None:
        return None, ""
    more = goal.figure in MORE
    if not isinstance(level, tuple):
        sign = "≥" if more else "≤"
        return (own >= level if more else own <= level), f"{sign} {level} {UNITS.get(goal.figure, '')}".rstrip()
    factor, server, *other = level
    cell = results.get(goal.cell, {})
    if other:
        cell = {**cell, **results.get(other[0], {})}
    ratio = ratios(cell, goal.server, goal.figure, server)
    name = NAMES.get(server, server)
    if ratio is None:
        return None, f"({name} not measured)"
    met = ratio >= factor if more else ratio <= factor
    return met, f"{ratio:.2f} of {name} ({'≥' if more else '≤'} {factor:.3g})"
