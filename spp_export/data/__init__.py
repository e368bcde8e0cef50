"""What users provide and what `probe` writes: scenarios, pools, artifacts.

Files are read and checked here; the rooms above see records only.
"""
