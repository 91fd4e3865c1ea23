#!/bin/sh
# Runs as root while the image is built: a volume mounted over this folder takes over its owner.
set -eu
install -d -o bentoml -g bentoml -m 700 /home/bentoml/topwork
