#!/usr/bin/env bash
# Brings the whole system up on this machine, from a fresh clone, without root.
#
#   scripts/dev.sh            relay (2 workers), two transceivers, signaling, Redis; Ctrl-C ends them
#   scripts/dev.sh --check    the same on free ports, one call with a stock WebRTC client, one line of
#                             JSON, exit status 0 or 1
#   scripts/dev.sh --help     the other options
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
exec .venv/bin/python scripts/dev.py "$@"
