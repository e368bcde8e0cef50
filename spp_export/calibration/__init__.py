"""What a forward pass over calibration text leaves behind: activations, gradients, moments.

Statistics are gathered once per model and text and cached; a scenario's mixture weighs them, and
`refit` solves for what is written instead of the weights that were cut.
"""
