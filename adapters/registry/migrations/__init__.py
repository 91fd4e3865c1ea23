"""The registry's tables, release by release (Alembic). Run by adapters.registry.database; no alembic.ini."""

HEAD = "0011"
"""The newest revision, known here so that a start with current tables need not import Alembic."""
