"""The export's tensors here are too small for threads, which only get in each other's way."""

import torch

torch.set_num_threads(1)
