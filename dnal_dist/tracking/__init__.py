"""What a run records: metrics.jsonl, progress lines, W&B, TensorBoard."""
