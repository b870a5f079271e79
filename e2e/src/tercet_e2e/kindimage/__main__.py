"""`python -m tercet_e2e.kindimage`: make or find the node image; prints its name and archive."""

from __future__ import annotations

import sys

from tercet_e2e.errors import E2eError
from tercet_e2e.kindimage import build


def main() -> int:
    """Runs; returns the exit code."""
    try:
        archive = build.ensure(lambda text: print(text, file=sys.stderr))
    except E2eError as error:
        print(f"kindimage: {error}", file=sys.stderr)
        return 1
    print(build.image_name())
    print(archive)
    return 0


if __name__ == "__main__":
    sys.exit(main())
