"""Everything that a GPU can answer in one sitting: `python -m benchmarks.gpu`."""
