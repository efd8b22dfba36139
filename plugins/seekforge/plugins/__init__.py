"""Custom operators, one folder each, and the file formats that exporter and runtime share."""
