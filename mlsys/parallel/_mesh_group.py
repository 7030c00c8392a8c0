"""What may be passed as a group: one dimension of a mesh, a Communicator, or a process group; and which group that is.

See also:
    `mlsys.parallel.mesh` (makes meshes), `mlsys.parallel.pipeline`, `mlsys.parallel.tensor` (take one).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mlsys.parallel._communicator import Communicator


def plain_group(group: Any, kind: str) -> dist.ProcessGroup | None:
    """The process group of a Communicator or of a DeviceMesh of one dimension; a process group, or None, as it is."""
    if isinstance(group, Communicator):
        return group.group
    group = of_mesh(group, kind)
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(
        f"group must be a process group of this rank, a Communicator, a DeviceMesh of one dimension or None, got "
        f"{group!r}: torch.distributed.new_group makes one, and only its members may use it"
    )


def of_mesh(group: Any, kind: str) -> Any:
    """The process group of a DeviceMesh of one dimension, of this `kind`; anything else as it is."""
    if not hasattr(group, "get_group") or not hasattr(group, "mesh_dim_names"):
        return group
    if group.ndim != 1:
        names = tuple(group.mesh_dim_names or ())
        raise ValueError(
            f'group is a mesh of {group.ndim} dimensions {names}: pass the one that is meant, such as mesh["{kind}"]'
        )
    return group.get_group()
