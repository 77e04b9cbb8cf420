"""The demonstration on digits: python -m src.demo."""

from __future__ import annotations

import sys

from .classification import main

if __name__ == "__main__":
    sys.exit(main())
