"""From shards to batches on the device, in one global order of samples."""
