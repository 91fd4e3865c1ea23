"""`python -m service.cli`, which is `topwork`."""

import sys

from service.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
