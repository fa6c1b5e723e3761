#!/usr/bin/env bash
# Trains CONFIG on one node or many. The job requeues itself until the run is finished.
#
#   slurm/train.sh CONFIG [--section.key=value …]                     submits itself
#   sbatch [--nodes=4 …] slurm/train.sh CONFIG [--section.key=value …]
#
# Arguments after -- are the tasks of a job array (see sweep.sh): each is a string of overrides.
# The number of workers per node is NPROC_PER_NODE, else the job's GPUs there, else its tasks there,
# else 1.
#
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
##SBATCH --gpus-per-node=8
##SBATCH --cpus-per-gpu=8
set -euo pipefail

# After a signal, the run saves and stops. Slurm sends USR1 only to this shell; this shell passes it
# to srun, srun to the agents (torchrun, one per node), and they to the workers. TERM needs no help:
# at preemption, scancel or the time limit, Slurm sends it to all processes.
# srun and the agents ignore USR1 while they start. So this script also writes a file. Agents that
# start, and rank 0, look for it.
stopping='' srun='' note=''
stop() {
    stopping=$1
    [ "$1" != TERM ] || return 0
    [ -z "$note" ] || : >"$note" || true
    [ -z "$srun" ] || kill -USR1 "$srun" 2>/dev/null || true
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

script=train here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=${ROCKET_ROOT:-${SLURM_SUBMIT_DIR:-}}/slurm # $0 is Slurm's copy
[ -f "$here/common.sh" ] || { echo "train.sh: submit from the repository or set ROCKET_ROOT" >&2; exit 1; }
. "$here/common.sh"

if [ -z "${SLURM_JOB_ID:-}" ]; then # on the login node: reports a mistake before it submits
    run=$("$python" "$ROCKET_ROOT/config.py" "$@")
    say "trains $run"
    submit "$0" "$@"
    exit
fi

arguments=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do arguments+=("$1"); shift; done
if [ $# -gt 0 ]; then
    shift "$((SLURM_ARRAY_TASK_ID + 1))"
    read -ra overrides <<<"$1"
    arguments+=("${overrides[@]}")
fi

# `job` is the id for Slurm's commands. The SLURM_JOB_ID of one task of an array is the id of the
# whole array: requeueing it would start finished tasks again.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}

# The job's comment is the run directory. So a requeued job keeps its directory even if somebody has
# edited CONFIG. A successor (see `succeed`) is submitted with the same comment.
comment=$(squeue -h -j "$job" -o %k) || true
if [[ $comment == run=* ]]; then
    run=${comment#run=} returning=yes
else
    run=$("$python" "$ROCKET_ROOT/config.py" "${arguments[@]}") returning=''
    [ "$restarts" = 0 ] || returning=yes
    scontrol update JobId="$job" Comment="run=$run" || say "no comment: CONFIG must not change now"
fi

# --output is fixed before this script knows the run directory, so the output is copied there.
mkdir -p "$run/logs"
exec > >(trap '' TERM INT HUP USR1 USR2; exec tee -a "$run/logs/$script-$job.log") 2>&1
tee=$!
trap 'exec >&- 2>&-; wait "$tee" || true' EXIT # when this shell ends, Slurm kills tee
say "job $job, restart $restarts, on ${SLURM_JOB_NODELIST:-}: $run"

# Calls attempts.py: the run's own copy if the job trains with the run's own copy of the code.
attempts() { "$python" "$tool" "$@"; }

# Chooses what the next attempt runs. A requeued job, or a later attempt, runs the code and the
# configuration with which the run began, so that no edit changes a waiting job. But if this job has
# not written them yet, it keeps its own arguments: otherwise its overrides would be lost.
choose_program() {
    program=$ROCKET_ROOT/rocket.py tool=$ROCKET_ROOT/attempts.py
    [ -n "$returning" ] || return 0
    [ ! -f "$run/code/attempts.py" ] || tool=$run/code/attempts.py
    local opened
    opened=$(attempts opened "$run") || fail "attempts.py failed; the reason is above"
    # A successor got these arguments from the job before it.
    if [ -n "$opened" ] || [ "${arguments[*]}" = "$run/config.toml" ]; then
        program=$run/code/rocket.py arguments=("$run/config.toml")
    fi
}

# Trains until srun ends. torchrun gets no --max-restarts: it would try a wrong configuration N
# times, but attempts.py decides what is worth another attempt.
train() {
    local nodes=$SLURM_JOB_NUM_NODES hosts workers
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    workers=$((${SLURM_NTASKS:-$nodes} / nodes))
    workers=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$workers}}
    workers=$((workers > 0 ? workers : 1))
    local torchrun=(
        --nnodes="$nodes" --nproc-per-node="$workers"
        --rdzv-backend=c10d --rdzv-id="$ROCKET_ATTEMPT"
        --rdzv-endpoint="${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))"
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
        --shutdown-timeout=150 # less than the 180 s between USR1 and the time limit
    )
    local threads=$((${SLURM_CPUS_ON_NODE:-1} / workers)) # of the cores that the job has
    # --wait, not --kill-on-bad-exit: when the first agent ends, the others may still be saving.
    # USR1 is ignored until torchrun has installed its handlers, or it would kill the agent.
    # shellcheck disable=SC2016 # the task expands the variables
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} \
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait=60 \
        bash -c 'trap "" USR1
            exec "$0" "$1" agent "$2" "$ROCKET_ATTEMPT" \
                --rdzv-conf=is_host=$((SLURM_NODEID == 0)) --local-addr="$SLURMD_NODENAME" "${@:3}"' \
        "$python" "$tool" "$run" "${torchrun[@]}" "$program" "${arguments[@]}" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a trap makes wait return
    srun=''
    # If srun itself was killed, its step still runs, and would train beside the next attempt.
    local step
    while step=$(squeue -h --steps -j "$job" -o %i | grep -vE 'batch|extern'); do
        scancel $step || true
        sleep 1
    done
}

# Prints the state of this job and Slurm's reason for it.
job_state() {
    local tries
    for tries in 1 2 3 4 5 6; do # the controller may be restarting
        squeue -h -j "$job" -o '%T %r' && return
        sleep "$((tries * 2))"
    done
}

# Requeues this job and exits. It must be quick: Slurm may be about to kill the job.
come_back() {
    trap '' TERM # Slurm ends the script with TERM, but exclude_sick must still run after that
    # Only in these states: scontrol requeue would also requeue a job that scancel is ending. At the
    # time limit, the state is COMPLETING with the reason TimeLimit.
    local state
    state=$(job_state)
    case $state in
        RUNNING* | 'COMPLETING TimeLimit') say "comes back: $why" ;;
        *)
            if [[ $(job_field Restarts) -gt $restarts ]]; then
                say "comes back, by Slurm's own doing: $why"
                exclude_sick
                exit 0
            fi
            attempts cancelled "$run" "$ROCKET_ATTEMPT" "the job is ${state:-gone}"
            fail "not requeued, the job is ${state:-gone}: $why"
            ;;
    esac
    scontrol requeue "$job" || succeed
    exclude_sick
    exit 0
}

job_field() { scontrol show job -o "$job" | grep -oP "(?<= $1=)\S+"; }

# Sets `options` to the sbatch flags that ask for the resources of this job.
resources() {
    local flags=(job-name partition account qos time mem constraint reservation gres nodelist)
    local values i
    options=(
        --nodes="$SLURM_JOB_NUM_NODES" # squeue loses this number while the job ends
        ${SLURM_NTASKS:+--ntasks="$SLURM_NTASKS"}
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
        ${SLURM_MEM_PER_CPU:+--mem-per-cpu="$SLURM_MEM_PER_CPU"}
    )
    IFS='|' read -ra values < <(squeue -h -j "$job" -o '%j|%P|%a|%q|%l|%m|%f|%v|%b|%n')
    for i in "${!values[@]}"; do
        case ${values[i]} in
            '' | '(null)' | N/A | 0 | [0-9]*[KMGT]c) ;; # not asked for, or memory per CPU
            *) options+=(--"${flags[i]}=${values[i]#gres[:/]}") ;;
        esac
    done
}

# Removes from the environment what sbatch would pass on to the new job (such as the restart count),
# and what `options` replaces.
forget_job() {
    local name
    for name in "${!SLURM_@}"; do
        [ "$name" = SLURM_CONF ] || unset "$name"
    done
    unset SBATCH_GRES SBATCH_GPUS_PER_NODE
}

# Prints the nodes that the job must not get: those that it excludes already and, if enough other
# nodes are left, the sick ones.
nodes_to_exclude() {
    local before after
    before=$(job_field ExcNodeList)
    [ "$before" = '(null)' ] && before='' || before=$(scontrol show hostnames "$before")
    after=$(printf '%s\n%s' "$before" "${sick//,/$'\n'}" | grep . | sort -u | paste -sd,) || true
    if [ -n "$sick" ] && ! (
        resources
        forget_job
        sbatch --test-only "${options[@]}" --exclude="$after" --wrap=true
    ) 2>/dev/null; then
        say "$sick: sick, but there are too few nodes to do without"
        after=$(paste -sd, <<<"$before")
    fi
    echo "$after"
}

exclude_sick() {
    [ -n "$sick" ] || return 0
    local nodes
    nodes=$(nodes_to_exclude)
    [ -z "$nodes" ] || ! scontrol update JobId="$job" ExcNodeList="$nodes" || say "does without $nodes"
}

# Submits a job like this one (the successor), which starts when this one has ended. Used if the
# site forbids requeueing.
succeed() {
    local options nodes output
    resources
    nodes=$(nodes_to_exclude)
    output=$(job_field StdOut)
    options+=(${nodes:+--exclude="$nodes"} --output="$output")
    returning=yes
    choose_program
    # Killed processes leave claim.json, and other hosts would respect it until it expires.
    ! grep -qs "\"job_id\": \"$SLURM_JOB_ID\"" "$run/claim.json" || rm -f "$run/claim.json"
    forget_job
    submit --dependency=afterany:"$job" --comment="run=$run" "${options[@]}" \
        "$ROCKET_ROOT/slurm/train.sh" "${arguments[@]}"
    exit
}

# Ends the job for good, even if Slurm has requeued it.
give_up() {
    [[ $(job_field Restarts) -le $restarts ]] || scancel "$job"
    fail "not requeued: $1"
}

for ((number = 1; ; number++)); do
    export ROCKET_ATTEMPT=$job-$restarts-$number # the id of this attempt
    note=$run/logs/signal.$ROCKET_ATTEMPT
    asked='' sick=''
    [ "$number$returning" != 1 ] || asked=yes
    choose_program
    attempts begin "$ROCKET_ATTEMPT" "$asked" "${arguments[@]}" || give_up "the reason is above"
    [ -n "$stopping" ] || train
    [ ! -f "$run/code/attempts.py" ] || tool=$run/code/attempts.py # nobody edits this copy
    verdict=$(attempts judge "$run" "$ROCKET_ATTEMPT" "$stopping") || verdict='||the reason is above'
    IFS='|' read -r action sick why <<<"$verdict"
    case $action in
        done) exit 0 ;;
        back) come_back ;;
        again)
            [[ $(job_state) == RUNNING* ]] || come_back
            say "another attempt, for it had saved something new: $why"
            returning=yes
            ;;
        *) give_up "$why" ;;
    esac
done
