#!/usr/bin/env bash
# Trains on a Google Cloud TPU VM, on all workers of a slice together:
#
#   export TPU=tilelli ZONE=us-west4-a TYPE=v5litepod-16
#   launch/tpu_vm.sh create       make the slice (SPOT=1: a spot one)
#   launch/tpu_vm.sh install      copy this clone to all workers and install it there
#   launch/tpu_vm.sh run --config configs/tilelli-lite-fp32.yaml run_dir=/mnt/runs/lite
#   launch/tpu_vm.sh log          follow what worker 0 prints
#   launch/tpu_vm.sh stop         save and end; the same `run` resumes
#   launch/tpu_vm.sh delete       give the slice back
#
# Needs gcloud, logged in, with a project chosen. With more than one worker, run_dir has to lie on
# a file system that all of them see (Filestore, or a mounted bucket).

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

runtime() { # the software version that goes with a TPU type
  case "$TYPE" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

tpu() { # tpu VERB [ARGUMENT…]
  local verb="$1"
  shift
  gcloud compute tpus tpu-vm "$verb" "$TPU" --zone="$ZONE" "$@"
}

on_workers() { # on_workers WHICH COMMAND
  tpu ssh --worker="$1" --command="$2"
}

install() {
  local archive
  archive="$(mktemp --suffix=.tgz)"
  # shellcheck disable=SC2064 # the name is wanted as it is now
  trap "rm -f '$archive'" EXIT
  git ls-files --cached --others --exclude-standard -z | tar --null --files-from=- -czf "$archive"
  gcloud compute tpus tpu-vm scp "$archive" "$TPU:tilelli_jax.tgz" --zone="$ZONE" --worker=all
  # The VM's own Python may be older than 3.11; uv brings one.
  # shellcheck disable=SC2016 # the worker's $HOME and $PATH are meant
  on_workers all 'set -e
    mkdir -p tilelli_jax && tar -xzf tilelli_jax.tgz -C tilelli_jax && cd tilelli_jax
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    test -d .venv || uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python --editable ".[tpu,hf]"'
}

run() {
  [ $# -gt 0 ] || usage
  local arguments
  printf -v arguments '%q ' "$@"
  on_workers all "cd tilelli_jax
    if pgrep -f '[t]ilelli_jax.train' > /dev/null; then echo 'a run is under way' >&2; exit 1; fi
    setsid nohup .venv/bin/python -m tilelli_jax.train --distributed $arguments \
      > train.log 2>&1 < /dev/null &"
}

: "${TPU:?name of the TPU VM}" "${ZONE:?zone, e.g. us-west4-a}"
command="${1:-}"
[ $# -eq 0 ] || shift
case "$command" in
  create)
    : "${TYPE:?accelerator type, e.g. v5litepod-16}"
    tpu create --accelerator-type="$TYPE" --version="${VERSION:-$(runtime)}" ${SPOT:+--spot}
    ;;
  install) install ;;
  run) run "$@" ;;
  log) on_workers 0 'tail -n 50 -F tilelli_jax/train.log' ;;
  # One worker suffices: all of them stop at the same step.
  stop) on_workers 0 "pkill -TERM -f '[t]ilelli_jax.train'" ;;
  delete) tpu delete ;;
  *) usage ;;
esac
