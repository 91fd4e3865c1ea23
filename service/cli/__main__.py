"""`python -m service.cli`, which is `topwork`."""

import sys

from service.cli.main import main

sys.exit(main())
