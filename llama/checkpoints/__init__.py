"""Files <-> weights: formats, loading, converting, inspecting, verifying, the demo model."""
