"""What every room uses: errors, JSON files, disk and publishing, versions.

Nothing here knows what a model is.
"""
