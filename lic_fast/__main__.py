"""`python -m lic_fast` is `lic-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
