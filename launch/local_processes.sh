#!/usr/bin/env bash
# Runs a command of recalign as N processes on this machine, on CPU devices: what many machines do, to try it out.
#   ./launch/local_processes.sh N [DEVICES_PER_PROCESS] -- train --gin_file ...
# Process 0 prints here; the others write LOG_DIR/process_I.log (default: a new folder for temporary files). SIGTERM
# and SIGINT reach all as SIGTERM. One that fails takes the others down; the exit status is the highest of all.
set -uo pipefail
grace=15 # seconds that the others have to end by themselves after a failure

count=${1:-} devices=1
if [ "${2:-}" != "--" ]; then devices=${2:-}; fi
if ! [[ "$count" =~ ^[1-9][0-9]*$ && "$devices" =~ ^[1-9][0-9]*$ ]] || [[ " ${*:2:2} " != *" -- "* ]]; then
  echo "usage: $0 N [DEVICES_PER_PROCESS] -- recalign's arguments" >&2
  exit 2
fi
until [ "$1" = "--" ]; do shift; done
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
logs=${LOG_DIR:-$(mktemp -d -t recalign_processes.XXXXXX)}
mkdir -p "$logs" || exit 2
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') || exit 2
export JAX_PLATFORMS=cpu PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

declare -A running=() # pid -> process number
trap 'kill "${!running[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  command=("$python" -m recalign_jax.cli "$@"
    --coordinator_address "127.0.0.1:$port" --num_processes "$count" --process_id "$i")
  if [ "$i" = 0 ]; then "${command[@]}" & else "${command[@]}" > "$logs/process_$i.log" 2>&1 & fi
  running[$!]=$i
done

worst=0 killer=
while [ "${#running[@]}" -gt 0 ]; do
  sleep 0.2
  for pid in "${!running[@]}"; do
    kill -0 "$pid" 2>/dev/null && continue
    wait "$pid"
    status=$? i=${running[$pid]}
    unset "running[$pid]"
    [ "$status" = 0 ] && continue
    [ "$i" = 0 ] || echo "process $i: exit status $status, see $logs/process_$i.log" >&2
    [ "$status" -gt "$worst" ] && worst=$status
    if [ -z "$killer" ]; then
      (sleep "$grace"; kill "${!running[@]}"; sleep "$grace"; kill -KILL "${!running[@]}") > /dev/null 2>&1 &
      killer=$!
    fi
  done
done
[ -z "$killer" ] || kill "$killer" 2>/dev/null
exit "$worst"
