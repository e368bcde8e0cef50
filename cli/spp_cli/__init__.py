"""The command line: parses, calls `spp_export`, prints. Nothing is decided here."""
