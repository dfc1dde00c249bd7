"""Attention over nested groups of a packed token stream: slice within scan within study."""

from .backends import available_backends
from .functional import add_regroup_norm, hier_attention, regroup_prefix
from .layout import Grid, Level, StudyLayout
from .modules import HierarchicalAttention

__all__ = [
    "Grid",
    "HierarchicalAttention",
    "Level",
    "StudyLayout",
    "add_regroup_norm",
    "available_backends",
    "hier_attention",
    "regroup_prefix",
]
