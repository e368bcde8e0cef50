"""What users bring and what `probe` leaves: scenarios, pools, artifacts.

Files are read and checked here; the rooms above see records only.
"""
