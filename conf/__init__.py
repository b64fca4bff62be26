"""Hydra's configuration files, available as `pkg://conf` from any directory."""
