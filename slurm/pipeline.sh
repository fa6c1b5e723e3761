#!/usr/bin/env bash
# The whole path of CONFIG as jobs that wait for each other: tokenizer, dataset, training.
#
#   [TASKS=8] slurm/pipeline.sh CONFIG [--section.key=value …]     prints the id of the training job
#
# Run on the login node. If a job fails, those after it vanish from the queue; the same command again
# goes on where it was.
set -euo pipefail

script=pipeline here=$(dirname "$0")
. "$here/common.sh"

# What needs the network happens here, before anything is submitted: compute nodes may have none.
run=$("$python" "$ROCKET_ROOT/config.py" "$@")
say "for $run"
"$python" "$ROCKET_ROOT/prepare.py" "$@" --download >&2

tokenizer=$("$here/train_tokenizer.sh" "$@")
dataset=$(AFTER=$tokenizer "$here/prepare.sh" "$@")
AFTER=$dataset "$here/train.sh" "$@"
