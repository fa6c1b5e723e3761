#!/usr/bin/env bash
# A throw-away Slurm cluster of two nodes on one Debian host, for the tests; as root, without systemd.
#
#   tests/slurm_up.sh start DIR   installs Slurm if it is missing, starts it and waits until a job has
#                                 run on both nodes. Then:  . DIR/env.sh
#   tests/slurm_up.sh stop DIR    cancels all jobs and ends exactly what start has started
#
# Partitions: main (GraceTime 30), and urgent, which preempts main by requeueing.
# Environment: SLURM_UP_PORT       first of three TCP ports (default 26917)
#              SLURM_UP_PROCTRACK  cgroup, as real clusters have it, or linuxproc (default: what works)
set -euo pipefail

nodes=(slurmn1 slurmn2)
port=${SLURM_UP_PORT:-26917}

say() { printf 'slurm_up.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# The pid in file $1 if it is alive and is $2 of this DIR; else nothing.
live_pid() {
    local pid words
    pid=$(tr -dc 0-9 2>/dev/null <"$1") || return 0
    [ -n "$pid" ] || return 0
    words=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || return 0
    case $words in *"$2"*"$DIR/"*) echo "$pid" ;; esac
}

install_missing() {
    local command guard='' missing=''
    for command in munged slurmctld slurmd sbatch; do
        command -v "$command" >/dev/null || missing+=" $command"
    done
    [ -n "$missing" ] || return 0
    say "installing (missing:$missing)"
    if [ ! -e /usr/sbin/policy-rc.d ]; then # keeps the packages from starting their own services
        guard=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >"$guard"
        chmod 755 "$guard"
    fi
    export DEBIAN_FRONTEND=noninteractive
    {
        apt-get update
        apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client
    } >"$DIR/apt.log" 2>&1 || missing=failed
    [ -z "$guard" ] || rm -f "$guard"
    [ "$missing" != failed ] || { tail -20 "$DIR/apt.log" >&2; die "the installation failed"; }
}

write_config() { # with the given proctrack
    local memory i cgroup=cgroup/v2
    memory=$(awk '/MemTotal/ {print int($2 / 2048)}' /proc/meminfo)
    [ ! -d /sys/fs/cgroup/freezer ] || cgroup=cgroup/v1
    [ -s "$DIR/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=rocket
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its credential has expired: 120 s by default
AuthInfo=socket=$DIR/munge.sock,cred_expire=10
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmdLogFile=$DIR/slurmd-%n.log
SlurmdSpoolDir=$DIR/spool-%n
SlurmdDebug=verbose
SlurmctldDebug=verbose
ProctrackType=proctrack/$1
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=30
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=MEMLOCK
CONF
    for i in 0 1; do
        echo "NodeName=${nodes[i]} NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1 + i))" \
            "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=$memory"
    done >>"$DIR/slurm.conf"
    cat >>"$DIR/slurm.conf" <<CONF
PartitionName=main Nodes=${nodes[0]},${nodes[1]} Default=YES DefaultTime=10 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=${nodes[0]},${nodes[1]} DefaultTime=10 PriorityTier=10 PreemptMode=OFF
CONF
    printf 'CgroupPlugin=%s\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n' "$cgroup" \
        >"$DIR/cgroup.conf"
    printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$DIR/env.sh"
}

start_daemons() {
    local i cores
    cores=$(nproc)
    munged --force --socket="$DIR/munge.sock" --key-file="$DIR/munge.key" --num-threads=2 \
        --pid-file="$DIR/munged.pid" --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed" \
        2>>"$DIR/munged.err"
    slurmctld -f "$SLURM_CONF"
    for i in 0 1; do # each node has a core of its own, or each rank would start a thread for all
        taskset -c $((i % cores)) slurmd -N "${nodes[i]}" -f "$SLURM_CONF"
    done
}

works() {
    local try
    for try in $(seq 60); do
        [ "$(sinfo -h -N -p main -o %T 2>/dev/null | grep -c '^idle$')" != 2 ] || break
        sleep 0.5
    done
    timeout 20 srun --nodes=2 --time=1 true >>"$DIR/srun.log" 2>&1
}

start() {
    local proctrack
    [ "$(id -u)" = 0 ] || die "needs root"
    [ ${#DIR} -le 90 ] || die "DIR is too long for a unix socket: $DIR"
    mkdir -p "$DIR"/{state,spool-${nodes[0]},spool-${nodes[1]}}
    chmod 755 "$DIR"
    install_missing
    # the batch script takes node names for addresses: make them resolve
    grep -qF "# $DIR/" /etc/hosts || echo "127.0.0.1 ${nodes[*]} # $DIR/" >>/etc/hosts
    for proctrack in ${SLURM_UP_PROCTRACK:-cgroup linuxproc}; do
        write_config "$proctrack"
        if start_daemons && works; then
            say "two nodes, proctrack/$proctrack: . $DIR/env.sh"
            return
        fi
        say "proctrack/$proctrack does not work here"
        stop_daemons
    done
    tail -n 5 "$DIR"/*.log >&2
    exit 1
}

# Processes named $1, or all, whose environment names this cluster: slurmstepd outlives slurmd
of_cluster() {
    local p
    for p in /proc/[0-9]*; do
        grep -zqxF "SLURM_CONF=$SLURM_CONF" "$p/environ" 2>/dev/null || continue
        [ "$(cat "$p/comm" 2>/dev/null)" != "$1" ] || echo "${p#/proc/}"
    done
}

stop_daemons() {
    local file name pid _
    for file in "$DIR"/slurmd-*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
        name=$(basename "$file" .pid)
        pid=$(live_pid "$file" "${name%%-*}")
        [ -n "$pid" ] || continue
        kill -TERM "$pid" 2>/dev/null || true
        for _ in $(seq 60); do [ -d "/proc/$pid" ] || break; sleep 0.25; done
        [ ! -d "/proc/$pid" ] || kill -KILL "$pid" 2>/dev/null || true
        rm -f "$file"
    done
}

stop() {
    local pid _
    [ -s "$SLURM_CONF" ] || die "nothing was started in $DIR"
    if [ -n "$(live_pid "$DIR/slurmctld.pid" slurmctld)" ]; then
        timeout 20 scancel --user=root || true
        timeout 20 scancel --full --signal=KILL --user=root 2>/dev/null || true # not after KillWait
        for _ in $(seq 60); do
            [ -n "$(timeout 20 squeue -h 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    stop_daemons
    for pid in $(of_cluster slurmstepd); do kill -KILL "$pid" 2>/dev/null || true; done
    local hosts # rewritten in place: /etc/hosts may be a bind mount
    hosts=$(grep -vF "# $DIR/" /etc/hosts) && printf '%s\n' "$hosts" >/etc/hosts
    # empty directories only: rmdir refuses the others
    find /sys/fs/cgroup -depth -type d \( -path "*/slurm_${nodes[0]}*" -o -path "*/slurm_${nodes[1]}*" \) \
        -exec rmdir {} \; 2>/dev/null || true
    say "stopped; logs are in $DIR"
}

case ${1:-} in start | stop) ;; *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 1 ;; esac
DIR=$(realpath -m "${2:?DIR is missing}")
export SLURM_CONF=$DIR/slurm.conf
"$1"
