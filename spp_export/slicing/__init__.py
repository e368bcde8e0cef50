"""From a plan to weights: which elements stay, what config says so, what compensates the rest."""
