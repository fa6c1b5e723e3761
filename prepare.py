"""python prepare.py [CONFIG] [--section.key=value …] [--force]
python prepare.py [CONFIG] [--section.key=value …] --download | --task=I/N | --verify
python prepare.py [CONFIG] [--section.key=value …] --inspect | --bad-steps

Tokenizes the sources of CONFIG into the packed dataset `data.dir`, on all cores. After a kill, the
same command continues; when all is done, it says "up to date". To share the work among several
machines, start N tasks of a job array with --task=I/N. When they have ended, run once without
--task, to do what is missing and to publish the dataset.
"""

from __future__ import annotations

from config import check_command_line

FLAGS = {
    "--force": "prepare again, and replace the dataset that exists",
    "--download": "fetch the hf:// sources into data.raw_dir, and nothing else",
    "--task=I/N": "tokenize only parts I, I + N, I + 2N, … (I from 0 on), and publish nothing",
    "--verify": "read all of a prepared dataset and check it against its manifest",
    "--inspect": "describe a prepared dataset: lengths, rates, first documents, a picture",
    "--bad-steps": "print the texts of the training steps that the run in train.out_dir skipped",
}

if __name__ == "__main__":  # --help and mistakes are answered before the slow imports below
    check_command_line(usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS)

import re
from pathlib import Path

from config import ConfigError, load_config, resolve_path, run_program
from corpus import build, hub, inspection
from tokenizer import Tokenizer, configured_tokenizer


def main(arguments: list[str]) -> None:
    config, flags = load_config(
        arguments, usage=__doc__, sections=("tokenizer", "data"), flags=FLAGS
    )
    task = read_task(flags)
    if "--download" in flags:
        hub.download(config.data)
        return
    if "--bad-steps" in flags:
        inspection.show_bad_steps(config)
        return
    for directory in map(resolve_path, config.data.mixture or [config.data.dir]):
        if "--verify" in flags:
            build.verify(directory)
            continue
        tokenizer = configured_tokenizer(config.tokenizer)
        if "--inspect" in flags:
            inspection.inspect(directory, tokenizer)
        elif config.data.mixture:
            check_prepared(directory, tokenizer)
        else:
            build.prepare(directory, config.data, tokenizer, task, "--force" in flags)


def read_task(flags: list[str]) -> build.Task | None:
    """The task that --task gives; ConfigError for no such task, or another flag beside it."""
    texts = [flag.partition("=")[2] for flag in flags if flag.startswith("--task=")]
    if not texts:
        return None
    if len(flags) > 1:
        raise ConfigError(f"--task allows no other flag, got {' '.join(sorted(flags))}")
    match = re.fullmatch("([0-9]+)/([0-9]+)", texts[0])
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"--task is I/N with I from 0 to N - 1, such as 0/4, not {texts[0]!r}; in a job array"
            " from 0: --task=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return build.Task(int(match[1]), int(match[2]))


def check_prepared(directory: Path, tokenizer: Tokenizer) -> None:
    """UserError unless a dataset of data.mixture is there, complete and made with the tokenizer."""
    from dataset import read_manifest  # here, since it loads torch, which preparing does not need

    read_manifest(directory, tokenizer.sha256)
    build.say(f"{directory}: ready (each dataset of a mixture has a configuration of its own)")


if __name__ == "__main__":
    run_program(main)
