"""Ranks: the job that torchrun starts, tensor parallelism, how weights are split."""
