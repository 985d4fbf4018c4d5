#!/usr/bin/env bash
# Sets up .venv and passes the tests: those that need eight devices run in a process with eight forced host devices.
#   ./launch/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment "[test]"
export PATH="$PWD/.venv/bin:$PATH" JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=3
# A program that several tests need is compiled once.
export JAX_COMPILATION_CACHE_DIR=$(mktemp -d) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
# Two workers: most of a test's time is a compiler's, on one core. Files stay whole, their fixtures are costly, and in
# the order of conftest.py: the longest first.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
empty=0
pass() { # of the two runs one may have no test, as of a single file
  local status=0
  "$@" || status=$?
  if [ "$status" = 5 ]; then empty=$((empty + 1)); else return "$status"; fi
}
pass python -m pytest "${workers[@]}" -m "not devices8" "$@"
pass env XLA_FLAGS="--xla_force_host_platform_device_count=8" python -m pytest "${workers[@]}" -m devices8 "$@"
[ "$empty" -lt 2 ] || exit 5
