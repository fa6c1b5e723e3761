#!/usr/bin/env bash
# Submits tokenizer, dataset and training of CONFIG as jobs, each of which waits for the one before.
#
#   [TASKS=8] slurm/pipeline.sh CONFIG [--section.key=value …]     prints the id of the training job
#
# Run it on the login node. If a job fails, the jobs after it are cancelled. Then run the same
# command again: it continues from there.
set -euo pipefail

script=pipeline here=$(dirname "$0")
. "$here/common.sh"

# Compute nodes may have no network, so the download happens here, before anything is submitted.
run=$("$python" "$ROCKET_ROOT/config.py" "$@")
say "for $run"
"$python" "$ROCKET_ROOT/prepare.py" "$@" --download >&2

tokenizer=$("$here/train_tokenizer.sh" "$@")
dataset=$(AFTER=$tokenizer "$here/prepare.sh" "$@")
AFTER=$dataset "$here/train.sh" "$@"
