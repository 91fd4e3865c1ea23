"""`python -m models.export [names…]`."""

import sys

from models.export.onnx_export import main

if __name__ == "__main__":
    sys.exit(main())
