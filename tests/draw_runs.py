"""Draws the loss of an interrupted run over that of an uninterrupted one, as an SVG.

    python tests/draw_runs.py UNDISTURBED_RUN DISTURBED_RUN OUTPUT.svg [EVENTS.json]

EVENTS.json says where jobs ended: [{"step": 120, "event": "preempted", "ranks": 2}, …]; ranks are
those of the next job. Needs matplotlib, which Rocket itself does not.
"""

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rocket"})  # small, and reproducible
POINTS = 1200  # more would not be visible
GREY, RED, BLUE = "#c3c8d0", "#c2410c", "#2563eb"


def losses(run: Path) -> dict[int, float]:
    """Step to training loss."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}


def draw(undisturbed: Path, disturbed: Path, output: Path, events: list[dict]) -> None:
    """Two panels, both losses and their difference, each with the ends of the jobs."""
    first, second = losses(undisturbed), losses(disturbed)
    steps = sorted(first.keys() & second.keys())
    steps = steps[:: 1 + len(steps) // POINTS]
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(7.2, 4.2), height_ratios=(3, 2), layout="constrained"
    )
    upper.plot(steps, [first[step] for step in steps], GREY, lw=3.5, label="undisturbed")
    upper.plot(steps, [second[step] for step in steps], RED, lw=0.9, label="disturbed")
    upper.legend(frameon=False, loc="upper right")
    apart = [abs(first[step] - second[step]) or math.nan for step in steps]
    lower.semilogy(steps, apart, color=RED, lw=0.7)
    upper.set_ylabel("loss")
    lower.set(xlabel="step", ylabel="|difference| (gap: 0)")
    for event in events:
        for axes in (upper, lower):
            axes.axvline(event["step"], color=BLUE, lw=0.7, ls=(0, (3, 2)))
        text = f"{event['event']}: {event['ranks']} rank{'s' * (event['ranks'] != 1)}"
        top = (event["step"], upper.get_ylim()[1])
        upper.annotate(text, top, rotation=30, color=BLUE, fontsize=7.5)
    figure.savefig(output, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    undisturbed, disturbed, output, *events = map(Path, sys.argv[1:])
    draw(undisturbed, disturbed, output, json.loads(events[0].read_text()) if events else [])
