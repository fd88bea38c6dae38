#!/usr/bin/env bash
# Trains on a SLURM cluster of GPU nodes, one process for each GPU:
#
#   sbatch launch/slurm.sh --config configs/tilelli-lite-fp32.yaml run_dir=/shared/runs/lite
#
# from the project's folder, on a file system that all nodes see, with the project installed in
# .venv (or PYTHON=… naming another interpreter). Options given to sbatch come before the ones here:
# sbatch --nodes=4 --partition=gpu launch/slurm.sh …. The same command again resumes the run.

#SBATCH --job-name=tilelli
#SBATCH --nodes=2
# As many tasks as GPUs: JAX gives task i of a node that node's GPU i. It has to see all of them,
# so no --gpus-per-task, which would hide all but one.
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SIGTERM to all tasks, two minutes before the time is up: they save and end with status 0.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.txt

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ $# -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh --config FILE [key=value …]" >&2
  exit 2
fi

export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# srun does not take this over from sbatch by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m tilelli_jax.train --distributed "$@"
