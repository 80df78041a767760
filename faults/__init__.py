"""What breaks a run, and what is lost then: `python -m faults`."""
