"""What results look like in a terminal."""
