#!/usr/bin/env bash
# What a pod or a managed job runs: training, until the run is complete.
#
#   RUN_DIR=/runs/lite launch/pod.sh --config configs/tilelli-lite-fp32.yaml [key=value …]
#
# SIGTERM is passed on, which a shell that is a container's first process would not do by itself.
# Training answers it by saving and ending with status 0; to a scheduler that would mean "done".
# Here status 0 means that the run is complete, and 75 that it stopped before: start it again.

set -uo pipefail
: "${RUN_DIR:?where the run is kept, on a file system that all processes see}"

"${PYTHON:-python}" -m tilelli_jax.train --distributed "$@" "run_dir=$RUN_DIR" &
training=$!
trap 'kill -TERM "$training" 2> /dev/null' TERM INT

wait "$training"
status=$?
while kill -0 "$training" 2> /dev/null; do # a signal ends `wait` before the process ends
  wait "$training"
  status=$?
done
[ "$status" -eq 0 ] || exit "$status"

# summary.json is written last. A network file system may show it to other nodes a little later.
for pause in 0 ${SUMMARY_PAUSES:-5 25}; do
  sleep "$pause"
  [ ! -e "$RUN_DIR/summary.json" ] || exit 0
done
exit 75
