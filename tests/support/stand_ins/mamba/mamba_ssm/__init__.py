"""A stand-in for mamba_ssm: what its kernels compute, in torch, for training."""
