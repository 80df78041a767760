"""What the scripts share and a reader may skip at first: devices, checkpoints, text files."""
