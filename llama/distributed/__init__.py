"""Ranks: torchrun's job, tensor parallelism, how weights are split, a rank's device."""
