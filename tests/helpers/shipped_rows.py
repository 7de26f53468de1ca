"""The versions of Triton that the shipped tables were made and checked with."""

import triton

from tritonattn.configs import shipped


def versions(name):
    """Return the versions of Triton that the tables were made with ("triton") or also checked with ("second_triton")."""
    return {table.provenance.get(name) for table in shipped.shipped_tables()}


OWN = {triton.__version__} == versions("triton")
PROVED = OWN or {triton.__version__} == versions("second_triton")
