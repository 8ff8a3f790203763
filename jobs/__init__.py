"""What a long run needs: command line, processes, checkpoints, metrics, run directory."""
