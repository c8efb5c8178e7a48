"""Causal attention as two explicit steps, by the fastest library kernel that is exact for the batch at hand.

Which keys a query sees is said in O(S): a window, and where documents begin. A dense `[S, S]` mask is made only where
nothing but transformers' own attention function computes the call.
"""

from ftcore_kernels.layers.decoder.attention.branches import Branches
from ftcore_kernels.layers.decoder.attention.capped import Capped
from ftcore_kernels.layers.decoder.attention.choice import choose
from ftcore_kernels.layers.decoder.attention.documents import Documents
from ftcore_kernels.layers.decoder.attention.interface import use
from ftcore_kernels.layers.decoder.attention.kernels import Attention, Cudnn, Differentiated, Flash
from ftcore_kernels.layers.decoder.attention.mask import Mask, Reading, reading
from ftcore_kernels.layers.decoder.attention.said import handed, taken, takes_branches

__all__ = [
    "Attention",
    "Branches",
    "Capped",
    "Cudnn",
    "Differentiated",
    "Documents",
    "Flash",
    "Mask",
    "Reading",
    "choose",
    "handed",
    "reading",
    "taken",
    "takes_branches",
    "use",
]
