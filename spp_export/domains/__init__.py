"""Which knowledge domains a model tells apart, and which of them a scenario draws on.

`probe_model` is the offline stage, made once per model; `diagnosis` reads a scenario with it.
"""
