"""Where: everything that knows Megatron or Transformer Engine."""
