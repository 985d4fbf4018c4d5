#!/usr/bin/env bash
# Builds docs/ as a site: site/index.html. A broken link, or a page that the lists of docs/index.md lack, fails.
#   ./launch/docs.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment "[docs]"
rm -rf site
# Afresh: pages that didn't change would not warn again.
.venv/bin/python -m sphinx --fail-on-warning --nitpicky --fresh-env --quiet --doctree-dir build/doctrees docs site
echo "site/index.html"
