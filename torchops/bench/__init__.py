"""What `torchops bench` runs: timing, problems, networks, report."""
