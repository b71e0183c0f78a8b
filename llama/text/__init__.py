"""Text utilities of the tokenizer and of `Llama`: rank files, long texts, tools, detokenizing."""
