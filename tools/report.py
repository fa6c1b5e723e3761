"""Shows runs to people: one as report.html in its directory, several compared with each other.

    python tools/report.py RUN [--output=FILE.html]                  writes RUN/report.html
    python tools/report.py RUN RUN … [--output=comparison.html]      and comparison.csv beside it

A page is one file and asks the network for nothing. Rows are read once, and of each curve only the
extremes of some hundred stretches are kept: memory and page stay small, and spikes are visible.
Training writes a run's report at each evaluation, so this program needs neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import itertools
import json
import math
import os
import statistics
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import UserError, build_config, existing_path, read_json, read_toml, run_program, tables
from slurm.attempts import is_alive
from tools import page
from tools.page import Line, Point, date, details, duration, figure, short, table, text

STRETCHES = 600  # of a curve; each keeps two points
ALL_STRETCHES = 2_500  # of all curves of one panel, when runs are compared
SAMPLES, SAMPLE_STEPS, EXCERPT = 7, 12, 600  # prompts, evaluations, characters of each text
LISTED = 50  # jobs and skipped steps
PAGE = b"Content-Security-Policy"  # in the first 500 bytes of each page
NAMED = 8  # more curves than these are labelled by number
Json = dict[str, Any]


class Panel(NamedTuple):
    """A chart: its curves by key of metrics.jsonl, and whether the scale begins at 0."""

    title: str
    unit: str
    curves: dict[str, str]
    from_zero: bool


PANELS = (
    Panel("Loss", "nats per token", {"loss": "training", "val_loss": "validation"}, False),
    Panel("Validation", "bits per byte", {"val_bits_per_byte": "validation"}, False),
    Panel("Learning rate", "", {"learning_rate": "learning rate"}, True),
    Panel("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}, True),
    Panel("Throughput", "tokens per second", {"tokens_per_second": "tokens per second"}, True),
    Panel("Peak memory", "GB of rank 0", {"memory_gb": "memory"}, True),
    Panel("MFU", "share of the peak FLOP/s", {"mfu": "MFU"}, True),
)
COMPARED = (
    Panel("Validation loss", "nats per token", {"val_loss": ""}, False),
    Panel("Training loss", "nats per token", {"loss": ""}, False),
    *PANELS[2:],
)
CURVES = tuple(name for panel in PANELS for name in panel.curves)


class Curve:
    """A curve in bounded memory: the lowest and the highest point of each stretch of steps.

    Stretches double in length when the run outgrows their number, so a run of any length fits.
    Points are (step, tokens, hours, value).
    """

    def __init__(self, stretches: int) -> None:
        self.stretches, self.length = stretches, 1
        self.extremes: dict[int, tuple[Point, Point]] = {}
        self.last: Point | None = None

    def add(self, point: Point) -> None:
        while point[0] >= self.stretches * self.length:
            known, self.extremes = self.points(), {}
            self.length *= 2
            for earlier in known:
                self.add(earlier)
        index = int(point[0]) // self.length
        low, high = self.extremes.get(index, (point, point))
        low, high = point if point[3] < low[3] else low, point if point[3] >= high[3] else high
        self.extremes[index], self.last = (low, high), point

    def points(self) -> list[Point]:
        """The extremes and the last point, by step."""
        return sorted({*itertools.chain(*self.extremes.values()), self.last} - {None})


@dataclass(eq=False)
class Run:
    """The readable content of a run directory."""

    path: Path
    config: Json  # dotted keys
    curves: dict[str, Curve]
    name: str = ""
    status: Json = field(default_factory=dict)
    jobs: list[Json] = field(default_factory=list)  # in order, without those whose steps were lost
    job: Json = field(default_factory=dict)  # the last one
    branches: list[Json] = field(default_factory=list)  # the jobs that began one, in order
    started: int = 0  # jobs, with those whose steps were lost
    step: float = 0
    tokens: float = 0
    hours: float = 0
    best: Json = field(default_factory=dict)  # the evaluation of the lowest validation loss
    skipped: Curve = field(default_factory=lambda: Curve(STRETCHES))
    reasons: Counter = field(default_factory=Counter)  # of skipped steps
    last_skipped: deque[Json] = field(default_factory=lambda: deque(maxlen=LISTED))
    samples: list[list[Json]] = field(default_factory=list)  # the rows of some evaluations
    sampled: int = 0  # evaluations with samples
    unreadable: Counter = field(default_factory=Counter)  # rows, by file

    @property
    def gpu_hours(self) -> float | None:
        """Hours × ranks of all jobs, of the steps that count; None without a jobs.jsonl."""
        ends = [*(job["hours"] for job in self.jobs[1:]), self.hours]
        spans = zip(self.jobs, ends, strict=False)
        used = [max(0.0, end - job["hours"]) * job["ranks"] for job, end in spans]
        return sum(used) if self.jobs else None

    def marks(self) -> dict[str, list[Point]]:
        """Positions on each axis of restarts, branches and skipped steps."""
        known = self.curves["learning_rate"].points()  # every row of training has one
        steps, skipped = [point[0] for point in known], []
        for step, *_ in self.skipped.points() if known else ():
            hours = known[min(bisect_left(steps, step), len(steps) - 1)][2]
            skipped.append((step, step * self.tokens / (self.step or 1), hours, 0.0))
        restarts = [job for job in self.jobs[1:] if job not in self.branches]
        found = {"restart": restarts, "branch": self.branches}
        starts = {
            kind: [(job["step"], job["tokens"], job["hours"], 0.0) for job in jobs]
            for kind, jobs in found.items()
        }
        return starts | {"skipped": skipped}

    def rows(self, file: str, *required: str) -> Iterator[Json]:
        """The rows of a file whose step and other required values are numbers from 0 on.

        Others count as unreadable, except a torn last one: its job still writes it, or died.
        """
        if not (self.path / file).is_file():
            return
        with open(self.path / file, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    known = all(number(row[name]) >= 0 for name in ("step", *required))
                except (ValueError, KeyError, TypeError, RecursionError):
                    known = False
                if known:
                    yield row
                elif line.endswith(b"\n"):
                    self.unreadable[file] += 1


def number(value: Any) -> float | None:
    """A JSON value as a finite number, else None."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def read_run(path: Path, stretches: int = STRETCHES) -> Run:
    """Reads a run directory in one pass over its rows.

    Raises:
        UserError: there is no such directory, it is not a run's, or it has no metrics yet.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory; runs are in out/, see train.out_dir")
    if not (path / "config.toml").is_file():
        raise UserError(f"{path}: not a run directory: config.toml is missing")
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"{path}: nothing to report: the run has no metrics.jsonl yet")
    curves = {name: Curve(stretches) for name in CURVES}
    run = Run(path, flat(read_toml(path / "config.toml")), curves)
    try:
        read_files(run)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    return run


def read_files(run: Run) -> None:
    """Fills in what the run's rows and its status say."""
    for row in run.rows("metrics.jsonl", "tokens", "hours"):
        run.step, run.tokens, run.hours = map(float, (row["step"], row["tokens"], row["hours"]))
        for name, curve in run.curves.items():
            if (value := number(row.get(name))) is not None:
                curve.add((run.step, run.tokens, run.hours, value))
        loss = number(row.get("val_loss"))
        if loss is not None and loss < run.best.get("val_loss", math.inf):
            run.best = row
    for row in run.rows("jobs.jsonl", "tokens", "hours", "ranks"):
        run.job, run.started = row, run.started + 1
        run.jobs = [job for job in run.jobs if job["step"] < row["step"]] + [row]
        run.branches += [row] if row.get("branched_from") else []
    for row in run.rows("bad_steps.jsonl"):
        reason = str(row.get("reason") or row.get("skipped") or "skipped")
        run.reasons[reason] += 1
        run.last_skipped.append({**row, "reason": reason})
        run.skipped.add((row["step"], 0.0, 0.0, 0.0))
    rows, stride = run.rows("samples.jsonl"), 1
    for _, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        last = list(itertools.islice(of_step, SAMPLES))
        if run.sampled % stride == 0:
            run.samples.append(last)
        if len(run.samples) > SAMPLE_STEPS:
            run.samples, stride = run.samples[::2], 2 * stride
        run.sampled += 1
    if run.samples and run.samples[-1] is not last:
        run.samples.append(last)
    with contextlib.suppress(RecursionError):
        run.status = read_json(run.path / "status.json") or {}


def flat(values: Json) -> Json:
    """Tables as dotted keys."""
    found = {}
    for section, keys in values.items():
        of_section = keys if isinstance(keys, dict) else {"": keys}
        found |= {f"{section}.{name}".rstrip("."): value for name, value in of_section.items()}
    return found


def name_runs(runs: list[Run]) -> None:
    """Names each run by its directory, and by as many parents as make the name unique."""
    for run in runs:
        parts = run.path.resolve().parts
        for depth in range(1, len(parts) + 1):
            run.name = "/".join(parts[-depth:]).lstrip("/")
            like = [r for r in runs if r.path.resolve().parts[-depth:] == parts[-depth:]]
            if len(like) == 1:
                break


def branch_of(job: Json) -> str:
    """Where a branch comes from, such as trunk at step 800, as HTML."""
    path = Path(str(job["branched_from"]))
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    return f"{text(run.name, 100)} at step {job['step']:,.0f}"


def state(run: Run) -> str:
    """The state of a run in words."""
    reason = run.status.get("reason")
    if run.status.get("state") == "running" and not is_alive(run.path):
        reason = "but no process trains it: killed"
    return str(run.status.get("state", "unknown")) + (f" ({reason})" if reason else "")


def report(run: Run) -> bytes:
    """The page of one run."""
    factor, unit = duration(run.hours)
    best, gpu, job, marks = run.best, run.gpu_hours, run.job, run.marks()
    planned = number(job.get("max_steps"))
    losses = run.curves["loss"].points()
    at_best = f"<small>at step {short(number(best.get('step')))}</small>" if best else ""
    ranks = f"<small>{job['ranks']} × {text(job.get('device'))}</small>" if gpu else ""
    facts = {
        "Status": text(state(run)),
        "Step": f"{run.step:,.0f}" + (f"<small>of {planned:,.0f}</small>" if planned else ""),
        "Tokens": short(run.tokens),
        "Best validation loss": short(best.get("val_loss")) + at_best,
        "Bits per byte": short(number(best.get("val_bits_per_byte"))),
        "Training loss": short(losses[-1][3] if losses else None) + "<small>last row</small>",
        "Parameters": short(number(job.get("parameters"))),
        "Time": f"{short(run.hours * factor, 3)}<small>{unit}</small>",
        hours_name([run]): short(gpu, 3) + ranks,
        "Jobs": str(run.started or "–"),
        "Skipped steps": f"{run.reasons.total():,}",
        "Code commit": code(str(job.get("commit") or "–")[:12]),
    }
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    signs = {
        "restart": ("┆", "restart"),
        "branch": ("┃", "branch"),
        "skipped": ("✕", "skipped step"),
    }
    legend = "".join(
        f'<span><i class="{kind}">{sign}</i> {name}</span>'
        for kind, (sign, name) in signs.items()
        if marks[kind]
    )
    figures = []
    for panel in PANELS:
        lines = [
            Line(label, style, run.curves[name].points(), marked=name.startswith("val_"))
            for style, (name, label) in enumerate(panel.curves.items())
        ]
        figures.append(figure(panel.title, panel.unit, lines, panel.from_zero, marks))
    charts = page.charts(figures, f'<span class="marks">{legend}</span>')
    body = f"<dl>{cards}</dl>{charts}{samples_part(run)}{jobs_part(run)}{config_part(run)}"
    known = f"{run.path}, {run.status.get('state', 'state unknown')}"
    heading = f"<h1>{text(run.name)}</h1><p>{text(known)} {date(run.status.get('time', ''))}</p>"
    for branch in run.branches:
        lines = branch.get("changed")
        changes = [code(str(line)) for line in lines] if isinstance(lines, list) else []
        heading += f"<p>Branch of {branch_of(branch)}: {'; '.join(changes) or 'no changes'}</p>"
    return page_about([run], f"{run.name}: report", heading, body)


def page_about(runs: list[Run], title: str, heading: str, body: str) -> bytes:
    """A page, with a note on rows that could not be read."""
    notes = "<br>".join(
        f"{text(run.name)}: {count:,} unreadable row{'s' * (count > 1)} in {text(file)} left out"
        for run in runs
        for file, count in run.unreadable.items()
    )
    note = f'<p class="warning">{notes}</p>' if notes else ""
    now = date(time.strftime("%Y-%m-%d %H:%M:%S %z"))
    return page.whole_page(
        title,
        f"<header>{heading}</header>{note}{body}<footer>Written by report.py, {now}</footer>",
    )


def hours_name(runs: list[Run]) -> str:
    """The name of hours × ranks, by the devices of the runs."""
    devices = {run.job.get("device") for run in runs if run.job}
    if "cpu" not in devices:
        return "GPU-hours"
    return "Rank-hours" if len(devices) > 1 else "CPU rank-hours"


def samples_part(run: Run) -> str:
    """What the model wrote and predicted for the same prompts over time."""
    if not run.samples:
        return ""
    parts = "<section><h2>Samples over time</h2>"
    if run.sampled > len(run.samples):
        parts += f"<p>{len(run.samples)} of {run.sampled} evaluations are shown.</p>"
    if written := over_time(run.samples, "continuation"):
        parts += (
            "<h3>What the model writes</h3><p>It goes on from the prompt by itself, a token at a"
            f" time, with the same random numbers at each evaluation.</p>{written}"
        )
    return (
        f"{parts}<h3>Its next token at each position</h3><p>One-step predictions, which are not a"
        " text that it writes: each is the token that the model found most likely after the true"
        " text so far. Where it is wrong they read as nonsense, even a good model's.</p>"
        f"{over_time(run.samples, 'prediction')}</section>"
    )


def over_time(evaluations: list[list[Json]], kind: str) -> str:
    """The rows of a kind for each prompt, by step."""
    parts, of_kind = "", ([row for row in rows if kind in row] for rows in evaluations)
    for index, rows in enumerate(itertools.zip_longest(*of_kind), 1):
        known = [row for row in rows if row]
        shown = [{"after": f"step {row['step']:,.0f}", kind: excerpt(row[kind])} for row in known]
        if "truth" in known[-1]:
            shown.append({"after": "truth", kind: excerpt(known[-1]["truth"])})
        content = excerpt(known[-1].get("prompt", "")) + table(shown, f"{kind} {index}")
        parts += details(f"Prompt {index}", content, is_open=index == 1)
    return parts


def excerpt(value: Any) -> str:
    return f"<pre>{text(value, EXCERPT)}</pre>"


def jobs_part(run: Run) -> str:
    """Tables of jobs and of skipped steps."""
    columns = ("host", "job_id", "ranks", "device", "commit")
    jobs = [
        {"from step": f"{job['step']:,.0f}", "time": date(job.get("time") or "–")}
        | {name: text(job.get(name) or "–", 40) for name in columns}
        for job in run.jobs[-LISTED:]
    ]
    skipped = [
        {"step": f"{row['step']:,.0f}"}
        | {name: text(row.get(name)) for name in ("reason", "loss", "grad_norm")}
        for row in run.last_skipped
    ]
    parts = ""
    if jobs:
        lost = run.started - len(run.jobs)
        note = f", {lost} more whose steps were lost" if lost else ""
        parts += details(f"{len(run.jobs)} jobs{note}", table(jobs, "Jobs"))
    if skipped:
        counts = ", ".join(f"{text(reason)}: {count:,}" for reason, count in run.reasons.items())
        parts += details(f"Skipped steps ({counts})", table(skipped, "Skipped steps"))
    return f"<section><h2>Jobs</h2>{parts}</section>" if parts else ""


def config_part(run: Run) -> str:
    """The configuration, what differs from the defaults first."""
    defaults, changed, others = flat(tables(build_config({}))), [], []
    for key, value in run.config.items():
        row = {"key": code(key), "value": text(value)}
        if value == defaults.get(key):
            others.append(row)
        else:
            changed.append(row | {"default": text(defaults.get(key, "–"))})
    title = f"{len(changed)} key{'s' * (len(changed) != 1)} with a value other than the default"
    return (
        "<section><h2>Configuration</h2>"
        + details(title, table(changed, "Keys that differ"), is_open=True)
        + details(f"{len(others)} with the default", table(others, "Keys with their default"))
        + "</section>"
    )


def code(key: str) -> str:
    return f"<code>{text(key)}</code>"


# ---- comparison


def differing_keys(runs: list[Run]) -> list[str]:
    """Keys whose values differ between runs, without the run directory."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "train.out_dir")
    first = runs[0].config
    return [key for key in keys if any(run.config.get(key) != first.get(key) for run in runs)]


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Groups of runs whose configurations differ in nothing but seed and directory."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.config.items() if k not in ("train.seed", "train.out_dir")}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def spread(runs: list[Run], name: str) -> tuple[float | None, float | None, int]:
    """Mean and sample deviation of a score at the runs' best evaluations; how many runs have it."""
    known = [value for run in runs if (value := number(run.best.get(name))) is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None, len(known)


def comparison(runs: list[Run]) -> bytes:
    """The page of several runs."""
    keys, spent = differing_keys(runs), hours_name(runs)
    lowest = min((run.best["val_loss"] for run in runs if run.best), default=None)
    lines, rows = [], []
    for index, run in enumerate(runs):
        label = str(index + 1) if len(runs) > NAMED else run.name
        label = label if len(label) <= 16 else f"{label[:7]}…{label[-8:]}"
        lines.append(Line(label, index, [], marked=True))
        loss = short(run.best.get("val_loss"))
        if run.best and run.best["val_loss"] == lowest:
            loss = f"<b>{loss}</b> ★"
        name = f"{index + 1} {page.swatch(lines[-1])}{text(run.name)}"
        if run.branches:
            name += f"<small>branch of {branch_of(run.branches[-1])}</small>"
        row = {
            "run": name,
            "best validation loss": loss,
            "bits per byte": short(number(run.best.get("val_bits_per_byte"))),
            "tokens": short(run.tokens),
            "hours": short(run.hours, 3),
            spent: short(run.gpu_hours, 3),
            "step": f"{run.step:,.0f}",
            "status": text(state(run)),
        }
        rows.append(row | {code(key): text(run.config.get(key, "–")) for key in keys})
    figures = []
    for panel in COMPARED:
        (name,) = panel.curves
        points = (run.curves[name].points() for run in runs)
        drawn = [line._replace(points=p) for line, p in zip(lines, points, strict=True)]
        figures.append(figure(panel.title, panel.unit, drawn, panel.from_zero))
    body = (
        f"{table(rows, 'Runs')}<p>★ lowest. {spent}: hours × ranks, for the steps that count; –"
        f" where the run has no jobs.jsonl.</p>{seeds_part(runs, keys)}<h2>Curves</h2>"
        f"{page.charts(figures)}"
    )
    title = f"{len(runs)} runs compared"
    return page_about(runs, title, f"<h1>{title}</h1>", body)


def seeds_part(runs: list[Run], keys: list[str]) -> str:
    """Mean and deviation over runs that differ in nothing but their seed."""
    keys = [key for key in keys if key != "train.seed"]
    groups, rows = [group for group in seed_groups(runs) if len(group) > 1], []
    for group in groups:
        spreads = [spread(group, name) for name in ("val_loss", "val_bits_per_byte")]
        loss, bits = (short(m) + f" ± {short(d, 2)}" * (d is not None) for m, d, _ in spreads)
        row = {
            "runs": ", ".join(str(runs.index(run) + 1) for run in group),
            "with evaluations": str(spreads[0][2]),
            "best validation loss": loss,
            "bits per byte": bits,
        }
        row |= {code(key): text(group[0].config.get(key, "–")) for key in keys}
        rows.append(row)
    return f"<h2>Seeds: mean ± standard deviation</h2>{table(rows, 'Seeds')}" if rows else ""


def comparison_csv(runs: list[Run]) -> bytes:
    """One line per run, full precision."""
    keys, rows = differing_keys(runs), []
    group_of = {run: group for group in seed_groups(runs) for run in group}
    for run in runs:
        row = {"run": run.name, "path": run.path, "status": state(run), "step": run.step}
        row |= {"tokens": run.tokens, "hours": run.hours, "gpu_hours": run.gpu_hours}
        row |= {name: run.job.get(name) for name in ("device", "ranks", "parameters")}
        row |= {"best_val_loss": run.best.get("val_loss"), "best_step": run.best.get("step")}
        row |= {"bits_per_byte": run.best.get("val_bits_per_byte"), "seeds": len(group_of[run])}
        row["seeds_mean"], row["seeds_deviation"], _ = spread(group_of[run], "val_loss")
        for key in keys:
            value = run.config.get(key, "")
            row[key] = value if isinstance(value, str) else json.dumps(value, default=str)
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8", "replace")


# ---- program


def write(path: Path, content: bytes, replaces: bytes = b"") -> None:
    """Writes a file whole or not at all, even while another process writes the same file.

    Raises:
        UserError: it can't be written, or the file there lacks `replaces` at its beginning.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        if replaces and os.path.exists(path):
            with open(path, "rb") as file:
                if replaces not in file.read(500):
                    raise UserError(f"{path} exists and is no report; name another --output")
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return
    output, names = "", [argument for argument in arguments if not argument.startswith("-")]
    for option in (argument for argument in arguments if argument.startswith("-")):
        name, _, output = option.partition("=")
        if name != "--output":
            near = difflib.get_close_matches(name, ("--output", "--help"), n=1)
            suggestion = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown option {option}{suggestion}")
        if not output:
            raise UserError("--output lacks a value: write --output=FILE.html")
    paths = [*dict.fromkeys(existing_path(name).resolve() for name in names)]
    if not paths:
        raise UserError("name one run directory or more, such as: python tools/report.py out/tiny")
    runs, stretches = [], min(STRETCHES, max(50, ALL_STRETCHES // len(paths)))
    for path in paths:
        try:
            runs.append(read_run(path, stretches))
        except UserError as error:
            if len(paths) == 1 or not path.exists():
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("none of these directories is a run with metrics")
    name_runs(runs)
    if len(paths) == 1:
        target = Path(output or runs[0].path / "report.html")
        write(target, report(runs[0]), PAGE)
    else:
        target = Path(output or "comparison.html")
        listed = Path(os.path.splitext(target)[0] + ".csv")
        if listed == target:
            raise UserError(f"--output={output}: name the page; its table becomes {listed.name}")
        if listed.exists() and not target.exists():
            raise UserError(f"{listed} exists, and no page beside it; name another --output")
        write(target, comparison(runs), PAGE)
        write(listed, comparison_csv(runs))
    print(target)


if __name__ == "__main__":
    run_program(main)
