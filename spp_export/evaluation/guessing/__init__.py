"""The record of an architecture that no record names, from transformers' own classes: `stock` makes
tiny models, `tree` reads names and shapes off them, `arithmetic` what they compute otherwise than
Llama does, and `guess` puts the record together and proves it.
"""
