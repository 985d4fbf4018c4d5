"""One file a raw format; each opens a folder as the same `records.Source`."""
