"""A finding as one HTML file."""

from pathlib import Path

from findings import Figures, Finding


def write(path: Path, found: Finding, about: Figures) -> None:
    """Write the page of a finding to `path`."""
    path.write_text(f"<!doctype html><title>{found.title}</title>{len(about)}")
