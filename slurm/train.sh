#!/usr/bin/env bash
# Trains CONFIG on one node or many, and comes back until the run is finished.
#
#   slurm/train.sh CONFIG [--section.key=value …]                     submits itself
#   sbatch [--nodes=4 …] slurm/train.sh CONFIG [--section.key=value …]
#
# Arguments behind a lone -- are tasks of a job array (see sweep.sh): each is a string of overrides.
# Workers a node: NPROC_PER_NODE, else the GPUs that the job has there, else its tasks there, else 1.
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

# Signals stop the run in good order. Slurm sends USR1 to this shell alone; srun relays it to the
# agents, they to the workers. TERM it sends to all by itself: at preemption, scancel or the limit.
# Until the workers are there USR1 is lost on that way: srun ignores it in its first moments, and so
# do agents. So it is written down too, for agents that are starting and for rank 0.
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

if [ -z "${SLURM_JOB_ID:-}" ]; then # on the login node, where a mistake shows at once
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

# The name by which Slurm's commands know this job. The SLURM_JOB_ID of one task of an array is the
# whole array's: requeueing that would bring finished tasks back.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}

# The job's comment keeps the run directory, so that an edit of CONFIG does not send a job that
# comes back to another one. A successor is submitted with it.
comment=$(squeue -h -j "$job" -o %k) || true
if [[ $comment == run=* ]]; then
    run=${comment#run=} returning=yes
else
    run=$("$python" "$ROCKET_ROOT/config.py" "${arguments[@]}") returning=''
    [ "$restarts" = 0 ] || returning=yes
    scontrol update JobId="$job" Comment="run=$run" || say "no comment: CONFIG must not change now"
fi

# --output is fixed before this script runs, so what it prints is copied to the run.
mkdir -p "$run/logs"
exec > >(trap '' TERM INT HUP USR1 USR2; exec tee -a "$run/logs/$script-$job.log") 2>&1
tee=$!
trap 'exec >&- 2>&-; wait "$tee" || true' EXIT # Slurm kills what is left when this shell ends
say "job $job, restart $restarts, on ${SLURM_JOB_NODELIST:-}: $run"

# Asks attempts.py, the run's own copy where that is what trains.
attempts() { "$python" "$tool" "$@"; }

# What the next attempt runs. One that comes back runs the code and the configuration with which the
# run began, so that nobody's edit changes a job that waits; but only if this job got so far as to
# write them, else its own overrides would be lost.
choose_program() {
    program=$ROCKET_ROOT/rocket.py tool=$ROCKET_ROOT/attempts.py
    [ -n "$returning" ] || return 0
    [ ! -f "$run/code/attempts.py" ] || tool=$run/code/attempts.py
    local opened
    opened=$(attempts opened "$run") || fail "attempts.py failed; the reason is above"
    # The arguments of a successor were chosen in this way by the job before it.
    if [ -n "$opened" ] || [ "${arguments[*]}" = "$run/config.toml" ]; then
        program=$run/code/rocket.py arguments=("$run/config.toml")
    fi
}

# Trains until srun ends. torchrun gets no --max-restarts: it would try a bad configuration N times,
# where attempts.py knows what is worth trying again.
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
        --shutdown-timeout=150 # of the 180 s between USR1 and the limit
    )
    local threads=$((${SLURM_CPUS_ON_NODE:-1} / workers)) # of what the job was given
    # --wait, not --kill-on-bad-exit: the first agent to go must not end those that still save.
    # USR1 is ignored until torchrun has its handlers, or it would kill the agent.
    # shellcheck disable=SC2016 # the variables are the task's
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} \
        srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait=60 \
        bash -c 'trap "" USR1
            exec "$0" "$1" agent "$2" "$ROCKET_ATTEMPT" \
                --rdzv-conf=is_host=$((SLURM_NODEID == 0)) --local-addr="$SLURMD_NODENAME" "${@:3}"' \
        "$python" "$tool" "$run" "${torchrun[@]}" "$program" "${arguments[@]}" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # a trap ends wait early
    srun=''
    # Where srun itself was killed its step goes on, and would train beside the next attempt.
    local step
    while step=$(squeue -h --steps -j "$job" -o %i | grep -vE 'batch|extern'); do
        scancel $step || true
        sleep 1
    done
}

# STATE REASON of this job.
job_state() {
    local tries
    for tries in 1 2 3 4 5 6; do # the controller may be restarting
        squeue -h -j "$job" -o '%T %r' && return
        sleep "$((tries * 2))"
    done
}

# Sends this job back to the queue, and exits: at once, since Slurm is about to kill it.
come_back() {
    trap '' TERM # which it does with TERM, and the sick nodes are named only after that
    # scontrol requeue would bring back what scancel is ending, too. At the time limit Slurm says
    # why it ends the job.
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

# Sets `options`: the flags that ask sbatch for what this job has.
resources() {
    local flags=(job-name partition account qos time mem constraint reservation gres nodelist)
    local values i
    options=(
        --nodes="$SLURM_JOB_NUM_NODES" # squeue forgets it while the job ends
        ${SLURM_NTASKS:+--ntasks="$SLURM_NTASKS"}
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
        ${SLURM_MEM_PER_CPU:+--mem-per-cpu="$SLURM_MEM_PER_CPU"}
    )
    IFS='|' read -ra values < <(squeue -h -j "$job" -o '%j|%P|%a|%q|%l|%m|%f|%v|%b|%n')
    for i in "${!values[@]}"; do
        case ${values[i]} in
            '' | '(null)' | N/A | 0 | [0-9]*[KMGT]c) ;; # not asked for, or memory a CPU
            *) options+=(--"${flags[i]}=${values[i]#gres[:/]}") ;;
        esac
    done
}

# Takes from the environment what sbatch would hand on (a restart count, for one) or `options` say.
forget_job() {
    local name
    for name in "${!SLURM_@}"; do
        [ "$name" = SLURM_CONF ] || unset "$name"
    done
    unset SBATCH_GRES SBATCH_GPUS_PER_NODE
}

# The nodes that the job is not to have: those that it has excluded before and, if Slurm finds others
# for it, the sick ones.
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

# Where requeueing is forbidden: submits a job like this one, to start when this one has ended.
succeed() {
    local options nodes output
    resources
    nodes=$(nodes_to_exclude)
    output=$(job_field StdOut)
    options+=(${nodes:+--exclude="$nodes"} --output="$output")
    returning=yes
    choose_program
    # What was killed left its claim, which other hosts would honour until it expires.
    ! grep -qs "\"job_id\": \"$SLURM_JOB_ID\"" "$run/claim.json" || rm -f "$run/claim.json"
    forget_job
    submit --dependency=afterany:"$job" --comment="run=$run" "${options[@]}" \
        "$ROCKET_ROOT/slurm/train.sh" "${arguments[@]}"
    exit
}

# The end, also where Slurm has requeued the job by itself.
give_up() {
    [[ $(job_field Restarts) -le $restarts ]] || scancel "$job"
    fail "not requeued: $1"
}

for ((number = 1; ; number++)); do
    export ROCKET_ATTEMPT=$job-$restarts-$number # its id
    note=$run/logs/signal.$ROCKET_ATTEMPT
    asked='' sick=''
    [ "$number$returning" != 1 ] || asked=yes
    choose_program
    attempts begin "$ROCKET_ATTEMPT" "$asked" "${arguments[@]}" || give_up "the reason is above"
    [ -n "$stopping" ] || train
    [ ! -f "$run/code/attempts.py" ] || tool=$run/code/attempts.py # somebody may edit the other
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
