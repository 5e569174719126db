"""arfast: fast autoregressive language models."""
