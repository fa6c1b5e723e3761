"""python prepare.py [CONFIG] [--section.key=value …] [--force]
python prepare.py [CONFIG] [--section.key=value …] --download | --task=I/N | --verify | --inspect

Tokenizes the sources of CONFIG into the packed dataset `data.dir`, on all cores. A killed run goes
on where it was; a finished one says "up to date". On several machines: N tasks of a job array with
--task=I/N, and when they have ended, a run without it, which does what is missing and publishes.
"""

from __future__ import annotations

from config import check_command_line

FLAGS = {
    "--force": "prepare anew, replacing a dataset that exists",
    "--download": "fetch the hf:// sources into data.raw_dir, and nothing else",
    "--task=I/N": "tokenize every Nth part, from part I on (0 to N - 1), and publish nothing",
    "--verify": "read a prepared dataset whole and check it against its manifest",
    "--inspect": "describe a prepared dataset: lengths, rates, first documents, a picture",
    "--bad-steps": "print the texts of the training steps that the run in train.out_dir skipped",
}

if __name__ == "__main__":  # before imports that take longer than this
    check_command_line(usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS)

import re

from config import ConfigError, load_config, resolve_path, run_program
from corpus import hub, inspection
from corpus.build import Task, process


def main(arguments: list[str]) -> None:
    config, flags = load_config(
        arguments, usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS
    )
    task = read_task(flags)
    if "--download" in flags:
        hub.download(config.data)
    elif "--bad-steps" in flags:
        inspection.show_bad_steps(config)
    else:
        for directory in map(resolve_path, config.data.mixture or [config.data.dir]):
            process(directory, config, task, flags)


def read_task(flags: list[str]) -> Task | None:
    """The task that the flags name; ConfigError if there is none such, or another flag with it."""
    texts = [flag.partition("=")[2] for flag in flags if flag.startswith("--task=")]
    if not texts:
        return None
    if len(flags) > 1:
        raise ConfigError(f"--task goes alone, not {' '.join(sorted(flags))}")
    match = re.fullmatch("([0-9]+)/([0-9]+)", texts[0])
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"--task is I/N with I from 0 to N - 1, such as 0/4, not {texts[0]!r}; in a job array"
            " from 0: --task=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return Task(int(match[1]), int(match[2]))


if __name__ == "__main__":
    run_program(main)
