"""Helpers that import nothing else of the package: files, dtypes by name, options, progress."""
