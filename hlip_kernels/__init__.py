"""Attention over nested groups of a packed token stream: slice within scan within study."""

from .backends import available_backends
from .functional import add_regroup_norm, hier_attention, regroup
from .functional import regroup_prefix as regroup_prefix  # says what came in its place
from .layers import linear_of_norm, linear_of_pixels, mlp_of_norm
from .layout import Grid, Level, StudyLayout
from .linear import hold_weights, is_fusible, is_plain, multiplies_bfloat16
from .modules import HierarchicalAttention
from .ops import once_differentiable

__version__ = "0.2.0"  # setup.py reads it here

__all__ = [
    "Grid",
    "HierarchicalAttention",
    "Level",
    "StudyLayout",
    "add_regroup_norm",
    "available_backends",
    "hier_attention",
    "hold_weights",
    "is_fusible",
    "is_plain",
    "linear_of_norm",
    "linear_of_pixels",
    "mlp_of_norm",
    "multiplies_bfloat16",
    "once_differentiable",
    "regroup",
]
