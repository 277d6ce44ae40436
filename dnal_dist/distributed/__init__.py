"""Processes and backends: DDP, FSDP2 and ZeRO behind one interface."""
