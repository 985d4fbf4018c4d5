# Sourced by the scripts beside it: makes .venv in the project's root, once for every state of its dependencies.
# Usage: setup_environment EXTRA   (EXTRA is "", "[docs]" or "[test]")

setup_environment() {
  local extra=$1 python=${PYTHON:-python3} version wanted have
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")')
  if [ -z "$version" ]; then
    echo "Python 3.11 or later is needed; $python is $("$python" --version 2>&1). Set PYTHON to one that is." >&2
    return 2
  fi
  # None, or one whose making was cut off before it had pip.
  if [ ! -e .venv/recalign_stamp ] && ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    "$python" -m venv --clear .venv
  fi
  # The stamp says for which dependencies the environment was made.
  wanted=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
  have=$(cat .venv/recalign_stamp 2>/dev/null || true)
  # That of the tests has all, and any has what the commands need.
  if [ -z "$extra" ]; then have=${have%%\[*}; fi
  if [ "$have" != "$wanted$extra" ] && [ "$have" != "$wanted[test]" ]; then
    echo "Installing into .venv (once; a few minutes) ..." >&2
    # Modules are compiled when they are imported first, and kept (see below): most never are.
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".$extra"
    echo "$wanted$extra" > .venv/recalign_stamp
  fi
  # What is imported is compiled once, not by every process.
  unset PYTHONDONTWRITEBYTECODE
}
