"""The image that `bentoml containerize` builds from the bento: what bentofile.yaml cannot express."""

from __future__ import annotations

from bentoml.images import Image

_BENTO = "/home/bentoml/bento"
_CHECK = f"{_BENTO}/src/deploy/healthcheck.py"
_HOME = "/home/bentoml/topwork"
# BentoML makes these in its home when it is imported, which fails where the image cannot be written.
_STORE = " ".join(f"{_BENTO}/{name}" for name in ("bentos", "envs", "tmp"))

# BentoML has no options for VOLUME, HEALTHCHECK and CMD, and its own ENV lines override `envs` entries of the
# same name. It writes commands verbatim, so these Dockerfile lines are appended to one.
_LINES = f"""\
install -d -o bentoml -g bentoml -m 700 {_HOME} {_STORE}
ENV TOPWORK_HOME={_HOME} BENTOML_HOME={_BENTO} PYTHONPATH={_BENTO}/src HF_HUB_OFFLINE=1
VOLUME {_HOME}
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "{_CHECK}"]
CMD ["topwork", "serve", "--host", "0.0.0.0"]"""


def image() -> Image:
    """Return a Debian image with a volume for the data, and no compiler, because no locked package needs one.

    The model store is the bento's, also for processes that do not load the bento: workers, commands.
    """
    # BentoML installs Debian packages only if a distribution is given.
    slim = Image(base_image="python:3.11-slim", distro="", python_version="3.11")
    return slim.run("pip install --no-cache-dir uv==0.13.9").run(_LINES)
