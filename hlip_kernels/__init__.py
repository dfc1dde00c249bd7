"""Attention over nested groups of a packed token stream: slice within scan within study."""

from .attention import hier_attention
from .backends import available_backends
from .dropin import HierarchicalAttention, rotate
from .layout import Grid, Level, StudyLayout
from .linear import is_fusible, is_plain, linear_of_norm, linear_of_pixels, mlp_of_norm
from .norm import add_regroup_norm, regroup
from .norm import regroup_prefix as regroup_prefix  # says what came in its place
from .ops import once_differentiable
from .products import hold_weights, multiplies_bfloat16

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
    "rotate",
]
