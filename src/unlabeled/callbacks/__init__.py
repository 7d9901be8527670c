"""What watches a training run: checkpoints, collapse monitors, throughput, probes."""
