"""The verbs of `llama3`."""
