"""The operators of the model: importing this package registers every `qwen::` operator.

Each folder holds one operator or family: `__init__.py` (schema, shape rule, registration), `reference.py`
(plain PyTorch, the definition of what the operator computes and what it runs in eager), `cpu.h` and `cpu.cpp`
(the kernel that compiled programs call on a machine without a GPU), `cases.py` (shapes and tolerances for
tests and benchmarks). `norm` has a reference alone: Inductor compiles it. `blocks` has the operators of a
cuda program, each a few of the others'.
"""

from . import attention, blocks, gated_delta, linear, moe, norm, sample

__all__ = ["attention", "blocks", "gated_delta", "linear", "moe", "norm", "sample"]
