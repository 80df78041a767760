"""What the scripts share and a reader may skip at first: devices, checkpoints, text files, batches of chats."""
