"""Raw tables and dumps in, one corpus on disk out. The only room that reads raw data."""
