"""Ports for what a test starts: those of scripts/ports.py."""

import importlib.util
from pathlib import Path

_where = importlib.util.spec_from_file_location(
    "ports", Path(__file__).resolve().parent.parent / "scripts" / "ports.py"
)
_module = importlib.util.module_from_spec(_where)
_where.loader.exec_module(_module)
free = _module.free
