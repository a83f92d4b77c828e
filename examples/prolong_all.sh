#!/bin/bash
# Submits ProLong's three stages, each waiting for the one before: 64K, 512K, instruction tuning.
#
#   examples/prolong_all.sh -N 8 -p long      options of sbatch, for all three jobs
#   bash examples/prolong_all.sh              without Slurm: one after the other on this machine
#
# OVERRIDES (for all three, so none that names a stage), CONTAINER and MOUNTS are as in the scripts of the stages. A
# stage that fails cancels the later ones; one that is requeued does not. To run the whole schedule as one job:
# prolong launch examples/prolong_8b.yaml
set -euo pipefail

HERE=$(dirname "$0")
JOB=
for STAGE in 64k 512k sft; do
    if command -v sbatch >/dev/null; then
        JOB=$(sbatch --parsable --kill-on-invalid-dep=yes ${JOB:+--dependency=afterok:"$JOB"} "$@" \
            "$HERE/prolong_$STAGE.sh")
        JOB=${JOB%%;*} # a cluster's name may follow
        echo "$STAGE: job $JOB"
    else
        bash "$HERE/prolong_$STAGE.sh"
    fi
done
