"""The lowest versions that pyproject.toml promises, as a requirements file: python -m tools.oldest_versions > FILE.

`make test-oldest` installs them into an environment of their own and runs the default tests there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
LINTERS = ("ruff", "mypy", "types-")
"""No test needs them."""
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:>=([0-9.]+))?")


def pinned(requirements: list[str]) -> list[str]:
    """`name==version` for every `name>=version`; a requirement without a version stays as it is.

    Raises:
        ValueError: a requirement of another form.
    """
    lines = []
    for requirement in requirements:
        found = _REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise ValueError(f"{requirement}: expected NAME or NAME>=VERSION")
        name, version = found.groups()
        lines.append(f"{name}=={version}" if version else name)
    return lines


def main() -> int:
    """Print the lowest versions of what the project and its tests need."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = dict.fromkeys([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    print("\n".join(pinned([one for one in wanted if not one.startswith(LINTERS)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
