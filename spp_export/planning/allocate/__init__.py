"""Which units a layer keeps at every size it may have, and which size each layer gets.

`options` turns scores into the best units of every size and their worth. The sizes of all layers
are then a multiple-choice knapsack (`sizes`), with a class for the heads and another for the
channels of every layer, or one size for all layers.
"""
