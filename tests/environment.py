"""Exits with 0 if this Python meets pyproject.toml, tests included; the Makefile asks."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def missing() -> list[str]:
    """The requirements, `name>=version`, that are not met."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    found = []
    required = text.partition("[tool.setuptools]")[0]
    pattern = r'"([\w-]+)>=([\d.]+)(?:; python_version < \'([\d.]+)\')?"'
    for name, bound, below in re.findall(pattern, required):
        if name == "setuptools" or (below and sys.version_info[:2] >= numbers(below)):
            continue
        try:
            if numbers(version(name)) < numbers(bound):
                found.append(f"{name}>={bound}")
        except PackageNotFoundError:
            found.append(f"{name}>={bound}")
    return found


if missing():
    print(f"the active environment lacks {', '.join(missing())}", file=sys.stderr)
    sys.exit(1)
