"""`python -m models.export [names…]`."""

import sys

from models.export.onnx_export import main

sys.exit(main())
