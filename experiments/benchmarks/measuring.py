"""What the benchmarks of this folder share: candidates in turn, the ratios of each round, and their pages.

Other work on a machine comes and goes, and falls on whoever runs just then. So no candidate is measured by
itself: in every round each runs once, every round begins with another one, and what is compared are the two
times of one round. A ratio is given as the median over the rounds with its quartiles.
"""
import contextlib
import io
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from semid.config import atomic_path, root, save_figure


def timed(work, pause=0.05):
    "Seconds of a call, and what it gave. What it prints is not shown."
    time.sleep(pause)  # threads of the one before may still be spinning
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): result = work()
    return time.perf_counter() - start, result


def spread(values, digits=2):
    "A median with its quartiles in words."
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


class Turns:
    "What each candidate took in each round, and what it gave last."
    def __init__(self, seconds, results):
        self.seconds = {who: np.array(some) for who, some in seconds.items()}
        self.results = results

    def median(self, who): return float(np.median(self.seconds[who]))

    def ratios(self, who, ours="semid"): return self.seconds[who] / self.seconds[ours]

    def ratio(self, who, ours="semid"): return float(np.median(self.ratios(who, ours)))

    def rows(self, ours="semid", digits=3, unit="seconds", scale=1):
        "A row of a table for each candidate."
        ratios = {who: 1 if who == ours else spread(self.ratios(who, ours)) for who in self.seconds}
        return [{"candidate": who, unit: round(scale * self.median(who), digits), f"times {ours}": ratio}
                for who, ratio in ratios.items()]


def in_turn(candidates, rounds=5, measure=timed):
    """Run all `candidates`, {name: function}, once in each round, and once before, which does not count.

    `measure` takes a candidate and returns its seconds and its result."""
    results = {who: measure(work)[1] for who, work in candidates.items()}  # compiles
    seconds, order = {who: [] for who in candidates}, list(candidates)
    for n in range(rounds):
        at = n % len(order)
        for who in order[at:] + order[:at]:
            took, results[who] = measure(candidates[who])
            seconds[who].append(took)
    return Turns(seconds, results)


def exponent(sizes, seconds):
    "The slope of a line through the upper half of a curve, in logarithms: fixed costs no longer count there."
    order = np.argsort(sizes)[len(sizes) // 2 - 1:]
    return float(np.polyfit(np.log(np.take(sizes, order)), np.log(np.take(seconds, order)), 1)[0])


def plot_ratios(turns, ours="semid", title=""):
    "How many times as long as ours each took, {what: Turns}: medians, quartiles, a line where all are equal"
    bars = [(f"{what}\n{who}" if len(turns) > 1 else who, one.ratios(who, ours))
            for what, one in turns.items() for who in one.seconds if who != ours]
    fig, ax = plt.subplots(figsize=(8, 0.6 + 0.42 * len(bars)), layout="constrained")
    for y, (_, ratios) in enumerate(bars):
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        colour = "C0" if middle >= 1 else "C3"
        ax.plot([low, high], [y, y], color=colour, lw=3, alpha=0.4)
        ax.plot(middle, y, "o", color=colour)
        ax.annotate(f"{middle:.3g}", (middle, y), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    ax.axvline(1, color="grey", lw=0.8)
    ax.set_xscale("log")
    ax.set(title=title, xlabel=f"times as long as {ours} (right of the line: slower)")
    ax.set_ylim(len(bars) - 0.4, -0.8)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    return fig


def processor():
    "The name of the processor, where the system tells it."
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found: return found[1].strip()
    return platform.processor() or platform.machine()


def about(*packages, cores=None):
    "On what it ran: the processor, and versions of what took part."
    names = ["semid", *packages]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{processor()}, {cores or os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def write_page(name, title, head, sections, figure=None):
    """Write NAME.md beside the notebooks: a title, on what it ran, and {heading: table or text}.

    With a figure its picture is NAME.png, before the sections."""
    folder, parts = root() / "experiments" / "benchmarks", [f"# {title}", f"{head}. Written by {name}.ipynb."]
    if figure is not None:
        save_figure(figure, folder / f"{name}.png")
        parts.append(f"![{title}]({name}.png)")
    for heading, one in sections.items():
        some = one if isinstance(one, (list, tuple)) else [one]
        text = [part if isinstance(part, str) else part.to_markdown(index=False) for part in some]
        parts.append("\n\n".join([f"## {heading}", *text]))
    with atomic_path(folder / f"{name}.md") as temporary: temporary.write_text("\n\n".join(parts) + "\n")
