"""How good a choice of units is: rows of one table, measured alike and beside controls."""
