#!/usr/bin/env bash
# Trains under SLURM and requeues itself until the run is finished:
#   sbatch --job-name=mine --nodes=8 scripts/slurm.sh experiment=titok_l32 data=shards ...
# The words go to train.py. The run folder is runs/<job name>, and whatever whole checkpoint is in
# it is gone on from. One task per GPU; Lightning reads ranks and addresses from SLURM.
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Five minutes before the end every task gets SIGUSR1: it saves after the step under way and exits
# with 75. A preemption's SIGTERM does the same.
#SBATCH --signal=USR1@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

python=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

srun --kill-on-bad-exit=1 "$python" train.py \
    trainer.accelerator=gpu trainer.devices="$gpus" trainer.num_nodes="${SLURM_JOB_NUM_NODES:-1}" \
    hydra.run.dir="runs/$SLURM_JOB_NAME" resume=auto "$@"
code=$?

if [ "$code" -eq 75 ]; then
    echo "preempted: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
