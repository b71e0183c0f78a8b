"""Generation from ids to ids: requests, slots of the KV cache, sampling, scoring."""
