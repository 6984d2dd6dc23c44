# Sourced by dev.sh and test.sh from the checkout's root: makes .venv and installs into it what
# pyproject.toml names, again only when pyproject.toml has changed since.
python=
for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "earshot: Python 3.11 or later is needed (Debian: apt-get install python3 python3-venv)" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    echo "earshot: the package python3-venv is missing (Debian: apt-get install python3-venv)" >&2
    exit 1
  fi
  rm -rf .venv
  "$python" -m venv .venv
fi
# The stamp holds what was installed from: a changed list of packages or modules installs again.
if ! cmp -s pyproject.toml .venv/installed.toml; then
  echo "earshot: installing into .venv (a minute or two the first time)" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' >&2
  cp pyproject.toml .venv/installed.toml
fi
