"""Evaluation by lm-eval. Importing this registers `LlamaLM` there as the model "llama3".

Needs the package lm-eval (extra `eval`).
"""

from llama.evaluation.lm import LlamaLM

__all__ = ["LlamaLM"]
