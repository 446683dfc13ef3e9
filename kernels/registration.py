"""How an operator enters `torch.library`."""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "qwen"


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `qwen::<schema>`: in eager it runs `reference`; `fake` gives the outputs' shapes and dtypes.

    The operator is opaque to `torch.export` and Inductor: a compiled program calls its kernel. Kernels take
    plain pointers, hence the tag: Inductor makes an argument contiguous where it is not.
    """
    name = f"{NAMESPACE}::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.needs_contiguous_strides,))
    torch.library.impl(name, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(name, fake)
