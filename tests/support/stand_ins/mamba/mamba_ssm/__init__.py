"""A stand-in for mamba_ssm: shapes of its kernels, none of their meaning."""
