"""What the commands do, one function of the same name each; `spp_export` exposes them."""
