"""What to beat and how fast it is: `python -m bench`."""
