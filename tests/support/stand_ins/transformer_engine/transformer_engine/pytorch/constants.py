"""Names of dtypes."""

import torch

TE_DType = {torch.float32: "fp32", torch.bfloat16: "bf16"}
