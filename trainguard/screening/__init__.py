r"""AdvrBD, one file per step of the paper; `pipeline` has their order."""
