"""`llama3 serve`: an OpenAI-compatible server on the engine, and its chat page."""
