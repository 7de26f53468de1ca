"""Versions of Triton that the shipped tables were made with, compared with the installed one."""

import triton

from tritonattn.configs import shipped


def versions(name):
    """Return the versions of Triton that the tables were made with ("triton") or also checked with ("also")."""
    return {table.made.get(name) for table in shipped.shipped_tables()}


OWN = {triton.__version__} == versions("triton")
PROVED = OWN or {triton.__version__} == versions("also")
