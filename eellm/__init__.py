"""eellm: train, tune, study and serve early-exit large language models on megatron-core."""

__version__ = "0.1.0"
