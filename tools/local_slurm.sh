#!/bin/bash
# A real Slurm on this machine: one controller and two nodes (node1, node2) with 8 pretended GPUs each.
#
#   tools/local_slurm.sh start [DIR]     default DIR: /tmp/local_slurm; then: export SLURM_CONF=DIR/slurm.conf
#   tools/local_slurm.sh stop  [DIR]
#
# For trying batch scripts where there is no cluster. Needs root and Debian's slurm-wlm and munge
# (apt-get install slurm-wlm munge). The GPUs are empty files, so jobs count them but train on the CPU.
set -euo pipefail

DIR=$(realpath -m "${2:-/tmp/local_slurm}")
export SLURM_CONF=$DIR/slurm.conf

write_configuration() {
    mkdir -p "$DIR/state" "$DIR/spool-node1" "$DIR/spool-node2" "$DIR/log"
    touch "$DIR"/gpu{0..7} # gres.conf counts only files that exist
    # CPUs and memory are pretended too (config_overrides), within what the machine really has for memory.
    local memory
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.8)}' /proc/meminfo)
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
MpiDefault=none
GresTypes=gpu
KillWait=30
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName=node[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=32 RealMemory=$memory Gres=gpu:8
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
    echo "NodeName=node[1-2] Name=gpu File=$DIR/gpu[0-7]" >"$DIR/gres.conf"
}

start_munge() {
    if munge --no-input >/dev/null 2>&1; then
        return
    fi
    mkdir -p /run/munge
    chown munge: /run/munge
    runuser -u munge -- munged
}

start() {
    for program in slurmctld slurmd munged; do
        if ! command -v "$program" >/dev/null; then
            echo "error: no $program; apt-get install slurm-wlm munge" >&2
            exit 2
        fi
    done
    write_configuration
    start_munge
    slurmctld
    slurmd -N node1
    slurmd -N node2
    for _ in {1..60}; do
        if [[ $(sinfo --noheader --format=%t%D 2>/dev/null) == idle2 ]]; then
            echo "two nodes are up: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "error: the nodes did not come up; see $DIR/log" >&2
    stop
    exit 1
}

stop() {
    local pidfile
    for pidfile in "$DIR"/*.pid; do
        if [[ -e $pidfile ]]; then
            kill "$(<"$pidfile")" 2>/dev/null || true
        fi
    done
}

case ${1:-} in
start) start ;;
stop) stop ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
