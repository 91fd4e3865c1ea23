"""Errors of where jobs run."""

from __future__ import annotations

from models.errors import DomainError


class RayMissing(DomainError):
    """The package ray is not installed."""

    code = "ray_missing"


class RayUnusable(DomainError):
    """Ray cannot be used as the settings say."""

    code = "ray_unusable"


class NoSuchResources(DomainError):
    """No node of the cluster has what an attempt needs."""

    code = "no_such_resources"
