"""What the tokenizer and `Llama` need of text: rank files, long texts, tools, detokenizing."""
