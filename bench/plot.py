"""Throughput against size as an SVG, written by hand: both axes logarithmic, readable on light and dark."""

import math

from rows import spread
from servers import NAMES

SIZES = [("1 KiB", "hit 1 KiB c64", 1 << 10), ("64 KiB", "hit 64 KiB c64", 64 << 10),
         ("1 MiB", "hit 1 MiB c64", 1 << 20), ("1 GiB", "hit 1 GiB ×8", 1 << 30)]
# Mid-tones, so that each stands out on white and on black.
COLOURS = {"ours": "#e4572e", "sf": "#2f9e6e", "npoff": "#57b98d", "nosf": "#7a9e2f", "ofc": "#1f8a8a",
           "pc": "#3b82c4", "pc-npoff": "#6ea8dc", "varnish": "#9a5fd0", "varnish-file": "#b98ae0", "ats": "#c48a1a", "squid": "#8a8a8a",
           "caddy": "#d05fa0"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 70, 170, 50, 60


def points(results, key):
    """(size, MB/s) wherever the server was measured."""
    for _, cell, size in SIZES:
        servers = results.get(cell, {})
        if seen := spread(servers, key, "gbps"):
            yield size, seen[1] * 1000


def svg(results):
    """The whole drawing as text."""
    lines = {key: list(points(results, key)) for key in COLOURS}
    lines = {key: line for key, line in lines.items() if line}
    rates = [rate for line in lines.values() for _, rate in line]
    if not rates:
        return None
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    high = max(high, low + 1)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(size):
        return LEFT + width * (math.log2(size) - 10) / 20

    def y(rate):
        return TOP + height * (high - math.log10(rate)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>Throughput of hits by size, all servers</title>",
        "<style>.t{fill:#333}.g{stroke:#8886}@media(prefers-color-scheme:dark){.t{fill:#ddd}}</style>",
        f'<text class="t" x="{LEFT}" y="28" font-size="16">Hits: MB/s by size (64 connections; 8 at 1 GiB)</text>']
    for label, _, size in SIZES:
        parts.append(f'<line class="g" x1="{x(size):.0f}" x2="{x(size):.0f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                     f'<text class="t" x="{x(size):.0f}" y="{HEIGHT - BOTTOM + 24}" text-anchor="middle">{label}</text>')
    for power in range(low, high + 1):
        at = y(10**power)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.0f}" y2="{at:.0f}"/>'
                     f'<text class="t" x="{LEFT - 8}" y="{at + 4:.0f}" text-anchor="end">{10**power:g}</text>')
    # Labels in the order of the line ends, and far enough apart to be read.
    last = 0
    for key in sorted(lines, key=lambda key: y(lines[key][-1][1])):
        bold, colour = key == "ours", COLOURS[key]
        path = " ".join(f"{x(size):.1f},{y(rate):.1f}" for size, rate in lines[key])
        last = max(y(lines[key][-1][1]), last + 16)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{4 if bold else 2}"/>')
        parts += [f'<circle cx="{x(size):.1f}" cy="{y(rate):.1f}" r="{5 if bold else 3}" fill="{colour}"/>'
                  for size, rate in lines[key]]
        weight = ' font-weight="bold"' if bold else ""
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{last + 4:.0f}" fill="{colour}"{weight}>{NAMES[key]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
