#!/usr/bin/env bash
# Sets up whatever the tests need and runs all of them: format, lint, strict types, pytest.
# Arguments go to pytest: scripts/test.sh -k ufrag -x
set -euo pipefail
cd "$(dirname "$0")/.."

# System packages: browsers, for the demo page and as clients; Redis for the development system; a
# TURN server, to compare with; what builds pages with other people's clients; and an encoder.
missing=()
command -v chromium >/dev/null || command -v chromium-browser >/dev/null ||
  command -v google-chrome >/dev/null || missing+=(chromium)
command -v firefox-esr >/dev/null || command -v firefox >/dev/null || missing+=(firefox-esr)
command -v redis-server >/dev/null || missing+=(redis-server)
command -v turnserver >/dev/null || missing+=(coturn)
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
# GStreamer, as an encoder that comes in by WHIP, with its bindings for the system's Python.
/usr/bin/python3 tests/encoder_gstreamer.py check >/dev/null 2>&1 || missing+=(python3-gst-1.0
  gstreamer1.0-{nice,plugins-{base,good,bad}} gir1.2-gst-plugins-{base,bad}-1.0)
if [ "${#missing[@]}" -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "earshot: installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    # What cannot be had is missed by the tests that need it, which say so.
    apt-get -q update >&2 || true
    apt-get -q install -y --no-install-recommends "${missing[@]}" >&2 ||
      for package in "${missing[@]}"; do
        apt-get -q install -y --no-install-recommends "$package" >&2 ||
          echo "earshot: not installed: $package" >&2
      done
    # The package has it run from here on, at the relay's port, and nobody has asked for that.
    [[ " ${missing[*]} " != *" coturn "* ]] ||
      systemctl disable --now coturn >/dev/null 2>&1 || true
  else
    echo "earshot: not installed: ${missing[*]} (apt-get install ${missing[*]}, as root)" >&2
  fi
fi

source scripts/venv.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# Two files at a time, whose tests share what they have started: alone they use half a core.
.venv/bin/pytest -n 2 --dist loadfile --durations=20 "$@"
