"""With which versions of Triton the shipped tables were made, and whether this is one of them."""

import triton

from tritonattn.configs import shipped


def versions(name):
    """Of the tables, the versions of Triton that they were made with ("triton"), or proved with besides ("also")."""
    return {table.made.get(name) for table in shipped.shipped_tables()}


OWN = {triton.__version__} == versions("triton")
PROVED = OWN or {triton.__version__} == versions("also")
