"""`report`: one page on an export, from the files in it."""
