"""`chat`: an export, or the dense model, in a conversation."""
