#!/usr/bin/env bash
# Trains on Cloud TPU VMs: creates a queued resource, sets up all its workers, trains on all of them, and starts again
# after a preemption, until recalign is done.
#   NAME=recalign ZONE=us-west4-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite REPOSITORY=URL NFS=HOST:/SHARE \
#     ./launch/tpu_vm/train.sh [--dry_run | --run] -- train --gin_file ...
# Prints the commands of gcloud; with --run it runs them, which costs money until the resource is deleted:
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
# SPOT=0 takes capacity that isn't taken away. All workers see NFS as /mnt/data: corpora and MODEL_DIR belong there.
set -uo pipefail
usage="usage: NAME= ZONE= ACCELERATOR= RUNTIME= REPOSITORY= NFS= $0 [--dry_run | --run] -- recalign's arguments"
attempts=100 retry_seconds=${RETRY_SECONDS:-30}
most_silent=5 # answers in a row that hold no state

live=0
case "${1:-}" in
  --run) live=1 && shift ;;
  --dry_run) shift ;;
esac
if [ "${1:-}" != "--" ] || [ $# -lt 2 ]; then echo "$usage" >&2; exit 2; fi
shift
for name in NAME ZONE ACCELERATOR RUNTIME REPOSITORY NFS; do
  if [ -z "${!name:-}" ]; then echo "$name is not set. $usage" >&2; exit 2; fi
done

run() {
  printf '+'; printf ' %q' "$@"; echo
  if [ "$live" = 1 ]; then "$@"; fi
}
queue() { run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
leave() {
  echo "# what still costs is deleted with"
  live=0
  queue delete --force --quiet
  exit "$1"
}
on_all_workers() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }
describe() { gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)'; }
state() { # ACTIVE in a dry run, where nothing is asked
  [ "$live" = 1 ] || { echo ACTIVE; return; }
  describe 2>/dev/null
}

create() {
  local spot=()
  [ "${SPOT:-1}" = 1 ] && spot=(--spot)
  queue create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${spot[@]}"
}
# The images have Python 3.10; uv brings a later one.
setup="set -e; sudo mkdir -p /mnt/data; mountpoint -q /mnt/data || { sudo apt-get install -y nfs-common; sudo mount $NFS /mnt/data; }
[ -d recalign_jax ] || git clone $REPOSITORY recalign_jax
cd recalign_jax; python3 -m pip install --user uv; ~/.local/bin/uv venv --allow-existing --seed --python 3.11 .venv
.venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
train="cd recalign_jax && RECALIGN_DATA_DIR=/mnt/data/corpora JAX_COMPILATION_CACHE_DIR=/mnt/data/jax_cache \
.venv/bin/recalign$(printf ' %q' "$@") --distributed --start_timeout 900"

for ((attempt = 1; attempt <= attempts; attempt++)); do
  case "$(state)" in
    ACTIVE) [ "$live" = 1 ] || create ;;
    # Later an answer may be missing; the loop below waits for another.
    "") [ "$attempt" -gt 1 ] || create || leave 1 ;;
    SUSPENDED | SUSPENDING | FAILED) # what a preemption leaves: it doesn't come back by itself
      queue delete --force --quiet
      create || leave 1 ;;
  esac
  silent=0
  until found=$(state); [ "$found" = ACTIVE ]; do
    case "$found" in
      SUSPENDED | FAILED) continue 2 ;;
      "") silent=$((silent + 1)) ;;
      *) silent=0 ;;
    esac
    if [ "$silent" -ge "$most_silent" ]; then
      echo "gcloud tells no state of $NAME, $silent times in a row:" >&2
      describe
      leave 1
    fi
    echo "waiting for $NAME: ${found:-no state}"
    sleep "$retry_seconds"
  done
  on_all_workers "$setup" && on_all_workers "$train"
  status=$?
  if [ "$status" = 0 ]; then
    echo "# done"
    leave 0
  fi
  echo "attempt $attempt ended with status $status"
  sleep "$retry_seconds" # a preemption takes a moment to show in the state
  # 75: recalign saved on SIGTERM; 255: ssh lost the machine. Anything else on machines that stand would fail again.
  if [ "$(state)" = ACTIVE ] && [ "$status" != 75 ] && [ "$status" != 255 ]; then leave "$status"; fi
done
leave 1
