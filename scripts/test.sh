#!/usr/bin/env bash
# Sets up whatever the tests need and runs all of them: format, lint, strict types, pytest.
# Arguments go to pytest: scripts/test.sh -k ufrag -x
set -euo pipefail
cd "$(dirname "$0")/.."

# System packages: a browser for the demo page, Redis for the development system, and what builds
# pages with other people's clients.
missing=()
command -v chromium >/dev/null || command -v chromium-browser >/dev/null ||
  command -v google-chrome >/dev/null || missing+=(chromium)
command -v redis-server >/dev/null || missing+=(redis-server)
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
if [ "${#missing[@]}" -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "earshot: installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update >&2
    apt-get -q install -y --no-install-recommends "${missing[@]}" >&2
  else
    echo "earshot: not installed: ${missing[*]} (apt-get install ${missing[*]}, as root)" >&2
  fi
fi

source scripts/venv.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/pytest "$@"
