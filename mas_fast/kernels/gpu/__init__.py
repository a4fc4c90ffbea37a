"""The ops that accumulate Ω on NVIDIA GPUs, as Triton kernels; each file holds one op, its kernels and its launch."""

from mas_fast.kernels.gpu.affine import accumulate_affine_
from mas_fast.kernels.gpu.conv import accumulate_conv_
from mas_fast.kernels.gpu.embedding import accumulate_embedding_
from mas_fast.kernels.gpu.linear import accumulate_linear_

__all__ = ["accumulate_affine_", "accumulate_conv_", "accumulate_embedding_", "accumulate_linear_"]
