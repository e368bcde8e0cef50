"""What every room uses: errors, JSON files, disk and publishing, progress, versions.

Nothing here knows what a model is.
"""
