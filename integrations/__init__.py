"""Hosts that training scripts are written for: one thin file each, imported only when a script uses the host."""
