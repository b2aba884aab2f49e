"""`python -m hybridlm.train RECIPE key=value ...`: the command without the rest of the command line."""

from __future__ import annotations

import sys

from hybridlm.errors import HybridLMError
from hybridlm.train import run


def main() -> None:
    name, *settings = sys.argv[1:] or ["--help"]
    if name.startswith("-") or not all("=" in s for s in settings):
        sys.exit("usage: python -m hybridlm.train RECIPE key=value ...")
    try:
        run(name, dict(s.split("=", 1) for s in settings))
    except HybridLMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
