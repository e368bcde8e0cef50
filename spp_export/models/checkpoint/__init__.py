"""Model directories on disk: reading dense ones, writing slim ones, publishing either at once.

`source` opens and checks a dense model, `slim` writes the weights of a slim one through `reader`
and `writer`, `atomic` and `manifest` make the directory appear whole or not at all.
"""
