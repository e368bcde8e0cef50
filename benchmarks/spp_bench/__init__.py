"""`spp bench`: speed and memory of slim models beside the dense one. Travels in the wheel."""
