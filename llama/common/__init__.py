"""What every room may use: progress bars, whole-or-nothing files, dtypes by name, options."""
