"""Training: text -> ids -> batches -> a checkpoint in the official layout."""
