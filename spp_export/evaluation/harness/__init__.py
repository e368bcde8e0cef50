"""How good a choice of units is: rows of one table, measured alike, beside the controls that can
say no. What a row removes is planned elsewhere; here it is only measured."""
