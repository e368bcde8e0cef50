"""Is the slim model what was promised, and how good is it?

The oracle is the dense model with the same units masked; parity and quality are measured against
it.
"""
