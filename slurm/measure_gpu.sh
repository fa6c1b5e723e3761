#!/usr/bin/env bash
# Measures training and sampling on one H100, in under 8 minutes, into the directory OUT. It needs no
# dataset. Where there is no sbatch it runs at once.
#
#   slurm/measure_gpu.sh OUT     prints the id of the job
#
# It has not run on a GPU yet: micro-batch sizes and minutes are estimates. Goals: 110M at 513,000
# tokens/s (40% MFU, stretch 578,000), 1.1B at 61,000 (45%, stretch 68,000).
#
#SBATCH --job-name=measure
#SBATCH --time=00:15:00
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --open-mode=append
set -euo pipefail

script=measure_gpu here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "measure_gpu.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

if [ -z "${SLURM_JOB_ID:-}" ] && command -v sbatch >/dev/null; then
    submit "$0" "$@"
    exit
fi
out=$1
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv | tee "$out/gpu.csv"

# measure SECONDS NAME BENCHMARK …: one that fails or takes too long does not cost the others.
failed=''
measure() {
    local seconds=$1 name=$2
    shift 2
    say "$name: python bench.py $*"
    timeout "$seconds" python "$ROCKET_ROOT/bench.py" "$@" --train.device=cuda \
        --train.dtype=bfloat16 --json="$out/$name.json" 2>&1 | tee "$out/$name.txt" || failed+=" $name"
}

# A GPU compiles by itself. Both micro-batch sizes are on the card at the same time.
measure 170 training_110m training config/llama_110m.toml --repeats=3 --steps=5 \
    --train.global_batch_size=128 --train.micro_batch_size=32 \
    --versus=--train.micro_batch_size=64 --trace="$out/trace_110m.json"
measure 160 training_1b training config/llama_1b.toml --repeats=3 --steps=3 \
    --parallel.strategy=ddp --train.global_batch_size=64 --train.micro_batch_size=8
measure 120 sampling_110m sampling config/llama_110m.toml --repeats=3 --batch=1,8,64
[ -z "$failed" ] || fail "failed or took too long:$failed"
