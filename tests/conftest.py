"""Without a GPU, Triton kernels run in Triton's interpreter: it must be asked for before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """Keep a part of the tests: MAS_FAST_TEST_SHARD=2/8 keeps every eighth, from the third on."""
    shard = os.environ.get("MAS_FAST_TEST_SHARD")
    if shard:
        index, count = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
        items[:] = items[index::count]
