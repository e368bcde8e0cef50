"""`chat`: a conversation with an export or the dense model."""
