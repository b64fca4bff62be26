"""Hydra's configuration files, found as `pkg://conf` from any directory."""
