#!/bin/bash
# Trains examples/prolong_sft.yaml (sft) on a Slurm cluster, or on this machine without one.
#
#   sbatch examples/prolong_sft.sh
#   sbatch -N 8 -p long examples/prolong_sft.sh      any option of sbatch; on more nodes nothing else changes
#   bash examples/prolong_sft.sh      this machine alone: all its GPUs, or one process without any
#
# OVERRIDES="stage.sft.lr=2e-5 layout.cp=4" before the command changes the recipe; CONTAINER=image.sqsh (and
# MOUNTS=/data:/data) runs it in a container, with pyxis; GPUS=4 uses that many of each node's GPUs. Start it where
# the recipe's relative paths begin, with `prolong` on the PATH. Half an hour before the time limit, and at a
# preemption, training saves after the step it is at, and the job goes back into the queue, to continue from there. So
# it does when it fails, up to the fourth time in a row without a new checkpoint.
#SBATCH --job-name=prolong-sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@1800
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE=examples/prolong_sft.yaml
read -ra OVERRIDES <<<"${OVERRIDES:-}"

# One launcher on every node starts one process for every GPU.
NODES=${SLURM_JOB_NUM_NODES:-1}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}}
((GPUS > 0)) || GPUS=1
HEAD=localhost
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MASTER_ADDR=${MASTER_ADDR:-$HEAD}
# Below the ports that the kernel lends to connections: one of those may be in use.
export MASTER_PORT=$((12000 + ${SLURM_JOB_ID:-$$} % 20000))

# on_nodes SRUN_OPTION... -- COMMAND...: through srun, or directly where there is no Slurm
on_nodes() {
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        exec "$@"
    fi
    if [[ -n ${CONTAINER:-} ]]; then
        options+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}")
        options+=(--container-workdir="$PWD")
    fi
    # A process that is gone makes the others stop; a node where they do not is given a minute. What is exported here
    # counts also where `sbatch --export` let little in, which srun would keep to.
    exec srun --wait=60 --cpu-bind=none --export=ALL "${options[@]}" "$@"
}

echo "$(date '+%F %T') $RECIPE on $NODES × $GPUS, first node $MASTER_ADDR, start ${SLURM_RESTART_COUNT:-0}"

# Slurm asks to stop as soon as a job starts whose time limit is within --signal's notice, and so it would at every start.
TOO_SHORT="error: asked to stop right at the start: the time limit must be longer than --signal's notice, half an hour \
where nothing else is asked for (sbatch --signal=B:USR1@120: two minutes)"
trap 'echo "$TOO_SHORT"; exit 75' USR1

# How many starts before this one failed in a row without a new checkpoint: Slurm keeps it, as the job's comment.
change_job() { scontrol update JobId="$SLURM_JOB_ID" "$1"; }
FAILURES=0
if [[ -n ${SLURM_JOB_ID:-} && $(squeue -h -j "$SLURM_JOB_ID" -o %k) =~ ^([0-9]+)" failed in a row" ]]; then
    FAILURES=${BASH_REMATCH[1]}
    change_job Comment= || true
fi

where_it_stands() {
    (on_nodes --nodes=1 --ntasks=1 -- prolong status "$RECIPE" "${OVERRIDES[@]}")
}

# end CODE: of this start, and of the job where it is done, or met a mistake (2) that it would meet again. One that failed
# otherwise goes back into the queue, for file servers and nodes recover: at once if it got on, else for 10, 20 and 40
# minutes, and no more.
BEFORE='' ASKED=0 CANCELLED=0
end() {
    local why=stopped minutes=0
    if [[ -z ${SLURM_JOB_ID:-} || $1 == [02] ]] || ((CANCELLED)); then
        exit "$1"
    fi
    if (($1 != 75 && ASKED == 0)); then # asked, also before training listened to signals
        if [[ -n $BEFORE ]] && AFTER=$(where_it_stands) && [[ $AFTER != "$BEFORE" ]]; then
            why="failed ($1) behind new checkpoints"
        else
            why="failed ($1) without a new checkpoint" minutes=$((10 << FAILURES))
            if ((FAILURES == 3)) || ! change_job Comment="$((FAILURES + 1)) failed in a row"; then # uncounted: for ever
                echo "$(date '+%F %T') $why after $FAILURES such starts, stays failed"
                exit "$1"
            fi
            why+=", to start again in $minutes minutes"
        fi
    fi
    echo "$(date '+%F %T') $why, back into the queue"
    trap '' TERM # Slurm sends it at a requeue, also to what is called here
    if scontrol requeue "$SLURM_JOB_ID" && ((minutes)); then # with sbatch --no-requeue it is refused
        change_job StartTime="now+${minutes}minutes" || true
    fi
    exit "$1"
}

# Whatever is missing or does not fit this many GPUs ends the job here, in seconds.
(WORLD_SIZE=$((NODES * GPUS)) on_nodes --nodes=1 --ntasks=1 -- prolong train "$RECIPE" "${OVERRIDES[@]}" --check) || end $?
BEFORE=$(where_it_stands) || end $?

(on_nodes -- prolong train "$RECIPE" "${OVERRIDES[@]}" --processes "$GPUS") &
TRAINING=$!

# shellcheck disable=SC2317 # called by the trap
save_and_stop() {
    ((ASKED == 0)) || return 0 # a second signal would end them at once
    ASKED=1
    echo "$(date '+%F %T') asked to stop: saving"
    kill -USR1 "$TRAINING" 2>/dev/null || true # srun hands it to every process on every node; it may have just ended
    if [[ -n ${SLURM_JOB_ID:-} ]] && ((SECONDS < 120)) && is_an_hour_at_most "$(squeue -h -j "$SLURM_JOB_ID" -o %l)"; then
        echo "$TOO_SHORT"
        CANCELLED=1
    fi
}
# shellcheck disable=SC2317
is_an_hour_at_most() { [[ $1 =~ ^([0-9]+|1:00):[0-9]+$ ]]; } # minutes:seconds, or hours and days before these
trap save_and_stop USR1
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    trap CANCELLED=1 TERM # scancel or a preemption: Slurm tells every process itself, and requeues where it wants to
else
    trap save_and_stop TERM
fi

while kill -0 "$TRAINING" 2>/dev/null; do # a signal interrupts wait, not training
    wait "$TRAINING" || true
done
CODE=0
wait "$TRAINING" || CODE=$? # its own, not that of a wait which a signal interrupted
end "$CODE"
