"""Trains a ladder of small runs and fits the scaling law to them, so that the loss of a large run
is known before it is paid for.

    python tools/ladder.py CONFIG --hours=1 [--share=0.25] [--section.key=value …]
    python tools/ladder.py CONFIG --predict=RUN-OR-CONFIG [--out=out/ladder]

Each size is a run at a constant rate, and each length a branch of it that decays. CONFIG's learning
rate is right for CONFIG's shape, or for model.base_dim and model.base_layers. The same command goes
on where it was stopped; when all is trained, it writes OUT/fit.json, OUT/ladder.html, and the best
run for the rest of the hours as OUT/large.toml. See docs/scaling-law.md.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from config import (
    Config,
    ConfigError,
    UserError,
    build_config,
    dump_toml,
    existing_path,
    load_config,
    print_error,
    read_toml,
    resolve_path,
    run_program,
    tables,
    write_atomically,
)
from tools import law
from tools.law import Fit, Law
from tools.memory import flops_per_token
from tools.page import Line, log_figure, short, table, text, whole_page
from tools.rungs import (
    MARGIN,
    MIN_LENGTHS,
    MIN_RUNGS,
    MIN_SIZES,
    Json,
    Ladder,
    batch_tokens,
    changed_config,
    family,
    final_loss,
    new_ladder,
    read_plan,
    split_tokens,
    state,
    step_flops,
    train,
    vocabulary,
    write_plan,
)

FLAGS = {
    "--hours=H": "hours that this machine has for the ladder and the large run together",
    "--share=0.25": "largest share of them that the ladder takes",
    "--sizes=96,128,192": "widths of the models; by default three or four for which the hours do",
    "--lengths=8": "lengths of a size at most, as 6 : 7 : 8 …",
    "--seeds=1": "seeds of each size",
    "--out=out/ladder": "directory of the ladder",
    "--at-once=N": "runs at a time; by default one per GPU, or per core where there is none",
    "--flops=F": "FLOP/s that training reaches per run, instead of a measurement on this machine",
    "--plan": "print what would be trained and what it costs, and train nothing",
    "--tasks": "write the configurations and print their paths, a line per size: slurm/ladder.sh",
    "--fit": "train nothing, and fit what is finished",
    "--predict=PATH": "predict the loss of this configuration, or compare with this run",
}
DOUBTFUL = 0.01  # leave-one-out error of loss above which the law is not to be trusted
LARGER = (1, 2, 4, 8, 16, 32)  # than the largest rung's compute, in the report
# What a planned run takes over, beside the optimizer's keys; runs that differ have another law.
SAME = (
    "model.base_dim model.base_layers model.tie_embeddings model.init_std model.norm_eps"
    " model.rope_theta data.dir data.mixture data.seq_len data.document_mask"
    " tokenizer.vocab_size train.dtype train.global_batch_size train.eval_sequences"
).split()


def read_flags(flags: list[str]) -> Json:
    """The flags by name, as values; those not given are missing.

    Raises:
        ConfigError: a value that is not a number above 0.
    """
    values: Json = {}
    for flag in flags:
        name, _, value = flag[2:].partition("=")
        if name in ("out", "predict"):
            values[name] = value
        elif name in ("plan", "tasks", "fit"):
            values[name] = True
        else:
            kind = float if name in ("hours", "share", "flops") else int
            try:
                numbers = [kind(part) for part in value.split(",")]
            except ValueError:
                numbers = [0]
            if not 0 < min(numbers) <= max(numbers) < math.inf or (
                len(numbers) > 1 and name != "sizes"
            ):
                what = "a whole number" if kind is int else "a number"
                raise ConfigError(f"--{name} is {what} above 0, not {value!r}")
            values[name] = sorted({*numbers}) if name == "sizes" else numbers[0]
    if values.get("share", 0.5) >= 1:
        raise ConfigError("--share is a share below 1, such as 0.25")
    if values.get("lengths", MIN_LENGTHS) < MIN_LENGTHS:
        raise ConfigError(f"--lengths is {MIN_LENGTHS} or more: the fit needs them")
    for size in values.get("sizes", []):
        if size not in law.WIDTHS:
            near = min(law.WIDTHS, key=lambda width: abs(width - size))
            raise ConfigError(f"--sizes: {size} is no width of the family; take {near}")
    if 0 < len(values.get("sizes", [])) < MIN_SIZES:
        raise ConfigError(f"--sizes: name {MIN_SIZES} widths or more: the fit needs them")
    return values


# ---- the fit


def collect(ladder: Ladder) -> tuple[list[Json], dict[str, str]]:
    """The rungs, as Fit has them, and why others are left out, by name."""
    rungs, bad = [], {}
    for chain in ladder.chains():
        least = math.inf
        for rung in reversed(chain):  # by length
            directory = ladder.out / rung.name
            loss = final_loss(directory)
            found = state(directory)
            if loss is None:
                bad[rung.name] = "no validation loss" if found == "finished" else found
            elif not math.isfinite(loss) or loss >= least:
                bad[rung.name] = f"diverged: {loss:.4f}, no better than a shorter length"
            else:
                least = loss
                tokens = rung.steps * batch_tokens(rung.config)
                rungs.append({
                    "name": rung.name,
                    "dim": rung.width,
                    "seed": rung.config.train.seed,
                    "parameters": law.parameters(rung.config, vocabulary(rung.config)),
                    "tokens": tokens,
                    "flops": flops_per_token(rung.config) * tokens,
                    "loss": loss,
                })  # fmt: skip
    return sorted(rungs, key=lambda rung: (rung["dim"], rung["seed"], rung["tokens"])), bad


def fit_ladder(ladder: Ladder, rungs: list[Json]) -> tuple[Fit, list[float]]:
    """The fit, and the leave-one-out error of each rung's log loss.

    Raises:
        UserError: there are too few rungs.
    """
    sizes = {rung["dim"] for rung in rungs}
    lengths = max((len({r["tokens"] for r in rungs if r["dim"] == s}) for s in sizes), default=0)
    if len(sizes) < MIN_SIZES or lengths < MIN_LENGTHS or len(rungs) < MIN_RUNGS:
        raise UserError(
            f"{len(rungs)} good rungs, of {len(sizes)} sizes and at most {lengths} lengths, are too"
            f" few for the fit: it needs {MIN_RUNGS}, of {MIN_SIZES} sizes and {MIN_LENGTHS}"
            " lengths. Train those that are left out, or a ladder with more --sizes or --seeds in"
            " another --out"
        )
    corpus = split_tokens(ladder.base, "train")
    runs = [
        (*law.effective(rung["parameters"], rung["tokens"], corpus), rung["loss"]) for rung in rungs
    ]
    trunks = [(rung["dim"], rung["seed"]) for rung in rungs]
    best = law.fit_law(runs)
    noise = law.noise_of(runs, trunks, best)
    each = [error for trunk in noise for error in trunk]
    deviation = math.sqrt(sum(error**2 for error in each) / len(each))
    base = {key: get(ladder.base, key) for key in same_keys()}
    base["batch_tokens"] = batch_tokens(ladder.base)
    base["tokens"] = sorted({rung["tokens"] for rung in rungs})
    names = " and ".join(ladder.base.data.mixture or [ladder.base.data.dir])
    dataset = f"{names}, {corpus:,} training tokens"
    laws = law.resample(runs, trunks, best, noise)
    fit = Fit(best, laws, deviation, base, dataset, corpus, rungs)
    return fit, law.leave_one_out(runs, best)


def same_keys() -> list[str]:
    return [*(f"optimizer.{name}" for name in tables(Config())["optimizer"]), *SAME]


def get(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


# ---- what the law says


def best_run(ladder: Ladder, fit: Fit, flops: float) -> tuple[Config, int] | None:
    """The shape and the steps of the lowest predicted loss for so many FLOPs, up to MAX_EPOCHS and
    to a parameter per token of the text.

    Among runs with tokens per parameter as the rungs have them, if the text is enough for one.
    """
    corpus, found = split_tokens(ladder.base, "train"), []
    most = law.MAX_EPOCHS * corpus / batch_tokens(ladder.base)
    for width in law.WIDTHS:
        config = changed_config(ladder.base, family(width))
        size = law.parameters(config, vocabulary(config))
        steps = int(min(most, math.ceil(flops / step_flops(config))))
        if steps > 10 * ladder.base.optimizer.warmup_steps and size <= corpus:
            tokens = steps * batch_tokens(config)
            loss = fit.law.loss_on(size, tokens, corpus)
            found.append((not law.is_inside(fit, size, tokens), loss, config, steps))
    if not found:
        return None
    return min(found, key=lambda one: one[:2])[2:]


def predicted(fit: Fit, config: Config, steps: int) -> tuple[float, float, float]:
    """Low, predicted and high loss of a run."""
    size = law.parameters(config, vocabulary(config))
    return law.interval(fit, size, steps * batch_tokens(config))


def best_runs(ladder: Ladder, fit: Fit) -> list[Json]:
    """For multiples of the largest rung's compute, the best run, with its hours on one worker, up
    to the first that the text limits."""
    rows, largest = [], max(rung["flops"] for rung in fit.rungs)
    for factor in LARGER:
        if best := best_run(ladder, fit, factor * largest):
            config, steps = best
            seconds = ladder.speed.seconds(steps, step_flops(config))
            times = steps * step_flops(config) / largest
            rows.append({
                "times": times,
                "flops": steps * step_flops(config),
                "dim": config.model.dim,
                "layers": config.model.n_layers,
                "parameters": law.parameters(config, vocabulary(config)),
                "steps": steps,
                "tokens": steps * batch_tokens(config),
                "hours": seconds / 3600,
                "loss": predicted(fit, config, steps),
            })  # fmt: skip
            if times < 0.9 * factor:
                break
    return rows


def large_run(ladder: Ladder, fit: Fit) -> Path | None:
    """Writes OUT/large.toml, the best run for the rest of the hours on one worker (a GPU, or a
    share of the cores), unless the run has begun; None if the rest is not enough for a run."""
    path = ladder.out / "large.toml"
    if (ladder.out / "large").exists():
        return path if path.exists() else None
    flops = max(rung["flops"] for rung in fit.rungs)
    seconds = 3600 * ladder.hours * (1 - ladder.share)
    while True:  # the compute that takes so long depends on the best width for it
        best = best_run(ladder, fit, flops)
        if not best:
            return None
        config, steps = best
        factor = seconds / ladder.speed.seconds(steps, step_flops(config))
        if abs(math.log(factor)) < 0.01 or steps * step_flops(config) < 0.99 * flops:
            break
        flops *= factor
    changed = {
        "train.max_steps": steps,
        "train.out_dir": str(ladder.out / "large"),
        "train.eval_interval": max(1, steps // 10),
        "checkpoint.interval": max(1, steps // 10),
        "log.report": True,
    }
    large = changed_config(config, changed)
    taken = ladder.speed.seconds(steps, step_flops(config))
    head = (
        f"# The best run by {ladder.out}/fit.json for {seconds / 3600:.2g} hours of one of the"
        f" ladder's workers, at most\n# {law.MAX_EPOCHS} epochs of the text: it takes"
        f" {taken / 3600:.2g} of them.\n\n"
    )
    write_atomically(path, (head + dump_toml(large)).encode())
    return path


# ---- predictions, and what came of them


def predict(out: Path, fit: Fit, path: Path) -> None:
    """Adds the prediction of a run or a configuration to OUT/predictions.jsonl, if it is new.

    Raises:
        UserError: it has no length.
    """
    config = build_config(read_toml(path / "config.toml" if path.is_dir() else path))
    steps = config.train.max_steps
    if not steps:
        raise UserError(f"{path}: set train.max_steps, whose loss is asked for")
    run = resolve_path(config.train.out_dir) if path.is_file() else path.resolve()
    tokens = steps * batch_tokens(config)
    low, loss, high = predicted(fit, config, steps)
    row = {
        "run": str(run),
        "parameters": law.parameters(config, vocabulary(config)),
        "tokens": tokens,
        "flops": tokens * flops_per_token(config),
        "low": low,
        "predicted": loss,
        "high": high,
        "before": not (run / "metrics.jsonl").exists(),
        "differs": differences(fit, config),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    known = read_predictions(out)
    if any(all(row[k] == old[k] for k in row if k not in ("before", "time")) for old in known):
        return
    with open(out / "predictions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def differences(fit: Fit, config: Config) -> list[str]:
    """What a run does unlike the rungs, so that the law may not hold for it."""
    expected = fit.base | family(config.model.dim)
    found = [
        f"{key}={get(config, key)} (rungs: {value})"
        for key, value in expected.items()
        if "." in key and get(config, key) != value
    ]
    depths = {law.shape(rung["dim"])["n_layers"] for rung in fit.rungs}
    layers = expected["model.n_layers"]
    if len(depths) == 1 and config.model.n_layers == layers not in depths:
        found.append(f"model.n_layers={config.model.n_layers} (rungs: {depths.pop()})")
    size, tokens = (
        law.parameters(config, vocabulary(config)),
        config.train.max_steps * batch_tokens(config),
    )
    if not law.is_inside(fit, size, tokens):
        low, high = law.tokens_per_parameter(fit)
        found.append(f"tokens per parameter: {tokens / size:.3g} (rungs: {low:.3g} to {high:.3g})")
    repeated = max(rung["tokens"] for rung in fit.rungs) / fit.corpus
    if tokens / fit.corpus > max(law.FRESH_EPOCHS, 1.1 * repeated):
        found.append(f"epochs: {tokens / fit.corpus:.3g} (rungs: at most {repeated:.3g})")
    if size > fit.corpus:
        found.append(f"more parameters than the text has tokens ({fit.corpus:,.0f})")
    return found


def read_predictions(out: Path) -> list[Json]:
    """The rows of OUT/predictions.jsonl."""
    try:
        return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        raise UserError(f"{out / 'predictions.jsonl'}: damaged; repair or move it") from None


def outcomes(out: Path) -> list[Json]:
    """The predictions, each with its run's `loss` and `error` (relative, of the prediction) once
    it is finished."""
    rows = read_predictions(out)
    for row in rows:
        if loss := final_loss(Path(row["run"])):
            row |= {"loss": loss, "error": row["predicted"] / loss - 1}
            row["held"] = row["low"] <= loss <= row["high"]
    return rows


# ---- report


def plan_lines(ladder: Ladder) -> list[str]:
    """The plan in words, with its costs."""
    lines = []
    for chain in sorted(ladder.chains(), key=lambda chain: chain[0].width):
        steps = [rung.steps for rung in reversed(chain)]
        trunk = chain[0]
        size = law.parameters(trunk.config, vocabulary(trunk.config))
        tokens = trunk.steps * batch_tokens(trunk.config)
        seed = f"seed {trunk.config.train.seed} " * (ladder.seeds > 1)
        lines.append(
            f"dim {trunk.width:<5} {seed}{trunk.config.model.n_layers:>2} layers"
            f"  N {short(size):>7}  steps {', '.join(map(str, steps))}: to {short(tokens)} tokens,"
            f" {tokens * flops_per_token(trunk.config):.1e} FLOPs,"
            f" {ladder.seconds(chain) / 60:.1f} min"
        )
    share = 60 * ladder.hours * ladder.share
    at = f"{ladder.at_once} at a time" if ladder.at_once > 1 else "one after another"
    runs = sum(map(len, ladder.chains()))
    if ladder.total() < 50 * share * MARGIN:
        lines.append(f"the text limits the lengths: no run is longer than {law.MAX_EPOCHS} epochs")
    lines.append(
        f"{runs} runs, {at}: {ladder.total() / 60:.1f} of the {share:.1f} minutes that the ladder"
        f" may take ({ladder.share:.0%} of {ladder.hours:g} h)"
    )
    return lines


def between(low: float, loss: float, high: float) -> str:
    return f"{loss:.3f} ({low:.3f} to {high:.3f})"


def fit_lines(fit: Fit, errors: list[float], best: list[Json]) -> list[str]:
    """The report as lines."""
    lines = [f"L(N, D) = E + A / N^alpha + B / D^beta, of {len(fit.rungs)} rungs:"]
    for name in Law._fields:
        values = sorted(getattr(one, name) for one in fit.laws)
        cut = int((1 - law.CONFIDENCE) / 2 * len(values))
        low, high = values[cut], values[-1 - cut]
        lines.append(f"  {name:<6}{getattr(fit.law, name):>10.4g}  {low:.4g} to {high:.4g}")
    mean = math.sqrt(sum(error**2 for error in errors) / len(errors))
    worst = max(range(len(errors)), key=lambda i: abs(errors[i]))
    lines.append(
        f"leave-one-out errors: {mean:.2%} (root mean square), worst {errors[worst]:+.2%}"
        f" ({fit.rungs[worst]['name']})"
    )
    if mean > DOUBTFUL:
        lines.append(
            f"warning: errors above {DOUBTFUL:.0%}: the law does not hold for these rungs. Are the"
            " shortest too short, or is the rate wrong for some? Give more --hours or a larger"
            " --share, or look for a better rate"
        )
    lines.append("best run for multiples of the largest rung's compute:")
    for row in best:
        lines.append(
            f"  {row['times']:>4.1f}×  dim {row['dim']:<5} {row['layers']:>2} layers,"
            f" {row['steps']:,} steps ({short(row['tokens'])} tokens), {row['hours']:.2f} h:"
            f" loss {between(*row['loss'])}"
        )
    return lines


def outcome_line(row: Json) -> str:
    told = f"{row['run']}: predicted {between(row['low'], row['predicted'], row['high'])}"
    if "loss" in row:
        inside = "inside" if row["held"] else "outside"
        told += f", got {row['loss']:.3f}: error {row['error']:+.2%}, {inside} the interval"
    told += "" if row["before"] else ", predicted when the run had begun"
    return told + "".join(f"\n  unlike the rungs: {one}" for one in row["differs"])


def page_lines(fit: Fit, best: list[Json], results: list[Json]) -> list[Line]:
    """The curves of the page: each size's rungs, the best runs, the predictions and outcomes."""
    lines = []
    for style, width in enumerate(sorted({rung["dim"] for rung in fit.rungs})):
        points = [(r["flops"], r["loss"]) for r in fit.rungs if r["dim"] == width]
        lines.append(Line(f"dim {width}", style, points, marked=True))
    frontier = [(row["flops"], row["loss"][1]) for row in best]
    lines.append(Line("best", len(lines), frontier, marked=False))
    for row in results:
        name = Path(row["run"]).name
        interval = [(row["flops"], row["low"]), (row["flops"], row["high"])]
        lines.append(Line(f"{name} predicted", len(lines), interval, marked=False))
        if "loss" in row:
            lines.append(Line(name, len(lines), [(row["flops"], row["loss"])], marked=True))
    return lines


def page(
    fit: Fit, errors: list[float], bad: dict[str, str], best: list[Json], results: list[Json]
) -> bytes:
    """The page of a ladder."""
    curves = page_lines(fit, best, results)
    facts = {name: short(value) for name, value in fit.law._asdict().items()}
    facts |= {"Rungs": str(len(fit.rungs)), "Noise of a run": f"{fit.noise:.2%}"}
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    rungs = [
        {
            "rung": text(rung["name"]),
            "parameters": short(rung["parameters"]),
            "tokens": short(rung["tokens"]),
            "FLOPs": short(rung["flops"], 3),
            "loss": f"{rung['loss']:.4f}",
            "fitted": f"{law.interval(fit, rung['parameters'], rung['tokens'])[1]:.4f}",
            "without it": f"{error:+.2%}",
        }
        for rung, error in zip(fit.rungs, errors, strict=True)
    ]
    budgets = [
        {
            "times the largest rung": f"{row['times']:.1f}",
            "FLOPs": short(row["flops"], 3),
            "dim": str(row["dim"]),
            "layers": str(row["layers"]),
            "tokens": short(row["tokens"]),
            "hours of one worker": f"{row['hours']:.2f}",
            "predicted loss": between(*row["loss"]),
        }
        for row in best
    ]
    told = [
        {
            "run": text(row["run"]),
            "predicted": between(row["low"], row["predicted"], row["high"]),
            "loss": f"{row['loss']:.4f}" if "loss" in row else "–",
            "error": f"{row['error']:+.2%}" if "loss" in row else "–",
            "inside": {True: "yes", False: "no"}.get(row.get("held"), "–"),
            "written": text(row["time"] + ("" if row["before"] else ", after the run began")),
            "unlike the rungs": text(", ".join(row["differs"]) or "–"),
        }
        for row in results
    ]
    left = [{"left out": text(name), "why": text(why)} for name, why in bad.items()]
    body = (
        f"<header><h1>Ladder</h1><p>{text(fit.dataset)}. L(N, D) = E + A / N<sup>α</sup> + B /"
        " D<sup>β</sup>, nats per token; N without the input embedding. Intervals hold a single"
        f" run in {law.CONFIDENCE:.0%} of cases.</p></header><dl>{cards}</dl>"
        f"{log_figure('Validation loss against compute', 'nats per token', 'FLOPs', curves)}"
        f"<h2>Predictions</h2>{table(told, 'Predictions')}"
        f"<h2>Best run by compute</h2>{table(budgets, 'Best runs')}"
        f"<h2>Rungs</h2>{table(rungs, 'Rungs')}{table(left, 'Left out')}"
    )
    return whole_page("Ladder", body)


def main(arguments: list[str]) -> None:
    config, flags = load_config(arguments, usage=str(__doc__), flags=FLAGS)
    options = read_flags(flags)
    out = resolve_path(options.pop("out", "out/ladder"))
    only = [name for name in ("plan", "tasks", "fit") if options.pop(name, False)]
    asked = (path := options.pop("predict", "")) and existing_path(path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the runs, as Ctrl-C does
    planned = read_plan(out, config, options)
    if only == ["fit"] and not planned:
        raise UserError(f"{out}: no ladder; see --out")
    if "tasks" in only and not planned and "flops" not in options:
        raise UserError("--tasks: give --flops, what training reaches per second on a task's GPU")
    ladder = planned or new_ladder(config, options, out)
    if "plan" in only:
        print(*plan_lines(ladder), sep="\n")
        return
    if not planned:
        write_plan(ladder)
    if "tasks" in only:
        for chain in sorted(ladder.chains(), key=len, reverse=True):
            print(*(out / f"{rung.name}.toml" for rung in chain))
        return
    print(*plan_lines(ladder), sep="\n", flush=True)
    if "fit" not in only and not asked:
        train(ladder)
    rungs, bad = collect(ladder)
    for name, why in bad.items():
        print_error(f"left out: {name}: {why}")
    fit, errors = fit_ladder(ladder, rungs)
    law.write_fit(out / "fit.json", fit)
    for path in filter(None, (large_run(ladder, fit), asked)):
        predict(out, fit, path)
    best, results = best_runs(ladder, fit), outcomes(out)
    print(*fit_lines(fit, errors, best), *map(outcome_line, results), sep="\n")
    write_atomically(out / "ladder.html", page(fit, errors, bad, best, results))
    print(f"{out / 'fit.json'}, {out / 'ladder.html'}")
    if (out / "large.toml").exists() and not (out / "large").exists():
        print(f"next: python rocket.py {out / 'large.toml'}, then this command again")


if __name__ == "__main__":
    run_program(main)
