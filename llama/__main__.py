"""`python -m llama VERB`, which under torchrun is `torchrun ... -m llama VERB`."""

from llama.commands.main import main

main()
