"""The only door to megatron-core: nothing outside this package imports `megatron`."""
