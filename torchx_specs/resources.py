"""Named resources: whole hosts, small enough for the hosts of the large clouds that go by that name.

Registered as entry points of `torchx.named_resources`, for `-h h100x8` in any component.
"""

from torchx.specs import Resource

GIB = 1024


def cpu8() -> Resource:
    """A host, or a share of one, without GPUs."""
    return Resource(cpu=8, gpu=0, memMB=30 * GIB)


def a100x8() -> Resource:
    """8 x A100; 40 or 80 GB each."""
    return Resource(cpu=88, gpu=8, memMB=600 * GIB)


def h100x8() -> Resource:
    """8 x H100, 80 GB each."""
    return Resource(cpu=88, gpu=8, memMB=1700 * GIB)


def h200x8() -> Resource:
    """8 x H200, 141 GB each."""
    return Resource(cpu=88, gpu=8, memMB=1700 * GIB)
