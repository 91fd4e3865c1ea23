"""The image's HEALTHCHECK: exits with 0 if the service beside it is ready, with 1 if not."""

import http.client
import os
import sys


def main() -> int:
    """Asks /readyz on the port that PORT names."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT") or 3000), timeout=4)
    try:
        connection.request("GET", "/readyz")
        return 0 if connection.getresponse().status == 200 else 1
    except OSError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
