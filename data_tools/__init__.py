"""Tools that make and check webdataset shards."""
