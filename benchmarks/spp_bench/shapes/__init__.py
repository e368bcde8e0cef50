"""Models of published shapes with random weights, measured on a card."""
