"""Backend layer: one folder for each type of device, found through `registry`."""
