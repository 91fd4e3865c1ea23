"""The image that `bentoml containerize` makes of the bento, for what bentofile.yaml cannot say."""

from __future__ import annotations

from bentoml.images import Image

_BENTO = "/home/bentoml/bento"
_CHECK = f"{_BENTO}/src/deploy/healthcheck.py"
_HOME = "/home/bentoml/topwork"

# BentoML has no words for VOLUME, HEALTHCHECK and CMD, and its own ENV lines win over an `envs` entry of the
# same name. It writes commands as they are: these lines follow one.
_LINES = f"""\
install -d -o bentoml -g bentoml -m 700 {_HOME}
ENV TOPWORK_HOME={_HOME} BENTOML_HOME={_BENTO} PYTHONPATH={_BENTO}/src HF_HUB_OFFLINE=1
VOLUME {_HOME}
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "{_CHECK}"]
CMD ["topwork", "serve", "--host", "0.0.0.0"]"""


def image() -> Image:
    """Debian without a compiler, which no locked package needs, with a volume for the data.

    The store of models is the bento's, for processes that do not load the bento too: workers, commands.
    """
    # Without a distribution BentoML installs no Debian packages.
    slim = Image(base_image="python:3.11-slim", distro="", python_version="3.11")
    return slim.run("pip install --no-cache-dir uv==0.13.9").run(_LINES)
