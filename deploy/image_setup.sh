#!/bin/sh
# Runs as root in the image, once the packages are installed: adds the `topwork` command to them.
set -eu
cat >/app/.venv/bin/topwork <<'PROGRAM'
#!/app/.venv/bin/python
import sys

from service.cli.main import main

sys.exit(main())
PROGRAM
chmod 755 /app/.venv/bin/topwork
