"""Replacements of the model's modules: fast attention and norms, kernels, quantized linears."""
