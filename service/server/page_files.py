"""The files of Swagger UI, which BentoML ships."""

from __future__ import annotations

from pathlib import Path

# BentoML imports itself on the first use of a name of its own, so that this import takes no time.
import bentoml

PAGE_FILES = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
