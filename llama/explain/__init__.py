"""What a model computes for a prompt: as tensors, as text, and as a page. See `Llama.explain`."""
