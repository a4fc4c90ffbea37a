"""Exact Memory Aware Synapses at the price of one batched backward.

Ω = (1/N) Σ_n |∂‖F(x_n; θ)‖²/∂θ|        and        L(θ) + λ Σ Ω (θ − θ*)²
"""

from mas_fast import objectives, optim
from mas_fast.coverage import Coverage
from mas_fast.errors import CaptureError
from mas_fast.estimate import capture, estimate_importance
from mas_fast.importance import Importance
from mas_fast.kernels.ops import implementations
from mas_fast.mas import MAS
from mas_fast.verify import verify

__version__ = "0.1.0"

__all__ = [
    "MAS",
    "CaptureError",
    "Coverage",
    "Importance",
    "capture",
    "estimate_importance",
    "implementations",
    "objectives",
    "optim",
    "verify",
]
