"""The layouts of checkpoints: Meta's, quantized, Hugging Face's, GGUF."""
