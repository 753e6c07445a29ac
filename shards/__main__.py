"""`python -m shards`: the same as the console script `mellow-shards`."""

import sys

from shards.cli import main

if __name__ == "__main__":
    sys.exit(main())
